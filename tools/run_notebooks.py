"""Run notebooks from top to bottom, two at a time, and say how far it is.

    python tools/run_notebooks.py                          all notebooks, as in `make test`
    python tools/run_notebooks.py neuro_nbs/03_dataset.ipynb nbs/*.ipynb
    python tools/run_notebooks.py --holding slow --flags slow    those with slow cells, all their cells

Cells marked `#| slow` run only with `--flags slow`. Cells marked `#| data NAME ...` read real files (`cortexlit data`
lists them); they run where those files are, or with `--flags data`. A cell that does not run keeps its outputs.
Exit status 1 if a notebook fails; the others run all the same.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import re
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import jobs
from project import ROOT, notebooks

TYPICAL = Path(__file__).with_name("seconds.json")  # of a core
LAST = ROOT / "_runs" / "seconds.json"  # of the last run on this machine
LINES = 40  # of a cell, at most, in a report
FRAMES = 8  # of a traceback


# --- which cells run --------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    "A notebook whose cells know their nbdev directives (`directives_`)."
    from nbdev.process import NBProcessor

    return NBProcessor(path, rm_directives=False).nb


def skip_flags() -> set[str]:
    "Flags of cells that are not run unless asked for: `tst_flags` in settings.ini."
    from nbdev.config import get_config

    return set(get_config(path=ROOT).tst_flags.split())


def why_not(
    cell: Any,
    flags: set[str],  # asked for
    missing: set[str],  # real files that are not on this machine
    skip: set[str],  # flags that need asking for
) -> str | None:  # None: run it
    "Why a cell is not run: a flag, a missing file, or because nbdev would not run it either."
    if cell.cell_type != "code":
        return "text"
    directives = getattr(cell, "directives_", None) or {}
    if "nbdev_export" + "(" in cell.source or directives.get("eval:", [""])[0].lower() == "false":
        return "never run"
    for flag in sorted((skip & directives.keys()) - flags):
        if flag != "data":
            return flag
        if not directives["data"] or missing.intersection(directives["data"]):
            return "data"
    return None


def holds(path: Path, flags: Iterable[str]) -> bool:
    "Whether a cell of the notebook has one of the flags."
    return any(set(flags) & (c.get("directives_") or {}).keys() for c in read(path).cells)


def needed(paths: list[Path]) -> dict[str, list[str]]:
    "Names of real files, and the notebooks whose cells read them."
    found = defaultdict(list)
    for path in paths:
        cells = read(path).cells
        for name in sorted({n for c in cells for n in (c.get("directives_") or {}).get("data", ())}):
            found[name].append(path.stem)
    return dict(found)


def missing_files(
    paths: list[Path],
) -> tuple[set[str], list[str]]:  # names; and a line for each: which file, who needs it, how to get it
    "Real files that cells of these notebooks read and that are not on this machine."
    wanted = needed(paths)
    if not wanted:
        return set(), []
    from cortexlit.cli import real_files
    from cortexlit.core import data_home

    known, home, names, lines = real_files(), data_home(), set(), []
    for name, stems in sorted(wanted.items()):
        if name not in known:
            raise jobs.Problem(
                f"`#| data {name}` in {', '.join(stems)}: no such file is registered; known: {', '.join(known)}"
            )
        entry = known[name]
        if not (home / entry.path).is_file():
            names.add(name)
            lines.append(
                f"left out: cells of {', '.join(stems)} that read {entry.path}, which is not in {home}; "
                f"`make data` fetches it ({entry.bytes / 1e6:.1f} MB)"
            )
    return names, lines


# --- running one ------------------------------------------------------------------------------------------------------


def execute(
    path: Path,
    flags: set[str] = frozenset(),  # of cells to run that are left out by default
    missing: set[str] = frozenset(),  # real files that are not there
    page: Path | None = None,  # folder: write the notebook there as HTML, also if it fails
    save: bool = False,  # write the outputs into the notebook itself
) -> int:  # cells that were run
    "Run a notebook in this process; `Problem` with cell, error and a short traceback if it fails."
    import pandas as pd
    from execnb.shell import CaptureShell
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    # as in Jupyter: without its kernel, pandas takes the output for a narrow terminal
    pd.set_option("display.max_columns", 20)
    nb, skip = read(path), skip_flags()
    if _skips(nb):
        return 0
    os.environ["IN_TEST"] = "1"  # as nbdev_test does
    for folder in (str(ROOT), str(path.parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    shell, undrawn = CaptureShell(path, mpl_format="png"), []

    def lay_out(figure: Figure) -> None:
        "Draw every artist, as a picture would, but no pixels, where it stands: the solver of layouts costs twice as much."
        try:  # IPython would only print what goes wrong
            figure.set_layout_engine("none")
            figure.draw_without_rendering()
        except Exception as error:
            undrawn.append(error)

    if page is None and not save:  # nobody will see the figures
        shell.display_formatter.formatters["image/png"].for_type(Figure, lay_out)
    ran, failure = 0, None
    with contextlib.chdir(path.parent), contextlib.ExitStack() as undo:
        if page is None and not save:  # what is written goes with the run: only a power failure would tell
            undo.enter_context(mock.patch.object(os, "fsync", lambda number: None))
            # pyplot would draw each figure after its cell, pixels and all, before it is laid out for its output
            undo.enter_context(mock.patch.object(FigureCanvasBase, "draw_idle", lambda *_, **__: None))
            # each training run would sweep the whole memory at its end
            undo.enter_context(mock.patch.object(gc, "collect", lambda *_: 0))
            if imports := sys.modules.get(
                "accelerate.utils.imports"
            ):  # it looks for a package twice in each step
                known = functools.cache(imports._is_package_available)
                undo.enter_context(mock.patch.object(imports, "_is_package_available", known))
        for number, cell in enumerate(nb.cells):
            if why_not(cell, flags, missing, skip):
                continue
            cell.outputs = []
            source = cell.source
            if source.rstrip().endswith(";"):  # execnb would drop what the cell prints
                cell.source = f"{source}\nNone"
            shell.cell(cell)
            cell.source = source
            ran += 1
            if error := shell.exc or next(iter(undrawn), None):
                failure = _report(cell, number, error)
                break
    if page is not None:
        _write_page(nb, path, page)
    if failure:
        raise jobs.Problem(failure)
    if save:
        _save(nb, path)
    return ran


def _skips(nb: Any) -> bool:
    "Whether the first cell says `skip_exec: true`, or the notebook is in another language."
    from nbdev.process import nb_lang

    first = nb.cells[0] if nb.cells else None
    said = first is not None and first.cell_type == "raw" and re.search(r"skip_exec:\s*true", first.source)
    return bool(said) or nb_lang(nb) != "python"


def _report(cell: Any, number: int, error: BaseException) -> str:
    "Cell, short traceback and error, for people."
    lines = cell.source.splitlines()
    shown = lines[:LINES] + ([f"... {len(lines) - LINES} more lines"] if len(lines) > LINES else [])
    frames = traceback.extract_tb(error.__traceback__)
    inside = [k for k, f in enumerate(frames) if _is_cell(f.filename)]
    frames = frames[inside[0] :] if inside else []
    hidden = len(frames) - FRAMES
    if hidden > 0:
        frames = [*frames[:2], *frames[2 - FRAMES :]]
    text = [f"cell {number}, id {cell.get('id', '?')}:", *(f"    {line}" for line in shown), ""]
    for k, frame in enumerate(frames):
        if k == 2 and hidden > 0:
            text.append(f"  ... {hidden} more calls")
        where = "the cell" if _is_cell(frame.filename) else _short(frame.filename)
        text.append(f"  {where}, line {frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip(": "))
    text.append(_message(error))
    while (cause := error.__cause__) is not None:
        text.append(f"caused by {_message(cause)}")
        error = cause
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(text))


def _message(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()[-3000:]


def _is_cell(filename: str) -> bool:
    return filename.startswith(("<ipython-input", "/tmp/ipykernel")) or "ipykernel_" in filename


def _short(filename: str) -> str:
    "A file below the project or an environment, without what comes before."
    path = Path(filename)
    if path.is_relative_to(ROOT) and ".venv" not in path.parts:
        return path.relative_to(ROOT).as_posix()
    return filename.rsplit("site-packages/", 1)[-1]


def _plain(nb: Any) -> str:
    "The notebook as JSON."
    from execnb.nbio import nb2str

    return nb2str(nb)


def _write_page(nb: Any, path: Path, folder: Path) -> None:
    "HTML with figures inside; nbdev's directives are left out, as on the site."
    import nbformat
    from nbconvert import HTMLExporter

    page = nbformat.reads(_plain(nb), as_version=4)
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"\A(\s*#\|.*\n?)+", "", cell.source)
    resources = {"metadata": {"name": path.stem, "path": str(path.parent)}}
    html, _ = HTMLExporter(embed_images=True).from_notebook_node(page, resources)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{path.stem}.html").write_text(html, encoding="utf-8")


def _save(nb: Any, path: Path) -> None:
    "Put outputs into the notebook, and clean it as nbdev_clean does."
    from nbdev.clean import nbdev_clean

    path.write_text(_plain(nb), encoding="utf-8")
    with contextlib.redirect_stdout(None):
        nbdev_clean.__wrapped__(fname=path)


# --- running many -----------------------------------------------------------------------------------------------------


def key(path: Path) -> str:
    "How a notebook is called in reports and in the table of seconds."
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def expected_seconds(last: Path = LAST) -> dict[str, float]:
    "How long notebooks take: in the last run here, or typically."
    found = json.loads(TYPICAL.read_text()) if TYPICAL.exists() else {}
    with contextlib.suppress(OSError, ValueError):
        found |= json.loads(last.read_text())
    return found


def remember(done: list[jobs.Done], last: Path = LAST) -> None:
    "Keep how much work those were that went well, in seconds of a core."
    found = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(last.read_text())
    found |= {d.name: round(d.cpu, 1) for d in done if d.problem is None}
    last.parent.mkdir(parents=True, exist_ok=True)
    last.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def _session() -> None:
    from cortexlit.simulate.session import embedded_session

    embedded_session("demo")


def _subject() -> None:
    from cortexlit.simulate.subject import embedded_things

    embedded_things("demo")


SHARED = {  # job that makes what many notebooks read -> how they ask for it, and how it is made
    "embedded session": ("embedded_session(", _session),
    "embedded fMRI subject": ("embedded_things(", _subject),
}


def shared(paths: list[Path], typical: Mapping[str, float]) -> dict[jobs.Job, set[Path]]:
    "Jobs for what two or more of the notebooks read, so that none waits while another makes it; and these notebooks."
    texts, found = {path: path.read_text("utf-8") for path in paths}, {}
    for name, (words, make) in SHARED.items():
        readers = {path for path, text in texts.items() if words in text}
        if len(readers) > 1:
            found[jobs.Job(name, make, (), typical.get(name, 25.0), light=True)] = readers
    return found


def jobs_of(
    paths: list[Path],
    flags: set[str],
    missing: set[str],
    last: Path = LAST,
    after: Mapping[str, frozenset[str]] = MappingProxyType(
        {}
    ),  # by notebook: jobs that must have ended before
    **options: Any,  # of `execute`
) -> list[jobs.Job]:
    "One job for each notebook, and those that make what they share."
    typical = expected_seconds(last)
    first = shared(paths, typical)
    needs = {path: frozenset(job.name for job, readers in first.items() if path in readers) for path in paths}
    return [
        *first,
        *(
            jobs.Job(
                key(path),
                _execute,
                (path, flags, missing, options),
                typical.get(key(path), 20.0),
                needs[path] | after.get(path.stem, frozenset()),
            )
            for path in paths
        ),
    ]


def _execute(path: Path, flags: set[str], missing: set[str], options: dict[str, Any]) -> int:
    return execute(path, flags, missing, **options)


def _site() -> None:
    "The pages of the site and their links; `Problem` with what is wrong."
    import check_docs

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        wrong = check_docs.main()
    if wrong:
        raise jobs.Problem(said.getvalue())


def failures(done: list[jobs.Done]) -> str:
    "One block that says what failed; empty if nothing did."
    bad = [d for d in done if d.problem is not None]
    if not bad:
        return ""
    line = "=" * 100
    parts = [
        f"{line}\nFAILED: {d.name}, after {jobs.duration(d.seconds)}\n\n{d.problem.rstrip()}" for d in bad
    ]
    return "\n".join([*parts, line, f"{len(bad)} failed: {', '.join(d.name for d in bad)}"])


def environment() -> None:
    "What notebooks are run with, unless the caller chose otherwise."
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each of the workers
    os.environ.setdefault("CORTEXLIT_SCALE", "demo")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched behind the reader's back
    quiet = "ignore:pkg_resources is deprecated:UserWarning"  # allensdk, each time it is imported
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # this checkout's library, also in grandchildren


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about[0], epilog=about[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--workers", type=int, default=2, help="at a time (2)")
    parser.add_argument(
        "--flags", default="", help="cells to run that are left out by default: slow, gpu, data"
    )
    parser.add_argument("--holding", default="", help="only notebooks with cells of these flags")
    parser.add_argument(
        "--save", action="store_true", help="write the outputs into the notebooks, and clean them"
    )
    parser.add_argument("--pages", type=Path, help="also write each notebook as HTML into this folder")
    parser.add_argument(
        "--site", action="store_true", help="also build the site's pages and check their links"
    )
    parser.add_argument("--times", type=Path, default=LAST, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    environment()
    flags = set(given.flags.split())
    paths = [p.resolve() for p in given.notebooks] or notebooks()
    if absent := [str(p) for p in paths if not p.is_file()]:
        print(f"no such notebook: {', '.join(absent)}")
        return 2
    if given.holding:
        paths = [p for p in paths if holds(p, given.holding.split())]
        if not paths:
            print(f"no notebook has a cell marked {given.holding}")
            return 0
    try:
        missing, lines = (set(), []) if "data" in flags else missing_files(paths)
    except jobs.Problem as problem:
        print(f"FAILED: {problem}")
        return 1
    for line in lines:
        print(line, flush=True)
    began = time.monotonic()
    page = given.pages.resolve() if given.pages else None
    site = [jobs.Job("pages and links of the site", _site, (), 40.0)] if given.site else []
    done = jobs.run(
        site + jobs_of(paths, flags, missing, given.times, page=page, save=given.save),
        workers=given.workers,
        preload=jobs.preload(len(paths)),
    )
    if not flags & {"slow"}:
        remember(done, given.times)
    if block := failures(done):
        print(block, flush=True)
        return 1
    print(
        f"{len(paths)} notebooks ran from top to bottom in {jobs.duration(time.monotonic() - began)}",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
