"""Design: components are those that were put in, power is what happens, and the test tier stays closed."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from toys import toy_recording

from cortexlit.core import DataError, rng
from cortexlit.data.clips import build_dataset, load_tier
from cortexlit.data.folds import build_folds
from cortexlit.evaluation import design as module
from cortexlit.evaluation.design import (
    VarianceComponents,
    components,
    design,
    error_of,
    power_of,
    smallest_effect,
)
from cortexlit.evaluation.intervals import paired_difference

SMALL = {"clip_frames": 20, "size": (10, 14), "gap": 5}
MOVIES = {"one": (160, 4), "three": (400, 4)}


def made_up(parts, clips, neurons, repeats, effect, draw):
    "A table of differences with these components, and the clip of each sample."
    shapes = (
        (clips, 1, 1),
        (1, 1, neurons),
        (clips, 1, neurons),
        (clips, repeats, 1),
        (clips, repeats, neurons),
    )
    table = effect + sum(draw.normal(0, math.sqrt(v), s) for v, s in zip(parts, shapes, strict=True))
    return table.reshape(clips * repeats, neurons), np.repeat(np.arange(clips), repeats)


def recording(**changes):
    "Neurons that follow running and noise."
    toy = toy_recording(MOVIES, **changes)
    drive = np.outer(1 + np.arange(toy.n_neurons), np.nan_to_num(toy.running, nan=5.0)) / 2
    return replace(toy, traces=(toy.traces + drive).astype("float32"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_dataset(recording(), tmp_path_factory.mktemp("design") / "data", split="stimuli", **SMALL)


# --- components


@pytest.mark.parametrize("alone", VarianceComponents._fields)
def test_each_component_is_found_alone(alone):
    parts = VarianceComponents(*(0.04 * (name == alone) for name in VarianceComponents._fields))
    draw = rng(0, alone)
    found = np.mean([components(*made_up(parts, 12, 12, 4, 0.3, draw)) for _ in range(60)], 0)
    for name, value in zip(VarianceComponents._fields, found, strict=True):
        assert value == pytest.approx(0.04 * (name == alone), abs=0.006), name


def test_sums_over_pairs_are_those_of_two_loops():
    table, clip = made_up(VarianceComponents(0.1, 0.1, 0.1, 0.1, 0.4), 5, 3, 2, 0.3, rng(0, "loops"))
    found = dict.fromkeys(module._sums_of_pairs(table, clip), 0.0)
    for s, r in itertools.product(range(10), repeat=2):
        for n, m in itertools.product(range(3), repeat=2):
            if clip[s] != clip[r]:
                kind = "neuron" if n == m else "nothing"
            elif s == r:
                kind = "entry" if n == m else "trial"
            else:
                kind = "clip, neuron" if n == m else "clip"
            found[kind] += table[s, n] * table[r, m]
    assert module._sums_of_pairs(table, clip) == pytest.approx(found)


def test_gaps_and_unequal_repeats_leave_components_in_place():
    parts, draw, found = VarianceComponents(0.01, 0.01, 0.02, 0.01, 0.09), rng(0, "gaps"), []
    for _ in range(60):
        table, clip = made_up(parts, 15, 15, 5, 0.0, draw)
        keep = np.flatnonzero(draw.random(len(clip)) > 0.2)
        table[draw.random(table.shape) < 0.2] = np.nan
        found.append(components(table[keep], clip[keep]))
    np.testing.assert_allclose(np.mean(found, 0), parts, rtol=0.25, atol=0.002)


def test_one_repeat_per_clip_counts_trials_as_clips():
    draw = rng(0, "single")
    found = np.mean(
        [
            components(*made_up(VarianceComponents(0.02, 0.01, 0.0, 0.02, 0.05), 20, 20, 1, 0.0, draw))
            for _ in range(60)
        ],
        0,
    )
    np.testing.assert_allclose(found, (0.04, 0.01, 0, 0, 0.05), atol=0.006)


@settings(max_examples=30)
@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_components_know_neither_the_level_nor_the_order_and_scale_with_the_square(level, factor):
    table, clip = made_up(VarianceComponents(0.01, 0.01, 0.01, 0.01, 0.04), 6, 4, 3, 0.0, rng(1, "scale"))
    order = rng(2, "order").permutation(len(clip))
    base = np.array(components(table, clip))
    np.testing.assert_allclose(
        components(factor * table[order] + level, clip[order]), factor**2 * base, atol=1e-8 * factor**2 + 1e-9
    )


@pytest.mark.parametrize(("shape", "clips"), [((40, 8), 4), ((40, 1), 10), ((40,), 10), ((40, 8), 0)])
def test_too_little_is_refused(shape, clips):
    with pytest.raises(DataError, match="clips"):
        components(np.zeros(shape), np.arange(40) % clips if clips else np.zeros(39))


def test_nothing_defined_is_refused():
    with pytest.raises(DataError, match="no entry is defined"):
        components(np.full((10, 4), np.nan), np.arange(10))


# --- power


@pytest.mark.parametrize(
    "sizes", [(0.03, 0.02, 0.1, 0.02, 0.3), (0.05, 0, 0, 0, 0.1), (0, 0.05, 0, 0, 0.1)], ids=str
)
@pytest.mark.parametrize(("clips", "neurons"), [(8, 40), (25, 40)])
def test_power_told_is_power_realised(sizes, clips, neurons):
    parts, draw, n = VarianceComponents(*np.square(sizes)), rng(0, f"{sizes} {clips}"), 120
    effect = 2.6 * error_of(parts, clips, neurons, 3)[0]
    hits = 0
    for _ in range(n):
        table, clip = made_up(parts, clips, neurons, 3, effect, draw)
        _, low, high = paired_difference(table, np.zeros_like(table), groups=clip, draws=300)
        hits += low > 0 or high < 0
    told = power_of(parts, effect, clips, neurons, 3)
    assert abs(hits / n - told) < 3.3 * math.sqrt(told * (1 - told) / n)


def test_error_is_the_spread_of_means():
    parts, draw = VarianceComponents(0.02**2, 0.03**2, 0.08**2, 0.03**2, 0.2**2), rng(0, "error")
    means = [made_up(parts, 9, 30, 4, 0.0, draw)[0].mean() for _ in range(1500)]
    assert np.std(means) == pytest.approx(error_of(parts, 9, 30, 4)[0], rel=0.06)


def test_power_without_effect_is_the_error_rate_and_grows_to_one():
    parts = VarianceComponents(0.02**2, 0.03**2, 0.08**2, 0.03**2, 0.2**2)
    assert power_of(parts, 0.0, 20, 60) == pytest.approx(0.05, abs=1e-6)
    powers = [power_of(parts, e, 20, 60) for e in (0.001, 0.01, 0.03, 0.1, 1.0)]
    assert powers == sorted(powers) and powers[-1] > 0.999
    assert power_of(parts, 0.02, 20, 60) == power_of(parts, -0.02, 20, 60)
    assert power_of(parts, 0.02, 4, 60) == 0 and math.isnan(smallest_effect(parts, 4, 60))
    large = power_of(parts, 0.001, 10**6, 10**6)
    assert large == pytest.approx(norm.sf(1.96 - 0.001 / error_of(parts, 10**6, 10**6)[0]), abs=1e-3)


@settings(max_examples=40)
@given(
    st.floats(1e-4, 0.1), st.floats(1e-4, 0.1), st.floats(0, 0.3), st.integers(5, 80), st.integers(10, 300)
)
def test_the_smallest_effect_has_the_power(clip, neuron, rest, clips, neurons):
    parts = VarianceComponents(clip**2, neuron**2, 0.0, 0.0, rest**2)
    least = smallest_effect(parts, clips, neurons, power=0.8)
    assert power_of(parts, least, clips, neurons) == pytest.approx(0.8, abs=0.01)
    assert smallest_effect(parts, clips + 40, neurons) <= least * 1.02


# --- of a session


def test_a_plan_answers_and_its_numbers_agree(folder):
    plan = design(folder, effect=0.02)
    samples = pd.read_csv(folder / "samples.csv")
    assert plan.clips == {
        "single split": samples[samples["tier"] == "test"]["clip"].nunique(),
        "folds": samples["clip"].nunique(),
    }
    assert plan.neurons == 5 and plan.repeats == 4 and plan.protocol in ("single split", "folds", "neither")
    for row in plan.table.to_dict("records"):
        parts = VarianceComponents(*(row[name] ** 2 for name in VarianceComponents._fields))
        told = power_of(parts, row["effect"], plan.clips["folds"], 5, 4)
        assert row["power, folds"] == pytest.approx(told)
        if not math.isnan(row["clips needed"]):
            need = row["clips needed"]
            assert power_of(parts, row["effect"], need, 5, 4) >= 0.8
            assert need == 5 or power_of(parts, row["effect"], need - 1, 5, 4) < 0.8
    chosen = plan.table[plan.table["score"] == plan.score]
    for protocol in plan.clips:
        enough = (chosen[f"power, {protocol}"] >= 0.8).all()
        assert not enough or plan.protocol in (protocol, "single split")
    assert plan.score in plan.statement and len(plan.plot().axes) == 1


def test_large_effects_need_one_split_and_tiny_ones_more_than_there_is(tmp_path):
    root = build_dataset(
        recording(),
        tmp_path / "data",
        split="stimuli",
        **SMALL,
    )
    assert design(root, effect=1.9, power=0.3).protocol in ("single split", "folds")
    plan = design(root, effect=1e-4)
    assert plan.protocol == "neither" and "Neither" in plan.statement


def test_the_test_tier_stays_closed(folder, tmp_path, monkeypatch):
    opened, honest = [], load_tier
    monkeypatch.setattr(module, "load_tier", lambda root, tier: opened.append(tier) or honest(root, tier))
    plan = design(folder)
    assert set(opened) == {"train", "validation"}
    toy, samples = recording(), pd.read_csv(folder / "samples.csv")
    traces = np.array(toy.traces)
    for row in samples[samples["tier"] == "test"].itertuples():
        traces[:, row.first_frame : row.last_frame + 1] += 1000
    other = build_dataset(replace(toy, traces=traces), tmp_path / "other", split="stimuli", **SMALL)
    pd.testing.assert_frame_equal(design(other).table, plan.table)


def test_folds_are_planned_from_the_training_tier_of_one(tmp_path):
    root = build_folds(recording(), tmp_path / "folds", folds=3, **SMALL)
    pd.testing.assert_frame_equal(design(root).table, design(root / "0").table)


def test_no_clip_near_the_held_out_block_is_fitted(folder, monkeypatch):
    train, validation = (load_tier(folder, t) for t in ("train", "validation"))
    seen, honest = [], module.blind_mean
    monkeypatch.setattr(module, "blind_mean", lambda a, b: seen.append((a, b)) or honest(a, b))
    module._out_of_block(train, validation, 30.0, 3, 5)
    tested = np.concatenate([target.clip for _, target in seen])
    assert sorted(tested) == sorted(train.clip)
    for fitted, target in seen:
        for movie in np.unique(target.movie):
            a, b = fitted.start[fitted.movie == movie], target.start[target.movie == movie]
            assert not a.size or np.abs(a[:, None] - b[None]).min() >= 25


@pytest.mark.parametrize(
    ("options", "message"),
    [({"effect": 0.0}, "effect"), ({"effect": -1}, "effect"), ({"power": 1.0}, "power"), ({"level": 0}, "level"),
     ({"blocks": 30}, "clips in the train tier")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(folder, options, message):
    with pytest.raises(DataError, match=message):
        design(folder, **options)


def test_one_neuron_is_refused(tmp_path):
    root = build_dataset(recording(neurons=1), tmp_path / "one", split="stimuli", **SMALL)
    with pytest.raises(DataError, match="one neuron"):
        design(root)
