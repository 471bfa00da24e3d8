"""Flow matching over responses: shapes, the loss, what is carried and drawn, labels, saving, refusals."""

import json
import math

import pytest
import torch
from torch import nn

from cortexlit.core import DataError
from cortexlit.models.flows import FlowMatching, FlowMatchingConfig


def small(**options):
    torch.manual_seed(0)
    return FlowMatching(FlowMatchingConfig(**({"inputs": 7, "hidden": (11,), "steps": 4} | options))).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("hidden", [(), (5,), (9, 6)])
def test_shapes_and_gradients_reach_every_weight(labels, hidden):
    model = small(labels=labels, hidden=hidden).train()
    x, y = torch.randn(4, 7), torch.randn(4, labels) if labels else None
    out = model(x, y)
    assert out.prediction.shape == (4, 7) and out.loss.shape == ()
    assert model.loss(x, y).shape == (4,) and model.velocity(x, 0.5, y).shape == (4, 7)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("given", [True, False])
def test_loss_is_the_squared_error_on_straight_roads(given):
    model, x = small(), torch.randn(5, 7)
    start = torch.randn(5, 7) if given else None
    loss = model.loss(x, generator=seeded(3), start=start)
    draw = seeded(3)
    begin = start if given else torch.randn(5, 7, generator=draw)
    t = torch.rand(5, generator=draw)[:, None]
    velocity = model.net(torch.cat([(1 - t) * begin + t * x, t], 1))
    torch.testing.assert_close(loss, (velocity - (x - begin)).square().mean(1))


def test_more_roads_scatter_less():
    model, x = small(), torch.randn(1, 7).expand(300, 7)
    spread = [model.loss(x, samples=n, generator=seeded()).std() for n in (1, 16)]
    assert spread[1] < spread[0] / 2


def test_evaluation_repeats_and_training_does_not():
    model, x = small(), torch.randn(3, 7)
    before = torch.random.get_rng_state()
    assert torch.equal(model(x).loss, model(x).loss) and torch.equal(model(x).prediction, model(x).prediction)
    assert torch.equal(before, torch.random.get_rng_state())
    model.train()
    assert not torch.equal(model(x).loss, model(x).loss)


class Gaussian(nn.Module):
    "The exact field from N(0, 1) to N(2, 0.5²) in each number, as a network on [x, t]."

    def forward(self, inputs):
        x, t = inputs[:, :-1], inputs[:, -1:]
        return 2 + (0.25 * t - (1 - t)) / ((1 - t) ** 2 + 0.25 * t**2) * (x - 2 * t)


def test_an_exact_field_makes_the_right_distribution():
    model = small(inputs=3)
    model.net = Gaussian()
    made = model.carry(torch.randn(40_000, 3, generator=seeded()), steps=100)
    torch.testing.assert_close(made.mean(0), torch.full((3,), 2.0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(made.T), 0.25 * torch.eye(3), atol=0.01, rtol=0)
    ends = model.carry(torch.tensor([[-1.0, 0.0, 2.0]]), steps=1000)
    torch.testing.assert_close(ends, torch.tensor([[1.5, 2.0, 3.0]]), atol=5e-3, rtol=0)


def test_training_finds_a_distribution():
    model = small(inputs=2, hidden=(32, 32))
    x = 2 + 0.5 * torch.randn(2000, 2, generator=seeded())
    model.fit(x, steps=400, rate=5e-3, generator=seeded(1))
    made = model.sample(count=4000, steps=30, generator=seeded(2))
    torch.testing.assert_close(made.mean(0), x.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(made.std(0), x.std(0), atol=0.15, rtol=0)


def test_samples_are_noise_carried_and_repeat_with_their_generator():
    model = small()
    made = model.sample(count=5, generator=seeded(2))
    assert torch.equal(made, model.carry(torch.randn(5, 7, generator=seeded(2))))
    assert torch.equal(made, model.sample(count=5, generator=seeded(2), steps=4)) and not made.requires_grad
    assert not torch.allclose(made, model.sample(count=5, generator=seeded(2), steps=5))
    one = torch.randn(2, 7)
    torch.testing.assert_close(model.carry(one, steps=1), one + model.velocity(one, 0.0))


def test_times_may_differ_between_rows():
    model, x, t = small(), torch.randn(3, 7), torch.tensor([0.0, 0.5, 1.0])
    each = torch.cat([model.velocity(x[k : k + 1], float(t[k])) for k in range(3)])
    torch.testing.assert_close(model.velocity(x, t), each)


def test_labels_reach_loss_and_samples():
    model, x = small(labels=2), torch.randn(4, 7)
    a, b = torch.zeros(4, 2), torch.ones(4, 2)
    assert not torch.allclose(model.loss(x, a, generator=seeded()), model.loss(x, b, generator=seeded()))
    first, second = (model.sample(v, generator=seeded()) for v in (a, b))
    assert first.shape == (4, 7) and not torch.allclose(first, second)


@pytest.mark.parametrize("options", [{}, {"labels": 2, "hidden": (), "steps": 3}])
def test_saved_and_read_again(options, tmp_path):
    model, x = small(**options), torch.randn(3, 7)
    y = torch.randn(3, 2) if "labels" in options else None
    model.save_pretrained(tmp_path)
    again = FlowMatching.from_pretrained(tmp_path)
    assert torch.equal(again(x, y).loss, model(x, y).loss)
    count = None if y is not None else 3
    assert torch.equal(again.sample(y, count, generator=seeded()), model.sample(y, count, generator=seeded()))
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == "response-flow" and on_disk["steps"] == options.get("steps", 4)
    assert not again.training


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"inputs": 0}, "inputs=0"),
        ({"labels": -1}, "labels=-1"),
        ({"hidden": (4, 0)}, "hidden layer=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"inputs": True}, "inputs=True"),
        ({"step": 2}, "perhaps steps"),
    ],
)
def test_options_that_no_model_can_be_built_from(wrong, said):
    with pytest.raises(DataError, match=said):
        FlowMatchingConfig(**wrong)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, x, y: m(x), "no labels"),
        (lambda m, x, y: m(x, y[:2]), r"labels of shape \(2, 2\)"),
        (lambda m, x, y: m(x, y[:, :1]), r"labels of shape \(3, 1\)"),
        (lambda m, x, y: m(x[:, :5], y), r"responses of shape \(3, 5\)"),
        (lambda m, x, y: m(x[0], y), r"responses of shape \(7,\)"),
        (lambda m, x, y: m(x * math.nan, y), "responses that are not finite"),
        (lambda m, x, y: m(x, y / 0), "labels that are not finite"),
        (lambda m, x, y: m.loss(x, y, samples=0), "samples=0"),
        (lambda m, x, y: m.loss(x, y, start=x[:2]), r"start of shape \(2, 7\)"),
        (lambda m, x, y: m.loss(x, y, start=x * math.nan), "start that are not finite|start .*not finite"),
        (lambda m, x, y: m.velocity(x, torch.zeros(2), y), r"times of shape \(2,\)"),
        (lambda m, x, y: m.velocity(x, torch.zeros(3, 1), y), r"times of shape \(3, 1\)"),
        (lambda m, x, y: m.velocity(x, 1.5, y), "times outside"),
        (lambda m, x, y: m.velocity(x, math.nan, y), "times outside"),
        (lambda m, x, y: m.carry(x[:, :5], y), r"points of shape \(3, 5\)"),
        (lambda m, x, y: m.carry(x, y, steps=0), "steps=0"),
        (lambda m, x, y: m.sample(), "count=None"),
        (lambda m, x, y: m.sample(count=2), "no labels"),
        (lambda m, x, y: m.sample(y, count=2), "labels of shape"),
        (lambda m, x, y: small()(x, y), "labels for a model without"),
        (lambda m, x, y: m.sample(count=0), "count=0"),
    ],
)
def test_inputs_that_do_not_fit(call, said):
    with pytest.raises(DataError, match=said):
        call(small(labels=2), torch.randn(3, 7), torch.ones(3, 2))
