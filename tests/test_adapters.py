"""Adapters on models they were not written for, and folders that do not fit."""

import copy

import numpy as np
import pytest
import torch
from malformed import sign
from safetensors.torch import load_file, save_file
from toy_training import tiers, tiny_model

from cortexlit.core import DataError, MissingError
from cortexlit.models.adapters import Adapters, add_adapters, load_adapters, merged, save_adapters
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
