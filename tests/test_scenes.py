"""From pictures shown to a static dataset folder and back: windows, blanks, splits, leaks, layouts, anybody's arrays."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cortexlit.core import DataError, MissingError, SplitLeak, read_json, rng
from cortexlit.data.clips import TIERS, build_dataset, resize_frames
from cortexlit.data.exchange import export_sensorium2022, import_arrays, import_sensorium2022  # fmt: skip
from cortexlit.data.folder import check_folder
from cortexlit.data.recordings import Recording
from cortexlit.data.scenes import (
    GREY,
    ScenesDataset,
    audit_pictures,
    build_scenes,
    load_scenes,
    scene_windows,
    split_images,
    window_means,
)

PICTURES, REPEATS, BLANKS, STEP, RATE = 12, 5, 6, 8, 30.0
SMALL = {"size": (6, 10), "via": None}


def toy_scenes(eye: bool = True, seed: int = 0, **changes) -> Recording:
    "Pictures in random order, a new one every 8 frames, with blanks among them."
    draw = rng(seed, "toy scenes")
    frame = draw.permutation([*np.repeat(np.arange(PICTURES), REPEATS), *[-1] * BLANKS])
    start = 20 + STEP * np.arange(len(frame))
    n = start[-1] + 40
    fields = {
        "name": "toy", "source": "test", "timestamps": 5 + np.arange(n) / RATE,
        "traces": (10 + draw.standard_normal((5, n))).astype("float32"),
        "neurons": pd.DataFrame({"cell_id": 100 + np.arange(5), "x_um": draw.random(5), "y_um": draw.random(5), "area": "VISp", "depth_um": 175}),
        "stimulus_tables": {"natural_scenes": pd.DataFrame({"frame": frame, "start": start, "end": start + STEP - 1})},
        "templates": {"natural_scenes": draw.integers(0, 256, (PICTURES, 24, 30)).astype("uint8")},
        "running": draw.normal(5, 3, n), "signal": "dff",
    }  # fmt: skip
    fields["running"][start[3] : start[3] + 40] = np.nan  # a whole window and more
    if eye:
        fields |= {"pupil_area": draw.normal(900, 90, n), "pupil_center": draw.normal(0, 3, (n, 2))}
        fields["pupil_area"][100:110] = fields["pupil_center"][100:110] = np.nan
    return Recording(**(fields | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_scenes(toy_scenes(), tmp_path_factory.mktemp("scenes") / "data", **SMALL)


# --- windows


def test_response_is_the_mean_of_the_trace_in_the_window(folder):
    toy = toy_scenes()
    table = toy.table("natural_scenes")
    raw, samples = np.load(folder / "responses.npy"), pd.read_csv(folder / "samples.csv")
    assert len(samples) == len(table) == PICTURES * REPEATS + BLANKS
    for i, row in enumerate(table.itertuples()):
        want = toy.traces[:, row.start : row.start + 15].mean(1)  # 500 ms at 30 Hz
        np.testing.assert_allclose(raw[i], want, rtol=1e-5)
        assert samples["scene"][i] == row.frame
        assert (samples["first_frame"][i], samples["last_frame"][i]) == (row.start, row.start + 14)


@pytest.mark.parametrize(
    ("window", "delay", "frames"), [(0.25, 0, (0, 8)), (0.5, 0.1, (3, 18)), (0.001, 0, (0, 1))]
)
def test_window_and_delay_in_seconds(window, delay, frames):
    toy = toy_scenes()
    table = scene_windows(toy, window, delay)
    start = toy.table("natural_scenes")["start"]
    assert (table["first_frame"] == start + frames[0]).all()
    assert (table["last_frame"] + 1 == start + frames[1]).all()


def test_order_of_the_table_does_not_matter(folder, tmp_path):
    toy = toy_scenes()
    shuffled = toy.table("natural_scenes").sample(frac=1, random_state=1)
    again = replace(toy, stimulus_tables={"natural_scenes": shuffled})
    out = build_scenes(again, tmp_path / "data", **SMALL)
    assert (out / "samples.csv").read_bytes() == (folder / "samples.csv").read_bytes()
    assert (out / "responses.npy").read_bytes() == (folder / "responses.npy").read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_window_means_are_nanmeans(length, n, seed):
    draw = np.random.default_rng(seed)
    series = draw.normal(0, 1, (3, 60))
    series[draw.random(series.shape) < 0.3] = np.nan
    first = draw.integers(0, 60 - length, n)
    ours = window_means(series, first, first + length - 1)
    for i, at in enumerate(first):
        for c in range(3):
            part = series[c, at : at + length]
            if np.isnan(part).all():
                assert np.isnan(ours[i, c])
            else:
                assert ours[i, c] == pytest.approx(np.nanmean(part), rel=1e-5, abs=1e-6)


def test_window_past_the_end_is_refused():
    with pytest.raises(DataError, match="windows end after the recording"):
        scene_windows(toy_scenes(), window_s=3)


# --- pictures


def test_blank_is_grey_and_not_the_last_picture(folder):
    toy = toy_scenes()
    images, samples = np.load(folder / "images.npy"), pd.read_csv(folder / "samples.csv")
    blank = samples[samples["scene"] == -1]
    assert len(blank) == BLANKS and blank["image"].nunique() == 1
    assert (images[blank["image"].iloc[0]] == GREY).all()
    for row in samples[samples["scene"] >= 0].itertuples():
        want = resize_frames(toy.templates["natural_scenes"][row.scene][None], (6, 10))[0]
        np.testing.assert_array_equal(images[row.image], want)
    assert len(images) == PICTURES + 1
    assert set(blank["tier"]) == {"train"}


@pytest.mark.parametrize("seed", range(6))
def test_grey_is_never_held_out(tmp_path, seed):
    samples = pd.read_csv(build_scenes(toy_scenes(), tmp_path / "data", seed=seed, **SMALL) / "samples.csv")
    assert set(samples["tier"][samples["scene"] == -1]) == {"train"}


def test_two_steps_are_two_resizes(tmp_path):
    toy = toy_scenes()
    out = build_scenes(toy, tmp_path / "data", size=(6, 10), via=(12, 16), resample="bilinear")
    template = toy.templates["natural_scenes"]
    want = resize_frames(resize_frames(template, (12, 16), "bilinear"), (6, 10), "bilinear")
    np.testing.assert_array_equal(np.load(out / "images.npy")[:PICTURES], want)


def test_the_same_picture_under_two_numbers_stays_in_one_tier(tmp_path):
    toy = toy_scenes()
    template = toy.templates["natural_scenes"].copy()
    template[7] = template[2]
    twin = replace(toy, templates={"natural_scenes": template})
    for seed in range(4):
        out = build_scenes(twin, tmp_path / f"{seed}", seed=seed, **SMALL)
        samples = pd.read_csv(out / "samples.csv")
        assert samples[samples["scene"].isin([2, 7])]["tier"].nunique() == 1
        assert len(np.load(out / "images.npy")) == PICTURES  # one stored for both, and grey
        assert samples[samples["scene"].isin([2, 7])]["repeat"].tolist() == list(range(2 * REPEATS))


def test_table_that_names_a_picture_which_is_not_there(tmp_path):
    toy = toy_scenes()
    short = replace(toy, templates={"natural_scenes": toy.templates["natural_scenes"][:5]})
    with pytest.raises(DataError, match=r"-1 \(grey\) to 4"):
        build_scenes(short, tmp_path / "data", **SMALL)


# --- splits


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 60), st.integers(1, 8), st.integers(0, 5), st.floats(0.05, 0.4), st.floats(0.05, 0.4))
def test_pictures_never_sit_in_two_tiers(pictures, repeats, seed, validation, test):
    image = np.random.default_rng(seed).permutation(np.repeat(np.arange(pictures), repeats))
    try:
        tier = split_images(image, fractions=(1 - validation - test, validation, test), seed=seed)
    except DataError:
        return  # too few pictures for these shares
    assert set(tier) == set(TIERS)
    audit = audit_pictures(pd.DataFrame({"image": image, "tier": tier}))
    assert audit["shared_images"].sum() == audit["identical_images"].sum() == 0
    assert audit["shared_frames"].isna().all()


def test_allen_counts():
    image = np.repeat(np.arange(119), 50)
    tier = split_images(image, train_only=[118])
    counts = pd.Series(image).groupby(tier).nunique()
    assert counts.to_dict() == {"train": 83, "validation": 12, "test": 24}
    drawn = split_images(image, "presentations")
    assert pd.Series(drawn).value_counts().to_dict() == {"train": 4165, "validation": 595, "test": 1190}


def test_audit_counts_by_hand():
    table = pd.DataFrame(
        {
            "image": [0, 0, 1, 2],
            "tier": ["train", "test", "test", "train"],
            "first_frame": [0, 8, 30, 40],
            "last_frame": [9, 17, 39, 49],
        }
    )
    images = np.random.default_rng(0).random((3, 20, 24))
    images[2] = images[1] + 0.01  # a little brighter
    row = audit_pictures(table, images).iloc[0]
    assert (row["tiers"], row["shared_images"], row["of"], row["identical_images"]) == (
        "train / test",
        1,
        2,
        2,
    )
    assert row["shared_frames"] == pytest.approx(100 * 2 / 20)


def test_presentations_share_pictures_and_say_so(tmp_path):
    out = build_scenes(toy_scenes(), tmp_path / "data", split="presentations", **SMALL)
    card = check_folder(out)
    assert sum(r["shared_images"] for r in card["audit"]) > 0
    assert any("Tiers share pictures" in w for w in card["warnings"])
    assert "Tiers share pictures" in (out / "card.md").read_text()


def test_a_leaking_list_of_tiers_is_refused_unless_told(tmp_path):
    n = PICTURES * REPEATS + BLANKS
    tiers = np.where(np.arange(n) < 40, "train", "test")
    with pytest.raises(SplitLeak, match="train / test"):
        build_scenes(toy_scenes(), tmp_path / "data", split=tiers, **SMALL)
    assert not list(tmp_path.iterdir())
    build_scenes(toy_scenes(), tmp_path / "data", split=tiers, allow_shared_stimuli=True, **SMALL)
    assert len(ScenesDataset(tmp_path / "data", "train")) == 40


# --- behaviour


def test_behaviour_is_averaged_over_the_window(folder):
    toy = toy_scenes()
    raw = np.load(folder / "behavior.npy")
    assert check_folder(folder)["channels"] == {
        "behavior": ["pupil_area", "pupil_area_change", "running"],
        "pupil_center": ["x", "y"],
    }
    start = toy.table("natural_scenes")["start"].to_numpy()
    change = np.gradient(toy.pupil_area.astype("float32"), toy.timestamps)  # px² per second
    for i in (0, 8, 10, 11, 30):
        at = slice(start[i], start[i] + 15)
        want = [np.nanmean(x[at]) for x in (toy.pupil_area, change, toy.running)]
        np.testing.assert_allclose(raw[i], want, rtol=1e-3)
    assert np.isnan(raw[3, 2])  # the wheel was lost during the whole window
    train = ScenesDataset(folder, "train")
    filled = train.statistics["behavior"]["mean"][2] / train.statistics["behavior"]["std"][2]
    tier = pd.read_csv(folder / "samples.csv")["tier"][3]
    data = ScenesDataset(folder, tier)
    position = data.samples.index[data.samples["sample"] == 3][0]
    assert float(data[position]["behavior"][2]) == pytest.approx(filled, rel=1e-4)


def test_what_was_not_measured_is_absent(tmp_path):
    out = build_scenes(toy_scenes(eye=False), tmp_path / "data", **SMALL)
    item = ScenesDataset(out, "train")[0]
    assert set(item) == {"image", "behavior", "labels"} and item["behavior"].shape == (1,)
    none = build_scenes(toy_scenes(eye=False, running=None), tmp_path / "none", **SMALL)
    assert set(ScenesDataset(none, "train")[0]) == {"image", "labels"}
    assert load_scenes(none, "train").behavior is None is load_scenes(none, "train").pupil_center
    blind = build_scenes(toy_scenes(), tmp_path / "blind", pupil="ignore", **SMALL)
    assert check_folder(blind)["channels"] == {"behavior": ["running"]}
    with pytest.raises(MissingError, match="no eye tracking"):
        build_scenes(toy_scenes(eye=False), tmp_path / "x", pupil="required", **SMALL)


# --- the folder


def test_normalisation_is_v1ts(folder):
    raw = {
        n: np.load(folder / f"{n}.npy").astype(float)
        for n in ("images", "responses", "behavior", "pupil_center")
    }
    samples = pd.read_csv(folder / "samples.csv")
    train = (samples["tier"] == "train").to_numpy()
    pixels = raw["images"][np.unique(samples["image"][train])]
    std = raw["responses"][train].std(0)
    precision = np.where(std > 0.01 * std.mean(), 1 / std, 1 / (0.01 * std.mean()))
    filled = {
        n: np.where(np.isnan(raw[n]), np.nanmean(raw[n][train], 0), raw[n])
        for n in ("behavior", "pupil_center")
    }
    center = raw["pupil_center"][train]
    for tier in TIERS:
        data = ScenesDataset(folder, tier)
        for i, row in enumerate(data.samples.itertuples()):
            item = data[i]
            assert all(v.dtype.is_floating_point and v.dtype.itemsize == 4 for v in item.values())
            want = (raw["images"][row.image] - pixels.mean()) / pixels.std()
            np.testing.assert_allclose(item["image"][0], want, atol=1e-5)
            np.testing.assert_allclose(item["labels"], raw["responses"][row.sample] * precision, rtol=1e-4)
            np.testing.assert_allclose(
                item["behavior"],
                filled["behavior"][row.sample] / np.nanstd(raw["behavior"][train], 0),
                rtol=1e-4,
                atol=1e-5,
            )
            want = (filled["pupil_center"][row.sample] - np.nanmean(center, 0)) / np.nanstd(center, 0)
            np.testing.assert_allclose(item["pupil_center"], want, atol=1e-4)


def test_statistics_do_not_see_other_tiers(folder, tmp_path):
    toy, samples = toy_scenes(), pd.read_csv(folder / "samples.csv")
    held = samples[samples["tier"] != "train"]
    keep = np.zeros(toy.n_frames, bool)
    for row in samples[samples["tier"] == "train"].itertuples():
        keep[row.first_frame - 1 : row.last_frame + 2] = True
    fields = {
        k: np.array(getattr(toy, k), float) for k in ("traces", "running", "pupil_area", "pupil_center")
    }
    fields["traces"][:, ~keep] *= 100
    for name in ("running", "pupil_area", "pupil_center"):
        fields[name][~keep] += 1e4
    template = toy.templates["natural_scenes"].copy()
    template[np.unique(held["scene"])] = 255 - template[np.unique(held["scene"])]
    other = replace(toy, templates={"natural_scenes": template}, **fields)
    out = build_scenes(other, tmp_path / "data", **SMALL)
    assert not np.array_equal(np.load(out / "responses.npy"), np.load(folder / "responses.npy"))
    one, two = (read_json(f / "statistics.json") for f in (folder, out))
    assert one == two


def test_same_input_same_bytes(folder, tmp_path):
    again = build_scenes(toy_scenes(), tmp_path / "data", **SMALL)
    for path in folder.iterdir():
        if path.name != "card.json":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    one, two = (read_json(f / "card.json") for f in (folder, again))
    del one["provenance"], two["provenance"]
    assert one == two


def test_arrays_equal_items(folder):
    for tier in TIERS:
        data, arrays = ScenesDataset(folder, tier), load_scenes(folder, tier)
        for i in range(len(data)):
            item = data[i]
            np.testing.assert_array_equal(item["image"][0], arrays.images[arrays.image[i]])
            np.testing.assert_array_equal(item["labels"], arrays.labels[i])
            np.testing.assert_array_equal(item["behavior"], arrays.behavior[i])
            np.testing.assert_array_equal(item["pupil_center"], arrays.pupil_center[i])
        assert (arrays.scene == data.samples["scene"]).all() and (
            arrays.repeat == data.samples["repeat"]
        ).all()
    np.testing.assert_array_equal(data[-1]["labels"], data[len(data) - 1]["labels"])
    with pytest.raises(IndexError):
        data[len(data)]


def test_torch_loader_with_workers(folder):
    batch = next(iter(DataLoader(ScenesDataset(folder, "train"), batch_size=4, num_workers=1)))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "image": (4, 1, 6, 10), "behavior": (4, 3), "pupil_center": (4, 2), "labels": (4, 5)
    }  # fmt: skip


def test_constant_neuron(tmp_path):
    toy = toy_scenes()
    traces = toy.traces.copy()
    traces[2] = 7
    still = replace(toy, traces=traces)
    with pytest.raises(DataError, match="responses: 102 never changes"):
        build_scenes(still, tmp_path / "data", **SMALL)
    out = build_scenes(still, tmp_path / "data", constant_neurons="drop", **SMALL)
    assert pd.read_csv(out / "neurons.csv")["cell_id"].tolist() == [100, 101, 103, 104]
    assert np.load(out / "responses.npy").shape[1] == 4
    with pytest.raises(DataError, match="no neuron changes"):
        build_scenes(
            replace(toy, traces=np.ones_like(traces)), tmp_path / "x", constant_neurons="drop", **SMALL
        )


def test_gap_in_a_trace_is_named(tmp_path):
    toy = toy_scenes()
    traces = toy.traces.copy()
    start = toy.table("natural_scenes")["start"].to_numpy()
    traces[1, start[4] : start[4] + 15] = np.nan
    with pytest.raises(DataError, match=r"not finite.*at index \(4, 1\)"):
        build_scenes(replace(toy, traces=traces), tmp_path / "data", **SMALL)
    assert not list(tmp_path.iterdir())


def test_damage_is_noticed_and_kinds_are_told_apart(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy / "images.npy").read_bytes())
    data[-9] ^= 1
    (copy / "images.npy").write_bytes(data)
    with pytest.raises(DataError, match="images.npy"):
        ScenesDataset(copy, "train")
    from toys import toy_recording

    clips = build_dataset(toy_recording(), tmp_path / "clips", clip_frames=20, size=(6, 10), gap=5)
    with pytest.raises(DataError, match="wrong kind of folder"):
        ScenesDataset(clips, "train")


def test_an_existing_folder_is_kept_when_writing_fails(folder, tmp_path, monkeypatch):
    from cortexlit.data import scenes

    target = tmp_path / "data"
    shutil.copytree(folder, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes, "write_json", full)
    with pytest.raises(OSError, match="(?i)no space"):
        build_scenes(toy_scenes(seed=1), target, overwrite=True, **SMALL)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    monkeypatch.undo()
    with pytest.raises(DataError, match="exists already"):
        build_scenes(toy_scenes(), target, **SMALL)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "random"},
        {"fractions": (0.5, 0.5, 0)},
        {"pupil": "maybe"},
        {"resample": "cubic"},
        {"constant_neurons": "zero"},
        {"delay_s": -1},
        {"split": ["train"] * 3},
    ],
)
def test_unknown_options_say_what_is_allowed(tmp_path, options):
    with pytest.raises(DataError, match="expected: "):
        build_scenes(toy_scenes(), tmp_path / "data", **(SMALL | options))
    assert not list(tmp_path.iterdir())


def test_missing_stimulus_lists_what_there_is(tmp_path):
    with pytest.raises(MissingError, match=r"\['natural_scenes'\]"):
        build_scenes(toy_scenes(), tmp_path / "data", stimulus="static_gratings", **SMALL)


# --- the embedded session


def test_embedded_session_b(tiny_cache, tmp_path):
    from cortexlit.data.allen import open_session
    from cortexlit.simulate.session import load_truth

    session = open_session(900_000_002, cache_dir=tiny_cache, signal="dff")
    out = build_scenes(session, tmp_path / "data", size=(18, 32))
    samples = pd.read_csv(out / "samples.csv")
    assert samples["scene"].value_counts().to_dict() == {k: 4 for k in range(-1, 12)}
    assert (
        check_folder(out)["channels"] == {"behavior": ["running"]} and not (out / "pupil_center.npy").exists()
    )
    truth = load_truth(tiny_cache, 900_000_002)
    expected = window_means(truth["expected"], samples["first_frame"], samples["last_frame"])
    assert truth["expected_natural_scenes"].shape == (8, 13)
    for scene in range(-1, 12):
        np.testing.assert_allclose(
            truth["expected_natural_scenes"][:, scene], expected[samples["scene"] == scene].mean(0), rtol=1e-4
        )  # grey is the last column, so -1 finds it
    assert "expected_natural_scenes" not in load_truth(tiny_cache, 900_000_001)


# --- Sensorium 2022


def _without_gaps(toy: Recording) -> Recording:
    fields = {k: getattr(toy, k) for k in ("running", "pupil_area", "pupil_center")}
    return replace(toy, **{k: None if v is None else np.nan_to_num(v, nan=4.0) for k, v in fields.items()})


@pytest.mark.parametrize("eye", [True, False])
def test_sensorium_2022_returns_every_byte(tmp_path, eye):
    source = build_scenes(_without_gaps(toy_scenes(eye)), tmp_path / "source", **SMALL)
    back = import_sensorium2022(export_sensorium2022(source, tmp_path / "tree"), tmp_path / "back")
    assert {p.name for p in source.iterdir()} == {p.name for p in back.iterdir()}
    for path in source.iterdir():
        if path.suffix in (".npy", ".csv") or path.name == "statistics.json":
            assert path.read_bytes() == (back / path.name).read_bytes(), path.name
    one, two = check_folder(source), check_folder(back)
    for key in ("name", "source", "signal", "rate", "channels", "metadata", "split_hash", "counts"):
        assert one[key] == two[key]


def test_gaps_leave_as_the_train_mean(folder, tmp_path):
    back = import_sensorium2022(export_sensorium2022(folder, tmp_path / "tree"), tmp_path / "back")
    for name in ("behavior", "pupil_center"):
        one, two = np.load(folder / f"{name}.npy"), np.load(back / f"{name}.npy")
        mean = np.float32(read_json(folder / "statistics.json")[name]["mean"])
        np.testing.assert_array_equal(two, np.where(np.isnan(one), mean, one))
    assert np.isnan(np.load(folder / "behavior.npy")).any()


@pytest.mark.parametrize("eye", [True, False])
def test_published_reader_finds_everything(tmp_path, eye):
    "What V1T opens and computes, field by field; NaN exactly where nothing was measured."
    source = build_scenes(toy_scenes(eye), tmp_path / "source", **SMALL)
    tree = export_sensorium2022(source, tmp_path / "tree")
    tiers = np.load(tree / "meta/trials/tiers.npy")
    assert set(tiers) == set(TIERS) and tiers.dtype.kind == "U"
    for name in ("trial_idx", "frame_image_id"):
        ids = np.load(tree / f"meta/trials/{name}.npy")
        assert ids.shape == tiers.shape and ids.dtype.kind == "i"
    assert len(np.unique(np.load(tree / "meta/neurons/animal_ids.npy"))) == 1
    assert np.load(tree / "meta/neurons/unit_ids.npy").tolist() == [100, 101, 102, 103, 104]
    assert np.load(tree / "meta/neurons/cell_motor_coordinates.npy").shape == (5, 3)
    widths = {"images": (), "responses": (5,), "behavior": (3,), "pupil_center": (2,)}
    stats = {
        (field, key): np.load(tree / f"meta/statistics/{field}/all/{key}.npy")
        for field in widths
        for key in ("min", "max", "median", "mean", "std")
    }
    for (field, _), value in stats.items():
        assert value.shape == widths[field] and value.dtype == np.float32
    assert len(list((tree / "data/images").glob("*.npy"))) == len(tiers)
    for tier in TIERS:
        data = ScenesDataset(source, tier)
        for i, trial in enumerate(np.flatnonzero(tiers == tier)):
            x = {f: np.load(tree / f"data/{f}/{trial}.npy").astype(np.float32) for f in widths}
            image = (x["images"] - stats["images", "mean"]) / stats["images", "std"]
            assert image.dtype == np.float32 and image.shape == (1, 6, 10)
            np.testing.assert_allclose(image, data[i]["image"], atol=1e-5)
            np.testing.assert_allclose(
                x["responses"] / stats["responses", "std"], data[i]["labels"], rtol=1e-4
            )
            measured = np.isfinite(stats["behavior", "std"]).tolist()
            assert measured == ([True] * 3 if eye else [False, False, True])  # pupil, its change, running
            assert np.isfinite(stats["pupil_center", "std"]).all() == eye
            if eye:
                theirs = x["behavior"] / stats["behavior", "std"]
                np.testing.assert_allclose(theirs, data[i]["behavior"], rtol=1e-3, atol=1e-4)


def _foreign(root: Path, **changes) -> Path:
    "A folder as the competition wrote it: no card, behaviour zeroed out, withheld test responses."
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (9, 1, 6, 8)).astype(float)
    tiers = np.array(["train"] * 6 + ["validation"] * 2 + ["test"] * 4 + ["final_test"] * 2)
    shown = np.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 7, 7, 7, 8, 8])
    responses = draw.random((14, 4))
    responses[tiers == "final_test"] = 0
    arrays = {"images": pictures[shown], "responses": responses, "behavior": np.zeros((14, 3)), "pupil_center": np.zeros((14, 2))}  # fmt: skip
    arrays |= changes
    for name, rows in arrays.items():
        (root / "data" / name).mkdir(parents=True)
        for i, row in enumerate(rows):
            np.save(root / "data" / name / f"{i}.npy", row)
    for path, array in {
        "trials/tiers": tiers, "trials/frame_image_id": 100 - shown,
        "neurons/unit_ids": np.arange(4) + 7, "neurons/cell_motor_coordinates": draw.random((4, 3)),
    }.items():  # fmt: skip
        (root / "meta" / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / "meta" / f"{path}.npy", array)
    return root


def test_foreign_folder(tmp_path):
    out = import_sensorium2022(_foreign(tmp_path / "tree"), tmp_path / "data")
    card, samples = check_folder(out), pd.read_csv(out / "samples.csv")
    assert samples["tier"].value_counts().to_dict() == {"train": 6, "test": 4, "validation": 2}
    assert card["channels"] == {} and not (out / "behavior.npy").exists()
    assert sum("left out" in w for w in card["warnings"]) == 3  # final_test, behaviour, pupil centre
    assert len(np.load(out / "images.npy")) == 8
    assert samples["scene"].tolist() == [100, 99, 98, 97, 96, 100, 95, 94, 93, 93, 93, 93]
    assert samples["repeat"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3]
    images = np.load(out / "images.npy")
    for row in samples.itertuples():
        np.testing.assert_array_equal(
            images[row.image], np.load(tmp_path / f"tree/data/images/{row.sample}.npy")[0]
        )
    assert ScenesDataset(out, "train").neurons["cell_id"].tolist() == [7, 8, 9, 10]


def test_foreign_folder_with_faults(tmp_path):
    draw = np.random.default_rng(1)
    tree = _foreign(tmp_path / "shared", images=np.repeat(draw.random((2, 1, 6, 8)), 7, axis=0))
    with pytest.raises(SplitLeak, match="train / validation"):
        import_sensorium2022(tree, tmp_path / "out")
    with pytest.raises(DataError, match="one grey channel"):
        import_sensorium2022(
            _foreign(tmp_path / "colour", images=draw.random((14, 2, 6, 8))), tmp_path / "out"
        )
    with pytest.raises(DataError, match="2 values per trial"):
        import_sensorium2022(_foreign(tmp_path / "two", behavior=np.ones((14, 2))), tmp_path / "out")
    tree = _foreign(tmp_path / "faults")
    np.save(tree / "data/responses/5.npy", np.ones(3))
    with pytest.raises(DataError, match="responses/5.npy"):
        import_sensorium2022(tree, tmp_path / "out")
    (tree / "data/responses/5.npy").unlink()
    with pytest.raises(MissingError, match="responses/5.npy"):
        import_sensorium2022(tree, tmp_path / "out")
    (tree / "data/images/13.npy").unlink()
    with pytest.raises(MissingError, match="images/13.npy"):
        import_sensorium2022(tree, tmp_path / "out")
    with pytest.raises(MissingError, match="Sensorium 2022 layout"):
        import_sensorium2022(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_channels_without_a_place_in_the_layout(tmp_path):
    draw = np.random.default_rng(0)
    source = import_arrays(
        draw.random((9, 4, 5)), draw.random((9, 2)), tmp_path / "data", behavior=draw.random((9, 1))
    )
    with pytest.raises(DataError, match="no place for channel 0"):
        export_sensorium2022(source, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_other_orders_of_channels_are_brought_into_the_layouts(tmp_path):
    draw = np.random.default_rng(0)
    behavior = draw.random((9, 2)).astype("float32")
    images, responses = draw.random((9, 4, 5)), draw.random((9, 2))
    names = ["running", "pupil_area"]
    source = import_arrays(images, responses, tmp_path / "data", behavior=behavior, behavior_names=names)
    tree = export_sensorium2022(source, tmp_path / "tree")
    for i in range(9):
        want = [behavior[i, 1], np.nan, behavior[i, 0]]
        np.testing.assert_array_equal(np.load(tree / f"data/behavior/{i}.npy"), np.float32(want))
    back = import_sensorium2022(tree, tmp_path / "back")
    assert check_folder(back)["channels"] == {"behavior": ["pupil_area", "running"]}
    np.testing.assert_array_equal(np.load(back / "behavior.npy"), behavior[:, ::-1])


# --- anybody's arrays


@st.composite
def experiments(draw) -> dict:
    "Arguments of `import_arrays` that are right, of many shapes and number types."
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pictures, repeats = draw(st.integers(4, 12)), draw(st.integers(1, 4))
    n, cells = pictures * repeats, draw(st.integers(1, 5))
    shape = (pictures, draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    kind = draw(st.sampled_from(["uint8", "float32", "float64"]))
    images = (
        random.integers(0, 256, shape).astype(kind)
        if kind == "uint8"
        else random.normal(0, 5, shape).astype(kind)
    )
    images[:, 0, 0] = np.arange(pictures)  # no two alike
    responses = random.normal(3, 1, (n, cells))
    if draw(st.booleans()):
        responses = (responses * 100).astype(draw(st.sampled_from(["int16", "int64", "float32"])))
    given = {"images": images[:, None] if draw(st.booleans()) else images, "responses": responses}
    if repeats > 1 or draw(st.booleans()):
        given["image_id"] = random.permutation(np.repeat(np.arange(pictures), repeats))
    if draw(st.booleans()):
        given["behavior"] = random.normal(0, 1, (n, draw(st.integers(1, 3))))
    if draw(st.booleans()):
        given["pupil_center"] = random.normal(0, 1, (n, 2))
    if draw(st.booleans()):
        given["coordinates"] = random.normal(0, 1, (cells, draw(st.sampled_from([2, 3]))))
    return given


HEALTH = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=40, **HEALTH)
@given(given=experiments(), split=st.sampled_from(["images", "presentations"]), seed=st.integers(0, 3))
def test_arrays_come_back_as_they_went_in(tmp_path_factory, given, split, seed):
    out = tmp_path_factory.mktemp("arrays") / "data"
    try:
        import_arrays(out=out, split=split, seed=seed, **given)
    except DataError as error:  # a few presentations of a few numbers can be constant by chance
        assert "never changes" in str(error) and not out.exists()
        return
    samples = pd.read_csv(out / "samples.csv")
    images = given["images"].reshape(len(given["images"]), *given["images"].shape[-2:])
    shown = given.get("image_id", np.arange(len(given["responses"])))
    np.testing.assert_array_equal(
        np.load(out / "images.npy")[samples["image"]], images[shown].astype("float32")
    )
    np.testing.assert_array_equal(np.load(out / "responses.npy"), given["responses"].astype("float32"))
    for name in ("behavior", "pupil_center"):
        assert (out / f"{name}.npy").exists() == (name in given)
    if split == "images":
        assert samples.groupby("image")["tier"].nunique().max() == 1
    assert not samples.duplicated(["image", "repeat"]).any()


def _broken(given: dict, how: str) -> dict:
    "The same arguments with one fault."
    n, cells = given["responses"].shape
    hole = given["responses"].astype(float)
    hole[-1, 0] = np.nan
    blot = given["images"].astype(float)
    blot[0] = np.inf
    faults = {
        "nan": {"responses": hole},
        "infinite pixel": {"images": blot},
        "too few": {"responses": given["responses"][:-1], "image_id": given.get("image_id")},
        "flat": {"responses": given["responses"][:, 0]},
        "trials x repeats x cells": {"responses": given["responses"][None]},
        "text": {"responses": given["responses"].astype(str)},
        "complex": {"images": given["images"].astype(complex)},
        "objects": {"responses": given["responses"].astype(object)},
        "empty": {"responses": given["responses"][:0]},
        "no cell": {"responses": given["responses"][:, :0]},
        "colour": {"images": np.ones((len(given["images"]), 4, 4, 3))},
        "ragged": {"responses": [[1.0, 2.0], [3.0]]},
        "ids off": {"image_id": np.full(n, len(given["images"]))},
        "ids negative": {"image_id": np.full(n, -1)},
        "ids not whole": {"image_id": np.zeros(n)},
        "behaviour short": {"behavior": np.ones((n - 1, 2))},
        "dummies": {"behavior": np.zeros((n, 3))},
        "pupil wide": {"pupil_center": np.ones((n, 3))},
        "no gaze": {"pupil_center": np.full((n, 2), np.nan)},
        "coordinates": {"coordinates": np.zeros((cells + 1, 2))},
        "split": {"split": ["train"] * (n + 1)},
        "no train": {"split": ["test"] * n},
        "ids twice": {"cell_ids": [1] * (cells + 1)},
        "repeats": {"repeats": np.zeros(n, int), "image_id": np.zeros(n, int)},
        "absent": {"images": "/nowhere/images.npy"},
    }
    return given | faults[how]


FAULTS = list(
    ["nan", "infinite pixel", "too few", "flat", "trials x repeats x cells", "text", "complex", "objects", "empty"]
    + ["no cell", "colour", "ragged", "ids off", "ids negative", "ids not whole", "behaviour short", "dummies"]
    + ["pupil wide", "no gaze", "coordinates", "split", "no train", "ids twice", "repeats", "absent"]
)  # fmt: skip


@settings(max_examples=100, **HEALTH)
@given(given=experiments(), how=st.sampled_from(FAULTS))
def test_every_fault_is_refused_in_words(tmp_path_factory, given, how):
    folder = tmp_path_factory.mktemp("faults")
    with pytest.raises((DataError, MissingError)) as caught:
        import_arrays(out=folder / "data", **_broken(given, how))
    assert not list(folder.iterdir()), "nothing may be left behind"
    assert len(str(caught.value)) > 20


def test_files_that_are_no_arrays(tmp_path):
    images = np.random.default_rng(0).random((6, 4, 4))
    for name, content in {"text.npy": b"1, 2, 3", "empty.npy": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            import_arrays(images, tmp_path / name, tmp_path / "out")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="objects.npy"):
        import_arrays(images, tmp_path / "objects.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_identical_pictures_are_one(tmp_path):
    draw = np.random.default_rng(0)
    distinct = draw.random((8, 4, 5))
    images = distinct[np.tile(np.arange(8), 3)]  # one row per presentation, as many laboratories store it
    out = import_arrays(images, draw.random((24, 3)), tmp_path / "data")
    samples = pd.read_csv(out / "samples.csv")
    assert len(np.load(out / "images.npy")) == 8
    assert samples["repeat"].tolist() == np.repeat([0, 1, 2], 8).tolist()
    assert samples.groupby("image")["tier"].nunique().max() == 1
