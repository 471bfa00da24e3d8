"A name means one thing in the whole library."

import ast
from collections import defaultdict
from pathlib import Path

import cortexlit

HOME = Path(cortexlit.__file__).parent


def public_names() -> dict[str, list[str]]:
    "Public names of the library, and the modules that define them."
    found = defaultdict(list)
    for path in sorted(HOME.rglob("*.py")):
        tree, public, defined = ast.parse(path.read_text("utf-8")), [], set()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            defined |= names
            if "__all__" in names:
                public = ast.literal_eval(node.value)
        for name in defined & set(public):
            found[name].append(path.relative_to(HOME).as_posix())
    return found


def test_a_public_name_is_defined_once():
    assert {name: where for name, where in public_names().items() if len(where) > 1} == {}


def test_the_names_are_found():
    names = public_names()
    assert names["ViV1T"] == ["models/viv1t.py"]
    assert len(names) > 300
