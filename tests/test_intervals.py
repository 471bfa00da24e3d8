"""Intervals of scores: what they count, what they refuse, and that they hold for clips, neurons and seeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from cortexlit.core import DataError
from cortexlit.evaluation.intervals import MIN_CLIPS, contributions, paired_difference, score_interval, spread
from cortexlit.metrics import mean_score


def tables(seed=0, shape=(6, 5)):
    return np.random.default_rng(seed).normal(size=shape)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(1, 6),
    st.sampled_from([0, 0.3, 0.7]),
)
def test_contributions_sum_to_nothing_and_the_mean_is_mean_score(seed, seeds, clips, neurons, holes):
    g = np.random.default_rng(seed)
    values = g.normal(size=(seeds, 2 * clips, neurons))
    values[:, g.random(values.shape[1:]) < holes] = np.nan
    if np.isnan(values).all():
        return
    mean, each = contributions(values, np.tile(np.arange(clips), 2))
    assert each.shape == (seeds, clips, neurons) and each.sum() == pytest.approx(0, abs=1e-9)
    assert mean == pytest.approx(np.mean([mean_score(v) for v in values]))


def test_the_variance_is_the_one_of_the_textbook():
    "Two crossed directions without interaction, in plain loops."
    x = tables(1, (7, 9))
    clip, neuron = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    squares = [
        9 * ((clip - x.mean()) ** 2).sum() / 6,
        7 * ((neuron - x.mean()) ** 2).sum() / 8,
        ((x - clip - neuron + x.mean()) ** 2).sum() / 48,
    ]
    found = spread(contributions(x[None])[1][None])
    assert [part[0, 0] * 63 for _, part, _ in found.parts] == pytest.approx(squares)
    assert [freedom for *_, freedom in found.parts] == [6, 8, 48]
    largest = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    assert found.error[0] ** 2 * 63 == pytest.approx(largest)


def test_one_neuron_is_students_t():
    x = tables(2, (8, 1))
    low, high = score_interval(x, draws=20_000)
    assert (high - low) / 2 == pytest.approx(t.ppf(0.975, 7) * x.std(ddof=1) / np.sqrt(8), rel=0.03)


def test_edges():
    values = tables(3, (8, 5))
    assert score_interval(values, seed=1) == score_interval(values, seed=1) != score_interval(values, seed=2)
    low, high = score_interval(values)
    inner = score_interval(values, level=0.5)
    assert low < inner[0] < values.mean() < inner[1] < high
    assert np.isnan(score_interval(np.full((8, 3), np.nan))).all()
    assert np.isnan(score_interval(values[: MIN_CLIPS - 1])).all()
    assert np.isfinite(score_interval(values[:MIN_CLIPS])).all()
    assert np.isnan(score_interval(values, groups=np.zeros(8))).all()
    np.testing.assert_allclose(score_interval(np.full((6, 4), 0.25)), 0.25)


def test_repeats_travel_together():
    "Doubling every row must not narrow the interval when the copies are repeats of one clip."
    values = tables(4, (15, 1)) + np.zeros((1, 30))
    doubled, groups = np.repeat(values, 2, 0), np.repeat(np.arange(15), 2)
    widths = [np.diff(score_interval(*args)) for args in ((values,), (doubled, groups), (doubled,))]
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] < 0.8 * widths[0]


@pytest.mark.parametrize(("clip", "neuron", "rest"), [(1, 0.2, 1), (0.3, 1, 1), (0, 0, 1), (0.5, 1.6, 2)])
def test_intervals_hold_what_they_promise(clip, neuron, rest):
    "Six clips, 64 neurons: 95 % within what 300 tables can tell (four standard errors below)."
    g, hits = np.random.default_rng(5), 0
    for k in range(300):
        x = clip * g.normal(size=(6, 1)) + neuron * g.normal(size=64) + rest * g.normal(size=(6, 64))
        low, high = score_interval(x, draws=300, seed=k)
        hits += low < 0 < high
    assert hits / 300 > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300)


def test_noise_alone_is_not_counted_twice():
    g = np.random.default_rng(6)
    widths = [np.diff(score_interval(g.normal(size=(20, 40))))[0] for _ in range(60)]
    assert np.mean(widths) / (2 * 1.96 / np.sqrt(800)) < 1.25  # drawing clips and neurons anew: 1.7


def test_seeds_are_a_direction():
    g = np.random.default_rng(7)
    values = g.normal(size=(5, 1, 1)) + 0.01 * g.normal(size=(5, 8, 10))
    low, high = score_interval(values)
    expected = t.ppf(0.975, 4) * values.mean((1, 2)).std(ddof=1) / np.sqrt(5)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)


def test_the_spread_of_two_seeds_may_be_small_by_luck():
    "It has one degree of freedom, so an interval over two seeds reaches further, in errors, than one over five."
    g, reach = np.random.default_rng(0), {1: [], 2: [], 5: []}
    for _ in range(10):
        for seeds, found in reach.items():
            x = g.normal(size=(seeds, 12, 30))
            low, high = score_interval(x)
            found.append((high - low) / 2 / spread(contributions(x)[1][None]).error[0])
    one, two, five = (np.median(found) for found in reach.values())
    assert two > 1.3 * five and five < 1.3 * one


def test_paired_difference_uses_common_entries():
    a = tables(8, (10, 6))
    b = a - 0.5
    b[:, 0] = np.nan
    assert paired_difference(a, b) == pytest.approx((0.5, 0.5, 0.5))
    assert paired_difference(b, a) == pytest.approx((-0.5, -0.5, -0.5))
    b[:, :4] = np.nan
    with pytest.raises(DataError, match="share"):
        paired_difference(a, b)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: score_interval(tables()[0]), "reduce="),
        (lambda: score_interval(tables(), groups=[1]), "one id per sample"),
        (lambda: score_interval(tables(), level=95), "level"),
        (lambda: score_interval(tables() * np.inf), "infinite"),
        (lambda: paired_difference(tables(), tables()[0]), "equal shapes"),
    ],
)
def test_what_has_no_interval(call, words):
    with pytest.raises(DataError, match=words):
        call()
