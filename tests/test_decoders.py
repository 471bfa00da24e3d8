"""Decoders trained fold by fold: what they may see, what is kept, and what must raise."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from cortexlit.core import DataError, SplitLeak
from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.splits import Split, split_by_concept, split_by_session
from cortexlit.data.things import load_properties, open_things
from cortexlit.simulate.subject import write_things
from cortexlit.training.decoders import FoldFits, _More, _Named, _Part, fit_folds

pytestmark = pytest.mark.usefixtures("no_curves")


class LinearConfig(PretrainedConfig):
    model_type = "toy-linear"

    def __init__(self, voxels=6, outputs=2, gain=1.0, **kwargs):
        self.voxels, self.outputs, self.gain = voxels, outputs, gain
        super().__init__(**kwargs)


class Linear(PreTrainedModel):
    config_class = LinearConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.voxels, config.outputs)
        self.post_init()

    def _init_weights(self, module):
        "Nothing."

    def forward(self, voxels, labels=None):
        logits = self.config.gain * self.layer(voxels)
        loss = None if labels is None else (logits - labels).square().mean()
        return ModelOutput(loss=loss, logits=logits)

    def correlation(self, predictions, labels):
        a, b = predictions - predictions.mean(0), labels - labels.mean(0)
        return float(((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))).mean())


class Trials(torch.utils.data.Dataset):
    "Concepts with ratings, and responses that tell them."

    def __init__(self, concepts=24, each=3, seed=0):
        draw = np.random.default_rng(seed)
        table = draw.normal(size=(concepts, 2)).astype(np.float32) * [2, 0.5] + [4, 1]
        self.labels = table.repeat(each, 0).astype(np.float32)
        n = len(self.labels)
        voxels = self.labels @ draw.normal(size=(2, 6)) + 0.1 * draw.normal(size=(n, 6))
        self.voxels = ((voxels - voxels.mean(0)) / voxels.std(0)).astype(np.float32)
        self.trials = pd.DataFrame(
            {
                "session": np.arange(n) % 3 + 1, "run": 1, "trial": np.arange(n),
                "image": [f"i{k}" for k in range(n)], "concept": np.repeat([f"c{k:02d}" for k in range(concepts)], each),
                "role": "train",
            }
        )  # fmt: skip

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"voxels": torch.from_numpy(self.voxels[i]), "labels": torch.from_numpy(self.labels[i])}


OPTIONS = {"epochs": 8, "batch_size": 8, "lr": 0.05, "progress": False}


def build():
    return Linear(LinearConfig())


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    data = Trials()
    split = split_by_concept(data.trials, 3, 0)
    return data, split, fit_folds(build, data, split, tmp_path_factory.mktemp("fits") / "a", **OPTIONS)


def test_predictions_are_in_the_unit_of_the_labels_and_good(fits):
    data, split, found = fits
    assert found.predictions.shape == data.labels.shape and np.isfinite(found.predictions).all()
    r2 = 1 - np.square(found.predictions - data.labels).sum(0) / np.square(
        data.labels - data.labels.mean(0)
    ).sum(0)
    assert (r2 > 0.5).all()
    assert (
        found.table["test"].sum() == len(data)
        and (found.table[["train", "validation", "test"]].sum(1) == 72).all()
    )


def test_ratings_of_test_concepts_change_nothing(fits, tmp_path):
    data, split, found = fits
    changed = Trials()
    test = split.fold == 1
    changed.labels[test] += (
        np.random.default_rng(5).normal(size=changed.labels[test].shape).astype(np.float32)
    )
    other = fit_folds(build, changed, split, tmp_path / "b", folds=[1], **OPTIONS)
    assert np.array_equal(other.predictions[test], found.predictions[test])
    assert np.isnan(other.predictions[~test]).all()


def test_the_next_fold_chooses_and_does_not_teach(fits, tmp_path):
    data, split, found = fits
    assert found.table["validation"].tolist() == [(split.fold == k).sum() for k in (1, 2, 0)]
    doubled = Trials()
    held = (
        split.fold == 2
    )  # validation of fold 1; ratings twice as far from the training mean, the same order
    mean = data.labels[split.fold == 0].mean(0)
    doubled.labels[held] = mean + 2 * (data.labels[held] - mean)
    other = fit_folds(build, doubled, split, tmp_path / "d", folds=[1], **OPTIONS)
    test = split.fold == 1
    np.testing.assert_allclose(
        other.predictions[test] - mean, 2 * (found.predictions[test] - mean), rtol=1e-3, atol=1e-4
    )


def test_a_finished_fold_is_read_back(fits, monkeypatch):
    data, split, found = fits
    monkeypatch.setattr("cortexlit.training.decoders.fit", None)  # would fail if it were called
    again = fit_folds(build, data, split, found.folder, **OPTIONS)
    assert np.array_equal(again.predictions, found.predictions)
    pd.testing.assert_frame_equal(again.table, found.table)


@pytest.mark.parametrize(("change", "named"), [({"lr": 0.01}, "lr"), ({"seed": 1}, "seed")])
def test_a_folder_holds_one_kind_of_run(fits, change, named):
    data, split, found = fits
    with pytest.raises(DataError, match=f"other {named}"):
        fit_folds(build, data, split, found.folder, **{**OPTIONS, **change})


def test_a_folder_holds_one_model_and_one_subject(fits):
    data, split, found = fits
    with pytest.raises(DataError, match="other model.gain"):
        fit_folds(lambda: Linear(LinearConfig(gain=2.0)), data, split, found.folder, **OPTIONS)
    other = Trials()
    other.voxels = -other.voxels
    with pytest.raises(DataError, match="other data.train.voxels"):
        fit_folds(build, other, split, found.folder, **OPTIONS)


def test_a_folder_of_its_own(fits, private_folders):
    data, split, found = fits
    own = fit_folds(build, data, split, **OPTIONS)
    assert own.folder.parent == private_folders / "_runs" and own.folder.name.startswith("folds-")
    assert np.array_equal(own.predictions, found.predictions)
    assert fit_folds(build, data, split, seed=1, folds=[0], **OPTIONS).folder != own.folder


def test_an_interrupted_run_goes_on(fits, tmp_path, monkeypatch):
    data, split, found = fits

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("cortexlit.training.decoders.predict", stopped)  # after training, before the record
        with pytest.raises(KeyboardInterrupt):
            fit_folds(build, data, split, tmp_path / "c", **OPTIONS)
    assert not list((tmp_path / "c").glob("*.npy"))
    resumed = fit_folds(build, data, split, tmp_path / "c", **OPTIONS)
    assert np.array_equal(resumed.predictions, found.predictions)


def test_fits_are_read_with_their_own_split_only(fits):
    data, split, found = fits
    again = FoldFits.load(found.folder, split)
    assert np.array_equal(again.predictions, found.predictions)
    with pytest.raises(DataError, match="trained with the split"):
        FoldFits.load(found.folder, split_by_concept(data.trials, 3, 1))


def test_a_flipped_byte_of_the_results_is_refused_by_name(fits, tmp_path):
    data, split, found = fits
    folder = tmp_path / "copy"
    shutil.copytree(found.folder, folder)

    def again():
        FoldFits.load(folder, split)
        return fit_folds(build, data, split, folder, **OPTIONS)

    assert np.array_equal(again().predictions, found.predictions)
    for name in ("predictions.npy", "folds.json", "fold0.npy", "fold2.json"):
        whole = (folder / name).read_bytes()
        at = len(whole) - 5 if name.endswith("npy") else whole.index(b"0.") + 2  # a digit of a score
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=name):
            again()
        (folder / name).write_bytes(whole)
    old = json.loads((folder / "folds.json").read_text())
    del old["hash"]  # as an earlier version wrote it
    (folder / "folds.json").write_text(json.dumps(old))
    assert np.array_equal(FoldFits.load(folder, split).predictions, found.predictions)


def test_what_cannot_be_trained_is_refused(fits, tmp_path):
    data, split, _ = fits
    with pytest.raises(DataError, match="fold 7"):
        fit_folds(build, data, split, tmp_path, folds=[7])
    with pytest.raises(DataError, match="one that names concepts"):
        fit_folds(build, data, split_by_session(data.trials), tmp_path)
    with pytest.raises(DataError, match="three or more"):
        fit_folds(build, data, split_by_concept(data.trials, 2, 0), tmp_path)
    with pytest.raises(DataError, match="without ratings"):
        fit_folds(build, SimpleNamespace(labels=None, trials=data.trials), split, tmp_path)
    flat = Trials()
    flat.labels[:, 1] = 3
    with pytest.raises(DataError, match="constant"):
        fit_folds(build, flat, split, tmp_path / "flat", folds=[0], **OPTIONS)


def with_validation(split, k: int) -> Split:
    "One fold of a split, its validation tier a third of what trained."
    tier = split.tier[k].copy()
    names = sorted(set(split.samples["concept"][tier == "train"]))[::3]
    tier[split.samples["concept"].isin(names) & (tier == "train")] = "validation"
    return Split(split.kind, tier[None], split.samples)


def test_the_validation_tier_of_a_split_chooses(fits, tmp_path):
    data, split, _ = fits
    own = with_validation(split, 1)
    found = fit_folds(build, data, own, tmp_path / "a", **OPTIONS)
    tier = own.tier[0]
    assert found.table[["train", "validation", "test"]].values.tolist() == [
        [(tier == name).sum() for name in ("train", "validation", "test")]
    ]
    assert (np.isfinite(found.predictions).all(1) == (tier == "test")).all()
    spoiled = Trials()  # what chooses does not teach: twice as far from the training mean, the same order
    held, mean = tier == "validation", data.labels[tier == "train"].mean(0)
    spoiled.labels[held] = mean + 2 * (data.labels[held] - mean)
    other = fit_folds(build, spoiled, own, tmp_path / "b", **OPTIONS)
    test = tier == "test"
    np.testing.assert_allclose(
        other.predictions[test] - mean, 2 * (found.predictions[test] - mean), rtol=1e-3, atol=1e-4
    )
    leak = own.tier.copy()
    leak[0, np.flatnonzero(held)[0]] = "train"
    with pytest.raises(SplitLeak):
        fit_folds(build, data, Split(own.kind, leak, own.samples), tmp_path / "c", **OPTIONS)
    none = np.where(own.tier == "train", "", own.tier)
    with pytest.raises(DataError, match="fold 0 has no train trials"):
        fit_folds(build, data, Split(own.kind, none, own.samples), tmp_path / "d", **OPTIONS)


def test_folds_of_an_earlier_version_are_met(fits, tmp_path, monkeypatch):
    "Their records called the plan `plan`."
    data, split, found = fits
    shutil.copytree(found.folder, tmp_path / "old")
    for k in range(3):
        record = json.loads((tmp_path / "old" / f"fold{k}.json").read_text())
        record["plan"] = record.pop("made_from")
        del record["hash"]
        (tmp_path / "old" / f"fold{k}.json").write_text(json.dumps(record))
    monkeypatch.setattr("cortexlit.training.decoders.fit", None)
    again = fit_folds(build, data, split, tmp_path / "old", **OPTIONS)
    assert np.array_equal(again.predictions, found.predictions)
    pd.testing.assert_frame_equal(again.table, found.table)
    with pytest.raises(DataError, match="other lr"):
        fit_folds(build, data, split, tmp_path / "old", **OPTIONS | {"lr": 0.01})


# ---- made trials


def test_made_trials_are_added_to_training_alone_and_resume_to_the_same_bits(fits, tmp_path, monkeypatch):
    data, split, found = fits
    made = fit_folds(build, data, split, tmp_path / "a", augment="noise", ratio=2, **OPTIONS)
    assert made.table[["train", "validation", "test"]].equals(found.table[["train", "validation", "test"]])
    assert not np.array_equal(made.predictions, found.predictions)
    with monkeypatch.context() as m:
        m.setattr("cortexlit.training.decoders.predict", lambda *a, **k: 1 / 0)  # after training
        with pytest.raises(ZeroDivisionError):
            fit_folds(build, data, split, tmp_path / "b", augment="noise", ratio=2, **OPTIONS)
    again = fit_folds(build, data, split, tmp_path / "b", augment="noise", ratio=2, **OPTIONS)
    assert np.array_equal(again.predictions, made.predictions)
    with pytest.raises(DataError, match="other ratio"):
        fit_folds(build, data, split, tmp_path / "a", augment="noise", **OPTIONS)
    with pytest.raises(DataError, match="other augment"):
        fit_folds(build, data, split, tmp_path / "a", **OPTIONS)


def test_made_trials_do_not_know_the_concepts_that_are_held_out(fits, tmp_path):
    "Patterns and ratings of the test concepts are spoiled; the weights that fold 1 learns stay the same."
    data, split, _ = fits
    spoiled = Trials()
    test = split.fold == 1
    spoiled.labels[test] += 5
    weights = []
    for name, trials in (("a", data), ("b", spoiled)):
        fit_folds(build, trials, split, tmp_path / name, folds=[1], augment="normal", **OPTIONS)
        weights.append((tmp_path / name / "fold1" / "best" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_without_made_trials_plans_are_as_before(fits):
    assert not {"augment", "ratio"} & json.loads((fits[2].folder / "folds.json").read_text())["plan"].keys()


def test_made_trials_that_cannot_be_are_refused(fits, tmp_path):
    data, split, _ = fits
    with pytest.raises(DataError, match="perhaps vae"):
        fit_folds(build, data, split, tmp_path, augment="vea", **OPTIONS)
    with pytest.raises(DataError, match="ratio=-1"):
        fit_folds(build, data, split, tmp_path, augment="vae", ratio=-1, **OPTIONS)
    volumes = Trials()
    volumes.__class__ = type("Volumes", (Trials,), {"__getitem__": lambda self, i: {
        "volume": torch.from_numpy(self.voxels[i]), "labels": torch.from_numpy(self.labels[i])}})  # fmt: skip
    with pytest.raises(DataError, match='augment="noise" of volumes'):
        fit_folds(build, volumes, split, tmp_path / "v", folds=[0], augment="noise", **OPTIONS)


def test_trials_read_many_at_a_time_are_those_trials(tmp_path):
    things = open_things(write_things(tmp_path / "study", "tiny", layouts=("figshare",)))
    data = ThingsDataset(
        build_things(things, tmp_path / "cache"), load_properties(tmp_path / "study" / "ratings")
    )
    rows, numbers = np.array([9, 4, 4, 30]), np.arange(len(data))
    parts = [
        _Part(data, rows, np.float32([1.0]), np.float32([2.0])),
        _Named(data, rows, numbers),
        _More(_Part(data, rows, np.float32([1.0]), np.float32([2.0])), "noise", 1.0, 0),
        _Part(TiedToItems(data), rows, np.float32([1.0]), np.float32([2.0])),
    ]
    for part in parts:
        for name, values in part.stacked([2, 0, 0]).items():
            assert values.equal(torch.stack([part[i][name] for i in (2, 0, 0)])), (type(part), name)


class TiedToItems:
    "A data set of somebody else's, which gives one item at a time."

    def __init__(self, data):
        self.data = data

    def __getitem__(self, i):
        return self.data[i]
