"""The embedded session: same bytes, readable by unmodified allensdk, true to its own ground truth."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import CortexlitError, DataError, MissingError, read_json, sha256
from cortexlit.simulate import cortex, screen
from cortexlit.simulate import session as syn

A, B = 900_000_001, 900_000_002
EPOCHS = [735, 18806, 19741, 37846, 38751, 47810, 48716, 66786, 66936, 75866, 75867, 93967, 94873, 115478]


def hashes(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): sha256(p) for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return syn.write_session(tmp_path_factory.mktemp("synthetic") / "mouse", "tiny")


@pytest.fixture(scope="module")
def boc(allensdk, root):
    from allensdk.api.queries.brain_observatory_api import BrainObservatoryApi
    from allensdk.core import brain_observatory_cache as cache

    class Offline(BrainObservatoryApi):
        def template_query(self, template_name, entry_name, **kwargs):
            assert entry_name == "all_eye_mapping_files", f"would go to the network: {entry_name}"
            return []

    return cache.BrainObservatoryCache(manifest_file=str(root / "manifest.json"), api=Offline())


@pytest.fixture(scope="module")
def stage():
    return cortex.set_stage(screen.SESSION_A, "tiny")


# ---------------------------------------------------------------- bytes and files


def test_same_seed_same_bytes(root, tmp_path):
    twin = syn.write_session(tmp_path / "twin", "tiny")
    assert hashes(twin) == hashes(root)


def test_other_seed_other_mouse(root, tmp_path):
    other = syn.write_session(tmp_path / "other", "tiny", seed=3)
    assert (other / "ophys_experiment_data" / "900000031.nwb").exists()
    first, second = syn.load_truth(root, A), syn.load_truth(other, 900_000_031)
    assert not set(first["cell_id"]) & set(second["cell_id"])
    assert not np.array_equal(first["events"], second["events"])
    assert not np.array_equal(first["running"], second["running"])
    with (
        h5py.File(root / f"ophys_experiment_data/{A}.nwb") as a,
        h5py.File(other / "ophys_experiment_data/900000031.nwb") as b,
    ):
        key = "stimulus/templates/natural_movie_one_image_stack/data"
        assert np.array_equal(a[key][:], b[key][:])  # all mice see the same films


def test_marker_and_layout(root):
    mark = read_json(root / "cortexlit.json")
    assert mark["synthetic"] is True and set(mark["sessions"]) == {str(A), str(B)}
    assert mark["sessions"][str(A)]["eye_tracking"] and not mark["sessions"][str(B)]["eye_tracking"]
    assert read_json(root / "manifest.json")["manifest"][0] == {"type": "manifest_version", "value": "1.3"}
    with h5py.File(root / f"ophys_experiment_data/{A}.nwb") as file:
        link = file["stimulus/presentation/natural_movie_one_stimulus"].get(
            "indexed_timeseries", getlink=True
        )
        assert isinstance(link, h5py.SoftLink)
        assert file["general/session_id"].dtype.kind == "S"
        assert "Synthetic" in file["session_description"][()].decode()


@pytest.mark.parametrize("broken", ["simulate_cell", "_write_stimuli", "_truth", "write_json"])
def test_failure_midway_leaves_nothing(broken, tmp_path, monkeypatch):
    calls, whole = [], getattr(syn, broken)

    def fail_second_time(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return whole(*args, **kwargs)

    monkeypatch.setattr(syn, broken, fail_second_time)
    with pytest.raises(OSError, match="(?i)no space"):
        syn.write_session(tmp_path / "mouse", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_kept(tmp_path):
    keep = tmp_path / "mouse" / "precious.txt"
    keep.parent.mkdir()
    keep.write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        syn.write_session(keep.parent, "tiny")
    assert keep.read_text() == "mine" and len(list(tmp_path.rglob("*"))) == 2


def test_embedded_session_is_written_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, whole = [], syn.write_session
    monkeypatch.setattr(syn, "write_session", lambda *a: calls.append(a) or whole(*a))
    with ThreadPoolExecutor(3) as pool:
        roots = list(pool.map(lambda _: syn.embedded_session("tiny"), range(3)))
    assert len(set(roots)) == 1 and len(calls) == 1
    assert (roots[0] / "cortexlit.json").exists()


@pytest.mark.parametrize("size, seed", [("huge", 0), ("tiny", -1), ("tiny", 10_000)])
def test_bad_arguments(size, seed, tmp_path):
    with pytest.raises(DataError, match="expected"):
        syn.write_session(tmp_path / "x", size, seed)
    assert list(tmp_path.iterdir()) == []


def test_truth_of_what_is_not_there(root, tmp_path):
    with pytest.raises(MissingError, match="no ground truth"):
        syn.load_truth(tmp_path, A)
    with pytest.raises(MissingError, match="no session 5"):
        syn.load_truth(root, 5)
    assert issubclass(MissingError, CortexlitError)


# ---------------------------------------------------------------- timeline


def test_published_epochs_and_master_table():
    timeline = screen.session_timeline(screen.SESSION_A, "demo")
    assert timeline.epochs[["start", "end"]].to_numpy().ravel().tolist() == EPOCHS
    assert sum(map(len, timeline.tables.values())) == 45_629
    assert len(timeline.timestamps) == 115_690
    gratings = timeline.tables["drifting_gratings"]
    assert len(gratings) == 628 and (gratings["blank_sweep"] == 1).sum() == 28
    assert gratings.groupby("condition").size()[lambda s: s.index >= 0].tolist() == [15] * 40
    assert np.median(np.diff(timeline.timestamps)) == pytest.approx(1 / 30.168, rel=1e-4)


def test_session_b_counts():
    tables = screen.session_timeline(screen.SESSION_B, "demo").tables
    scenes = tables["natural_scenes"]["frame"].value_counts()
    assert scenes.drop(-1).tolist() == [50] * 118 and scenes[-1] == 50
    assert len(tables["static_gratings"]) == 6000 and len(tables["natural_movie_one"]) == 9000


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([screen.SESSION_A, screen.SESSION_B]))
def test_timelines_of_all_mice(seed, session_type):
    timeline = screen.session_timeline(session_type, "tiny", seed)
    assert (np.diff(timeline.timestamps) > 0).all()
    last = len(timeline.timestamps)
    for table in timeline.tables.values():
        assert (np.diff(table["start"]) >= 0).all() and (table["end"] >= table["start"]).all()
        assert table["end"].max() < last
        at = np.interp(table["onset"], timeline.timestamps, np.arange(last))
        assert np.array_equal(np.floor(at), table["start"])
    reference = screen.session_timeline(session_type, "tiny", 0).epochs
    pd.testing.assert_frame_equal(timeline.epochs, reference)


# ---------------------------------------------------------------- allensdk


def test_cache_queries(boc):
    experiments = boc.get_ophys_experiments()
    assert {e["id"]: e["session_type"] for e in experiments} == {A: "three_session_A", B: "three_session_B"}
    assert boc.get_ophys_experiments(stimuli=["natural_movie_three"])[0]["id"] == A
    assert boc.get_ophys_experiments(targeted_structures=["VISl"]) == []
    assert boc.get_all_cre_lines() == ["Rorb-IRES2-Cre"] and boc.get_all_imaging_depths() == [275]
    assert len(boc.get_experiment_containers()) == 1 and len(boc.get_cell_specimens()) == 10


@pytest.mark.parametrize("session, kind", [(A, screen.SESSION_A), (B, screen.SESSION_B)])
def test_allensdk_reads_everything(boc, root, session, kind):
    data = boc.get_ophys_experiment_data(session)
    clock, raw = data.get_fluorescence_traces()
    timeline = screen.session_timeline(kind, "tiny")
    assert np.array_equal(clock, timeline.timestamps) and raw.shape == (8, len(clock))
    _, demixed = data.get_demixed_traces()
    _, neuropil = data.get_neuropil_traces()
    r = data.get_neuropil_r()
    assert np.allclose(data.get_corrected_fluorescence_traces()[1], demixed - r[:, None] * neuropil)
    times, dff = data.get_dff_traces()
    assert np.array_equal(times, clock) and np.isfinite(dff).all() and abs(np.median(dff)) < 0.05
    ids = data.get_cell_specimen_ids()
    assert np.array_equal(data.get_dff_traces([ids[2], ids[5]])[1], dff[[2, 5]])
    masks = data.get_roi_mask_array()
    assert masks.shape == (8, 512, 512) and masks.sum((1, 2)).min() > 50 and masks.sum(0).max() == 1
    assert data.get_max_projection().shape == (512, 512) and len(data.get_roi_ids()) == 8
    picture = data.get_max_projection().astype(float)
    assert picture[masks.any(0)].mean() > picture[~masks.any(0)].mean() + 10
    shift = data.get_motion_correction()
    assert list(shift.columns) == ["x_motion", "y_motion", "timestamp"] and len(shift) == len(clock)
    speed, speed_clock = data.get_running_speed()
    assert np.array_equal(speed_clock, clock)
    assert np.isnan(speed).sum() == 8 and np.isnan(speed[:5]).all() and np.isnan(speed[-3:]).all()
    meta = data.get_metadata()
    assert meta["ophys_experiment_id"] == session and meta["session_type"] == kind
    assert meta["pipeline_version"] == "3.0" and meta["cre_line"] == "Rorb-IRES2-Cre/wt"
    epochs = data.get_stimulus_epoch_table()
    assert epochs[["stimulus", "start", "end"]].values.tolist() == timeline.epochs.values.tolist()
    assert len(data.get_stimulus_table("master")) == sum(map(len, timeline.tables.values()))
    events = boc.get_ophys_experiment_events(session)
    assert events.shape == raw.shape and events.min() == 0 and events.max() > 0


def test_stimuli_through_allensdk(boc):
    a, b = boc.get_ophys_experiment_data(A), boc.get_ophys_experiment_data(B)
    for data, movie, frames in (
        (a, "natural_movie_one", 150),
        (a, "natural_movie_three", 290),
        (b, "natural_movie_one", 150),
    ):
        table = data.get_stimulus_table(movie).sort_values(["repeat", "frame"])
        assert (table["frame"].to_numpy().reshape(10, frames) == np.arange(frames)).all()
        assert data.get_stimulus_template(movie).shape == (frames, 38, 76)
    scenes = b.get_stimulus_table("natural_scenes")
    assert (scenes["frame"] == -1).sum() == 4 and b.get_stimulus_template("natural_scenes").shape == (
        12,
        60,
        76,
    )
    gratings = a.get_stimulus_table("drifting_gratings")
    blank = gratings["blank_sweep"] == 1
    assert (
        gratings.loc[blank, "orientation"].isna().all() and gratings.loc[~blank, "orientation"].notna().all()
    )
    assert set(a.list_stimuli()) == {
        "drifting_gratings",
        "natural_movie_one",
        "natural_movie_three",
        "spontaneous",
    }
    search, picture = a.get_stimulus(int(a.get_stimulus_table("natural_movie_three")["start"].iloc[40]))
    assert search[2]["stimulus"] == "natural_movie_three" and picture.shape == (38, 76)
    with pytest.raises(KeyError):
        a.get_stimulus_template("spontaneous")


def test_eye_tracking_only_in_a(boc):
    from allensdk.brain_observatory.brain_observatory_exceptions import NoEyeTrackingException

    a, b = boc.get_ophys_experiment_data(A), boc.get_ophys_experiment_data(B)
    times, area = a.get_pupil_size()
    _, degrees = a.get_pupil_location()
    _, cm = a.get_pupil_location(as_spherical=False)
    assert np.array_equal(times, a.get_fluorescence_timestamps())
    lost = np.isnan(area)
    assert 0.01 < lost.mean() < 0.09
    assert np.array_equal(lost, np.isnan(degrees).any(1)) and np.array_equal(lost, np.isnan(cm).any(1))
    seen = ~lost
    assert np.allclose(cm[seen, 0], 15 * np.tan(np.deg2rad(degrees[seen, 0])), atol=0.01)
    for read in (b.get_pupil_size, b.get_pupil_location):
        with pytest.raises(NoEyeTrackingException):
            read()


def test_sessions_share_cells(boc):
    a, b = (set(boc.get_ophys_experiment_data(i).get_cell_specimen_ids()) for i in (A, B))
    assert len(a & b) == 6 and len(a | b) == 10


# ---------------------------------------------------------------- the simulation against its truth


def test_truth_belongs_to_the_file(root, boc, stage):
    truth, data = syn.load_truth(root, A), boc.get_ophys_experiment_data(A)
    assert np.array_equal(truth["cell_id"], data.get_cell_specimen_ids())
    found = boc.get_ophys_experiment_events(A)
    assert ((found > 0) <= (truth["events"] > 0)).all()  # nothing is detected where nothing was
    assert 0.7 < (found > 0).sum() / (truth["events"] > 0).sum() < 0.99
    rows = np.concatenate([t["start"] for k, t in stage.timeline.tables.items() if "movie" in k])
    corrected = data.get_corrected_fluorescence_traces()[1]
    r = [
        np.corrcoef(e[rows].astype(float), c[rows])[0, 1]
        for e, c in zip(truth["expected"], corrected, strict=True)
    ]
    assert np.allclose(r, truth["ceiling"], atol=0.01)
    assert truth["ceiling"][truth["kind"] == "reliable"].mean() > 0.2
    for movie in ("natural_movie_one", "natural_movie_three"):
        rates, response = cortex.movie_responses(stage, movie)
        assert np.allclose(truth[f"rate_{movie}"], rates, rtol=1e-4, atol=1e-5)
        assert np.allclose(truth[f"expected_{movie}"], response, rtol=1e-4, atol=1e-5)


def test_true_response_is_aligned_with_the_tables(stage):
    """Straight gaze, no running: the conditional expectation must be the looped movie response, frame for frame."""
    still = cortex.Behaviour(
        np.zeros_like(stage.behaviour.running),
        np.full_like(stage.behaviour.pupil_area, 1700.0),
        np.zeros_like(stage.behaviour.gaze),
        stage.behaviour.blink,
    )
    calm = cortex.Stage(**{**vars(stage), "behaviour": still, "weights": cortex.gaze_weights(still.gaze)})
    starts = stage.timeline.tables["natural_movie_one"]["start"].to_numpy().reshape(10, 150)[3:]
    looped = cortex.movie_responses(calm, "natural_movie_one")[1]
    for i in np.argsort(-looped.std(1))[:4]:
        trials = cortex.simulate_cell(calm, int(i)).expected[starts]
        r = [[np.corrcoef(np.roll(looped[i], k), t)[0, 1] for k in range(-6, 7)] for t in trials]
        assert abs(int(np.mean(r, 0).argmax()) - 6) <= 1 and np.mean(r, 0).max() > 0.97


def test_one_cell_can_be_made_again_alone(root, boc, stage):
    cell = cortex.simulate_cell(stage, 5)
    assert np.array_equal(cell.dff, boc.get_ophys_experiment_data(A).get_dff_traces()[1][5])


def test_shown_pictures(stage):
    tables, shown = stage.timeline.tables, stage.shown
    blanks = tables["drifting_gratings"].query("blank_sweep == 1")
    for rows in (tables["spontaneous"], blanks):
        for start, end in rows[["start", "end"]].to_numpy():
            assert (shown[start + 1 : end] == 0).all()
    one = tables["natural_movie_one"]
    middle = shown[one["start"].to_numpy() + 1]
    assert np.mean(np.abs(middle - 1 - one["frame"]) % 149 <= 1) > 0.99


def test_resize_is_torch_bilinear():
    torch = pytest.importorskip("torch")
    stack = syn.rng(0, "resize").random((3, 20, 30), dtype=np.float32)
    for shape in ((40, 60), (10, 15), (33, 47)):
        want = torch.nn.functional.interpolate(torch.from_numpy(stack)[None], shape, mode="bilinear")[
            0
        ].numpy()
        assert np.allclose(screen.resize(stack, shape), want, atol=1e-5)


def test_linear_drive_is_the_recursion_it_says():
    neuron = cortex.make_neurons(8).iloc[0]
    signal = (np.arange(40) % 7 + 1j * (np.arange(40) % 5)).astype(np.complex64)
    pole = np.exp((-1 / cortex.MEMORY + 2j * np.pi * neuron.temporal_frequency) / 30)
    late, stages = np.concatenate([np.zeros(1), signal[:-1]]), []
    for _ in range(2):
        out, y = [], 0
        for x in late:
            y = pole * y + (1 - abs(pole)) * x
            out.append(y)
        late = np.array(out)
        stages.append(late)
    assert np.allclose(cortex.linear_drive(signal, neuron, 30.0)[0], stages[-1])


@pytest.mark.parametrize("direction", [20.0, 110.0, 250.0])
def test_neuron_prefers_its_own_direction(direction):
    neurons = (
        cortex.make_neurons(8)
        .iloc[[0]]
        .assign(direction=direction, direction_selectivity=0.9, complex_cell=True, azimuth=0.0, altitude=0.0)
    )
    row, moments = neurons.iloc[0], np.arange(90) / 30
    energy = {}
    for d in (direction, direction + 180, direction + 90):
        pictures = screen.grating(d, row.frequency, row.temporal_frequency * moments)
        signal = cortex.filter_pictures(pictures, neurons, gazes=[(0.0, 0.0)])[0, :, 0]
        energy[d - direction] = cortex.motion_energy(signal, row, 30.0)[30:].mean()
    assert energy[0] > 1.5 * energy[180] and energy[0] > 5 * energy[90]


def test_gaze_moves_the_receptive_field():
    neurons = cortex.make_neurons(8)
    step = screen.DEGREES_PER_FIELD_PX
    still, moved = cortex.receptive_fields(neurons), cortex.receptive_fields(neurons, (4 * step, 0.0))
    assert np.allclose(moved[..., 12:-8], still[..., 8:-12], atol=2e-3)
    weights = cortex.gaze_weights(np.array(cortex.GAZES))
    assert np.allclose(weights, np.eye(9))


def test_running_and_pupil_raise_the_rate():
    neuron = cortex.make_neurons(8).iloc[0].copy()
    neuron["gain_running"], neuron["gain_pupil"] = 0.5, 0.2
    frames = 600

    def gain(speed: float, area: float) -> float:
        b = cortex.Behaviour(
            np.full(frames, speed), np.full(frames, area), np.zeros((frames, 2)), np.zeros(frames, bool)
        )
        return cortex.gain_of(b, neuron)[-1]

    assert gain(0, 1700) == pytest.approx(1)
    assert gain(20, 1700) > 1.4 and gain(0, 3000) > 1.2 and gain(-5, 1700) == pytest.approx(1)


@pytest.mark.parametrize("cells", [8, 64, 227])
def test_masks_never_overlap(cells):
    neurons = cortex.make_neurons(cells, seed=2)
    assert len(neurons) == int(np.ceil(1.2 * cells)) and neurons["cell_id"].is_unique
    masks = syn.roi_masks(neurons, 2, (3, -2))
    assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() > 50
    assert np.corrcoef(neurons["x_px"], neurons["azimuth"])[0, 1] > 0.5 or cells == 8


def test_movies_are_one_over_f():
    movie = screen.natural_movie("natural_movie_three", 290).astype(float) - 128
    power = (np.abs(np.fft.rfft2(movie - movie.mean((1, 2), keepdims=True))) ** 2).mean(0)
    f = np.hypot(np.fft.fftfreq(76)[:, None], np.fft.rfftfreq(152))
    use = (f > 0.02) & (f < 0.2)
    slope = np.polyfit(np.log(f[use]), np.log(power[use]), 1)[0]
    assert -3.5 < slope < -1.5
    assert len({p.tobytes() for p in movie}) == 290
