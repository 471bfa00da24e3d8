"""The demonstration core: its recipe, its interruptions, and what ships."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cortexlit.core import DataError, read_json
from cortexlit.models.viv1t import ViV1T, ViV1TConfig
from cortexlit.simulate.tiles import neuron_types
from cortexlit.training import pretraining
from cortexlit.training.pretraining import Pretraining, demo_core, pretrain, simulate

TINY = Pretraining(mice=1, types=8, clips=2, steps=4, batch_size=1)


@pytest.fixture
def places(tmp_path, monkeypatch):
    "Generated data and runs of this test only, and a core with a quarter of the tokens."
    config = Pretraining.config.fget
    coarse = property(lambda recipe: ViV1TConfig(**config(recipe).to_diff_dict() | {"stride": (1, 8, 8)}))
    monkeypatch.setattr(Pretraining, "config", coarse)
    for name in ("generated", "runs"):
        monkeypatch.setattr(pretraining, name, lambda *parts, name=name: tmp_path.joinpath(name, *parts))
    return tmp_path


def test_an_interrupted_run_ends_in_the_same_weights(places, monkeypatch):
    whole = pretrain(places / "whole", TINY, progress=False, save_every=2)
    state = next((places / "runs").rglob("state.pt"))
    state.unlink()
    scored = pretraining.held_out_correlation
    calls = []

    def cut(*args):
        calls.append(1)
        if len(calls) == 2:  # after the last step, before it is saved
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(pretraining, "held_out_correlation", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain(places / "again", TINY, progress=False, save_every=2)
    assert not (places / "again").exists()
    assert pretraining._load_state(state)["step"] == 2
    monkeypatch.setattr(pretraining, "held_out_correlation", scored)
    again = pretrain(places / "again", TINY, progress=False, save_every=2)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "curve.csv").read_text() == (again / "curve.csv").read_text()


def test_what_is_in_the_way_stays(places):
    (places / "core").mkdir()
    (places / "core" / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="in the way"):
        pretrain(places / "core", TINY)
    assert (places / "core" / "mine.txt").read_text() == "kept"


def test_population_is_the_same_every_time_and_of_other_mice(places):
    first = simulate(TINY, folder=places / "a", progress=False)
    again = simulate(TINY, folder=places / "b", progress=False)
    other = simulate(TINY, seed=1, folder=places / "c", progress=False)
    assert np.array_equal(first.videos, again.videos) and np.array_equal(first.responses, again.responses)
    assert not np.array_equal(first.videos, other.videos)
    assert np.isfinite(np.asarray(first.responses, np.float32)).all() and (first.responses >= 0).all()
    assert (
        neuron_types(88)["cell_id"].min() > 920_000_000 + 1000 * 7000
    )  # no embedded mouse has such a number


@pytest.mark.parametrize(
    "wrong", [{"types": 0}, {"types": 30}, {"lr": -1.0}, {"mice": 3, "types": 88}, {"clips": 1}]
)
def test_wrong_recipes_are_refused(wrong):
    with pytest.raises(DataError):
        Pretraining(**wrong)


def test_the_core_that_ships():
    core = demo_core()
    assert (core / "model.safetensors").stat().st_size <= 3e6
    model = ViV1T.from_published(core, core_only=True, mice={})
    recipe = Pretraining(**read_json(core / "provenance.json")["recipe"])
    assert recipe == Pretraining() and model.config.grid == recipe.config.grid
    with torch.no_grad():
        features = model.encode(torch.rand(1, 1, 140, 36, 64), last=66)
    assert features.shape == (1, 88, 66, 5, 12) and torch.isfinite(features).all()
    assert f"{read_json(core / 'provenance.json')['validation']:.3f}" in (core / "README.md").read_text()
