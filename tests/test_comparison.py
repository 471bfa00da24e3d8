"""Comparisons of models: arithmetic, invariances, and what goes wrong."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError
from cortexlit.evaluation.comparison import compare
from cortexlit.metrics import mean_score


def scores(models="abc", seeds=3, samples=6, neurons=5, seed=0):
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=(seeds, samples, neurons)) for name in models}


def test_scores_are_plain_means_and_differences_of_them():
    given_scores = scores()
    found = compare(given_scores)
    by_name = found.models.set_index("model")["score"]
    for name, values in given_scores.items():
        assert by_name[name] == pytest.approx(values.mean())
        assert by_name[name] == pytest.approx(np.mean([mean_score(v) for v in values]))
    assert found.models["score"].is_monotonic_decreasing
    for row in found.pairs.itertuples():
        assert (
            row.difference == pytest.approx(by_name[row.better] - by_name[row.worse]) and row.difference >= 0
        )
        assert row.low <= row.difference <= row.high and row.settled == (row.low > 0)
    assert len(found.pairs) == 3 and found.models["may be best"].iloc[0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(0.1, 10))
@example(267, 0.0, 0.109375)  # the variance of all three differences comes out negative
def test_shared_levels_cancel_and_units_scale(seed, shift, factor):
    first = scores(seed=seed)
    level = np.random.default_rng(seed + 1).normal(size=(6, 1)) * shift + shift
    a = compare(first).pairs
    b = compare({n: factor * (v + level) for n, v in first.items()}).pairs
    pd.testing.assert_frame_equal(a[["better", "worse"]], b[["better", "worse"]])
    np.testing.assert_allclose(b["difference"], factor * a["difference"], rtol=1e-6, atol=1e-9)
    half = [(p["high"] - p["difference"]) / scale for p, scale in ((a, 1), (b, factor))]
    np.testing.assert_allclose(half[1], half[0], rtol=1e-4)


def test_a_model_compared_with_itself_differs_by_nothing():
    values = scores("a")["a"]
    found = compare({"a": values, "b": values.copy()})
    assert found.pairs[["difference", "low", "high"]].to_numpy() == pytest.approx(0)
    assert not found.pairs["settled"].any() and "not distinguishable" in found.statement


def test_a_clear_winner_is_settled():
    values = scores("a")["a"]
    found = compare({"low": values, "high": values + 1, "middle": values + 0.5})
    assert found.models["model"].tolist() == ["high", "middle", "low"]
    assert found.pairs["settled"].all() and found.models["may be best"].tolist() == [True, False, False]
    assert "is distinguishable from noise: 3 of 3" in found.statement


def test_no_interval_is_empty_where_scores_vary():
    for seed in range(40):  # a variance with minus signs is negative for half of them
        found = compare(scores(seed=seed))
        assert (found.pairs["high"] - found.pairs["low"] > 0.1).all(), seed


def test_groupings_of_equal_size_all_count():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 5, 1, 1)) + 0.1 * draw.normal(size=(2, 5, 6, 9))  # seeds differ, clips hardly
    ours, more = (compare({"a": x, "b": y}).pairs.iloc[0] for x, y in ((a, b), (a[:, :5], b[:, :5])))
    assert ours["high"] - ours["low"] == pytest.approx(more["high"] - more["low"], rel=0.1)


def test_undefined_entries_are_left_out():
    values = scores("ab")
    values["a"][:, :, 2] = np.nan
    found = compare(values)
    for name in "ab":  # both on the entries that both define
        score = found.models.set_index("model").loc[name, "score"]
        assert score == pytest.approx(np.delete(values[name], 2, axis=2).mean())
    assert np.isfinite(found.models[["low", "high"]]).all(axis=None)
    assert found.undefined == pytest.approx(0.2) and "20% of the entries are undefined" in found.statement


def test_a_model_that_is_silent_where_it_is_weak_is_refused():
    values = scores("ab", neurons=10)
    values["a"][values["a"] < 0.3] = np.nan
    with pytest.raises(DataError, match="share"):
        compare(values)


def test_nothing_is_settled_by_four_clips():
    values = scores("a", samples=4)["a"]
    found = compare({"low": values, "high": values + 1})
    assert not found.pairs["settled"].any() and found.pairs["low"].isna().all()
    assert found.models["may be best"].all() and "fewer than 5 clips" in found.statement


def test_repeats_of_a_clip_travel_together():
    first = scores()
    again = compare({n: np.repeat(v, 4, 1) for n, v in first.items()}, clip=np.repeat(np.arange(6), 4))
    pd.testing.assert_frame_equal(again.pairs, compare(first).pairs)


def test_one_training_run_and_the_same_seed_twice():
    first = {n: v[0] for n, v in scores().items()}
    a, b = compare(first, seed=3), compare(first, seed=3)
    pd.testing.assert_frame_equal(a.models, b.models)
    pd.testing.assert_frame_equal(a.pairs, b.pairs)
    assert a.models["seeds"].tolist() == [1] * 3 and a.models["spread over seeds"].isna().all()
    assert not compare(first, seed=4).models["low"].equals(a.models["low"])


@pytest.mark.parametrize(("seeds", "settled"), [(3, False), (6, True)])
def test_a_pair_whose_few_seeds_agree_by_luck_is_not_settled(seeds, settled):
    """Three seeds of two models happen to scatter less than those of the others; six would say that they do."""
    draw = np.random.default_rng(0)
    luck = draw.normal(size=(4, seeds, 1, 1)) * np.array([0, 0, 0.2, 0.2])[:, None, None, None]
    values = luck - luck.mean(1, keepdims=True) + 0.1 * draw.normal(size=(4, seeds, 12, 30))
    values[0] += 0.1
    pairs = compare({name: values[k] for k, name in enumerate("abcd")}).pairs.set_index(["better", "worse"])
    assert pairs.loc[("a", "b"), "settled"] == settled


def test_the_variance_is_that_of_independent_entries_when_they_are():
    draw, errors = np.random.default_rng(0), []
    for _ in range(50):
        found = compare({n: draw.normal(size=(4, 10, 20)) for n in "ab"}).models
        errors.append((found["high"] - found["low"]).mean() / 2 / 2)
    assert 1 < np.mean(errors) * np.sqrt(800) < 1.4


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_variance_is_that_of_the_groups_when_they_differ(axis):
    draw, errors, shape = np.random.default_rng(axis), [], [8, 12, 20]
    shared = [1, 1, 1]
    shared[axis] = shape[axis]
    for _ in range(50):
        values = {n: np.broadcast_to(draw.normal(size=shared), shape) for n in "ab"}
        found = compare(values).models
        errors.append(((found["high"] - found["low"]) / 2 / 2).mean())
    assert np.mean(errors) == pytest.approx(1 / np.sqrt(shape[axis]), rel=0.2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"a": s["a"]}, "two or more"),
        (lambda s: s | {"b": s["b"][:, 1:]}, "equal for all models"),
        (lambda s: {n: v[0, 0] for n, v in s.items()}, "seeds, samples, neurons"),
        (lambda s: s | {"b": np.full_like(s["b"], np.nan)}, "no score of b"),
    ],
)
def test_what_cannot_be_compared(change, words):
    with pytest.raises(DataError, match=words):
        compare(change(scores()))
