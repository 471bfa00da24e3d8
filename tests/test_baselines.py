"""The score sheet of a dataset folder takes predictions of further models."""

from types import SimpleNamespace

import numpy as np
import pytest
from toys import toy_recording

from cortexlit.core import DataError
from cortexlit.data.allen import open_session
from cortexlit.data.clips import build_dataset, load_tier
from cortexlit.evaluation import baselines
from cortexlit.evaluation.baselines import MIN_FEVE_FRAMES, ORACLE, TRUTH, clip_baselines, score_dataset
from cortexlit.evaluation.ceilings import split_half_reliability
from cortexlit.metrics import mean_score, single_trial_correlation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_dataset(
        toy_recording(),
        tmp_path_factory.mktemp("scores") / "data",
        clip_frames=20,
        size=(9, 16),
        split="repeats",
    )


def test_predictions_of_the_last_frames_are_enough(folder):
    test = load_tier(folder, "test")
    guess = np.random.default_rng(0).standard_normal(test.labels.shape).astype("float32")
    models = {("model", 0): guess, ("model", 1): guess[..., -12:], "unseeded": guess}
    rows = score_dataset(folder, last=9, models=models).table()
    rows = rows[rows["metric"] == "single-trial correlation"]
    expected = mean_score(single_trial_correlation(guess, test.labels, last=9, reduce=None))
    found = rows[rows["model"].isin(["model", "unseeded"])]
    np.testing.assert_allclose(found["value"], expected)
    assert found["seed"].tolist()[:2] == [0, 1] and found["seed"].isna().tolist() == [False, False, True]


def test_too_few_predicted_frames_are_refused(folder):
    test = load_tier(folder, "test")
    with pytest.raises(DataError, match="last=9 with 5 frames"):
        score_dataset(folder, last=9, models={"model": test.labels[..., -5:]})


def one(sheet, metric, column="value"):
    rows = sheet.table()
    return rows[rows["metric"] == metric].set_index("model")[column]


def test_without_the_truth_ceilings_come_from_split_halves_and_other_repeats_are_none(folder):
    parts = {tier: load_tier(folder, tier) for tier in ("train", "validation", "test")}
    sheet = score_dataset(folder, last=9)
    assert ORACLE in set(sheet.table()["model"])
    assert one(sheet, "single-trial correlation", "ceiling").isna().all()
    labels, clip = (np.concatenate([getattr(d, k) for d in parts.values()]) for k in ("labels", "clip"))
    r = split_half_reliability(labels, clip, last=9, repeats=1)
    expected = mean_score(np.sign(r) * np.sqrt(abs(r)))
    np.testing.assert_allclose(one(sheet, "flattened correlation", "ceiling"), expected)
    ceiling = one(sheet, "flattened correlation", "value")["ceiling: split halves"]
    assert ceiling == pytest.approx(expected)
    low, high = (one(sheet, "flattened correlation", end)["ceiling: split halves"] for end in ("low", "high"))
    assert np.isnan(low) == (len(np.unique(clip)) < 5) and not low > ceiling and not high < ceiling
    assert (
        one(sheet, "correlation to average", "ceiling").isna().all()
    )  # the test tier has one repeat of each clip


def test_the_truth_is_the_ceiling_where_it_is_known(folder):
    test = load_tier(folder, "test")
    known = test.labels + np.random.default_rng(0).normal(size=test.labels.shape)
    sheet = score_dataset(folder, last=9, truth=known)
    for metric in ("single-trial correlation", "flattened correlation"):
        np.testing.assert_allclose(one(sheet, metric, "ceiling"), one(sheet, metric)[TRUTH])
    assert (one(sheet, "FEVE", "ceiling") == 1).all() and (one(sheet, "r2_ER", "ceiling") == 1).all()


def test_r2_er_and_feve_speak_of_the_same_neurons():
    g = np.random.default_rng(0)
    signal, clip = g.normal(size=(6, 5, 20)), np.repeat(np.arange(6), 3)
    y = signal[clip] + np.array([0.3, 0.5, 4, 8, 0.4])[:, None] * g.normal(size=(18, 5, 20))
    data = SimpleNamespace(labels=y, clip=clip)
    tables = {m: v[0] for m, v in baselines.clip_metrics(signal[clip], data, 20).items()}
    assert np.array_equal(np.isnan(tables["FEVE"]), np.isnan(tables["r2_ER"]))
    assert 0 < np.isnan(tables["FEVE"][0]).sum() < 5
    assert np.nanmean(tables["r2_ER"]) == pytest.approx(1, abs=0.1)
    once = baselines.clip_metrics(signal, SimpleNamespace(labels=signal, clip=np.arange(6)), 20)
    assert [m for m, v in once.items() if v is None] == ["correlation to average", "FEVE", "r2_ER"]


def test_baselines_at_hand_are_not_fitted_again(folder, monkeypatch):
    found = clip_baselines(folder)
    expected = score_dataset(folder, last=9).table()
    monkeypatch.setattr(baselines, "clip_baselines", lambda root: pytest.fail("fitted again"))
    assert score_dataset(folder, last=9, baselines=found).table().equals(expected)


def test_no_feve_from_a_few_frames(tiny_cache, tmp_path):
    "The other metrics are there all the same."
    session = open_session(900_000_001, cache_dir=tiny_cache)
    root = build_dataset(session, tmp_path / "mouse", split="stimuli", clip_frames=26, gap=5)
    test = load_tier(root, "test")
    enough = -(-MIN_FEVE_FRAMES // (len(test.clip) - len(np.unique(test.clip))))
    assert 1 < enough <= 26
    known = {"baselines": {"repeat mean": np.zeros_like(test.labels)}, "models": {"knows": test.labels}}
    few, many = (score_dataset(root, last=last, **known) for last in (enough - 1, enough))
    assert one(few, "FEVE").isna().all() and one(few, "FEVE", "baseline").isna().all()
    assert f"frames repeat a showing, {MIN_FEVE_FRAMES} are needed" in one(few, "FEVE", "note")["knows"]
    assert (
        "are needed" not in one(many, "FEVE", "note")["knows"]
    )  # whether a neuron can be scored is another question
    assert one(few, "correlation to average")["knows"] == pytest.approx(1)
