"""Conformal intervals: the rank, the promise on simulated groups, what breaks it, and errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexlit.core import DataError, rng
from cortexlit.evaluation.conformal import conformal_coverage, conformal_half_width, split_conformal


def simulate(groups: int, trials: int, shared: float, draws: int, seed: int) -> np.ndarray:
    "Errors (draws, groups, trials); trials of a group share this part of their variance."
    generator = rng(seed, "simulate")
    common = generator.normal(size=(draws, groups, 1)) * math.sqrt(shared)
    return common + generator.normal(size=(draws, groups, trials)) * math.sqrt(1 - shared)


@given(st.integers(1, 60), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_the_finite_sample_rank(n, level):
    errors = rng(n, "rank").normal(size=n)
    rank = math.ceil((n + 1) * level - 1e-9)
    if rank > n:
        with pytest.raises(DataError, match="or more"):
            conformal_half_width(errors, np.arange(n), level)
    else:
        assert conformal_half_width(errors, np.arange(n), level) == np.sort(abs(errors))[rank - 1]


def test_each_group_counts_once():
    errors = rng(0, "once").normal(size=20)
    often = rng(0, "often").integers(1, 9, 20)
    many = conformal_half_width(np.repeat(errors, often), np.repeat(np.arange(20), often))
    assert many == conformal_half_width(errors, np.arange(20))


def test_targets_rows_and_names_of_groups_do_not_matter():
    errors, groups = rng(1, "targets").normal(size=(60, 3)), np.repeat(np.arange(15), 4)
    whole = conformal_half_width(errors, groups, 0.8)
    assert whole.shape == (3,)
    assert [conformal_half_width(e, groups, 0.8) for e in errors.T] == whole.tolist()
    order = rng(1, "order").permutation(60)
    named = np.array([f"concept {g}" for g in groups])
    np.testing.assert_array_equal(conformal_half_width(errors[order], named[order], 0.8), whole)


@pytest.mark.parametrize("trials", [1, 6])
@pytest.mark.parametrize("shared", [0.0, 0.95])
def test_coverage_of_exchangeable_groups(trials, shared):
    draws, level = 2000, 0.9
    errors = simulate(20, trials, shared, draws, seed=trials)
    groups = np.repeat(np.arange(19), trials)
    inside = [abs(e[-1, 0]) <= conformal_half_width(e[:-1].ravel(), groups, level) for e in errors]
    slack = 4 * math.sqrt(level * (1 - level) / draws)
    assert np.mean(inside) > level - slack
    if trials == 1:  # 18 of the 19 errors, so 18 in 20: exactly the level
        assert np.mean(inside) < level + slack


def test_counting_trials_breaks_the_promise():
    errors = simulate(4, 12, 0.95, 2000, seed=3)
    inside = [abs(e[-1, 0]) <= conformal_half_width(e[:-1].ravel(), np.arange(36), 0.9) for e in errors]
    assert np.mean(inside) < 0.86
    with pytest.raises(DataError, match="3 groups for level 0.9"):
        conformal_half_width(errors[0, :-1].ravel(), np.repeat(np.arange(3), 12), 0.9)


def test_halves_of_a_fold_calibrate_each_other():
    groups = np.repeat(np.arange(40), 3)
    folds = groups % 2
    errors = rng(4, "halves").normal(size=(120, 2))
    errors[folds == 1] *= 100  # the other fold's errors play no part
    widths = split_conformal(errors, groups, folds, 0.8)
    assert widths[folds == 0].max() < 10 < widths[folds == 1].min()
    for fold in (0, 1):
        rows = folds == fold
        values = np.unique(widths[rows, 0])
        assert len(values) == 2
        low, high = (np.unique(groups[rows & (widths[:, 0] == v)]) for v in values)
        assert not set(low) & set(high) and len(low) == len(high) == 10
        known = np.isin(groups, high)
        assert values[0] == conformal_half_width(errors[known, 0], groups[known], 0.8)
    np.testing.assert_array_equal(widths, split_conformal(errors, groups, folds, 0.8))
    assert (widths != split_conformal(errors, groups, folds, 0.8, seed=1)).any()


def test_split_conformal_covers():
    level, found = 0.8, []
    for seed in range(60):
        errors = simulate(60, 5, 0.8, 1, seed)[0].reshape(-1, 1)
        groups = np.repeat(np.arange(60), 5)
        found.append((abs(errors) <= split_conformal(errors, groups, groups % 3, level, seed)).mean())
    assert level - 0.01 < np.mean(found) < level + 0.06


def test_coverage_table():
    errors = np.array([[0.0, 3.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    table = conformal_coverage(errors, np.array([1.0, 2.0]), ["a", "b", "b", "b"], ["p", "q"])
    assert table["coverage"].tolist() == [0.5, 0.5, 0.5]  # each group counts once
    assert table["width"].tolist() == [2, 4, 3]
    assert (table["width_low"] == table["width"]).all() and table.loc["p", "low"] == 0
    again = conformal_coverage(errors, np.array([1.0, 2.0]), ["a", "b", "b", "b"], ["p", "q"])
    assert table.equals(again)


def test_interval_of_the_coverage_counts_groups():
    errors = simulate(30, 20, 0.99, 1, 5)[0].reshape(-1, 1)
    by_group = conformal_coverage(errors, np.ones(1), np.repeat(np.arange(30), 20), ["p"]).loc["p"]
    by_trial = conformal_coverage(errors, np.ones(1), np.arange(600), ["p"]).loc["p"]
    assert by_group["high"] - by_group["low"] > 2 * (by_trial["high"] - by_trial["low"])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: conformal_half_width(np.ones(5), np.arange(4)), "with 4 groups"),
        (lambda: conformal_half_width(np.full(20, np.nan), np.arange(20)), "not finite"),
        (lambda: conformal_half_width(np.ones((2, 2, 2)), np.arange(2)), "targets"),
        (lambda: conformal_half_width(np.ones(5), np.arange(5), 1.0), "0 < level < 1"),
        (lambda: conformal_half_width(np.ones(8), np.arange(8), 0.9), "9 or more"),
        (lambda: split_conformal(np.ones((4, 1)), np.arange(4), np.zeros(3)), "3 folds"),
        (lambda: split_conformal(np.ones((20, 1)), np.arange(20), np.arange(20) % 2), "5 groups for level"),
        (lambda: conformal_coverage(np.ones((4, 2)), np.ones(2), np.arange(4), ["p"]), "groups, names"),
    ],
)
def test_errors(call, text):
    with pytest.raises(DataError, match=text):
        call()
