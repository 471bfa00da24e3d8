"""From a recording to a dataset folder and back: alignment, splits, leaks, damage, other layouts."""

import errno
import json
import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Process
from scipy.ndimage import zoom
from torch.utils.data import DataLoader
from toys import toy_recording

from cortexlit.core import DataError, MissingError, SplitLeak, read_json
from cortexlit.data import clips
from cortexlit.data.clips import (
    TIERS,
    MouseDataset,
    audit_clips,
    build_dataset,
    frame_index,
    load_tier,
    resize_frames,
    split_clips,
)
from cortexlit.data.exchange import export_tree, import_tree
from cortexlit.data.folder import check_folder  # fmt: skip
from cortexlit.data.splits import split_of  # fmt: skip

SMALL = {"clip_frames": 20, "size": (6, 10), "gap": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_dataset(toy_recording(), tmp_path_factory.mktemp("clips") / "data", **SMALL)


# --- alignment


def test_table_alignment_survives_shuffled_rows():
    toy = toy_recording()
    shuffled = toy.stimulus_tables["one"].sample(frac=1, random_state=1)
    again = replace(toy, stimulus_tables={"one": shuffled})
    assert (frame_index(again, "one") == frame_index(toy, "one")).all()


def test_incomplete_repeat_is_refused():
    toy = toy_recording()
    table = toy.stimulus_tables["one"].iloc[:-7]
    with pytest.raises(DataError, match=r"4: 53"):
        frame_index(replace(toy, stimulus_tables={"one": table}), "one")


def test_hand_count_is_the_published_arithmetic():
    "Steps 906, 3621 and 3620 of the source study follow from the published epochs of session 501729039."
    epochs = pd.DataFrame(
        [("nm3", 19741, 37846), ("nm1", 38751, 47810), ("nm3", 75867, 93967)],
        columns=["stimulus", "start", "end"],
    )
    for movie, frames, first in (
        ("nm1", 900, 38751 + 906 * np.arange(10)),
        ("nm3", 3600, [*(19741 + 3621 * np.arange(5)), *(75867 + 3620 * np.arange(5))]),
    ):
        blocks = epochs[epochs["stimulus"] == movie]
        start = np.concatenate(
            [np.linspace(b.start, b.end, 10 // len(blocks) + 1)[:-1].astype(int) for b in blocks.itertuples()]
        )
        table = pd.DataFrame(
            {
                "frame": np.tile(np.arange(frames), 10),
                "repeat": np.repeat(np.arange(10), frames),
                "start": np.repeat(start, frames),
            }
        )
        index = clips._hand_index(movie, table, epochs)
        assert index[:, 0].tolist() == list(first) and (np.diff(index, axis=1) == 1).all()


def test_hand_count_needs_epochs():
    with pytest.raises(MissingError, match="needs the epochs"):
        frame_index(replace(toy_recording(), epochs=None), "one", "hand-counted")


def test_alignment_past_the_end_is_refused():
    toy = toy_recording(ratio=0.98)
    n = int(toy.stimulus_tables["three"]["end"].max()) + 1
    cut = replace(
        toy,
        traces=toy.traces[:, :n],
        timestamps=toy.timestamps[:n],
        running=None,
        pupil_area=None,
        pupil_center=None,
    )
    with pytest.raises(DataError, match="hand-counted alignment reaches frame"):
        frame_index(cut, "three", "hand-counted")


# --- splits


def test_published_counts():
    table = split_clips({"natural_movie_one": (900, 10), "natural_movie_three": (3600, 10)})
    assert table.groupby("tier").size().to_dict() == {"train": 217, "validation": 31, "test": 62}
    assert table.groupby("movie")["clip"].nunique().to_dict() == {
        "natural_movie_one": 6,
        "natural_movie_three": 25,
    }
    assert (table["repeat"][table["tier"] == "test"].unique() == [8, 9]).all()


lengths = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(20, 600), st.integers(1, 12)), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(5, 40), st.integers(0, 30), st.integers(0, 3))
def test_stimulus_split_never_leaks(movies, clip_frames, gap, seed):
    try:
        table = split_clips(movies, clip_frames, "stimuli", gap, seed=seed)
    except DataError:
        return
    audit = audit_clips(table, clip_frames)
    assert audit["shared_frames"].sum() == 0
    assert not (audit["gap"] < gap).any()
    assert set(table["tier"]) == set(TIERS)
    for row in table.itertuples():
        assert 0 <= row.start <= movies[row.movie][0] - clip_frames and row.repeat < movies[row.movie][1]
    assert not table.duplicated(["movie", "start", "repeat"]).any()


def test_audit_counts_a_leak_by_hand():
    table = pd.DataFrame(
        {"clip": [0, 1, 2], "movie": "m", "start": [0, 15, 40], "tier": ["train", "test", "test"]}
    )
    row = audit_clips(table, 20).iloc[0]
    assert (row["shared_frames"], row["of"], row["gap"]) == (5, 20, 0)


def test_leaking_table_is_refused_unless_told(tmp_path):
    table = split_clips({"one": (60, 5), "three": (200, 5)}, 20)
    with pytest.raises(SplitLeak, match="train / validation"):
        build_dataset(toy_recording(), tmp_path / "data", split=table, **SMALL)
    assert not (tmp_path / "data").exists()
    out = build_dataset(toy_recording(), tmp_path / "data", split=table, allow_shared_stimuli=True, **SMALL)
    assert any("memorises" in w for w in check_folder(out)["warnings"])


def test_identical_content_under_two_names_is_a_leak(tmp_path):
    toy = toy_recording({"a": (30, 3), "b": (30, 3), "c": (30, 3)})
    same = replace(toy, templates=dict(toy.templates, b=toy.templates["a"], c=toy.templates["a"]))
    with pytest.raises(SplitLeak, match="same_clips"):
        build_dataset(same, tmp_path / "data", split="stimuli", **SMALL)
    build_dataset(toy, tmp_path / "data", split="stimuli", **SMALL)


# --- the folder


def test_samples_are_the_recording_read_at_the_table(folder):
    toy = toy_recording()
    data = MouseDataset(folder, "test")
    raw = np.load(folder / "responses.npy")
    index = {m: frame_index(toy, m) for m in toy.movies()}
    for row in data.samples.itertuples():
        at = index[row.movie][row.repeat, row.start : row.start + 20]
        assert (raw[row.sample] == toy.traces[:, at]).all()
        assert (row.first_frame, row.last_frame) == (at[0], at[-1])


def test_normalisation_equals_the_formula(folder):
    raw, samples = np.load(folder / "responses.npy"), pd.read_csv(folder / "samples.csv")
    behavior = np.load(folder / "behavior.npy")
    train = samples["tier"] == "train"
    std = raw[train].astype(float).transpose(1, 0, 2).reshape(raw.shape[1], -1).std(1)
    pooled = behavior[train].astype(float).transpose(1, 0, 2).reshape(2, -1)
    low, high, mean = np.nanmin(pooled, 1), np.nanmax(pooled, 1), np.nanmean(pooled, 1)
    data = MouseDataset(folder, "test")
    for i, row in enumerate(data.samples.itertuples()):
        np.testing.assert_allclose(data[i]["labels"], raw[row.sample] / std[:, None], rtol=1e-5)
        filled = np.where(np.isnan(behavior[row.sample]), mean[:, None], behavior[row.sample])
        np.testing.assert_allclose(
            data[i]["behavior"], (filled - low[:, None]) / (high - low)[:, None], atol=1e-5
        )


def test_statistics_do_not_see_other_tiers(folder, tmp_path):
    toy = toy_recording()
    samples = pd.read_csv(folder / "samples.csv")
    rest = samples[samples["tier"] != "train"]
    changed = {k: getattr(toy, k).copy() for k in ("traces", "running", "pupil_area", "pupil_center")}
    for row in rest.itertuples():
        changed["traces"][:, row.first_frame : row.last_frame + 1] *= 100
        for name in ("running", "pupil_area", "pupil_center"):
            changed[name][row.first_frame : row.last_frame + 1] += 1e4
    other = build_dataset(replace(toy, **changed), tmp_path / "data", **SMALL)
    assert (other / "statistics.json").read_bytes() == (folder / "statistics.json").read_bytes()
    assert (other / "responses.npy").read_bytes() != (folder / "responses.npy").read_bytes()


def test_held_out_videos_do_not_enter_the_video_statistics(tmp_path):
    toy = toy_recording({"long": (300, 3)})
    one = build_dataset(toy, tmp_path / "one", split="stimuli", **SMALL)
    train = pd.read_csv(one / "samples.csv").query("tier == 'train'")
    template = toy.templates["long"].copy()
    template[train["start"].max() + 20 :] = 255
    two = build_dataset(
        replace(toy, templates={"long": template}),
        tmp_path / "two",
        split="stimuli",
        allow_shared_stimuli=True,
        **SMALL,
    )
    assert (
        json.loads((one / "statistics.json").read_text())["videos"]
        == json.loads((two / "statistics.json").read_text())["videos"]
    )


def test_same_input_same_bytes(folder, tmp_path):
    again = build_dataset(toy_recording(), tmp_path / "data", **SMALL)
    for path in folder.iterdir():
        if path.name != "card.json":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    one, two = (json.loads((f / "card.json").read_text()) for f in (folder, again))
    del one["provenance"], two["provenance"]  # they hold the commit of the working folder
    assert one == two


def test_missing_fields_are_left_out(tmp_path):
    out = build_dataset(
        replace(toy_recording(), pupil_area=None, pupil_center=None), tmp_path / "data", **SMALL
    )
    item = MouseDataset(out, "train")[0]
    assert set(item) == {"video", "behavior", "labels"} and item["behavior"].shape == (1, 20)
    none = build_dataset(
        replace(toy_recording(), running=None, pupil_area=None, pupil_center=None), tmp_path / "none", **SMALL
    )
    assert set(MouseDataset(none, "train")[0]) == {"video", "labels"}
    assert load_tier(none, "train").behavior is None


def test_pupil_options(tmp_path):
    toy = toy_recording()
    out = build_dataset(toy, tmp_path / "data", pupil="ignore", **SMALL)
    assert check_folder(out)["channels"] == {"behavior": ["running"]}
    with pytest.raises(MissingError, match="no eye tracking"):
        build_dataset(
            replace(toy, pupil_area=None, pupil_center=None), tmp_path / "x", pupil="required", **SMALL
        )


def test_constant_neuron(tmp_path):
    toy = toy_recording()
    traces = toy.traces.copy()
    traces[2] = 7
    still = replace(toy, traces=traces)
    with pytest.raises(DataError, match="responses: 102 never changes"):
        build_dataset(still, tmp_path / "data", **SMALL)
    out = build_dataset(still, tmp_path / "data", constant_neurons="drop", **SMALL)
    assert pd.read_csv(out / "neurons.csv")["cell_id"].tolist() == [100, 101, 103, 104]
    assert np.load(out / "responses.npy").shape[1] == 4


def test_channel_that_is_nan_wherever_it_trains(tmp_path):
    toy = toy_recording()
    running = np.full(toy.n_frames, np.nan)
    running[-10:] = 1
    with pytest.raises(DataError, match="behavior: running holds no finite value"):
        build_dataset(replace(toy, running=running), tmp_path / "data", **SMALL)


def test_torch_loader_with_workers(folder):
    batch = next(iter(DataLoader(MouseDataset(folder, "train"), batch_size=4, num_workers=1)))
    assert batch["video"].shape == (4, 1, 20, 6, 10)


# --- what can go wrong


def test_every_damaged_or_missing_file_is_named(folder, tmp_path):
    for path in sorted(folder.iterdir()):
        if path.name == "card.json":
            continue
        copy = tmp_path / path.stem
        shutil.copytree(folder, copy)
        data = bytearray((copy / path.name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / path.name).write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            MouseDataset(copy, "train")
        (copy / path.name).unlink()
        with pytest.raises(MissingError, match=path.name):
            split_of(copy)


def test_disk_full_midway_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    target = tmp_path / "data"
    shutil.copytree(folder, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clips, "_statistics", full)
    with pytest.raises(OSError, match="(?i)no space"):
        build_dataset(toy_recording(), target, overwrite=True, **SMALL)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_too_little_space_is_said_before_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(DataError, match="MB are free"):
        build_dataset(toy_recording(), tmp_path / "data", **SMALL)


def test_existing_folder_is_not_replaced_silently(folder):
    with pytest.raises(DataError, match="exists already"):
        build_dataset(toy_recording(), folder, **SMALL)


def is_killed(out: Path) -> None:
    clips._statistics = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
    build_dataset(toy_recording(), out, **SMALL)


def test_killed_while_writing_leaves_no_dataset(tmp_path):
    "kill -9 in the middle: no folder of that name exists afterwards."
    code, told = Process(tmp_path, is_killed, tmp_path / "data").ended()
    assert code == -signal.SIGKILL, told
    assert not (tmp_path / "data").exists()
    build_dataset(toy_recording(), tmp_path / "data", **SMALL)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "random"},
        {"alignment": "eye"},
        {"pupil": "maybe"},
        {"resample": "cubic"},
        {"constant_neurons": "zero"},
    ],
)
def test_unknown_options_name_the_allowed_ones(tmp_path, options):
    with pytest.raises(DataError, match='expected: .*"'):
        build_dataset(toy_recording(), tmp_path / "data", **(SMALL | options))
    assert not list(tmp_path.iterdir())


def test_missing_stimulus_lists_what_there_is(tmp_path):
    with pytest.raises(MissingError, match=r"\['one', 'three'\]"):
        build_dataset(toy_recording(), tmp_path / "data", movies=["two"], **SMALL)


# --- resizing


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(2, 20), st.integers(2, 20), st.integers(0, 9))
def test_bilinear_equals_scipys_loop(h, w, new_h, new_w, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (2, h, w)).astype("uint8")
    ours = resize_frames(frames, (new_h, new_w), "bilinear")
    assert ours.shape == (2, new_h, new_w) and ours.dtype == np.float32
    at = [np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1) for n, m in ((h, new_h), (w, new_w))]
    for frame, small in zip(frames.astype(float), ours, strict=True):
        for i, y in enumerate(at[0]):
            for j, x in enumerate(at[1]):
                a, b = int(y), int(x)
                c, d = min(a + 1, h - 1), min(b + 1, w - 1)
                top = frame[a, b] * (1 - x + b) + frame[a, d] * (x - b)
                low = frame[c, b] * (1 - x + b) + frame[c, d] * (x - b)
                assert abs(small[i, j] - (top * (1 - y + a) + low * (y - a))) < 1e-3


def test_halving_equals_scipys_zoom():
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 80)).astype("uint8")
    for ours, frame in zip(resize_frames(frames, (20, 40), "bilinear"), frames, strict=True):
        np.testing.assert_allclose(
            ours, zoom(frame.astype(float), 0.5, order=1, grid_mode=True, mode="nearest"), atol=1e-4
        )


def test_antialiasing_keeps_the_mean_and_removes_fine_texture():
    checks = (np.indices((96, 96)).sum(0) % 2 * 255).astype("uint8")[None]
    assert abs(resize_frames(checks, (12, 12)).mean() - 127.5) < 1
    assert resize_frames(checks, (13, 13)).std() < 5 < resize_frames(checks, (13, 13), "bilinear").std()


# --- other layouts


@pytest.mark.parametrize("layout", ["sensorium", "study1"])
@pytest.mark.parametrize("eye", [True, False])
def test_trees_come_back(tmp_path, layout, eye):
    toy = toy_recording() if eye else replace(toy_recording(), pupil_area=None, pupil_center=None)
    source = build_dataset(toy, tmp_path / "source", split="stimuli", **SMALL)
    back = import_tree(export_tree(source, tmp_path / "tree", layout), tmp_path / "back")
    for tier in TIERS:
        a, b = load_tier(source, tier), load_tier(back, tier)
        np.testing.assert_allclose(a.labels, b.labels, rtol=2e-5)
        np.testing.assert_allclose(a.videos[a.clip], b.videos[b.clip], atol=1e-5)
        assert (a.repeat == b.repeat).all() and (a.movie == b.movie).all() and (a.start == b.start).all()
        assert (a.pupil_center is None) == (b.pupil_center is None) == (not eye)
    card = check_folder(back)
    want = (
        ["pupil_area", "running"] if layout == "sensorium" and eye else ["running", "pupil_area"][: 1 + eye]
    )
    assert card["channels"]["behavior"] == want
    # by name: running before pupil under "range", whatever the order of the folder
    np.testing.assert_allclose(
        load_tier(source, "train").behavior, load_tier(back, "train").behavior, atol=1e-5
    )


def test_sensorium_tree_is_the_published_layout(folder, tmp_path):
    tree = export_tree(folder, tmp_path / "tree")
    samples = pd.read_csv(folder / "samples.csv")
    assert np.load(tree / "data/videos/0.npy").shape == (6, 10, 20)
    assert (
        np.load(tree / "data/behavior/0.npy").shape
        == np.load(tree / "data/pupil_center/0.npy").shape
        == (2, 20)
    )
    raw = np.load(folder / "behavior.npy")
    np.testing.assert_array_equal(
        np.load(tree / "data/behavior/3.npy"), raw[3][::-1]
    )  # pupil first, then running
    tiers = np.load(tree / "meta/trials/tiers.npy")
    assert set(tiers) == {"train", "oracle", "final_test_main"} and len(tiers) == len(samples)
    assert np.load(tree / "meta/neurons/cell_motor_coordinates.npy").shape == (5, 3)
    std = np.load(tree / "meta/statistics/responses/all/std.npy")
    train = np.load(folder / "responses.npy")[samples["tier"] == "train"].astype(float)
    np.testing.assert_allclose(std, train.transpose(1, 0, 2).reshape(5, -1).std(1), rtol=1e-6)


def _foreign_tree(root: Path, repeats_in_two_tiers: bool = False) -> Path:
    "A Sensorium tree as others write it: NaN tails, no card."
    draw = np.random.default_rng(0)
    videos = draw.integers(0, 256, (3, 6, 8, 30)).astype(float)
    tiers = ["train", "train", "oracle", "final_test_main", "none"]
    shown = [0, 0, 1, 0 if repeats_in_two_tiers else 2, 2]
    for i, v in enumerate(shown):
        length = 30 - i
        for name, array in {
            "videos": videos[v],
            "responses": draw.random((4, 30)),
            "behavior": draw.random((2, 30)),
            "pupil_center": draw.random((2, 30)),
        }.items():
            array = array.copy()
            array[..., length if name != "videos" else 25 :] = np.nan
            (root / "data" / name).mkdir(parents=True, exist_ok=True)
            np.save(root / "data" / name / f"{i}.npy", array)
    for path, array in {
        "meta/trials/tiers.npy": np.array(tiers),
        "meta/neurons/unit_ids.npy": np.arange(4) + 7,
        "meta/neurons/cell_motor_coordinates.npy": draw.random((4, 3)),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / path, array)
    return root


def test_foreign_sensorium_tree(tmp_path):
    out = import_tree(_foreign_tree(tmp_path / "tree"), tmp_path / "data")
    data = MouseDataset(out, "train")
    assert len(data) == 2 and data[0]["video"].shape == (1, 25, 6, 8)  # cut to the shortest trial
    assert np.load(out / "videos.npy").shape[0] == 3  # one clip for two trials of the same video
    assert data.neurons["cell_id"].tolist() == [7, 8, 9, 10]
    assert len(MouseDataset(out, "test")) == 1
    with pytest.raises(DataError, match="1 to 25"):
        import_tree(tmp_path / "tree", tmp_path / "x", frames=40)


def test_foreign_tree_with_a_video_in_two_tiers_is_refused(tmp_path):
    with pytest.raises(SplitLeak, match="train / test"):
        import_tree(_foreign_tree(tmp_path / "tree", repeats_in_two_tiers=True), tmp_path / "data")
    import_tree(tmp_path / "tree", tmp_path / "data", allow_shared_stimuli=True)


def test_tree_with_a_missing_trial_names_the_file(tmp_path):
    tree = _foreign_tree(tmp_path / "tree")
    (tree / "data/responses/1.npy").unlink()
    with pytest.raises(MissingError, match="responses/1.npy"):
        import_tree(tree, tmp_path / "data")
    with pytest.raises(MissingError, match="neither a Sensorium tree"):
        import_tree(tmp_path, tmp_path / "data")


def test_schemes_of_both_repositories_equal_their_formulas(folder):
    "Plain arithmetic over the train samples, field by field and frame index by frame index."
    samples = pd.read_csv(folder / "samples.csv")
    train = samples[samples["tier"] == "train"]
    raw = {
        n: np.load(folder / f"{n}.npy").astype(float)
        for n in ("videos", "responses", "behavior", "pupil_center")
    }
    stats = read_json(folder / "statistics.json")
    for n in ("behavior", "pupil_center"):
        mean = np.asarray(stats[n]["mean"])[:, None]
        raw[n] = np.where(np.isnan(raw[n]), mean, raw[n])
    fitted = {n: x[train["clip"] if n == "videos" else train["sample"]] for n, x in raw.items()}
    mean, std = ({n: f(x, axis=0) for n, x in fitted.items()} for f in (np.mean, np.std))
    precision = 1 / np.maximum(std["responses"], 0.01 * std["responses"].mean())
    row = samples[samples["tier"] == "test"].iloc[1]
    x = {n: a[row["clip"] if n == "videos" else row["sample"]] for n, a in raw.items()}

    published = MouseDataset(folder, "test", "viv1t")[1]
    quirk = (x["videos"] - mean["videos"]) / (std["videos"] - mean["videos"])
    np.testing.assert_allclose(published["video"][0], quirk, rtol=1e-3, atol=1e-3)
    for n in ("behavior", "pupil_center"):
        low, high = fitted[n].min(0), fitted[n].max(0)
        expected = (x[n] - low) / (high - low)
        expected = (
            expected[::-1] if n == "behavior" else expected
        )  # pupil first, as the published cores want it
        np.testing.assert_allclose(published[n], expected, atol=1e-4)
    np.testing.assert_allclose(published["labels"], x["responses"] * precision, rtol=1e-4)

    standard = MouseDataset(folder, "test", "viv1t-standardised")[1]
    np.testing.assert_allclose(
        standard["video"][0], (x["videos"] - mean["videos"]) / std["videos"], atol=1e-3
    )
    expected = (x["behavior"] / std["behavior"])[::-1]
    np.testing.assert_allclose(standard["behavior"], expected, rtol=1e-3, atol=1e-4)

    pooled = MouseDataset(folder, "test", "closed-loop")[1]
    video = fitted["videos"]
    np.testing.assert_allclose(pooled["video"][0], (x["videos"] - video.mean()) / video.std(), atol=1e-3)
    center = MouseDataset(folder, "train", "closed-loop")
    z = np.stack([center[i]["pupil_center"] for i in range(len(center))])
    assert abs(z.mean((0, 2))).max() < 0.1 and abs(z.std((0, 2)) - 1).max() < 0.2  # gaps pull slightly
    np.testing.assert_allclose(pooled["labels"], MouseDataset(folder, "test")[1]["labels"])


def test_unknown_normalisation_names_the_choices(folder):
    with pytest.raises(DataError, match="closed-loop"):
        MouseDataset(folder, "train", "zscore")
