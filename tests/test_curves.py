"Curves over contrast, size and frequency, and gratings that stand still: known neurons come back, others are refused."

import numpy as np
import pandas as pd
import pytest

from cortexlit.core import DataError
from cortexlit.insilico.curves import curve_tuning, own_gratings, still_tuning
from cortexlit.insilico.excite import true_cells
from cortexlit.insilico.stimuli import Screen, grating_table

CONTRASTS = (0.05, 0.1, 0.2, 0.4, 0.8)
DIAMETERS = (5, 10, 20, 40, 80)
STILL = grating_table(
    direction=range(0, 180, 30),
    spatial_frequency=(0.02, 0.05),
    phase=(0, 0.25, 0.5, 0.75),
    temporal_frequency=0,
)


@pytest.fixture(scope="module")
def cells():
    return true_cells("tiny", Screen())


def test_gratings_that_neurons_share_are_shown_once_and_each_answers_to_its_own(cells, monkeypatch):
    shown = []
    responses = type(cells).responses
    monkeypatch.setattr(
        type(cells), "responses", lambda self, x: (shown.append(len(x)), responses(self, x))[1]
    )
    own = pd.DataFrame({"direction": [0.0, 90.0, 0.0], "azimuth": [0.0, 0.0, 0.0]})
    table, found = own_gratings(cells, own, rows=[5, 2, 1], contrast=CONTRASTS, batch_size=4)
    assert sum(shown) == 1 + 2 * 5 and found.shape == (5, 3)
    for k, row in enumerate([5, 2, 1]):
        _, alone = own_gratings(cells, own.iloc[[k]], rows=[row], contrast=CONTRASTS)
        np.testing.assert_allclose(alone[:, 0], found[:, k], rtol=1e-4, atol=1e-6)
    assert table["contrast"].tolist() == list(CONTRASTS)


@pytest.mark.parametrize(
    "own, rows, values, told",
    [
        ({"direction": [0.0]}, None, {"contrast": 0.5}, "8 rows"),
        ({"direction": [0.0]}, [8], {"contrast": 0.5}, "0 to 7"),
        ({"contrast": [0.1]}, [0], {"contrast": 0.5}, "not given for all"),
        ({"colour": [0.1]}, [0], {"contrast": 0.5}, "columns of grating_table"),
    ],
)
def test_gratings_of_nobody_are_refused(cells, own, rows, values, told):
    with pytest.raises(DataError, match=told):
        own_gratings(cells, pd.DataFrame(own), rows=rows, **values)


def test_true_neurons_lose_little_at_full_size_since_they_have_no_surround(cells):
    own = cells.liked[["direction", "spatial_frequency", "azimuth", "altitude"]]
    table, answers = own_gratings(cells, own, diameter=DIAMETERS, phase=(0, 0.5), contrast=0.3)
    found = curve_tuning(table, answers, "diameter", draws=20)
    assert found["suppression"].median() < 0.1 and found["suppression"].max() < 0.3  # of a Gabor's side lobes
    assert (found["r2"] > 0.9).all()


@pytest.mark.parametrize("c50, exponent", [(0.12, 1.5), (0.4, 3.0)])
def test_a_contrast_curve_is_found_again_and_its_interval_holds_it(c50, exponent):
    shown = grating_table(contrast=CONTRASTS, phase=np.arange(6) / 6)
    c = shown["contrast"].to_numpy()[:, None]
    noise = np.random.default_rng(0).normal(0, 0.02, (len(c), 30))
    found = curve_tuning(shown, c**exponent / (c**exponent + c50**exponent) + noise, "contrast")
    assert abs(np.log2(found["c50"].median() / c50)) < 0.15
    held = (found["c50_low"] <= 1.05 * c50) & (c50 <= 1.05 * found["c50_high"])
    assert held.mean() > 0.8  # the grid's step is 10 %


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
def test_suppression_is_found_again(strength):
    shown = grating_table(diameter=DIAMETERS, phase=(0, 0.5))
    d = shown["diameter"].to_numpy()[:, None]
    curve = 1 - np.exp(-((d / 16) ** 2)) - strength * (1 - np.exp(-((d / 60) ** 2)))
    fine = np.geomspace(5, 80, 500)
    true = 1 - np.exp(-((fine / 16) ** 2)) - strength * (1 - np.exp(-((fine / 60) ** 2)))
    found = curve_tuning(shown, curve, "diameter", draws=5)
    assert abs(found["suppression"][0] - (1 - true[-1] / true.max())) < 0.04 and found["r2"][0] > 0.99


def test_who_never_answers_has_no_curve():
    shown = grating_table(temporal_frequency=(1, 2, 4, 8), phase=(0, 0.5))
    found = curve_tuning(
        shown, np.stack([-np.ones(8), np.tile([[1], [2]], 4).T.ravel()], 1), "temporal_frequency"
    )
    assert np.isnan(found["temporal_frequency"][0]) and np.isfinite(found["temporal_frequency"][1])


@pytest.mark.parametrize("angle", [0, 37, 120])
def test_still_gratings_tell_orientation_and_simple_from_complex(angle):
    turn, at = 2 * np.deg2rad(STILL["direction"] - angle), 2 * np.pi * (STILL["phase"] - 0.1)
    tuned = (np.exp(np.cos(turn)) * (STILL["spatial_frequency"] == 0.05)).to_numpy()
    found = still_tuning(STILL, np.stack([tuned, tuned * (1 + np.cos(at)), tuned * (np.cos(at) > 0.7)], 1))
    away = (found["orientation"] - angle + 90) % 180 - 90
    assert away.abs().max() < 0.5 and (found["spatial_frequency"] == 0.05).all()
    np.testing.assert_allclose(found["phase_modulation"], [0, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda t: t.drop(columns="phase"), "no column"),
        (lambda t: t[t["phase"] != 0.25], "evenly"),
        (lambda t: t.iloc[1:], "each combination"),
        (lambda t: t[t["direction"] < 120], "five or more"),
    ],
)
def test_still_gratings_that_leave_holes_are_refused(spoil, told):
    table = spoil(STILL)
    with pytest.raises(DataError, match=told):
        still_tuning(table, np.ones((len(table), 2)))


def test_curves_over_what_was_not_shown_are_refused():
    with pytest.raises(DataError, match="four or more"):
        curve_tuning(STILL, np.ones((len(STILL), 2)), "spatial_frequency")
    with pytest.raises(DataError, match="one of contrast"):
        curve_tuning(STILL, np.ones((len(STILL), 2)), "phase")
    with pytest.raises(DataError, match="finite"):
        curve_tuning(STILL, np.full((len(STILL), 2), np.nan), "contrast")
