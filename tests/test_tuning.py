"""A search draws the same, loses nothing and runs nothing twice, whoever works on it and whatever happens to him."""

import gc
import json
import os
import re
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from matplotlib.figure import Figure
from optuna.trial import TrialState
from processes import Process
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from cortexlit.core import DataError, SplitLeak, rng
from cortexlit.training import trials as loop
from cortexlit.training import tuning
from cortexlit.training.trainer import Fit, fit, predict
from cortexlit.training.trials import holding, open_storage
from cortexlit.training.tuning import SPACES, Choice, Range, Space, load_best, tune

pytestmark = pytest.mark.usefixtures("no_curves")


class LineConfig(PretrainedConfig):
    model_type = "line"

    def __init__(self, width: int = 4, gain: float = 1.0, **kwargs):
        self.width, self.gain = width, gain
        super().__init__(**kwargs)


class Line(PreTrainedModel):
    "A linear map of the first `width` inputs: width 4 sees all that matters."

    config_class = LineConfig

    def __init__(self, config: LineConfig):
        super().__init__(config)
        self.weigh = torch.nn.Linear(config.width, 2)
        self.post_init()

    def forward(self, voxels: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        logits = self.config.gain * self.weigh(voxels[:, : self.config.width])
        return ModelOutput(loss=None if labels is None else (logits - labels).square().mean(), logits=logits)

    def correlation(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        return float(np.corrcoef(predictions.T, labels.T).diagonal(2).mean())


def build(params: dict) -> Line:
    return Line(LineConfig(**params))


def tier(seed: int, samples: int = 24) -> list[dict[str, torch.Tensor]]:
    draw = rng(seed, "tuning")
    x = draw.normal(size=(samples, 4)).astype("float32")
    y = x @ rng(0, "map").normal(size=(4, 2)).astype("float32") + draw.normal(size=(samples, 2)).astype(
        "float32"
    )
    return [{"voxels": torch.from_numpy(a), "labels": torch.from_numpy(b)} for a, b in zip(x, y, strict=True)]


DATA = tier(1), tier(2)
SPACE = Space({"width": Choice((1, 2, 4)), "lr": Range(1e-4, 0.1, log=True)})
OPTIONS = {"trials": 7, "epochs": 2, "batch_size": 8, "adapt": "full", "loss": None}


def search(out: Path, make=build, data=DATA, **changes) -> tuning.Tuning:
    return tune(make, data, **{"space": SPACE, "out": out, "progress": False} | OPTIONS | changes)


def drawn(found: tuning.Tuning) -> list[dict]:
    "Parameters of the trials that hold a place."
    return [t.params for t in holding(found.study)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuning.Tuning:
    "A search that nobody disturbed."
    return search(tmp_path_factory.mktemp("whole") / "search")


def test_the_best_is_found_saved_and_fitted_again(whole, tmp_path):
    table = whole.table()
    assert len(table) == 7 and set(table["state"]) <= {"complete", "pruned"}
    finished = table[table["state"] == "complete"]
    assert whole.value == finished["validation"].max() and whole.best["width"] in (1, 2, 4)
    model, options = load_best(whole.folder / "best.json")
    assert (
        model == {"width": whole.best["width"]}
        and options["lr"] == whole.best["lr"]
        and options["epochs"] == 2
    )
    [kept] = whole.models()
    torch.manual_seed(0)  # the seed of the search
    again = fit(build(model), DATA, out=tmp_path / "again", progress=False, **options)
    assert again.correlation == pytest.approx(whole.value, abs=1e-6)
    assert torch.equal(again.model.weigh.weight, kept.weigh.weight)
    with pytest.raises(DataError, match="not the result of a search"):
        load_best(whole.folder / "plan.json")


def test_the_objective_is_the_validation_correlation(whole):
    [model] = whole.models()
    labels = np.stack([item["labels"] for item in DATA[1]])
    assert model.correlation(predict(model, DATA[1]), labels) == pytest.approx(whole.value, abs=1e-6)


def test_same_seed_same_trials(whole, tmp_path):
    assert drawn(search(tmp_path / "same")) == drawn(whole)
    assert drawn(search(tmp_path / "other", seed=1, trials=2)) != drawn(whole)[:2]
    assert len({json.dumps(p, sort_keys=True) for p in drawn(whole)}) == 7


@pytest.mark.parametrize(
    ("sampler", "pruner"), [("tpe", "hyperband"), ("random", "median"), ("random", None)]
)
def test_samplers_and_pruners(tmp_path, sampler, pruner):
    found = search(tmp_path / "search", sampler=sampler, pruner=pruner, trials=6)
    assert len(found.table()) == 6
    if pruner is None:
        assert set(found.table()["state"]) == {"complete"} and (found.table()["epochs"] == 2).all()


def test_a_hopeless_trial_is_given_up_and_the_rest_of_its_epochs_not_run(tmp_path, capsys):
    "Those that learn nothing (lr 1e-9) fall below the median of the first five."
    space = Space({"lr": Choice((0.05, 1e-9)), "tag": Range(0, 10**6)})

    def make(params):
        return Line(LineConfig())  # the tag makes each trial another one

    found = search(
        tmp_path / "search", make, space=space, trials=11, epochs=4, sampler="random", progress=True
    )
    table = found.table()
    pruned = table[table["state"] == "pruned"]
    assert (
        len(pruned)
        and (pruned["epochs"] < 4).all()
        and (pruned["lr"] == 1e-9).all()
        and (pruned["trial"] >= 5).all()
    )
    for folder in (Path(t.user_attrs["folder"]) for t in found.study.trials if t.state == TrialState.PRUNED):
        assert len((folder / "fold-0" / "history.csv").read_text().splitlines()) - 1 < 4
    assert capsys.readouterr().out.count("given up") == len(pruned)


def test_hyperband_gives_up_what_falls_behind(tmp_path):
    "Trials that learn nothing (lr 1e-9) do not get all of their nine epochs."
    space = Space({"lr": Choice((0.05, 1e-9)), "tag": Range(0, 10**6)})
    found = search(
        tmp_path / "search", lambda _: Line(LineConfig()), space=space, trials=12, epochs=9, sampler="random",
        pruner="hyperband",
    )  # fmt: skip
    table = found.table()
    pruned, finished = (table[table["state"] == state] for state in ("pruned", "complete"))
    assert len(table) == 12 and len(pruned) and (pruned["lr"] == 1e-9).all()
    assert (finished["epochs"] == 9).all() and table["epochs"].sum() < 12 * 9
    assert found.best["lr"] == 0.05


def test_more_trials_go_on_where_it_stopped(whole, tmp_path):
    search(tmp_path / "search", trials=3)
    assert drawn(search(tmp_path / "search")) == drawn(whole)  # as if it had not stopped
    before = len(search(tmp_path / "search").study.trials)
    assert before == 7 and search(tmp_path / "search", trials=4).value == whole.value  # fewer: nothing to do


@pytest.mark.parametrize("late", [False, True])
def test_interrupted_by_the_keyboard(whole, tmp_path, monkeypatch, late):
    "Before a run, or when it is over but not yet in the study."
    real, calls = tuning.fit, []

    def interrupted(*args, **options):
        calls.append(options["out"])
        if len(calls) == 3:
            if late:
                real(*args, **options | {"on_epoch": None})
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(tuning, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "search")
    found = search(tmp_path / "search")
    assert drawn(found) == drawn(whole)
    assert Counter(t.state for t in found.study.trials)[TrialState.FAIL] == 1
    repeated = [folder for folder, n in Counter(calls).items() if n > 1]
    assert len(calls) == 8 and repeated == [calls[2]], "only the interrupted trial is run again"
    assert found.value == pytest.approx(whole.value, abs=1e-6)
    assert [len(t.intermediate_values) for t in holding(found.study)][:4] == [2] * 4


def test_what_failed_is_run_again_though_others_have_gone_on(whole, tmp_path):
    found = search(tmp_path / "search")
    with closing(sqlite3.connect(tmp_path / "search" / "tuning.db")) as database, database:
        # as if its worker had died
        database.execute("update trials set state = 'FAIL' where number = 2")
    again = search(tmp_path / "search")
    assert len(again.study.trials) == 8 and again.study.trials[7].params == found.study.trials[2].params
    assert sorted(map(str, drawn(again))) == sorted(map(str, drawn(whole)))


def work(out: Path, trials: int = 7, deadly: int = 0) -> None:
    "One worker on a search, which tells its runs; a deadly one is killed after the first epoch of that run."
    gc.collect, Fit.curves = (lambda *_: 0), (lambda run: Figure())
    if deadly:  # the others keep the usual heartbeat: a busy machine must not take them for dead
        loop._HEARTBEAT = 1
    real, runs = tuning.fit, []

    def counted(*args, **options):
        print("run", Path(options["out"]).parent.name)
        runs.append(1)
        watch = options["on_epoch"]

        def dies(history):
            watch(history)
            os.kill(os.getpid(), signal.SIGKILL)

        return real(*args, **options | ({"on_epoch": dies} if len(runs) == deadly else {}))

    tuning.fit = counted
    print("done", len(search(out, trials=trials).table()))


def test_two_workers_share_a_search_and_nothing_is_run_twice(tmp_path):
    workers = [Process(tmp_path, work, tmp_path / "search", 6) for _ in range(2)]
    codes, told = zip(*(worker.ended() for worker in workers), strict=True)
    assert codes == (0, 0), told
    assert all("done 6" in out for out in told), told
    runs = [[line.split()[1] for line in out.splitlines() if line.startswith("run")] for out in told]
    assert len(runs[0]) + len(runs[1]) == len({*runs[0], *runs[1]}) == 6, runs
    found = search(tmp_path / "search", trials=6)
    states = Counter(t.state for t in found.study.trials)
    assert states[TrialState.COMPLETE] + states[TrialState.PRUNED] == 6 and not states[TrialState.RUNNING]


def test_killed_in_the_middle_of_a_trial(whole, tmp_path, monkeypatch):
    code, out = Process(tmp_path, work, tmp_path / "search", 7, 3).ended()
    assert code == -signal.SIGKILL and out.count("run") == 3, out
    monkeypatch.setattr(loop, "_HEARTBEAT", 1)
    time.sleep(5)  # until it is known to be dead
    runs, real = [], tuning.fit
    monkeypatch.setattr(
        tuning, "fit", lambda *a, **k: runs.append(Path(k["out"]).parent.name) or real(*a, **k)
    )
    found = search(tmp_path / "search")
    assert drawn(found) == drawn(whole) and found.value == pytest.approx(whole.value, abs=1e-6)
    before = [line.split()[1] for line in out.splitlines() if line.startswith("run")]
    assert len(runs) == 5 and set(runs) & set(before) == {before[2]}, "the one that was killed, and the rest"
    epochs = [t for t in found.study.trials if t.user_attrs.get("again") is not None][0].intermediate_values
    assert sorted(epochs) == [1, 2]  # the first from the checkpoint's history


def test_a_failure_queued_by_two_workers_is_run_once(tmp_path, monkeypatch):
    real = tuning.fit

    def fails(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(tuning, "fit", fails)
    with pytest.raises(OSError, match="disk full"):
        search(tmp_path / "search", trials=2)
    monkeypatch.setattr(tuning, "fit", real)
    study = optuna.load_study(
        study_name=None, storage=open_storage(f"sqlite:///{tmp_path / 'search' / 'tuning.db'}")
    )
    [failed] = study.trials
    for _ in range(2):
        study.enqueue_trial(failed.params, user_attrs={"again": failed.number})
    found = search(tmp_path / "search", trials=2)
    assert [p == failed.params for p in drawn(found)] == [True, False]
    assert sum(t.user_attrs.get("surplus", False) for t in found.study.trials) == 1


def test_folds_are_averaged_and_reported_in_one_line_of_steps(tmp_path):
    found = search(tmp_path / "search", data=[DATA, (tier(3), tier(4))], trials=2, pruner=None)
    for trial in found.study.trials:
        histories = [np.genfromtxt(Path(trial.user_attrs["folder"]) / f"fold-{k}" / "history.csv", delimiter=",",
                                   names=True)["validation_correlation"] for k in range(2)]  # fmt: skip
        first, second = (np.maximum.accumulate(h) for h in histories)
        expected = [*first, *(np.mean([first[-1], v]) for v in second)]
        assert trial.value == pytest.approx(expected[-1])
        np.testing.assert_allclose([trial.intermediate_values[k] for k in (1, 2, 3, 4)], expected)
    assert len(found.models()) == 2
    test = tier(9)
    mean = np.mean([predict(m, test) for m in found.models()], 0)
    np.testing.assert_allclose(found.open_test(test), mean, rtol=1e-5)


def test_the_test_is_opened_once(tmp_path, monkeypatch):
    found, test = search(tmp_path / "search", trials=2), tier(9)
    first = found.open_test(test)
    monkeypatch.setattr(tuning, "predict", None)
    np.testing.assert_array_equal(found.open_test(test), first)
    np.testing.assert_array_equal(search(tmp_path / "search", trials=2).open_test(test), first)
    with pytest.raises(DataError, match="opened with other data"):
        found.open_test(tier(10))
    with pytest.raises(DataError, match="no further trials"):
        search(tmp_path / "search", trials=3)


def test_a_diverging_trial_is_a_bad_one_and_an_error_is_an_error(tmp_path):
    space = Space({"gain": Choice((1.0, 1e30)), "lr": Range(1e-3, 1e-2)})
    found = search(tmp_path / "a", space=space, trials=6, sampler="random", pruner=None)
    table = found.table()
    assert (table["state"] == np.where(table["gain"] > 1, "pruned", "complete")).all() and table[
        "gain"
    ].nunique() == 2
    with pytest.raises(DataError, match="no trial came to an end"):
        search(tmp_path / "b", space=Space({"gain": Choice((1e30, 2e30))}), trials=2, pruner=None)
    with pytest.raises(DataError, match="adapt="):
        search(tmp_path / "c", adapt="everything")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed"), ({"epochs": 3}, "epochs"), ({"batch_size": 4}, "options"), ({"sampler": "random"}, "sampler"),
        ({"space": Space({"lr": Range(1e-4, 0.1)})}, "space"), ({"data": (tier(1), tier(3))}, "fold 0.data.validation.labels"),
        ({"data": [DATA, DATA]}, "fold 1"), ({"make": lambda p: Line(LineConfig(gain=2.0, **p))}, "fold 0.model.gain"),
    ],
)  # fmt: skip
def test_another_search_in_the_folder_is_refused(whole, change, words):
    with pytest.raises(DataError, match=f"with other {words}"):
        search(whole.folder, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "grid"}, "tpe, random"), ({"pruner": "best"}, "None, median, hyperband"), ({"trials": 0}, "trials=0"),
        ({"data": []}, "0 folds"), ({"lr": 0.1}, "in the space and an option"), ({"storage": "tuning.db"}, "database URL"),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        search(tmp_path / "search", **change)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "empty"), ({"a": (1, 2)}, "Choice"), ({"a": Choice(())}, "tuple"), ({"a": Choice([1])}, "tuple"),
        ({"a": Choice(((1, 2),))}, "strings, numbers"), ({"a": Range(2, 1)}, "low < high"), ({"a": Range(0.0, 1.0, log=True)}, "0 < low"),
        ({"a": Range(0.0, float("inf"))}, "low < high"), ({"epochs": Range(1, 3)}, "same for all trials"),
    ],
)  # fmt: skip
def test_wrong_spaces(parameters, words):
    with pytest.raises(DataError, match=words):
        Space(parameters)


def test_the_studys_space():
    paper = SPACES["paper"].parameters
    assert paper["emb_dim"].values == (256, 512, 768) and (paper["depth"].low, paper["depth"].high) == (3, 8)
    assert (paper["lr"].low, paper["lr"].high, paper["lr"].log) == (1e-5, 1e-3, True) and len(paper) == 3
    params = SPACES["paper"].suggest(optuna.trial.FixedTrial({"emb_dim": 512, "depth": 4, "lr": 1e-4}))
    assert params == {"emb_dim": 512, "depth": 4, "lr": 1e-4} and isinstance(params["depth"], int)


def test_importance_and_figure(whole, tmp_path):
    space = Space({"width": Choice((1, 4)), "lr": Range(0.02, 0.021)})
    found = search(tmp_path / "search", space=space, trials=8, pruner=None, sampler="random", epochs=3)
    importance = found.importance()
    assert importance.sum() == pytest.approx(1) and importance["width"] > 0.8
    for one in (found, whole):
        figure = one.plot()
        titles = [a.get_title() for a in figure.axes]
        assert {"history", "importance"} <= set(titles)
        assert {"width", "lr"} <= {a.get_xlabel() for a in figure.axes}
    with pytest.raises(DataError, match="two or more"):
        search(tmp_path / "one", trials=1).importance()


def test_a_model_with_mice_and_a_folder_of_its_own(private_folders):
    "A `ViV1T` whose core stays frozen."
    from toy_training import LAST, Toy, tiers, tiny_model

    found = tune(lambda p: tiny_model(), {"A": tiers()}, Space({"lr": Choice((0.01, 0.02))}), trials=2, epochs=1, last=LAST,
                 progress=False, pruner=None)  # fmt: skip
    assert found.folder.parent == private_folders / "_runs" and found.folder.name.startswith("tuning-")
    with pytest.raises(SplitLeak, match="4 of 4 samples of the test"):
        found.open_test(tiers()[1], last=LAST)
    assert found.open_test(Toy(4, seed=3), last=LAST).shape == (4, 5, LAST)


def test_a_space_is_read_from_lines():
    space = Space.read(
        ["depth=1..4", " lr = 1e-4..1e-2:log", "emb_dim=16, 32", "norm=true,none,layer", "noise=0..1.5"]
    )
    assert space.parameters == {
        "depth": Range(1, 4),
        "lr": Range(1e-4, 1e-2, log=True),
        "emb_dim": Choice((16, 32)),
        "norm": Choice((True, None, "layer")),
        "noise": Range(0, 1.5),
    }
    assert space.parameters["depth"].whole and not space.parameters["noise"].whole


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "an empty space"),
        (["lr"], "name=a,b,c or name=low..high"),
        (["lr="], "name=a,b,c or name=low..high"),
        (["lr=1,2", "lr=3,4"], "lr, given twice"),
        (["lr=a..b"], "a number"),
        (["lr=2..1"], "low < high"),
        (["lr=0..1:log"], "0 < low"),
        (["epochs=1,2"], "the same for all trials"),
    ],
)
def test_lines_that_are_no_space_are_refused(lines, told):
    with pytest.raises(DataError, match=re.escape(told)):
        Space.read(lines)
