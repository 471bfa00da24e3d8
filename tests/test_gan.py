"""The generative adversarial network over responses: shapes, losses, the game, labels, saving, refusals."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from cortexlit.core import DataError
from cortexlit.models.gan import GAN, GANConfig


def small(**options):
    torch.manual_seed(0)
    return GAN(GANConfig(**({"inputs": 7, "latents": 3, "hidden": (11,), "judge": (9, 5)} | options))).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("hidden", [(), (5,), (9, 6)])
def test_shapes_and_each_loss_reaches_its_own_player(labels, hidden):
    model = small(labels=labels, hidden=hidden)
    x, y = torch.randn(4, 7), torch.randn(4, labels) if labels else None
    judge = {"judge", "verdict", "match"}
    assert model(x, y).logits.shape == (4,)
    assert model.sample(y, None if labels else 4).shape == (4, 7)
    loss = model.judge_loss(x, y)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} <= judge
    model.zero_grad()
    loss = model.generator_loss(y, None if labels else 4)
    assert loss.shape == (4,)
    loss.mean().backward()
    for name, p in model.named_parameters():
        if name.split(".")[0] not in judge:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_losses_are_cross_entropy_and_the_squared_slope(penalty):
    model, x, y = small(labels=2, penalty=penalty), torch.randn(6, 7), torch.randn(6, 2)
    made = model.sample(y, generator=seeded(3))
    real, fake = model(x, y).logits, model(made, y).logits
    want = F.binary_cross_entropy_with_logits(real, torch.ones(6), reduction="none")
    want = want + F.binary_cross_entropy_with_logits(fake, torch.zeros(6), reduction="none")
    if penalty:
        slopes = torch.stack([
            torch.autograd.functional.jacobian(lambda a, b=b: model(a[None], b[None]).logits[0], a) for a, b in zip(x, y, strict=True)
        ])  # fmt: skip
        want = want + penalty / 2 * slopes.square().sum(1)
    torch.testing.assert_close(model.judge_loss(x, y, seeded(3)), want)
    want = F.binary_cross_entropy_with_logits(fake, torch.ones(6), reduction="none")
    torch.testing.assert_close(model.generator_loss(y, generator=seeded(3)), want)


def test_the_game_finds_mean_and_spread_and_repeats():
    x = torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 1.5]) * torch.randn(1000, 2, generator=seeded())
    model = small(inputs=2, latents=2, penalty=0.3).fit(x, steps=500, rate=3e-3, generator=seeded())
    made = model.sample(count=5000, generator=seeded(1))
    torch.testing.assert_close(made.mean(0), x.mean(0), atol=0.4, rtol=0)
    assert made.std(0)[1] > 1.5 * made.std(0)[0] and not model.training
    again = small(inputs=2, latents=2, penalty=0.3).fit(x, steps=500, rate=3e-3, generator=seeded())
    assert torch.equal(made, again.sample(count=5000, generator=seeded(1)))
    assert all(p.grad is None for p in model.parameters())


def test_a_label_moves_what_is_made():
    y = torch.randn(1000, 1, generator=seeded())
    x = torch.cat([2 * y, -y], 1) + 0.5 * torch.randn(1000, 2, generator=seeded(1))
    model = small(inputs=2, latents=2, labels=1, penalty=0.3).fit(
        x, y, steps=600, rate=3e-3, generator=seeded()
    )
    low, high = (model.sample(torch.full((2000, 1), v), generator=seeded()).mean(0) for v in (-1.0, 1.0))
    assert (high - low)[0] > 2 and (high - low)[1] < -1


def test_samples_repeat_and_noise_can_be_left_out():
    model = small()
    assert torch.equal(model.sample(count=5, generator=seeded()), model.sample(count=5, generator=seeded()))
    z = torch.randn(5, 3, generator=seeded())
    assert torch.equal(model.sample(count=5, noise=False, generator=seeded()), model.decode(z))
    assert not model.sample(count=5).requires_grad


@pytest.mark.parametrize("options", [{}, {"labels": 2, "hidden": (), "penalty": 0.0}])
def test_saved_and_read_again(options, tmp_path):
    model, x = small(**options), torch.randn(3, 7)
    y = torch.randn(3, 2) if "labels" in options else None
    model.save_pretrained(tmp_path)
    again = GAN.from_pretrained(tmp_path)
    assert torch.equal(again(x, y).logits, model(x, y).logits)
    count = None if options else 3
    assert torch.equal(again.sample(y, count, generator=seeded()), model.sample(y, count, generator=seeded()))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "response-gan"
    assert not again.training


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"inputs": 0}, "inputs=0"),
        ({"latents": 1.5}, "latents=1.5"),
        ({"labels": -1}, "labels=-1"),
        ({"hidden": (4, 0)}, "hidden layer=0"),
        ({"judge": (0,)}, "hidden layer=0"),
        ({"judge": ()}, "one hidden layer or more"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"penalty": float("nan")}, "penalty=nan"),
        ({"latent": 2}, "perhaps latents"),
    ],
)
def test_options_that_no_model_can_be_built_from(wrong, said):
    with pytest.raises(DataError, match=said):
        GANConfig(**wrong)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, x, y: m(x), "no labels"),
        (lambda m, x, y: m(x, y[:2]), r"labels of shape \(2, 2\)"),
        (lambda m, x, y: m(x[:, :5], y), r"responses of shape \(3, 5\)"),
        (lambda m, x, y: m(x * math.nan, y), "responses that are not finite"),
        (lambda m, x, y: m.judge_loss(x, y / 0), "labels that are not finite"),
        (lambda m, x, y: m.decode(x, y), r"latents of shape \(3, 7\)"),
        (lambda m, x, y: m.sample(), "count=None"),
        (lambda m, x, y: m.sample(count=2), "no labels"),
        (lambda m, x, y: m.sample(y, count=2), "labels of shape"),
        (lambda m, x, y: m.generator_loss(), "count=None"),
        (lambda m, x, y: m.fit(x * math.inf, y), "responses that are not finite"),
        (lambda m, x, y: m.fit(x, y[:, :1]), r"labels of shape \(3, 1\)"),
        (lambda m, x, y: m.fit(x[:0], y[:0]), "0 trials"),
        (lambda m, x, y: m.fit(x, y, steps=0), "steps=0"),
        (lambda m, x, y: m.fit(x, y, rate=0.0), "rate=0.0"),
        (lambda m, x, y: m.fit(x, y, average=1.0), "average=1.0"),
        (lambda m, x, y: m.fit(x, y, steps=20, rate=1e30), "not finite"),
        (lambda m, x, y: small()(x, y), "labels for a model without"),
    ],
)
def test_inputs_that_do_not_fit(call, said):
    with pytest.raises(DataError, match=said):
        call(small(labels=2), torch.randn(3, 7), torch.ones(3, 2))
