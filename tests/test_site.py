"""What the build of the site takes from nbdev's pages, and what it notices if it were left; on toy pages."""

import base64
import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cortexlit import _modidx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_docs  # noqa: E402
import thumbnails  # noqa: E402

LINK = "[`DataError`](https://cortexlit.github.io/cortexlit/nbs/core.html#dataerror)"
COMMAND = "[`demo`](https://cortexlit.github.io/cortexlit/neuro_nbs/cli.html#demo)"


def page(folder: Path, name: str, text: str, code: str = "", outputs: tuple[dict, ...] = ()) -> Path:
    "A page of one markdown and one code cell."
    (folder / "neuro_nbs").mkdir(exist_ok=True)
    cells = [
        {"cell_type": "markdown", "source": text},
        {"cell_type": "code", "source": code, "outputs": [*outputs]},
    ]
    path = folder / "neuro_nbs" / name
    path.write_text(json.dumps({"cells": cells}))
    return path


def shown(text: str) -> dict:
    return {"output_type": "execute_result", "data": {"text/markdown": text}}


def told(text: str) -> dict:
    return {"output_type": "stream", "name": "stderr", "text": text}


def test_names_in_a_signature_are_no_links_and_names_in_words_are(tmp_path):
    signature = f"```python\ndef f(\n    path, # as a {LINK}\n)\n```\n\nRaises {LINK}."
    path = page(tmp_path, "page.ipynb", f"See {LINK}.", "show_doc(f)", (shown(signature),))
    check_docs.mend(tmp_path)
    _, text, code = json.loads(path.read_text())["cells"]
    assert text["source"] == f"See {LINK}."
    assert code["outputs"][0]["data"]["text/markdown"] == signature.replace(f"a {LINK}", "a `DataError`")


def test_a_word_that_is_a_command_elsewhere_is_no_link_to_it(tmp_path):
    first = page(tmp_path, "page.ipynb", f"At {COMMAND} scale.")
    other = page(tmp_path, "19_cli.ipynb", f"The command {COMMAND}.")
    check_docs.mend(tmp_path)
    assert json.loads(first.read_text())["cells"][1]["source"] == "At `demo` scale."
    assert json.loads(other.read_text())["cells"][1]["source"] == f"The command {COMMAND}."


def test_messages_of_the_build_go_and_those_of_a_notebook_stay(tmp_path):
    path = page(
        tmp_path, "page.ipynb", "", "show_doc(f)", (told("/usr/site-packages/x.py: warning"), shown("f"))
    )
    other = page(tmp_path, "other.ipynb", "", "f()", (told("UserWarning: the pupil was not measured"),))
    check_docs.mend(tmp_path)
    assert [o["output_type"] for o in json.loads(path.read_text())["cells"][2]["outputs"]] == [
        "execute_result"
    ]
    assert json.loads(other.read_text())["cells"][2]["outputs"][0]["name"] == "stderr"


def test_a_page_with_code_says_where_it_can_be_run(tmp_path):
    path = page(tmp_path, "page.ipynb", "Text.", "f()")
    check_docs.mend(tmp_path)
    first, *_ = json.loads(path.read_text())["cells"]
    there = "cortexlit/cortexlit/blob/main/neuro_nbs/page.ipynb"
    assert f"https://colab.research.google.com/github/{there})" in first["source"]
    assert "/v2/gh/cortexlit/cortexlit/main?urlpath=lab/tree/neuro_nbs/page.ipynb)" in first["source"]
    asked = (ROOT / "binder/requirements.txt").read_text()
    assert "constraints.txt" in asked and "[dev]" in asked
    assert (ROOT / "binder/runtime.txt").read_text().strip() == "python-3.11"


def test_exported_source_is_closed_and_other_code_is_as_it_was(tmp_path):
    exported = '#| code-fold: show\n#| code-summary: "Exported source"\ndef f(): ...'
    path = page(tmp_path, "page.ipynb", "", exported)
    other = page(tmp_path, "other.ipynb", "", "#| code-fold: show\nf()")
    check_docs.mend(tmp_path)
    assert json.loads(path.read_text())["cells"][2]["source"].startswith(
        "#| code-fold: true\n#| code-summary"
    )
    assert json.loads(other.read_text())["cells"][2]["source"] == "#| code-fold: show\nf()"


@pytest.mark.parametrize(
    ("text", "output", "problem"),
    [
        ("nothing", "nothing", None),
        (f"{LINK}", f"{LINK}", None),
        (f"```python\n# {LINK}\n```", "", "a link inside code"),
        ("", f"```python\n# {LINK}\n```", "a link inside code"),
        (f"{COMMAND}", "", "leads to a command"),
    ],
)
def test_what_was_left_is_noticed(text, output, problem):
    found = check_docs.leftovers({"cell_type": "markdown", "source": text, "outputs": [shown(output)]}, False)
    assert [problem in f for f in found] == ([] if problem is None else [True])


def test_a_path_of_the_machine_is_noticed():
    cell = {
        "cell_type": "code",
        "source": "f()",
        "outputs": [told("/home/me/.venv/lib/site-packages/x.py:3: odd")],
    }
    assert "a path of this machine" in check_docs.leftovers(cell, True)[0]


def test_the_sidebar_calls_a_page_as_the_home_page_does():
    home = "| [Core](nbs/00_core.ipynb) | places | |\n| [Plots](nbs/00a_plots.ipynb) | figures | |"
    pages = [
        {"text": "Core", "href": "nbs/00_core.ipynb"},
        {"text": "Figures", "href": "nbs/00a_plots.ipynb"},
    ]
    pages = [{"section": "Foundations", "contents": [*pages, "nbs/01_autograd.ipynb"]}]
    config = {"website": {"sidebar": {"contents": [{"text": "Overview", "href": "index.ipynb"}, *pages]}}}
    found = check_docs.name_problems(config, home)
    assert len(found) == 2
    assert "00a_plots.ipynb is 'Figures' in the sidebar, 'Plots' at home" in found[0]
    assert "01_autograd.ipynb needs a short name" in found[1]


def test_the_small_pictures_are_drawn_from_the_figures_of_today():
    assert not thumbnails.outdated(), "run: python tools/thumbnails.py"
    folder = ROOT / thumbnails.FOLDER
    assert sum(p.stat().st_size for p in folder.glob("*.png")) < 200_000
    assert (ROOT / thumbnails.CARD).stat().st_size < 100_000


def test_an_outdated_missing_or_unwanted_picture_is_noticed_and_mended(tmp_path):
    def notebook(path: Path, text: str, colour: str) -> None:
        drawn = io.BytesIO()
        Image.new("RGB", (300, 200), colour).save(drawn, "PNG")
        picture = {"data": {"image/png": base64.b64encode(drawn.getvalue()).decode()}}
        cells = [{"source": text}, {"source": "plot()", "outputs": [picture]}]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"cells": cells}))

    notebook(tmp_path / "index.ipynb", "## Where to begin\n\n| [one](nbs/01_one.ipynb), 5 |", "red")
    notebook(tmp_path / "nbs" / "01_one.ipynb", "", "red")
    assert [text.partition(": ")[2] for text in thumbnails.outdated(tmp_path)] == ["missing", "missing"]
    thumbnails.draw_all(tmp_path)
    assert not thumbnails.outdated(tmp_path)
    notebook(tmp_path / "nbs" / "01_one.ipynb", "", "blue")
    (tmp_path / thumbnails.FOLDER / "02_two.png").write_bytes(b"")
    first, second = thumbnails.outdated(tmp_path)
    assert "01_one.png: drawn from another figure" in first and "02_two.png: no stop has it" in second
    thumbnails.draw_all(tmp_path)
    assert not thumbnails.outdated(tmp_path)


def test_files_of_the_site_that_its_settings_name_are_there():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    page, named = site["format"]["html"], site["website"]
    dark = [name for name in page["theme"]["dark"] if name.endswith(".scss")]
    files = [*site["project"]["resources"], named["favicon"], named["image"], page["css"], *dark]
    assert not [name for name in files if not (ROOT / name).is_file()]
    assert named["favicon"] in site["project"]["resources"] and named["image"] in site["project"]["resources"]
    assert "/*-- scss:defaults --*/" in (ROOT / dark[0]).read_text(encoding="utf-8")


HTML = (
    '<html><head><title>T</title><meta property="og:image" content="c.png"><link rel="icon" href="f.svg"></head>'
    '<body><h2 id="here">x</h2>BODY</body></html>'
)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            '<a href="#here">a</a> <a href="../index.html">b</a> <a href="https://elsewhere.org/x#y">c</a>',
            None,
        ),
        ('<a href="https://us.org/lib/neuro_nbs/page.html#here">own</a> <img src="../p.png" alt="">', None),
        ("<code>[@key] $$x$$</code> <pre>\\frac</pre>", None),
        ('<a href="other.html">a</a>', "no such file: other.html"),
        ('<a href="#there">a</a>', "no place #there on page.html"),
        ('<a href="https://us.org/lib/gone.html">a</a>', "no such file: gone.html"),
        ('<img src="../p.png">', "a picture without words"),
        ("as [@key] says", "a formula or a citation"),
        ("$$x^2$$", "a formula or a citation"),
    ],
)
def test_a_rendered_page_is_looked_at(body, problem, tmp_path):
    (tmp_path / "neuro_nbs").mkdir()
    (tmp_path / "p.png").touch()
    (tmp_path / "index.html").write_text(HTML.replace("BODY", ""))
    (tmp_path / "neuro_nbs/page.html").write_text(HTML.replace("BODY", body))
    found = check_docs.site_problems(tmp_path, ["index.html", "neuro_nbs/page.html"], "https://us.org/lib/")
    assert [problem in text for text in found] == ([] if problem is None else [True]), found


def test_a_page_that_was_not_rendered_or_has_no_card_is_noticed(tmp_path):
    (tmp_path / "index.html").write_text(HTML.replace("og:image", "og:nothing"))
    first, second = check_docs.site_problems(
        tmp_path, ["index.html", "neuro_nbs/page.html"], "https://us.org/"
    )
    assert "neuro_nbs/page.html: not rendered" in first and "no card" in second


def test_the_list_of_every_name_is_that_of_the_library():
    cells = json.loads((ROOT / "nbs/00d_reference.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join(cells[-1]["outputs"][0]["data"]["text/markdown"])
    listed = {(m[2], m[1]) for m in re.finditer(r"^\| \[\**(\w+)\**\]\(\.\./(\S+?)\) \|", text, re.M)}
    known = set()
    for module, symbols in _modidx.d["syms"].items():
        offered = getattr(
            importlib.import_module(module.removesuffix(".py").replace("/", ".")), "__all__", ()
        )
        for name, (page, _) in symbols.items():
            parts = name.removeprefix(f"{module}.").split(".")
            if len(parts) == 1 and parts[0] in offered and module != "cortexlit.cli" and page:
                known.add((page, parts[0]))
    assert listed == known, "run: python tools/run_notebooks.py --save nbs/00d_reference.ipynb"


def test_the_site_is_checked_whatever_words_its_caller_was_given(monkeypatch):
    "The runner of notebooks has an option of the same name."
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--site"])
    monkeypatch.setattr(check_docs, "build", lambda folder: "as far as this")
    assert check_docs.main() == 1
