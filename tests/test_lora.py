"""The grid: every cell once, whoever runs it and whatever happens to him."""

import copy
import gc
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from optuna.trial import TrialState
from processes import Process
from toy_training import FRAMES, tiny_model
from toys import toy_recording

from cortexlit.core import DataError
from cortexlit.data.audit import openings
from cortexlit.data.clips import MouseDataset, build_dataset
from cortexlit.metrics import single_trial_correlation
from cortexlit.models.adapters import Adapters, load_adapters
from cortexlit.training import lora, trials
from cortexlit.training.lora import Grid, clip_folds, cross_validate
from cortexlit.training.recipes import FULL, STUDY, Recipe
from cortexlit.training.trainer import Diverged, Fit, predict

pytestmark = pytest.mark.usefixtures("no_curves")

LAST = 8


def _adapting(name: str, adapters: Adapters, lr: float, schedule: str, epochs: tuple[int, ...]) -> Recipe:
    fit = {"adapt": "lora", "adapters": adapters, "lr": lr, "schedule": schedule, "epochs": epochs}
    return Recipe(name, fit)


CONFIGURATIONS = (
    _adapting("small", Adapters(2, "fused"), 0.01, "cosine", (1,)),
    _adapting("large", Adapters(4, "all"), 0.01, "linear", (1, 1)),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "A dataset folder and a core."
    folder = tmp_path_factory.mktemp("grid")
    build_dataset(toy_recording(), folder / "data", clip_frames=FRAMES, size=(10, 14), split="stimuli", gap=5)
    tiny_model(core_state=False).save_core(folder / "core")
    return folder / "data", folder / "core"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(autouse=True)
def shared(private_folders, place, monkeypatch):
    "Heads and features of these tests are not those of the checkout, and are made once for all of them."
    monkeypatch.chdir(place)


def grid(inputs, out: Path, configurations=CONFIGURATIONS, seeds=(0, 1), **options) -> Grid:
    root, core = inputs
    return Grid(
        root,
        configurations,
        seeds,
        core=core,
        out=out,
        last=LAST,
        head={"epochs": 1},
        batch_size=4,
        **options,
    )


def test_the_studys_configurations():
    assert [(c.fit["adapters"].rank, c.fit["adapters"].targets) for c in STUDY] == [
        (rank, targets) for rank in (8, 16, 32) for targets in ("all", "fused")
    ]
    assert [c.fit["lr"] for c in STUDY] == [0.0036, 0.001, 0.001, 0.001, 0.0036, 0.001]
    assert [c.fit["schedule"] for c in STUDY] == ["linear", "cosine"] * 1 + ["linear", "cosine"] * 2
    assert [c.fit["epochs"] for c in STUDY] == [(25,), (25, 35), (30,), (30,), (35,), (35,)]
    assert all(c.fit["adapters"].config().lora_alpha == 2 * c.fit["adapters"].rank for c in STUDY)
    assert [c.at("demo").fit["epochs"] for c in [*STUDY, FULL]] == [
        (2,),
        (2, 2),
        (2,),
        (2,),
        (2,),
        (2,),
        (2,),
    ]
    assert [c.at("paper") for c in STUDY] == list(STUDY)
    with pytest.raises(DataError, match="demo, paper"):
        STUDY[0].at("large")


def test_a_grid_and_what_it_keeps(inputs, tmp_path, capsys):
    done = grid(inputs, tmp_path / "grid").run()
    assert capsys.readouterr().out.count("validation correlation") == 4
    table = done.table()
    assert list(zip(table["configuration"], table["seed"], strict=True)) == [
        ("small", 0), ("small", 1), ("large", 0), ("large", 1)
    ]  # fmt: skip
    assert table["epochs"].tolist() == ["1", "1", "1+1", "1+1"]
    assert done.best() == table.groupby("configuration")["validation"].mean().idxmax()
    for name, seed, value in table[["configuration", "seed", "validation"]].itertuples(index=False):
        run = tmp_path / "grid" / f"{name}-seed{seed}"
        kept = {"config.json", "provenance.json", "history.csv", "curves.png", "best", "tensorboard"}
        assert kept <= {path.name for path in run.iterdir()}
        assert json.loads((run / "config.json").read_text())["adapters"]["rank"] in (2, 4)
        model = copy.deepcopy(done.start(seed).model)
        load_adapters(model, run / "best" / "adapters")
        validation = MouseDataset(inputs[0], "validation")
        labels = np.stack([validation[i]["labels"][:, -LAST:].numpy() for i in range(len(validation))])
        assert single_trial_correlation(predict(model, validation, LAST), labels) == pytest.approx(
            value, abs=1e-4
        )
    trial = done.study().trials[0]
    assert set(trial.user_attrs) == {"folder", "best_epoch", "seconds"} and trial.intermediate_values
    # again, and with one seed more: nothing is run twice
    grid(inputs, tmp_path / "grid").run()
    assert not capsys.readouterr().out
    grid(inputs, tmp_path / "grid", seeds=(0, 1, 2)).run()
    assert capsys.readouterr().out.count("seed 2") == 2


def test_the_test_tier_is_predicted_once(inputs, tmp_path, monkeypatch):
    done, before = grid(inputs, tmp_path / "grid", seeds=(0,)).run(progress=False), len(openings(inputs[0]))
    first = done.predictions()
    assert openings(inputs[0])["by"].tolist()[before:] == ["small-seed0", "large-seed0"]
    assert set(first) == {("small", 0), ("large", 0)}
    shape = (len(MouseDataset(inputs[0], "test")), 5, LAST)
    assert all(p.shape == shape and np.isfinite(p).all() for p in first.values())
    monkeypatch.setattr(lora, "predict", None)
    again = done.predictions()
    assert all((again[k] == first[k]).all() for k in first)
    assert len(openings(inputs[0])) == before + 2


def work(inputs, out: Path, deadly: bool) -> None:
    "One worker on the grid; a deadly one is killed at the end of its first large run."
    fit = lora.fit

    def dies(*args, **options):
        done = fit(*args, **options)
        if "large" in str(options["out"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    gc.collect, Fit.curves = (lambda *_: 0), (lambda run: Figure())
    if deadly:  # the others keep the usual heartbeat: a busy machine must not take them for dead
        trials._HEARTBEAT, lora.fit = 1, dies
    grid(inputs, out).run()


def test_two_workers_share_a_study_and_nothing_is_run_twice(inputs, tmp_path):
    workers = [Process(tmp_path, work, inputs, tmp_path / "grid", False) for _ in range(2)]
    codes, told = zip(*(worker.ended() for worker in workers), strict=True)
    assert codes == (0, 0), told
    lines = Counter(line.split(":")[0] for out in told for line in out.splitlines())
    assert lines == {f"{name}, seed {seed}": 1 for name in ("small", "large") for seed in (0, 1)}
    table = grid(inputs, tmp_path / "grid").table()
    assert len(table) == 4


def share(inputs, out, log) -> None:
    grid(inputs, out, storage=f"journal:///{log}").run()


def test_two_workers_share_a_journal_and_nothing_is_run_twice(inputs, tmp_path):
    log = tmp_path / "grid.log"
    workers = [Process(tmp_path, share, inputs, tmp_path / "grid", log) for _ in range(2)]
    codes, told = zip(*(worker.ended() for worker in workers), strict=True)
    assert codes == (0, 0), told
    lines = Counter(line.split(":")[0] for out in told for line in out.splitlines())
    assert lines == {f"{name}, seed {seed}": 1 for name in ("small", "large") for seed in (0, 1)}
    assert len(grid(inputs, tmp_path / "grid", storage=f"journal:///{log}").table()) == 4


def test_a_killed_workers_trial_is_taken_over(inputs, tmp_path, monkeypatch):
    code, told = Process(tmp_path, work, inputs, tmp_path / "grid", True).ended()
    assert code == -signal.SIGKILL, told
    monkeypatch.setattr(trials, "_HEARTBEAT", 1)
    again = grid(inputs, tmp_path / "grid")
    assert [t.state for t in again.study().trials].count(TrialState.RUNNING) == 1
    again.run(progress=False)
    states = Counter(t.state for t in again.study().trials)
    assert states == {TrialState.COMPLETE: 4, TrialState.FAIL: 1}
    assert len(again.table()) == 4


def test_a_cell_queued_twice_is_run_once(inputs, tmp_path, capsys):
    one = grid(inputs, tmp_path / "grid", seeds=(0,))
    study = one.study()
    for _ in range(2):  # as if two workers had looked at the same moment
        for cell in one.cells:
            study.enqueue_trial(cell)
    one.run()
    assert capsys.readouterr().out.count("validation correlation") == 2
    assert Counter(t.state for t in study.trials) == {TrialState.COMPLETE: 2, TrialState.FAIL: 2}


def test_an_interrupted_trial_is_run_again(inputs, tmp_path, monkeypatch):
    one, real = grid(inputs, tmp_path / "grid", seeds=(0,)), lora.fit

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    monkeypatch.setattr(lora, "fit", real)
    assert len(one.run(progress=False).table()) == 2


def test_a_configuration_that_diverges_is_done_and_not_chosen(inputs, tmp_path, monkeypatch, capsys):
    real, calls = lora.fit, []

    def diverges(*args, **options):
        calls.append(options["out"].name)
        if calls[-1] == "large-seed0":
            raise Diverged("loss nan in epoch 1")
        return real(*args, **options)

    monkeypatch.setattr(lora, "fit", diverges)
    done = grid(inputs, tmp_path / "grid", seeds=(0,)).run()
    assert "large, seed 0: given up loss nan in epoch 1" in capsys.readouterr().out
    grid(inputs, tmp_path / "grid", seeds=(0,)).run()
    assert calls == ["small-seed0", "large-seed0"]
    assert done.table()["validation"].isna().tolist() == [False, True] and done.best() == "small"
    assert set(done.predictions()) == {("small", 0)}
    only = grid(inputs, tmp_path / "other", CONFIGURATIONS[1:], seeds=(0,)).run(progress=False)
    with pytest.raises(DataError, match="no configuration came to an end"):
        only.best()


def test_other_options_are_another_study(inputs, tmp_path):
    names = {
        grid(inputs, tmp_path / "grid", **options).name
        for options in ({}, {"weight_decay": 0.1}, {"configurations": CONFIGURATIONS[:1]}, {"seeds": (7,)})
    }
    assert len(names) == 3  # more seeds are the same study


def test_bad_storage_and_empty_grids(inputs, tmp_path):
    with pytest.raises(DataError, match="database URL"):
        grid(inputs, tmp_path / "grid", storage="grid.db").run()
    with pytest.raises(DataError, match="one or more"):
        grid(inputs, tmp_path / "grid", seeds=())


def test_folds_hold_out_every_clip_once(inputs):
    folds = clip_folds(inputs[0], 3, seed=1)
    tiers = [MouseDataset(inputs[0], tier) for tier in ("train", "validation")]
    clip = np.concatenate([tier.samples["clip"] for tier in tiers])
    seen = np.concatenate([validation.indices for _, validation in folds])
    assert sorted(seen) == list(range(len(clip)))
    for train, validation in folds:
        assert not set(clip[train.indices]) & set(clip[validation.indices])
        assert len(train) + len(validation) == len(clip)
    assert [f[1].indices for f in folds] == [f[1].indices for f in clip_folds(inputs[0], 3, seed=1)]
    with pytest.raises(DataError, match="2 to"):
        clip_folds(inputs[0], 1)


def test_a_recipe_that_says_more_than_how_to_fit_is_refused(inputs):
    "What it asks of the model or the data would be left out without a word."
    for more in ({"model": {"depth": 1}}, {"data": {"samples": 10}}):
        wrong = CONFIGURATIONS[0].but(**more)
        with pytest.raises(DataError, match="also has options of the"):
            Grid(inputs[0], [wrong], [0], core=inputs[1], last=LAST)
        with pytest.raises(DataError, match="also has options of the"):
            cross_validate(inputs[0], wrong, core=inputs[1], last=LAST)


def test_folds_that_are_done_are_not_trained_again(inputs, tmp_path, monkeypatch, capsys):
    real, calls = lora.fit, []

    def dies(*args, **options):
        calls.append(options["adapt"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    def validated(**changes):
        options = {
            "folds": 2,
            "core": inputs[1],
            "last": LAST,
            "head": {"epochs": 1},
            "batch_size": 4,
            "out": tmp_path / "cross",
        }
        return cross_validate(inputs[0], CONFIGURATIONS[0], **options | changes)

    monkeypatch.setattr(lora, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        validated()
    table = validated()
    assert calls == ["head", "lora", "head"] + ["head", "lora"] and list(table)[-2:] == ["head only", "small"]
    assert table.equals(validated()) and len(calls) == 5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["small, fold 0"] * 2 + [
        "small, fold 1",
        "small, fold 0",
        "small, fold 1",
    ]
    for change in ({"seed": 1}, {"head": {"epochs": 2}}, {"lr": 0.5}):
        with pytest.raises(DataError, match="the run in this folder has"):
            validated(**change)
