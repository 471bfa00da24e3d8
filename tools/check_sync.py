"""The library is what the notebooks export, and the notebooks are clean.

Exports and cleans a temporary copy of the project and compares it with the working tree, so nothing in the
tree is touched, uncommitted work is welcome, and no git is needed. Exit status 1 and a list if they differ.
"""

import ast
import difflib
import json
import sys
import tempfile
from pathlib import Path

from project import LIBRARY, ROOT, copy_project, notebooks, python

FRESH = """
from nbdev.doclinks import nbdev_export
from nbdev.clean import nbdev_clean
nbdev_export.__wrapped__()
nbdev_clean.__wrapped__()
"""


def modules(root: Path) -> dict[str, Path]:
    "Python files of the library, by path relative to the project."
    return {p.relative_to(root).as_posix(): p for p in sorted((root / LIBRARY).rglob("*.py"))}


def differences(old: Path, new: Path, lines: int = 12) -> str:
    "The first changed lines between two files."
    texts = [p.read_text(encoding="utf-8").splitlines() for p in (old, new)]
    changed = [
        line[:160]
        for line in difflib.unified_diff(*texts, n=0, lineterm="")
        if line[0] in "+-" and not line.startswith(("+++", "---"))
    ]
    more = [f"... and {len(changed) - lines} more lines"] if len(changed) > lines else []
    return "".join(f"\n      {line}" for line in [*changed[:lines], *more])


def unreadable(root: Path) -> list[str]:
    "Notebooks that are no JSON and modules that are no Python: why an export fails."
    problems = []
    for path in notebooks(root):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{path.relative_to(root).as_posix()}: not valid JSON: {error}")
    for name, path in modules(root).items():
        try:
            ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            problems.append(
                f"{name}: its notebook exports invalid Python: {error.msg}: {error.text}".rstrip()
            )
    return problems


def check() -> list[str]:
    "All problems found, one text each."
    with tempfile.TemporaryDirectory(prefix="cortexlit-") as folder:
        copy = copy_project(Path(folder))
        # Start from an empty library, so that a module no notebook exports any more does not survive.
        for name, path in modules(copy).items():
            if name != f"{LIBRARY}/__init__.py":  # holds the version, which the export only updates
                path.unlink()
        done = python(FRESH, copy)
        if done.returncode:
            return unreadable(copy) or [f"the export failed:\n{done.stderr.strip()[-2000:]}"]

        problems = []
        have, fresh = modules(ROOT), modules(copy)
        for name in sorted(have.keys() - fresh.keys()):
            problems.append(f"{name}: no notebook exports it; delete it")
        for name in sorted(fresh.keys() - have.keys()):
            problems.append(f"{name}: missing; run nbdev_export")
        for name in sorted(have.keys() & fresh.keys()):
            if have[name].read_bytes() != fresh[name].read_bytes():
                shown = differences(have[name], fresh[name])
                problems.append(
                    f"{name}: differs from what its notebook exports; change the notebook, run nbdev_export{shown}"
                )
        for path in notebooks():
            name = path.relative_to(ROOT).as_posix()
            if path.read_bytes() != (copy / name).read_bytes():
                problems.append(f"{name}: not clean; run nbdev_clean{differences(path, copy / name)}")
        return problems


def main() -> int:
    if not notebooks():
        print("PROBLEM no notebooks found")
        return 1
    problems = check()
    for problem in problems:
        print("PROBLEM", problem)
    if not problems:
        print(f"{len(modules(ROOT))} files of the library and {len(notebooks())} notebooks are in step")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
