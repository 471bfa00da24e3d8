"""Losses against plain loops and torch, and where they must not break."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cortexlit.core import DataError
from cortexlit.models.losses import LOSSES, correlation, loss_named, mse, poisson, poisson_correlation

each = pytest.mark.parametrize("name", LOSSES)


def pair(samples: int = 2, neurons: int = 3, frames: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    "Positive float64 responses and labels."
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.gamma(2, 0.5, (2, samples, neurons, frames))).unbind()


def looped(name: str, x: np.ndarray, y: np.ndarray, eps: float = 1e-8) -> float:
    "The definition, one value at a time."
    samples, neurons, frames = x.shape
    values = [(a, b) for a, b in zip(x.ravel(), y.ravel(), strict=True)]
    if name == "mse":
        return sum((a - b) ** 2 for a, b in values) / len(values)
    rate = sum(a - max(b, 0) * np.log(a + eps) for a, b in values)
    if name == "poisson":
        return rate / len(values)
    if name == "correlation":
        table = [np.corrcoef(x[s, n], y[s, n])[0, 1] for s in range(samples) for n in range(neurons)]
        return 1 - np.mean(table)
    one_by_one = [np.corrcoef(x[:, n].ravel(), y[:, n].ravel())[0, 1] for n in range(neurons)]
    return (rate + 1000 * sum(1 - r for r in one_by_one)) / len(values)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(3, 30), st.integers(0, 99))
def test_against_the_definition(samples, neurons, frames, seed):
    x, y = pair(samples, neurons, frames, seed)
    for name, loss in LOSSES.items():
        assert loss(x, y).item() == pytest.approx(looped(name, x.numpy(), y.numpy()), rel=1e-4), name


def test_against_torch():
    x, y = pair()
    assert torch.equal(mse(x, y), F.mse_loss(x, y))
    assert torch.equal(poisson(x, y), F.poisson_nll_loss(x, y, log_input=False))
    assert correlation(x[:1, :1], y[:1, :1]).item() == pytest.approx(
        1 - torch.corrcoef(torch.stack([x[0, 0], y[0, 0]]))[0, 1].item(), abs=1e-6
    )


@each
def test_gradient_is_that_of_the_value(name):
    x, y = pair(frames=6)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, y), x.requires_grad_())


@each
@pytest.mark.parametrize(
    "case", ["constant", "zero", "constant label", "both", "one frame", "negative label"]
)
def test_finite_everywhere(name, case):
    x, y = (values.float() for values in pair(frames=1 if case == "one frame" else 20))
    if case in ("constant", "both"):
        x = torch.full_like(x, 0.7)
    if case == "zero":
        x = torch.zeros_like(x)
    if case in ("constant label", "both"):
        y = torch.full_like(y, 0.4)
    if case == "negative label":
        y = y - 1
    x.requires_grad_()
    loss = LOSSES[name](x, y)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_undefined_correlation_counts_as_zero():
    x, y = pair()
    flat = torch.full_like(x, 3.0)
    assert correlation(flat, y) == 1 and correlation(x, flat) == 1
    half = torch.cat([x[:1], flat[:1]])
    assert correlation(half, y).item() == pytest.approx((correlation(x[:1], y[:1]).item() + 1) / 2)


def test_correlation_knows_no_level_and_no_size():
    x, y = pair()
    assert correlation(4 * x + 9, y).item() == pytest.approx(correlation(x, y).item(), abs=1e-6)
    assert correlation(-x, y).item() == pytest.approx(2 - correlation(x, y).item(), abs=1e-6)
    assert correlation(y, y).item() == pytest.approx(0, abs=1e-6)


def test_negative_labels_do_not_reward_silence():
    "By the formula, a rate towards 0 would make the loss of a negative label fall without bound."
    label = torch.full((1, 1, 4), -0.5)
    values = [poisson(torch.full((1, 1, 4), rate), label).item() for rate in (1, 1e-2, 1e-4, 0)]
    assert values == sorted(values, reverse=True) and values[-1] >= 0


@pytest.mark.parametrize("name", ["mse", "poisson", "correlation"])
def test_mean_over_two_processes_is_the_whole(name):
    "Gradients of processes are averaged: so must the losses of two halves of a batch."
    x, y = pair(samples=4)
    halves = (LOSSES[name](x[:2], y[:2]) + LOSSES[name](x[2:], y[2:])) / 2
    assert halves.item() == pytest.approx(LOSSES[name](x, y).item())


def test_alpha_weighs_the_correlation_in_frames():
    x, y = pair(samples=2, frames=20)
    without, with_ = poisson_correlation(x, y, alpha=0), poisson_correlation(x, y, alpha=80)
    assert torch.equal(without, poisson(x, y))
    joined = [values.transpose(0, 1).reshape(1, 3, 40) for values in (x, y)]
    assert (with_ - without).item() == pytest.approx(80 / 40 * correlation(*joined).item())


@each
def test_half_precision_is_computed_in_float32(name):
    x, y = (values.to(torch.bfloat16) for values in pair())
    value = LOSSES[name](x, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(LOSSES[name](x.float(), y.float()).item())
    silent = torch.zeros(1, 1, 5, dtype=torch.float16, requires_grad=True)
    LOSSES[name](silent, torch.ones(1, 1, 5)).backward()
    assert not silent.grad.isnan().any()


@each
@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 1, 4)), ((2, 3, 4), (2, 3, 5)), ((3, 4), (3, 4))])
def test_shapes_must_agree(name, shapes):
    with pytest.raises(DataError, match="samples, neurons, frames"):
        LOSSES[name](*(torch.ones(shape) for shape in shapes))


def test_by_name():
    assert all(loss_named(name) is loss for name, loss in LOSSES.items())
    with pytest.raises(DataError, match="one of mse, poisson, correlation, poisson_correlation"):
        loss_named("MSE")
