"""Leaks that names do not show: the same film in disguise, the same trial, the same two-photon frames, the wrong tier."""

import multiprocessing
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset
from toy_training import LAST, tiers, tiny_model
from toys import toy_recording

from cortexlit.core import DataError, SplitLeak, rng
from cortexlit.data.audit import (
    audit,
    known_tiers,
    note_opening,
    openings,
    same_frames,
    same_stimuli,
    sample_marks,
)
from cortexlit.data.clips import MouseDataset, build_dataset
from cortexlit.data.exchange import import_arrays
from cortexlit.data.folder import check_folder
from cortexlit.data.scenes import ScenesDataset
from cortexlit.data.splits import split_of
from cortexlit.evaluation.baselines import score_dataset
from cortexlit.evaluation.scores import ScoreSheet
from cortexlit.training.trainer import fit
from cortexlit.training.tuning import Choice, Space, tune

pytestmark = pytest.mark.usefixtures("no_curves")


def slow_film(frames: int, seed: int = 0, pace: float = 0.05) -> np.ndarray:
    "A smooth random landscape (frames, 30, 52) under a slowly moving camera: neighbours differ by little."
    field = rng(seed, "field").normal(size=(200, 260))
    field = np.real(np.fft.ifft2(np.fft.fft2(field) * np.exp(-(np.hypot(*np.meshgrid(
        np.fft.fftfreq(260), np.fft.fftfreq(200))) ** 2) * 300)))  # fmt: skip
    field = 128 + 50 * field / field.std()
    at = pace * np.arange(frames)
    low = np.floor(at).astype(int)
    parts = [
        field[20:50, k : k + 52] * (1 - f) + field[20:50, k + 1 : k + 53] * f
        for k, f in zip(low, at - low, strict=True)
    ]
    return np.stack(parts).astype(np.float32)


def clips_of(film: np.ndarray, length: int) -> np.ndarray:
    return film[: len(film) // length * length].reshape(-1, length, *film.shape[1:])


def grey_level(film: np.ndarray) -> np.ndarray:
    return film + rng(0, "grey level").choice([-1, 1], film.shape)


FILMS = {
    "slow": slow_film(600),
    "fast": slow_film(600, pace=0.3),
    "noise": rng(0, "noise").random((600, 12, 20)),
}
DISGUISES = {
    "identical": lambda film: film,
    "one frame later": lambda film: film[1:],
    "one grey level": grey_level,
    "one grey level more": lambda film: film + 1,
    "mirrored": lambda film: film[..., ::-1],
    "upside down": lambda film: film[..., ::-1, :],
    "other clip length": lambda film: film[37:],
}


def gratings(directions: int, frames: int = 49) -> np.ndarray:
    "(directions, frames, 36, 64) drifting for most of the clip, grey before and after."
    y, x = np.mgrid[:36, :64]
    t = np.arange(frames)[:, None, None]
    angles = 2 * np.pi * np.arange(directions) / directions
    waves = [np.sin(2 * np.pi * ((x * np.cos(a) + y * np.sin(a)) / 16 - t / 8)) for a in angles]
    shown = (t >= 8) & (t < 41)
    return np.stack([128 + 100 * wave * shown for wave in waves]).astype(np.float32)


def test_a_grating_that_drifts_the_other_way_is_another_stimulus():
    films = gratings(8)
    assert not len(same_stimuli(films[:4], films[4:]))  # each is the mirror image of one of the others
    found = same_stimuli(films[:4], films[3:5])
    assert found[["clip", "known"]].to_numpy().tolist() == [[0, 3]] and set(found["how"]) == {""}


@pytest.mark.parametrize("how", DISGUISES)
@pytest.mark.parametrize("film", FILMS)
def test_the_same_film_in_disguise_is_found(film, how):
    if film == "noise" and how == "one grey level":
        pytest.skip("a grey level is all that this film of 0 to 1 has")
    known, other = FILMS[film], DISGUISES[how](FILMS[film])
    length = 33 if how == "other clip length" else 40
    found = same_stimuli(clips_of(known, 40), clips_of(other, length))
    assert len(found) == len(clips_of(other, length))


@pytest.mark.parametrize("film", FILMS)
@pytest.mark.parametrize("length", [10, 40, 120])
def test_neighbours_in_a_film_are_not_the_same(film, length):
    "Clips side by side, alternately in two tiers, no gap: the hardest legitimate split."
    clips = clips_of(FILMS[film], length)
    assert same_stimuli(clips[::2], clips[1::2]).empty
    noisy = clips_of(grey_level(255 * FILMS[film] / FILMS[film].max()), length)
    assert same_stimuli(noisy[::2], noisy[1::2]).empty


def test_a_scene_that_stands_still_across_the_cut_is_no_leak_and_a_still_shown_twice_is():
    film = FILMS["slow"][:160].copy()
    film[60:100] = film[
        60
    ]  # the camera rests from the last third of one clip into the first quarter of the next
    assert same_stimuli(film[None, :80], film[None, 80:]).empty
    still = np.repeat(film[None, :1], 40, axis=1)
    assert len(same_stimuli(still, still + 1)) == 1
    assert same_stimuli(still, np.repeat(FILMS["slow"][None, 500:501], 40, axis=1)).empty


def test_grey_screens_are_never_the_same_stimulus():
    grey = np.full((3, 40, 20, 30), 128.0)
    assert same_stimuli(grey, grey).empty
    film = clips_of(FILMS["slow"][:80], 40)
    mixed = np.concatenate([film, np.full((1, 40, 30, 52), 128.0)])
    assert same_stimuli(mixed, mixed[2:]).empty


def test_a_short_overlap_is_found():
    film = FILMS["slow"]
    found = same_stimuli(film[None, :140], film[None, 115:255])
    assert found["shift"].tolist() == [115]


def test_pictures():
    draw = rng(0, "pictures")
    pictures = np.stack([slow_film(1, seed)[0] for seed in range(12)])
    for disguised in (pictures + 1, pictures + draw.choice([-1, 1], pictures.shape), np.roll(pictures, 1, 2),
                      np.roll(pictures, -1, 1), pictures[..., ::-1]):  # fmt: skip
        assert same_stimuli(pictures, disguised)["clip"].tolist() == list(range(12))
    assert same_stimuli(pictures[:6], pictures[6:]).empty
    tiny = np.arange(6.0).reshape(3, 1, 2)
    assert same_stimuli(tiny[:2], tiny[1:])["clip"].tolist() == [0]  # too small to be alike: equal only
    with pytest.raises(DataError, match="both"):
        same_stimuli(pictures, FILMS["slow"][None])


# ---- folders


def recording_of(films: dict[str, np.ndarray], repeats: int = 4, seed: int = 0, **changes):
    made = toy_recording({name: (len(film), repeats) for name, film in films.items()}, seed=seed)
    return replace(made, templates={k: v.astype(np.float32) for k, v in films.items()}, **changes)


def film_split(recording, held_out: str) -> pd.DataFrame:
    "Whole films to tiers, by name."
    rows = []
    for name, film in recording.templates.items():
        tier = {held_out: "test", "v": "validation"}.get(name, "train")
        rows += [(name, s, r, tier) for s in range(0, len(film) - 19, 20) for r in range(4)]
    return pd.DataFrame(rows, columns=["movie", "start", "repeat", "tier"])


@pytest.mark.parametrize("how", ["identical", "one frame later", "one grey level", "mirrored"])
def test_a_folder_with_the_same_film_under_another_name_is_refused(tmp_path, how):
    film = FILMS["slow"][:120]
    films = {"a": film, "v": FILMS["slow"][300:360], "b": DISGUISES[how](film)}
    recording = recording_of(films)
    with pytest.raises(SplitLeak, match="tiers share stimuli"):
        build_dataset(recording, tmp_path / "leak", 20, split=film_split(recording, "b"), gap=0)
    folder = build_dataset(recording, tmp_path / "meant", 20, split=film_split(recording, "b"), gap=0,
                           allow_shared_stimuli=True)  # fmt: skip
    with pytest.raises(SplitLeak):
        split_of(folder).audit()
    report = split_of(folder).audit(forbid=()).set_index(["tiers", "what"])["shared"]
    assert report["train, test", "content"] > 0 == report["train, test", "clip"]
    assert "Tiers share movie frames" in check_folder(folder)["warnings"][-1]


def test_pictures_a_grey_level_or_a_pixel_apart_are_refused(tmp_path):
    pictures = np.stack([slow_film(1, seed)[0] for seed in range(12)])
    responses = rng(0, "responses").normal(size=(24, 5))
    split = ["train"] * 12 + ["validation"] * 6 + ["test"] * 6
    for twins in (pictures + 1, np.roll(pictures, 1, 2)):
        with pytest.raises(SplitLeak, match="tiers share pictures"):
            import_arrays(np.concatenate([pictures, twins]), responses, tmp_path / "out", split=split)


@pytest.mark.parametrize("name", ["Test", "test ", "TEST", "val", "training"])
def test_a_tier_by_another_spelling_is_refused(tmp_path, name):
    recording = toy_recording({"one": (100, 4)})
    table = pd.DataFrame([("one", s, r, "train" if s < 60 else name) for s in range(0, 100, 20) for r in range(4)],
                         columns=["movie", "start", "repeat", "tier"])  # fmt: skip
    with pytest.raises(DataError, match="a tier is called"):
        build_dataset(recording, tmp_path / "out", 20, split=table, gap=0)
    pictures = rng(0, "p").random((6, 10, 12))
    with pytest.raises(DataError, match="a tier is called"):
        import_arrays(
            pictures, rng(0, "r").normal(size=(6, 3)), tmp_path / "out", split=["train"] * 4 + [name] * 2
        )
    known_tiers(["train", "live_test_main", "none", "fold 3"])


def test_the_same_sample_twice_in_a_split_is_refused(tmp_path):
    recording = toy_recording({"one": (100, 4)})
    rows = [("one", s, r, "train" if s < 40 else "test") for s in range(0, 100, 20) for r in range(4)]
    table = pd.DataFrame([*rows, rows[0]], columns=["movie", "start", "repeat", "tier"])
    with pytest.raises(SplitLeak, match="twice"):
        build_dataset(recording, tmp_path / "out", 20, split=table, gap=0)


def test_recorded_frames_in_two_tiers():
    a, b = (np.array([0, 100]), np.array([19, 119])), (np.array([19, 200, 110]), np.array([38, 219, 129]))
    assert same_frames(a, b) == 1  # the third; the first meets the end of a sample in one frame
    windows = (np.array([0, 15, 30]), np.array([14, 29, 44]))
    assert same_frames(windows, (windows[0] + 8, windows[1] + 8), films=False) == 0  # reach into the next one
    assert same_frames(windows, (windows[0] + 2, windows[1] + 2), films=False) == 3


def test_a_folder_whose_tiers_are_read_from_the_same_two_photon_frames_is_refused(tmp_path):
    "Repeats counted by hand from an epoch that is too short lie on each other."
    recording = toy_recording({"one": (100, 4)})
    epochs = recording.epochs.assign(end=recording.epochs["start"] + 330)
    recording = replace(recording, epochs=epochs)
    starts = recording.stimulus_tables["one"]
    table = starts.assign(start=30 + (starts["start"] - 30) * 330 // 405)
    recording = replace(recording, stimulus_tables={"one": table})
    with pytest.raises(SplitLeak, match="two-photon frames of train"):
        build_dataset(recording, tmp_path / "out", 20, split="repeats", alignment="hand-counted")


@pytest.fixture(scope="module")
def mice(tmp_path_factory):
    "Mouse A with the published split, B and C by stimuli, all of them shown the same two films."
    root = tmp_path_factory.mktemp("mice")
    films = {"one": FILMS["slow"][:200], "three": FILMS["fast"][:400]}
    folders = {}
    for k, (mouse, split) in enumerate({"A": "repeats", "B": "stimuli", "C": "stimuli"}.items()):
        recording = recording_of(films, seed=k, name=f"mouse {mouse}")
        folders[mouse] = build_dataset(recording, root / mouse, 20, (10, 14), split=split, gap=5)
    return folders


def tiers_of(folder, *names):
    return tuple(MouseDataset(folder, name) for name in names or ("train", "validation"))


def two_mice(folders):
    model = tiny_model({mouse: 5 for mouse in folders})
    return model, dict(folders)


FAST = dict(epochs=1, last=LAST, batch_size=16, progress=False)


def test_a_film_of_one_mouse_in_the_test_of_another(mice, tmp_path):
    model, data = two_mice({m: mice[m] for m in "AB"})
    with pytest.raises(SplitLeak, match="train of A / test of B"):
        fit(model, data, adapt="full", out=tmp_path / "leak", **FAST)
    assert not (tmp_path / "leak").exists()
    model, data = two_mice({m: mice[m] for m in "BC"})
    fit(model, data, adapt="full", out=tmp_path / "good", **FAST)
    parts = {t: {m: MouseDataset(mice[m], t) for m in "AB"} for t in ("train", "validation")}
    report = audit(parts, allow_shared_stimuli=True).set_index("between")
    assert (
        report.loc["train of A / test of B", "same_stimuli"] == report.loc["train of A / test of B", "of"] > 0
    )


@pytest.mark.parametrize("change", [lambda f: f[1:], lambda f: f[..., ::-1], lambda f: f + 1])
def test_the_film_of_another_mouse_in_disguise(mice, tmp_path, change):
    films = {"first": change(FILMS["slow"][:200]), "second": change(FILMS["fast"][:400])}
    other = build_dataset(
        recording_of(films, seed=9, name="D"), tmp_path / "D", 20, (10, 14), split="repeats"
    )
    data = {"B": tiers_of(mice["B"]), "D": tiers_of(other)}
    with pytest.raises(SplitLeak, match="train of D / test of B"):
        audit({t: {m: pair[k] for m, pair in data.items()} for k, t in enumerate(("train", "validation"))})


def test_the_published_split_of_one_mouse_still_runs(mice, tmp_path):
    fit(tiny_model(), mice["A"], adapt="full", out=tmp_path / "run", **FAST)
    fit(tiny_model(), mice["B"], adapt="full", out=tmp_path / "other", **FAST)


def wrong_tiers(folder):
    train, validation, test = tiers_of(folder, "train", "validation", "test")
    return {
        "train twice": (train, train),
        "train and test": (train, test),
        "test and validation": (test, validation),
        "part of the test": (train, Subset(test, [0, 1])),
        "part of train": (train, Subset(train, [3, 4])),
        "some of train among validation": (train, ConcatDataset([validation, Subset(train, [0])])),
    }


@pytest.mark.parametrize("name", ["train twice", "train and test", "test and validation", "part of the test",
                                  "part of train", "some of train among validation"])  # fmt: skip
def test_fit_and_tune_refuse_the_wrong_tiers(mice, tmp_path, name):
    for mouse in "AB":
        given = wrong_tiers(mice[mouse])[name]
        with pytest.raises(SplitLeak):
            fit(tiny_model(), given, out=tmp_path / "run", **FAST)
        with pytest.raises(SplitLeak):
            tune(lambda p: tiny_model(), given, Space({"lr": Choice((0.01, 0.02))}), tmp_path / "search",
                 trials=1, epochs=1, last=LAST, progress=False)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_folder_are_known_by_their_content(tmp_path):
    train, validation = tiers()
    for given in ((train, train), (train, [*validation.items, train.items[3]])):
        with pytest.raises(SplitLeak, match="not apart"):
            fit(tiny_model(), given, out=tmp_path / "run", **FAST)
    with pytest.raises(SplitLeak, match="1 samples are there twice"):
        audit({"train": train, "validation": [*validation.items, validation.items[0]]})
    film = dict(validation.items[0], video=train.items[0]["video"].flip(-1))
    with pytest.raises(SplitLeak, match="1 mirrored"):
        audit({"train": train, "validation": [film]})
    assert audit({"train": train, "validation": [film]}, allow_shared_stimuli=True)[
        "same_stimuli"
    ].tolist() == [1]
    silent = [{"video": x["video"], "labels": torch.zeros(5, 20)} for x in train.items]
    assert sample_marks(silent) == [None] * 8  # no spike, no mark


def test_open_test_on_data_of_the_search(tmp_path):
    train, validation = tiers()
    search = tune(lambda p: tiny_model(), (train, validation), Space({"lr": Choice((0.01, 0.02))}), tmp_path / "search",
                  trials=1, epochs=1, last=LAST, progress=False)  # fmt: skip
    for wrong in (train, validation, Subset(validation, [1]), ConcatDataset([tiers()[0]])):
        with pytest.raises(SplitLeak, match="training or validation data of this search"):
            search.open_test(wrong, last=LAST)
    fresh = type(train)(3, seed=7)
    assert search.open_test(fresh, last=LAST).shape == (3, 5, LAST)


def test_one_recording_in_two_folders(mice, tmp_path):
    films = {"one": FILMS["slow"][:200], "three": FILMS["fast"][:400]}
    recording = recording_of(films, seed=1, name="mouse B")
    again = build_dataset(recording, tmp_path / "again", 20, (10, 14), split="repeats")
    report = audit({"train": MouseDataset(again, "train"), "test": MouseDataset(mice["A"], "test")})
    assert report["same_recording"].iloc[0] == 0  # another mouse
    with pytest.raises(SplitLeak) as error:
        audit({"train": MouseDataset(again, "train"), "test": MouseDataset(mice["B"], "test")})
    assert "train of mouse B / test of mouse B" in str(error.value)


# ---- the count of openings


def count_up(folder, n):
    for k in range(n):
        note_opening(folder, f"process {os.getpid()} {k}", "a test")


def test_two_processes_count_every_opening(mice, tmp_path):
    folder = shutil.copytree(mice["B"], tmp_path / "folder")
    jobs = [multiprocessing.get_context("fork").Process(target=count_up, args=(folder, 15)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    table = openings(folder)
    assert len(table) == 30 and table["by"].nunique() == 30
    assert note_opening(folder, "one more", "a test") == 31
    assert len(MouseDataset(folder, "test"))  # the folder is still whole


def test_the_sheet_prints_the_count_and_keeps_it(mice, tmp_path):
    folder = shutil.copytree(mice["B"], tmp_path / "folder")
    first, second = score_dataset(folder, last=8), score_dataset(folder, last=8)
    assert "mouse B: test tier opened 1 time\n" in f"{first!r}\n" and "test tier opened 2 times" in repr(
        second
    )
    assert "test tier opened 2 times" in second._repr_html_()
    assert openings(folder)[["by", "function"]].to_numpy().tolist() == [["baselines", "score_dataset"]] * 2
    assert ScoreSheet.load(second.save(tmp_path / "scores")).opened == {"mouse B": 2}
    films = {"one": FILMS["slow"][:200], "three": FILMS["fast"][:400]}
    build_dataset(
        recording_of(films, seed=1, name="mouse B"),
        folder,
        20,
        (10, 14),
        split="stimuli",
        gap=5,
        overwrite=True,
    )
    assert "opened 3 times" in repr(score_dataset(folder, last=8))  # building it again is no way to forget


def test_a_folder_that_cannot_be_written_still_works(mice, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(mice["B"], tmp_path / "folder")

    def refuse(*_, **__):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "open", refuse)
    assert note_opening(folder, "model", "a test") is None
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "cannot be written" in told
    monkeypatch.undo()
    assert len(openings(folder)) == 0


def test_a_damaged_list_is_named(mice, tmp_path):
    folder = shutil.copytree(mice["B"], tmp_path / "folder")
    (folder / ".test-openings.json").write_text('[{"by": 1}]')
    with pytest.raises(DataError, match="test-openings"):
        openings(folder)


def test_scenes_are_audited_across_folders(tmp_path):
    pictures = np.stack([slow_film(1, seed)[0] for seed in range(20)])
    draw = rng(0, "responses")
    one, other = (import_arrays(p, draw.normal(size=(20, 5)), tmp_path / n, name=n, seed=s)
                  for n, p, s in (("one", pictures, 0), ("other", pictures[::-1] + 1, 1)))  # fmt: skip
    given = {"train": {m: ScenesDataset(f, "train") for m, f in (("one", one), ("other", other))},
             "validation": {m: ScenesDataset(f, "validation") for m, f in (("one", one), ("other", other))}}  # fmt: skip
    with pytest.raises(SplitLeak):
        audit(given)
    audit({t: ScenesDataset(one, t) for t in ("train", "validation", "test")})
