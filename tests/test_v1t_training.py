"""V1T on scenes: the study's sessions as configurations, runs that repeat and resume, a core taught by simulated cells."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cortexlit.core import DataError, rng
from cortexlit.data.exchange import import_arrays
from cortexlit.data.scenes import ScenesDataset, load_scenes
from cortexlit.models.v1t import V1T, V1TConfig
from cortexlit.simulate.screen import scene
from cortexlit.simulate.tiles import neuron_types, simulated_responses
from cortexlit.training.recipes import CORE, SCENE_RECIPE, SESSIONS, Recipe
from cortexlit.training.scenes import (
    fresh_model,
    locate,
    simulated_core,
    train_scenes,
)
from cortexlit.training.trainer import fit, predict
from cortexlit.training.tuning import Choice, Range, Space, load_best, tune

pytestmark = pytest.mark.usefixtures("no_curves")

BLIND = {"behavior": "none", "behavior_channels": 0, "pupil_channels": 0, "shift": "none"}
SMALL = {"patch": 8, "stride": 7, "emb_dim": 8, "heads": 1, "mlp_dim": 16, "depth": 1, "patch_dropout": 0.0, "dropout": 0.0}  # fmt: skip
TINY = Recipe(
    "tiny",
    SESSIONS[0].fit | {"lr": 0.01, "batch_size": 16, "epochs": 4, "schedule": "cosine"},
    SMALL,
    {"size": (36, 64)},
)
QUIET = {"progress": False}
AT = rng(0, "places").uniform(0.25, 0.75, (6, 2))  # x, y of what each planted neuron sees


@pytest.fixture(autouse=True)
def private(private_folders):
    "Runs of these tests are not those of the checkout."


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    "Six neurons on a retinotopic sheet, each excited by brightness at its place, and by running."
    draw = rng(0, "planted")
    images = np.stack([gaussian_filter(draw.normal(size=(36, 64)), 3) for _ in range(100)])
    images = 128 + 40 * images / images.std()
    image = np.repeat(np.arange(100), 3)
    seen = images[:, (AT[:, 1] * 35).round().astype(int), (AT[:, 0] * 63).round().astype(int)]
    speed = draw.gamma(1, 5, (300, 1))
    responses = np.exp((seen[image] - 128) / 60 + speed / 20) + 0.2 * draw.normal(size=(300, 6))
    return import_arrays(images, responses, tmp_path_factory.mktemp("scenes") / "data", behavior=speed,
                         behavior_names=["running"], coordinates=400 * AT, image_id=image)  # fmt: skip


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


# --- configurations


def test_the_studys_sessions():
    numbers = [
        (
            c.data["samples"],
            f["batch_size"],
            f["lr"],
            f["core_lr"],
            f["loss"],
            f["betas"][1],
            f["eps"],
            c.data["size"],
            c.data["behavior"],
        )
        for c in SESSIONS
        for f in [c.fit]
    ]
    large, small = (144, 256), (36, 64)
    assert numbers == [
        (1000, 8, 0.005, None, "poisson", 0.999, 1e-8, large, False),
        (1000, 8, 0.005, None, "correlation", 0.999, 1e-8, large, False),
        (3000, 8, 0.008, None, "correlation", 0.98, 1e-8, large, False),
        (3000, 16, 0.0005, 0.0005, "poisson", 0.999, 1e-6, small, False),
        (None, 16, 0.004, 0.007, "poisson", 0.999, 1e-6, small, False),
        (None, 16, 0.004, 0.007, "poisson", 0.999, 1e-6, small, True),
    ]
    assert [(c.name, c.reported) for c in SESSIONS] == [
        ("session 1", 0.0760), ("session 2", 0.0245), ("session 3", 0.0402),
        ("session 4", 0.1402), ("session 5", 0.1633), ("session 6", 0.1529),
    ]  # fmt: skip
    assert {c.fit["epochs"] for c in SESSIONS} == {300} and {c.fit["schedule"] for c in SESSIONS} == {
        "plateau"
    }
    assert not any(c.model for c in SESSIONS)  # the published core


def test_paper_scale_is_the_published_core(root):
    "Parameters of the session without behaviour, counted for 174 neurons."
    model = V1T(V1TConfig({"A": 174}, **BLIND))
    assert model.num_parameters() == 2_442_984
    ours = fresh_model(root, SESSIONS[4])
    assert sum(p.numel() for p in ours.core.parameters()) == sum(p.numel() for p in model.core.parameters())


def test_scales(monkeypatch):
    assert [c.at("paper") for c in SESSIONS] == list(SESSIONS)
    demo = [c.at("demo") for c in SESSIONS]
    assert {c.fit["epochs"] for c in demo} == {3} and all(c.model == CORE for c in demo)
    back = [replace(c.but(fit={"epochs": 300}), model={}, demo=SESSIONS[0].demo) for c in demo]
    assert back == list(SESSIONS) and [c.at("demo") for c in demo] == demo
    monkeypatch.setenv("CORTEXLIT_SCALE", "paper")
    assert [c.at() for c in SESSIONS] == list(SESSIONS)
    with pytest.raises(DataError, match="one of demo, paper"):
        SESSIONS[0].at("large")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("fit", {"loss": "mse"}, "one of 'poisson', 'correlation'"),
        ("data", {"size": (64, 36)}, r"one of \(36, 64\), \(144, 256\)"),
        ("fit", {"lr": 0}, "lr=0"),
        ("fit", {"core_lr": -1.0}, "core_lr=-1.0"),
        ("fit", {"eps": float("nan")}, "eps=nan"),
        ("fit", {"betas": (0.9, 1.0)}, "betas=1.0"),
        ("data", {"samples": 0}, "samples=0"),
        ("data", {"sample": 10}, "some of samples"),
        ("fit", {"batch_size": 1.5}, "batch_size=1.5"),
        ("fit", {"epochs": None}, "epochs=None"),
    ],
)
def test_what_no_session_can_have(root, part, change, words):
    with pytest.raises(DataError, match=words):
        train_scenes(root, SESSIONS[0].but(**{part: change}))


# --- models and runs


def test_a_fresh_model_knows_the_mean_response_only(root):
    model, train = fresh_model(root, TINY), load_scenes(root, "train")
    with torch.no_grad():
        model.readouts["arrays"].features.zero_()
    answer = predict(model, ScenesDataset(root, "test"), batch_size=30)
    np.testing.assert_allclose(answer, np.tile(train.labels.mean(0), (len(answer), 1)), rtol=1e-4)
    same, other = fresh_model(root, TINY), fresh_model(root, TINY, seed=1)
    a, b, c = (m.core.patch_embedding.pos_embedding for m in (model, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_a_folder_cannot_give(root, tmp_path):
    with pytest.raises(DataError, match=r"takes pictures of \(144, 256\)"):
        fresh_model(root, TINY.but(data={"size": (144, 256)}))
    draw = rng(0, "no behaviour")
    bare = import_arrays(
        draw.random((12, 36, 64)), draw.random((12, 2)), tmp_path / "bare", coordinates=draw.random((2, 2))
    )
    with pytest.raises(DataError, match="none was recorded"):
        fresh_model(bare, TINY.but(data={"behavior": True}))
    core = V1T(V1TConfig({}, **SMALL | BLIND | {"depth": 2}))
    with pytest.raises(DataError, match="the given core has other parts"):
        fresh_model(root, TINY, core)


def test_large_pictures_are_shrunk_by_the_model(tmp_path):
    draw = rng(0, "large")
    large = import_arrays(
        draw.random((12, 144, 256)), draw.random((12, 2)), tmp_path / "large", coordinates=draw.random((2, 2))
    )
    model = fresh_model(large, TINY.but(data={"size": (144, 256)}))
    assert model.config.seen == (36, 64)
    assert predict(model, ScenesDataset(large, "test")).shape[1] == 2


def test_training_lowers_the_loss_and_finds_what_was_planted(root, tmp_path):
    "Held-out pictures; against the same predictions with the pictures exchanged."
    run = train_scenes(
        root, TINY.but(fit={"epochs": 12}, data={"located": True}), out=tmp_path / "run", **QUIET
    )
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    test = load_scenes(root, "test")
    answer = predict(run.model, ScenesDataset(root, "test"), batch_size=30)
    pictures, row = np.unique(test.image, return_inverse=True)
    mean = np.stack([answer[row == k].mean(0) for k in range(len(pictures))])
    chance = [
        V1T.correlation(mean[rng(k, "exchanged").permutation(len(mean))][row], test.labels) for k in range(50)
    ]
    assert V1T.correlation(answer, test.labels) > max(chance) + 0.1


def test_same_seed_same_weights(root, tmp_path):
    runs = [
        train_scenes(root, TINY.but(fit={"epochs": 1}), seed=s, out=tmp_path / str(k), **QUIET)
        for k, s in enumerate((0, 0, 1))
    ]
    assert torch.equal(weights(runs[0]), weights(runs[1])) and not torch.equal(
        weights(runs[0]), weights(runs[2])
    )


def test_resumed_equals_uninterrupted(root, tmp_path, monkeypatch):
    whole = train_scenes(root, TINY, out=tmp_path / "whole", **QUIET)
    with monkeypatch.context() as patch:
        reads, get = [0], ScenesDataset.__getitem__

        def fails(self, i):
            reads[0] += 1
            if (
                reads[0] == 1200
            ):  # in the third epoch: each reads 210 and 30, the look at the data before as many
                raise ConnectionError("no power")
            return get(self, i)

        patch.setattr(ScenesDataset, "__getitem__", fails)
        with pytest.raises(ConnectionError):
            train_scenes(root, TINY, out=tmp_path / "cut", **QUIET)
    done = len((tmp_path / "cut" / "history.csv").read_text().splitlines()) - 1
    assert 0 < done < TINY.fit["epochs"]
    again = train_scenes(root, TINY, out=tmp_path / "cut", **QUIET)
    assert torch.equal(weights(whole), weights(again))
    assert whole.history.drop(columns="seconds").equals(again.history.drop(columns="seconds"))


def test_samples_are_drawn_from_train_with_the_seed(root, monkeypatch):
    given = {}
    monkeypatch.setattr(
        "cortexlit.training.scenes.fit", lambda model, data, **options: given.update(data=data, **options)
    )
    drawn = []
    for seed in (0, 0, 1):
        train_scenes(root, TINY.but(data={"samples": 50}), seed=seed)
        drawn.append(given["data"][0].indices)
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 50
    assert given["data"][0].dataset.tier == "train" and given["data"][1].tier == "validation"
    train_scenes(root, TINY.but(data={"samples": 10_000}))
    assert len(given["data"][0]) == len(ScenesDataset(root, "train"))
    train_scenes(root, SESSIONS[4], lr=1.0)
    assert (
        given["lr"] == 1.0
        and given["core_lr"] == 0.007
        and given["betas"] == (0.9, 0.999)
        and given["adapt"] == "full"
    )


def test_running_enters_only_where_asked(root):
    item = ScenesDataset(root, "train")[0]
    for behavior in (False, True):
        model = fresh_model(root, TINY.but(data={"behavior": behavior}))
        with torch.no_grad():
            a, b = (model(item["image"][None], torch.full((1, 1), v)).logits for v in (0.0, 3.0))
        assert torch.equal(a, b) != behavior


# --- the core taught by simulated cells, and where to read


@pytest.fixture(scope="module")
def simulated():
    return simulated_core(pictures=60, steps=60, patch=16, stride=10, emb_dim=8, heads=1, mlp_dim=32)


def test_a_core_learns_simulated_cells(simulated):
    core, curve = simulated
    assert curve["step"].tolist() == [50, 60] and curve["correlation"].iloc[-1] > 0.3
    assert core.config.neurons == {} and not core.training


def test_simulated_cells_answer_to_their_place_only():
    pictures = scene(rng(0, "a picture"), 1, (120, 152)).repeat(2, 0)
    pictures[1, :, :40] = (
        255 - pictures[1, :, :40]
    )  # the left third inverted: rows of patches are 2, columns 4
    answers = simulated_responses(neuron_types(8), [12, -12], [-45, -15, 15, 45], pictures)
    assert answers.shape == (2, 8, 8) and np.isfinite(answers).all() and (answers >= 0).all()
    change = np.abs(answers[1] - answers[0]).reshape(8, 2, 4).mean((0, 1))
    assert change[0] > 0 and change[3] < 1e-3 * change[0]


def test_locate_finds_planted_places(root):
    "Reading points follow where the neurons' stimuli are, also if cortex is mirrored."
    train, start = load_scenes(root, "train"), TINY.but(data={"located": True})
    for flip in (1, -1):
        model = fresh_model(root, start)
        locate(model, train, 400 * AT * [flip, 1])
        points = model.reading_points()[0].detach().numpy()
        for axis in (0, 1):
            assert np.corrcoef(points[:, axis], AT[:, axis])[0, 1] > 0.8


def test_a_given_core_is_used(root, simulated):
    core, _ = simulated
    recipe = SCENE_RECIPE.but(model={k: getattr(core.config, k) for k in SCENE_RECIPE.model})
    for behavior in (False, True):
        model = fresh_model(root, recipe.but(data={"behavior": behavior}), core)
        own = model.core.state_dict()
        assert all(torch.equal(own[name], value) for name, value in core.core.state_dict().items())
        assert any(name.startswith("behavior.") for name in own) == behavior


def test_depth_and_learning_rate_are_tuned(root, tmp_path):
    "A search over V1T, frozen nowhere; what it saves is what `fit` takes."
    tiers = tuple(ScenesDataset(root, tier) for tier in ("train", "validation"))
    options = {k: v for k, v in TINY.fit.items() if k not in ("lr", "epochs")}

    def build(params: dict) -> V1T:
        return fresh_model(root, TINY.but(model=params))

    space = Space({"depth": Choice((1, 2)), "lr": Range(1e-4, 0.03, log=True)})
    found = tune(
        build, tiers, space, tmp_path / "search", trials=3, epochs=2, pruner=None, progress=False, **options
    )
    values = found.table()["validation"]
    assert found.value == values.max() > values.min()
    model, chosen = load_best(tmp_path / "search" / "best.json")
    again = fit(build(model), tiers, out=tmp_path / "again", progress=False, **chosen)
    assert again.correlation == found.value
    assert found.open_test(ScenesDataset(root, "test")).shape[-1] == 6


# --- a lab's own pictures


@pytest.mark.parametrize(
    ("size", "seen", "patch"), [((20, 30), (20, 30), 16), ((8, 10), (8, 10), 8), ((200, 160), (36, 29), 16)]
)
def test_pictures_of_any_size_and_neurons_without_places(tmp_path, size, seen, patch):
    "V1T follows the folder, and neurons of unknown places start where their responses point, one by one."
    draw = rng(0, "any size")
    images = np.stack([gaussian_filter(draw.normal(size=size), 2) for _ in range(40)])
    image = np.repeat(np.arange(40), 3)
    responses = np.exp(images[image][:, size[0] // 2, [2, size[1] - 3]] / images.std() / 2)
    responses = responses + 0.1 * draw.random(responses.shape)
    folder = import_arrays(128 + 99 * images, responses, tmp_path / "lab", image_id=image)
    assert not np.isfinite(ScenesDataset(folder, "train").neurons[["x_um", "y_um"]].to_numpy(float)).any()
    run = train_scenes(folder, epochs=1, out=tmp_path / "run", **QUIET)
    config = run.model.config
    assert (config.seen, config.patch, config.positions) == (seen, patch, "free")
    left, right = run.model.reading_points()[0].detach()[:, 0]
    assert left < right or size[1] < 20  # one patch holds a small picture
    assert predict(run.model, ScenesDataset(folder, "test")).shape[1] == 2


def test_a_named_session_still_takes_its_own_size_only(tmp_path):
    draw = rng(0, "another size")
    folder = import_arrays(draw.random((20, 20, 30)), draw.random((20, 3)), tmp_path / "lab")
    with pytest.raises(DataError, match=r"session 5 takes pictures of \(36, 64\)"):
        train_scenes(folder, SESSIONS[4], **QUIET)
