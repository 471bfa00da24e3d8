"""Metrics against plain loops on generated inputs, known answers on simulated truth, and what must raise."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError
from cortexlit.metrics import (
    CONSTANT,
    cc_norm,
    correlation_to_average,
    explainable_variance,
    feve,
    flattened_correlation,
    mean_score,
    r2_er,
    single_trial_correlation,
)

CHECKED = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def no_warnings():
    "A metric of odd input returns NaN or raises; it never warns."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- plain references -------------------------------------------------------------------------------------


def constant(x, scale):
    "No variance beside the mean square of the neuron."
    return len(x) == 0 or np.sum((x - np.mean(x)) ** 2) <= CONSTANT * len(x) * scale


def pearson(x, y, scales):
    "One correlation with NumPy: NaN where the label y is constant, 0 where the prediction x alone is."
    x, y = np.asarray(x, float), np.asarray(y, float)
    if constant(y, scales[1]):
        return np.nan
    return 0.0 if constant(x, scales[0]) else np.corrcoef(x, y)[0, 1]


def mean_square(traces):
    "Of all values of one neuron."
    values = np.concatenate([np.asarray(t, float) for t in traces])
    return np.mean(values**2) if len(values) else 0.0


def loop_single(p, y, last, skip=False):
    out = np.empty(y.shape[:2])
    for n in range(y.shape[1]):
        traces = []
        for s in range(y.shape[0]):
            a, b = p[s, n, -last:].astype(float), y[s, n, -last:].astype(float)
            if skip:
                keep = ~(np.isnan(a) | np.isnan(b))
                a, b = a[keep], b[keep]
            traces.append((a, b))
        scales = [mean_square(each) for each in zip(*traces, strict=True)]
        out[:, n] = [pearson(a, b, scales) for a, b in traces]
    return out


def loop_flat(p, y, last, skip=False):
    out = []
    for n in range(y.shape[1]):
        a, b = (np.concatenate([trial[n, -last:].astype(float) for trial in x]) for x in (p, y))
        if skip:
            keep = ~(np.isnan(a) | np.isnan(b))
            a, b = a[keep], b[keep]
        out.append(pearson(a, b, (mean_square([a]), mean_square([b]))))
    return np.array(out)


def loop_average(x, clip):
    members = [[s for s in range(len(x)) if clip[s] == c] for c in sorted(set(clip))]
    return np.stack([np.mean([x[s].astype(float) for s in group], 0) for group in members])


def loop_variances(y, clip, last):
    total, noise = [], []
    for n in range(y.shape[1]):
        values = [float(v) for trial in y for v in trial[n, -last:]]
        total.append(np.var(values, ddof=1))
        summed = 0.0
        for c in set(clip):
            trials = np.array([y[s, n, -last:] for s in range(len(y)) if clip[s] == c], float)
            for frame in range(last):
                summed += len(trials) * np.var(trials[:, frame], ddof=1)
        noise.append(summed / (len(y) * last))
    return np.array(total), np.array(noise)


def loop_feve(p, y, clip, last, threshold):
    total, noise = loop_variances(y, clip, last)
    out = []
    for n in range(y.shape[1]):
        if (
            constant(y[:, n, -last:].ravel().astype(float), mean_square(y[:, n, -last:]))
            or (total[n] - noise[n]) / total[n] <= threshold
        ):
            out.append(np.nan)
            continue
        error = np.mean(
            [
                (float(p[s, n, -t]) - float(y[s, n, -t])) ** 2
                for s in range(len(y))
                for t in range(1, last + 1)
            ]
        )
        out.append(1 - (error - noise[n]) / (total[n] - noise[n]))
    return np.array(out)


def schoppe(x, responses):
    "CC_norm of one stimulus and its signal power, as published: x (frames,), responses (repeats, frames)."
    repeats, y = len(responses), responses.mean(0)
    power = (np.var(responses.sum(0)) - np.var(responses, axis=1).sum()) / (repeats * (repeats - 1))
    return np.mean((x - x.mean()) * (y - y.mean())), np.var(x), power


# --- generated inputs -------------------------------------------------------------------------------------


@st.composite
def pairs(draw, repeats=False, missing=False):
    "Predictions and labels with constants, offsets, both float types, and optionally repeats or NaN."
    seed = draw(st.integers(0, 2**32 - 1))
    g = np.random.default_rng(seed)
    neurons, frames = draw(st.integers(1, 4)), draw(st.integers(3, 24))
    if repeats:
        counts = [draw(st.integers(2, 4)) for _ in range(draw(st.integers(1, 3)))]
        clip = g.permutation(np.repeat(np.arange(len(counts)) * 7, counts))
    else:
        clip = np.arange(draw(st.integers(1, 5)))
    shape = (len(clip), neurons, frames)
    signal = g.normal(size=(int(clip.max()) + 1, neurons, frames))[clip]
    p, y = signal + 0.5 * g.normal(size=shape), signal + g.normal(size=shape)
    for x in (p, y):
        x *= draw(st.sampled_from([1.0, 1e-2, 1e3]))
        x += draw(st.sampled_from([0.0, 1.0, -50.0, 1e4]))
        if draw(st.booleans()):
            x[g.integers(len(clip)), g.integers(neurons)] = draw(st.sampled_from([0.0, 0.1, 1e6]))
        if draw(st.booleans()):
            x[:, g.integers(neurons)] = 3.0
        if missing:
            x[g.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = np.nan
    kind = draw(st.sampled_from([np.float32, np.float64]))
    last = draw(st.integers(2, frames))
    return p.astype(kind), y.astype(kind), clip, last


def agree(found, expected, atol=1e-9):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, equal_nan=True)


# --- single-trial and flattened ---------------------------------------------------------------------------


@CHECKED
@given(pairs())
def test_single_trial_equals_loop(case):
    p, y, _, last = case
    found = single_trial_correlation(p, y, last, reduce=None)
    agree(found, loop_single(p, y, last))
    swapped = single_trial_correlation(y, p, last, reduce=None)  # differs where one of the two is constant
    agree(np.nan_to_num(swapped), np.nan_to_num(found))
    rows = [np.nanmean(row) for row in found if not np.isnan(row).all()]
    agree(single_trial_correlation(p, y, last), np.mean(rows) if rows else np.nan)


@CHECKED
@given(pairs(missing=True))
def test_skip_equals_loop(case):
    p, y, _, last = case
    agree(single_trial_correlation(p, y, last, None, "skip"), loop_single(p, y, last, skip=True))
    agree(flattened_correlation(p, y, last, None, "skip"), loop_flat(p, y, last, skip=True))


@CHECKED
@given(pairs())
def test_flattened_equals_loop(case):
    p, y, _, last = case
    agree(flattened_correlation(p, y, last, reduce=None), loop_flat(p, y, last))


def test_large_float32_offset():
    "Float64 accumulation: a trace on an offset of 10^6 keeps the correlation of its stored values."
    g = np.random.default_rng(0)
    y = (1e6 + 10 * g.normal(size=(5, 3, 140))).astype(np.float32)
    p = (y + 5 * g.normal(size=y.shape)).astype(np.float32)
    agree(single_trial_correlation(p, y, 66, reduce=None), loop_single(p, y, 66))
    agree(flattened_correlation(p, y, 66, reduce=None), loop_flat(p, y, 66))


def test_blocks_cover_every_entry():
    "Shapes beyond one block in either direction, and a strided view of a memory map."
    g = np.random.default_rng(1)
    for shape in [(3, 700, 140), (300, 5, 140), (2, 3, 70_000)]:
        p, y = g.normal(size=(2, *shape)).astype(np.float32)
        found = single_trial_correlation(p, y, reduce=None)
        z = [
            (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
            for x in (p.astype(float), y.astype(float))
        ]
        agree(found, (z[0] * z[1]).mean(-1))


def test_memory_map_and_integers(tmp_path):
    g = np.random.default_rng(2)
    y = g.normal(size=(4, 6, 30)).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    mapped = np.load(tmp_path / "y.npy", mmap_mode="r")
    spikes = g.poisson(2, y.shape)
    agree(single_trial_correlation(spikes, mapped, 20, reduce=None), loop_single(spikes, y, 20))


def test_inputs_are_not_changed():
    g = np.random.default_rng(3)
    p, y, clip = g.normal(size=(4, 2, 9)) + 1e4, g.normal(size=(4, 2, 9)), np.array([0, 0, 1, 1])
    before = p.copy(), y.copy()
    for metric in (single_trial_correlation, flattened_correlation):
        metric(p, y)
    for metric in (correlation_to_average, feve, cc_norm):
        metric(p, y, clip)
    assert (p == before[0]).all() and (y == before[1]).all()


def test_undefined_entries():
    y = np.random.default_rng(4).normal(size=(3, 2, 20))
    p = y.copy()
    p[0, 0] = 0.1
    y[1, 1] = 7.0
    found = single_trial_correlation(p, y, reduce=None)
    assert np.isnan(found).tolist() == [[False, False], [False, True], [False, False]]
    assert found[0, 0] == 0  # the prediction alone is constant
    assert single_trial_correlation(np.ones_like(y), y) == 0
    tiny = np.ones((1, 2, 4))  # beside a mean square of 1
    tiny[0, 0, ::2] += 1.9e-6  # variance 0.9e-12
    tiny[0, 1, ::2] += 2.1e-6  # variance 1.1e-12
    ramp = np.tile([0.0, 1, 2, 3], (1, 2, 1))
    assert np.isnan(single_trial_correlation(ramp, tiny, reduce=None)).tolist() == [[True, False]]
    assert (single_trial_correlation(tiny, ramp, reduce=None) == 0).tolist() == [[True, False]]


def test_order_of_averaging():
    table = np.array([[0.9, np.nan], [0.1, 0.3]])
    assert mean_score(table) == pytest.approx((0.9 + 0.2) / 2)
    assert mean_score([0.5, np.nan]) == 0.5
    assert np.isnan(mean_score([[np.nan]]))
    y = np.array([[[0, 1, 2, 3.0], [1, 1, 1, 1]], [[3, 2, 1, 0.0], [0, 1, 2, 3]]])
    p = np.tile(np.arange(4.0), (2, 2, 1))
    assert single_trial_correlation(p, y) == pytest.approx((1 + 0) / 2)  # pooled it would be 1/3


@CHECKED
@given(st.floats(0.1, 50), st.floats(-100, 100), st.integers(0, 10**6))
def test_invariant_to_positive_scale_and_shift(scale, shift, seed):
    g = np.random.default_rng(seed)
    y, clip = g.normal(size=(4, 3, 15)), np.array([0, 1, 0, 1])
    p = y + g.normal(size=y.shape)
    for metric in (single_trial_correlation, flattened_correlation):
        agree(metric(scale * p + shift, y, reduce=None), metric(p, y, reduce=None))
        agree(metric(p, scale * y + shift, reduce=None), metric(p, y, reduce=None))
        agree(metric(-p, y, reduce=None), -metric(p, y, reduce=None))
    for metric in (correlation_to_average, cc_norm):
        agree(metric(scale * p + shift, y, clip, reduce=None), metric(p, y, clip, reduce=None))
        agree(metric(p, scale * y + shift, clip, reduce=None), metric(p, y, clip, reduce=None), 1e-7)
    together = feve(scale * p + shift, scale * y + shift, clip, threshold=0, reduce=None)
    agree(together, feve(p, y, clip, threshold=0, reduce=None), 1e-6)


# --- metrics that need repeats ----------------------------------------------------------------------------


@CHECKED
@given(pairs(repeats=True))
def test_correlation_to_average_equals_loop(case):
    p, y, clip, last = case
    expected = loop_flat(loop_average(p, clip), loop_average(y, clip), last)
    agree(correlation_to_average(p, y, clip, last, reduce=None), expected)


@CHECKED
@given(pairs(repeats=True), st.sampled_from([0.0, 0.15, 0.5]))
def test_feve_equals_loop(case, threshold):
    p, y, clip, last = case
    total, noise = loop_variances(y, clip, last)
    if (np.abs(total - noise - threshold * total) < 1e-9 * total).any():
        return  # on the threshold: rounding decides
    found, expected = (
        f(p, y, clip, last, threshold) if f is loop_feve else f(p, y, clip, last, threshold, None)
        for f in (feve, loop_feve)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    varies = ~np.array(
        [
            constant(v, mean_square([v]))
            for v in y[..., -last:].swapaxes(0, 1).reshape(y.shape[1], -1).astype(float)
        ]
    )
    fraction = np.where(varies, (total - noise) / np.where(varies, total, 1), np.nan)
    np.testing.assert_allclose(
        explainable_variance(y, clip, last), fraction, rtol=0, atol=1e-9, equal_nan=True
    )


@CHECKED
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(3, 40), st.sampled_from([0.0, 100.0]))
def test_cc_norm_of_one_clip_is_schoppes(seed, repeats, frames, offset):
    g = np.random.default_rng(seed)
    y = offset + g.normal(size=(3, frames)) + g.normal(size=(repeats, 3, frames))
    x = g.normal(size=(3, frames))
    found = cc_norm(np.tile(x, (repeats, 1, 1)), y, np.zeros(repeats), reduce=None)
    for n in range(3):
        covariance, variance, power = schoppe(x[n], y[:, n])
        if power > 1e-6:
            np.testing.assert_allclose(found[n], covariance / np.sqrt(variance * power), rtol=1e-6)
        elif power < 0:
            assert np.isnan(found[n])


def test_cc_norm_of_many_clips_is_schoppes_averaged_over_pairings():
    "Which repeat of clip 1 goes with which of clip 2 is arbitrary: ours is the mean over all pairings."
    g = np.random.default_rng(5)
    signal = 2 * g.normal(size=(2, 1, 12))
    y = signal[[0, 0, 1, 1]] + g.normal(size=(4, 1, 12)) + g.normal(size=(4, 1, 1))
    x = signal[:, 0].ravel()
    terms = [schoppe(x, np.stack([np.r_[y[0, 0], y[2 + k, 0]], np.r_[y[1, 0], y[3 - k, 0]]])) for k in (0, 1)]
    covariance, variance, power = np.mean(terms, 0)
    found = cc_norm(signal[[0, 0, 1, 1]], y, [0, 0, 1, 1], reduce=None)[0]
    assert found == pytest.approx(covariance / np.sqrt(variance * power), rel=1e-9)
    order = [3, 0, 2, 1]
    again = cc_norm(
        signal[[0, 0, 1, 1]][order], y[order], np.array(["a", "a", "b", "b"])[order], reduce=None
    )[0]
    assert again == pytest.approx(found, rel=1e-9)


def test_signal_power_is_unbiased_for_slow_noise():
    "Autocorrelated noise and unequal repeats: the mean of the estimated power is the true variance."
    g = np.random.default_rng(6)
    clip = np.repeat([0, 1, 2], [2, 3, 4])
    signal = g.normal(size=(3, 1, 20))
    truth = signal.transpose(1, 0, 2).ravel().var()
    noise = np.cumsum(g.normal(size=(9, 4000, 20)), -1) * 0.3 + g.normal(size=(9, 4000, 1))
    y = signal[clip] + noise
    from cortexlit.metrics import _average_moments, _merged, _noise_power, _power, repeats_of

    groups = repeats_of(clip, 9)
    average = loop_average(y, clip).transpose(1, 0, 2).reshape(4000, -1).var(1)
    moments = _average_moments(y, y, groups)
    count, _, squares, _ = _merged(*moments)
    power = _power(_noise_power(y, groups), count, squares)
    assert abs(power.mean() - truth) < 4 * power.std() / np.sqrt(4000)
    assert average.mean() - truth > 20 * power.std() / np.sqrt(4000)  # without the correction: far off


def test_r2_er_is_pospisil_and_bairs_for_one_frame_per_stimulus():
    "Their equation, with the noise of each stimulus by itself."
    g = np.random.default_rng(5)
    stimuli, repeats = 30, 4
    signal = g.normal(size=stimuli)
    nu, y = signal + g.normal(size=stimuli), signal + g.normal(size=(repeats, stimuli))
    nu_c, mean = nu - nu.mean(), y.mean(0)
    noise = y.var(0, ddof=1) / repeats
    top = (nu_c @ mean) ** 2 - (nu_c**2 * noise).sum()
    power = ((mean - mean.mean()) ** 2).sum() - noise.sum() * (stimuli - 1) / stimuli
    clip = np.tile(np.arange(stimuli), repeats)
    found = r2_er(nu[clip][:, None, None], y.reshape(-1, 1, 1), clip, reduce=None)
    np.testing.assert_allclose(found, top / ((nu_c**2).sum() * power), rtol=1e-9)


def test_known_answers():
    "The true signal as prediction, white noise of known size, 60 clips: all five scores are known."
    g = np.random.default_rng(7)
    repeats, noise = 5, 2.0  # signal variance 1, noise variance 4
    signal, clip = g.normal(size=(60, 30, 66)), np.repeat(np.arange(60), repeats)
    p = signal[clip]
    y = p + noise * g.normal(size=p.shape)
    assert single_trial_correlation(p, y) == pytest.approx(np.sqrt(1 / 5), abs=0.01)
    assert flattened_correlation(p, y) == pytest.approx(np.sqrt(1 / 5), abs=0.01)
    assert correlation_to_average(p, y, clip) == pytest.approx(np.sqrt(1 / (1 + 4 / repeats)), abs=0.01)
    assert explainable_variance(y, clip).mean() == pytest.approx(1 / 5, abs=0.01)
    assert feve(p, y, clip) == pytest.approx(1, abs=0.02)
    assert feve(0.5 * p, y, clip) == pytest.approx(0.75, abs=0.02)
    assert cc_norm(p, y, clip) == pytest.approx(1, abs=0.01)
    other = (signal + g.normal(size=signal.shape))[clip]
    assert cc_norm(other, y, clip) == pytest.approx(np.sqrt(0.5), abs=0.01)
    assert feve(other, y, clip) == pytest.approx(0, abs=0.03)


def test_predictions_may_differ_between_repeats():
    g = np.random.default_rng(8)
    clip = np.repeat(np.arange(6), 3)
    p, y = g.normal(size=(2, 18, 2, 30))
    averaged = loop_average(p, clip)[clip]
    agree(
        correlation_to_average(p, y, clip, reduce=None),
        correlation_to_average(averaged, y, clip, reduce=None),
    )
    agree(cc_norm(p, y, clip, reduce=None), cc_norm(averaged, y, clip, reduce=None))


# --- what must raise --------------------------------------------------------------------------------------

Y = np.random.default_rng(0).normal(size=(4, 2, 10))
CLIP = [0, 0, 1, 1]


@pytest.mark.parametrize(
    "metric", [single_trial_correlation, flattened_correlation, correlation_to_average, feve, cc_norm, r2_er]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_not_finite_raises(metric, bad, which):
    arrays = [Y.copy(), Y.copy()]
    arrays[which][2, 1, 7] = bad
    extra = [] if metric in (single_trial_correlation, flattened_correlation) else [CLIP]
    with pytest.raises(DataError, match=["predictions", "labels"][which] + ".*sample 2, neuron 1, frame 7"):
        metric(*arrays, *extra)
    metric(*arrays, *extra, last=2)  # not in the window, no harm


def test_infinity_is_never_skipped():
    bad = Y.copy()
    bad[0, 0, 0] = np.inf
    with pytest.raises(DataError, match="inf at sample 0, neuron 0, frame 0"):
        single_trial_correlation(Y, bad, missing="skip")


def test_overflow_raises():
    with pytest.raises(DataError, match="overflow"):
        single_trial_correlation(Y * 1e200, Y)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: single_trial_correlation(Y[0], Y[0]), "samples, neurons, frames"),
        (lambda: single_trial_correlation(Y, Y[:, :1]), "equal shapes"),
        (lambda: single_trial_correlation(Y.astype(str), Y), "numbers"),
        (lambda: single_trial_correlation(Y[:0], Y[:0]), "none empty"),
        (lambda: single_trial_correlation(Y, Y, 1), "2 to 10"),
        (lambda: single_trial_correlation(Y, Y, 11), "2 to 10"),
        (lambda: single_trial_correlation(Y, Y, reduce="sum"), "'mean', None"),
        (lambda: single_trial_correlation(Y, Y, missing="ignore"), "'raise' or 'skip'"),
        (lambda: flattened_correlation(Y, Y, missing=None), "'raise' or 'skip'"),
        (lambda: correlation_to_average(Y, Y, [0, 1, 2, 3]), "two or more repeats"),
        (lambda: feve(Y, Y, [0, 0, 1, 2]), "2 of 3 clips"),
        (lambda: cc_norm(Y, Y, [0, 0, 0]), "one clip id per sample"),
        (lambda: explainable_variance(Y, [0, 1, 1, 1]), "two or more repeats"),
        (lambda: feve(Y, Y, CLIP, threshold=1), "below 1"),
        (lambda: mean_score(1.0), r"\(samples, neurons\)"),
    ],
)
def test_wrong_input_says_what_to_do(call, words):
    with pytest.raises(DataError, match=words):
        call()


# --- abstaining, units, and what a row adds ---------------------------------------------------------------


def test_a_constant_prediction_scores_zero():
    y = np.random.default_rng(0).normal(size=(6, 5, 30))
    flat = np.broadcast_to(y.mean((0, 2), keepdims=True), y.shape)
    clip = np.repeat(np.arange(3), 2)
    for values in (
        single_trial_correlation(flat, y, reduce=None),
        flattened_correlation(flat, y, reduce=None),
        correlation_to_average(flat, y, clip, reduce=None),
        cc_norm(flat, y + np.arange(3)[clip][:, None, None], clip, reduce=None),
        r2_er(flat, y + np.arange(3)[clip][:, None, None], clip, reduce=None),
    ):
        assert (values[np.isfinite(values)] == 0).all() and np.isfinite(values).any()
    assert np.isnan(single_trial_correlation(y, flat, reduce=None)).all()  # a constant label has no score


def test_abstaining_does_not_pay():
    "Constant for the neurons it knows least, a model must not score higher than the honest one."
    g = np.random.default_rng(1)
    y = g.normal(size=(20, 40, 50))
    honest = y * np.linspace(0, 0.5, 40)[:, None] + g.normal(size=y.shape)
    silent = np.where(np.arange(40)[:, None] < 30, 0.0, honest)
    for metric in (single_trial_correlation, flattened_correlation):
        assert metric(silent, y) < metric(honest, y)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_scores_do_not_depend_on_units(factor):
    g = np.random.default_rng(2)
    y, clip = g.normal(size=(8, 5, 30)) * (g.random((8, 5, 1)) < 0.7), np.repeat(np.arange(4), 2)
    p = y + g.normal(size=y.shape) * (g.random((8, 5, 1)) < 0.7)
    for metric in (single_trial_correlation, flattened_correlation):
        for a, b in ((factor * p, y), (p, factor * y)):
            np.testing.assert_allclose(
                metric(a, b, reduce=None), metric(p, y, reduce=None), rtol=1e-6, atol=1e-9
            )
    for metric in (correlation_to_average, cc_norm, r2_er):
        np.testing.assert_allclose(
            metric(factor * p, factor * y, clip, reduce=None),
            metric(p, y, clip, reduce=None),
            rtol=1e-6,
            atol=1e-9,
        )
    np.testing.assert_allclose(
        feve(factor * p, factor * y, clip, reduce=None), feve(p, y, clip, reduce=None), rtol=1e-6
    )
    np.testing.assert_allclose(
        explainable_variance(factor * y, clip), explainable_variance(y, clip), rtol=1e-6
    )


@pytest.mark.parametrize("metric", [flattened_correlation, correlation_to_average, feve, cc_norm, r2_er])
def test_shares_average_to_the_value_and_are_those_of_left_out_clips(metric):
    g = np.random.default_rng(3)
    signal, clip = g.normal(size=(8, 5, 40)), np.concatenate([np.tile(np.arange(8), 4), [2, 5, 5]])
    y = signal[clip] + g.normal(size=(35, 5, 40))
    p = (signal + g.normal(size=signal.shape))[clip]

    def score(keep, reduce):
        return metric(p[keep], y[keep], clip=clip[keep], reduce=reduce)

    everything = np.ones(35, bool)
    value, table = score(everything, None), score(everything, "table")
    np.testing.assert_allclose(table.mean(0), value, atol=1e-9)
    left = np.stack([score(clip != c, None) for c in range(8)])
    # r2_er keeps the prediction's mean over all clips where it takes noise away: equal but for that
    np.testing.assert_allclose(
        table - value, 7 * (left.mean(0) - left), atol=2e-3 if metric is r2_er else 1e-9
    )


def test_the_shares_of_samples_are_those_of_clips_that_were_shown_once():
    g = np.random.default_rng(4)
    y, p = g.normal(size=(2, 6, 3, 20))
    given = flattened_correlation(p, y, reduce="table", clip=np.arange(6))
    np.testing.assert_array_equal(given, flattened_correlation(p, y, reduce="table"))
    with pytest.raises(DataError, match="one clip id per sample"):
        flattened_correlation(p, y, reduce="table", clip=np.arange(5))
    one = flattened_correlation(p, y, reduce="table", clip=np.zeros(6, int))  # nothing to leave out
    np.testing.assert_allclose(one, flattened_correlation(p, y, reduce=None)[None])


@pytest.mark.parametrize("metric", [flattened_correlation, correlation_to_average, cc_norm, r2_er])
def test_a_neuron_that_is_active_in_one_clip_alone_has_finite_shares(metric):
    g = np.random.default_rng(5)
    signal, clip = g.normal(size=(6, 3, 30)), np.repeat(np.arange(6), 4)
    y = signal[clip] + 0.5 * g.normal(size=(24, 3, 30))
    y[clip != 2, 1] = 0
    table = metric(signal[clip], y, clip=clip, reduce="table")
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table.mean(0), metric(signal[clip], y, clip=clip, reduce=None))
