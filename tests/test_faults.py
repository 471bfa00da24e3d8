"""Faults of data, by kind: what one reader refuses, its twins refuse, by name; and the right value beside it.

Each kind has a control: the same input without its fault gives the right numbers. `tests/test_faults_runs.py` holds
the kinds of runs.
"""

import contextlib
import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import malformed
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import toy_recording

from cortexlit.core import CortexlitError, DataError, MissingError, SplitLeak, read_json, seal, write_json
from cortexlit.data import allen, cached, opendata, things, volumes
from cortexlit.data import folder as folder_checks
from cortexlit.data.clips import NORMALISATIONS, MouseDataset, build_dataset, load_tier
from cortexlit.data.exchange import export_tree, import_arrays, import_sensorium2022, import_tree
from cortexlit.data.folder import check_folder
from cortexlit.data.folds import pooled_tier
from cortexlit.data.recordings import Recording
from cortexlit.data.scenes import ScenesDataset, build_scenes, load_scenes
from cortexlit.simulate import subject

pytestmark = pytest.mark.usefixtures("no_curves")  # some readers go on with a run

# --- inputs


def recording(frames=40, repeats=4, neurons=4, change=None) -> Recording:
    "A movie whose frames each fall on one two-photon frame, from frame 10 on."
    draw, n = np.random.default_rng(0), frames * repeats + 40
    start = 10 + np.arange(frames * repeats)
    table = pd.DataFrame(
        {"frame": np.tile(np.arange(frames), repeats), "repeat": np.repeat(np.arange(repeats), frames)}
    ).assign(start=start, end=start)
    fields = {
        "name": "7", "source": "test", "traces": draw.gamma(1, 1, (neurons, n)), "timestamps": np.arange(n) / 30.0,
        "neurons": pd.DataFrame({"cell_id": 70 + np.arange(neurons), "x_um": 0.0, "y_um": 0.0}),
        "stimulus_tables": {"mov": table}, "templates": {"mov": draw.integers(0, 255, (frames, 9, 12)).astype("u1")},
        "running": draw.normal(size=n), "pupil_area": draw.normal(size=n),
    }  # fmt: skip
    if change:
        change(fields)
    return Recording(**fields)


def clips(path: Path, change=None, **options) -> Path:
    return build_dataset(
        recording(change=change), path, **{"clip_frames": 10, "size": (6, 8), "gap": 2} | options
    )


def pictures_recording(change=None) -> Recording:
    "Twelve pictures, five times each, every ten frames."
    draw, n = np.random.default_rng(1), 660
    shown = draw.permutation(np.repeat(np.arange(12), 5))
    start = 10 + 10 * np.arange(60)
    fields = {
        "name": "8", "source": "test", "traces": draw.gamma(1, 1, (5, n)), "timestamps": np.arange(n) / 30.0,
        "neurons": pd.DataFrame({"cell_id": np.arange(5), "x_um": 0.0, "y_um": 0.0}),
        "stimulus_tables": {"natural_scenes": pd.DataFrame({"frame": shown, "start": start, "end": start + 6})},
        "templates": {"natural_scenes": draw.integers(0, 255, (12, 9, 12)).astype("u1")},
        "running": draw.normal(size=n), "pupil_area": draw.normal(size=n),
    }  # fmt: skip
    if change:
        change(fields)
    return Recording(**fields)


def scenes(path: Path, change=None, **options) -> Path:
    return build_scenes(
        pictures_recording(change), path, **{"size": (6, 8), "via": None, "window_s": 0.2} | options
    )


TIERS = {"sensorium": ["train"] * 6 + ["oracle"] * 2 + ["live_test_main"] + ["final_test_main"] * 2 + ["none"],
         "study1": ["train"] * 6 + ["validation"] * 2 + ["test"] * 3,
         "2022": ["train"] * 6 + ["validation"] * 2 + ["test"] * 3 + ["final_test"] * 2}  # fmt: skip
FIELDS = ("videos", "responses", "behavior", "pupil_center")


def tree(root: Path, layout: str, change=None, neurons=6, described=6) -> Path:
    "A small folder in one of the three published layouts; `change(trial, tier, arrays)` may damage a trial."
    draw = np.random.default_rng(2)
    meta = root / "meta"
    for i, tier in enumerate(TIERS[layout]):
        if layout == "2022":
            a = {"images": draw.uniform(0, 255, (1, 6, 8)), "responses": draw.gamma(1, 1, neurons),
                 "behavior": draw.uniform(0.1, 1, 3), "pupil_center": draw.uniform(0.1, 1, 2)}  # fmt: skip
        else:
            a = {"videos": draw.uniform(0, 255, (6, 8, 20)), "responses": draw.gamma(1, 1, (neurons, 20)),
                 "behavior": draw.uniform(0.1, 1, (2, 20)), "pupil_center": draw.uniform(0.1, 1, (2, 20))}  # fmt: skip
        if layout == "study1":
            a["videos"] = np.moveaxis(a["videos"], -1, 0)[None]
        a = change(i, tier, a) if change else a
        for name, array in a.items():
            folder = root / "data" / name
            if layout == "study1":
                folder = root / tier / {"responses": "labels"}.get(name, name)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", array)
    if layout != "study1":
        (meta / "trials").mkdir(parents=True)
        (meta / "neurons").mkdir()
        np.save(meta / "trials/tiers.npy", np.array(TIERS[layout]))
        np.save(meta / "neurons/unit_ids.npy", 900 + np.arange(described))
        np.save(meta / "neurons/cell_motor_coordinates.npy", draw.uniform(0, 500, (described, 3)))
    return root


READERS = {"sensorium": import_tree, "study1": import_tree, "2022": import_sensorium2022}
layouts = pytest.mark.parametrize("layout", list(READERS))


def trial_file(root: Path, layout: str, field: str, trial: int) -> Path:
    if layout == "study1":
        return root / "train" / {"responses": "labels"}.get(field, field) / f"{trial}.npy"
    return root / "data" / {"videos": "images"}.get(field, field) / f"{trial}.npy" if layout == "2022" else root / "data" / field / f"{trial}.npy"  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    "The tiny synthetic fMRI study; read it, never write."
    return subject.write_things(tmp_path_factory.mktemp("fmri") / "s", "tiny")


@pytest.fixture
def part(study, tmp_path):
    "Copies of one layout of the study."

    def copy(layout: str, name: str = "copy") -> Path:
        root = tmp_path / name
        shutil.copytree(study / layout, root / layout)
        shutil.copy(study / "things.json", root)
        return root

    return copy


def one(root: Path, pattern: str) -> Path:
    return next(root.rglob(pattern))


SESSION = 900000001


@pytest.fixture
def session(tiny_cache, tmp_path):
    "Copies of the tiny embedded session whose NWB file may be changed."
    ident = sorted(allen.synthetic_sessions(tiny_cache))[0]

    def copy(change, name: str = "session"):
        root = tmp_path / name
        root.mkdir()
        for item in tiny_cache.iterdir():
            if item.is_file():
                shutil.copy(item, root)
        for folder in ("ophys_experiment_data", "ophys_experiment_events"):
            (root / folder).mkdir()
            for item in (tiny_cache / folder).glob(f"{ident}*"):
                if not item.name.endswith(".sha256.json"):
                    shutil.copy(item, root / folder)
        path = root / "ophys_experiment_data" / f"{ident}.nwb"
        with h5py.File(path, "r+") as file:
            change(file)
        return lambda **options: allen.open_session(ident, root, **options)

    return copy


PIPELINE = "processing/brain_observatory_pipeline/"
EYE = PIPELINE + "PupilTracking/pupil_size"


def rewrite(file: h5py.File, name: str, values) -> None:
    del file[name]
    file[name] = values


# --- kind: values that are not finite, or become so as float32


BAD = {"NaN": np.nan, "inf": np.inf, "beyond float32": 1e300}
bad_values = pytest.mark.parametrize("value", BAD.values(), ids=BAD)


@bad_values
def test_a_trace_inside_a_clip(tmp_path, value):
    def change(a):
        a["traces"][1, 30:33] = value

    assert load_tier(clips(tmp_path / "control"), "train").labels.shape == (8, 4, 10)
    with pytest.raises(DataError, match="not finite"):
        clips(tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


def test_a_gap_outside_the_clips_is_no_fault(tmp_path):
    want = load_tier(clips(tmp_path / "control"), "train").labels

    def change(a):
        a["traces"][1, :8] = np.nan

    np.testing.assert_array_equal(load_tier(clips(tmp_path / "out", change), "train").labels, want)


@pytest.mark.parametrize("field", ["running", "pupil_area"])
def test_infinite_behaviour_is_no_gap(field):
    def infinite(a):
        a[field][5] = np.inf

    def gap(a):
        a[field][5] = np.nan

    with pytest.raises(DataError, match=f"{field}: 1 of .* at index \\(5,\\)"):
        recording(change=infinite)
    assert np.isnan(getattr(recording(change=gap), field)[5])


@bad_values
def test_a_response_to_a_picture(tmp_path, value):
    def change(a):
        a["traces"][2, 50:56] = value

    assert len(load_scenes(scenes(tmp_path / "control"), "train").labels) > 20
    with pytest.raises(DataError, match="not finite"):
        scenes(tmp_path / "out", change)


@bad_values
@pytest.mark.parametrize("name", ["images", "responses"])
def test_arrays_of_a_laboratory(tmp_path, value, name):
    draw = np.random.default_rng(0)
    a = {"images": draw.random((9, 4, 5)), "responses": draw.random((9, 2))}
    a[name].flat[3] = value
    with pytest.raises(DataError, match=f"{name}.*not finite"):
        import_arrays(**a, out=tmp_path / "out")


@bad_values
@layouts
@pytest.mark.parametrize("field", ["videos", "responses"])
def test_a_trial_of_a_tree(tmp_path, value, layout, field):
    def change(i, tier, a):
        if i == 3:
            name = "images" if layout == "2022" and field == "videos" else field
            a[name].flat[3] = value
        return a

    with pytest.raises(DataError, match=r"(?s)not finite.*[/\\]3\.npy"):
        READERS[layout](tree(tmp_path / "tree", layout, change), tmp_path / "out")


@bad_values
@pytest.mark.parametrize("layout", ["figshare", "volumes"])
@pytest.mark.parametrize("call", ["read", "build"])
def test_responses_of_voxels(part, tmp_path, value, layout, call):
    root = part(layout)
    if layout == "figshare":
        path = one(root, "sub-01_ResponseData.h5")
        with h5py.File(path, "r+") as file:
            file["ResponseData/block0_values"][5, 7] = value
    else:
        path = one(root, "sub-01_*run-01_betas.nii.gz")
        values, affine = volumes.read_nifti(path)
        values = values.astype(float)
        mask = volumes.read_mask(one(root, "sub-01*brainmask*"), None, root)[0]
        values[tuple(np.argwhere(mask)[5])] = value  # in all volumes of the run
        volumes.write_nifti(path, values, affine)
    opened = things.open_things(root, "01", layout)
    with pytest.raises(DataError, match=rf"(?s)not finite.*{path.name}"):
        opened.read() if call == "read" else cached.build_things(opened, tmp_path / "out")


def test_a_rating_that_is_infinite(study, tmp_path):
    table = pd.read_csv(study / "ratings/animacy.csv")
    table.loc[4, "lives_mean"] = np.inf
    table.to_csv(tmp_path / "animacy.csv", index=False)
    with pytest.raises(DataError, match=r"(?s)lives.*row 4.*animacy\.csv"):
        things.load_properties(tmp_path, ["lives"])


def test_traces_of_an_nwb_file(session):
    def infinite(file):
        name = PIPELINE + "Fluorescence/imaging_plane_1/data"
        file[name][0, 5] = np.inf

    with pytest.raises(DataError, match=r"(?s)traces.*not finite.*\.nwb"):
        session(infinite)(signal="raw")


# --- kind: unequal lengths, other axes


@layouts
def test_a_table_of_other_neurons(tmp_path, layout):
    if layout == "study1":
        root = tree(tmp_path / "t", layout)
        pd.DataFrame({"cell_id": [1, 2], "x_um": 0.0, "y_um": 0.0}).to_csv(root / "neurons.csv", index=False)
        wrong = [root]
    else:
        wrong = [tree(tmp_path / f"t{n}", layout, described=n) for n in (4, 9)]
        control = READERS[layout](tree(tmp_path / "t", layout), tmp_path / "control")
        assert pd.read_csv(control / "neurons.csv")["cell_id"].tolist() == list(range(900, 906))
    for root in wrong:
        with pytest.raises(DataError, match="neurons"):
            READERS[layout](root, tmp_path / "out")


CUTS = {
    "responses, one frame": ("responses", lambda x: x[:, :1]), "responses, one neuron": ("responses", lambda x: x[:1]),
    "behaviour, one channel": ("behavior", lambda x: x[:1]), "pupil, one axis": ("pupil_center", lambda x: x[:1]),
    "half the frames": ("responses", lambda x: x[:, :10]), "no axis": ("behavior", lambda x: x[0]),
    "longer than its video": ("responses", lambda x: np.repeat(x, 2, axis=1)),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["sensorium", "study1"])
@pytest.mark.parametrize("name", CUTS)
def test_a_damaged_trial_is_never_repeated_to_fit(tmp_path, layout, name):
    field, cut = CUTS[name]

    def change(i, tier, a):
        return a | {field: cut(a[field])} if i == 3 else a

    with pytest.raises(DataError, match=r"(?s)has shape.*[/\\]3\.npy"):
        import_tree(tree(tmp_path / "t", layout, change), tmp_path / "out")


def test_time_first_and_colour_are_other_axes(tmp_path):
    def first(i, tier, a):
        return a | {"videos": np.moveaxis(a["videos"], -1, 0)}

    def colour(i, tier, a):
        return a | {"videos": np.stack([a["videos"]] * 2)}

    for k, change in enumerate((first, colour)):
        with pytest.raises(DataError, match="has shape"):
            import_tree(tree(tmp_path / f"t{k}", "sensorium", change), tmp_path / "out")


@pytest.mark.parametrize("layout", ["sensorium", "study1"])
def test_padding_at_the_end_is_cut(tmp_path, layout):
    def padded(i, tier, a):
        if i != 1:
            return a
        full = np.arange(20) < 14
        if layout == "study1":
            a["videos"][:, ~full] = np.nan
        else:
            a["videos"][..., ~full] = np.nan
        return a | {k: np.where(full, v, np.nan) for k, v in a.items() if k != "videos"}

    out = import_tree(tree(tmp_path / "t", layout, padded), tmp_path / "out")
    assert load_tier(out, "train").labels.shape == (6, 6, 14)


@layouts
def test_arrays_of_no_trial(tmp_path, layout):
    root = tree(tmp_path / "t", layout)
    extra = trial_file(root, layout, "responses", 5).with_name("77.npy")
    shutil.copy(trial_file(root, layout, "responses", 5), extra)
    with pytest.raises(DataError, match=r"77\.npy"):
        READERS[layout](root, tmp_path / "out")


def test_tiers_shorter_than_the_trials(tmp_path):
    for layout in ("sensorium", "2022"):
        root = tree(tmp_path / layout, layout)
        np.save(root / "meta/trials/tiers.npy", np.array(TIERS[layout][:-2]))
        with pytest.raises(DataError, match="array of no trial"):
            READERS[layout](root, tmp_path / "out")


def test_a_field_in_one_tier_only(tmp_path):
    root = tree(tmp_path / "t", "study1")
    shutil.rmtree(root / "test/behavior")
    with pytest.raises(MissingError, match="test.behavior"):
        import_tree(root, tmp_path / "out")


OWN = np.arange(0.05, 200, 1 / 30.0)


def eye(file, times, values):
    clock = file[PIPELINE + "Fluorescence/imaging_plane_1/timestamps"][:]
    times = times + clock[0]
    keep = times < clock[-1]
    for name in ("data", "timestamps"):
        del file[EYE][name]
    n = len(times)
    file[EYE]["timestamps"], file[EYE]["data"] = times[keep[:n]], values[: len(values) - int((~keep).sum())]


EYES = {
    "control": (lambda t, v: (t, v), None),
    "fewer values": (lambda t, v: (t, v[:-2]), "unequal numbers of samples"),
    "fewer times": (lambda t, v: (t[:-2], v), "unequal numbers of samples"),
    "clock jumps back": (lambda t, v: (np.where(t > 60, t - 20, t), v), "do not increase"),
    "newest first": (lambda t, v: (t[::-1], v[::-1]), "do not increase"),
    "infinite": (lambda t, v: (t, np.where(np.arange(len(v)) == 9, np.inf, v)), "not finite"),
}


@pytest.mark.parametrize("name", EYES)
def test_eye_tracking_that_does_not_fit_is_left_out_and_named(session, name):
    change, why = EYES[name]

    def apply(file):
        clock = file[PIPELINE + "Fluorescence/imaging_plane_1/timestamps"][:]
        own = np.arange(clock[0], clock[-1], 1 / 30.0)
        times, values = change(own, (100 + 10 * np.sin(own)).astype("f4"))
        for k in ("data", "timestamps"):
            del file[EYE][k]
        file[EYE]["timestamps"], file[EYE]["data"] = times, values

    opened = session(apply)()
    if why is None:
        truth = 100 + 10 * np.sin(opened.timestamps)
        assert np.nanmax(np.abs(opened.pupil_area - truth)) < 0.05
    else:
        assert opened.pupil_area is None and why in opened.metadata["pupil_source"]


def test_running_off_the_clock_is_left_out_and_named(session):
    def jump(file):
        times = file[PIPELINE + "BehavioralTimeSeries/running_speed/timestamps"]
        values = times[:]
        values[1000:2000] -= 5.0
        times[:] = values

    opened = session(jump)()
    assert (
        opened.running is None
        and "leave the two-photon clock at frame 100" in opened.metadata["running_source"]
    )


# --- kind: ids that are missing or occur twice


def test_cells_without_an_id_are_left_out_and_named(session):
    def unmatched(file):
        name = PIPELINE + "ImageSegmentation/cell_specimen_ids"
        ids = file[name][:].astype(float)
        ids[2:4] = np.nan
        rewrite(file, name, ids)

    with pytest.warns(UserWarning, match="2 cells that were not matched"):
        opened = session(unmatched)()
    control = session(lambda file: None, "control")()
    keep = np.setdiff1d(np.arange(control.n_neurons), [2, 3])
    assert opened.neurons["cell_id"].tolist() == control.neurons["cell_id"].iloc[keep].tolist()
    np.testing.assert_array_equal(opened.traces, control.traces[keep])


def test_neurons_twice(tmp_path):
    draw = np.random.default_rng(0)
    with pytest.raises(DataError, match="appears twice"):
        recording(change=lambda a: a["neurons"].assign(cell_id=7).pipe(lambda t: a.update(neurons=t)))
    with pytest.raises(DataError, match="id occurs twice"):
        import_arrays(draw.random((9, 4, 5)), draw.random((9, 2)), tmp_path / "out", cell_ids=[3, 3])
    root = tree(tmp_path / "t", "sensorium")
    np.save(root / "meta/neurons/unit_ids.npy", np.array([1, 1, 2, 3, 4, 5]))
    with pytest.raises(DataError, match=r"(?s)1 appears twice.*unit_ids"):
        import_tree(root, tmp_path / "out")


# --- kind: clocks and tables against time


@pytest.mark.parametrize("step", [1000 / 30, 1e-7])
def test_a_clock_in_other_units(step):
    with pytest.raises(DataError, match="seconds"):
        recording(change=lambda a: a.update(timestamps=np.arange(200) * step))


STARTS = {
    "backwards": (lambda s: s[::-1].copy(), "backwards"),
    "all zero": (lambda s: s * 0, "stands still"),
    "half a repeat stands": (
        lambda s: np.where(s % 40 < 20, s, s - s % 40 + 20),
        "stands still|same two-photon",
    ),
    "repeats at one time": (lambda s: 10 + (s - 10) % 40, "same two-photon frames"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_table_that_no_movie_can_follow(tmp_path, name):
    move, why = STARTS[name]

    def change(a):
        table = a["stimulus_tables"]["mov"]
        start = move(table["start"].to_numpy())
        a["stimulus_tables"]["mov"] = table.assign(start=start, end=start)

    with pytest.raises(DataError, match=why):
        clips(tmp_path / "out", change, constant_neurons="drop")


def test_rows_in_any_order_and_equal_neighbours_are_right(tmp_path):
    def shuffled(a):
        a["stimulus_tables"]["mov"] = a["stimulus_tables"]["mov"].sample(frac=1, random_state=0)

    def equal(a):
        start = a["stimulus_tables"]["mov"]["start"].to_numpy().copy()
        start[46] = start[45]
        a["stimulus_tables"]["mov"] = a["stimulus_tables"]["mov"].assign(start=start, end=start)

    want = load_tier(clips(tmp_path / "control"), "train").labels
    np.testing.assert_array_equal(load_tier(clips(tmp_path / "a", shuffled), "train").labels, want)
    clips(tmp_path / "b", equal)


def test_slow_imaging_of_a_fast_movie_is_right(tmp_path):
    def slow(a):
        start = 10 + (a["stimulus_tables"]["mov"]["start"].to_numpy() - 10) // 3
        a["stimulus_tables"]["mov"] = a["stimulus_tables"]["mov"].assign(start=start, end=start)
        a["timestamps"] = a["timestamps"] * 3

    assert not check_folder(clips(tmp_path / "out", slow))["warnings"][1:]


def test_two_movies_at_one_time(tmp_path):
    def change(a):
        a["stimulus_tables"]["other"], a["templates"]["other"] = (
            a["stimulus_tables"]["mov"],
            a["templates"]["mov"],
        )

    with pytest.raises(DataError, match="mov, repeat 0 and other, repeat 0|same two-photon frames"):
        clips(tmp_path / "out", change)


def test_two_pictures_at_one_time(tmp_path):
    def change(a):
        table = a["stimulus_tables"]["natural_scenes"]
        start = table["start"].to_numpy().copy()
        start[4] = start[3]
        a["stimulus_tables"]["natural_scenes"] = table.assign(start=start, end=start + 6)

    with pytest.raises(DataError, match="1 pictures start in the same"):
        scenes(tmp_path / "out", change)


def test_a_template_shorter_than_the_table(tmp_path):
    for frames in (31, 35):
        with pytest.raises(DataError, match=f"template of mov has {frames} frames"):
            clips(tmp_path / "out", lambda a, n=frames: a["templates"].update(mov=a["templates"]["mov"][:n]))
    with pytest.raises(DataError, match="names pictures"):
        scenes(
            tmp_path / "out",
            lambda a: a["templates"].update(natural_scenes=a["templates"]["natural_scenes"][:9]),
        )


def test_a_short_template_in_an_nwb_file_is_left_out_and_named(session):
    name = "stimulus/templates/natural_movie_one_image_stack/data"

    def short(file):
        if name in file:
            rewrite(file, name, file[name][:20])

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opened = session(short)()
    assert "natural_movie_one" not in opened.movies()
    assert any("natural_movie_one" in str(w.message) for w in told)
    assert any(
        "natural_movie_one" in w for w in opened.metadata["warnings"]
    )  # and so in the card of a dataset


# --- kind: a jump in time within what is read as one stretch


def pause(a):
    start = a["stimulus_tables"]["mov"]["start"].to_numpy().copy()
    start[25:] += 20
    a["stimulus_tables"]["mov"] = a["stimulus_tables"]["mov"].assign(start=start, end=start)


def dropped(a):
    a["timestamps"] = np.where(np.arange(len(a["timestamps"])) >= 35, a["timestamps"] + 5.0, a["timestamps"])


@pytest.mark.parametrize("change", [pause, dropped])
def test_clips_with_a_gap_are_left_out_and_named(tmp_path, change):
    out = clips(tmp_path / "out", change)
    samples = pd.read_csv(out / "samples.csv")
    lost = samples[(samples["start"] == 20) & (samples["repeat"] == 0)]
    assert len(samples) == 15 and lost.empty
    notes = check_folder(out)["warnings"]
    assert any("gap in time" in n and "mov from frame 20, repeat 0" in n for n in notes)
    control = pd.read_csv(clips(tmp_path / "control") / "samples.csv")
    assert len(control) == 16


def test_pictures_with_a_gap_are_left_out_and_named(tmp_path):
    def gap(a):
        a["timestamps"] = np.where(np.arange(660) >= 53, a["timestamps"] + 5.0, a["timestamps"])

    out, control = scenes(tmp_path / "out", gap), scenes(tmp_path / "control")
    assert len(pd.read_csv(out / "samples.csv")) == len(pd.read_csv(control / "samples.csv")) - 1 == 59
    assert any("1 of 60 presentations" in n for n in check_folder(out)["warnings"])


def test_a_tier_that_gaps_would_empty_is_refused(tmp_path):
    split = pd.DataFrame(
        [("mov", 0, 1, "train"), ("mov", 10, 1, "train"), ("mov", 20, 0, "test")],
        columns=["movie", "start", "repeat", "tier"],
    )
    with pytest.raises(DataError, match="every sample of tier 'test'"):
        clips(tmp_path / "out", dropped, split=split, allow_shared_stimuli=True)


# --- kind: behaviour in another channel


def test_channels_are_read_by_name_whatever_their_order(tmp_path):
    running_first = clips(tmp_path / "ours")
    pupil_first = import_tree(
        export_tree(running_first, tmp_path / "tree"), tmp_path / "theirs", allow_shared_stimuli=True
    )
    names = [check_folder(f)["channels"]["behavior"] for f in (running_first, pupil_first)]
    assert names == [["running", "pupil_area"], ["pupil_area", "running"]]
    for scheme in NORMALISATIONS:
        one, two = (MouseDataset(f, "train", scheme) for f in (running_first, pupil_first))
        want = ["running", "pupil_area"] if scheme == "range" else ["pupil_area", "running"]
        assert one.channels["behavior"] == two.channels["behavior"] == want
        np.testing.assert_allclose(one[0]["behavior"], two[0]["behavior"], rtol=1e-5)
    raw = np.load(running_first / "behavior.npy")[0, 0]
    low, high = raw.min(), raw.max()
    shown = MouseDataset(running_first, "train")[0]["behavior"][0].numpy()
    assert np.corrcoef(raw, shown)[0, 1] > 0.9999 and low < high
    again = import_tree(
        export_tree(pupil_first, tmp_path / "study", "study1"), tmp_path / "back", allow_shared_stimuli=True
    )
    np.testing.assert_allclose(
        load_tier(again, "train").behavior, load_tier(running_first, "train").behavior, atol=1e-5
    )


def test_channels_without_a_known_name_are_not_matched(tmp_path):
    root = clips(tmp_path / "ours")
    card = read_json(root / "card.json")
    card["channels"]["behavior"] = ["channel 0", "channel 1"]
    write_json(root / "card.json", seal(card))
    assert MouseDataset(root, "train").channels["behavior"] == ["channel 0", "channel 1"]
    for scheme in NORMALISATIONS[1:]:
        with pytest.raises(DataError, match="no such channel as 'channel 0'"):
            MouseDataset(root, "train", scheme)
    with pytest.raises(DataError, match="no such channel"):
        export_tree(root, tmp_path / "tree")


def test_channels_of_pictures_are_read_by_name(tmp_path):
    draw = np.random.default_rng(0)
    images, responses, behavior = draw.random((9, 4, 5)), draw.random((9, 2)), draw.random((9, 2))
    a, b = (
        import_arrays(images, responses, tmp_path / str(k), behavior=behavior[:, order], behavior_names=names)
        for k, (order, names) in enumerate(
            [([0, 1], ["running", "pupil_area"]), ([1, 0], ["pupil_area", "running"])]
        )
    )
    for root in (a, b):
        data = ScenesDataset(root, "train")
        assert data.channels["behavior"] == ["pupil_area", "running"]
        rows = data.samples["sample"].to_numpy()
        want = behavior[rows][:, ::-1] / behavior[rows][:, ::-1].std(0)
        np.testing.assert_allclose(load_scenes(root, "train").behavior, want, rtol=1e-5)


# --- kind: what was withheld is no measurement


@layouts
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_withheld_tiers_are_left_out_and_named(tmp_path, layout, value):
    def withheld(i, tier, a):
        return a | {"responses": np.full_like(a["responses"], value)} if "test" in tier else a

    out = READERS[layout](tree(tmp_path / "t", layout, withheld), tmp_path / "out")
    assert set(pd.read_csv(out / "samples.csv")["tier"]) == {"train", "validation"}
    assert any("test" in n and "withheld" in n for n in check_folder(out)["warnings"])


@layouts
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_channel_that_was_not_measured_is_absent(tmp_path, layout, value):
    if layout == "study1" and value == 0:
        return  # normalised values: zero is a measurement

    def blind(i, tier, a):
        a["behavior"][0] = value
        a["pupil_center"][:] = value
        return a

    out = READERS[layout](tree(tmp_path / "t", layout, blind), tmp_path / "out")
    card = check_folder(out)
    want = {"sensorium": ["running"], "study1": ["pupil_area"], "2022": ["pupil_area_change", "running"]}[
        layout
    ]
    assert card["channels"] == {"behavior": want}
    data = load_scenes(out, "train") if layout == "2022" else load_tier(out, "train")
    assert data.pupil_center is None and np.isfinite(data.behavior).all()
    assert any("left out" in n for n in card["warnings"])


@layouts
def test_gaps_are_kept_and_told(tmp_path, layout):
    "NaN in behaviour is not measured: it stays NaN on disk, and how much of it there is, is said."
    field, second = ("pupil_center", "y") if layout == "sensorium" else ("behavior", None)

    def gaps(i, tier, a):
        if i == 1:
            a[field][1] = np.nan
        return a

    with pytest.warns(UserWarning, match=rf"{field}: .* was not measured \(NaN\) in .* in 1 of \d+ trials"):
        out = READERS[layout](tree(tmp_path / "t", layout, gaps), tmp_path / "out")
    (note,) = [n for n in check_folder(out)["warnings"] if "not measured" in n]
    assert note.endswith("the first 1.npy.") and (second is None or f"{second} was not" in note)
    assert np.isnan(np.load(out / f"{field}.npy")).sum() == (1 if layout == "2022" else 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        READERS[layout](tree(tmp_path / "whole", layout), tmp_path / "other")


def test_gaps_in_arrays_are_told(tmp_path):
    draw = np.random.default_rng(0)
    behavior = draw.normal(size=(12, 2))
    behavior[3:6, 1] = np.nan
    with pytest.warns(
        UserWarning, match="speed was not measured .NaN. in 25.0 % .* in 3 of 12 trials, the first trial 3"
    ):
        import_arrays(draw.random((12, 8, 8)), draw.random((12, 5)), tmp_path / "a", behavior=behavior,
                      behavior_names=("area", "speed"))  # fmt: skip


def test_pictures_that_memory_cannot_hold(tmp_path):
    with pytest.raises(DataError, match="pictures of 1000000 x 1000000 needs .* GB of memory"):
        scenes(tmp_path / "s", size=(10**6, 10**6))
    with pytest.raises(
        DataError, match=r"(of 1000000 x 1000000 needs .* GB of memory)|(MB are to be written)"
    ):
        clips(tmp_path / "c", size=(10**6, 10**6))


# --- kind: one recorded trial in two tiers


GOOD = [("mov", 0, 0, "train"), ("mov", 10, 0, "train"), ("mov", 20, 1, "validation"), ("mov", 30, 3, "test")]
SPLITS = {
    "in train and test": [*GOOD, ("mov", 0, 0, "test")], "repeat -1": [*GOOD, ("mov", 30, -1, "train")],
    "start -20": [("mov", -20, 0, "train"), *GOOD[1:]], "twice in train": [*GOOD, GOOD[0]],
    "no tier": [*GOOD[:3], ("mov", 30, 3, np.nan)], "overlap": [*GOOD, ("mov", 5, 0, "test")],
    "half a frame": [("mov", 0.5, 0, "train"), *GOOD[1:]], "blank tier": [*GOOD[:3], ("mov", 30, 3, " ")],
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_split_tables(tmp_path, name):
    def table(rows):
        return pd.DataFrame(rows, columns=["movie", "start", "repeat", "tier"])

    clips(tmp_path / "control", split=table(GOOD), allow_shared_stimuli=True)
    with pytest.raises((DataError, SplitLeak)):
        clips(tmp_path / "out", split=table(SPLITS[name]), allow_shared_stimuli=True)


@layouts
def test_the_same_trial_saved_twice(tmp_path, layout):
    if layout == "2022":

        def many(i, tier, a):
            return a | {"responses": np.random.default_rng(i).gamma(1, 1, 12)}

        root = tree(tmp_path / "t", layout, many, described=12)
    else:
        root = tree(tmp_path / "t", layout)
    for field in ("videos", "responses"):
        source = trial_file(root, layout, field, 0)
        target = source.with_name("6.npy")  # the first of validation
        if layout == "study1":
            target = root / "validation" / source.parent.name / "6.npy"
        shutil.copy(source, target)
    with pytest.raises(SplitLeak, match="the same responses"):
        READERS[layout](root, tmp_path / "out", allow_shared_stimuli=True)


# --- kind: another order than the one that is assumed


def test_columns_of_the_response_file_are_put_in_the_order_of_the_trials(part):
    root = part("figshare")
    want = things.open_things(root, "01").read()
    path = one(root, "sub-01_ResponseData.h5")
    with h5py.File(path, "r+") as file:
        group = file["ResponseData"]
        values = group["block0_values"][:]
        order = np.array(sorted(range(values.shape[1]), key=str))
        group["block0_values"][:] = values[:, order]
        group["block0_items"] = order
    np.testing.assert_array_equal(things.open_things(root, "01").read(), want)
    for labels, stored in (
        (order.astype("S8"), None),
        (None, order.tolist()),
        (None, [str(k) for k in order]),
    ):
        with h5py.File(path, "r+") as file:
            group = file["ResponseData"]
            del group["block0_items"]
            if stored is None:
                group["block0_items"] = labels
            else:  # as pandas stores labels of several types: a pickle, which is never run
                box = np.empty(1, object)
                box[0] = np.frombuffer(pickle.dumps(np.array(stored, object), protocol=4), "u1")
                group.create_dataset("block0_items", data=box, dtype=h5py.vlen_dtype("u1"))
        np.testing.assert_array_equal(things.open_things(root, "01").read(), want)
    with h5py.File(path, "r+") as file:
        del file["ResponseData/block0_items"]
        file["ResponseData/block0_items"] = np.where(order == 3, 4, order)
    with pytest.raises(DataError, match="not named by trial_id"):
        things.open_things(root, "01").read()


def test_regions_are_placed_by_their_affine(part):
    root = part("volumes")
    want = things.open_things(root, "01").rois
    files = [*root.rglob("*_parcels/sub-01_*.nii.gz"), *root.rglob("prf/sub-01/*.nii.gz")]
    assert files
    for k, path in enumerate(
        files
    ):  # the same region, stored from right to left, or with its axes in another order
        values, affine = volumes.read_nifti(path)
        if k % 2:
            turn = np.eye(4)[[2, 0, 1, 3]].T
            volumes.write_nifti(path, values.transpose(2, 0, 1).copy(), affine @ turn)
        else:
            flip = np.diag([-1.0, 1, 1, 1])
            flip[0, 3] = values.shape[0] - 1
            volumes.write_nifti(path, values[::-1].copy(), affine @ flip)
    pd.testing.assert_frame_equal(things.open_things(root, "01").rois, want)
    values, affine = volumes.read_nifti(files[0])
    volumes.write_nifti(files[0], values, affine + np.eye(4)[:, [3, 3, 3, 0]].T * 0)
    shift = affine.copy()
    shift[0, 3] += 3.0  # less than a voxel
    volumes.write_nifti(files[0], values, shift)
    with pytest.raises(DataError, match="wrong subject grid"):
        things.open_things(root, "01")


@pytest.mark.parametrize("fault", ["order", "twice", "missing", "fraction", "huge"])
def test_places_of_voxels_without_a_mask(part, fault):
    root = part("figshare")
    want = things.open_things(root, "01")
    one(root, "sub-01*brainmask*").unlink()
    bare = things.open_things(root, "01")
    inside = want.rois["V1"].to_numpy()
    np.testing.assert_array_equal(np.argwhere(bare.mask)[inside], np.argwhere(want.mask)[inside])
    path = one(root, "sub-01_VoxelMetadata.csv")
    table = pd.read_csv(path)
    columns = ["voxel_x", "voxel_y", "voxel_z"]
    if fault == "order":
        table[columns] = table[columns].to_numpy()[::-1]
    elif fault == "twice":
        table.loc[1, columns] = table.loc[0, columns]
    else:
        table[columns[0]] = table[columns[0]].astype(object)
        table.loc[1, columns[0]] = {"missing": "", "fraction": 0.5, "huge": 10**9}[fault]
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"(?s)voxel.*VoxelMetadata"):
        things.open_things(root, "01")


# --- kind: masks and regions that cannot be read as such

MASKS = {
    "four axes": (lambda v: v[..., None], None),
    "NaN outside": (lambda v: np.where(v > 0, 1, np.nan).astype("f4"), None),
    "255 inside": (lambda v: v * 255, None),
    "interpolated": (lambda v: np.where(v > 0, 1, 1e-4).astype("f4"), "no mask"),
    "negative": (lambda v: -v.astype("f4"), "no mask"),
    "empty": (lambda v: v * 0, "empty"),
    "flat": (lambda v: v[0], "of shape"),
}


@pytest.mark.parametrize("name", MASKS)
def test_brain_masks(part, name):
    root, (change, why) = part("volumes"), MASKS[name]
    want = things.open_things(root, "01")
    path = one(root, "sub-01*brainmask.nii.gz")
    values, affine = volumes.read_nifti(path)
    volumes.write_nifti(path, change(values), affine)
    if why is None:
        got = things.open_things(root, "01")
        np.testing.assert_array_equal(got.mask, want.mask)
        pd.testing.assert_frame_equal(got.rois, want.rois)
    else:
        with pytest.raises(DataError, match=rf"(?s){why}.*brainmask"):
            things.open_things(root, "01")


def test_unpacked_volumes_and_nifti_2(part):
    import nibabel as nib

    root = part("volumes")
    want = things.open_things(root, "01")
    responses = want.read()
    for k, path in enumerate(sorted(root.rglob("*.nii.gz"))):
        raw = gzip.decompress(path.read_bytes())
        if k % 2:
            image = nib.Nifti1Image.from_bytes(raw)
            raw = nib.Nifti2Image(np.asanyarray(image.dataobj), image.affine).to_bytes()
        path.with_suffix("").write_bytes(raw)
        path.unlink()
    got = things.open_things(root, "01")
    pd.testing.assert_frame_equal(got.rois, want.rois)
    np.testing.assert_array_equal(got.read(), responses)


def test_areas_that_were_interpolated(part):
    root = part("volumes")
    path = one(root, "prf/sub-01/resampled_varea.nii.gz")
    values, affine = volumes.read_nifti(path)
    volumes.write_nifti(path, values.astype("f4") * 0.9, affine)
    with pytest.raises(DataError, match="(?s)between two areas.*varea"):
        things.open_things(root, "01")


CODES = {
    "0/255": lambda c: c * 255, "0/0.999": lambda c: c * 0.999, "no/yes": lambda c: c.map({0: "no", 1: "yes"}),
    "False/True": lambda c: c.astype(bool),
}  # fmt: skip
UNREADABLE = {"empty cells": lambda c: c.where(c.index > 2), "a 2": lambda c: c.where(c.index > 2, 2),
              "words": lambda c: c.map({0: "out", 1: "in"})}  # fmt: skip


@pytest.mark.parametrize("name", [*CODES, *UNREADABLE])
def test_columns_of_regions(part, name):
    root = part("figshare")
    want = things.open_things(root, "01").rois
    path = one(root, "sub-01_VoxelMetadata.csv")
    table = pd.read_csv(path)
    table["V1"] = (CODES | UNREADABLE)[name](table["V1"])
    table.to_csv(path, index=False)
    if name in CODES:
        pd.testing.assert_frame_equal(things.open_things(root, "01").rois, want)
    else:
        with pytest.raises(DataError, match=r"(?s)'V1'.*VoxelMetadata"):
            things.open_things(root, "01")


def test_a_column_of_another_measure_is_named_in_a_warning(part):
    root = part("figshare")
    path = one(root, "sub-01_VoxelMetadata.csv")
    table = pd.read_csv(path)
    table.assign(snr=np.linspace(0, 2, len(table))).to_csv(path, index=False)
    with pytest.warns(UserWarning, match="'snr' is not 0 and 1"):
        assert "snr" not in things.open_things(root, "01").rois


# --- kind: tables that a spreadsheet has saved


RATINGS = pd.DataFrame({"uniqueID": ["kite", "lamp", "fern"], "lives_mean": [1.25, 2.5, 6.75]})


def ratings(path, frame=RATINGS, **options):
    frame.to_csv(path / "r.csv", index=False, **options)
    return things.load_properties(path / "r.csv", ["lives"])


def test_ratings_of_spreadsheets(tmp_path):
    want = [1.25, 2.5, 6.75]
    assert ratings(tmp_path)["lives"].tolist() == want
    assert ratings(tmp_path, sep=";", decimal=",")["lives"].tolist() == want
    assert np.isnan(ratings(tmp_path, RATINGS.assign(lives_mean=[1.25, "-", 6.75])).loc["lamp", "lives"])
    for names in (["NA", "null", "fern"], ["nan", "None", "-"]):
        assert list(ratings(tmp_path, RATINGS.assign(uniqueID=names)).index) == names
    with pytest.raises(DataError, match=r"(?s)row 1: 'about 2' is no number.*r\.csv"):
        ratings(tmp_path, RATINGS.assign(lives_mean=[1.25, "about 2", 6.75]))
    with pytest.raises(DataError, match="empty in row 1"):
        ratings(tmp_path, RATINGS.assign(uniqueID=["kite", "", "fern"]))


@pytest.mark.parametrize("table", ["sub-01_StimulusMetadata.csv", "sub-01_VoxelMetadata.csv"])
def test_a_table_without_rows(part, table):
    root = part("figshare")
    path = one(root, table)
    pd.read_csv(path, nrows=0).to_csv(path, index=False)
    with pytest.raises(DataError, match=rf"(?s)no rows.*{table}"):
        things.open_things(root, "01")


def test_a_trial_without_a_concept(part):
    root = part("figshare")
    path = one(root, "sub-01_StimulusMetadata.csv")
    table = pd.read_csv(path)
    table.loc[3, "concept"] = ""
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"(?s)concept is empty in row 3.*StimulusMetadata"):
        things.open_things(root, "01")


# --- kind: files that are damaged, locked, or of another kind


@pytest.mark.parametrize("what", ["session", "responses"])
def test_a_locked_file_is_whole(tiny_cache, part, session, tmp_path, what):
    if what == "session":
        read = session(lambda file: None)
        path = one(tmp_path / "session", "*.nwb")
    else:
        root = part("figshare")
        path, read = one(root, "sub-01_ResponseData.h5"), lambda: things.open_things(root, "01").read()
    code = f"import h5py, sys; f = h5py.File({str(path)!r}, 'r+'); print('x', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(CortexlitError) as error:
            read()
        assert path.name in str(error.value) and "damaged" not in str(error.value)
        assert "another program" in str(error.value)
    finally:
        other.communicate(b"")
    read()


def test_events_that_are_none(tiny_cache, session, tmp_path):
    read = session(lambda file: None)
    path = one(tmp_path, "*_events.npz")
    whole = path.read_bytes()
    assert read(signal="events").signal == "events"
    allen.checksum_file(path).unlink()
    for change in (
        lambda: np.savez(path, ev=np.array([{"a": 1}], dtype=object)),
        lambda: np.savez(path, events=np.zeros(3)),
        lambda: path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 255]) + whole[2001:]),
    ):
        change()
        with pytest.raises(CortexlitError, match="_events.npz"):
            read(signal="events")
        allen.checksum_file(path).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, study, tiny_cache):
    "Files and folders of every kind, and the call that reads each; a reader answers, or names what is wrong."
    return malformed.readers(tmp_path_factory.mktemp("bench"), study, tiny_cache)


NAMES = [
    "array", "arrays", "table", "split", "tree", "tree, behaviour", "tree, pupil", "tree, tiers", "tree, neurons",
    "study 1", "2022", "2022, responses", "2022, ids", "laboratory", "ratings", "volume", "mask", "region",
    "areas", "betas", "conditions", "stimuli", "voxels", "responses", "score sheet", "adapters",
    "adapters, options", "adapters, head", "adapters, base", "adapters, card", "features", "features, card", "run", "run, card", "published, options",
    "published, weights", "core", "core, options", "model viv1t", "model viv1t, options", "model v1t",
    "model v1t, options", "model vit3d", "model vit3d, options", "model cnn_vit", "model cnn_vit, options",
    "model classifier", "model classifier, options", "model vae", "model vae, options", "model gan", "model gan, options", "model diffusion",
    "model diffusion, options", "model flow", "model flow, options", "clips, behavior.npy", "clips, card.json",
    "clips, neurons.csv", "clips, responses.npy", "clips, samples.csv", "clips, statistics.json",
    "clips, videos.npy", "folds, card.json", "folds, samples.csv", "folds, 0/card.json", "scenes, behavior.npy", "scenes, card.json", "scenes, images.npy", "scenes, neurons.csv",
    "scenes, responses.npy", "scenes, samples.csv", "scenes, statistics.json", "cache, card.json",
    "cache, metadata.npz", "cache, responses.npy",
    "truth, sessions", "truth, arrays", "truth of a subject", "open recording",
    "session", "events", "session, cell_specimens.json", "session, experiment_containers.json",
    "session, manifest.json", "session, ophys_experiments.json", "session, stimulus_mappings.json",
    "checkpoint, optimizer.pt", "checkpoint, scheduler.pt", "checkpoint, rng_state.pth",
    "checkpoint, trainer_state.json", "checkpoint, model.safetensors", "run, config.json", "run, provenance.json",
]  # fmt: skip


def test_every_reader_is_in_the_list(bench):
    assert set(bench) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_answers_or_names_the_fault(bench, name):
    reader = bench[name]
    whole, card = reader.path.read_bytes(), reader.card and reader.card.read_bytes()

    @settings(
        max_examples=1 if name.startswith(malformed.SLOW) else 4,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(st.integers(0, 10**6), st.booleans())
    def check(seed, signed):
        try:
            malformed.spoil(reader.path, whole, random.Random(seed))
            if signed and card is not None:
                with contextlib.suppress(Exception):  # the card itself is spoilt
                    malformed.sign(reader.card, reader.path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read()
        except CortexlitError as error:
            assert str(error)
        finally:
            reader.path.write_bytes(whole)
            if card is not None:
                reader.card.write_bytes(card)

    check()


@pytest.mark.parametrize("change", ["missing", "folder", "unreadable"])
@pytest.mark.parametrize("name", NAMES)
def test_every_reader_names_a_file_it_cannot_open(bench, name, change):
    reader = bench[name]
    if change == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    if name.startswith(malformed.SLOW) and change != "missing":
        pytest.skip("as when it is missing")
    path = reader.path
    aside = path.parent.parent / "aside"
    path.rename(aside)
    try:
        if change == "folder":
            path.mkdir()
        elif change == "unreadable":
            shutil.copy(aside, path)
            path.chmod(0)
        try:
            reader.read()
        except CortexlitError as error:
            assert str(error)
        else:
            assert name in OPTIONAL and change != "unreadable", "read without its file"
    finally:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        aside.rename(path)


OPTIONAL = {"adapters, card", "tree, neurons", "2022, ids", "run, card", "region", "areas", "run, provenance.json", "session, cell_specimens.json",
            "session, experiment_containers.json", "session, manifest.json", "session, stimulus_mappings.json"}  # fmt: skip


# --- kind: arrays that their card vouches for, and that cannot be right

NO_NUMBERS = {"NaN": np.nan, "infinite": np.inf, "beyond float32": 1e300}


@pytest.fixture(scope="module")
def signed(bench):
    "Change an array of a folder, sign its card anew, look, and put all back."

    @contextlib.contextmanager
    def change(name: str, how):
        reader = bench[name]
        whole, card = reader.path.read_bytes(), reader.card.read_bytes()
        values = np.load(reader.path)
        try:
            np.save(reader.path, how(values.astype(float)))
            malformed.sign(reader.card, reader.path)
            yield reader
        finally:
            reader.path.write_bytes(whole)
            reader.card.write_bytes(card)

    return change


@pytest.mark.parametrize("name", ["clips, behavior.npy", "scenes, behavior.npy"])
def test_a_signed_field_holds_a_value(signed, name):
    with signed(name, lambda array: np.full_like(array, np.nan)) as reader:
        with pytest.raises(DataError, match="behavior holds no value"):
            reader.read()
    reader.read()


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize(
    "name", ["clips, videos.npy", "clips, responses.npy", "clips, behavior.npy", "scenes, images.npy",
             "scenes, responses.npy", "scenes, behavior.npy", "cache, responses.npy"]
)  # fmt: skip
def test_a_signed_array_holds_numbers(signed, name, value):
    def how(array):
        array.flat[-1] = value  # the last one: of any tier
        return array

    file = name.split(", ")[1].replace(".", r"\.")
    with signed(name, how) as reader:
        if "behavior" in name and np.isnan(value):
            reader.read()  # not measured
        else:
            with pytest.raises(DataError, match=rf"(?s)not finite.*{file}"):
                reader.read()
    reader.read()


def test_a_folder_that_was_looked_at_is_looked_at_again_when_it_changes(tmp_path, monkeypatch):
    root, looks = clips(tmp_path / "c"), []
    monkeypatch.setattr(folder_checks.time, "time", lambda: 2e9 + len(looks))  # all files are old enough
    monkeypatch.setattr(folder_checks, "finite", lambda name, *rest, **_: looks.append(name))
    for tier in ("train", "test"):
        MouseDataset(root, tier)
    assert sorted(looks) == sorted({"videos", "responses", "behavior"} & set(looks)) and len(looks) == len(
        set(looks)
    )
    before = len(looks)
    np.save(root / "responses.npy", np.load(root / "responses.npy"))
    MouseDataset(root, "train")
    assert looks[before:] == ["responses"]


# --- kind: the truth of a simulation that is not what was simulated


def truths(bench) -> list:
    return [bench["truth, arrays"], bench["truth of a subject"]]


@pytest.mark.parametrize("which", [0, 1], ids=["session", "subject"])
def test_any_change_of_a_truth_is_named(bench, which):
    reader = truths(bench)[which]
    whole, card = reader.path.read_bytes(), reader.card.read_bytes()
    arrays = dict(np.load(reader.path))
    needed = set(reader.read())
    try:
        for name, array in arrays.items():
            changes = {"not finite": array * np.nan if array.dtype.kind == "f" else None, "shape": np.concatenate([array, array]),
                       "dtype": np.full(array.shape, "x") if array.dtype.kind != "U" else np.zeros(array.shape)}  # fmt: skip
            for why, changed in changes.items():
                if changed is None:
                    continue
                np.savez(reader.path, **arrays | {name: changed})
                if name == "events" or (which and name == "weights"):  # its hash is that of the whole file
                    with pytest.raises(DataError, match="differs from what was written"):
                        reader.read()
                malformed.sign(reader.card, reader.path)
                with pytest.raises(DataError, match=rf"(?s){why}.*{reader.path.name}"):
                    reader.read()
                reader.card.write_bytes(card)
        assert needed >= set(arrays)
    finally:
        reader.path.write_bytes(whole)
        reader.card.write_bytes(card)
    assert set(reader.read()) == needed


@pytest.mark.parametrize("which", [0, 1], ids=["session", "subject"])
def test_a_truth_without_a_hash_is_read_and_looked_at(bench, which):
    reader = truths(bench)[which]
    whole, card = reader.path.read_bytes(), reader.card.read_bytes()
    arrays = dict(np.load(reader.path))
    name = "amplitude" if which == 0 else "nc_singletrial"
    try:
        mark = json.loads(card)
        del mark["files"]
        reader.card.write_text(json.dumps(mark))  # of an earlier version
        reader.read()
        np.savez(reader.path, **arrays | {name: arrays[name] * np.inf})
        with pytest.raises(DataError, match=f"{name}: .* not finite"):
            reader.read()
        reader.card.write_text(json.dumps(mark | {"files": {"truth/other.npz": "0"}}))
        with pytest.raises(DataError, match="it lists no truth"):
            reader.read()
    finally:
        reader.path.write_bytes(whole)
        reader.card.write_bytes(card)


# --- kind: recordings made of anything


CHANGES = st.sampled_from(
    [
        ("frame", 1.5),
        ("frame", -2),
        ("repeat", -1),
        ("repeat", np.nan),
        ("start", -1),
        ("start", 10**6),
        ("end", 0),
    ]
)


@settings(max_examples=20)
@given(change=CHANGES, row=st.integers(0, 299))
def test_a_stimulus_table_is_whole_numbers_within_the_trace(change, row):
    toy = toy_recording()
    table = toy.stimulus_tables["one"].copy()
    column, value = change
    table[column] = table[column].astype(type(value))
    table.loc[row, column] = value
    if column == "start" or column == "end":
        table[column] = table[column].astype(int)
    with pytest.raises(DataError, match="one"):
        replace(toy, stimulus_tables={"one": table})


@settings(max_examples=20)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["mov", "other"]), st.integers(-5, 45), st.integers(-1, 5), st.sampled_from(["train", "test", "", None])),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_any_split_table_is_taken_or_named(tmp_path_factory, rows):
    table = pd.DataFrame(rows, columns=["movie", "start", "repeat", "tier"])
    out = tmp_path_factory.mktemp("split") / "out"
    try:
        clips(out, split=table, allow_shared_stimuli=True)
    except CortexlitError:
        assert not out.exists()
    else:
        tiers = [load_tier(out, t).labels for t in pd.read_csv(out / "samples.csv")["tier"].unique()]
        for a in tiers[0]:
            assert not any(np.array_equal(a, b) for other in tiers[1:] for b in other)


# --- kind: folders and cards


@pytest.mark.parametrize("kind", ["clips", "folds", "scenes", "things"])
def test_an_edited_card(bench, kind):
    path = bench["cache, card.json" if kind == "things" else f"{kind}, card.json"].path
    whole = path.read_text()
    read = {"clips": lambda p: MouseDataset(p, "train"), "folds": pooled_tier,
            "scenes": lambda p: ScenesDataset(p, "train"), "things": cached.ThingsDataset}[kind]  # fmt: skip
    card = json.loads(whole)
    try:
        for change in (
            {"name": "x"},
            {"files": {}},
            {"split_hash": "0"},
            {"channels": {}},
            {"shape": [1, 1]},
            {"rate": -30},
        ):
            path.write_text(json.dumps(card | change))
            with pytest.raises(DataError, match="its own hash"):
                read(path.parent)
        for change in ({"files": {"../../../etc/passwd": "0"}}, {"files": []}, {"files": {}}):
            path.write_text(json.dumps(seal(card | change)))
            with pytest.raises(DataError, match="outside the folder|cut off or damaged|lists no"):
                read(path.parent)
        old = {k: v for k, v in card.items() if k not in ("hash", "kind")}
        if kind in ("folds", "scenes"):
            old["kind"] = kind
        if kind == "things":
            del old["files"]
        path.write_text(json.dumps(old))
        read(path.parent)  # made by an earlier version: still opens
    finally:
        path.write_text(whole)


def test_folders_of_another_kind(bench):
    folder = {
        k: bench[f"{'cache' if k == 'things' else k}, card.json"].path.parent for k in folder_checks.KINDS
    }
    read = {"clips": lambda p: MouseDataset(p, "train"), "folds": pooled_tier,
            "scenes": lambda p: ScenesDataset(p, "train"), "things": cached.ThingsDataset}  # fmt: skip
    for kind, call in read.items():
        call(folder[kind])
        for other in folder.keys() - {kind}:
            with pytest.raises(DataError, match="wrong kind of folder"):
                call(folder[other])


def test_the_cache_of_a_subject_is_verified(bench):
    path = bench["cache, responses.npy"].path
    whole, values = path.read_bytes(), np.load(path)
    try:
        for change in (
            values[::-1],
            np.concatenate([values, values]),
            np.concatenate([values, values], 1),
            values * np.nan,
        ):
            np.save(path, np.ascontiguousarray(change))
            with pytest.raises(CortexlitError, match="responses.npy"):
                cached.ThingsDataset(path.parent)
    finally:
        path.write_bytes(whole)
    np.testing.assert_array_equal(cached.ThingsDataset(path.parent).responses, values)


# --- kind: manifests and addresses


@pytest.mark.parametrize("reader", ["cortexlit", "allensdk"])
@pytest.mark.parametrize("spec", ["../../outside/%d.nwb", "/etc/%d.nwb"])
def test_a_manifest_cannot_name_files_outside(request, tiny_cache, tmp_path, spec, reader):
    shutil.copytree(tiny_cache, tmp_path / "c")
    if reader == "allensdk":
        request.getfixturevalue("allensdk")
        (tmp_path / "c/cortexlit.json").unlink()
    ident = sorted(allen.synthetic_sessions(tiny_cache))[0]
    path = tmp_path / "c/manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["manifest"]:
        if entry.get("key") == "EXPERIMENT_DATA":
            entry["spec"] = spec
            entry.pop("parent_key", None)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"(?s)outside the folder.*manifest\.json"):
        allen.open_session(ident, tmp_path / "c")
    for text in ("{", "[]", "{}", '{"manifest": 3}'):
        path.write_text(text)
        with pytest.raises(CortexlitError, match=r"manifest\.json"):
            allen.open_session(ident, tmp_path / "c")


def test_downloads_are_encrypted(tmp_path):
    for url in ("http://api.brain-map.org/x.nwb", "ftp://x/x.nwb", "file:///etc/passwd", "x.nwb"):
        with pytest.raises(DataError, match="not encrypted"):
            allen.download(url, tmp_path / "x.nwb", tries=1)
    with pytest.raises(DataError, match="not encrypted"):
        allen.list_sessions(tmp_path, base_uri="http://api.brain-map.org")
    urls = [e.url for e in (*opendata.REGISTRY.values(), *things.THINGS_TABLES.values())]
    assert urls and all(u.startswith("https://") for u in urls)
