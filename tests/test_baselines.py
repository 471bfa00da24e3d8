"""The score sheet of a dataset folder takes predictions of further models."""

import numpy as np
import pytest
from toys import toy_recording

from cortexlit.core import DataError
from cortexlit.data.clips import build_dataset, load_tier
from cortexlit.evaluation.baselines import score_dataset
from cortexlit.evaluation.metrics import mean_score, single_trial_correlation


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
