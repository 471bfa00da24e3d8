"""`cortexlit import` and `cortexlit export`, and the options that all `fit` commands share."""

import json
import shutil
import sys
from functools import wraps

import numpy as np
import pytest
from toys import toy_recording

from cortexlit import cli
from cortexlit.data.clips import build_dataset, load_tier
from cortexlit.data.exchange import import_arrays
from cortexlit.data.scenes import ScenesDataset

pytestmark = pytest.mark.usefixtures("no_curves")


def run(capsys, monkeypatch, *words) -> tuple[int, dict]:
    "Exit code and the JSON document of `cortexlit WORDS --json`."
    monkeypatch.setattr(sys, "argv", ["cortexlit", *map(str, words), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    return int(end.value.code or 0), json.loads(capsys.readouterr().out)


def labels(folder) -> np.ndarray:
    "Standardised responses of the training tier."
    data = ScenesDataset(folder, "train")
    return np.stack([item["labels"].numpy() for item in map(data.__getitem__, range(len(data)))])


@pytest.mark.parametrize("layout", [None, "sensorium", "study1"])
def test_movies_out_and_in_again(layout, tmp_path, capsys, monkeypatch):
    root = build_dataset(
        toy_recording(), tmp_path / "mouse", split="stimuli", clip_frames=10, size=(6, 8), gap=2
    )
    given = [] if layout is None else ["--layout", layout]
    code, found = run(capsys, monkeypatch, "export", root, "--out", tmp_path / "tree", *given)
    assert code == 0 and found["layout"] == (layout or "sensorium") and found["files"] > 10, found
    code, found = run(capsys, monkeypatch, "import", tmp_path / "tree", "--out", tmp_path / "again")
    assert code == 0, found
    for tier in ("train", "test"):
        a, b = (load_tier(tmp_path / name, tier).labels for name in ("mouse", "again"))
        np.testing.assert_array_equal(a, b)


def test_pictures_in_from_arrays_out_and_in_again(tmp_path, capsys, monkeypatch):
    draw = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    arrays = {"images": draw.random((30, 6, 8)), "responses": draw.random((60, 4)), "coordinates": draw.random((4, 3)),
              "image_id": np.repeat(np.arange(30), 2)}  # fmt: skip
    for name, array in arrays.items():
        np.save(tmp_path / "mine" / f"{name}.npy", array)
    code, found = run(capsys, monkeypatch, "import", tmp_path / "mine", "--out", tmp_path / "first")
    assert code == 0 and found["name"] == "mine", found
    control = import_arrays(arrays.pop("images"), arrays.pop("responses"), tmp_path / "control", **arrays)
    wanted = labels(control)
    assert np.array_equal(labels(tmp_path / "first"), wanted)
    code, found = run(capsys, monkeypatch, "export", tmp_path / "first", "--out", tmp_path / "tree")
    assert code == 0 and found["layout"] == "sensorium2022", found
    assert run(capsys, monkeypatch, "import", tmp_path / "tree", "--out", tmp_path / "second")[0] == 0
    np.testing.assert_allclose(labels(tmp_path / "second"), wanted, rtol=1e-6)
    shutil.copytree(tmp_path / "tree", tmp_path / "both")
    for name in ("images", "responses"):
        shutil.copy(tmp_path / "mine" / f"{name}.npy", tmp_path / "both")
    for words, told in (
        (["import", tmp_path / "mine", "--frames", "5", "--out", "x"], "frames"),
        (["import", tmp_path / "nowhere", "--out", "x"], "no such folder"),
        (["import", tmp_path / "first", "--out", "x"], "a dataset folder already"),
        (["import", tmp_path, "--out", "x"], "none of the known layouts"),
        (["import", tmp_path / "both", "--out", "x"], "two layouts: arrays and sensorium2022"),
        (["export", tmp_path / "first", "--layout", "study1", "--out", "x"], "sensorium2022"),
        (["export", tmp_path / "first", "--out", tmp_path / "tree"], "tree"),
    ):
        code, found = run(capsys, monkeypatch, *words)
        assert code == 1 and told in found["error"], found


def test_all_fit_commands_have_the_same_options():
    import typer

    group = typer.main.get_command(cli.app)
    fits = (group.commands["fit"], *(group.commands[g].commands["fit"] for g in ("scenes", "things")))
    for command in fits:
        names = {name for p in command.params for name in p.opts}
        assert {"--epochs", "--lr", "--batch-size", "--seed", "--out", "--json"} <= names, command.name


@pytest.mark.parametrize("adapt", ["head", "lora"])
def test_epochs_and_steps_are_of_what_is_asked_for(adapt, tmp_path, capsys, monkeypatch):
    from cortexlit.training import heads, trainer

    called: dict[str, dict] = {}

    class Done:
        model, folder, best_epoch, correlation = None, tmp_path, 1, 0.0

    def record(name, real):
        return wraps(real)(lambda *args, **options: called.update({name: options}) or Done())

    monkeypatch.setattr(heads, "train_head", record("head", heads.train_head))
    monkeypatch.setattr(trainer, "fit", record("fit", trainer.fit))
    monkeypatch.setattr("cortexlit.models.adapters.check_targets", lambda *args: None)
    monkeypatch.setattr(heads, "fresh_head", lambda *args, **options: None)
    words = ["fit", tmp_path, "--adapt", adapt, "--epochs", "3", "--lr", "0.5", "--batch-size", "7"]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 0, found
    asked = {"epochs": 3, "lr": 0.5, "batch_size": 7}
    last = called["head" if adapt == "head" else "fit"]
    assert {name: last[name] for name in asked} == asked
    if adapt == "lora":
        assert not asked.items() & called["head"].items()
