"""Rotary positions and HiLo attention, and the options of ViT3D and V1T that are made of them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cortexlit.core import DataError
from cortexlit.models.attention import attention_weights
from cortexlit.models.cnn_vit import CNNViT, CNNViTConfig
from cortexlit.models.efficient import HiLoAttention, rotary_angles, rotate
from cortexlit.models.v1t import V1T, Attention, V1TConfig
from cortexlit.models.vit3d import EncoderBlock, ViT3D, ViT3DConfig

GRID, PATCH = (5, 7, 6), (2, 2, 2)
SMALL = dict(grid=GRID, patch=PATCH, emb_dim=24, depth=2, heads=4, mlp_dim=20, outputs=3, dropout=0.0)
MASK = np.random.default_rng(0).random(GRID) < 0.5
MASK[:2, :3] = False  # empty patches
OPTIONS = [
    {"token_positions": "rotary"},
    {"kv_heads": 1},
    {"kv_heads": 2, "token_positions": "rotary"},
    {"attention": "hilo"},
    {"attention": "hilo", "window": 3, "kv_heads": 2, "token_positions": "rotary"},
    {"attention": "local", "radius": 1, "token_positions": "rotary"},
    {"attention": "linear", "kv_heads": 2},
    {"scales": "two"},
    {"scales": "two", "coarse": [4, 3, 5], "attention": "linear"},
    {"scales": "fused"},
    {"scales": "fused", "coarse": [3, 4, 2], "attention": "local", "radius": 1, "token_positions": "rotary"},
    {"scales": "fused", "attention": "hilo", "kv_heads": 2},
]
V1T_OPTIONS = [
    {"token_positions": "rotary"},
    {"kv_heads": 1},
    {"kv_heads": 2, "token_positions": "rotary", "local_attention": True},
]


def vit3d(seed: int = 0, **options) -> ViT3D:
    "A model whose attention is not uniform."
    torch.manual_seed(seed)
    made = ViT3D(ViT3DConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for block in made.blocks:
            block.qkv.weight.mul_(4)
    return made


def v1t(**options) -> V1T:
    small = {"neurons": {"A": 5}, "size": (10, 14), "patch": 4, "stride": 2, "emb_dim": 9, "heads": 4}
    small |= {"mlp_dim": 12, "depth": 2, "behavior": "none", "shift": "none", "positions": "free"}
    torch.manual_seed(0)
    made = V1T(V1TConfig(**small | options)).eval()
    with torch.no_grad():
        for module in made.core.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
        made.readouts["A"].features.normal_()
    return made


def volumes(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, *GRID, generator=torch.Generator().manual_seed(1))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 10, 14, generator=torch.Generator().manual_seed(1))


# ---- turns


@given(st.integers(1, 3), st.integers(0, 40), st.integers(-50, 50), st.integers(0, 99))
def test_scores_depend_on_the_distance_alone(axes, more, shift, seed):
    draw = torch.Generator().manual_seed(seed)
    width = 2 * axes + more
    q, k = torch.randn(2, 9, width, generator=draw, dtype=torch.double)
    places = torch.randint(0, 20, (9, axes), generator=draw).double()
    here, there = (rotary_angles(places + s, width) for s in (0, shift))
    torch.testing.assert_close(rotate(q, here) @ rotate(k, here).T, rotate(q, there) @ rotate(k, there).T)
    torch.testing.assert_close(rotate(q, here).norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(rotate(rotate(q, here), -here), q)
    assert here.shape == (9, axes * (width // 2 // axes))


def test_angles_of_one_axis_are_the_published_ones():
    angles = rotary_angles(torch.arange(6)[:, None], 8, base=10_000)
    expected = torch.arange(6)[:, None] * 10_000.0 ** (-2 * torch.arange(4) / 8)
    torch.testing.assert_close(angles, expected)
    two = rotary_angles(torch.tensor([[3, 0], [0, 3]]), 8)
    torch.testing.assert_close(two[0, :2], two[1, 2:])  # each axis turns planes of its own
    assert (two[0, 2:] == 0).all() and (two[1, :2] == 0).all()


def test_numbers_beyond_the_last_pair_stay_and_half_precision_is_kept():
    x = torch.randn(4, 7).bfloat16()
    turned = rotate(x, rotary_angles(torch.ones(4, 2), 7))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, 4:], x[:, 4:]) and not torch.equal(turned[:, :4], x[:, :4])


@pytest.mark.parametrize(
    ("given_", "text"),
    [((torch.ones(3, 3), 5), "width of 6 or more"), ((torch.ones(3, 1), 4, 1.0), "base=1.0")],
)
def test_what_cannot_turn_is_refused(given_, text):
    with pytest.raises(DataError, match=text):
        rotary_angles(*given_)


# ---- near and far


@given(st.integers(2, 5), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_hilo_is_a_mean_with_the_weights_it_tells(heads, others, size, seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = 1 + others
    order = 1 + torch.randperm(others, generator=draw)
    windows = torch.nn.functional.pad(order, (0, -others % size), value=tokens).view(-1, size)
    q, k, v = (
        torch.randn(2, heads, tokens, 6, generator=draw, dtype=torch.double, requires_grad=True)
        for _ in range(3)
    )
    hilo = HiLoAttention()
    maps = hilo.weights(q, k, windows)
    out = hilo(q, k, v, windows)
    torch.testing.assert_close(out, maps @ v)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, heads, tokens, dtype=torch.double))
    fast, slow = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, maps @ v))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(maps[:, : heads // 2, 0], attention_weights(q, k)[:, : heads // 2, 0])


def test_windows_of_a_brain_hold_each_token_once_and_its_neighbours():
    made = vit3d(attention="hilo", mask=MASK)
    inside = made.windows[made.windows <= made.tokens]
    assert sorted(inside.tolist()) == list(range(1, 1 + made.tokens))
    for row in made.windows:
        places = made.places[row[row <= made.tokens] - 1]
        assert len({tuple(p) for p in (places // 2).tolist()}) == 1


# ---- options of ViT3D


def test_without_options_nothing_has_changed():
    plain, named = (
        vit3d(),
        vit3d(kv_heads=4, token_positions="learned", attention="softmax", window=3, scales="one"),
    )
    names = {"cls": (1, 1, 24), "positions": (1, 1 + plain.tokens, 24), "blocks.0.qkv.weight": (72, 24)}
    state = plain.state_dict()
    assert {name: tuple(state[name].shape) for name in names} == names
    assert "windows" not in state and state.keys() == named.state_dict().keys()
    for name, value in state.items():
        assert torch.equal(value, named.state_dict()[name]), name
    assert torch.equal(plain(volumes()).logits, named(volumes()).logits)


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_heads_are_heads_with_equal_keys_and_values(groups):
    shared, full = vit3d(kv_heads=groups), vit3d()
    state = full.state_dict() | {n: p for n, p in shared.state_dict().items() if "qkv" not in n}
    for name, value in shared.state_dict().items():
        if "qkv" in name:
            q, k, v = value.split([24, 6 * groups, 6 * groups])
            k, v = (
                t.unflatten(0, (groups, 6)).repeat_interleave(4 // groups, 0).flatten(0, 1) for t in (k, v)
            )
            state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(shared(volumes()).logits, full(volumes()).logits)
        torch.testing.assert_close(shared.attention_maps(volumes()), full.attention_maps(volumes()))


def test_rotary_attention_knows_distances_and_the_token_without_a_place_knows_places():
    block = EncoderBlock(ViT3DConfig(**SMALL | {"token_positions": "rotary"})).eval()
    with torch.no_grad():
        block.qkv.weight.mul_(6)
        x = torch.randn(1, 1, 24).expand(1, 8, 24)  # equal tokens: only places tell them apart
        places = torch.arange(7)[:, None].expand(7, 3)
        here, there = (
            torch.nn.functional.pad(rotary_angles(places + shift, 6), (0, 0, 1, 0)) for shift in (0, 5)
        )
        maps = [block.attention_map(x, None, angles)[0] for angles in (here, there)]
    score = [m[:, 1:, 1:].log() for m in maps]
    relative = [s - s[..., :1] for s in score]  # without what the softmax subtracts
    torch.testing.assert_close(*relative, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(maps[0][:, 0], maps[1][:, 0], atol=1e-3)
    assert not torch.allclose(maps[0][:, 1], maps[0][:, 2], atol=1e-3)


def test_rotary_has_no_table_and_knows_the_order_all_the_same():
    made, mixed = vit3d(token_positions="rotary"), volumes()
    assert "positions" not in made.state_dict() and not hasattr(made, "positions")
    mixed = torch.cat(
        [mixed[:, :, 2:4], mixed[:, :, :2], mixed[:, :, 4:]], 2
    )  # two slabs of patches exchanged
    with torch.no_grad():
        assert not torch.allclose(made(volumes()).logits, made(mixed).logits, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_options_of_vit3d_learn_are_saved_and_tell_their_weights(options, mask, tmp_path):
    made = vit3d(mask=mask, **options)
    made(volumes(), labels=torch.randn(3, 3)).loss.backward()
    for name, p in made.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    maps = made.attention_maps(volumes())
    assert maps.shape == (2, 3, 4, 1 + made.tokens, 1 + made.tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    made.save_pretrained(tmp_path)
    again = ViT3D.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(volumes()).logits, made(volumes()).logits)
    assert {k: getattr(again.config, k) for k in options} == options


def test_a_config_without_the_options_is_the_old_model(tmp_path):
    made = vit3d()
    made.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    for name in ("window", "kv_heads", "token_positions", "scales", "coarse"):
        saved.pop(name, None)
    file.write_text(json.dumps(saved))
    (tmp_path / "card.json").unlink()  # earlier versions wrote none
    with torch.no_grad():
        assert torch.equal(ViT3D.from_pretrained(tmp_path).eval()(volumes()).logits, made(volumes()).logits)


def test_the_convolutional_model_has_the_options_too():
    options = {"attention": "hilo", "kv_heads": 1, "token_positions": "rotary", "emb_dim": 24, "heads": 4}
    made = CNNViT(
        CNNViTConfig(grid=(12, 12, 12), patch=(4, 4, 4), channels=(4, 4), depth=1, mlp_dim=8, **options)
    )
    assert made(torch.randn(2, 1, 12, 12, 12)).logits.shape == (2, 10)


PARCELS = np.ones(int(np.prod(GRID)), int)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kv_heads": 3}, "kv_heads=3 with heads=4"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"kv_heads": 2.0}, "kv_heads=2.0"),
        ({"kv_heads": True}, "kv_heads=True"),
        ({"kv_heads": 8}, "a divisor of heads"),
        ({"token_positions": "sine"}, "one of learned, rotary"),
        ({"token_positions": "rotary", "heads": 6}, 'token_positions="rotary" with heads 4 wide'),
        (
            {"token_positions": "rotary", "attention": "linear"},
            'token_positions="rotary" with attention="linear"',
        ),
        ({"token_positions": "rotary", "parcels": PARCELS}, 'token_positions="rotary" with parcels'),
        ({"attention": "hilo", "parcels": PARCELS}, 'attention="hilo" with parcels'),
        ({"attention": "hilo", "heads": 1}, 'attention="hilo" with heads=1'),
        ({"window": 0}, "window=0"),
        ({"attention": "global"}, "softmax, local, linear, hilo"),
        ({"scales": "three"}, "one of one, two, fused"),
        ({"coarse": (4, 4, 4)}, r'coarse=\[4, 4, 4\] with scales="one"'),
        ({"scales": "two", "coarse": (4, 4)}, r"coarse=\[4, 4\]"),
        ({"scales": "two", "coarse": (4, 4, 0)}, r"coarse\[2\]=0"),
        ({"scales": "fused", "coarse": (4, 1, 4)}, "a larger patch"),
        ({"scales": "two", "attention": "local"}, "places of two sizes"),
        ({"scales": "two", "token_positions": "rotary"}, "places of two sizes"),
        ({"scales": "fused", "parcels": PARCELS}, 'scales="fused" with parcels'),
    ],
)
def test_wrong_options_of_vit3d_are_named(options, text):
    with pytest.raises(DataError, match=text):
        ViT3DConfig(**SMALL | options)


# ---- two sizes of patches


def test_larger_patches_are_interpolated_as_torch_does():
    made = vit3d(grid=(8, 12, 8), scales="fused")
    coarse = torch.randn(2, 24, 2, 3, 2)
    theirs = torch.nn.functional.interpolate(coarse, (4, 6, 4), mode="trilinear").flatten(2).mT
    torch.testing.assert_close(made.embedding.between @ coarse.flatten(2).mT, theirs)


def test_patches_without_brain_do_not_enter_the_mean():
    made = vit3d(scales="fused", mask=MASK, coarse=(3, 4, 2))
    torch.testing.assert_close(made.embedding.between.sum(1), torch.ones(made.tokens))
    assert (made.embedding.between >= 0).all()
    level = torch.ones(1, made.embedding.between.shape[1], 24)
    torch.testing.assert_close(made.embedding.between @ level, torch.ones(1, made.tokens, 24))


def test_two_scales_are_the_tokens_of_both_and_the_fine_ones_are_those_of_one():
    one, two = vit3d(mask=MASK), vit3d(mask=MASK, scales="two")
    big = vit3d(mask=MASK, patch=(4, 4, 4))
    assert two.tokens == one.tokens + big.tokens
    two.embedding.fine.load_state_dict(one.embedding.state_dict())
    two.embedding.coarse.load_state_dict(big.embedding.state_dict())
    voxels = torch.randn(3, int(MASK.sum()))
    joined = torch.cat([one.embedding(voxels), big.embedding(voxels)], 1)
    assert torch.equal(two.embedding(voxels), joined)
    assert np.array_equal(two.config.token_of, one.config.token_of)


def test_where_scales_agree_over_a_neighbourhood_the_weight_is_larger():
    made = vit3d(grid=(8, 12, 8), scales="fused").embedding
    fine = torch.randn(1, 96, 24)
    alike, against = (made.weight(fine, sign * fine)[0, :, 0] for sign in (1, -1))
    torch.testing.assert_close(alike, torch.ones(96).sigmoid())  # cosine 1 everywhere, slope 1, offset 0
    torch.testing.assert_close(against, (-torch.ones(96)).sigmoid())
    half = fine.clone()
    half[0, 0] *= -1  # one corner patch disagrees: of its 8 neighbours, itself among them, one does
    torch.testing.assert_close(made.weight(fine, half)[0, 0, 0], torch.tensor(6 / 8).sigmoid())
    torch.testing.assert_close(made.weight(fine, half)[0, -1, 0], torch.tensor(1.0).sigmoid())
    with torch.no_grad():
        made.offset.fill_(50.0)  # all weight on the smaller patches
        voxels = torch.randn(2, 768)
        torch.testing.assert_close(made(voxels), made.fine(voxels))


def test_the_convolutional_model_has_one_scale():
    with pytest.raises(DataError, match='scales="two" in a convolutional model'):
        CNNViTConfig(grid=(12, 12, 12), patch=(4, 4, 4), channels=(4, 4), scales="two")


# ---- options of V1T


def test_v1t_without_options_is_unchanged():
    plain, named = v1t(), v1t(kv_heads=4, token_positions="learned")
    assert plain.state_dict().keys() == named.state_dict().keys()
    assert plain.core.blocks[0].mha.to_qkv.weight.shape == (3 * 4 * 9, 9)
    with torch.no_grad():
        assert torch.equal(plain(images()).logits, named(images()).logits)
    assert plain.to_published().keys() == named.to_published().keys()


@pytest.mark.parametrize("local", [False, True])
def test_v1t_shares_heads_as_repeated_keys(local):
    torch.manual_seed(0)
    shared, full = Attention(8, 4, local=local, kv_heads=2).eval(), Attention(8, 4, local=local).eval()
    with torch.no_grad():
        shared.to_qkv.weight.normal_()
        q, k, v = shared.to_qkv.weight.split([32, 16, 16])
        k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
        full.load_state_dict(shared.state_dict() | {"to_qkv.weight": torch.cat([q, k, v])})
        x = torch.randn(2, 7, 8)
        torch.testing.assert_close(shared(x), full(x))
        torch.testing.assert_close(shared.attention_map(x), full.attention_map(x))


@pytest.mark.parametrize("options", V1T_OPTIONS)
def test_options_of_v1t_learn_are_saved_and_are_not_published(options, tmp_path):
    made = v1t(**options)
    made.train()(images(), labels=torch.rand(3, 5)).loss.backward()
    for name, p in made.core.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    made.eval().save_pretrained(tmp_path)
    again = V1T.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(images()).logits, made(images()).logits)
        maps = made.attention_maps(images())
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    with pytest.raises(DataError, match="the published code has neither"):
        made.to_published()
    own = V1T.from_published(tmp_path).eval()  # our own files, by our names
    with torch.no_grad():
        assert torch.equal(own(images()).logits, made(images()).logits)


def test_rotary_v1t_has_no_table_and_sees_the_order():
    made = v1t(token_positions="rotary")
    assert made.core.patch_embedding.pos_embedding is None
    assert "core.patch_embedding.pos_embedding" not in made.state_dict()
    tokens = torch.randn(1, 1, 9).expand(1, 1 + 4 * 6, 9)
    maps = [made.core.blocks[0].mha.attention_map(tokens, a) for a in (None, made.core._angles(tokens))]
    assert (maps[0] - maps[0].mean()).abs().max() < 1e-6 < 1e-3 < (maps[1] - maps[1].mean()).abs().max()


def test_checkpointing_changes_nothing_with_rotary_positions():
    made, losses = v1t(token_positions="rotary", kv_heads=2, dropout=0.0, patch_dropout=0.0).train(), []
    for on in (False, True):
        made.core.gradient_checkpointing = on
        made.zero_grad()
        torch.manual_seed(0)  # reading points are drawn while training
        loss = made(images(), labels=torch.ones(3, 5)).loss
        loss.backward()
        losses.append((loss.detach(), made.core.blocks[0].mha.to_qkv.weight.grad.clone()))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kv_heads": 3}, "kv_heads=3 with heads=4"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"kv_heads": 1.0}, "kv_heads=1.0"),
        ({"token_positions": "sine"}, "token_positions='sine'"),
        ({"token_positions": "rotary", "emb_dim": 3}, 'token_positions="rotary" with emb_dim=3'),
    ],
)
def test_wrong_options_of_v1t_are_named(options, text):
    with pytest.raises(DataError, match=text):
        V1TConfig(neurons={"A": 3}, **options)
