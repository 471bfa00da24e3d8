"Every name at the front door shows in its `help()` how it is used; what any public name shows is run here."

import doctest
import importlib
import inspect
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


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch, request):
    module = importlib.import_module(f"cortexlit.{name}")
    monkeypatch.chdir(tmp_path)
    for public in sorted(set(getattr(module, "__all__", ())) - set(front.PLACES)):
        found = getattr(module, public)
        text = inspect.getdoc(found) or ""
        if ">>>" not in text or getattr(found, "__module__", None) != module.__name__:
            continue
        own = tmp_path / public
        own.mkdir()
        known = vars(module) | {"np": np, "pd": pd, "torch": torch, "cx": cx, "tmp_path": own}
        if MADE & {
            word for line in re.findall(r"(?:>>>|\.\.\.) (.*)", text) for word in re.findall(r"\w+", line)
        }:
            known |= request.getfixturevalue("names")
        assert not failures(text, known, f"{name}.{public}")


def test_an_example_that_is_wrong_is_told():
    assert "Expected:" in failures("Sum.\n\n>>> 1 + 1\n3\n", {}, "sum")
