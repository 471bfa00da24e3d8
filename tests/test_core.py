"""Places, atomic writes, locks, hashes, random streams."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexlit import core

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=True)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_digest_sees_content_only(obj):
    assert core.digest(obj) == core.digest(json.loads(json.dumps(core.plain_values(obj))))


@given(st.integers(0, 2**31), st.text(max_size=10), st.text(max_size=10))
def test_streams_differ_by_name(seed, a, b):
    one, two = core.rng(seed, a).random(4), core.rng(seed, b).random(4)
    assert (one == two).all() == (a == b)


def test_stream_values_are_fixed():
    "A change here would change every simulated number of the library."
    assert core.rng(0, "movie", 1).integers(0, 2**32, 3).tolist() == [3423461991, 38938887, 927931186]


def test_write_json_survives_a_failure(tmp_path):
    path = core.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        core.write_json(path, {"x": object()})
    assert core.read_json(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_nan_becomes_null(tmp_path):
    path = core.write_json(tmp_path / "a.json", {"x": [np.nan, np.inf, np.float32(1.5)]})
    assert json.loads(path.read_text()) == {"x": [None, None, 1.5]}


def test_folder_moved_aside_comes_back(tmp_path, monkeypatch):
    "Where names cannot be exchanged, and the second rename fails: the old folder must be where it was."
    monkeypatch.setattr(core, "_exchange", lambda *_: False)
    target = tmp_path / "data"
    with core.atomic_folder(target) as tmp:
        (tmp / "old").touch()
        core.write_json(tmp / "card.json", {"kind": "toy", "files": {"old": ""}})
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(core.os, "replace", replace)
    with pytest.raises(OSError, match="no"), core.atomic_folder(target, overwrite=True, kind="toy") as tmp:
        (tmp / "new").touch()
    assert sorted(p.name for p in target.iterdir()) == ["card.json", "old"]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def _hold(path: Path, seconds: float) -> None:
    with core.locked(path):
        (path.parent / "held").touch()
        time.sleep(seconds)


def test_lock_makes_another_process_wait(tmp_path):
    target = tmp_path / "x"
    other = multiprocessing.get_context("spawn").Process(target=_hold, args=(target, 0.5))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with core.locked(target):
        assert not other.is_alive() or other.join(5) is None and not other.is_alive()
    other.join()
    assert other.exitcode == 0


def test_project_dir_is_found_from_below(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = cortexlit\n")
    (tmp_path / "neuro_nbs").mkdir()
    monkeypatch.chdir(tmp_path / "neuro_nbs")
    assert core.generated("a") == tmp_path.resolve() / "_data" / "a"


def test_error_names_file_expectation_and_remedy():
    text = str(core.MissingError("gone", expected="a file", fix="make it", path="x.npy"))
    assert text.splitlines() == ["gone", "  file: x.npy", "  expected: a file", "  do: make it"]


# --- two processes that want one folder


def test_a_folder_that_another_process_claims_at_this_moment_is_no_foreign_one(tmp_path):
    (tmp_path / "run").mkdir()
    core._beside(tmp_path / "run" / "plan.json").write_text("half a pl")  # it lives: this process
    core.claim(tmp_path / "run", {"a": 1}, "plan.json")
    assert core.read_json(tmp_path / "run" / "plan.json") == {"a": 1}
    (tmp_path / "other").mkdir()
    core._beside(tmp_path / "other" / "thesis.tex").write_text("...")
    with pytest.raises(core.DataError, match="holds no run"):
        core.claim(tmp_path / "other", {"a": 1}, "plan.json")


def _claims(folder: Path, mine: int, start, told) -> None:
    for k in range(40):
        start.wait()
        try:
            core.claim(folder / str(k), {"owner": mine if k % 2 else 0}, "plan.json")
            told.put((k, mine, "mine"))
        except core.DataError as error:
            told.put((k, mine, str(error).splitlines()[0]))


def test_of_two_that_claim_at_once_one_is_first(tmp_path):
    "Equal plans: both go on. Different ones: one goes on, the other is told."
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(2), context.Queue()
    both = [context.Process(target=_claims, args=(tmp_path, mine, start, told)) for mine in (1, 2)]
    for process in both:
        process.start()
    answers = [told.get(timeout=60) for _ in range(80)]
    for process in both:
        process.join()
    for k in range(40):
        mine = {who: answer for n, who, answer in answers if n == k}
        assert [p.name for p in (tmp_path / str(k)).iterdir()] == ["plan.json"]
        if k % 2:
            owner = core.read_json(tmp_path / str(k) / "plan.json")["owner"]
            assert mine[owner] == "mine" and mine[3 - owner].startswith("the run in this folder has owner")
        else:
            assert set(mine.values()) == {"mine"}


@pytest.mark.parametrize("theirs", [1, 2])
def test_what_another_process_claims_after_we_looked_is_its_plan_and_no_foreign_file(
    tmp_path, monkeypatch, theirs
):
    plan, looks = core.write_json(tmp_path / "other.json", {"owner": theirs}).read_text(), Path.is_file

    def looked(path):  # the other one writes just after
        there = looks(path)
        if path.name == "plan.json" and not there:
            path.write_text(plan)
        return there

    monkeypatch.setattr(Path, "is_file", looked)
    if theirs == 1:
        core.claim(tmp_path / "run", {"owner": 1}, "plan.json")
    else:
        with pytest.raises(core.DataError, match="the run in this folder has owner: 2"):
            core.claim(tmp_path / "run", {"owner": 1}, "plan.json")
