"""ViT3D: tokens and parameters of the study, embeddings, masks, attention, gradients, saving, training, and errors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cortexlit.core import DataError, rng
from cortexlit.models.classifiers import ClassifierConfig
from cortexlit.models.cnn_vit import CNNViT, CNNViTConfig
from cortexlit.models.v1t import V1TConfig
from cortexlit.models.vit3d import (
    ATTENTION,
    EncoderBlock,
    LinearAttention,
    ParcelEmbedding,
    SoftmaxAttention,
    ViT3D,
    ViT3DConfig,
    VolumeEmbedding,
    patch_voxels,
)
from cortexlit.models.viv1t import ViV1TConfig
from cortexlit.training.trainer import fit, predict

pytestmark = pytest.mark.usefixtures("no_curves")

GRID, PATCH = (5, 7, 6), (2, 3, 4)
SMALL = dict(grid=GRID, patch=PATCH, emb_dim=16, depth=2, heads=4, mlp_dim=24, outputs=3)


def brain(seed: int = 0, grid: tuple[int, ...] = GRID) -> np.ndarray:
    "A mask with holes and with empty patches."
    mask = rng(seed, "brain").random(grid) < 0.6
    mask[:2, :3] = False
    return mask


def model(seed: int = 0, **options) -> ViT3D:
    torch.manual_seed(seed)
    return ViT3D(ViT3DConfig(**SMALL | options)).eval()


def volumes(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng(seed, "volumes").normal(size=(count, 1, *GRID)).astype(np.float32))


# ---- the study's model


@pytest.mark.parametrize(
    "patch, layers, outputs, tokens, parameters",
    [
        ((12, 13, 15), 3, 10, 210, 10_770_442),
        ((12, 13, 15), 6, 10, 210, 20_227_594),
        ((6, 7, 5), 3, 12, 2340, 10_771_468),
        ((6, 7, 5), 6, 12, 2340, 20_228_620),
    ],
)
def test_tokens_and_parameters_of_the_study(patch, layers, outputs, tokens, parameters):
    with torch.device("meta"):
        made = ViT3D(ViT3DConfig.study(patch, layers, outputs))
    assert made.tokens == tokens
    assert sum(p.numel() for p in made.parameters()) == parameters
    c = made.config
    assert (c.emb_dim, c.heads, c.dropout, c.attention, c.pad, c.mask) == (
        512,
        8,
        0.1,
        "softmax",
        False,
        None,
    )


def test_the_study_drops_what_fills_no_patch():
    kept = model(pad=False)
    assert kept.tokens == 2 * 2 * 1 and model().tokens == 3 * 3 * 2
    volume = volumes()
    changed = volume.clone()
    changed[:, :, 4:] += 1  # beyond the last whole patch along x
    changed[:, :, :, 6:] += 1
    changed[..., 4:] += 1
    with torch.no_grad():
        torch.testing.assert_close(kept(volume).logits, kept(changed).logits, rtol=0, atol=0)
        assert not torch.allclose(model()(volume).logits, model()(changed).logits)


def test_block_is_torchs_encoder_layer():
    block = EncoderBlock(ViT3DConfig(**SMALL)).eval()
    layer = nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", batch_first=True, norm_first=True).eval()
    pairs = ((layer.norm1, block.norm), (layer.self_attn.out_proj, block.out[0]), (layer.norm2, block.mlp[0]),
             (layer.linear1, block.mlp[1]), (layer.linear2, block.mlp[4]))  # fmt: skip
    for theirs, ours in pairs:
        nn.init.normal_(ours.weight)
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.qkv.bias)
        x = torch.randn(2, 9, 16)
        torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-4)


# ---- tokens


@given(
    st.tuples(*[st.integers(1, 7)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_voxel_is_in_the_patch_of_its_place(grid, patch, pad, seed):
    mask = rng(seed, "mask").random(grid) < 0.5
    if not mask.any():
        return
    members, places = patch_voxels(mask, patch, pad)
    assert members.shape == (len(places), np.prod(patch))
    where = np.argwhere(mask)  # numbers of voxels are in C order
    seen = np.full(len(where), -1)
    for token, (row, place) in enumerate(zip(members, places, strict=True)):
        inside = row[row < len(where)]
        assert len(inside)  # no token of air
        np.testing.assert_array_equal(where[inside] // patch, np.broadcast_to(place, (len(inside), 3)))
        corner = where[inside] - np.array(place) * patch
        np.testing.assert_array_equal(np.ravel_multi_index(corner.T, patch), np.flatnonzero(row < len(where)))
        assert (seen[inside] == -1).all()
        seen[inside] = token
    whole = (where // patch < np.array(grid) // patch).all(1)
    assert (seen[whole] >= 0).all() and ((seen >= 0).all() if pad else (seen[~whole] == -1).all())
    if len(members):
        config = ViT3DConfig(grid=grid, patch=patch, mask=mask, pad=pad)
        np.testing.assert_array_equal(config.token_of, seen)
    else:
        with pytest.raises(DataError, match="is whole"):
            ViT3DConfig(grid=grid, patch=patch, mask=mask, pad=pad)


@pytest.mark.parametrize("pad", [True, False])
def test_embedding_is_a_convolution(pad):
    embedding = VolumeEmbedding(patch_voxels(np.ones(GRID, bool), PATCH, pad)[0], 8)
    volume = volumes()
    padded = F.pad(volume, [0, 2, 0, 2, 0, 1]) if pad else volume
    weight = embedding.linear.weight.view(8, 1, *PATCH)
    with torch.no_grad():
        expected = F.conv3d(padded, weight, embedding.linear.bias, stride=PATCH).flatten(2).transpose(1, 2)
        torch.testing.assert_close(embedding(volume.flatten(1)), expected, rtol=1e-4, atol=1e-5)


def test_mask_of_everything_is_no_mask():
    plain, masked = model(), model(mask=np.ones(GRID, bool))
    masked.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(volumes()).logits, masked(volumes()).logits, rtol=0, atol=0)


def test_masked_model_sees_the_brain_only():
    mask = brain()
    masked = model(mask=mask)
    assert masked.tokens < model().tokens
    volume = volumes()
    changed = torch.where(torch.from_numpy(mask), volume, 9.0)
    with torch.no_grad():
        out = masked(volume).logits
        torch.testing.assert_close(out, masked(changed).logits, rtol=0, atol=0)
        voxels = volume[:, 0][:, torch.from_numpy(mask)]
        torch.testing.assert_close(out, masked(voxels=voxels).logits, rtol=0, atol=0)


def test_masked_tokens_equal_those_of_the_zeroed_box():
    mask = brain()
    box, masked = model(), model(mask=mask)
    masked.embedding.linear.load_state_dict(box.embedding.linear.state_dict())
    zeroed = volumes() * torch.from_numpy(mask)
    kept = [tuple(p) for p in masked.places.tolist()]
    rows = [i for i, p in enumerate(box.places.tolist()) if tuple(p) in kept]
    with torch.no_grad():
        ours = masked.embedding(volumes().flatten(1)[:, masked.inside])
        torch.testing.assert_close(ours, box.embedding(zeroed.flatten(1))[:, rows], rtol=1e-5, atol=1e-6)


def test_parcels_have_maps_of_their_own():
    parcels = np.array([2, 0, 1, 3, 2, 0, 1])
    embedding = ParcelEmbedding(parcels, 5)
    x = torch.randn(4, 7)
    dense = torch.zeros(7, 3, 5)
    for row, voxel in enumerate(embedding.order.tolist()):
        dense[voxel, parcels[voxel] - 1] = embedding.weight[row].detach()
    expected = torch.einsum("bv,vtd->btd", x, dense) + embedding.bias
    torch.testing.assert_close(embedding(x), expected)
    assert embedding.sizes == [2, 2, 1]


def test_values_of_tokens_back_in_voxels():
    mask = brain()
    parcels = np.arange(mask.sum()) % 4  # 0: not used
    by_parcel = model(mask=mask, parcels=parcels)
    spread = by_parcel.to_voxels(np.array([10.0, 20.0, 30.0]))
    np.testing.assert_array_equal(np.nan_to_num(spread, nan=0), 10 * parcels)
    assert model().to_voxels(np.ones((2, 18))).shape == (2, 210)


# ---- attention


def test_weights_are_what_attention_uses():
    q, k, v = torch.randn(3, 2, 4, 7, 5)
    near = torch.rand(7, 7) < 0.4
    near.fill_diagonal_(True)
    for attention, seen in (
        (SoftmaxAttention(), None),
        (SoftmaxAttention(), near),
        (LinearAttention(), None),
    ):
        weights = attention.weights(q, k, seen)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        torch.testing.assert_close(attention(q, k, v, seen), weights @ v, rtol=1e-4, atol=1e-5)
        assert seen is None or (weights[..., ~seen] == 0).all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_maps(attention):
    made = model(mask=brain(), attention=attention, radius=1)
    maps = made.attention_maps(volumes())
    assert maps.shape == (2, 3, 4, 1 + made.tokens, 1 + made.tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert (maps >= 0).all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_hook_records_the_same_maps(attention):
    made, found = model(attention=attention), []
    for module in made.modules():
        if callable(getattr(module, "weights", None)):
            module.register_forward_pre_hook(
                lambda m, a: found.append(m.weights(a[0], a[1], *a[3:]).detach())
            )
    made(volumes())
    torch.testing.assert_close(torch.stack(found), made.attention_maps(volumes())[:])


def test_local_attention():
    mask = np.ones(GRID, bool)
    wide, full = model(attention="local", radius=9, mask=mask), model(mask=mask)
    wide.load_state_dict(full.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(wide(volumes()).logits, full(volumes()).logits, rtol=1e-4, atol=1e-5)
    local = model(attention="local", radius=1, mask=mask)
    weights = local.attention_maps(volumes())
    places = local.places.numpy()
    apart = abs(places[:, None] - places).max(-1)
    between = weights[..., 1:, 1:].numpy()
    assert (between[..., apart > 1] == 0).all() and (between[..., apart <= 1] > 0).all() and apart.max() > 1
    assert (weights[..., 0, :] > 0).all() and (weights[..., 0] > 0).all()  # CLS sees all, all see it


def test_the_order_of_the_tokens_does_not_matter():
    made, shuffled = model(), model()
    order = torch.from_numpy(rng(0, "order").permutation(made.tokens))
    with torch.no_grad():
        shuffled.embedding.members.copy_(made.embedding.members[order])
        shuffled.positions[:, 1:] = made.positions[:, 1:][:, order]
        torch.testing.assert_close(shuffled(volumes()).logits, made(volumes()).logits, rtol=1e-4, atol=1e-5)


# ---- learning


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_reach_every_parameter_and_the_input(attention):
    made = model(attention=attention, mask=brain()).train()
    voxels = torch.randn(4, int(brain().sum()), requires_grad=True)
    made(voxels=voxels, labels=torch.randn(4, 3)).loss.backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    assert (voxels.grad.abs().sum(0) > 0).all()


def test_gradients_by_differences():
    made = model(mask=brain(), depth=1).double()
    voxels = torch.randn(2, int(brain().sum()), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: made(voxels=v).logits, voxels, fast_mode=True)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_losses(loss):
    made, labels = model(loss=loss), 4 * torch.randn(3, 3)
    out = made(volumes(), labels=labels)
    error = (out.logits - labels).abs()
    expected = error**2 if loss == "mse" else torch.where(error < 1, error**2 / 2, error - 0.5)
    torch.testing.assert_close(out.loss, expected.mean())


def test_one_batch_is_learnt_by_heart():
    made = model(mask=brain(), dropout=0.0).train()
    labels, losses = torch.randn(6, 3), []
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(100):
        loss = made(volumes(6), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_noise_only_while_training():
    noisy = model(noise=1.0, dropout=0.0)
    assert torch.equal(noisy(volumes()).logits, noisy(volumes()).logits)
    noisy.train()
    assert not torch.equal(noisy(volumes()).logits, noisy(volumes()).logits)


class Planted:
    "Voxels in two parcels carry two latents; the labels are mixtures of them."

    def __init__(self, count: int, seed: int):
        draw = rng(seed, "planted")
        latents = draw.normal(size=(count, 2))
        self.voxels = draw.normal(size=(count, int(brain().sum()))).astype(np.float32)
        self.voxels[:, :20] += 1.5 * latents[:, :1]
        self.voxels[:, 60:80] -= 1.5 * latents[:, 1:]
        self.labels = np.column_stack([latents, latents.sum(1)]).astype(np.float32)

    def __len__(self) -> int:
        return len(self.voxels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"voxels": torch.from_numpy(self.voxels[i]), "labels": torch.from_numpy(self.labels[i])}


def test_a_planted_signal_is_found(tmp_path):
    parcels = 1 + np.arange(int(brain().sum())) // 20
    train, validation, test = (Planted(n, s) for s, n in enumerate((300, 100, 100)))
    for options in ({"parcels": parcels}, {}):
        start = model(mask=brain(), dropout=0.0, depth=1, **options)
        run = fit(start, (train, validation), adapt="full", out=tmp_path / f"run{len(options)}", loss="huber", lr=5e-3,
                  schedule="plateau", epochs=12, batch_size=30, progress=False)  # fmt: skip
        found = predict(run.model, test, batch_size=50)
        assert run.model.config.loss == "huber"
        assert ViT3D.correlation(found, test.labels) > (0.75 if options else 0.5)
    with pytest.raises(DataError, match="one of mse, huber"):
        fit(start, (train, validation), adapt="full", out=tmp_path / "other", loss="poisson", progress=False)


# ---- saving


@pytest.mark.parametrize(
    "options", [{}, {"pad": False}, {"mask": brain()}, {"parcels": 1}, {"attention": "local"}]
)
def test_saved_and_loaded(options, tmp_path):
    if "parcels" in options:
        options = {"mask": brain(), "parcels": np.arange(int(brain().sum())) % 5}
    made = model(**options)
    made.save_pretrained(tmp_path)
    again = ViT3D.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(volumes()).logits, made(volumes()).logits, rtol=0, atol=0)
    assert again.state_dict().keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert json.loads((tmp_path / "config.json").read_text())["grid"] == list(GRID)
    np.testing.assert_array_equal(again.config.brain, made.config.brain)


def test_the_mask_of_a_real_grid_is_short_in_the_config():
    x, y, z = np.ogrid[-1:1:72j, -1:1:91j, -1:1:75j]
    config = ViT3DConfig(mask=(x**2 + y**2 + z**2) < 0.8)
    assert len(config.to_json_string()) < 20_000


# ---- errors


@pytest.mark.parametrize(
    "options, text",
    [
        ({"grid": (5, 5)}, "grid"),
        ({"patch": (2, 0, 2)}, r"patch\[1\]=0"),
        ({"patch": (2, 2.5, 2)}, r"patch\[1\]=2.5"),
        ({"patch": (6, 3, 4), "pad": False}, "without padding"),
        ({"mask": np.ones((5, 7, 7))}, r"mask of shape \(5, 7, 7\)"),
        ({"mask": np.zeros(GRID)}, "mask is empty"),
        ({"parcels": np.ones(9)}, "9 parcel numbers"),
        ({"parcels": np.full(210, 2)}, "has no voxel"),
        ({"parcels": np.zeros(210)}, "has no voxel"),
        ({"parcels": np.ones(210), "attention": "local"}, "parcels have no places"),
        ({"emb_dim": 18}, "a multiple of heads"),
        ({"attention": "sparse"}, "softmax, local, linear"),
        ({"loss": "poisson"}, "mse, huber"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"noise": -1.0}, "0 <= noise"),
        ({"depth": True}, "depth=True"),
        ({"head": 4}, "perhaps heads"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(DataError, match=text):
        ViT3DConfig(**SMALL | options)


def test_wrong_shapes_are_named():
    made = model(mask=brain())
    count = int(brain().sum())
    cases = [
        (dict(), "none or both"),
        (dict(volume=volumes(), voxels=torch.ones(3, count)), "none or both"),
        (dict(volume=volumes()[:, 0]), r"expected: \(batch, 1, 5, 7, 6\)"),
        (dict(volume=volumes()[..., :5]), r"volume of shape \(3, 1, 5, 7, 5\)"),
        (dict(voxels=torch.ones(3, count + 1)), rf"expected: \(batch, {count}\)"),
        (dict(volume=volumes(), labels=torch.ones(3, 4)), r"labels of shape \(3, 4\)"),
    ]
    for given_, text in cases:
        with pytest.raises(DataError, match=text):
            made(**given_)


def test_mixing_acts_in_training_only_and_mixes_labels_alike():
    torch.manual_seed(0)
    model = ViT3D(ViT3DConfig(grid=(4, 4, 4), patch=(2, 2, 2), emb_dim=8, depth=1, heads=2, mlp_dim=8,
                              outputs=3, dropout=0.0, mixing=0.5))  # fmt: skip
    same = torch.randn(1, 1, 4, 4, 4).expand(6, -1, -1, -1, -1)
    labels = torch.randn(1, 3).expand(6, -1)
    kept = model.eval()(same, labels=labels).loss
    mixed = model.train()(same, labels=labels).loss  # mixtures of equal trials are the trial
    torch.testing.assert_close(mixed, kept)
    volumes, labels = torch.randn(6, 1, 4, 4, 4), torch.randn(6, 3)
    plain = model.eval()(volumes, labels=labels)
    assert torch.equal(model(volumes, labels=labels).loss, plain.loss)
    model.train()
    assert not torch.equal(model(volumes, labels=labels).loss, plain.loss)
    assert torch.equal(model(volumes).logits, plain.logits)  # nothing to mix without labels
    torch.manual_seed(1)
    first = model(volumes, labels=labels).loss
    torch.manual_seed(1)
    flat = volumes.flatten(1)
    assert torch.equal(model(voxels=flat, labels=labels).loss, first)
    with pytest.raises(DataError, match="mixing=-1"):
        ViT3DConfig(mixing=-1)


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (ViT3DConfig, SMALL),
        (CNNViTConfig, {"grid": (24, 24, 24)}),
        (ClassifierConfig, {"concepts": ["dog", "fern"]}),
        (V1TConfig, {"neurons": {"A": 3}}),
        (ViV1TConfig, {"neurons": {"A": 3}}),
    ],
)
def test_what_is_no_option_is_refused_unless_it_was_saved(kind, needed, tmp_path):
    with pytest.raises(DataError, match="no option 'augmentation'"):
        kind(**needed, augmentation=1)
    config = kind(**needed)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_another_version": 1}))
    again = kind.from_pretrained(tmp_path)
    assert {k: getattr(again, k) for k in needed} == {k: getattr(config, k) for k in needed}


# ---- memory for time


@pytest.mark.parametrize("make", ["vit3d", "cnn_vit"])
def test_checkpointing_changes_nothing_but_memory(make):
    torch.manual_seed(0)
    sizes = SMALL | {"dropout": 0.3, "depth": 3}
    if make == "cnn_vit":
        sizes |= {"grid": (8, 8, 8), "patch": (4, 4, 4), "channels": (2,)}
        made = CNNViT(CNNViTConfig(**sizes)).train()
    else:
        made = ViT3D(ViT3DConfig(**sizes)).train()
    volume, labels = torch.randn(3, 1, *made.config.grid), torch.rand(3, 3)

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept = []
        torch.manual_seed(7)
        made.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = made(volume=volume, labels=labels).loss
            count = sum(kept)
        loss.backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None], count

    before, much = gradients()
    made.gradient_checkpointing_enable()
    assert made.gradient_checkpointing
    after, little = gradients()
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert little < much / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"attention": "local", "mask": brain()}, {"attention": "hilo"}, {"token_positions": "rotary", "emb_dim": 24},
     {"scales": "two"}, {"scales": "fused"}, {"mixing": 0.4, "noise": 1.0},
     {"grid": (8, 8, 8), "patch": (4, 4, 4), "channels": (4,)}],
)  # fmt: skip
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_answer_and_learn_nearly_as_float32(options, given):
    torch.manual_seed(0)
    hybrid = "channels" in options
    made = (
        CNNViT(CNNViTConfig(**SMALL | options)) if hybrid else ViT3D(ViT3DConfig(**SMALL | options))
    ).eval()
    volume, labels = torch.randn(3, 1, *made.config.grid), torch.rand(3, 3)
    with torch.no_grad():
        full = made(volume=volume).logits
        half = made.to(torch.bfloat16)(volume=volume.to(given)).logits
    assert (half.float() - full).norm() < 0.05 * full.norm()
    before = [weight.detach().clone() for weight in made.train().parameters()]
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    made(volume=volume.to(given), labels=labels).loss.backward()
    optimizer.step()
    for old, weight in zip(before, made.parameters(), strict=True):
        assert torch.isfinite(weight).all() and not torch.equal(old, weight)
