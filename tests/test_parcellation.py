"""Convex semi-NMF against its definition and scikit-learn's conventions, the boundary coefficient against plain loops."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import estimator_checks_generator

from cortexlit.core import DataError, rng
from cortexlit.evaluation.parcellation import (
    ConvexSemiNMF,
    Parcels,
    boundary_weights,
    category_means,
    draw_parcels,
    random_parcels,
    score_parcels,
)


def planted(parcels=4, conditions=40, voxels=120, noise=0.5, seed=0):
    "Responses (voxels, conditions) and the parcel of each voxel."
    draw = rng(seed, "planted")
    truth = draw.permutation(np.arange(voxels) % parcels)
    profiles = draw.normal(size=(parcels, conditions))
    return profiles[truth] + noise * draw.normal(size=(voxels, conditions)), truth


CHECKS = list(estimator_checks_generator(ConvexSemiNMF(n_components=2, n_init=1, max_iter=60)))
# these two score tables of two or three voxels, where no distance has pairs within and across
TOO_SMALL = ("check_fit_score_takes_y", "check_pipeline_consistency")
CHECKS += [c for c in estimator_checks_generator(Parcels(2, n_init=1)) if c[1].func.__name__ not in TOO_SMALL]


@pytest.mark.parametrize(
    ("estimator", "check"), CHECKS, ids=[f"{type(e).__name__}-{check.func.__name__}" for e, check in CHECKS]
)
def test_scikit_learn(estimator, check):
    check(estimator)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    voxels=st.integers(2, 30),
    conditions=st.integers(1, 12),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shift=st.sampled_from([-2.0, 0.0, 5.0]),
)
def test_the_error_never_rises_and_factors_are_not_negative(seed, voxels, conditions, scale, shift):
    x = scale * (np.random.default_rng(seed).normal(size=(voxels, conditions)) + shift)
    model = ConvexSemiNMF(min(3, voxels), n_init=1, max_iter=50, tol=0, random_state=seed).fit(x)
    assert len(model.loss_) == model.n_iter_ + 1
    assert (np.diff(model.loss_) <= 1e-10).all()
    members = model.transform(x)
    assert (model.weights_ >= 0).all() and (members >= 0).all()
    np.testing.assert_allclose(model.components_, model.weights_.T @ x, atol=1e-9)
    rest = np.square(x - members @ model.components_).sum()
    np.testing.assert_allclose(model.reconstruction_err_**2, rest, rtol=1e-6, atol=1e-9 * np.square(x).sum())
    assert rest <= (model.loss_[-1] + 1e-8) * np.square(x).sum()  # least squares at the end


def test_one_round_is_that_of_the_paper():
    "Against the updates written with V itself, entry by entry, from the same start."
    x, _ = planted(3, 10, 25)
    model = ConvexSemiNMF(3, n_init=1, max_iter=1, random_state=5).fit(x)
    seed = np.random.RandomState(5).randint(np.iinfo(np.int32).max, size=1)[0]
    members = 0.2 + np.eye(3)[KMeans(3, n_init=1, random_state=seed).fit_predict(x)]
    weights = members / members.sum(0)
    a = x @ x.T
    plus, minus = (abs(a) + a) / 2, (abs(a) - a) / 2
    up, down = plus @ weights, minus @ weights
    members = members * np.sqrt((up + members @ weights.T @ down) / (down + members @ weights.T @ up))
    inner = members.T @ members
    weights = weights * np.sqrt((plus @ members + down @ inner) / (minus @ members + up @ inner))
    profiles = weights.T @ x
    expected = profiles / np.linalg.norm(profiles, axis=1, keepdims=True)
    np.testing.assert_allclose(model.components_, expected, rtol=1e-8)
    np.testing.assert_allclose(model.loss_[1], np.square(x - members @ profiles).sum() / np.square(x).sum())


@pytest.mark.parametrize("seed", range(3))
def test_planted_parcels_are_found(seed):
    x, truth = planted(seed=seed)
    model = ConvexSemiNMF(4, random_state=seed).fit(x)
    assert adjusted_rand_score(truth, model.labels_) > 0.95
    assert adjusted_rand_score(truth, np.random.default_rng(0).permutation(model.labels_)) < 0.2
    new = x + 0.1 * rng(seed, "new").normal(size=x.shape)
    assert adjusted_rand_score(truth, model.predict(new)) > 0.95


def test_voxels_in_another_order_get_the_same_parcels():
    x, _ = planted()
    order = np.random.default_rng(1).permutation(len(x))
    a, b = ConvexSemiNMF(4).fit(x).labels_, ConvexSemiNMF(4).fit(x[order]).labels_
    assert adjusted_rand_score(a[order], b) > 0.99


def test_restarts_and_seeds():
    x, _ = planted(6, 12, 60, noise=1.5)
    one, many = (ConvexSemiNMF(6, n_init=n, random_state=3).fit(x) for n in (1, 6))
    assert many.loss_[-1] <= one.loss_[-1]
    again = clone(many).fit(x)
    assert np.array_equal(again.components_, many.components_)
    other = ConvexSemiNMF(6, n_init=1, random_state=4).fit(x)
    assert not np.array_equal(other.components_, one.components_)


def test_convergence_is_when_a_round_gains_little():
    x, _ = planted()
    loose, tight = (ConvexSemiNMF(4, n_init=1, tol=t, max_iter=400).fit(x) for t in (1e-3, 1e-5))
    gains = -np.diff(loose.loss_)
    assert gains[-1] < 1e-3 and (gains[:-1] >= 1e-3).all()
    assert loose.n_iter_ < tight.n_iter_ < 400
    assert ConvexSemiNMF(4, n_init=1, tol=0, max_iter=7).fit(x).n_iter_ == 7


def test_a_voxel_that_agrees_with_no_parcel_is_in_none():
    x, _ = planted(2, 8, 30, noise=0)
    model = ConvexSemiNMF(2).fit(x)
    assert model.predict(np.zeros((1, 8))).tolist() == [-1]
    assert model.predict(-model.components_.sum(0, keepdims=True)).tolist() == [-1]


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (ConvexSemiNMF(2), np.zeros((5, 3)), "zero"),
        (ConvexSemiNMF(6), np.ones((5, 3)), "n_components=6"),
        (ConvexSemiNMF(0), np.ones((5, 3)), "n_components"),
        (ConvexSemiNMF(2, tol=-1), np.ones((5, 3)), "tol"),
        (ConvexSemiNMF(2), np.full((5, 3), np.nan), "NaN"),
    ],
)
def test_what_cannot_be_fitted_raises(model, x, message):
    with pytest.raises(ValueError, match=message):
        model.fit(x)


def slow_boundary(labels, place, correlations, width, reach):
    "The definition of Zhi et al. 2022, pair by pair."
    bins = {}
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            apart = np.linalg.norm(place[i] - place[j])
            if apart <= reach and labels[i] >= 0 and labels[j] >= 0:
                side = bins.setdefault(int(apart / width + 1e-9), ([], []))
                side[int(labels[i] != labels[j])].append(correlations[i, j])
    total, weight = 0, 0
    for within, across in bins.values():
        if within and across:
            w = 1 / (1 / len(within) + 1 / len(across))
            total, weight = total + w * (np.mean(within) - np.mean(across)), weight + w
    return total / weight


@pytest.mark.parametrize(("width", "reach"), [(2, 40), (3.5, 9), (5, 12)])
def test_boundary_coefficient_against_its_definition(width, reach):
    draw = np.random.default_rng(3)
    place, labels = draw.uniform(0, 15, (40, 3)), draw.integers(-1, 4, 40)
    correlations = np.corrcoef(draw.normal(size=(40, 12)))
    found = boundary_weights(labels, place, width, reach) @ correlations[np.triu_indices(40, 1)]
    assert found == pytest.approx(slow_boundary(labels, place, correlations, width, reach), abs=1e-12)


def test_boundary_coefficient_is_zero_where_correlation_is_a_function_of_the_bin():
    place = 3.0 * np.argwhere(np.ones((4, 5, 2)))
    apart = pdist(place)
    weights = boundary_weights(np.arange(40) // 10, place, 3, 12)
    assert weights @ np.floor(apart / 3 + 1e-9) == pytest.approx(0, abs=1e-12)
    assert weights @ np.ones_like(apart) == pytest.approx(0, abs=1e-12)
    assert (weights[apart > 12] == 0).all()
    assert (boundary_weights(np.arange(40) // 10, place, 3, 3)[apart == 3] != 0).all()
    assert np.abs(weights).sum() == pytest.approx(2)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_random_parcels_have_the_sizes_and_are_compact(sizes, seed):
    place = np.argwhere(np.ones((4, 4, 4)))[: sum(sizes)]
    labels = random_parcels(place, sizes, seed)
    assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes
    assert np.array_equal(labels, random_parcels(place, sizes, seed))

    def spread(given):
        return sum(np.square(place[given == k] - place[given == k].mean(0)).sum() for k in range(len(sizes)))

    shuffled = [spread(np.random.default_rng(i).permutation(labels)) for i in range(5)]
    assert spread(labels) <= np.mean(shuffled) + 1e-9


def grid_world(seed, signal):
    draw = rng(seed, "world")
    place = 3.0 * np.argwhere(np.ones((6, 6, 3)))
    truth = (place[:, 0] > 7).astype(int) + 2 * (place[:, 1] > 7)
    profiles = draw.normal(size=(30, 4))
    return [signal * profiles[:, truth] + draw.normal(size=(30, 108)) for _ in range(2)], place, truth


def test_score_of_true_and_of_false_parcels():
    (a, b), place, truth = grid_world(0, 1.0)
    good = score_parcels(truth, a, place, 3, 15, again=b, parcellations=10, resamples=50)
    assert good.gain_low < good.gain < good.gain_high and good.gain_low > 0.2
    assert good.low < good.value < good.high and len(good.random) == 10
    assert good.gain == pytest.approx(good.value - good.random.mean())
    assert good.value > good.random.max()
    bad = score_parcels(random_parcels(place, np.bincount(truth), 99), a, place, 3, 15, again=b, parcellations=10, resamples=50)  # fmt: skip
    assert bad.gain < good.gain / 2
    (a, b), place, truth = grid_world(1, 0.0)
    null = score_parcels(truth, a, place, 3, 15, again=b, parcellations=10, resamples=50)
    assert null.gain_low < 0.02 and abs(null.gain) < 0.05


def test_score_across_sessions_pairs_voxels_of_different_sessions():
    (a, b), place, truth = grid_world(2, 1.0)
    cross = np.corrcoef(a.T, b.T)[:108, 108:]
    expected = slow_boundary(truth, place, (cross + cross.T) / 2, 3, 15)
    found = score_parcels(truth, a, place, 3, 15, again=b, parcellations=2, resamples=5).value
    assert found == pytest.approx(expected, abs=1e-12)
    swapped = score_parcels(truth, b, place, 3, 15, again=a, parcellations=2, resamples=5).value
    assert swapped == pytest.approx(found, abs=1e-12)


def test_unassigned_and_constant_voxels_do_not_disturb():
    (a, b), place, truth = grid_world(3, 1.0)
    labels = truth.copy()
    labels[:9] = -1
    left = score_parcels(labels, a, place, 3, 15, parcellations=2, resamples=5)
    without = score_parcels(truth[9:], a[:, 9:], place[9:], 3, 15, parcellations=2, resamples=5)
    assert left.value == pytest.approx(without.value)
    np.testing.assert_allclose(left.random, without.random)
    a[:, 0] = 7.0
    assert np.isfinite(score_parcels(truth, a, place, 3, 15, parcellations=2, resamples=5).value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: boundary_weights(np.zeros(4, int), np.arange(12.0).reshape(4, 3), 3, 30),
        lambda: boundary_weights(np.arange(4), np.zeros((4, 2)), 3, 30),
        lambda: boundary_weights(np.arange(4), np.zeros((4, 3)), 0, 30),
        lambda: boundary_weights(np.arange(4), np.zeros((4, 3)), 5, 3),
        lambda: random_parcels(np.zeros((4, 3)), [2, 1]),
        lambda: random_parcels(np.zeros((4, 3)), [4, 0]),
        lambda: score_parcels(np.zeros(4, int), np.zeros((5, 3)), np.zeros((4, 3)), 1, 2),
        lambda: score_parcels(
            np.zeros(4, int), np.zeros((5, 4)), np.zeros((4, 3)), 1, 2, again=np.zeros((6, 4))
        ),
        lambda: draw_parcels(np.zeros(3, int), np.ones((2, 2, 2), bool)),
    ],
)
def test_wrong_shapes_and_sizes_raise(call):
    with pytest.raises(DataError):
        call()


def test_map_shows_each_label_in_its_place():
    mask = np.zeros((4, 5, 3), bool)
    mask[1, 2, 1] = mask[3, 4, 1] = mask[0, 0, 2] = True
    figure = draw_parcels(np.array([1, -1, 0]), mask, np.ones_like(mask), slices=6)
    shown = {axis.get_title(): axis.images[-1].get_array() for axis in figure.axes if axis.get_title()}
    assert sorted(shown) == ["z = 1", "z = 2"]  # slices without voxels are not drawn
    assert shown["z = 2"][0, 0] == 1  # voxels in C order: (0, 0, 2), (1, 2, 1), (3, 4, 1); images are (y, x)
    assert shown["z = 1"][4, 3] == 0 and np.ma.getmaskarray(shown["z = 1"])[2, 1]


def test_means_of_categories_count_each_concept_once():
    draw = np.random.default_rng(0)
    responses = draw.normal(size=(20, 7)).astype(np.float32)
    members = pd.DataFrame(draw.uniform(size=(20, 4)) < 0.4, columns=list("abcd"))
    members.loc[0] = True  # in all
    members.loc[1] = False  # in none
    found = category_means(responses, members)
    for row, name in zip(found, members, strict=True):
        np.testing.assert_allclose(row, responses[members[name].to_numpy()].astype(float).mean(0), atol=1e-12)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        (pd.DataFrame({"a": [True, False]}), "2 concepts in the table of categories, responses of 3"),
        (pd.DataFrame({"a": [True] * 3, "b": [False] * 3}), "no concept of category 'b'"),
        (pd.DataFrame({"a": [True, False, np.nan]}), "category 'a' is of type object"),
    ],
)
def test_tables_of_categories_that_do_not_fit_are_refused(members, told):
    with pytest.raises(DataError, match=told):
        category_means(np.zeros((3, 5)), members)


def test_parcels_are_judged_on_the_conditions_that_are_left_out():
    responses, truth = planted(3, 30, 45, noise=0.3)
    order, place = np.argsort(truth, kind="stable"), np.zeros((45, 3))
    place[order, 0] = np.arange(45)  # each parcel in a row
    model = Parcels(3, place=place, width=1, reach=20, n_init=1)
    search = GridSearchCV(model, {"n_parcels": [2, 3, 15]}, cv=3).fit(responses.T)
    assert search.best_params_ == {"n_parcels": 3} and search.best_score_ > 0.5
    fitted = clone(model).fit(responses.T[:15])
    assert adjusted_rand_score(truth, fitted.labels_) == 1
    told = score_parcels(fitted.labels_, responses.T[15:], place, 1, 20, parcellations=1, resamples=2).value
    assert fitted.score(responses.T[15:]) == pytest.approx(told)
    for parcel, mean in enumerate(fitted.transform(responses.T).T):
        assert np.allclose(mean, responses[fitted.labels_ == parcel].mean(0))
    with pytest.raises(DataError, match="place"):
        clone(model).set_params(place=place[:4]).fit(responses.T).score(responses.T)
