"""Adapters on models they were not written for, and folders that do not fit."""

import copy

import numpy as np
import pytest
import torch
from malformed import sign
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from toy_training import tiers, tiny_model

from cortexlit.core import DataError, MissingError
from cortexlit.models import adapters as adapters_module
from cortexlit.models.adapters import (
    Adapters,
    _kept_lean,
    _left,
    add_adapters,
    load_adapters,
    merged,
    save_adapters,
)
from cortexlit.models.viv1t import ViV1T


def responses(model: ViV1T) -> torch.Tensor:
    item = tiers()[1][0]
    with torch.no_grad():
        return model.eval()(**{k: v[None] for k, v in item.items() if k != "labels"}).logits


def trained(model: ViV1T, adapters: Adapters):
    wrapper = add_adapters(model, adapters)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(weight.data, 0, 0.2)
    return wrapper


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_saved_and_merged_are_the_trained_model(tmp_path, head, dora):
    model, adapters = tiny_model(), Adapters(rank=3, head=head, dora=dora)
    wrapper = trained(model, adapters)
    expected = responses(model)
    assert not torch.allclose(expected, responses(tiny_model()), atol=1e-3)
    plain = merged(wrapper)
    torch.testing.assert_close(responses(plain), expected, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(
        responses(ViV1T.from_pretrained(tmp_path / "plain")), expected, rtol=1e-4, atol=1e-5
    )
    save_adapters(wrapper, adapters, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "head.safetensors").exists() == head
    again = tiny_model()
    load_adapters(again, tmp_path / "adapters")
    torch.testing.assert_close(responses(again), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(responses(model), expected)  # the adapted model is as it was


def test_the_seed_decides_about_the_start_and_nothing_else_is_drawn():
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    models = [tiny_model() for _ in range(3)]
    torch.manual_seed(5)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        add_adapters(model, Adapters(rank=2), seed)
    assert torch.equal(torch.rand(1), before)
    a, b, c = (next(p for n, p in m.named_parameters() if "lora_A" in n) for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "whole number"), ({"rank": True}, "whole number"), ({"rank": 2.0}, "whole number"),
        ({"targets": "everything"}, "all, fused"), ({"dropout": 1.0}, "probability"), ({"alpha": 0}, "positive"),
    ],
)  # fmt: skip
def test_wrong_options(change, words):
    with pytest.raises(DataError, match=words):
        Adapters(**change)


def test_a_failed_call_leaves_the_model_as_it_was():
    model = tiny_model()
    before = responses(model)
    with pytest.raises(DataError, match="fused_linear"):
        add_adapters(model, Adapters(targets=("attn_out", "attn_in")))
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    assert torch.equal(responses(model), before)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(MissingError, match="adapter_config.json"):
        load_adapters(tiny_model(), tmp_path)
    adapters = Adapters(rank=2, head=True)
    save_adapters(trained(tiny_model(), adapters), adapters, tmp_path / "a")
    with pytest.raises(DataError, match="do not fit this model"):
        load_adapters(tiny_model(heads=3), tmp_path / "a")
    with pytest.raises(DataError, match="head does not fit"):
        load_adapters(tiny_model({"B": 4}), tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors"])
def test_weights_that_are_not_finite(tmp_path, name):
    adapters, base = Adapters(rank=2, head=True), tiny_model()
    save_adapters(trained(copy.deepcopy(base), adapters), adapters, tmp_path / "a")
    load_adapters(copy.deepcopy(base), tmp_path / "a")  # the control
    found = load_file(tmp_path / "a" / name)
    first = min(found)
    found[first].view(-1)[0] = torch.nan
    save_file(found, tmp_path / "a" / name)
    sign(tmp_path / "a/card.json", tmp_path / "a" / name)
    with pytest.raises(DataError, match=f"not finite: {first}"):
        load_adapters(base, tmp_path / "a")


def test_rank_is_the_rank_of_the_change():
    model = tiny_model()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    plain = merged(trained(model, Adapters(rank=2))).state_dict()
    ranks = {
        int(np.linalg.matrix_rank((plain[k] - start[k]).numpy(), tol=1e-4))
        for k in start
        if not torch.equal(plain[k], start[k])
    }
    assert ranks == {2}


def by_peft(model: ViV1T) -> ViV1T:
    "A copy whose layers are peft's own: the slow, obvious way."
    other = copy.deepcopy(model)
    for part in other.modules():
        if isinstance(part, lora.Linear):
            part.__class__ = lora.Linear
    return other


def gradients(model: ViV1T, half: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    item = tiers()[0][0]
    model.config.loss_frames = None
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.train()(**{k: v[None] for k, v in item.items()}).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["all", "fused", ("attn_out",), ("ff_out.2",)])
@pytest.mark.parametrize("head", [False, True])
def test_loss_and_gradients_are_those_of_peft(targets, head):
    model = trained(tiny_model(), Adapters(rank=3, targets=targets, head=head))
    model = model.base_model.model
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # of another stream of random numbers; its own test is below
    other = by_peft(model)
    (loss, own), (expected, theirs) = gradients(model), gradients(other)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert own.keys() == theirs.keys() and len(own) > 0
    for name, grad in theirs.items():
        torch.testing.assert_close(own[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_under_autocast_gradients_are_as_close_to_float32_as_those_of_peft():
    model = trained(tiny_model(), Adapters(rank=3)).base_model.model
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    exact, own, theirs = (
        torch.cat([grad.flatten() for grad in gradients(m, half)[1].values()])
        for m, half in ((by_peft(model), False), (copy.deepcopy(model), True), (by_peft(model), True))
    )
    assert (own - exact).norm() < 1.2 * (theirs - exact).norm() < 0.1 * exact.norm()


def layers(bias: bool = False) -> tuple[torch.nn.Module, torch.Tensor]:
    "A frozen layer of 6 inputs with a correction of rank 2, in float64, and an input."
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 9, bias=bias)).double()
    wrapper = _kept_lean(get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], lora_alpha=3)))
    layer = wrapper.base_model.model[0].double()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer, torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [False, True])
def test_what_comes_before_a_layer_is_part_of_the_gradient(bias):
    layer, x = layers(bias)
    before = (torch.nn.LayerNorm(6).double().requires_grad_(False), torch.nn.GELU(), torch.nn.Dropout(0.4))
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, ()))
    mask = _left(torch.empty(20, 6, dtype=torch.float64), 0.4, seed).view(4, 5, 6)
    assert 0 < mask.mean() < 1
    torch.manual_seed(3)
    found = layer(x, before=before)
    inner = before[1](before[0](x)) * mask / (1 - round(0.4 * 2**16) / 2**16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(inner) + 1.5 * inner @ a.T @ b.T
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(found)
    for own, plain in zip(*(torch.autograd.grad(y, (x, a, b), pull) for y in (found, expected)), strict=True):
        torch.testing.assert_close(own, plain)
    layer.eval()
    quiet = layer(x, before=before[:2])
    torch.testing.assert_close(
        quiet, layer.base_layer(before[1](before[0](x))) + 1.5 * before[1](before[0](x)) @ a.T @ b.T
    )


def test_masks_leave_the_share_that_was_asked_for():
    like = torch.empty(1000, 333)
    for p in (0.0592, 0.358, 0.5):
        kept = float(_left(like, p, seed=1).mean())
        assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / like.numel()) ** 0.5
    assert torch.equal(_left(like, 0.3, 5), _left(like, 0.3, 5))
    assert not torch.equal(_left(like, 0.3, 5), _left(like, 0.3, 6))


def test_a_training_step_stores_less_than_that_of_peft():
    def stored(model: ViV1T) -> int:
        sizes: dict[int, int] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            gradients(model)
        return sum(sizes.values())

    model = trained(tiny_model(attention_dropout=0.3, ff_dropout=0.1), Adapters(rank=3)).base_model.model
    assert stored(model) < 0.8 * stored(by_peft(model))


@pytest.mark.parametrize("case", ["evaluation", "dora", "dropout", "unfrozen", "two adapters"])
def test_what_the_short_way_does_not_cover_is_left_to_peft(case, monkeypatch):
    options = {"dora": {"dora": True}, "dropout": {"dropout": 0.5}}
    model = trained(tiny_model(), Adapters(rank=3, **options.get(case, {}))).base_model.model
    if case == "unfrozen":
        model.requires_grad_(True)
    if case == "two adapters":
        for part in model.modules():
            if isinstance(part, lora.Linear):
                part.update_layer("other", 2, 2, LoraConfig(r=2))
                part.set_adapter(["default", "other"])
    calls = []
    monkeypatch.setattr(adapters_module._Corrected, "apply", lambda *_: calls.append(1))
    if case == "evaluation":
        responses(model)
    else:
        gradients(model)
    assert not calls
