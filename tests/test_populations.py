"""The second population: its truths hold, its options do what they say, and the first keeps its bytes."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError, read_json
from cortexlit.simulate import cortex, screen
from cortexlit.simulate import populations as pop
from cortexlit.simulate import session as syn
from cortexlit.simulate.populations import V1Like, divided, respond, swept

A, B = 900_500_001, 900_500_002
# Of the first population, sizes "tiny": the table of neurons, the demixed traces (whole numbers) and where events were
# found. Not of the files: how h5py and zlib pack the same numbers differs between their versions.
FIRST = {
    0: [
        "57aa28119cc4e2b7f09b0fcd09cc92dbea4b77b07d03c557913b22c47ab13659",
        "62d0919b3cbcc406898a80e7fd3faab2d9ca02172d3049d4bfd136cc9fb621a0",
    ],
    3: [
        "3d18cfdc9416154a550b586d85db97808fd1909b38cccb8b9bcd226821ca8cba",
        "6b061ae98faf8962bc6abf2511f40ddcdd1929e7d3541bf077e37e00faf54cd9",
    ],
}


def content(root, session_id: int) -> str:
    "SHA-256 of what was drawn and what was recorded."
    import h5py

    with h5py.File(root / f"ophys_experiment_data/{session_id}.nwb") as file:
        base = "processing/brain_observatory_pipeline/Fluorescence/imaging_plane_1_demixed_signal"
        traces = np.rint(file[f"{base}/data"][:]).astype("<i4")
    with np.load(root / f"ophys_experiment_events/{session_id}_events.npz") as file:
        found = file["ev"] > 0
    truth = syn.load_truth(root, session_id)
    drawn = np.round([truth[k] for k in ("azimuth", "direction", "peak_rate", "gain_running")], 6)
    return hashlib.sha256(traces.tobytes() + np.packbits(found).tobytes() + drawn.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return syn.write_session(tmp_path_factory.mktemp("v1like") / "mouse", "tiny", 0, V1Like())


@pytest.fixture(scope="module")
def mouse():
    "(population, neurons, scale) of twelve neurons."
    kind = V1Like()
    neurons = kind.neurons(40, 5).iloc[:12].reset_index(drop=True)
    return kind, neurons, kind.scale(neurons, "tiny")


def above_rest(mouse, i: int, turned: float = 0.0, contrast: float = 0.8, bare: bool = False) -> float:
    "Noiseless rate above rest for a grating turned from the neuron's own direction; `bare`: without the surround."
    kind, neurons, scale = mouse
    n, s = neurons.iloc[i], scale[i].copy()
    s[3] = 0 if bare else s[3]
    signal = swept(
        kind, neurons.iloc[[i]], n.direction + turned, n.frequency, n.temporal_frequency, contrast
    )[0]
    return kind.rate(signal, n, s, 30.0)[-30:].mean() - n.rest_rate


# ---------------------------------------------------------------- the first population


@pytest.mark.parametrize("seed", [0, 3])
def test_old_seeds_keep_their_content(seed, tmp_path):
    root = syn.write_session(tmp_path / "mouse", "tiny", seed)
    assert [content(root, k) for k in cortex.session_ids(seed).values()] == FIRST[seed]
    assert "population" not in read_json(root / "cortexlit.json")


# ---------------------------------------------------------------- truths


def test_own_grating_beats_the_one_across(mouse):
    for i in range(12):
        across = (above_rest(mouse, i, 90) + above_rest(mouse, i, -90)) / 2
        assert above_rest(mouse, i) > max(across, 0.0)


def test_opponent_cells_prefer_their_direction(mouse):
    opponent = mouse[1]["opponent"] > 0.5
    index = [
        (above_rest(mouse, i) - above_rest(mouse, i, 180))
        / (above_rest(mouse, i) + above_rest(mouse, i, 180))
        for i in range(12)
    ]
    assert 0 < opponent.sum() < 12
    assert np.mean(np.array(index)[opponent]) > 0.5 > np.mean(np.array(index)[~opponent])


def test_normalisation_is_monotone_and_saturates(mouse):
    for i in range(12):
        curve = np.array([above_rest(mouse, i, 0, c, bare=True) for c in (0.05, 0.1, 0.2, 0.4, 0.8)])
        assert (np.diff(curve) > 0).all()
        assert (
            curve[4] - curve[3] < 0.8 * curve[4]
        )  # proportional to the square of contrast it would be 0.75 or more


def test_a_mask_at_right_angles_suppresses_only_the_normalised(mouse):
    kind, neurons, scale = mouse
    steps = np.arange(60) / 30
    i = int(neurons["peak_rate"].argmax())
    n = neurons.iloc[i]
    own = screen.grating(n.direction, n.frequency, n.temporal_frequency * steps, 0.15)
    mask = screen.grating(n.direction + 90, n.frequency, n.temporal_frequency * steps, 0.6)
    alone, masked = (
        respond(kind, neurons.iloc[[i]], scale[[i]], film)[0, -30:].mean() - n.rest_rate
        for film in (own, own + mask)
    )
    assert masked < 0.8 * alone


def test_surround_index_is_what_is_stated(mouse):
    index = [1 - above_rest(mouse, i) / above_rest(mouse, i, bare=True) for i in range(12)]
    np.testing.assert_allclose(index, mouse[1]["surround_index"], atol=1e-3)


def test_running_suppresses_the_stated_cells(root):
    still = cortex.Behaviour(np.zeros(600), np.full(600, 1700.0), np.zeros((600, 2)), np.zeros(600, bool))
    runs = cortex.Behaviour(np.full(600, 30.0), np.full(600, 1700.0), np.zeros((600, 2)), np.zeros(600, bool))
    neurons = V1Like(suppressed=0.3).neurons(50, 0)
    ratio = np.array(
        [cortex.gain_of(runs, n)[-1] / cortex.gain_of(still, n)[-1] for _, n in neurons.iterrows()]
    )
    assert (ratio < 0.9).sum() == round(0.3 * len(neurons))
    assert (ratio > 1).sum() == len(neurons) - round(0.3 * len(neurons))
    assert (V1Like(suppressed=0.0).neurons(50, 0)["gain_running"] > 0).all()


def test_fast_gratings_equal_the_film(mouse):
    kind, neurons, _ = mouse
    film = screen.grating(35, 0.015, 2 * np.arange(60) / 30, 0.5)
    whole = kind.filter(film, neurons, [(0.0, 0.0)])[:, :, 0]
    np.testing.assert_allclose(swept(kind, neurons, 35, 0.015, 2.0, 0.5), whole, atol=1e-5)


# ---------------------------------------------------------------- a session of the same kind


def test_it_opens_and_all_truths_are_there(root):
    from cortexlit.data.allen import open_session

    session = open_session(A, cache_dir=root)
    truth = syn.load_truth(root, A)
    assert session.n_neurons == 8 and (truth["cell_id"] >= 970_000_000).all()
    assert read_json(root / "cortexlit.json")["population"]["version"] == 1
    assert truth["receptive_fields"].shape == (8, 3, 38, 76)
    for key in ("normalisation_pool", "surround_pool"):
        np.testing.assert_allclose(truth[key].astype(float).sum((1, 2)), 1, atol=0.05)
    for key in (
        "surround_index",
        "gain_running",
        "best_direction",
        "best_frequency",
        "best_rate",
        "osi",
        "dsi",
    ):
        assert np.isfinite(truth[key]).all(), key
    assert syn.load_truth(root, B)["expected_natural_scenes"].shape == (8, 13)


def test_same_seed_same_content_and_no_shared_id(root, tmp_path):
    twin = syn.write_session(tmp_path / "twin", "tiny", 0, V1Like())
    assert [content(twin, k) for k in (A, B)] == [content(root, k) for k in (A, B)]
    first = {*cortex.session_ids(0).values(), *cortex.session_ids(9_999).values()}
    assert not first & {A, B}


def test_embedded_session_is_kept_by_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr(pop, "generated", lambda *parts: tmp_path.joinpath(*parts))
    made = []
    monkeypatch.setattr(pop, "write_session", lambda root, *a: made.append(a) or root)
    plain, worn = pop.v1like_session("tiny"), pop.v1like_session("tiny", bleaching=0.3)
    assert plain != worn and [a[2] for a in made] == [V1Like(), V1Like(bleaching=0.3)]


# ---------------------------------------------------------------- options


def test_wear_is_off_by_default():
    neuron = V1Like().neurons(4, 0).iloc[0]
    assert (V1Like().brightness(neuron, 1000) == 1).all()


@settings(max_examples=25, deadline=None)
@given(bleaching=st.floats(0, 0.9), drift=st.floats(-20, 20))
def test_bleaching_and_drift_do_what_they_say(bleaching, drift):
    hour = int(3600 * screen.FRAME_RATE)
    neuron = V1Like().neurons(4, 0).iloc[0]
    kind = V1Like(bleaching=bleaching, drift=drift)
    bright = kind.brightness(neuron, hour + 1)
    assert bright[0] == 1 and (bright > 0).all()
    focus = np.exp(-((neuron.depth_um + drift) ** 2 - neuron.depth_um**2) / (2 * pop.FOCUS**2))
    np.testing.assert_allclose(bright[-1], (1 - bleaching) * focus, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(lost=st.floats(0, 1), cells=st.integers(4, 40))
def test_lost_cells_are_lost(lost, cells):
    mouse = V1Like(lost=lost).neurons(cells, 1)["cell_id"]
    both = set(mouse[:cells]) & set(mouse[-cells:])
    assert len(both) == max(0, cells - (len(mouse) - cells)) and len(mouse) == int(
        np.ceil((1 + lost) * cells)
    )


WRONG = [{"suppressed": -0.1}, {"selective": 1.2}, {"surround": 0.0}, {"surround": 1.0}, {"bleaching": 1.0},
         {"drift": 51.0}, {"lost": 2.0}, {"suppressed": float("nan")}, {"drift": float("inf")}]  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_bad_options_are_named(options):
    with pytest.raises(DataError, match=next(iter(options))):
        V1Like(**options)


@settings(max_examples=30, deadline=None)
@given(
    drive=st.floats(0, 1e4),
    near=st.floats(0, 50),
    far=st.floats(0, 50),
    weight=st.floats(0, 100),
    i=st.integers(0, 7),
)
def test_division_stays_between_nothing_and_all(drive, near, far, weight, i):
    neuron = V1Like().neurons(8, 2).iloc[i]
    r = divided(np.array([drive, near, far]), neuron, weight)
    assert 0 <= r <= 1 and r <= divided(np.array([drive, near, 0.0]), neuron, weight) + 1e-12
    assert r <= divided(np.array([drive, 0.0, 0.0]), neuron, 0.0) + 1e-12
