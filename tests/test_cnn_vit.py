"""The hybrid: its published and its sound form, voxels in and out of the mask, training."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cortexlit.core import DataError, rng
from cortexlit.models.cnn_vit import CNNViT, CNNViTConfig, ConvEmbedding
from cortexlit.models.vit3d import patch_voxels
from cortexlit.training.trainer import fit, predict

pytestmark = pytest.mark.usefixtures("no_curves")

GRID = (11, 14, 13)
SMALL = {
    "grid": GRID,
    "channels": (4, 8),
    "patch": (4, 4, 4),
    "emb_dim": 8,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 12,
}
SMALL |= {"outputs": 3, "dropout": 0.0}


def brain(grid=GRID) -> np.ndarray:
    "An ellipsoid, 43 % of the box as the real mask."
    away = np.meshgrid(*[((np.arange(n) - (n - 1) / 2) / (0.47 * n)) ** 2 for n in grid], indexing="ij")
    return sum(away) <= 1


def model(**changes) -> CNNViT:
    torch.manual_seed(0)
    return CNNViT(CNNViTConfig(**SMALL | changes)).eval()


def volumes(n=3, grid=GRID) -> torch.Tensor:
    return torch.tensor(rng(0, "volumes").normal(size=(n, 1, *grid)).astype("float32"))


def counted(config: CNNViTConfig) -> tuple[int, int]:
    made = CNNViT(config)
    return made.tokens, sum(p.numel() for p in made.parameters())


def test_published_size():
    config = CNNViTConfig.study()
    assert (
        config.channels == [32, 64]
        and config.norm == "batch"
        and not config.pad
        and config.cells == (6, 11, 6)
    )
    assert (config.emb_dim, config.depth, config.heads, config.mlp_dim, config.outputs) == (
        512,
        6,
        8,
        2048,
        12,
    )
    stem = 27 * 32 + 32 + 64 + 27 * 32 * 64 + 64 + 128
    embedding = 64 * 6 * 11 * 6 * 512 + 512 + 512 + 19 * 512  # linear, CLS, positions
    block = 4 * 512 * 512 + 4 * 512 + 2 * 2 * 512 + 2 * 512 * 2048 + 2048 + 512
    assert counted(config) == (18, stem + embedding + 6 * block + 2 * 512 + 512 * 12 + 12) == (18, 31_964_812)


@pytest.mark.parametrize(
    ("mask", "tokens", "parameters"), [(None, 336, 20_035_210), ("ellipsoid", 222, 19_976_842)]
)
def test_sound_size(mask, tokens, parameters):
    whole = (72, 91, 75)
    config = CNNViTConfig(mask=None if mask is None else brain(whole), depth=6)
    assert counted(config) == (tokens, parameters) and tokens >= 200
    assert (config.token_of >= 0).all()  # every voxel of the mask is in a token


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("pad", [True, False])
def test_embedding_is_the_plain_network(norm, pad):
    ours = model(norm=norm, pad=pad).embedding
    (one, two), linear = ours.blocks, ours.linear
    as_patches = nn.Conv3d(8, 8, (1, 1, 1), stride=1)
    as_patches.load_state_dict(
        {"weight": linear.weight.detach().view(8, 8, 1, 1, 1), "bias": linear.bias.detach()}
    )
    x, border = volumes(), [(-n % 4) * pad for n in GRID]
    inside = torch.ones(1, 1, *GRID)
    pads = [side for n in reversed(border) for side in (0, n)]
    x, inside = nn.functional.pad(x, pads), nn.functional.pad(inside, pads)
    for block in (one, two):
        x = nn.functional.max_pool3d(torch.relu(block.norm(block.convolve(x))) * inside, 2)
        inside = nn.functional.max_pool3d(inside, 2)
    expected = as_patches(x).flatten(2).mT
    torch.testing.assert_close(ours(volumes().flatten(1)), expected, rtol=1e-5, atol=1e-5)


def test_tokens_are_those_of_the_cut():
    mask = brain()
    made = model(mask=mask)
    members, places = patch_voxels(mask, (4, 4, 4))
    assert made.tokens == len(members) < math.prod(-(-n // 4) for n in GRID)
    assert np.array_equal(made.places.numpy(), places)
    assert np.array_equal(made.to_voxels(np.arange(made.tokens)), made.config.token_of)
    assert made.embedding(volumes().flatten(1)[:, made.inside]).shape == (3, made.tokens, 8)


@pytest.mark.parametrize("attention", ["softmax", "local", "linear"])
def test_each_token_answers_to_its_own_voxels(attention):
    mask = brain()
    made = model(mask=mask, norm="batch", attention=attention)
    voxels = volumes().flatten(1)[:, made.inside].requires_grad_()
    token_of = made.config.token_of
    for token in range(made.tokens):
        gradient = (
            torch.autograd.grad(made.embedding(voxels)[:, token].square().sum(), voxels)[0]
            .abs()
            .sum(0)
            .numpy()
        )
        place = np.argwhere(mask)
        near = (place >= 4 * made.places[token].numpy() - 3) & (place < 4 * made.places[token].numpy() + 7)
        assert (gradient[token_of == token] > 0).mean() > 0.9 and not gradient[~near.all(1)].any()


def test_no_voxel_of_the_mask_is_lost_and_none_outside_is_seen():
    mask = brain()
    made, box = model(mask=mask), volumes().requires_grad_()
    made(box).logits.square().sum().backward()
    reached = (box.grad[:, 0] != 0).any(0).numpy()
    assert np.array_equal(reached, mask)
    with torch.no_grad():
        noisy = box + 1e3 * torch.randn_like(box) * ~torch.from_numpy(mask)
        noisy[..., 0, 0, 0] = torch.nan
        assert torch.equal(made(box).logits, made(noisy).logits)
        assert torch.equal(made(box).logits, made(voxels=box.flatten(1)[:, made.inside]).logits)


def test_air_stays_empty_behind_every_block():
    made = model(mask=brain(), norm="batch")
    for block in made.embedding.blocks:
        nn.init.ones_(block.convolve.bias)  # would fill the air
    x = volumes().flatten(1)[:, made.inside]
    box = x.new_zeros(3, 12 * 16 * 16).index_copy(1, made.embedding.places, x).view(3, 1, 12, 16, 16)
    inside = torch.zeros(12 * 16 * 16).index_fill(0, made.embedding.places, 1.0).view(1, 1, 12, 16, 16)
    for block in made.embedding.blocks:
        box, inside = block(box), nn.functional.max_pool3d(inside, 2)
        assert not box[(inside == 0).expand_as(box)].any() and box[(inside > 0).expand_as(box)].any()


def test_a_sample_does_not_depend_on_its_batch_unless_batchnorm():
    x = volumes(6)
    for norm, alike in (("group", True), ("batch", False)):
        made = model(norm=norm).train()
        one, other = made(x[:3]).logits[0], made(x[[0, 4, 5]]).logits[0]
        assert torch.allclose(one, other, atol=1e-5) == alike


def test_gradients_reach_every_weight():
    made = model(mask=brain(), noise=0.5, dropout=0.1).train()
    made(volumes(), labels=torch.ones(3, 3)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())


def test_gradients_are_right():
    made = model(channels=(2,), patch=(6, 8, 8), emb_dim=4, depth=1, mlp_dim=4).double()
    x = torch.tensor(rng(1, "v").normal(size=(1, 1, *GRID)), requires_grad=True)
    direction = torch.randn_like(x)
    made(x).logits.sum().backward()
    with torch.no_grad():
        steps = [made(x + sign * 1e-6 * direction).logits.sum() for sign in (1, -1)]
    assert float((steps[0] - steps[1]) / 2e-6) == pytest.approx(float((x.grad * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_save_and_load(tmp_path, norm):
    made = model(mask=brain(), norm=norm).train()
    made(volumes())  # moves running averages, if there are any
    made.eval().save_pretrained(tmp_path)
    again = CNNViT.from_pretrained(tmp_path)
    before, after = (
        {k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (made, again)
    )
    assert before == after and after["model_type"] == "cnn_vit"
    assert torch.equal(again(volumes()).logits, made(volumes()).logits)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"volume": torch.zeros(2, 1, 11, 14, 12)}, r"\(2, 1, 11, 14, 12\)"), ({"volume": torch.zeros(11, 14, 13)}, "volume of shape"),
        ({"voxels": torch.zeros(2, 5)}, "voxels of shape"), ({}, "one of them"),
        ({"volume": volumes(), "labels": torch.zeros(3, 2)}, "labels of shape"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_named(inputs, words):
    with pytest.raises(DataError, match=words):
        model(mask=brain())(**inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": (6, 4, 4)}, "multiples of 4"), ({"norm": "layer"}, "group, batch"), ({"channels": ()}, "channels"),
        ({"channels": (4, 0)}, "channels"), ({"parcels": np.ones(11 * 14 * 13, int)}, "ViT3D"), ({"heads": 3}, "heads"),
        ({"mask": np.ones((2, 2, 2))}, "mask"), ({"patch": (4, 16, 4), "pad": False}, "without padding"),
        ({"chanels": (3,)}, "channels"), ({"loss": "l1"}, "mse, huber"),
    ],
)  # fmt: skip
def test_wrong_options(changes, words):
    with pytest.raises(DataError, match=words):
        CNNViTConfig(**SMALL | changes)


def test_hooks_of_the_trainer():
    draw = rng(0, "hook")
    labels = draw.normal(size=(20, 3))
    assert CNNViT.correlation(labels * 2 + 1, labels) == pytest.approx(1)
    assert CNNViT.correlation(np.ones((20, 3)), labels) == 0
    assert {"mse", "huber"} <= set(CNNViT.losses) and isinstance(model().embedding, ConvEmbedding)
    maps = model(mask=brain()).attention_maps(volumes())
    assert maps.shape[:3] == (2, 3, 2) and torch.allclose(maps.sum(-1), torch.ones(()))


class Planted:
    "Label 0 raises a block of voxels inside the mask, label 1 one outside, label 2 nothing."

    def __init__(self, samples: int, seed: int):
        draw = rng(seed, "planted")
        self.labels = draw.normal(size=(samples, 3)).astype("float32")
        self.volumes = draw.normal(size=(samples, 1, *GRID)).astype("float32")
        self.volumes[:, 0, 4:7, 5:9, 5:9] += 2 * self.labels[:, 0, None, None, None]
        self.volumes[:, 0, :2, :2, :2] += 5 * self.labels[:, 1, None, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"volume": torch.from_numpy(self.volumes[i]), "labels": torch.from_numpy(self.labels[i])}


@pytest.mark.parametrize("attention", ["softmax", "local"])
def test_a_planted_signal_is_found(tmp_path, attention):
    tiers = Planted(160, 1), Planted(60, 2)
    start = model(mask=brain(), attention=attention)
    run = fit(
        start,
        tiers,
        adapt="full",
        loss=None,
        lr=5e-3,
        epochs=6,
        batch_size=16,
        out=tmp_path / "run",
        progress=False,
    )
    found = predict(run.model, tiers[1], batch_size=20)
    r = [np.corrcoef(found[:, k], tiers[1].labels[:, k])[0, 1] for k in range(3)]
    assert r[0] > 0.8 and max(abs(r[1]), abs(r[2])) < 0.4  # 0.4: three standard errors of 60 volumes
