"""Made trials: what they are made of, that they repeat, that held-out rows are not among it; learning without labels."""

import itertools
import math

import numpy as np
import pytest
import torch

from cortexlit.core import DataError
from cortexlit.models.vit3d import ViT3D, ViT3DConfig
from cortexlit.training.augmentation import (
    AUGMENTATIONS,
    PRETRAINING,
    augment,
    augmenter,
    check_augmentation,
    pretrain_decoder,
)

MADE = AUGMENTATIONS[1:]


def trials(count=60, voxels=6, seed=0):
    "Patterns that follow two labels, of unequal scale, and the labels."
    draw = np.random.default_rng(seed)
    labels = draw.normal(3, 2, (count, 2)).astype(np.float32)
    patterns = labels @ draw.normal(size=(2, voxels)) * 5 + draw.normal(size=(count, voxels)) + 10
    return patterns.astype(np.float32), labels


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    "Generators of a few steps: these tests are about rows, not about how good they are."
    import cortexlit.training.augmentation as module

    full = module._network
    monkeypatch.setattr(module, "_network", lambda *a: (full(*a)[0], 4))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("ratio", [0, 0.5, 2.3])
def test_recorded_trials_come_first_and_made_ones_below(name, ratio):
    x, y = trials()
    more, told = augment(name, x, y, ratio)
    count = 60 + (0 if name == "none" else round(ratio * 60))
    assert more.shape == (count, 6) and told.shape == (count, 2)
    assert np.array_equal(more[:60], x) and np.array_equal(told[:60], y)
    assert more.dtype == told.dtype == np.float32 and np.isfinite(more).all()


@pytest.mark.parametrize("name", MADE)
def test_made_trials_repeat_with_the_seed_and_leave_the_global_one_alone(name):
    x, y = trials()
    state = torch.random.get_rng_state()
    first, again, other = (augment(name, x, y, seed=s) for s in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    torch.rand(7)  # whatever else is drawn
    assert np.array_equal(augmenter(name, x, y, 3)(1.0)[0], first[0])


@pytest.mark.parametrize("name", MADE)
def test_rows_that_are_held_back_do_not_reach_the_generator(name):
    (x, y), train = trials(), np.arange(40)
    spoiled, wrong = x.copy(), y.copy()
    spoiled[40:], wrong[40:] = 1e6, -1e6
    kept = [augment(name, a[train], b[train]) for a, b in ((x, y), (spoiled, wrong))]
    assert all(np.array_equal(a, b) for a, b in zip(*kept, strict=True))
    seen = [augment(name, a, b)[0][60:] for a, b in ((x, y), (spoiled, wrong))]
    assert not np.array_equal(*seen)  # the comparison can fail


@pytest.mark.parametrize("name", [name for name in MADE if name != "mixing"])
def test_every_recorded_label_is_used_equally_often(name):
    x, y = trials()
    told = augment(name, x, y, 2.0)[1][60:]
    assert np.allclose(np.sort(told, 0), np.sort(np.concatenate([y, y]), 0), atol=1e-4)


def test_noise_has_the_spread_it_names():
    x, y = trials(2000)
    made, told = (v[2000:] for v in augment("noise", x, y))
    order, mine = np.lexsort(told.round(3).T), np.lexsort(y.round(3).T)
    added = (made[order] - x[mine]) / x.std(0)
    assert abs(added.mean()) < 0.05 and abs(added.std() - 1.5) < 0.05


def test_mixtures_lie_between_trials_with_the_same_share_of_labels():
    y = np.arange(40, dtype=np.float32)[:, None]
    x = np.concatenate([2 * y, -y], 1)  # a mixture keeps this line
    made, told = (v[40:] for v in augment("mixing", x, y, 5.0))
    np.testing.assert_allclose(made, np.concatenate([2 * told, -told], 1), atol=1e-3)
    assert told.min() >= 0 and told.max() <= 39 and len(np.unique(told)) > 100


def test_normal_finds_what_labels_do_and_what_they_leave():
    x, y = trials(3000)
    made, told = (v[3000:] for v in augment("normal", x, y))
    for wanted, found in ((np.cov(x.T), np.cov(made.T)), (x.mean(0), made.mean(0))):
        np.testing.assert_allclose(found, wanted, rtol=0.15, atol=0.5)
    slopes = [np.linalg.lstsq(b - b.mean(0), a - a.mean(0), rcond=None)[0] for a, b in ((x, y), (made, told))]
    np.testing.assert_allclose(slopes[1], slopes[0], atol=0.2)


def test_a_voxel_that_never_changes_stays_as_it_is():
    x, y = trials()
    x[:, 2] = 7
    for name in MADE:
        assert np.allclose(augment(name, x, y)[0][:, 2], 7), name


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x, y: augment("gann", x, y), "augmentation 'gann', perhaps gan"),
        (lambda x, y: augment(None, x, y), "one of none, noise, mixing, normal, vae, gan, diffusion, flow"),
        (lambda x, y: augment("noise", x[:0], y[:0]), r"patterns of shape \(0, 6\)"),
        (lambda x, y: augment("noise", x[0], y), r"patterns of shape \(6,\)"),
        (lambda x, y: augment("noise", x, y[:9]), r"labels of shape \(9, 2\)"),
        (lambda x, y: augment("vae", x * math.nan, y), "patterns that are not finite"),
        (lambda x, y: augment("none", x, y + math.inf), "labels that are not finite"),
        (lambda x, y: augment("noise", x, y, -1), "ratio=-1"),
        (lambda x, y: augment("noise", x, y, math.nan), "ratio=nan"),
        (lambda x, y: augment("noise", x, y, 101), "ratio=101"),
        (lambda x, y: augment("noise", x, y, True), "ratio=True"),
        (lambda x, y: augmenter("noise", x, y)("1"), "ratio='1'"),
        (lambda x, y: augment("noise", x, y, seed=-1), "seed=-1"),
        (lambda x, y: check_augmentation("none", seed=1.5), "seed=1.5"),
    ],
)
def test_what_cannot_be_made_is_refused(call, text):
    with pytest.raises(DataError, match=text):
        call(*trials())


# ---- without labels

PARCELS = np.repeat([1, 2, 3, 4, 5], [3, 4, 2, 5, 4])


def model(**options):
    torch.manual_seed(0)
    small = {
        "grid": (2, 3, 3),
        "parcels": PARCELS,
        "emb_dim": 8,
        "depth": 1,
        "heads": 2,
        "mlp_dim": 8,
        "dropout": 0.0,
    }
    return ViT3D(ViT3DConfig(**small | {"outputs": 2} | options))


def regions(count=400):
    "Voxels of five regions that share one number."
    draw = np.random.default_rng(0)
    return (draw.normal(size=(count, 1)) + 0.3 * draw.normal(size=(count, 18))).astype(np.float32)


@pytest.mark.parametrize("how", PRETRAINING)
@pytest.mark.parametrize(
    "options",
    [{}, {"parcels": None, "patch": (1, 1, 2)}, {"parcels": None, "patch": (2, 2, 2), "pad": False}],
)
def test_all_but_the_head_learns_and_repeats(how, options):
    options = {"patch": (1, 1, 1)} | options
    if options.get("pad") is False:
        options["patch"] = (1, 2, 2)  # two tokens, and voxels in none
    state = torch.random.get_rng_state()
    one, two = (pretrain_decoder(model(**options), regions(), how, steps=3, seed=1) for _ in range(2))
    before = model(**options).state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        moves = how != "none" and value.is_floating_point() and not name.startswith("head.")
        assert torch.equal(value, before[name]) != moves, name
    assert all(p.grad is None for p in one.parameters())
    torch.random.set_rng_state(state)


def test_hidden_voxels_are_expected_better_than_their_mean(monkeypatch):
    import cortexlit.training.augmentation as module

    lost = []
    square = torch.Tensor.square
    monkeypatch.setattr(
        module.torch.Tensor, "square", lambda v: lost.append(float((v * v).mean().detach())) or square(v)
    )
    pretrain_decoder(model(), regions(), "masked", steps=150, rate=1e-2)
    whole = np.square(
        regions()
    ).mean()  # two of five tokens are hidden; the rest is compared with nothing but a mean
    assert (np.mean(lost[-30:]) - 0.6 * whole) / (0.4 * whole) < 0.4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, x: pretrain_decoder(m, x, "mask"), "pretraining 'mask', perhaps masked"),
        (lambda m, x: pretrain_decoder(m, x[:, :5]), r"voxels of shape \(400, 5\)"),
        (lambda m, x: pretrain_decoder(m, x * math.nan), "not finite"),
        (lambda m, x: pretrain_decoder(m, x, hidden=0.0), "hidden=0.0 of 5 tokens"),
        (lambda m, x: pretrain_decoder(m, x, hidden=1.0), "hidden=1.0 of 5 tokens"),
        (lambda m, x: pretrain_decoder(m, x, steps=0), "steps=0"),
        (lambda m, x: pretrain_decoder(m, x, rate=math.nan), "rate=nan"),
        (lambda m, x: pretrain_decoder(m, x, average=1.0), "average=1.0"),
        (lambda m, x: pretrain_decoder(m, x, seed=-1), "seed=-1"),
        (lambda m, x: pretrain_decoder(model(attention="linear"), x), "attention='linear'"),
    ],
)
def test_what_cannot_be_pretrained_is_refused(call, text):
    with pytest.raises(DataError, match=text):
        call(model(), regions())


def test_names_are_told_apart():
    assert all(a != b for a, b in itertools.combinations(AUGMENTATIONS + PRETRAINING[1:], 2))
