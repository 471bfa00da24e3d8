"""The tools behind `make test` and `make demo`: which cells run, what is told, and that a failure stops nothing else."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cortexlit import cli
from cortexlit.core import MissingError
from cortexlit.evaluation.scores import ScoreSheet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
jobs, run_notebooks, demo, bench_table = (
    importlib.import_module(name) for name in ("jobs", "run_notebooks", "demo", "bench_table")
)


def notebook(path: Path, *sources: str, output: str = "") -> Path:
    "Write a notebook; each code cell has `output` as its committed output."
    outputs = [{"name": "stdout", "output_type": "stream", "text": [output]}] if output else []
    cells = [{"cell_type": "markdown", "id": "aa", "metadata": {}, "source": "# Title\n\n> Summary"}]
    cells += [
        {"cell_type": "code", "execution_count": None, "id": f"c{k}", "metadata": {}, "outputs": outputs, "source": s}
        for k, s in enumerate(sources)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


# --- a run of three notebooks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    "A good notebook, one with an error and one that kills its process; what was printed, and the folder."
    folder = tmp_path_factory.mktemp("toys")
    good = (
        "x = 1\nprint('fresh', x)",
        "#| slow\nopen('slow', 'w').close()",
        "#| data park_230809\nopen('real', 'w').close()",
        "#| eval: false\nopen('never', 'w').close()",
        "assert x == 1",
    )
    notebook(folder / "good.ipynb", *good, output="committed output")
    notebook(folder / "bad.ipynb", "def f(a):\n    return 1 / a", "f(0)", "open('after', 'w').close()")
    notebook(folder / "dead.ipynb", "import os", "os.write(2, b'last words'); os._exit(3)")
    (folder / "data").mkdir()
    words = [sys.executable, ROOT / "tools" / "run_notebooks.py", *sorted(folder.glob("*.ipynb"))]
    words += ["--pages", folder / "pages", "--times", folder / "times.json"]
    env = os.environ | {"CORTEXLIT_DATA": str(folder / "data")}
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=1200), folder


def test_a_failure_stops_no_other_and_the_exit_status_says_so(told):
    done, folder = told
    assert done.returncode == 1, done.stderr
    assert {p.name for p in (folder / "pages").iterdir()} == {"good.html", "bad.html"}
    assert list(json.loads((folder / "times.json").read_text())) == ["good.ipynb"]


def test_each_end_is_one_line_that_says_what_is_left(told):
    lines = [line for line in told[0].stdout.splitlines() if " of 3] " in line]
    assert [re.search(r"\[(\d) of 3\]", line).group(1) for line in lines] == ["1", "2", "3"]
    assert {re.search(r"(ok|FAILED) +(\S+)", line).groups() for line in lines} == {
        ("ok", "good.ipynb"),
        ("FAILED", "bad.ipynb"),
        ("FAILED", "dead.ipynb"),
    }
    assert all("now: " in line and "left: about " in line for line in lines[:2])


def test_failures_are_one_readable_block_at_the_end(told):
    out = told[0].stdout
    block = out[out.index("=====") :]
    assert "2 failed: " in block.splitlines()[-1] and "[" not in block.splitlines()[-1]
    assert "cell 2, id c1:\n    f(0)\n" in block and "ZeroDivisionError: division by zero" in block
    assert "the cell, line 2, in f: return 1 / a" in block
    assert "exit status 3" in block and "last words" in block
    assert "\x1b" not in out + told[0].stderr and "\r" not in out and "site-packages" not in block
    assert told[0].stderr == ""


def test_flagged_cells_stay_out_and_keep_their_outputs(told):
    _, folder = told
    assert not [name for name in ("slow", "real", "never", "after") if (folder / name).exists()]
    page = (folder / "pages" / "good.html").read_text()
    assert page.count("committed output") == 3 and "fresh 1" in page
    assert "#| slow" not in re.sub("<[^>]+>", "", page)


def test_a_missing_file_is_told_in_one_line(told):
    done, folder = told
    lines = [line for line in done.stdout.splitlines() if line.startswith("left out:")]
    assert len(lines) == 1 and "cells of good that read park_gratings/230809" in lines[0]
    assert str(folder / "data") in lines[0] and "make data" in lines[0]


def test_a_figure_that_cannot_be_drawn_fails_and_others_are_drawn_once(tmp_path):
    good = "fig, ax = plt.subplots(layout='constrained')\nax.add_artist(Count())\nfig;"
    count = "class Count(matplotlib.artist.Artist):\n    def draw(self, renderer):\n        times.append(1)\ntimes = []"
    start = "import matplotlib.artist\nimport matplotlib.pyplot as plt"
    bad = "plt.title(r'$\\nosuch{x}$');"
    path = notebook(tmp_path / "x.ipynb", start, count, good, "print(times)\nassert len(times) == 1", bad)
    words = [sys.executable, "-c", (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import jobs, run_notebooks\n"
        "try:\n    run_notebooks.execute(Path(sys.argv[2]))\nexcept jobs.Problem as problem:\n    print(problem)"
    ), ROOT / "tools", path]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.stdout.startswith("cell 5, id c4:\n") and "Unknown symbol: \\nosuch" in done.stdout, done


def test_a_light_job_begins_while_the_longer_ones_wait_for_the_libraries():
    work = [jobs.Job("long", os.getpid, seconds=9.0), jobs.Job("light", os.getpid, seconds=1.0, light=True)]
    done = jobs.run(work, workers=1, say=lambda line: None)
    assert [(d.name, d.problem) for d in done] == [("light", None), ("long", None)]


# --- which cells ------------------------------------------------------------------------------------------------------


def test_flags_and_files_decide_which_cells_run(tmp_path):
    path = notebook(
        tmp_path / "x.ipynb", "1", "#| slow\n1", "#| data a\n1", "#| data a b\n1", "#| data\n1", "#| gpu\n1"
    )

    def runs(*flags: str, missing: tuple[str, ...] = ()) -> list[int]:
        cells = run_notebooks.read(path).cells[1:]
        skip = run_notebooks.skip_flags()
        return [
            k for k, c in enumerate(cells) if run_notebooks.why_not(c, set(flags), set(missing), skip) is None
        ]

    assert runs(missing=("a", "b")) == [0]
    assert runs(missing=("b",)) == [0, 2]  # `data` without names wants all files: only when asked for
    assert runs() == [0, 2, 3]
    assert runs("data", missing=("a", "b")) == [0, 2, 3, 4]
    assert runs("slow", missing=("a", "b")) == [0, 1]
    assert run_notebooks.holds(path, ["gpu"]) and not run_notebooks.holds(path, ["export"])


def test_asked_for_cells_run_and_outputs_can_be_saved(tmp_path):
    wide = "import pandas as pd\nprint('told');\npd.DataFrame([[1.25] * 12], columns=[f'column {k}' for k in range(12)])"
    path = notebook(
        tmp_path / "x.ipynb",
        "#| slow\nprint(6 * 7)",
        "#| data nothing\n1",
        "print('kept');",
        wide,
        output="old",
    )
    words = [sys.executable, "-c", (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import run_notebooks\n"
        "print(run_notebooks.execute(Path(sys.argv[2]), {'slow'}, {'nothing'}, save=True))"
    ), ROOT / "tools", path]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.stdout.strip() == "3", done.stderr
    cells = json.loads(path.read_text())["cells"][1:]
    assert ["".join(c["outputs"][0]["text"]) for c in cells] == ["42\n", "old", "kept\n", "told\n"]
    assert "".join(cells[0]["source"]).startswith("#| slow")
    assert "".join(cells[2]["source"]) == "print('kept');"  # as it was written
    table = "".join(cells[3]["outputs"][1]["data"]["text/plain"])
    assert "column 5" in table and "..." not in table  # whole, as in Jupyter


def test_every_file_that_a_cell_names_is_registered():
    known, wanted = cli.real_files(), run_notebooks.needed(run_notebooks.notebooks())
    assert set(wanted) <= set(known)
    assert "park_230809" in wanted and "animacy.csv" in wanted


def test_an_unknown_file_is_refused(tmp_path):
    with pytest.raises(jobs.Problem, match="data parc.*x: no such file.*park_230809"):
        run_notebooks.missing_files([notebook(tmp_path / "x.ipynb", "#| data parc\n1")])


INNER = (
    ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)


def bound(tree: ast.AST, inside: bool) -> set[str]:
    "Names that the code of a cell binds, with or without those inside functions and comprehensions."
    found, nodes = set(), list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {a.asname or a.name for a in node.names}
        if inside or not isinstance(node, INNER):
            nodes += ast.iter_child_nodes(node)
    return found


def leaning(path: Path) -> list[str]:
    "Names that an unmarked cell takes from a marked one, which may not have run."
    skip, safe, only_marked, found = run_notebooks.skip_flags(), set(), set(), []
    for cell in run_notebooks.read(path).cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        if skip & (cell.directives_ or {}).keys():
            only_marked |= bound(tree, False) - safe
        else:
            found += sorted(only_marked & used - bound(tree, True))
            safe |= bound(tree, False)
            only_marked -= safe
    return found


@pytest.mark.parametrize("path", run_notebooks.notebooks(), ids=lambda path: path.stem)
def test_no_unmarked_cell_leans_on_a_marked_one(path):
    assert leaning(path) == []


def test_leaning_on_a_marked_cell_is_seen(tmp_path):
    cells = [
        "a = 1",
        "#| data x\na = 2; b = 3",
        "def f(b):\n    return a + b",
        "#| slow\nprint(b)",
        "print(a, b)",
    ]
    assert leaning(notebook(tmp_path / "x.ipynb", *cells)) == ["b"]


# --- progress ---------------------------------------------------------------------------------------------------------


def job(name: str, seconds: float) -> jobs.Job:
    return jobs.Job(name, print, seconds=seconds)


def test_the_time_left_is_that_of_the_longest_worker():
    progress = jobs.Progress([job("a", 1)], 2, print)
    assert progress.left([], [job(n, s) for n, s in zip("abcd", (90, 60, 50, 20), strict=True)]) == 110
    assert progress.left([], []) == 0
    progress.expected, progress.took = 10.0, 20.0  # everything takes twice as long as it used to
    assert progress.left([], [job("a", 90)]) == 180


def test_silence_ends_with_a_line():
    said = []
    progress = jobs.Progress([job("long one", 300)], 2, said.append)
    running = [jobs._Running(job("long one", 300), None, None, Path("log"), time.monotonic() - 30)]
    progress.alive(running, [])
    assert said == []
    progress.told -= jobs.SILENCE + 1
    progress.alive(running, [])
    assert len(said) == 1 and re.search(r"running: long one for 30 s; left: about 4 min 30 s", said[0])


def test_longest_chain_first_and_each_after_what_it_waits_for():
    order = [
        jobs.Job("middle", str.upper, ("m",), 5),
        jobs.Job("long", str.upper, ("l",), 9, frozenset({"short", "not among them"})),
        jobs.Job("short", str.upper, ("s",), 1),
        jobs.Job("other", str.upper, ("o",), 7),
    ]
    done = jobs.run(order, workers=1, say=lambda line: None)
    assert [d.name for d in done] == ["short", "long", "other", "middle"]
    assert [d.value for d in done] == ["S", "L", "O", "M"]


def test_what_several_notebooks_read_is_made_first(tmp_path):
    texts = {"a": "embedded_session()", "b": 'embedded_session("demo")', "c": "1", "d": "embedded_things()"}
    paths = []
    for name, source in texts.items():
        paths.append(notebook(tmp_path / f"{name}.ipynb", source))
    work = {job.name: job for job in run_notebooks.jobs_of(paths, set(), set())}
    assert {n: job.after for n, job in work.items()} == {
        "embedded session": frozenset(),  # one page reads the subject: nobody waits for it
        **{f"{n}.ipynb": frozenset({"embedded session"} if n in "ab" else ()) for n in "abcd"},
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_job_outlives_the_process_that_started_it(tmp_path):
    "Killed outright, so that it cannot clean up."
    mark = tmp_path / "pid"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import jobs\n"
        "work = jobs.Job('long', exec, ('import os, time\\nopen(' + repr(sys.argv[2]) + ', \"w\").write(str(os.getpid()))\\ntime.sleep(900)',))\n"
        "jobs.run([work])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, ROOT / "tools", mark], stdout=subprocess.DEVNULL)
    while not (mark.is_file() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    for _ in range(1200):  # a minute on a busy machine; at once on an idle one
        try:
            state = Path(f"/proc/{mark.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the job goes on")


def test_pytest_says_what_is_running(tmp_path):
    (tmp_path / "conftest.py").write_text("from progress import pytest_configure\n")
    (tmp_path / "test_toy.py").write_text("import time\ndef test_long():\n    time.sleep(1.5)\n")
    env = os.environ | {"PYTEST_SILENCE": "0.3", "PYTHONPATH": str(ROOT / "tests")}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=1200)
    assert "0 of 1 done; running: test_toy.py::test_long for" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 passed")


# --- the demonstration ------------------------------------------------------------------------------------------------


def sheet(dataset: str) -> ScoreSheet:
    found, values = ScoreSheet(), np.full((6, 4), 0.1)
    found.add(
        "mean",
        "single-trial correlation",
        values,
        tier="test",
        dataset=dataset,
        split="repeats",
        split_hash="x",
    )
    return found


def fail(out: Path) -> None:
    raise ZeroDivisionError("by nothing")


def absent(out: Path) -> None:
    raise MissingError("the recording is not here")


PARTS = {
    "first": ("encoding", lambda out: sheet("embedded")),
    "second": ("encoding", fail),
    "real recording": ("encoding", absent),
}


def test_a_part_of_the_demonstration_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "DEMO", PARTS)
    monkeypatch.setattr(sys, "argv", ["cortexlit", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    assert end.value.code == 1
    assert [row.dataset for row in ScoreSheet.load(tmp_path).rows] == ["embedded"]
    assert (tmp_path / "scores.png").is_file()
    assert "0.1000 [0.1000, 0.1000]" in told.out
    assert "real recording: left out, the recording is not here" in told.err
    assert "scores 2 of 3: second: FAILED" in told.err and "ZeroDivisionError: by nothing" in told.err
    assert "\x1b" not in told.out + told.err


def test_a_demonstration_without_the_real_recording_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "DEMO", PARTS)
    cli.run_demo(tmp_path, print)
    capsys.readouterr()
    cli.show_demo(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert (
        len(lines) == 1
        and cli.DEMO_RECORDING in lines[0]
        and "make data" in lines[0]
        and "https://" in lines[0]
    )


def test_results_of_an_earlier_demonstration_do_not_pass_for_new(tmp_path, monkeypatch):
    sheet("old").save(tmp_path / "decoding")
    monkeypatch.setattr(cli, "DEMO", PARTS)
    cli.run_demo(tmp_path, print)
    assert not (tmp_path / "decoding" / "scores.json").exists()


def test_parts_of_the_demonstration_are_made_apart_and_put_together(tmp_path, monkeypatch, capsys):
    "In the order of the demonstration, whichever is made first; how often a test tier was opened stays with them."
    made = {name: sheet(name) for name in ("one", "two")}
    made["one"].opened, made["two"].opened = {"one": 1}, {"two": 3}
    parts = {name: ("encoding", lambda out, name=name: made[name]) for name in made}
    monkeypatch.setattr(cli, "DEMO", parts | {"fMRI": ("decoding", lambda out: sheet("fMRI"))})
    assert cli.run_demo(tmp_path, print, "two") == []
    assert [row.dataset for row in ScoreSheet.load(tmp_path).rows] == ["two"]
    assert not (tmp_path / "decoding").exists()
    assert cli.run_demo(tmp_path, print, "fMRI") == cli.run_demo(tmp_path, print, "one") == []
    both = ScoreSheet.load(tmp_path)
    assert [row.dataset for row in both.rows] == ["one", "two"] and both.opened == {"one": 1, "two": 3}
    assert [row.dataset for row in ScoreSheet.load(tmp_path / "decoding").rows] == ["fMRI"]
    capsys.readouterr()
    cli.show_demo(tmp_path)
    shown = re.findall(r"(\n*)((?:one|two), split|empty score sheet)", capsys.readouterr().out)
    assert shown == [("", "one, split"), ("\n\n", "two, split"), ("\n\n", "empty score sheet")]
    cli.clear_demo(tmp_path)
    assert not list(tmp_path.rglob("scores.*"))


def toy_scores(out: Path, only: str) -> None:
    if only == "embedded session by stimuli":
        sheet("embedded").save(out)


def test_a_page_that_fails_loses_neither_scores_nor_other_pages(tmp_path, monkeypatch, capsys):
    for stem, source in {
        "00_good": "print(1)",
        "08_head_training": "1 / 0",
        "09_not_a_page": "1 / 0",
    }.items():
        notebook(tmp_path / "nbs" / f"{stem}.ipynb", source)
    monkeypatch.setattr(demo, "scores", toy_scores)
    monkeypatch.setattr(demo, "fetch_missing", lambda: None)
    monkeypatch.setattr(run_notebooks, "LAST", tmp_path / "times.json")
    monkeypatch.setattr(run_notebooks, "environment", lambda: None)
    status = demo.main(["--out", str(tmp_path / "out"), "--notebooks", str(tmp_path / "nbs")])
    told = capsys.readouterr().out
    assert status == 1
    assert {p.name for p in (tmp_path / "out").glob("*.html")} == {"00_good.html", "08_head_training.html"}
    assert ScoreSheet.load(tmp_path / "out").rows[0].dataset == "embedded"
    assert told.index("0.1000 [0.1000, 0.1000]") < told.index("FAILED: 08_head_training.ipynb")
    assert "ZeroDivisionError" in told and told.rstrip().endswith("1 failed: 08_head_training.ipynb")
    assert told.index("ok     embedded session by stimuli") < told.index(
        "FAILED 08_head_training.ipynb"
    )  # which reads its runs


def test_without_a_network_one_attempt_is_made(tmp_path, monkeypatch, capsys):
    tried = []

    def fetch(entry):
        tried.append(entry.name)
        raise MissingError(f"{entry.name} could not be downloaded")

    monkeypatch.setenv("CORTEXLIT_DATA", str(tmp_path))
    monkeypatch.setattr("cortexlit.data.opendata.fetch", fetch)
    demo.fetch_missing()
    assert len(tried) == 1 and "could not be downloaded" in capsys.readouterr().out


def test_the_table_of_timings_takes_every_result_file(capsys):
    "One of them holds no timings: it is named, and the others are shown."
    paths = sorted((ROOT / "benchmarks/results").glob("*.json"))
    assert bench_table.main([str(path) for path in paths]) == 0
    told = capsys.readouterr().out
    assert all(path.stem in told for path in paths)
    assert re.search(r"^calibration: \d+ cases are no timings$", told, re.M)
