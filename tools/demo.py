"""The demonstration: scores of everything that can be scored without a download, and the study notebooks as pages.

    python tools/demo.py --out _demo

Both go to the folder OUT: tables (`scores.json`, `decoding/scores.json`, `scores.png`) and a page for each notebook.
What is made is kept: if one part or page fails, all others come out, a report ends the output, and the exit status is
1. Real files that can be fetched are; what needs the others is left out, and said so.
"""

import argparse
import sys
import time
from pathlib import Path

import jobs
import run_notebooks
from project import ROOT

# The numbered pages up to head training, and the fMRI data with their baselines; the others go deeper, for minutes each.
PAGES = ("0[0-8]_*.ipynb", "02a_*.ipynb", "12_*.ipynb", "12a_*.ipynb")


def fetch_missing() -> None:
    "Try to get the real files; the first that cannot be had ends it, since without a network none can."
    from cortexlit.cli import real_files
    from cortexlit.core import CortexlitError, data_home
    from cortexlit.data.opendata import fetch

    absent = [e for e in real_files().values() if not (data_home() / e.path).is_file()]
    for entry in absent:
        print(f"fetching {entry.path} ({entry.bytes / 1e6:.1f} MB)", flush=True)
        try:
            fetch(entry)
        except (CortexlitError, OSError) as error:
            print(f"    not to be had: {str(error).splitlines()[0]}", flush=True)
            return


def scores(out: Path, only: str) -> None:
    "One part of the score sheets; `Problem` with what failed."
    from cortexlit.cli import run_demo

    if problems := run_demo(out, lambda line: print(f"        {line}", flush=True), only):
        raise jobs.Problem("\n\n".join(problems))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "_demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--notebooks", type=Path, default=ROOT / "neuro_nbs", help="folder of the notebooks")
    given = parser.parse_args(argv)
    began, out = time.monotonic(), given.out.resolve()
    run_notebooks.environment()
    pages = sorted(p for pattern in PAGES for p in given.notebooks.resolve().glob(pattern))
    out.mkdir(parents=True, exist_ok=True)
    for page in pages:  # of an earlier run: what is there afterwards is new
        (out / f"{page.stem}.html").unlink(missing_ok=True)
    fetch_missing()
    from cortexlit.cli import DEMO, clear_demo, show_demo

    clear_demo(out)
    missing, lines = run_notebooks.missing_files(pages)
    for line in lines:
        print(line, flush=True)
    seconds = run_notebooks.expected_seconds(run_notebooks.LAST)
    movies = frozenset(n for n in DEMO if "session" in n)  # they make the runs that page 08 reads
    work = run_notebooks.jobs_of(
        pages, set(), missing, run_notebooks.LAST, {"08_head_training": movies}, page=out
    )
    first = frozenset(job.name for job in work if job.name in run_notebooks.SHARED)
    work += [jobs.Job(n, scores, (out, n), seconds.get(n, 60.0), first, loud=True) for n in DEMO]
    done = jobs.run(work, workers=given.workers, preload=jobs.preload(len(work)))
    run_notebooks.remember(done, run_notebooks.LAST)

    print(flush=True)
    show_demo(out)
    made = sum((out / f"{p.stem}.html").is_file() for p in pages)
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(
        f"{shown}: scores.json, decoding/scores.json, scores.png, and {made} of {len(pages)} pages (*.html)"
    )
    print(f"{jobs.duration(time.monotonic() - began)}", flush=True)
    if block := run_notebooks.failures(done):
        print(block, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
