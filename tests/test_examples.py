"Every name at the front door shows in its `help()` how it is used, and what it shows is run here."

import doctest
import inspect

import numpy as np
import pandas as pd
import pytest
import torch

import cortexlit as cx
from cortexlit import front

pytestmark = pytest.mark.usefixtures("no_curves")
CLIPS = {"clip_frames": 26, "gap": 5}


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
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)
