"""How the modules of the library may depend on each other and on allensdk."""

import ast
import importlib
import json
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
    "evaluation": {"core", "shown", "metrics"},
    "insilico": {"core", "metrics", "plots", "data", "simulate", "models", "training", "evaluation"},
    "front": {"core", "metrics", "data", "simulate", "models", "training", "evaluation"},
}
ALLOWED["commands"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)
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


PAGES = sorted(p for part in ("nbs", "neuro_nbs", ".") for p in (ROOT / part).glob("*.ipynb"))


def code_of(path: Path) -> str:
    "A module, or the cells of a page that are no part of a module."
    if path.suffix == ".py":
        return path.read_text("utf-8")
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    lines = [line for c in cells if "#| export" not in "".join(c["source"]) for line in [*c["source"], "\n"]]
    return "".join("\n" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def taken_in_private(code: str) -> set[str]:
    "Names with an underscore that code takes from a module of the library, or from what it imported of it."
    found, ours, tree = set(), set(), ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cortexlit")):
            ours |= {a.asname or a.name for a in node.names}
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            ours |= {a.asname for a in node.names if a.name.startswith("cortexlit") and a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("path", [*modules().values(), *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_name_with_an_underscore_stays_in_its_module(path):
    """What two modules need has a name without one; if it is no part of the interface, in a cell `#| exporti`."""
    assert not taken_in_private(code_of(path))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from cortexlit.core import _plain", {"_plain"}),
        ("from .clips import _Tier, TIERS", {"_Tier"}),
        ("from cortexlit import core\ncore._plain(1)", {"_plain"}),
        ("import cortexlit.core as c\nc._plain(1)\nc.__name__", {"_plain"}),
        ("from os import _exit\nimport numpy as np\nnp._core", set()),
    ],
)
def test_a_private_name_is_noticed(code, found):
    assert taken_in_private(code) == found


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
