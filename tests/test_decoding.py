"""Ridge without refits against scikit-learn, scores against plain loops, ceilings against simulation, and what must raise."""

import warnings

import numpy as np
import pandas as pd
import pytest
from himalaya.kernel_ridge import solve_weighted_kernel_ridge_conjugate_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import huber
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from cortexlit.core import DataError
from cortexlit.data.splits import split_by_concept
from cortexlit.evaluation.decoding import (
    average_by,
    best_constant,
    constant_predictions,
    decoding_ceiling,
    decoding_rows,
    decompose,
    identification_ranks,
    leave_group_out,
    mixed_bands,
    nested_ridge,
    noise_ceiling,
    p_value,
    permutation_scores,
    permuted_targets,
    property_components,
    published_confidence,
    r2_by_target,
    score_decoding,
    score_subject,
)
from cortexlit.evaluation.scores import ScoreSheet

CHECKED = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def problem(n, p, targets=3, folds=4, seed=0, offset=0.0):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, p)) + offset
    y = x[:, : min(p, 5)] @ g.normal(size=(min(p, 5), targets)) + g.normal(size=(n, targets)) + 4
    return x, y, g.permutation(np.arange(n) % folds)


def refitted(x, y, folds, alpha):
    out = np.empty(y.shape)
    for fold in np.unique(folds):
        test = folds == fold
        out[test] = Ridge(alpha=alpha).fit(x[~test], y[~test]).predict(x[test]).reshape(-1, y.shape[1])
    return out


@given(
    n=st.integers(8, 60),
    p=st.integers(1, 80),
    folds=st.integers(2, 4),
    alpha=st.sampled_from([0.3, 1.0, 30.0, 1e4]),
    offset=st.sampled_from([0.0, 50.0]),
    seed=st.integers(0, 99),
)
@CHECKED
def test_leaving_groups_out_equals_refitting(n, p, folds, alpha, offset, seed):
    x, y, fold = problem(n, p, folds=folds, seed=seed, offset=offset)
    found = leave_group_out(decompose(x), y, fold, [alpha])[0]
    assert np.abs(found - refitted(x, y, fold, alpha)).max() < 1e-9


@pytest.mark.parametrize("n,p", [(600, 1200), (600, 100), (90, 400)])
def test_equal_to_scikit_learn_to_ten_digits(n, p):
    x, y, fold = problem(n, p, targets=12, folds=5)
    alphas = [1.0, 100.0, 1e4]
    found = leave_group_out(decompose(x), y, fold, alphas)
    for a, alpha in enumerate(alphas):
        assert np.abs(found[a] - refitted(x, y, fold, alpha)).max() < 1e-10


def test_more_rows_in_a_fold_than_dimensions_takes_the_other_inverse():
    """Both ways to invert must agree where either may be used."""
    from cortexlit.evaluation.decoding import Spectrum, _left_out, _residuals

    x, y, fold = problem(120, 30)
    spectrum = decompose(x)
    wide = Spectrum(np.pad(spectrum.vectors, ((0, 0), (0, 200))), np.pad(spectrum.values, (0, 200)), False)
    rows = np.flatnonzero(fold == 1)
    assert len(rows) < 31 + 200 and len(np.flatnonzero(fold < 2)) > 31
    for group in (rows, np.flatnonzero(fold < 2)):
        r = _residuals(spectrum, y, 3.0)
        assert np.allclose(_left_out(spectrum, group, r, 3.0), _left_out(wide, group, r, 3.0), atol=1e-11)


def test_grid_search_chooses_the_same_penalty():
    x, y, fold = problem(150, 200, targets=1, folds=5)
    alphas = np.geomspace(0.1, 1e4, 8)
    ours = np.square(leave_group_out(decompose(x), y, fold, alphas) - y).mean((1, 2))
    search = GridSearchCV(
        Ridge(), {"alpha": alphas}, cv=PredefinedSplit(fold), scoring="neg_mean_squared_error"
    ).fit(x, y)
    assert np.allclose(ours, -search.cv_results_["mean_test_score"], atol=1e-10)
    assert alphas[ours.argmin()] == search.best_params_["alpha"]


@pytest.mark.parametrize("n,p", [(80, 120), (200, 20)])
def test_nested_choice_equals_nested_refitting(n, p):
    x, y, fold = problem(n, p, targets=4, folds=5, seed=3)
    y[:, 1] = np.random.default_rng(5).normal(size=n)  # nothing to learn: another penalty
    alphas = np.geomspace(0.1, 1e4, 7)
    found = nested_ridge(decompose(x), y, fold, alphas)
    for outer in range(5):
        rest = fold != outer
        inner = [np.square(refitted(x[rest], y[rest], fold[rest], a) - y[rest]).sum(0) for a in alphas]
        best = alphas[np.argmin(inner, axis=0)]
        assert np.array_equal(found.alpha[outer], best)
        for t, alpha in enumerate(best):
            expected = refitted(x, y[:, [t]], fold, alpha)[fold == outer, 0]
            assert np.allclose(found.predictions[fold == outer, t], expected, atol=1e-10)
    assert len(np.unique(found.alpha)) > 1


def test_held_out_rows_change_nothing():
    """The choice for a fold, and its predictions, must not depend on that fold's targets."""
    x, y, fold = problem(90, 150, folds=3)
    changed = y.copy()
    changed[fold == 1] += 100 * np.random.default_rng(1).normal(size=changed[fold == 1].shape)
    a, b = (nested_ridge(decompose(x), t, fold, [1.0, 100.0, 1e4]) for t in (y, changed))
    assert np.array_equal(a.alpha[1], b.alpha[1])
    assert np.allclose(a.predictions[fold == 1], b.predictions[fold == 1], atol=1e-8)


def test_banded_ridge_finds_the_band_that_knows():
    g = np.random.default_rng(0)
    good, noise = g.normal(size=(200, 20)), 30 * g.normal(size=(200, 60))
    y = good @ g.normal(size=(20, 2)) + 2 * g.normal(size=(200, 2))
    fold = np.arange(200) % 4
    spectra, weights = mixed_bands({"good": good, "noise": noise}, steps=4)
    alphas = np.geomspace(0.01, 1e3, 9)
    banded = nested_ridge(spectra, y, fold, alphas)
    assert weights.tolist() == [[0, 1], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]]
    assert (weights[banded.mixture][..., 0] >= 0.75).all()
    reference = constant_predictions(y, fold)
    plain = nested_ridge(decompose(np.concatenate([good, noise], 1)), y, fold, np.geomspace(1, 1e6, 9))
    assert (
        r2_by_target(banded.predictions, y, reference).mean()
        > 0.1 + r2_by_target(plain.predictions, y, reference).mean()
    )
    # a mixture is ridge on scaled bands
    scaled = [v / np.sqrt(((v - v.mean(0)) ** 2).sum() / 200) for v in (good, noise)]
    x = np.concatenate([np.sqrt(0.25) * scaled[0], np.sqrt(0.75) * scaled[1]], 1)
    assert np.allclose(leave_group_out(spectra[1], y, fold, [0.5])[0], refitted(x, y, fold, 0.5), atol=1e-10)


def test_a_mixture_of_bands_is_himalayas_weighted_kernel_ridge():
    g = np.random.default_rng(1)
    bands = {"a": g.normal(size=(60, 10)), "b": 3 * g.normal(size=(60, 90))}
    y, fold = g.normal(size=(60, 3)), np.arange(60) % 3
    spectra, weights = mixed_bands(bands)
    ours = leave_group_out(spectra[1], y, fold, [0.7])[0]
    blocks = [v / np.sqrt(((v - v.mean(0)) ** 2).sum() / 60) for v in bands.values()]
    for k in range(3):
        rest = fold != k
        centred = [b - b[rest].mean(0) for b in blocks]
        kernels = np.stack([b @ b[rest].T for b in centred])
        deltas = np.log(weights[1])[:, None].repeat(3, 1)
        dual = solve_weighted_kernel_ridge_conjugate_gradient(
            kernels[:, rest], y[rest] - y[rest].mean(0), deltas, alpha=0.7, max_iter=500, tol=1e-10
        )
        theirs = np.einsum("kij,jt,kt->it", kernels[:, ~rest], dual, np.exp(deltas)) + y[rest].mean(0)
        assert np.allclose(ours[~rest], theirs, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.5, 1.0, 3.0]))
@CHECKED
def test_best_constants_have_least_loss(seed, n, delta):
    y = np.random.default_rng(seed).gamma(1.0, 2.0, (n, 1))
    losses = {
        "squared": np.square,
        "absolute": np.abs,
        "huber": lambda e: huber(delta, e),
    }
    for name, loss in losses.items():
        at = best_constant(y, name, delta)
        for step in (-0.01, 0.01):
            assert loss(at - y).mean() <= loss(at + step - y).mean() + 1e-12


def test_averages_are_those_of_pandas_and_keep_what_is_not_known():
    g = np.random.default_rng(3)
    groups, x = g.choice(["b", "a", "c"], 40), g.normal(size=(40, 5, 2))
    names, means, share = average_by(groups, x, x[:, 0, 0] > 0)
    table = pd.DataFrame(x.reshape(40, -1)).groupby(groups).mean()
    assert names.tolist() == table.index.tolist() == ["a", "b", "c"] and means.shape == (3, 5, 2)
    np.testing.assert_allclose(means.reshape(3, -1), table, rtol=0, atol=1e-15)
    assert share.tolist() == [(x[groups == name, 0, 0] > 0).mean() for name in names]
    x[groups == "b", 0] = np.nan
    assert np.isnan(average_by(groups, x)[1]).sum() == 2  # one group, both columns


def test_constants_come_from_the_other_folds():
    y = np.arange(12.0).reshape(6, 2)
    fold = np.array([0, 0, 1, 1, 2, 2])
    found = constant_predictions(y, fold)
    assert np.allclose(found[2], y[[0, 1, 4, 5]].mean(0))
    assert np.allclose(r2_by_target(found, y, found), 0)
    assert np.allclose(constant_predictions(y, fold, "absolute")[0], np.median(y[2:], 0))


def test_published_confidence():
    assert np.allclose(published_confidence(np.array([[4.0]]), np.array([[4.0]]), np.array([[0.0]])), 1)
    assert np.allclose(published_confidence(np.array([[4.1]]), np.array([[4.0]]), np.array([[0.0]])), 0)
    assert np.allclose(
        published_confidence(np.array([[5.96]]), np.array([[4.0]]), np.array([[1.0]])), 0.05, atol=1e-4
    )


def test_scores_against_loops():
    g = np.random.default_rng(0)
    y, concept = g.normal(size=(180, 3)) + 5, np.repeat(np.arange(60), 3)
    x, fold = y + g.normal(size=y.shape), np.repeat(np.arange(60), 3) % 4
    reference = constant_predictions(y, fold)
    scores = score_decoding(x, y, reference, concept, fold, resamples=50)
    assert np.array_equal(np.isnan(scores.r), [False] * 3)
    a, b = (np.concatenate([v[fold == k] - v[fold == k].mean(0) for k in range(4)]) for v in (x, y))
    order = np.concatenate([np.flatnonzero(fold == k) for k in range(4)])
    for t in range(3):
        r2 = 1 - mean_squared_error(y[:, t], x[:, t]) / mean_squared_error(y[:, t], reference[:, t])
        assert np.isclose(scores.r2[t], r2)
        assert np.isclose(scores.r[t], np.corrcoef(a[:, t], b[:, t])[0, 1])
    from cortexlit.core import rng

    drawn = rng(0, "concepts").multinomial(60, np.full(60, 1 / 60), size=50)
    rows = np.concatenate([np.repeat(np.flatnonzero(concept == c), drawn[7, c]) for c in range(60)])
    assert np.isclose(scores.r2_draws[7, 1], r2_by_target(x[rows], y[rows], reference[rows])[1])
    back = np.argsort(order)
    assert np.isclose(scores.r_draws[7, 1], np.corrcoef(a[back][rows, 1], b[back][rows, 1])[0, 1])
    value, low, high = scores.interval()
    assert low < value < high


def test_interval_covers_and_drawing_trials_does_not():
    """Trials of a concept are one observation: the interval over trials is too narrow."""
    covered = {"concepts": 0, "trials": 0}
    for seed in range(60):
        g = np.random.default_rng(seed)
        concept = np.repeat(np.arange(60), 8)
        y = g.normal(size=(60, 1))[concept]
        x = 0.5 * y + np.sqrt(0.3) * g.normal(size=(60, 1))[concept]
        truth = 1 - (0.25 + 0.3)  # E(x - y)^2 = .25 + .3
        for name, ids in (("concepts", concept), ("trials", np.arange(len(y)))):
            _, low, high = score_decoding(x, y, np.zeros_like(y), ids, resamples=300).interval()
            covered[name] += low <= truth <= high
    assert covered["concepts"] >= 52
    assert covered["trials"] <= 35


def test_a_constant_scores_zero():
    "A constant that refuses to predict scores 0; only where the targets are constant nothing can be said."
    y = np.random.default_rng(0).normal(size=(60, 2))
    scores = score_decoding(np.full((60, 2), 3.0), y, np.zeros((60, 2)), np.arange(60))
    assert (scores.r == 0).all() and scores.interval("r") == (0, 0, 0)
    y[:, 1] = 2
    scores = score_decoding(np.full((60, 2), 3.0), y, np.zeros((60, 2)), np.arange(60))
    assert np.isnan(scores.r).tolist() == [False, True]


def test_with_few_concepts_there_is_no_interval_and_the_sheet_says_so():
    g = np.random.default_rng(0)
    concept = np.repeat(np.arange(29), 4)
    y = g.normal(size=(29, 2))[concept]
    scores = score_decoding(y + g.normal(size=y.shape), y, np.zeros_like(y), concept, resamples=50)
    value, low, high = scores.interval()
    assert np.isfinite(value) and np.isnan([low, high]).all()
    known = dict(dataset="d", split="concept", split_hash="h")
    rows = decoding_rows("m", y + 0.1, y, np.zeros_like(y), concept, None, ("a", "b"), **known)
    assert all("no interval: 29 concepts, 30 or more are needed" in row.note for row in rows)
    assert all(np.isnan(row.low) and not np.isnan(row.value) for row in rows)
    concept = np.repeat(np.arange(45), 4)
    y = g.normal(size=(45, 2))[concept]
    for folds, enough in ((concept % 5, False), (concept % 4, True), (None, True)):
        scores = score_decoding(y + g.normal(size=y.shape), y, np.zeros_like(y), concept, folds, resamples=50)
        assert np.isfinite(scores.interval()[1]) == enough


@pytest.mark.parametrize(("concepts", "folds"), [(30, 3), (50, 5)])
def test_with_enough_concepts_the_intervals_hold(concepts, folds):
    "R2 and r of 150 experiments; with 15 concepts in 5 folds it would be .89 and .82."
    covered = np.zeros(2)
    for seed in range(150):
        g = np.random.default_rng(seed)
        concept = np.repeat(np.arange(concepts), 10)
        y = g.normal(size=(concepts, 1))[concept]
        x = 0.4 * y + 0.4 * g.normal(size=(concepts, 1))[concept] + 0.6 * g.normal(size=y.shape)
        reference = constant_predictions(y, concept % folds)
        scores = score_decoding(x, y, reference, concept, concept % folds, resamples=300)
        truths = {"r2": 1 - (0.36 + 0.16 + 0.36), "r": 0.4 / np.sqrt(0.16 + 0.16 + 0.36)}
        covered += [scores.interval(m)[1] <= truth <= scores.interval(m)[2] for m, truth in truths.items()]
    assert (covered >= 0.84 * 150).all()


def test_constants_of_folds_score_zero_too():
    """Pooled over folds they correlate negatively with the targets; that must not look like a score."""
    y, fold = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 5
    reference = constant_predictions(y, fold)
    assert all(np.corrcoef(reference[:, t], y[:, t])[0, 1] < -0.02 for t in range(2))
    for loss in ("squared", "absolute", "huber"):
        constant = constant_predictions(y, fold, loss)
        scores = score_decoding(constant, y, reference, np.arange(60), fold)
        assert (scores.r == 0).all() and (scores.r_draws == 0).all()
    with pytest.raises(DataError, match="reference differs between rows"):
        score_decoding(constant, y, reference, np.arange(60))


def test_permutations_keep_concepts_together():
    g = np.random.default_rng(0)
    concept = g.permutation(np.repeat(np.arange(6), 4))
    table = g.normal(size=(6, 2))
    shuffled = permuted_targets(table[concept], concept, 5, seed=1).reshape(24, 5, 2)
    for k in range(5):
        for c in range(6):
            values = shuffled[concept == c, k]
            assert (values == values[0]).all() and (values[0] == table).all(1).any()
    assert len({shuffled[:, k].tobytes() for k in range(5)}) > 1
    with pytest.raises(DataError, match="differ within a group"):
        permuted_targets(g.normal(size=(24, 2)), concept, 1)


def test_permutation_equals_running_the_procedure_again():
    x, y, _ = problem(60, 90, targets=2)
    concept = np.repeat(np.arange(20), 3)
    y, fold = y[::3][concept], concept % 4
    spectrum = decompose(x)
    scores = permutation_scores(spectrum, y, fold, concept, [1.0, 100.0], permutations=6)
    column = permuted_targets(y, concept, 6)[:, [8, 9]]
    alone = nested_ridge(spectrum, column, fold, [1.0, 100.0]).predictions
    assert np.allclose(scores[4], r2_by_target(alone, column, constant_predictions(column, fold)))


def test_p_values_are_uniform_under_the_null():
    g = np.random.default_rng(0)
    found = np.array([p_value(g.normal(), g.normal(size=99)) for _ in range(2000)])
    assert abs((found <= 0.05).mean() - 0.05) < 0.015
    assert p_value(5.0, np.zeros(99)) == 0.01


def test_noise_ceiling_finds_the_truth():
    g = np.random.default_rng(0)
    ratio = np.array([0.02, 0.1, 1.0])
    x = np.sqrt(ratio) * g.normal(size=(3000, 1, 3)) + g.normal(size=(3000, 12, 3))
    for n in (1, 12):
        assert np.allclose(noise_ceiling(x, n), 100 * ratio / (ratio + 1 / n), atol=2.5)
    with pytest.raises(DataError, match="repeats"):
        noise_ceiling(x[:, :1])


@pytest.mark.parametrize("trials", [1, 6])
def test_decoding_ceiling_is_what_the_best_linear_decoder_reaches(trials):
    g = np.random.default_rng(0)
    loadings, shared = 0.2 * g.normal(size=(40, 3)), 0.4 * g.normal(size=(40, 5))
    private, weights = g.uniform(0.5, 1.5, 40), g.normal(size=(2, 3))
    covariance, rest = np.diag([2.0, 1.0, 0.5]), np.array([0.0, 0.7])
    n = 60_000
    z = g.normal(size=(n, 3)) * np.sqrt(np.diag(covariance))
    noise = g.normal(size=(n, 5)) @ shared.T + np.sqrt(private) * g.normal(size=(n, 40))
    x = z @ loadings.T + noise / np.sqrt(trials)
    y = z @ weights.T + np.sqrt(rest) * g.normal(size=(n, 2))
    best = Ridge(alpha=1e-6).fit(x, y).predict(x)
    found = decoding_ceiling(loadings, covariance, shared, private, weights, rest, trials)
    assert np.allclose(found, r2_by_target(best, y, np.zeros_like(y)), atol=0.01)


def test_components_are_orthonormal_and_invert():
    table = np.random.default_rng(0).normal(size=(50, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    axes = property_components(table, 4)
    assert np.allclose(axes.axes @ axes.axes.T, np.eye(4))
    assert np.isclose(axes.share.sum(), 1)
    scores = axes.apply(table)
    assert np.allclose(np.corrcoef(scores.T), np.eye(4), atol=1e-10)
    assert np.allclose(scores @ axes.axes * axes.spread + axes.mean, table)


def test_identification():
    g = np.random.default_rng(0)
    candidates = g.normal(size=(50, 4))
    shown = np.arange(50)
    shrunk = candidates.mean(0) + 0.01 * (candidates - candidates.mean(0))
    assert (identification_ranks(shrunk, candidates, shown) == 0).all()  # shrinkage does not matter
    guess = identification_ranks(g.normal(size=(5000, 4)), candidates, g.integers(0, 50, 5000))
    assert abs(guess.mean() - 24.5) < 1
    assert (guess < 10).mean() == pytest.approx(0.2, abs=0.03)
    doubled = np.concatenate([candidates, candidates])
    assert (identification_ranks(candidates, doubled, shown) == 0.5).all()


def test_average_by():
    names, mean = average_by(np.array(["b", "a", "b"]), np.array([[1.0], [5.0], [3.0]]))
    assert names.tolist() == ["a", "b"] and mean.tolist() == [[5.0], [2.0]]


def test_a_difference_is_paired_by_concept():
    x, y, _ = problem(180, 20, targets=3)
    concept = np.repeat(np.arange(60), 3)
    reference = np.tile(y.mean(0), (180, 1))
    guesses = (0.5 * y + 0.5 * reference, 0.4 * y + 0.6 * reference)
    one, other = (score_decoding(p, y, reference, concept, resamples=200) for p in guesses)
    value, low, high = one.minus(other).interval()
    assert value == pytest.approx(one.r2.mean() - other.r2.mean())
    draws = one.r2_draws.mean(1) - other.r2_draws.mean(1)
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert one.minus(one).interval("r") == (0, 0, 0)
    with pytest.raises(DataError, match="same number of resamples"):
        one.minus(score_decoding(guesses[1], y, reference, concept, resamples=100))


def test_rows_fit_the_score_sheet(tmp_path):
    x, y, _ = problem(60, 20, targets=3)
    concept = np.repeat(np.arange(20), 3)
    y, fold = y[::3][concept], concept % 4
    reference = constant_predictions(y, fold)
    place = dict(dataset="d", split="concept", split_hash="abc")
    rows = []
    for model, predictions in (
        ("mean", reference),
        ("ridge", nested_ridge(decompose(x), y, fold).predictions),
    ):
        rows += decoding_rows(
            model, predictions, y, reference, concept, fold, "abc", components=property_components(y[::3], 2),
            ceiling=np.array([0.9, 0.6, 0.3, 0.8, 0.7]), null=np.zeros((9, 3)), **place,
        )  # fmt: skip
    sheet = ScoreSheet(rows)
    table = sheet.table()
    assert list(table["metric"][:7]) == [
        "R2 mean",
        "r mean",
        "R2 a",
        "R2 b",
        "R2 c",
        "R2 component 1",
        "R2 component 2",
    ]
    constant = table[table["model"] == "mean"].set_index("metric")
    assert constant.loc["R2 mean", "value"] == 0
    assert constant.loc[["R2 mean", "R2 b", "R2 component 2"], "ceiling"].tolist() == pytest.approx(
        [0.6, 0.6, 0.7]
    )
    with pytest.raises(DataError, match="5: of the 3 targets"):
        decoding_rows(
            "m", reference, y, reference, concept, fold, "abc", components=property_components(y[::3], 2),
            ceiling=np.ones(3), **place,
        )  # fmt: skip
    assert set(constant["n_clips"]) == {20} and set(constant["n_samples"]) == {60}
    assert "permutations" in constant.loc["R2 a", "note"]
    assert len(ScoreSheet.load(sheet.save(tmp_path))) == 14


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x, y, f: leave_group_out(decompose(x), y[:-1], f, [1.0]), "unequal rows"),
        (lambda x, y, f: leave_group_out(decompose(x), y, f - 1, [1.0]), "set apart"),
        (lambda x, y, f: leave_group_out(decompose(x), y, f * 2, [1.0]), "each with rows"),
        (lambda x, y, f: leave_group_out(decompose(x), y, f * 1.0, [1.0]), "whole numbers"),
        (lambda x, y, f: leave_group_out(decompose(x), y, f, [0.0]), "positive penalties"),
        (lambda x, y, f: nested_ridge(decompose(x), y, f % 2, [1.0]), "three or more"),
        (lambda x, y, f: decompose(np.where(x > 2, np.nan, x)), "not finite"),
        (lambda x, y, f: mixed_bands({"a": x}), "two or more bands"),
        (lambda x, y, f: mixed_bands({"a": x, "b": 0 * x}), "band b is constant"),
        (lambda x, y, f: score_decoding(y, y[:, :2], y, f), "unequal shapes"),
        (lambda x, y, f: best_constant(y, "hinge"), "squared, absolute or huber"),
        (lambda x, y, f: property_components(np.ones((5, 2))), "constant"),
    ],
)
def test_bad_input_is_named(call, message):
    x, y, fold = problem(80, 30)
    with pytest.raises(DataError, match=message):
        call(x, y, fold)


# --- the sheet of a subject ---


def subject(seed=0, concepts=30, each=4, voxels=12):
    g = np.random.default_rng(seed)
    trials = pd.DataFrame({"concept": np.repeat([f"c{k:02d}" for k in range(concepts)], each)})
    n = len(trials)
    trials = trials.assign(session=1, run=1, trial=range(n), image=[f"i{k}" for k in range(n)], role="train")
    table = g.normal(size=(concepts, 2))
    targets = table.repeat(each, 0)
    responses = targets @ g.normal(size=(2, voxels)) + g.normal(size=(n, voxels))
    return responses, targets, trials["concept"].to_numpy(), split_by_concept(trials, 3, 0), ("a", "b")


def test_a_subjects_sheet_is_made_of_the_parts():
    responses, targets, concepts, split, names = subject()
    ours = np.random.default_rng(1).normal(size=targets.shape)
    sheet = score_subject(
        responses, targets, concepts, split, names, {"net": ours, ("net", 3): ours},
        bands={"x": responses[:, :6], "y": responses[:, 6:]}, permutations=5, dataset="d", root=None,
    )  # fmt: skip
    table = sheet.table()
    assert set(table["model"]) == {"mean", "median", "Huber constant", "ridge", "banded ridge", "net"}
    single = table[table["tier"] == "test, single trials"].groupby(["model", "metric"])["value"].max()
    ridge = nested_ridge(decompose(responses), targets, split.fold).predictions
    reference = constant_predictions(targets, split.fold)
    assert single["ridge", "R2 a"] == pytest.approx(r2_by_target(ridge, targets, reference)[0])
    assert single["ridge", "R2 mean"] > 0.3 > single["net", "R2 mean"]
    assert table["note"].str.contains("5 permutations").sum() == 3  # mean and two properties, single trials
    assert set(table["split_hash"]) == {split.hash}
    means = table[(table["tier"] == "test, mean of concept") & (table["model"] == "ridge")]
    assert (means["n_samples"] == 30).all()


@pytest.mark.parametrize(
    ("unit", "told"),
    [(1, "weakest penalty"), (30, ""), (1e5, "strongest penalty of the grid chosen in 6 of 6")],
)
def test_the_sheet_says_when_the_best_penalty_may_lie_outside_the_grid(unit, told):
    responses, targets, concepts, split, names = subject()
    table = score_subject(
        unit * responses, targets, concepts, split, names, permutations=0, dataset="d", root=None
    ).table()
    notes = set(table.loc[(table["model"] == "ridge") & (table["tier"] == "test, single trials"), "note"])
    assert len(notes) == 1 and notes.pop().startswith(told)
    assert not table.loc[table["model"] == "mean", "note"].str.contains("penalty").any()


def test_two_hundred_thousand_voxels_are_penalised_enough():
    """Copies of voxels ask for as many times the penalty, and must not change the score."""
    responses, targets, concepts, split, names = subject(voxels=40)
    responses = responses + 10 * np.random.default_rng(1).normal(size=responses.shape)
    responses = (responses - responses.mean(0)) / responses.std(0)
    r2 = []
    for copies in (25, 5000):  # their Gram matrix is that of one, times the number of copies
        x = np.sqrt(copies) * responses
        table = score_subject(
            x, targets, concepts, split, names, permutations=0, dataset="d", root=None
        ).table()
        r2.append(table.loc[(table["model"] == "ridge") & (table["metric"] == "R2 mean"), "value"].iloc[0])
    assert r2[0] > 0.05 and r2[1] == pytest.approx(r2[0], abs=0.02)


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: np.where(p == p[0, 0], np.nan, p)])
def test_predictions_that_do_not_fit_are_refused(change):
    responses, targets, concepts, split, names = subject()
    with pytest.raises(DataError, match="predictions of net"):
        score_subject(
            responses,
            targets,
            concepts,
            split,
            names,
            {"net": change(targets)},
            permutations=0,
            dataset="d",
            root=None,
        )
