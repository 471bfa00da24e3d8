"""What the checks in this folder share: where the project is, and how to copy what nbdev reads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "cortexlit"
FOLDERS = ("nbs", "neuro_nbs")  # of notebooks


def notebooks(
    root: Path = ROOT,  # a checkout
) -> list[Path]:
    "All notebooks that nbdev sees: the home page and both folders, without drafts (_name.ipynb)."
    found = [*root.glob("*.ipynb"), *(p for folder in FOLDERS for p in root.glob(f"{folder}/**/*.ipynb"))]
    return sorted(p for p in found if not any(part[0] in "_." for part in p.relative_to(root).parts))


def copy_project(
    target: Path,  # an empty folder
) -> Path:
    "Copy what nbdev reads (settings, site configuration, notebooks and their pictures, library)."
    for name in ("settings.ini", "_quarto.yml", "references.bib"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)
    for path in ROOT.glob("*.ipynb"):
        shutil.copy2(path, target)
    ignore = shutil.ignore_patterns("__pycache__", ".*", "_data", "_runs", "*.pyc")
    for name in (*FOLDERS, LIBRARY):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def python(
    code: str,  # statements
    folder: Path,  # where they run; its library comes before the installed one
) -> subprocess.CompletedProcess:
    "Run statements in a fresh Python that works in `folder`."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev refuses to export when it is set
    env["PYTHONPATH"] = str(folder)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
