"Every public function and class shows in its `help()` how it is used; what it shows is run here."

import doctest
import importlib
import importlib.util
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cortexlit as cx
from cortexlit import front

pytestmark = pytest.mark.usefixtures("no_curves")
CLIPS = {"clip_frames": 26, "gap": 5}
MADE = {
    "session",
    "things",
    "mouse",
    "subject",
    "folds",
    "scenes",
    "brain",
    "head",
}  # by `names`, not for nothing
COMMANDS = {
    "cli",
    "commands.fmri",
    "commands.pictures",
    "commands.shell",
    "commands.silico",
}  # `cortexlit COMMAND --help` says how a command is used
COSTLY = {  # CPU seconds of an example that is run only by `COSTLY=1 pytest tests/test_examples.py`
    "insilico.stimuli.demo_twin": 5,
    "simulate.populations.v1like_session": 4,
    "simulate.session.write_session": 1,
    "training.heads.head_predictions": 5,
    "training.lora.cross_validate": 3,
    "training.pretraining.pretrain": 1,
    "training.pretraining.simulate": 1,
}
ALLEN = (
    {"data.allen.open_cache"} if importlib.util.find_spec("allensdk") is None else set()
)  # what nobody can call here
LIBRARY = Path(cx.__file__).parent
MODULES = sorted(
    ".".join(p.relative_to(LIBRARY).with_suffix("").parts)
    for p in LIBRARY.rglob("*.py")
    if not p.name.startswith("_")
)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    "What the examples call by name: folders from `build`, opened ones, and a head."
    root = tmp_path_factory.mktemp("examples")
    session, photographs = (
        cx.open_session(i, cache_dir=cx.embedded_session("tiny")) for i in (900000001, 900000002)
    )
    things = cx.open_things(cx.embedded_things("tiny"), "01", "figshare")
    subject = cx.build(things, root / "subject")
    mouse = cx.build(session, root / "mouse", split="stimuli", **CLIPS)
    return {
        "np": np, "pd": pd, "torch": torch, "session": session, "things": things, "mouse": mouse, "subject": subject,
        "folds": cx.build(session, root / "folds", "folds", folds=3, **CLIPS),
        "scenes": cx.build(photographs, root / "scenes", "scenes", constant_neurons="drop"),
        "brain": cx.open_dataset(subject, ratings=cx.load_properties(cx.embedded_things("tiny") / "ratings")),
        "head": cx.train_head(mouse, epochs=1, last=12, progress=False),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(front.PLACES))
def test_the_example_of_a_name_runs(name, names, tmp_path, monkeypatch):
    text = inspect.getdoc(front.find(name)) or ""
    assert "Examples\n--------\n" in text and f"cx.{name}" in text
    monkeypatch.chdir(tmp_path)
    assert not failures(text, dict(names), name)


def failures(text: str, known: dict, name: str) -> str:
    "What the examples of a docstring get wrong, as doctest tells it."
    example, told = doctest.DocTestParser().get_doctest(text, known, name, None, 0), []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    return "".join(told) if runner.run(example, out=told.append).failed else ""


def shown(module) -> dict[str, str]:
    "Docstring of each public function and class that is defined there and is not at the front door."
    found = {name: getattr(module, name) for name in module.__all__ if name not in front.PLACES}
    return {
        name: inspect.getdoc(it) or ""
        for name, it in sorted(found.items())
        if callable(it) and getattr(it, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("name", [name for name in MODULES if name not in COMMANDS])
def test_every_public_name_has_an_example(name):
    module = importlib.import_module(f"cortexlit.{name}")
    without = {public for public, text in shown(module).items() if ">>>" not in text}
    assert not without, f"no example in help(): {', '.join(sorted(without))}; tests/test_examples.py runs it"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch, request):
    module = importlib.import_module(f"cortexlit.{name}")
    monkeypatch.chdir(tmp_path)
    left = ALLEN if os.environ.get("COSTLY") else ALLEN | COSTLY.keys()
    for public, text in shown(module).items():
        if ">>>" in text and f"{name}.{public}" not in left:
            own = tmp_path / public
            own.mkdir()
            known = vars(module) | {"np": np, "pd": pd, "torch": torch, "cx": cx, "tmp_path": own}
            code = " ".join(re.findall(r"(?:>>>|\.\.\.) (.*)", text))
            if MADE & set(re.findall(r"\w+", code)):
                known |= request.getfixturevalue("names")
            assert not failures(text, known, f"{name}.{public}")


def test_an_example_that_is_wrong_is_told():
    assert "Expected:" in failures("Sum.\n\n>>> 1 + 1\n3\n", {}, "sum")
