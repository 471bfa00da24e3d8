"""How the modules of the library may depend on each other and on allensdk."""

import ast
import importlib
import sys
import traceback
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from processes import Process

ROOT = Path(__file__).resolve().parents[1]

# Data flows from left to right, and imports only point left: what each part may import besides itself.
ALLOWED = {
    "core": set(),
    "shown": set(),
    "metrics": {"core"},
    "plots": {"core"},
    "data": {"core", "shown"},
    "simulate": {"core", "data"},
    "models": {"core", "metrics"},
    "training": {"core", "shown", "metrics", "data", "simulate", "models"},
    "evaluation": {"core", "metrics"},
    "insilico": {"core", "metrics", "plots", "data", "simulate", "models", "training", "evaluation"},
    "front": {"core", "metrics", "data", "simulate", "models", "training", "evaluation"},
    "cli": {"core", "metrics", "plots", "data", "simulate", "models", "training", "evaluation", "insilico"},
}
# Exceptions, module by module: what scores, or plans, by a dataset folder can read it; figures take a
# recording.
ALSO = {
    "evaluation.baselines": {"data.audit", "data.folder", "data.clips", "data.folds"},
    "evaluation.concepts": {"data.audit", "data.folder"},
    "evaluation.decoding": {"data.audit", "data.folder"},
    "evaluation.design": {"data.checks", "data.folder", "data.clips", "data.folds"},
    "evaluation.scenes": {"data.audit", "data.clips", "data.folder", "data.scenes"},
    "plots": {"data.recordings"},
}


def module_name(path: Path, root: Path) -> str:
    "data.clips for cortexlit/data/clips.py; '' for cortexlit/__init__.py."
    parts = path.relative_to(root / "cortexlit").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path = ROOT) -> dict[str, Path]:
    "All modules of the library but the link table of the site."
    found = {module_name(p, root): p for p in (root / "cortexlit").rglob("*.py") if p.name != "_modidx.py"}
    return {name: path for name, path in found.items() if name}


def imports(name: str, root: Path = ROOT) -> set[str]:
    "Modules of the library that a module imports anywhere, functions included."
    known = modules(root)
    path = known[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["cortexlit", *package][: len(package) + 2 - node.level] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            full = [f"{start}.{a.name}" for a in node.names]
        else:
            continue
        for target in full:
            parts = target.split(".")
            if parts[0] != "cortexlit":
                continue
            # the longest prefix that is a module: `from cortexlit.core import rng` imports core
            prefixes = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found = next((p for p in prefixes if p in known), None)
            if found:
                used.add(found)
    return used - {name}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_left(name):
    part = name.split(".")[0]
    assert part in ALLOWED, f"{name}: a new part of the library; say in ALLOWED what it may import"
    wrong = {m for m in imports(name) if m.split(".")[0] not in ALLOWED[part] | {part}} - ALSO.get(
        name, set()
    )
    assert not wrong, f"cortexlit.{name} must not import {sorted(wrong)}"


def test_no_module_imports_itself_by_a_detour():
    try:
        TopologicalSorter({name: imports(name) for name in modules()}).prepare()
    except CycleError as error:
        pytest.fail("modules import each other in a circle: " + " <- ".join(error.args[1]))


def without_allensdk(names: list[str]) -> None:
    "Import all modules of the library where importing allensdk fails."
    for name in [m for m in sys.modules if m.split(".")[0] == "cortexlit"]:
        del sys.modules[name]
    allen = importlib.import_module("cortexlit.data.allen")
    assert not any(m.split(".")[0] == "allensdk" for m in sys.modules), "allensdk was imported"
    sys.modules["allensdk"] = None  # from here on, importing it raises ImportError
    for call in (allen.list_sessions, lambda c: allen.open_session(1, c), allen.open_cache):
        try:
            call("c")
        except allen.MissingError as error:
            assert 'pip install "cortexlit[allen]"' in str(error) and "Python 3.11" in str(error), error
        else:
            raise AssertionError("no error")
    failed = []
    for name in names:
        try:
            importlib.import_module(f"cortexlit.{name}")
        except Exception:
            failed.append(name)
            traceback.print_exc()
    assert not failed, f"cannot be imported without allensdk: {failed}"
    print("imported", len(names))


def test_everything_imports_without_allensdk_and_calls_say_what_to_install(tmp_path):
    """allensdk's pins are old: a dataset folder must be usable, and data.allen importable, without it."""
    names = sorted(modules())
    assert "data.allen" in names
    code, told = Process(tmp_path, without_allensdk, names).ended()
    assert code == 0 and f"imported {len(names)}" in told, told
