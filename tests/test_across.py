"What models taught with one stimulus say of another, and how simulated neurons answer to any."

import numpy as np
import pytest
import torch

from cortexlit.core import DataError
from cortexlit.insilico import excite
from cortexlit.insilico.across import across_stimuli, simulated_trials
from cortexlit.insilico.excite import true_cells
from cortexlit.insilico.stimuli import Screen, grating_table, render_gratings
from cortexlit.simulate.cortex import receptive_fields
from cortexlit.simulate.screen import FIELD, resize
from cortexlit.simulate.session import embedded_session, load_truth

SCREEN = Screen(rate=30.168)


@pytest.fixture(scope="module")
def cells():
    return true_cells("tiny", SCREEN)


@pytest.fixture(scope="module")
def films():
    shown = grating_table(direction=(0, 45, 90, 135), spatial_frequency=(0.03, 0.06), contrast=0.9)
    return render_gratings(shown, SCREEN, 100)


def test_all_neurons_answer_to_many_films_as_each_to_its_own(cells, films):
    x = torch.from_numpy(films)
    together = cells.responses(x).numpy()
    alone = np.stack([cells.answers(x, [k] * len(x)).numpy() for k in range(8)], 1)
    assert together.shape == (8, 8, 88)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


def test_the_unit_of_drive_is_found_again(monkeypatch, cells):
    true_cells("tiny", SCREEN)
    monkeypatch.setattr(excite, "energy_scale", None)  # would be called
    assert (true_cells("tiny", SCREEN).scale == cells.scale).all()


def test_other_films_give_another_unit(monkeypatch, cells):
    monkeypatch.setattr(excite, "natural_movie", lambda name, frames: np.zeros((frames, 2, 2), np.uint8))
    monkeypatch.setattr(excite, "energy_scale", lambda neurons, size: np.ones(len(neurons)))
    assert (true_cells("tiny", SCREEN).scale == 1).all() and not (cells.scale == 1).any()


def test_neurons_of_the_other_session_see_the_middle_of_a_taller_screen():
    tall = Screen(degrees=(120 * 120 / 152, 120.0))
    cells = true_cells("tiny", tall, session="B")
    known = load_truth(embedded_session("tiny"), 900000002)
    np.testing.assert_allclose(cells.neurons["azimuth"], known["azimuth"], rtol=1e-5)
    pictures = np.random.default_rng(0).normal(size=(3, 36, 64)).astype(np.float32)
    middle = resize(resize(pictures, (120, 64))[:, 22:98], FIELD)
    direct = np.einsum("nkhw,bhw->bnk", receptive_fields(cells.neurons), middle)
    found = np.einsum("nkhw,bhw->bnk", cells.fields.numpy(), pictures)
    np.testing.assert_allclose(found, direct, rtol=1e-3, atol=1e-3)
    for wrong in ({"session": "C"}, {"screen": Screen(degrees=(40.0, 120.0))}):
        with pytest.raises(DataError, match="60 high or more"):
            true_cells(**{"size": "tiny", "screen": tall} | wrong)


def test_trials_are_noise_around_what_is_expected(cells, films):
    expected, trials = simulated_trials(cells, films, repeats=60, seed=1)
    late = (slice(None), slice(None), slice(60, None))  # when the clip before has faded
    assert expected.shape == (8, 8, 100) and trials.shape == (60, 8, 8, 100) and trials.dtype == np.float32
    again, other = (simulated_trials(cells, films, repeats=2, seed=s)[1] for s in (1, 2))
    assert (again != other).any() and (simulated_trials(cells, films, repeats=2, seed=1)[1] == again).all()
    strong = np.argsort(expected[late].std((0, 2)))[-3:]
    alike = [
        np.corrcoef(trials.mean(0)[late][:, k].ravel(), expected[late][:, k].ravel())[0, 1] for k in strong
    ]
    assert min(alike) > 0.9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"films": np.zeros((2, 36, 64))}, "clips, frames"),
        ({"films": np.full((1, 9, 36, 64), 1.5)}, "-1 to 1"),
        ({"films": np.full((1, 9, 36, 64), np.nan)}, "-1 to 1"),
        ({"repeats": 0}, "one or more"),
    ],
)
def test_what_cannot_be_simulated_is_refused(cells, films, change, told):
    with pytest.raises(DataError, match=told):
        simulated_trials(cells, **({"films": films} | change))


def test_a_table_across_stimuli_knows_right_from_wrong():
    random = np.random.default_rng(0)
    truth = {k: random.normal(size=(10, 6, 50)) + random.normal(size=(10, 1, 50)) for k in ("films", "noise")}
    seeds = np.stack([truth["films"] + 0.5 * random.normal(size=(10, 6, 50)) for _ in range(3)])
    table = across_stimuli(
        {("films", "films"): seeds, ("films", "noise"): seeds, ("noise", "noise"): truth["noise"]}, truth
    )
    own, wrong, perfect = table.itertuples()
    assert (
        (table["clips"] == 10).all()
        and (table["neurons"] == 6).all()
        and table["seeds"].tolist() == [3, 3, 1]
    )
    assert own.low < own.correlation < own.high and abs(own.correlation - np.sqrt(2 / 2.25)) < 0.03
    assert wrong.low < 0 < wrong.high and perfect.correlation == pytest.approx(1)
    assert perfect.exchanged == pytest.approx(0.5, abs=0.06)  # half of the variance is shared
    noisy = np.stack([truth["noise"] + random.normal(size=(10, 6, 50)) for _ in range(4)])
    (trials,) = across_stimuli({("noise", "noise"): truth["noise"]}, {"noise": noisy}).itertuples()
    assert trials.clips == 10 and trials.correlation == pytest.approx(np.sqrt(2 / 3), abs=0.03)


def test_a_table_of_what_does_not_fit_is_refused():
    answers = np.zeros((4, 3, 20))
    with pytest.raises(DataError, match="no responses to 'noise'"):
        across_stimuli({("films", "noise"): answers}, {"films": answers})
    with pytest.raises(DataError, match="clips, neurons, frames"):
        across_stimuli({("films", "films"): answers[:, :2]}, {"films": answers})
