"""V1T: parity with the published code, its checkpoints, every named option, rollout, and the contract of the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cortexlit.core import DataError, rng
from cortexlit.models import v1t
from cortexlit.models.losses import LOSSES
from cortexlit.models.v1t import (
    BEHAVIORS,
    PATCHES,
    SHIFTS,
    V1T,
    Attention,
    V1TConfig,
    attention,
    attention_centre,
    published_v1t_config,
    rollout,
    seen_part,
)
from cortexlit.training.trainer import fit, predict

pytestmark = pytest.mark.usefixtures("no_curves")

FIXTURES = {
    kind: Path(__file__).parent / "fixtures" / f"v1t_tiny_{kind}.safetensors"
    for kind in ("plain", "behavior3")
}


@pytest.fixture(scope="module", params=FIXTURES)
def published(request) -> dict:
    "Weights, inputs, outputs and gradients of the published code at small sizes, and its options."
    path = FIXTURES[request.param]
    parts = {"state": {}, "in": {}, "out": {}, "grad": {}}
    for name, value in load_file(path).items():
        part, rest = name.split(".", 1)
        parts[part][rest] = value
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    same = (
        "patch_size",
        "patch_stride",
        "num_blocks",
        "num_heads",
        "emb_dim",
        "mlp_dim",
        "behavior_mode",
        "shift_mode",
    )
    args = {name: sizes[name] for name in same}
    args |= {"core": "vit", "readout": "gaussian2d", "patch_mode": 0, "use_lsa": False, "disable_bias": False}
    args |= {
        "p_dropout": 0.0229,
        "t_dropout": 0.2544,
        "drop_path": 0.0,
        "center_crop": 1.0,
        "resize_image": 0,
    }
    args |= {
        "grid_predictor_dim": 2,
        "disable_grid_predictor": False,
        "bias_mode": 0,
        "output_dir": "runs/v1t",
    }
    args |= {"input_shape": [1, sizes["height"], sizes["width"]], "output_shapes": {"A": [sizes["neurons"]]}}
    return parts | {"args": args, "config": published_v1t_config(args), "kind": request.param}


def inputs(published: dict) -> tuple[torch.Tensor, ...]:
    return tuple(published["in"][name] for name in ("image", "behavior", "pupil_center"))


def theirs(name: str) -> str:
    "The published name of a weight."
    return next(iter(v1t._published({name: torch.zeros(())})))


def tiny(**options) -> V1TConfig:
    "Options of a model that takes milliseconds."
    small = {"neurons": {"A": 5}, "size": (10, 14), "patch": 4, "stride": 2, "emb_dim": 8, "heads": 2}
    return V1TConfig(**(small | {"mlp_dim": 12, "depth": 2} | options))


def tiny_model(seed: int = 0, **options) -> V1T:
    torch.manual_seed(seed)
    model = V1T(tiny(**options)).eval()
    with torch.no_grad():
        for part in (
            model.core,
            model.behaviors,
        ):  # as if trained: attention is not uniform, behaviour matters
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0, module.in_features**-0.5)
        for mouse, neurons in model.config.neurons.items():
            if model.config.positions == "predicted":
                model.set_coordinates(mouse, torch.randn(neurons, 3))
            model.readouts[mouse].features.normal_()
    return model


def tiny_batch(config: V1TConfig, batch: int = 3, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    fields = {"image": torch.randn(batch, 1, *config.size, generator=g)}
    fields |= {"behavior": torch.randn(batch, config.behavior_channels, generator=g)}
    return fields | {"pupil_center": torch.randn(batch, config.pupil_channels, generator=g)}


VARIANTS = [{"behavior": behavior, "shift": shift} for behavior in BEHAVIORS for shift in SHIFTS]
VARIANTS += [
    {"patch_mode": mode, "behavior": behavior} for mode in PATCHES for behavior in ("none", "channels")
]
VARIANTS += [{"local_attention": True}, {"positions": "free"}, {"crop": 0.8, "shift": "both"}]
VARIANTS += [
    {"size": (20, 28), "resize": (10, 14)},
    {"crop": 0.7, "shift": "image", "image_sampling": "bilinear"},
]


# ---------------------------------------------------------------- parity with the published code


def test_every_output_equals_the_published_code(published):
    model = V1T.from_published(published["state"], published["config"])
    close = {"atol": 1e-5, "rtol": 0}
    with torch.no_grad():
        torch.testing.assert_close(model.encode(*inputs(published)), published["out"]["core"], **close)
        torch.testing.assert_close(model(*inputs(published)).logits, published["out"]["response"], **close)


def test_every_gradient_equals_the_published_code(published):
    model = V1T.from_published(published["state"], published["config"])
    loss = model(*inputs(published)).logits.square().mean()
    torch.testing.assert_close(loss, published["out"]["loss"][0], atol=1e-5, rtol=0)
    loss.backward()
    seen = set()
    for name, parameter in model.named_parameters():
        expected = published["grad"][theirs(name)].reshape(parameter.shape)
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        seen.add(theirs(name))
    assert seen == set(published["grad"])


def test_coordinates_are_standardised_as_published(published):
    model = V1T(published["config"])
    model.set_coordinates(None, published["in"]["coordinates"])
    torch.testing.assert_close(model.readouts["A"].source_grid, published["state"]["readouts.A.source_grid"])


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        model = V1T(V1TConfig(behavior="none", shift="none"))
        full = V1T(V1TConfig())

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert model.config.grid == (29, 57)
    assert count(model.core.patch_embedding.projection) == 10_075
    assert count(model.core.patch_embedding) == 266_600
    assert [count(block.mha) for block in model.core.blocks] == [384_865] * 4
    assert [count(block.mlp) for block in model.core.blocks] == [152_233] * 4
    assert count(model.readouts["A"]) == 27_992 == 27_840 + count(model.readouts["A"].mu_transform)
    assert count(model.readouts["A"].mu_transform) == 152
    assert count(model) == 2_442_984
    assert count(full) == 2_442_984 + 4 * (5 * 77 + 77 + 77 * 155 + 155) + 57


# ---------------------------------------------------------------- published checkpoints


def test_published_layout_is_written_back_exactly(published):
    model = V1T.from_published(published["state"], published["config"])
    written = model.to_published()
    assert written.keys() == published["state"].keys()
    for name, value in published["state"].items():
        torch.testing.assert_close(written[name], value, atol=1e-6, rtol=0)
    written["readouts.A.bias"] += 1  # a copy, not the model's own memory
    assert torch.equal(model.readouts["A"].bias, published["state"]["readouts.A.bias"])


def test_every_form_of_source_gives_the_same_model(published, tmp_path):
    def same(model):
        assert not model.training
        with torch.no_grad():
            got = model(*inputs(published)).logits
        torch.testing.assert_close(got, published["out"]["response"], atol=1e-5, rtol=0)

    run = tmp_path / "run"
    (run / "ckpt").mkdir(parents=True)
    (run / "args.yaml").write_text(yaml.safe_dump(published["args"]))
    checkpoint = {
        "epoch": 7,
        "value": 0.4,
        "model": published["state"],
        "scheduler": {"best_value": np.float64(0.4)},
    }
    torch.save(checkpoint, run / "ckpt" / "model_state.pt")
    same(V1T.from_published(run))
    same(V1T.from_published(run / "ckpt" / "model_state.pt"))  # options from the weights
    same(V1T.from_published(published["state"]))
    constants = v1t._published_constants(published["config"])
    bare = {name: value for name, value in published["state"].items() if name not in constants}
    same(V1T.from_published(bare, published["config"]))
    same(V1T.from_published({"model": {f"_orig_mod.{k}": v for k, v in bare.items()}}, published["config"]))
    V1T.from_published(run).save_pretrained(tmp_path / "ours")
    same(V1T.from_published(tmp_path / "ours"))
    same(V1T.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_survives_the_published_layout(options):
    model = tiny_model(**options)
    state = model.to_published()
    again = V1T.from_published(state, model.config)
    batch = tiny_batch(model.config)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        ours = V1T.from_published(model.state_dict(), model.config)  # under our names
        assert torch.equal(ours(**batch).logits, expected)
    if options.get("resize") or options.get("image_sampling") or options.get("local_attention"):
        return  # cannot be seen, or not at this size
    seen = v1t._visible_config(state)
    assert seen.normalisation is None  # nobody is told by weights
    unseen = ("patch_dropout", "dropout", "loss", "transformers_version", "normalisation")
    assert {k: v for k, v in seen.to_dict().items() if k not in unseen} == {
        k: v for k, v in model.config.to_dict().items() if k not in unseen
    }


def test_local_attention_is_seen_in_the_weights():
    model = tiny_model(local_attention=True)
    state = model.to_published()
    seen = v1t._visible_config(state)
    assert seen.normalisation is None  # nobody is told by weights
    assert seen.local_attention and seen.depth == 2 and seen.heads == 2
    tokens = 1 + np.prod(model.config.grid)
    assert state["core.transformer.blocks.1.mha.mask"].tolist() == [[i, i] for i in range(tokens)]
    assert state["core.transformer.blocks.1.mha.scale"].shape == (2,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("core.transformer.blocks.1.mlp.model.4.bias"),
            "1 missing: core.transformer.blocks.1.mlp.model.4.bias",
        ),
        (lambda s: s.pop("core.patch_embedding.cls_token"), "1 missing: core.patch_embedding.cls_token"),
        (lambda s: s.update({"core.register": torch.zeros(3)}), "1 unexpected: core.register"),
        (lambda s: s.update({"readouts.B.bias": torch.zeros(3)}), "unexpected: readouts.B.bias"),
        (lambda s: s.update({"readouts.A.bias": torch.zeros(8)}), r"readouts.A.bias \[8\] instead of \[9\]"),
        (lambda s: s.update({"core.transformer.blocks.0.mha.scale": torch.tensor(0.5)}), "heads of width 4"),
    ],
)
def test_what_does_not_fit_is_named(published, change, words):
    state = dict(published["state"])
    change(state)
    with pytest.raises(DataError, match=words):
        V1T.from_published(state, published["config"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("core", "stn"), ("core", "cct"), ("core", "conv"), ("core", "stacked2d"), ("readout", "dense")]
    + [
        ("grid_predictor_dim", 3),
        ("disable_bias", True),
        ("patch_mode", 4),
        ("behavior_mode", 5),
        ("shift_mode", 7),
    ],
)
def test_published_options_without_counterpart_are_refused(published, name, value):
    with pytest.raises(DataError, match=f"{name} is {value!r}"):
        published_v1t_config(published["args"] | {name: value})


def test_published_numbers_get_their_names(published):
    for number, name in enumerate(("unfold", "convolution", "shifted", "normalised")):
        assert published_v1t_config(published["args"] | {"patch_mode": number}).patch_mode == name
    for number, name in enumerate(("none", "channels", "block-mlp", "block-mlp+pupil", "per-mouse")):
        assert published_v1t_config(published["args"] | {"behavior_mode": number}).behavior == name
    for number, name in enumerate(("none", "image", "core", "both", "both+behavior")):
        assert published_v1t_config(published["args"] | {"shift_mode": number}).shift == name
    whole = published["args"] | {"input_shape": [1, 144, 256], "resize_image": 1}
    assert published_v1t_config(whole).grid == (29, 57) and published_v1t_config(whole).resize == [36, 64]
    assert published_v1t_config(whole | {"ds_name": "franke2022"}).resize is None
    assert published_v1t_config(whole | {"resize_image": 0}).grid == (137, 249)
    fed = ["pupil_area", "pupil_area_change", "running"]
    assert published_v1t_config({}).to_dict() == V1TConfig(channels=fed).to_dict()


def test_core_only_starts_fresh_heads_for_new_neurons(published, tmp_path):
    config = published["config"]
    xy = np.random.default_rng(0).normal(size=(7, 3)) * 100
    torch.manual_seed(0)
    model = V1T.from_published(published["state"], config, mice={"new": xy}, core_only=True)
    assert model.config.neurons == {"new": 7} and list(model.readouts) == ["new"]
    with torch.no_grad():
        core = model.encode(*inputs(published))
        torch.testing.assert_close(core, published["out"]["core"], atol=1e-5, rtol=0)
    assert (model.readouts["new"].bias == 0).all()
    model.save_core(tmp_path / "core")
    names = load_file(tmp_path / "core" / "model.safetensors")
    assert all(name.startswith("core.") for name in names)
    again = V1T.from_published(tmp_path / "core", core_only=True, mice={"C": xy}, loss="mse")
    assert torch.equal(again.encode(*inputs(published)), core) and again.config.loss == "mse"
    with pytest.raises(DataError, match="missing: core.patch"):
        heads = {k: v for k, v in published["state"].items() if k.startswith("readouts")}
        V1T.from_published(heads, config, mice={"new": xy}, core_only=True)


@pytest.mark.parametrize("behavior", ["block-mlp+pupil", "per-mouse"])
def test_some_of_the_mice_can_be_kept(behavior):
    model = tiny_model(neurons={"A": 5, "B": 7, "C": 3}, behavior=behavior, shift="both", crop=0.8)
    kept = V1T.from_published(model.to_published(), model.config, mice=["C", "A"])
    assert set(kept.readouts) == set(kept.shifters) == set(kept.image_shifters) == {"A", "C"}
    batch = tiny_batch(model.config)
    assert torch.equal(kept(**batch, mouse_id="C").logits, model(**batch, mouse_id="C").logits)
    names = kept.to_published().keys()
    assert not any(".B." in name for name in names)


# ---------------------------------------------------------------- patches, attention, behaviour, eye


def test_convolution_is_unfold_with_its_weights():
    model, other = tiny_model(behavior="none"), tiny_model(1, behavior="none", patch_mode="convolution")
    state = model.state_dict()
    state["core.patch_embedding.projection.0.weight"] = state.pop(
        "core.patch_embedding.projection.2.weight"
    ).view(8, 1, 4, 4)
    state["core.patch_embedding.projection.0.bias"] = state.pop("core.patch_embedding.projection.2.bias")
    other.load_state_dict(state)
    batch = tiny_batch(model.config)
    torch.testing.assert_close(other(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_shifted_patches_by_hand():
    config = tiny(patch_mode="shifted", behavior="none")
    torch.manual_seed(0)
    projection = v1t._projection(config)
    image = torch.randn(1, 1, *config.size)
    wide = F.pad(image[0, 0], [2] * 4)

    def cut(dy, dx):  # the patch in row 1, column 2 of an image moved by dy, dx
        return wide[2 + 2 - dy :, 2 + 4 - dx :][:4, :4].flatten()

    values = torch.cat([cut(dy, dx) for dy, dx in ((0, 0), (2, 2), (2, -2), (-2, 2), (-2, -2))])
    expected = projection[4](projection[3](values))
    h, w = config.grid
    torch.testing.assert_close(projection(image)[0, w + 2], expected, atol=1e-5, rtol=1e-5)


def test_normalised_patches_ignore_brightness_and_contrast():
    model = tiny_model(patch_mode="normalised", behavior="none")
    image = tiny_batch(model.config)["image"]
    torch.testing.assert_close(
        model.core.patch_embedding(image), model.core.patch_embedding(3 * image + 2), atol=1e-3, rtol=1e-3
    )


def written_out(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    "The layer with an explicit softmax, as in the published code."
    qkv = layer.to_qkv(layer.layer_norm(x)).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in qkv)
    scale = x.shape[-1] ** -0.5 if layer.scale is None else layer.scale[:, None, None]
    scores = q @ k.mT * scale
    if layer.scale is not None:
        index = torch.arange(x.shape[1])
        scores[:, :, index, index] = -torch.finfo(x.dtype).max
    weights = scores.softmax(-1)
    return layer.projection((weights @ v).transpose(1, 2).flatten(-2)), weights


@pytest.mark.parametrize("local", [False, True])
def test_attention_is_the_written_out_one_with_its_gradients(local):
    torch.manual_seed(0)
    layer = Attention(10, 3, dropout=0.3, local=local).eval()
    with torch.no_grad():
        layer.to_qkv.weight.normal_()
        if local:
            layer.scale.copy_(torch.tensor([0.1, 0.4, 0.9]))
    x = torch.randn(2, 9, 10)
    expected, weights = written_out(layer, x)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.attention_map(x), weights, atol=1e-6, rtol=1e-5)
    again = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
    for got, want in zip(again, gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    if local:
        assert (layer.attention_map(x).diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("local", [False, True])
def test_dropped_weights_are_the_same_in_the_second_pass(local):
    "Weights and what is dropped of them are computed again: the gradient belongs to the forward pass."
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = [attention(q, k, v, 0.4, local)]
    state = torch.manual_seed(5).get_state()

    def run(*inputs):
        torch.set_rng_state(state)
        return attention(*inputs, 0.4, local)

    assert torch.autograd.gradcheck(run, (q, k, v))
    many = torch.stack([attention(q, k, v, 0.4, local).detach() for _ in range(500)]).mean(0)
    mask = ~torch.eye(5, dtype=torch.bool) if local else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (many - expected).abs().max() < 0.2 and (out[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize("local", [False, True])
def test_strips_of_any_size_give_the_same(rows, local, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(3, 2, 10, 4).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    mask = ~torch.eye(10, dtype=torch.bool) if local else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    pull = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), pull)
    monkeypatch.setattr(v1t, "STRIP", rows * 10)
    found = v1t._StripAttention.apply(q, k, v, 0.0, local)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), pull), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.2544, 0.9])
def test_the_right_share_is_dropped_everywhere(dropout):
    draw = torch.Generator().manual_seed(0)
    kept = v1t._kept(torch.empty(301, 999), dropout, draw)
    assert set(kept.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / (1 - dropout))}
    assert float((kept == 0).float().mean()) == pytest.approx(dropout, abs=0.004)
    for axis in (0, 1):  # no row, column or position in a draw is special
        assert float((kept == 0).float().mean(axis).sub(dropout).abs().max()) < 0.16
    quarters = (kept.flatten()[: 301 * 999 // 4 * 4].view(-1, 4) == 0).float()
    assert (quarters.mean(0) - dropout).abs().max() < 0.01
    if dropout:
        assert np.abs(np.corrcoef(quarters.T.numpy()) - np.eye(4)).max() < 0.02
    assert not torch.equal(kept, v1t._kept(kept, dropout, draw)) or not dropout


def test_threads_do_not_change_what_is_dropped():
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 12, 4, requires_grad=True) for _ in range(3))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            torch.manual_seed(3)
            out = attention(q, k, v, 0.5)
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    torch.manual_seed(4)
    assert not torch.allclose(attention(q, k, v, 0.5), found[0][0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bfloat16_is_close_to_float32(dropout):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 20, 8) for _ in range(3))
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*given, dropout)
        outs.append((out, *torch.autograd.grad(out.sum(), given)))
        assert out.dtype == dtype
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(b.float(), a, atol=0.05, rtol=0.05)


def test_padded_heads_change_nothing():
    "What is done for GPUs: zeros behind each head."
    q, k, v = (torch.randn(2, 3, 7, 13) for _ in range(3))
    padded = [v1t._padded(x) for x in (q, k, v)]
    assert padded[0].shape[-1] == 16 and v1t._padded(padded[0]).shape[-1] == 16
    found = F.scaled_dot_product_attention(*padded, scale=13**-0.5)[..., :13]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_inputs_matter_exactly_where_the_options_say(options):
    model = tiny_model(**options)
    c, batch = model.config, tiny_batch(model.config)
    with torch.no_grad():
        base = model(**batch).logits
        changed = {
            name: (model(**(batch | {name: batch[name].roll(1, 0)})).logits - base).abs().max() > 1e-6
            for name in batch
        }
    moves = c.shift in ("image", "both", "both+behavior") and c.crop < 1 and c.image_sampling == "bilinear"
    pupil = (
        c.behavior in ("block-mlp+pupil", "per-mouse")
        or c.shift in ("core", "both", "both+behavior")
        or moves
    )
    assert changed["image"]
    assert changed["behavior"] == (c.behavior != "none")
    if not (c.shift in ("image", "both") and c.crop < 1):
        assert changed["pupil_center"] == pupil
    needed = {"image": batch["image"]}
    needed |= {"behavior": batch["behavior"]} if c.behavior != "none" or c.shift == "both+behavior" else {}
    needed |= {"pupil_center": batch["pupil_center"]} if pupil or c.shift != "none" else {}
    with torch.no_grad():
        assert torch.equal(model(**needed).logits, base)
    for name in needed:
        if name != "image":
            with pytest.raises(DataError, match=f"{name} was not given"):
                model(**{k: v for k, v in needed.items() if k != name})


def test_per_mouse_networks_belong_to_the_head():
    model = tiny_model(neurons={"A": 5, "B": 5}, behavior="per-mouse", shift="none")
    model.freeze_core().train()
    assert all(p.requires_grad for p in model.behaviors.parameters())
    batch = tiny_batch(model.config)
    a, b = (model.encode(**batch, mouse_id=mouse) for mouse in "AB")
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(DataError, match="mouse_id=None"):
        model.encode(**batch)


def test_the_seen_part_moves_with_the_gaze():
    image = torch.arange(99.0).view(1, 1, 9, 11).expand(2, -1, -1, -1)
    gaze = torch.tensor(
        [[0.2, 0.0], [0.0, -0.25]]
    )  # 0.2 of half of 10 columns: one column; a quarter of 8 / 2: one row
    part = seen_part(image, 0.6, gaze)
    middle = seen_part(image, 0.6)
    assert part.shape == (2, 1, 5, 6)
    torch.testing.assert_close(part[0], middle[0] + 1)
    torch.testing.assert_close(part[1], middle[1] - 11)
    assert torch.equal(seen_part(image, 1.0, torch.zeros(2, 2)), image)
    assert (seen_part(image, 1.0, torch.tensor([[1.0, 0.0]] * 2))[..., -1] == 0).all()  # beyond the edge


@pytest.mark.parametrize(("sampling", "learns"), [("nearest", False), ("bilinear", True)])
def test_only_bilinear_sampling_lets_the_image_shifter_learn(sampling, learns):
    model = tiny_model(shift="image", crop=0.7, behavior="none", image_sampling=sampling)
    model(**tiny_batch(model.config)).logits.square().sum().backward()
    gradient = max(float(p.grad.abs().max()) for p in model.image_shifters.parameters())
    assert (gradient > 0) == learns


def test_the_eye_moves_the_reading_points():
    model = tiny_model(shift="core", behavior="none", positions="free")
    pupil = torch.randn(2, 2)
    points = model.reading_points(pupil)
    shift = model.shifters["A"](pupil[..., None])[..., 0]
    torch.testing.assert_close(points, model.readouts["A"].positions()[None] + shift[:, None])
    features = torch.randn(2, 8, *model.config.grid)
    sampled = F.grid_sample(features, points[:, :, None], align_corners=True)[..., 0]  # (B, C, N)
    expected = torch.einsum("bcn,cn->bn", sampled, model.readouts["A"].features[0]) + model.readouts["A"].bias
    torch.testing.assert_close(model.read(features, pupil), expected, atol=1e-5, rtol=1e-5)


def test_the_grid_is_carried_not_guessed():
    for size in ((10, 14), (14, 10), (6, 22)):
        model = tiny_model(size=size, depth=0, behavior="none", shift="none")
        h, w = model.config.grid
        image = tiny_batch(model.config)["image"]
        tokens = model.core.patch_embedding(image)
        assert torch.equal(model.encode(image)[0, :, h - 1, 1], tokens[0, 1 + (h - 1) * w + 1])


# ---------------------------------------------------------------- loss, score, training


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_over_images_and_neurons(name):
    model = tiny_model(loss=name)
    batch = tiny_batch(model.config, batch=6)
    labels = torch.rand(6, 5, generator=torch.Generator().manual_seed(3))
    out = model(**batch, labels=labels)
    p, y = out.logits.detach().double().numpy(), labels.double().numpy()
    r = np.mean([np.corrcoef(p[:, n], y[:, n])[0, 1] for n in range(5)])
    rate = (p - y * np.log(p + 1e-8)).mean()
    expected = {"mse": ((p - y) ** 2).mean(), "poisson": rate, "correlation": 1 - r}
    expected["poisson_correlation"] = rate + 1000 / 6 * (1 - r)
    assert out.loss.item() == pytest.approx(expected[name], rel=1e-4)


def test_the_score_is_the_mean_correlation_over_images():
    draw = np.random.default_rng(0)
    p, y = draw.normal(size=(20, 4)), draw.normal(size=(20, 4))
    expected = np.mean([np.corrcoef(p[:, n], y[:, n])[0, 1] for n in range(4)])
    assert V1T.correlation(p, y) == pytest.approx(expected)
    y[:, 2], p[:, 3] = 1.0, 7.0  # a constant label counts for nothing, a constant prediction scores 0
    expected = np.sum([np.corrcoef(p[:, n], y[:, n])[0, 1] for n in range(2)]) / 3
    assert tiny_model().correlation(p.astype(np.float32), y.astype(np.float32)) == pytest.approx(
        expected, abs=1e-5
    )
    assert np.isnan(V1T.correlation(np.zeros((5, 2)), np.ones((5, 2))))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_trains_every_parameter(options):
    model = tiny_model(**options).train()
    batch = tiny_batch(model.config, batch=4)
    model(**batch, labels=torch.rand(4, 5)).loss.backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    if model.config.image_sampling == "nearest" or model.config.crop == 1:
        still = {name for name in still if not name.startswith("image_shifters")}
    assert not still, still


def test_a_few_steps_lower_the_loss():
    model = tiny_model(patch_dropout=0.0, dropout=0.1).train()
    batch = tiny_batch(model.config, batch=8)
    labels = torch.rand(8, 5)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05


def test_checkpointing_changes_nothing_but_memory():
    model = tiny_model(dropout=0.3).train()
    batch, labels = tiny_batch(model.config), torch.rand(3, 5)

    def gradients():
        torch.manual_seed(7)
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    model.gradient_checkpointing_enable()
    assert model.core.gradient_checkpointing
    for a, b in zip(before, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_frozen_core_is_silent_and_its_map_can_be_given():
    model = tiny_model(dropout=0.5, patch_dropout=0.5)
    model.freeze_core().train()
    assert not model.core.training and model.readouts["A"].training
    batch = tiny_batch(model.config)
    features = model.encode(**batch)
    assert torch.equal(features, model.encode(**batch)) and not features.requires_grad
    model.eval()
    assert torch.equal(
        model(features=features, pupil_center=batch["pupil_center"]).logits, model(**batch).logits
    )


def test_adding_a_mouse_leaves_the_others_alone():
    model = tiny_model()
    batch = tiny_batch(model.config)
    before = model(**batch).logits
    mean = torch.tensor([0.2, 0.7, 3.0])
    model.add_mouse("B", 3, torch.randn(3, 2), mean_response=mean)
    assert torch.equal(model(**batch, mouse_id="A").logits, before)
    assert model.config.neurons == {"A": 5, "B": 3}
    with torch.no_grad():
        model.readouts["B"].features.zero_()
        torch.testing.assert_close(model(**batch, mouse_id="B").logits, mean.expand(3, -1))
    for wrong in (
        {"mouse_id": "A", "n_neurons": 2},
        {"mouse_id": "share", "n_neurons": 2},
        {"mouse_id": "C", "n_neurons": 2},
    ):
        with pytest.raises(DataError):
            model.add_mouse(**wrong)
    assert model.config.neurons == {"A": 5, "B": 3}


def test_fresh_heads_start_as_published():
    model = V1T(tiny(positions="free"))
    assert 0.05 < model.readouts["A"].sigma.abs().max() <= 0.1
    assert 0.1 < model.readouts["A"]._mu.abs().max() <= 0.3
    assert (model.readouts["A"].features == 1 / 8).all()


# ---------------------------------------------------------------- where it looks


def test_rollout_of_known_maps():
    n, eye = 5, torch.eye(5)
    uniform = torch.full((n, n), 1 / n)
    still = rollout(eye.expand(3, 2, 4, n, n))
    torch.testing.assert_close(still, eye.expand(2, n, n))
    one = rollout(uniform.expand(1, 1, 1, n, n))[0]
    torch.testing.assert_close(one, (uniform + eye) / 2)
    turn = eye.roll(1, 1)  # each token looks at the next one: the binomial distribution after three blocks
    three = rollout(turn.expand(3, 1, 1, n, n))[0]
    torch.testing.assert_close(three[0], torch.tensor([1, 3, 3, 1, 0]) / 8)


def test_order_of_the_blocks_and_fusion_of_heads():
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 2, 4, 6, 6, generator=g).softmax(-1)
    for fuse, reduce in (("max", lambda a: a.max(1)), ("mean", lambda a: a.mean(1))):
        layers = [reduce(a) + np.eye(6) for a in maps.double().numpy()]
        layers = [a / a.sum(-1, keepdims=True) for a in layers]
        expected = layers[2] @ layers[1] @ layers[0]
        found = rollout(maps, fuse)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(found.sum(-1).numpy(), 1, atol=1e-5)
    with pytest.raises(DataError, match="fuse='min'"):
        rollout(maps, "min")
    with pytest.raises(DataError, match="attention maps of shape"):
        rollout(maps[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_attention": True},
        {"behavior": "per-mouse", "shift": "both"},
        {"behavior": "none", "shift": "none"},
    ],
)
def test_attention_maps_are_the_weights_in_use(options):
    model = tiny_model(**options)
    batch = tiny_batch(model.config)
    inside = []
    hooks = [
        b.mha.register_forward_pre_hook(lambda m, x: inside.append(m.attention_map(x[0])))
        for b in model.core.blocks
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    maps = model.attention_maps(**batch)
    tokens = 1 + np.prod(model.config.grid)
    assert maps.shape == (2, 3, 2, tokens, tokens) and not maps.requires_grad
    torch.testing.assert_close(maps, torch.stack(inside))
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_rollout_of_a_token_and_of_neurons():
    model = tiny_model(positions="free")
    batch = tiny_batch(model.config)
    h, w = model.config.grid
    joint = rollout(model.attention_maps(**batch))
    seen = model.attention_rollout(**batch)
    assert seen.shape == (3, h, w)
    expected = joint[:, 0, 1:] / joint[:, 0, 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(seen.flatten(1), expected)
    with torch.no_grad():  # the second neuron reads exactly at row 1, column 2
        shift = model.shifters["A"](batch["pupil_center"][..., None])[..., 0]
        target = torch.tensor([2 * 2 / (w - 1) - 1, 2 * 1 / (h - 1) - 1])
        model.readouts["A"]._mu[0, 1, 0] = target - shift[0]
    per_neuron = model.attention_rollout(**batch, of="neurons")
    assert per_neuron.shape == (3, 5, h, w)
    torch.testing.assert_close(per_neuron.sum((-2, -1)), torch.ones(3, 5))
    row = joint[0, 1 + w + 2, 1:]
    torch.testing.assert_close(per_neuron[0, 1].flatten(), row / row.sum(), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="of='pixels'"):
        model.attention_rollout(**batch, of="pixels")


def test_centre_of_attention_in_pixels():
    config = tiny(behavior="none")  # patches of 4, 2 apart: centres at 1.5, 3.5, ...
    maps = torch.zeros(2, *config.grid)
    maps[0, 1, 2] = 3.0
    maps[1, 0, 0] = maps[1, 3, 5] = 0.5
    expected = torch.tensor([[1.5 + 4, 1.5 + 2], [1.5 + 5, 1.5 + 3]])
    torch.testing.assert_close(attention_centre(maps, config), expected)


def test_no_response_depends_on_where_cls_ends_up():
    model = tiny_model()
    batch = tiny_batch(model.config)
    last = []
    model.core.blocks[-1].register_forward_hook(lambda m, x, y: last.append(y) or y.retain_grad())
    model(**batch).logits.sum().backward()
    assert (last[0].grad[:, 0] == 0).all() and (last[0].grad[:, 1:] != 0).any()


# ---------------------------------------------------------------- options and inputs that cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (10,)}, "2 whole numbers"),
        ({"size": (10, 14.0)}, r"size\[1\]=14.0"),
        ({"resize": (0, 3)}, r"resize\[0\]=0"),
        ({"patch": 11}, "patches of 11 pixels"),
        ({"patch": 9, "crop": 0.8}, "patches of 9 pixels"),
        ({"patch": True}, "patch=True"),
        ({"stride": 0}, "stride=0"),
        ({"emb_dim": 1}, "2 or more"),
        ({"crop": 0.0}, "crop=0.0"),
        ({"crop": 1.1}, "crop=1.1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"patch_mode": 0}, "'unfold', 'convolution'"),
        ({"behavior": "mlp"}, "'block-mlp'"),
        ({"shift": "eye"}, "'both\\+behavior'"),
        ({"output": "relu"}, "output='relu'"),
        ({"loss": "huber"}, "loss='huber'"),
        ({"image_sampling": "cubic"}, "image_sampling='cubic'"),
        ({"neurons": {"A": 0}}, "neurons"),
        ({"neurons": {"a.b": 3}}, "without dots"),
        ({"neurons": {"keys": 3}}, "method name"),
        ({"neurons": {"share": 3}}, "another name"),
        ({"pupil_channels": 0}, "pupil_channels=0"),
        ({"pupil_channels": 0, "shift": "none"}, "never fill in dummies"),
        ({"behavior_channels": 0, "behavior": "block-mlp"}, "behavior_channels=0"),
        ({"behavior_channels": 0, "behavior": "none", "shift": "both+behavior"}, "behavior_channels=0"),
        ({"pupil_channels": 3}, "pupil_channels=3"),
        ({"emb_dims": 9}, "perhaps emb_dim"),
    ],
)
def test_options_no_model_can_be_built_from(options, words):
    with pytest.raises(DataError, match=words):
        tiny(**options)


@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_sessions_without_pupil_or_behaviour(behavior):
    if behavior != "block-mlp+pupil":
        channels = 0 if behavior == "none" else 1
        model = tiny_model(behavior=behavior, behavior_channels=channels, pupil_channels=0, shift="none")
        fields = {"image": torch.randn(2, 1, 10, 14)} | ({"behavior": torch.randn(2, 1)} if channels else {})
        assert model(**fields).logits.shape == (2, 5)


def test_wrong_inputs_are_named():
    model = tiny_model()
    batch = tiny_batch(model.config)
    for change, words in (
        ({"image": batch["image"][:, 0]}, r"image of shape \(3, 10, 14\)"),
        ({"image": batch["image"].expand(-1, 3, -1, -1)}, r"expected: \(batch, 1, 10, 14\)"),
        ({"behavior": batch["behavior"][:, :2]}, r"behavior has shape \(3, 2\)"),
        ({"pupil_center": None}, "pupil_center was not given"),
        ({"labels": torch.rand(3, 4)}, r"labels of shape \(3, 4\)"),
        ({"mouse_id": "B"}, "mouse_id='B'"),
        ({"image": None}, "none or both"),
    ):
        with pytest.raises(DataError, match=words):
            model(**(batch | change))


def test_save_and_load_keep_everything(tmp_path):
    model = tiny_model(
        behavior="per-mouse", shift="both", crop=0.9, local_attention=True, neurons={"A": 5, "B": 3}
    )
    model.save_pretrained(tmp_path / "model")
    again = V1T.from_pretrained(tmp_path / "model").eval()
    assert again.config.to_dict() == model.config.to_dict() | {
        k: v for k, v in again.config.to_dict().items() if k in ("architectures", "dtype", "_name_or_path")
    }
    batch = tiny_batch(model.config)
    assert torch.equal(again(**batch, mouse_id="B").logits, model(**batch, mouse_id="B").logits)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()


# ---------------------------------------------------------------- the trainer of the library


class Toy:
    "Map-style dataset with the items of `ScenesDataset`: labels follow three pixels, and running."

    def __init__(self, samples: int, seed: int, neurons: int = 5, pupil: bool = True):
        draw, weights = rng(seed, "toy"), rng(0, "weights").random((neurons, 4))
        self.items = []
        for _ in range(samples):
            image, running = draw.normal(size=(1, 10, 14)), draw.random(3)
            causes = np.array([image[0, 3, 4], image[0, 5, 9], image[0, 7, 2], 2 * running[0]])
            item = {"image": image, "behavior": running, "labels": np.exp(weights @ causes / 2)}
            item |= {"pupil_center": draw.normal(size=2)} if pupil else {}
            self.items.append({k: torch.tensor(v, dtype=torch.float32) for k, v in item.items()})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return dict(self.items[i])


def test_the_trainer_takes_it(tmp_path):
    "Poisson loss of the config, the score of the model, several mice with a head each, and `predict`."
    model = tiny_model(neurons={"A": 5, "B": 3}, dropout=0.1, shift="core")
    data = {"A": (Toy(48, 0), Toy(24, 1)), "B": (Toy(32, 2, 3), Toy(24, 3, 3))}
    options = {"batch_size": 8, "lr": 3e-3, "loss": None, "progress": False, "weight_decay": 0.0}
    run = fit(model, data, adapt="full", core_lr=1e-3, epochs=6, out=tmp_path / "full", **options)
    assert run.model.config.loss == "poisson" and not hasattr(run.model.config, "loss_frames")
    found = predict(run.model, data["B"][1], mouse_id="B", batch_size=5)
    assert found.shape == (24, 3)
    labels = np.stack([item["labels"].numpy() for item in data["B"][1].items])
    row = run.history.loc[run.history["epoch"] == run.best_epoch]
    assert model.correlation(found, labels) == pytest.approx(
        float(row["validation_correlation_B"].iloc[0]), abs=1e-4
    )
    before = np.mean(
        [
            model.correlation(
                predict(model, d[1], mouse_id=m), np.stack([i["labels"].numpy() for i in d[1].items])
            )
            for m, d in data.items()
        ]
    )
    assert run.correlation > before
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, model.state_dict()[name])}
    assert {
        "core.patch_embedding.projection.2.weight",
        "readouts.B.features",
        "core.behavior.0.0.weight",
    } <= moved


def test_the_trainer_leaves_a_frozen_core_alone(tmp_path):
    model = tiny_model(behavior="per-mouse", pupil_channels=0, shift="none")
    data = (Toy(24, 0, pupil=False), Toy(12, 1, pupil=False))
    run = fit(
        model,
        data,
        adapt="head",
        cache=False,
        epochs=2,
        batch_size=8,
        loss="correlation",
        out=tmp_path / "head",
        progress=False,
    )
    state = model.state_dict()
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, state[name])}
    assert moved and all(name.startswith(("readouts.", "behaviors.")) for name in moved)
    assert any(name.startswith("behaviors.") for name in moved) and run.model.config.loss == "correlation"


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_answer_nearly_as_float32(options, given):
    model = tiny_model(**{**options, "image_sampling": "bilinear"})  # the nearest pixel may be another one
    batch = tiny_batch(model.config)
    with torch.no_grad():
        full = model(**batch).logits
        half = model.to(torch.bfloat16)(**{name: x.to(given) for name, x in batch.items()}).logits
    assert torch.isfinite(half).all() and half.shape == full.shape
    assert (half.float() - full).norm() < 0.1 * full.norm()
    model.train()(**batch, labels=torch.rand_like(full)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
