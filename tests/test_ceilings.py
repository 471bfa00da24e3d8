"""Ceilings against plain loops, against the theory of the additive Gaussian model, and what must raise."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError, rng
from cortexlit.evaluation.ceilings import leave_one_out_oracle, split_half_ceiling, split_half_reliability
from cortexlit.evaluation.intervals import score_interval
from cortexlit.metrics import mean_score

CHECKED = settings(max_examples=50, deadline=None)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gaussian(ratio, clips, repeats, neurons, frames, seed=0):
    g = np.random.default_rng(seed)
    clip = np.tile(np.arange(clips), repeats)
    signal = np.sqrt(ratio) * g.normal(size=(clips, neurons, frames))
    return signal[clip] + g.normal(size=(len(clip), neurons, frames)), clip


@st.composite
def recordings(draw):
    g = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = [draw(st.integers(2, 5)) for _ in range(draw(st.integers(1, 3)))]
    clip = g.permutation(np.repeat(np.array(["b", "a", "c"])[: len(counts)], counts))
    neurons, frames = draw(st.integers(1, 3)), draw(st.integers(3, 20))
    y = g.normal(size=(len(clip), neurons, frames)) + draw(st.sampled_from([0.0, 1e4]))
    if draw(st.booleans()):
        y[g.integers(len(clip)), g.integers(neurons)] = 0.1
    if draw(st.booleans()):
        y[:, 0] = 3.0
    return y.astype(draw(st.sampled_from([np.float32, np.float64]))), clip, draw(st.integers(2, frames))


def loop_oracle(y, clip, last):
    out = np.full(y.shape[:2], np.nan)
    y = y[..., -last:].astype(float)
    others = np.zeros(y.shape)
    for s in range(len(y)):
        others[s] = np.mean([y[t] for t in range(len(y)) if clip[t] == clip[s] and t != s], 0)
    for n in range(y.shape[1]):
        varies = [a.var(-1) > 1e-12 * (a**2).mean() for a in (others[:, n], y[:, n])]
        for s in np.flatnonzero(varies[1]):
            out[s, n] = np.corrcoef(others[s, n], y[s, n])[0, 1] if varies[0][s] else 0
    return out


def loop_split_half(y, clip, last, repeats, splits, seed):
    generator = rng(seed, "split halves")
    members = [np.flatnonzero(clip == c) for c in np.unique(clip)]
    half = min(map(len, members)) // 2
    raw = []
    for _ in range(splits):
        first, second = [], []
        for group in members:
            order = generator.permutation(group)
            first.append(y[order[:half], :, -last:].astype(float).mean(0))
            second.append(y[order[half : 2 * half], :, -last:].astype(float).mean(0))
        a, b = np.concatenate(first, -1), np.concatenate(second, -1)
        varies = (a.var(1) > 1e-10) & (b.var(1) > 1e-10)
        raw.append([np.corrcoef(a[n], b[n])[0, 1] if varies[n] else np.nan for n in range(len(a))])
    raw = np.mean(raw, 0)
    factor = repeats / half
    return np.sign(raw) * factor * np.abs(raw) / (1 + (factor - 1) * np.abs(raw))


@CHECKED
@given(recordings())
def test_oracle_equals_loop(case):
    y, clip, last = case
    np.testing.assert_allclose(
        leave_one_out_oracle(y, clip, last), loop_oracle(y, clip, last), rtol=0, atol=1e-9
    )


@CHECKED
@given(recordings(), st.integers(1, 12), st.integers(0, 5))
def test_split_half_equals_loop(case, repeats, seed):
    y, clip, last = case
    found = split_half_reliability(y, clip, last, repeats, splits=3, seed=seed)
    np.testing.assert_allclose(found, loop_split_half(y, clip, last, repeats, 3, seed), rtol=0, atol=1e-8)
    assert (np.isnan(found) | (np.abs(found) <= 1 + 1e-12)).all()


@pytest.mark.parametrize("ratio", [0.05, 0.5])
@pytest.mark.parametrize("repeats", [2, 3, 8])
def test_oracle_matches_theory(ratio, repeats):
    y, clip = gaussian(ratio, 40, repeats, 20, 200)
    expected = ratio / np.sqrt((ratio + 1) * (ratio + 1 / (repeats - 1)))
    assert mean_score(leave_one_out_oracle(y, clip)) == pytest.approx(expected, abs=0.008)


@pytest.mark.parametrize("repeats", [1, 4, 9])
def test_reliability_matches_theory(repeats):
    ratios = np.geomspace(0.02, 2, 12)
    y, clip = gaussian(ratios[:, None], 60, 9, 12, 200)
    found = split_half_reliability(y, clip, repeats=repeats)
    np.testing.assert_allclose(found, ratios / (ratios + 1 / repeats), atol=0.03)


def test_pure_noise_has_no_reliability():
    y, clip = gaussian(0.0, 20, 6, 200, 50)
    assert abs(mean_score(leave_one_out_oracle(y, clip))) < 0.005
    found = split_half_reliability(y, clip)
    assert abs(found.mean()) < 0.01 and (found < 0).any()


def test_default_length_and_odd_repeats():
    y, clip = gaussian(0.3, 10, 5, 4, 60)
    np.testing.assert_array_equal(split_half_reliability(y, clip), split_half_reliability(y, clip, repeats=5))
    fewer = np.delete(np.arange(50), [0, 10, 20])  # clip 0 has two repeats left, the others five
    np.testing.assert_array_equal(
        split_half_reliability(y[fewer], clip[fewer]),
        split_half_reliability(y[fewer], clip[fewer], repeats=2),
    )
    assert (split_half_reliability(y, clip, seed=1) != split_half_reliability(y, clip)).any()


def test_identical_repeats_are_perfectly_reliable():
    signal = np.random.default_rng(0).normal(size=(5, 3, 20))
    clip = np.repeat(np.arange(5), 4)
    np.testing.assert_allclose(leave_one_out_oracle(signal[clip], clip), 1)
    np.testing.assert_allclose(split_half_reliability(signal[clip], clip), 1)


def test_window_is_the_last_frames():
    y, clip = gaussian(1.0, 4, 3, 2, 30)
    noisy = y.copy()
    noisy[..., :20] = np.random.default_rng(1).normal(size=(12, 2, 20))
    for ceiling in (leave_one_out_oracle, split_half_reliability):
        np.testing.assert_allclose(ceiling(noisy, clip, 10), ceiling(y, clip, 10))


Y, CLIP = gaussian(1.0, 2, 2, 2, 10)
HOLES = np.where(np.arange(10) == 4, np.nan, Y)


@pytest.mark.parametrize("ceiling", [leave_one_out_oracle, split_half_reliability])
@pytest.mark.parametrize(
    "arguments, words",
    [
        ((Y[0], CLIP), "samples, neurons, frames"),
        ((Y, CLIP[:2]), "one clip id per sample"),
        ((Y, [0, 1, 2, 2]), "two or more repeats"),
        ((Y, CLIP, 1), "2 to 10"),
        ((HOLES, CLIP), "labels: nan at sample 0, neuron 0, frame 4"),
    ],
)
def test_wrong_input_raises(ceiling, arguments, words):
    with pytest.raises(DataError, match=words):
        ceiling(*arguments)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"splits": 0}])
def test_counts_must_be_positive(options):
    with pytest.raises(DataError, match="1 or more"):
        split_half_reliability(Y, CLIP, **options)


@pytest.mark.parametrize("repeats", [1, 4, None])
def test_split_half_ceiling_is_the_root_of_the_reliability(repeats):
    y, clip = gaussian(np.geomspace(0.02, 2, 6)[:, None], 12, 6, 6, 30)
    table = split_half_ceiling(y, clip, last=20, repeats=repeats)
    rho = split_half_reliability(y, clip, last=20, repeats=repeats)
    assert table.shape == (12, 6)
    np.testing.assert_allclose(table.mean(0), np.sign(rho) * np.sqrt(abs(rho)), atol=1e-9)


def test_split_half_ceiling_of_constant_neurons_and_of_one_clip():
    y, clip = gaussian(0.5, 6, 4, 3, 30)
    y[:, 1] = 2.0
    table = split_half_ceiling(y, clip)
    assert np.isnan(table[:, 1]).all() and np.isfinite(table[:, [0, 2]]).all()
    assert split_half_ceiling(y[clip == 0], clip[clip == 0]).shape == (1, 3)


@pytest.mark.parametrize("clips", [6, 30])
def test_the_interval_of_a_split_half_ceiling_covers_the_truth(clips):
    "Neurons whose signal differs by clip and by neuron; the truth is that of many clips."
    g, covered, runs = np.random.default_rng(0), 0, 60
    for _ in range(runs):
        strength = g.gamma(2, 0.2, (1, 20, 1)) * g.gamma(4, 0.25, (clips, 1, 1))
        signal = np.sqrt(strength) * g.normal(size=(clips, 20, 40))
        clip = np.tile(np.arange(clips), 8)
        y = signal[clip] + g.normal(size=(len(clip), 20, 40))
        low, high = score_interval(split_half_ceiling(y, clip, splits=5))
        s = g.gamma(2, 0.2, 20000)  # mean strength over clips is 1
        covered += low <= np.mean(np.sqrt(s / (s + 1))) <= high
    assert covered >= 0.88 * runs
