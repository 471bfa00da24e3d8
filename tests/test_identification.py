"""Ranks, exact intervals, permutations and calibration against plain loops and known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from cortexlit.core import DataError, rng
from cortexlit.evaluation.decoding import identification_ranks
from cortexlit.evaluation.identification import (
    binomial_interval,
    calibration_error,
    class_ranks,
    identification_rows,
    reliability_curve,
    score_identification,
)
from cortexlit.evaluation.scores import ScoreSheet


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), levels=st.integers(1, 12))
def test_ranks_count_what_is_larger_and_half_of_what_is_equal(seed, classes, levels):
    scores = np.random.default_rng(seed).integers(0, levels, (6, classes)).astype(float)
    ranks = class_ranks(scores)
    for row, own in zip(scores, ranks, strict=True):
        for value, rank in zip(row, own, strict=True):
            assert rank == (row > value).sum() + ((row == value).sum() - 1) / 2
    np.testing.assert_allclose(ranks.sum(1), classes * (classes - 1) / 2)


def test_ranks_are_those_of_features_that_are_the_classes():
    draw = rng(0, "ranks")
    scores, shown = draw.normal(size=(30, 7)), draw.integers(0, 7, 30)
    same = identification_ranks(scores, np.eye(7), shown)
    np.testing.assert_allclose(class_ranks(scores)[np.arange(30), shown], same)


@pytest.mark.parametrize(("hits", "n"), [(0, 157), (1, 157), (2, 157), (3, 157), (157, 157), (40, 90)])
def test_interval_is_that_of_the_beta_quantiles(hits, n):
    share, low, high = binomial_interval(hits, n)
    assert share == hits / n
    assert low == pytest.approx(beta.ppf(0.025, hits, n - hits + 1) if hits else 0)
    assert high == pytest.approx(beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1)


def test_published_numbers():
    "1.27, 1.91 and .64 % are 2, 3 and 1 hits of 157; the interval of each holds the 10 / 720 of guessing."
    for percent, hits in ((1.27, 2), (1.91, 3), (0.64, 1)):
        share, low, high = binomial_interval(hits, 157)
        assert round(100 * share, 2) == percent
        assert low < 10 / 720 < high


def simulated(strength, sessions=4, classes=30, favour=0.0, seed=0):
    draw = rng(seed, "simulated")
    shown = np.concatenate([draw.permutation(classes) for _ in range(sessions)])
    scores = draw.normal(size=(len(shown), classes)) + favour * draw.normal(size=classes)
    scores[np.arange(len(shown)), shown] += strength
    return scores, shown, np.repeat(np.arange(sessions), classes)


def test_scores_against_a_plain_count():
    scores, shown, sessions = simulated(0.8)
    found = score_identification(scores, shown, k=4, sessions=sessions, permutations=99)
    places = [list(np.argsort(-row)).index(c) for row, c in zip(scores, shown, strict=True)]
    assert (found.n, found.concepts, found.k) == (120, 30, 4)
    assert found.hits == sum(p < 4 for p in places)
    assert found.top == found.hits / 120 and found.top_low < found.top < found.top_high
    assert found.chance == pytest.approx(4 / 30)
    assert found.rank == pytest.approx(np.mean(places) / 29) and found.pairs == pytest.approx(1 - found.rank)
    right = np.mean([(row[c] > np.delete(row, c)).mean() for row, c in zip(scores, shown, strict=True)])
    assert found.pairs == pytest.approx(right)
    assert found.pairs_low < found.pairs < found.pairs_high
    assert found.p_pairs == pytest.approx(0.01) and "n = 120" in str(found)
    more = score_identification(scores, shown, k=4, sessions=sessions, permutations=250)
    assert more.p_pairs == pytest.approx(1 / 251)  # all of them count


def test_a_perfect_and_a_constant_classifier():
    shown = np.arange(20) % 10
    one = np.zeros(20)
    perfect = score_identification(np.eye(10)[shown], shown, k=1, sessions=one, permutations=99)
    assert (perfect.hits, perfect.rank, perfect.pairs) == (20, 0, 1) and perfect.p_top <= 0.02
    assert perfect.top_high == 1 and perfect.top_low == pytest.approx(0.025**0.1)  # ten concepts, all found
    silent = score_identification(np.zeros((20, 10)), shown, k=1, sessions=one, permutations=99)
    assert (silent.hits, silent.rank, silent.p_top, silent.p_pairs) == (0, 0.5, 1, 1)


def shared_noise(seed, sessions=6, classes=12, shared=0.5):
    "No signal; part of the noise of a trial is that of its concept, in all sessions."
    draw = rng(seed, "shared noise")
    shown = np.concatenate([draw.permutation(classes) for _ in range(sessions)])
    scores = draw.normal(size=(len(shown), classes)) * np.sqrt(1 - shared) + 2 * draw.normal(size=classes)
    scores += np.sqrt(shared) * draw.normal(size=(classes, classes))[shown]
    return scores, shown, np.repeat(np.arange(sessions), classes)


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("crossed", [True, False])
def test_permutation_p_is_uniform_without_signal(shared, crossed):
    "Favourites, noise shared by the trials of a concept, concepts in all sessions or in one only: 5 % below .05."
    found = []
    for seed in range(200):
        scores, shown, sessions = shared_noise(seed, shared=shared)
        if (
            not crossed
        ):  # the first half of the concepts in one session, the others in another, with a bias there
            sessions = (shown >= 6).astype(int)
            scores = scores + 3 * ((np.arange(12) >= 6) == sessions[:, None])
        one = score_identification(scores, shown, k=3, sessions=sessions, permutations=99, seed=seed)
        found.append((one.p_top, one.p_pairs))
    assert (np.mean(np.array(found) <= 0.05, axis=0) < 0.1).all()  # 3 sd above .05
    assert abs(np.mean(found, axis=0)[1] - 0.5) < 0.1  # hits have ties, which raise their p


def test_moving_single_trials_would_find_what_is_not_there():
    found = []
    for seed in range(100):
        scores, shown, sessions = shared_noise(seed)
        each = np.arange(len(shown))  # every trial a group of its own
        found.append(score_identification(scores, shown, 3, sessions, each, permutations=99).p_pairs)
    assert np.mean(np.array(found) <= 0.05) > 0.1


def test_intervals_hold_the_truth_when_noise_is_shared():
    "The exact binomial interval, which takes trials as independent, holds chance in seven of ten experiments."
    covered = np.zeros(3)
    for seed in range(150):
        scores, shown, sessions = shared_noise(seed, sessions=12, shared=0.8)
        one = score_identification(scores, shown, k=3, sessions=sessions, permutations=1)
        exact = binomial_interval(one.hits, one.n)
        covered += (
            one.top_low <= 0.25 <= one.top_high,
            one.pairs_low <= 0.5 <= one.pairs_high,
            exact[1] <= 0.25 <= exact[2],
        )
    assert (covered[:2] >= 0.9 * 150).all() and covered[2] < 0.9 * 150


def test_sessions_are_required_and_who_leaves_them_out_is_told_why():
    "A classifier that knows the session, and nothing else, gains nothing where labels stay in their sessions."
    draw = rng(0, "session")
    sessions = np.repeat([0, 1], 60)
    shown = np.where(sessions == 0, draw.integers(0, 10, 120), draw.integers(10, 20, 120))
    scores = draw.normal(size=(120, 20)) + 5 * ((np.arange(20) >= 10) == sessions[:, None])
    with pytest.raises(DataError, match="only knows the session"):
        score_identification(scores, shown, permutations=199)
    assert score_identification(scores, shown, sessions=np.zeros(120), permutations=199).p_pairs < 0.01
    assert score_identification(scores, shown, sessions=sessions, permutations=199).p_pairs > 0.05
    order = draw.permutation(120)  # trials of a session need not be neighbours
    mixed = score_identification(scores[order], shown[order], sessions=sessions[order], permutations=199)
    assert mixed.p_pairs > 0.05


def test_nothing_to_permute_is_refused():
    shown, scores = np.arange(6), np.eye(6)
    with pytest.raises(DataError, match="nothing to permute"):
        score_identification(scores, shown, 1, sessions=shown)
    with pytest.raises(DataError, match="several concepts"):
        score_identification(scores, shown, 1, np.zeros(6), groups=np.zeros(6))
    with pytest.raises(DataError, match="groups has shape"):
        score_identification(scores, shown, 1, np.zeros(6), groups=np.zeros(5))


def test_interval_counts_concepts_not_trials():
    "The same trials ten times over are not more evidence."
    scores, shown, sessions = simulated(0.5)
    one = score_identification(scores, shown, sessions=sessions, permutations=1)
    again = np.tile(scores, (10, 1)), np.tile(shown, 10)
    ten = score_identification(*again, sessions=np.tile(sessions, 10), permutations=1)
    for metric in ("top", "pairs"):
        width = [getattr(s, f"{metric}_high") - getattr(s, f"{metric}_low") for s in (one, ten)]
        assert width[1] >= width[0] - 1e-9


def test_the_same_seed_gives_the_same_numbers():
    scores, shown, sessions = simulated(0.2)
    a, b, c = (
        score_identification(scores, shown, sessions=sessions, permutations=50, seed=s) for s in (1, 1, 2)
    )
    assert a == b and a != c


def test_rows_of_the_score_sheet():
    scores, shown, sessions = simulated(0.8)
    found = score_identification(scores, shown, k=4, sessions=sessions, permutations=99)
    best = score_identification(simulated(3.0)[0], shown, k=4, sessions=sessions, permutations=9)
    known = dict(dataset="d", split="session", split_hash="h")
    top, pairs = ScoreSheet(
        identification_rows("m", found, baseline=found, ceiling=best, seed=3, **known)
    ).rows
    assert (top.metric, top.value, top.low, top.high) == ("top 4", found.top, found.top_low, found.top_high)
    assert (top.chance, top.baseline, top.ceiling) == (4 / 30, found.top, best.top)
    assert (pairs.metric, pairs.value, pairs.chance) == ("pairs", found.pairs, 0.5)
    assert (pairs.low, pairs.high, pairs.ceiling) == (found.pairs_low, found.pairs_high, best.pairs)
    assert (pairs.n_samples, pairs.seed, pairs.note) == (
        120,
        3,
        f"permutation p = 0.010, mean normalised rank {1 - pairs.value:.3f}",
    )
    bare = identification_rows("m", found, **known)[0]
    assert np.isnan(bare.baseline) and np.isnan(bare.ceiling) and bare.seed is None


def test_calibration_of_known_probabilities():
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    curve = reliability_curve(np.log(probabilities) + 3, [0, 1, 1, 0], bins=2)
    np.testing.assert_allclose(curve["confidence"], [0.65, 0.85])
    np.testing.assert_allclose(curve["accuracy"], [0.5, 0.5])
    assert curve["n"].tolist() == [2, 2]
    assert calibration_error(curve) == pytest.approx((0.15 + 0.35) / 2)
    assert calibration_error(reliability_curve(np.log(probabilities), [0, 1, 1, 0], bins=1)) == pytest.approx(
        0.25
    )


def test_calibration_weighs_bins_by_their_trials():
    scores = np.log([[0.6, 0.4]] * 2 + [[0.7, 0.3]])
    curve = reliability_curve(scores, [0, 1, 0], bins=2)  # two trials, half of them right, and one
    assert calibration_error(curve) == pytest.approx((2 * 0.1 + 1 * 0.3) / 3)


def test_few_concepts_have_no_interval_and_their_row_says_so():
    scores, shown = np.tile([1.0, 0.0], (10, 1)), np.array([1] + [0] * 9)
    found = score_identification(scores, shown, k=1, sessions=np.zeros(10), permutations=1)
    assert found.pairs == 0.9 and np.isnan([found.pairs_low, found.top_low, found.top_high]).all()
    rows = identification_rows("m", found, dataset="d", split="session", split_hash="h")
    assert all("no interval: 2 concepts shown" in row.note for row in rows)


@pytest.mark.parametrize(
    "call",
    [
        lambda: class_ranks(np.zeros(3)),
        lambda: class_ranks(np.zeros((3, 1))),
        lambda: class_ranks([[0.0, np.inf]]),
        lambda: binomial_interval(3, 2),
        lambda: binomial_interval(-1, 2),
        lambda: binomial_interval(0, 0),
        lambda: score_identification(np.eye(4), np.arange(3), 1, np.zeros(4)),
        lambda: score_identification(np.eye(4), np.arange(1, 5), 1, np.zeros(4)),
        lambda: score_identification(np.eye(4), np.arange(4) - 1, 1, np.zeros(4)),
        lambda: score_identification(np.eye(4), np.arange(4.0), 1, np.zeros(4)),
        lambda: score_identification(np.eye(4), np.arange(4), 4, np.zeros(4)),
        lambda: reliability_curve(np.eye(4), np.arange(4), bins=5),
    ],
)
def test_what_makes_no_sense_raises(call):
    with pytest.raises(DataError):
        call()
