"""Classifiers over concepts: shapes, names that travel with the weights, noise in training only, the trainer, block means."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cortexlit.core import DataError, rng
from cortexlit.evaluation.identification import score_identification
from cortexlit.models.classifiers import (
    CLASSIFIERS,
    ClassifierConfig,
    ConceptClassifier,
    ConceptTrials,
    block_mean,
)
from cortexlit.training.trainer import fit, predict

pytestmark = pytest.mark.usefixtures("no_curves")

NAMES = ["dog", "aircraft_carrier", "teapot", "fern"]


def small(kind="cnn", shape=(5, 6, 4), concepts=NAMES, **options):
    torch.manual_seed(0)
    given = {"hidden": 12, "channels": (8, 8, 8), "features": 10}
    return ConceptClassifier(ClassifierConfig(kind, shape, concepts, **given | options)).eval()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("pooled", [(1, 1, 1), (2, 2, 2), (3, 3, 3)])
@pytest.mark.parametrize("shape", [(5, 6, 4), (1, 2, 1), (7, 9, 7)])
def test_cnn_takes_any_grid(shape, pooled, norm):
    model = small(shape=shape, pooled=pooled, norm=norm)
    logits = model(volume=torch.randn(3, 1, *shape)).logits
    assert logits.shape == (3, 4) and torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_loss_is_cross_entropy_and_gradients_reach_every_weight(kind):
    model, volume, labels = small(kind).train(), torch.randn(6, 1, 5, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.manual_seed(1)
    out = model(volume=volume, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    out.loss.backward()
    # a bias before batch normalisation has no effect: its gradient is zero up to rounding
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_bfloat16_weights_answer_and_learn(kind):
    made = small(kind).eval()
    volume, labels = torch.randn(4, 1, 5, 6, 4), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        full = made(volume=volume).logits
        half = made.to(torch.bfloat16)(volume=volume).logits
    assert (half.float() - full).norm() < 0.05 * full.norm()
    made.train()(volume=volume, labels=labels).loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in made.parameters())


def test_published_architecture():
    paper = ConceptClassifier(ClassifierConfig.study("cnn", (8, 8, 8), NAMES))
    convolutions = [m.out_channels for m in paper.modules() if isinstance(m, torch.nn.Conv3d)]
    linear = [m.out_features for m in paper.modules() if isinstance(m, torch.nn.Linear)]
    assert convolutions == [32, 64, 128] and linear == [256, 4]
    assert any(isinstance(m, torch.nn.BatchNorm3d) for m in paper.modules())
    assert [m.p for m in paper.modules() if isinstance(m, torch.nn.Dropout)] == [0.3]
    assert paper.config.noise > 0 and paper.config.pooled == [1, 1, 1]
    hidden = ConceptClassifier(ClassifierConfig.study("mlp", (8, 8, 8), NAMES))
    assert [m.out_features for m in hidden.modules() if isinstance(m, torch.nn.Linear)] == [512, 4]
    assert hidden.config.noise == 0
    linear = ConceptClassifier(ClassifierConfig.study("logistic", (8, 8, 8), NAMES))
    assert sum(p.numel() for p in linear.parameters()) == 512 * 4 + 4


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_names_travel_with_the_weights(kind, tmp_path):
    model, volume = small(kind, noise=0.2, pooled=(2, 1, 2)), torch.randn(2, 1, 5, 6, 4)
    model.save_pretrained(tmp_path)
    again = ConceptClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again(volume=volume).logits, model(volume=volume).logits)
    assert again.config.concepts == tuple(NAMES)
    assert again.config.indices(["fern", "dog", "dog"]).tolist() == [3, 0, 0]
    assert again.config.to_dict() == model.config.to_dict() | {
        k: again.config.to_dict()[k] for k in ("architectures", "dtype", "_name_or_path")
    }
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["label2id"] == {name: i for i, name in enumerate(NAMES)}
    assert on_disk["id2label"]["2"] == "teapot"


def test_two_concepts_keep_their_names(tmp_path):
    "Hugging Face's default is two classes; it must not take the place of these."
    small("logistic", concepts=["b", "a"]).save_pretrained(tmp_path)
    assert ClassifierConfig.from_pretrained(tmp_path).concepts == ("b", "a")


def test_noise_in_training_only_and_never_outside_the_brain():
    model = small("logistic", (4,), noise=0.5)
    with torch.no_grad():
        model.layers[1].weight.copy_(torch.eye(4))
        model.layers[1].bias.zero_()
    voxels = torch.tensor([[1.0, 0.0, -2.0, 0.0]]).repeat(2000, 1)
    torch.testing.assert_close(model(voxels=voxels).logits, voxels)
    change = (model.train()(voxels=voxels).logits - voxels).detach()
    assert (change[:, [1, 3]] == 0).all()
    assert change[:, [0, 2]].std(0).sub(0.5).abs().max() < 0.05 and change.mean(0).abs().max() < 0.05


def test_selection_is_pair_accuracy():
    draw = rng(0, "pairs")
    scores, shown = draw.integers(0, 6, (30, 5)).astype(np.float32), draw.integers(0, 5, 30)
    expected = score_identification(scores, shown, 1, np.zeros(len(shown)), permutations=1).pairs
    assert ConceptClassifier.correlation(scores, shown.astype(np.float32)) == pytest.approx(expected)
    assert ConceptClassifier.correlation(np.zeros((4, 3)), np.array([0, 1, 2, 0])) == 0.5
    assert ConceptClassifier.correlation(np.eye(3), np.arange(3)) == 1.0


def separable(count, seed, shape=(24,)):
    draw = rng(seed, "separable")
    labels = np.arange(count) % 4
    centres = rng(0, "centres").normal(size=(4, *shape))
    return ConceptTrials(centres[labels] + 0.3 * draw.normal(size=(count, *shape)), labels)


@pytest.mark.parametrize(("kind", "shape"), [("logistic", (24,)), ("mlp", (24,)), ("cnn", (4, 4, 4))])
def test_the_trainer_trains_it(kind, shape, tmp_path):
    model, test = small(kind, shape), separable(20, 3, shape)
    run = fit(
        model, (separable(48, 1, shape), separable(20, 2, shape)), adapt="full", loss="cross-entropy", lr=1e-2,
        schedule="constant", epochs=6, batch_size=8, out=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert run.correlation > 0.9
    scores = predict(run.model, test, batch_size=7)
    assert scores.shape == (20, 4)
    assert ConceptClassifier.correlation(scores, test.labels.numpy()) > 0.9
    saved = ConceptClassifier.from_pretrained(run.best)
    np.testing.assert_allclose(predict(saved, test, batch_size=20), scores, atol=1e-5)
    assert saved.config.concepts == tuple(NAMES)


def test_trials_are_items_of_the_trainer():
    volumes = ConceptTrials(np.ones((3, 2, 4, 5)), np.array([1, 0, 2]))
    item = volumes[2]
    assert (
        len(volumes) == 3 and item["volume"].shape == (1, 2, 4, 5) and item["volume"].dtype == torch.float32
    )
    assert item["labels"].dtype == torch.int64 and int(item["labels"]) == 2
    assert set(ConceptTrials(np.ones((3, 7)), np.arange(3))[0]) == {"voxels", "labels"}


@settings(max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    block=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 10**6),
)
def test_block_mean_block_by_block(shape, block, seed):
    draw = np.random.default_rng(seed)
    mask = draw.random(shape) < 0.6
    mask.flat[0] = True
    values = draw.normal(size=(3, mask.sum()))
    means, share = block_mean(values, mask, block)
    assert means.dtype == np.float32 and means.shape == (3, *share.shape)
    volume = np.full((3, *shape), np.nan)
    volume[:, mask] = values
    for at in np.ndindex(*share.shape):
        part = volume[(slice(None), *(slice(i * b, (i + 1) * b) for i, b in zip(at, block, strict=True)))]
        inside = np.isfinite(part[0])
        assert share[at] == pytest.approx(inside.sum() / np.prod(block))
        expected = np.nanmean(part.reshape(3, -1), axis=1) if inside.any() else np.zeros(3)
        np.testing.assert_allclose(means[(slice(None), *at)], expected, rtol=1e-5, atol=1e-6)


def test_block_mean_of_one_trial():
    mask = np.ones((2, 2, 2), bool)
    means, share = block_mean(np.arange(8.0), mask)
    assert means.shape == (1, 1, 1) and means[0, 0, 0] == 3.5 and share[0, 0, 0] == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: ClassifierConfig("tree", (3,), NAMES),
        lambda: ClassifierConfig("cnn", (3,), NAMES),
        lambda: ClassifierConfig("mlp", (3, 4), NAMES),
        lambda: ClassifierConfig("mlp", (0,), NAMES),
        lambda: ClassifierConfig("mlp", (3,), ["a", "a"]),
        lambda: ClassifierConfig("mlp", (3,), ["a"]),
        lambda: ClassifierConfig("mlp", (3,), NAMES, dropout=1.0),
        lambda: ClassifierConfig("mlp", (3,), NAMES, noise=-1.0),
        lambda: ClassifierConfig("cnn", (3, 3, 3), NAMES, norm="layer"),
        lambda: ClassifierConfig("cnn", (3, 3, 3), NAMES, norm="group", channels=(8, 8, 12)),
        lambda: ClassifierConfig("cnn", (3, 3, 3), NAMES, pooled=(2, 2)),
        lambda: ClassifierConfig("cnn", (3, 3, 3), NAMES, chanels=(8, 8, 8)),
        lambda: ClassifierConfig("mlp", (3,), NAMES).indices(["cat"]),
        lambda: ConceptClassifier(ClassifierConfig("mlp", (3,))),
        lambda: small()(volume=torch.zeros(2, 1, 5, 6, 5)),
        lambda: small()(voxels=torch.zeros(2, 120)),
        lambda: small("mlp", (7,))(volume=torch.zeros(2, 1, 7, 1, 1)),
        lambda: ConceptTrials(np.zeros((3, 4)), np.zeros(2, int)),
        lambda: ConceptTrials(np.zeros((3, 4)), np.zeros(3)),
        lambda: ConceptTrials(np.zeros((3, 4, 5)), np.zeros(3, int)),
        lambda: block_mean(np.zeros(3), np.ones((2, 2, 2), bool)),
        lambda: block_mean(np.zeros(0), np.zeros((2, 2, 2), bool)),
    ],
)
def test_what_cannot_be_raises(call):
    with pytest.raises(DataError):
        call()
