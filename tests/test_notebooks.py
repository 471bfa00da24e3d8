"""What holds for every notebook, checked without running any."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    [*ROOT.glob("*.ipynb"), *ROOT.glob("nbs/[!_.]*.ipynb"), *ROOT.glob("neuro_nbs/[!_.]*.ipynb")]
)
LIMIT = 1.5e6  # bytes of a notebook with its figures

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.relative_to(ROOT).as_posix() for p in NOTEBOOKS])


def cells(path: Path, kind: str) -> list[dict]:
    "Cells of one kind; `source` as one text."
    found = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
    return [
        {**c, "source": c["source"] if isinstance(c["source"], str) else "".join(c["source"])} for c in found
    ]


def statements(cell: dict) -> list[ast.stmt]:
    "Parsed code of a cell, without magics."
    lines = cell["source"].splitlines()
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))).body


def directive(cell: dict, names: str) -> re.Match | None:
    "The first `#| name` line of a cell whose name matches."
    return re.search(rf"^\s*#\|\s*({names})\b[ \t]*(.*)$", cell["source"], flags=re.M)


def default_exp(path: Path) -> str | None:
    "The module a notebook exports."
    found = [m.group(2).strip() for m in (directive(c, "default_exp") for c in cells(path, "code")) if m]
    assert len(found) < 2, f"more than one default_exp: {found}"
    return found[0] if found else None


def test_there_are_notebooks_and_nbdev_sees_them_all():
    "nbdev_test prints 'No files were eligible' and succeeds when its search finds nothing."
    seen = {Path(p).resolve() for p in nbglob(path=get_config(path=ROOT).nbs_path)}
    assert len(NOTEBOOKS) > 2
    assert seen == set(NOTEBOOKS)
    assert not [p for folder in (".", "nbs", "neuro_nbs") for p in (ROOT / folder).glob(".notest")]


@each
def test_opens_with_title_and_summary_alone(path):
    """nbdev turns the first cell into the page's title and description and drops whatever else it holds."""
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    text = cells(path, "markdown")[0]["source"]
    assert re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*\s*", text), (
        "the first cell must be '# Title', a blank line, '> summary in one line', and nothing else "
        f"(put what follows into a second cell):\n{text[:400]}"
    )


@each
def test_imports_have_cells_of_their_own(path):
    """nbdev executes every cell that holds an import while it builds the site."""
    for cell in cells(path, "code"):
        if directive(cell, "export|exports|exporti"):
            continue
        body = statements(cell)
        nested = any(isinstance(n, ast.Import | ast.ImportFrom) for s in body for n in ast.walk(s))
        alone = all(isinstance(s, ast.Import | ast.ImportFrom) for s in body)
        assert alone or not nested, f"an import among other code:\n{cell['source']}"


@each
def test_exported_imports_come_apart_from_definitions(path):
    for cell in cells(path, "code"):
        if directive(cell, "export|exports|exporti"):
            kinds = {isinstance(s, ast.Import | ast.ImportFrom) for s in statements(cell)}
            assert len(kinds) < 2, f"imports and definitions in one exported cell:\n{cell['source'][:400]}"


@each
def test_never_imports_the_module_it_exports(path):
    """The notebook's classes would exist twice, and isinstance would tell them apart."""
    module = default_exp(path)
    if module is None:
        return
    own = f"cortexlit.{module}"
    parent, _, last = own.rpartition(".")
    for cell in cells(path, "code"):
        for node in (n for s in statements(cell) for n in ast.walk(s)):
            if isinstance(node, ast.Import):
                assert own not in [a.name for a in node.names], cell["source"]
            elif isinstance(node, ast.ImportFrom):
                assert node.module != own, cell["source"]
                assert not (node.module == parent and last in [a.name for a in node.names]), cell["source"]


@each
def test_saved_outputs_are_there_and_hold_no_error(path):
    code = cells(path, "code")
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs or not code, "no outputs: execute the notebook before committing it"
    errors = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    assert not errors


@each
def test_saved_outputs_name_no_private_folder(path):
    """An absolute path differs on every machine, and says who made the notebook."""
    for cell in cells(path, "code"):
        texts = [o.get("text") or o.get("data", {}).get("text/plain") or "" for o in cell["outputs"]]
        found = re.findall(r"(?<![\w.])/(?:home|root|Users|work)/\S+", "".join("".join(t) for t in texts))
        assert not found, f"{found} in the output of:\n{cell['source'][:400]}"


@each
def test_no_two_equal_headings(path):
    """Two equal headings make a link to either of them ambiguous."""
    text = "\n\n".join(c["source"] for c in cells(path, "markdown"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    counts = Counter(h.strip().lower() for h in re.findall(r"^#{1,6}[ \t]+(.+)$", text, flags=re.M))
    assert not [h for h, n in counts.items() if n > 1]


# Pages whose figures have no words yet, because others work on them; a page that has got them leaves the list.
WITHOUT_WORDS: set[str] = set()


def wordless(path: Path) -> list[str]:
    "Cells that show a picture without alternative text and a caption, each on a line of its own in quotes."
    found = []
    for cell in cells(path, "code"):
        shows = any(k.startswith("image/") for o in cell["outputs"] for k in o.get("data", {}))
        told = [directive(cell, name) for name in ("fig-alt", "fig-cap")]
        if shows and not all(
            m and re.fullmatch(r'"[^"]{15,}"', m.group(2).lstrip(": ").rstrip()) for m in told
        ):
            found.append(f"{cell['id']}: {cell['source'][:100]}")
    return found


@each
def test_every_figure_has_alternative_text_and_a_caption(path):
    assert bool(wordless(path)) == (path.stem in WITHOUT_WORDS), "\n".join(wordless(path)) or "off the list"


def test_a_figure_without_words_is_noticed(tmp_path):
    picture = [{"output_type": "display_data", "data": {"image/png": ""}}]
    sources = ("plot()", '#| fig-alt: "A line that rises."\nplot()', "#| fig-alt: A line.\n#| fig-cap: Rising.\nplot()",
               '#| fig-alt: "A line that rises."\n#| fig-cap: "What was found."\nplot()')  # fmt: skip
    code = [
        {"cell_type": "code", "id": str(k), "source": s, "outputs": picture} for k, s in enumerate(sources)
    ]
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": code}))
    assert [text[0] for text in wordless(tmp_path / "page.ipynb")] == ["0", "1", "2"]


FIRST = 20  # lines of code that a reader sees, at most, before the first picture of a page
FOLDED = r"export|exports|exporti|hide|echo:\s*false|include:\s*false|code-fold:\s*true"
# Pages that show none, because what they answer with is text.
WITHOUT_PICTURE = {
    "00a_checks": "messages of errors",
    "00b_concepts": "a table of links",
    "00d_reference": "a list of names",
    "02c_folder": "a table of faults and messages",
    "19_cli": "what commands print",
    "19a_refusals": "messages of errors",
    "19c_many_processes": "what commands print",
    "19d_shell": "what commands print",
    "19e_pictures": "what commands print",
    "19f_fmri": "what commands print",
    "19g_silico": "what commands print",
}


def seen_before_picture(path: Path) -> int | None:
    "Lines of code above the first picture that are not folded, exported, imports or comments; None: no picture."
    count = 0
    for cell in cells(path, "code"):
        if not re.search(rf"^\s*#\|\s*({FOLDED})\b", cell["source"], flags=re.M):
            body = statements(cell)
            if not all(isinstance(s, ast.Import | ast.ImportFrom) for s in body):
                lines = [line.strip() for line in cell["source"].splitlines()]
                count += sum(bool(line) and not line.startswith("#") for line in lines)
        data = [o.get("data", {}) for o in cell["outputs"]]
        if any(
            k.startswith(("image/", "video/")) or re.search("<(img|svg|video)", "".join(v))
            for d in data
            for k, v in d.items()
        ):
            return count
    return None


@each
def test_first_picture_comes_early(path):
    """A reader sees what a page is about before its machinery."""
    count = seen_before_picture(path)
    assert (count is None) == (path.stem in WITHOUT_PICTURE), "a picture, or off the list"
    assert (count or 0) <= FIRST, (
        f"{count} lines of code before the first picture, {FIRST} allowed: fold what is not the idea "
        "(`#| code-fold: true`), or show the answer first"
    )


def test_lines_before_a_picture_are_counted(tmp_path):
    picture = [{"output_type": "display_data", "data": {"image/png": ""}}]
    sources = (
        "import re",
        "x = 1\n\n# a comment\ny = 2",
        "#| code-fold: true\nz = 3",
        "#| exports\nw = 4",
        "plot()",
    )
    code = [{"cell_type": "code", "id": str(k), "source": s, "outputs": []} for k, s in enumerate(sources)]
    page = tmp_path / "page.ipynb"
    page.write_text(json.dumps({"cells": code}))
    assert seen_before_picture(page) is None
    code[-1]["outputs"] = picture
    page.write_text(json.dumps({"cells": code}))
    assert seen_before_picture(page) == 3


@each
def test_is_small(path):
    assert path.stat().st_size < LIMIT, f"{path.stat().st_size / 1e6:.1f} MB: lower the dpi of the figures"


def test_names_are_unique_across_folders():
    """nbdev_test reports notebooks by file name alone."""
    assert not [name for name, n in Counter(p.name for p in NOTEBOOKS).items() if n > 1]


def test_one_notebook_for_each_module():
    modules = Counter(m for m in map(default_exp, NOTEBOOKS) if m)
    assert not [module for module, n in modules.items() if n > 1]
