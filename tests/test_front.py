"""`import cortexlit as cx`: names, the kinds of folder, one sheet; and the programs of the README, run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toys import toy_recording

import cortexlit as cx
from cortexlit import front
from cortexlit.core import CortexlitError, DataError, MissingError
from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.clips import MouseDataset, build_dataset
from cortexlit.data.exchange import import_arrays
from cortexlit.data.scenes import ScenesDataset
from cortexlit.data.things import open_things
from cortexlit.simulate.subject import write_things

pytestmark = pytest.mark.usefixtures("no_curves")
ROOT = Path(__file__).resolve().parents[1]
SIZE = {"clip_frames": 10, "size": (6, 8), "gap": 2}


@pytest.mark.parametrize("name", front.PLACES)
def test_every_name_is_the_one_of_its_module(name):
    found = getattr(cx, name)
    assert found.__module__ == f"cortexlit.{front.PLACES[name]}" and found.__name__ == name


def test_one_name_one_place():
    names = " ".join(front.NAMES.values()).split()
    assert len(names) == len(set(names)) and 40 <= len(names) <= 50
    assert set(names) <= set(dir(cx))


def test_the_import_is_light():
    say = "import sys, cortexlit; print(len({'torch', 'numpy', 'pandas', 'typer'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", say], text=True).strip() == "0"


def test_parts_of_the_library_and_unknown_names():
    assert cx.data.__name__ == "cortexlit.data"
    with pytest.raises(AttributeError, match="no attribute 'openn'; it has .*open_session"):
        cx.openn  # noqa: B018


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root, draw = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    recording = toy_recording()
    study = write_things(root / "study", "tiny", layouts=("figshare",))
    return {
        "clips": build_dataset(recording, root / "clips", **SIZE),
        "scenes": import_arrays(draw.random((30, 8, 8)), draw.random((30, 5)), root / "scenes"),
        "things": build_things(open_things(study), root / "things"),
        "folds": cx.build_folds(recording, root / "folds", folds=3, **SIZE),
        "ratings": study / "ratings",
    }


def test_a_folder_is_opened_as_what_it_is(folders):
    for kind, cls in {"clips": MouseDataset, "scenes": ScenesDataset, "things": ThingsDataset}.items():
        assert type(cx.open_dataset(folders[kind])) is cls
    assert cx.open_dataset(folders["clips"], "test").tier == "test"
    assert cx.open_dataset(folders["scenes"], "validation").tier == "validation"
    assert cx.open_dataset(folders["folds"], "1/test").tier == "test"
    first, second = (cx.open_dataset(folders["folds"], f"{k}/test").samples for k in (0, 1))
    assert not first.equals(second)


def test_what_cannot_be_opened_is_named(folders, tmp_path):
    with pytest.raises(MissingError, match="not a dataset folder"):
        cx.open_dataset(tmp_path)
    with pytest.raises(DataError, match="0/test"):
        cx.open_dataset(folders["folds"], "test")
    with pytest.raises(CortexlitError):
        cx.open_dataset(folders["things"], "train", form="cubes")


def test_a_flipped_byte_is_refused_whatever_the_kind(folders):
    for kind in ("clips", "scenes", "things"):
        path = folders[kind] / "responses.npy"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        try:
            with pytest.raises(DataError, match=r"responses\.npy"):
                cx.open_dataset(folders[kind])
        finally:
            path.write_bytes(whole)


def test_build_takes_what_was_opened(tmp_path, folders):
    out = cx.build(toy_recording(), tmp_path / "a", **SIZE)
    assert cx.open_dataset(out)._arrays["responses"][:].tobytes() == cx.open_dataset(folders["clips"])._arrays["responses"][:].tobytes()  # fmt: skip
    for source, options in ((3, {}), (toy_recording(), {"kind": "movies"})):
        with pytest.raises(DataError):
            cx.build(source, tmp_path / "b", **options)


def test_a_recording_of_movies_and_pictures_must_be_told(tmp_path, tiny_cache):
    both = cx.open_session(900000002, cache_dir=tiny_cache)
    if both.movies():
        with pytest.raises(DataError, match="movies and pictures"):
            cx.build(both, tmp_path / "x")
    assert type(cx.open_dataset(cx.build(both, tmp_path / "y", kind="scenes"))) is ScenesDataset


def test_arrays_and_baselines_by_name(folders):
    test = MouseDataset(folders["clips"], "test")
    array = np.random.default_rng(0).random((len(test), *test[0]["labels"].shape)).astype("f4")
    sheet = cx.score(folders["clips"], "behaviour ridge", mine=array)
    assert {row.model for row in sheet.rows} == {"behaviour ridge", "mine"}
    whole = {row.model for row in cx.score(folders["clips"], {("mine", 0): array, ("mine", 1): array}).rows}
    assert {"mine", "train mean", "behaviour ridge", "other repeats"} <= whole
    assert sheet.opened  # counted, and printed
    with pytest.raises(DataError, match=r"no baseline 'ridge'(.|\n)*behaviour ridge"):
        cx.score(folders["clips"], "ridge")
    with pytest.raises(DataError, match="a list without a name"):
        cx.score(folders["clips"], [1, 2])
    with pytest.raises(DataError, match="mine: a dict, which holds names of its own"):
        cx.score(folders["clips"], mine={"a": array})
    for wrong in (array[:, :1], array[:1], array * np.nan):
        with pytest.raises(CortexlitError):
            cx.score(folders["clips"], mine=wrong)


def test_a_subject_needs_ratings(folders):
    with pytest.raises(DataError, match="without ratings"):
        cx.score(cx.open_dataset(folders["things"]))
    brain = cx.open_dataset(folders["things"], ratings=cx.load_properties(folders["ratings"]))
    assert cx.score(brain, "ridge").opened  # a look at the test of a subject is counted, too


def short(source):
    "Options for the short films of the tiny session."
    return {"clip_frames": 26, "gap": 5, "movies": ["natural_movie_one"]} if hasattr(source, "movies") else {}


PROGRAMS = re.findall(r"```python\n(import cortexlit as cx.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_there_are_five_programs_and_each_is_short():
    assert len(PROGRAMS) == 5
    assert all(len(p.strip().splitlines()) <= 8 for p in PROGRAMS)


@pytest.fixture(scope="module")
def place(tmp_path_factory, folders):
    "A folder with what the programs read, in small."
    root, draw = tmp_path_factory.mktemp("programs"), np.random.default_rng(1)
    shown = np.repeat(np.arange(30), 4)
    images = draw.random((30, 36, 64)).astype("f4")
    np.save(root / "images.npy", images)
    np.save(root / "responses.npy", images[shown, 3:8, 5].astype("f4") + draw.random((len(shown), 5)))
    np.save(root / "shown.npy", shown)
    (root / "THINGSplus").symlink_to(folders["ratings"])
    (root / "THINGS-fMRI").symlink_to(folders["ratings"].parent)
    return root


@pytest.mark.parametrize("which", range(5))
def test_the_programs_of_the_readme(which, place, tiny_cache, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    quick = {"epochs": 1, "progress": False}
    head, fit, folds, scenes = cx.train_head, cx.fit, cx.fit_folds, cx.train_scenes
    changed = {
        "open_session": lambda session: cx.front.find("open_session")(
            900000001, cache_dir=cx.embedded_session("tiny")
        ),
        "build": lambda source, out, **options: front.build(source, out, **short(source) | options),
        "train_head": lambda root: head(root, last=12, **quick),
        "fit": lambda model, root, **options: fit(model, root, last=12, **quick, **options),
        "fit_folds": lambda make, data, *split, **recipe: folds(make, data, *split, **recipe | quick),
        "train_scenes": lambda root: scenes(root, **quick),
    }  # the real functions, on less data and for one epoch
    for name, function in changed.items():
        monkeypatch.setattr(cx, name, function, raising=False)
    exec(compile(PROGRAMS[which], f"program {which + 1}", "exec"), found := {})
    sheet = found.get("sheet")
    assert sheet is None or len(sheet)
