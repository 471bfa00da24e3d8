"""The variational autoencoder over responses: shapes, the bound, what is drawn, labels, saving, refusals."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from cortexlit.core import DataError
from cortexlit.models.autoencoders import VAE, VAEConfig
from cortexlit.models.diffusion import Diffusion
from cortexlit.models.flows import FlowMatching
from cortexlit.models.gan import GAN


def small(**options):
    torch.manual_seed(0)
    return VAE(VAEConfig(**({"inputs": 7, "latents": 3, "hidden": (11,)} | options))).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("hidden", [(), (5,), (9, 6)])
@pytest.mark.parametrize("noise", [None, 0.5])
def test_shapes_and_gradients_reach_every_weight(labels, hidden, noise):
    model = small(labels=labels, hidden=hidden, noise=noise).train()
    x, y = torch.randn(4, 7), torch.randn(4, labels) if labels else None
    out = model(x, y)
    assert out.prediction.shape == (4, 7) and out.mean.shape == out.log_variance.shape == (4, 3)
    assert model.loss(x, y).shape == (4,) and model.decode(out.mean, y).shape == (4, 7)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert (model.log_noise is None) == (noise is not None)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.05, 5)), min_size=1, max_size=6))
def test_kl_equals_torch(numbers):
    mean, sd = torch.tensor(numbers, dtype=torch.double).T
    torch.testing.assert_close(VAE.kl(mean, 2 * sd.log()), kl_divergence(Normal(mean, sd), Normal(0.0, 1.0)))


def test_kl_of_known_numbers():
    assert VAE.kl(
        torch.tensor([1.0, -0.5]), 2 * torch.tensor([0.5, 2.0]).log()
    ).sum().item() == pytest.approx(1.75)


@pytest.mark.parametrize("noise", [0.3, 2.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_loss_is_the_bound(noise, beta):
    "One draw, by torch.distributions, with the same generator; noise is a variance."
    model, x = small(noise=noise, beta=beta), torch.randn(5, 7)
    loss = model.loss(x, generator=seeded(3))
    mean, log_variance = model.encode(x)
    z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=seeded(3))
    fit = Independent(Normal(model.decode(z), noise**0.5), 1).log_prob(x)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(loss, beta * divergence - fit)


def test_bound_lies_below_the_evidence_of_a_linear_model():
    model = small(hidden=(), noise=0.5, inputs=4, latents=2)
    weight, bias = model.decoder[0].weight, model.decoder[0].bias
    x = torch.randn(6, 4)
    evidence = MultivariateNormal(bias, weight @ weight.T + 0.5 * torch.eye(4)).log_prob(x)
    assert (-model.loss(x, samples=500, generator=seeded()) < evidence).all()
    inverse = torch.linalg.inv(torch.eye(2) + weight.T @ weight / 0.5)  # covariance of the true posterior
    turn = torch.linalg.eigh(inverse)[1]
    with torch.no_grad():  # turn the latents so that it is
        weight.copy_(weight @ turn)
        posterior = torch.linalg.inv(torch.eye(2) + weight.T @ weight / 0.5)
        model.encoder[0].weight.copy_(torch.cat([posterior @ weight.T / 0.5, torch.zeros(2, 4)]))
        shift = -(posterior @ weight.T / 0.5) @ bias
        model.encoder[0].bias.copy_(torch.cat([shift, posterior.diagonal().log()]))
    torch.testing.assert_close(-model.loss(x, samples=4000, generator=seeded()), evidence, atol=0.08, rtol=0)


def test_evaluation_draws_nothing_and_training_does():
    model, x = small(), torch.randn(3, 7)
    assert torch.equal(model(x).prediction, model(x).prediction)
    torch.testing.assert_close(model(x).prediction, model.decode(model(x).mean))
    model.train()
    assert not torch.equal(model(x).prediction, model(x).prediction)


def test_more_draws_scatter_less():
    model, x = small(noise=0.05), torch.randn(1, 7).expand(300, 7)
    spread = [model.loss(x, samples=n, generator=seeded()).std() for n in (1, 16)]
    assert spread[1] < spread[0] / 2


def test_learned_noise_finds_the_variance():
    model = small(hidden=(), inputs=6, latents=1)
    x, optimizer = 3 * torch.randn(400, 6, generator=seeded()), torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(250):
        optimizer.zero_grad()
        model.loss(x, generator=seeded(1)).mean().backward()
        optimizer.step()
    assert 7 < model.noise_variance.item() < 10


def test_samples_follow_the_model():
    model = small(hidden=(), noise=0.25, inputs=3, latents=2)
    made = model.sample(count=40_000, generator=seeded())
    weight, bias = model.decoder[0].weight, model.decoder[0].bias
    torch.testing.assert_close(made.mean(0), bias, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(made.T), weight @ weight.T + 0.25 * torch.eye(3), atol=0.02, rtol=0)
    clean = model.sample(count=40_000, noise=False, generator=seeded())
    torch.testing.assert_close(torch.cov(clean.T), weight @ weight.T, atol=0.02, rtol=0)
    assert torch.equal(model.sample(count=5, generator=seeded(2)), model.sample(count=5, generator=seeded(2)))
    assert not made.requires_grad


def test_labels_reach_encoder_decoder_and_samples():
    model, x = small(labels=2), torch.randn(4, 7)
    a, b = torch.zeros(4, 2), torch.ones(4, 2)
    assert not torch.allclose(model(x, a).mean, model(x, b).mean)
    z = model(x, a).mean
    assert not torch.allclose(model.decode(z, a), model.decode(z, b))
    first, second = (model.sample(v, noise=False, generator=seeded()) for v in (a, b))
    assert first.shape == (4, 7) and not torch.allclose(first, second)


def test_fit_finds_what_a_label_does_and_repeats():
    y = torch.randn(1000, 1, generator=seeded())
    x = torch.cat([2 * y, -y], 1) + 0.5 * torch.randn(1000, 2, generator=seeded(1))
    models = [
        small(inputs=2, latents=2, labels=1).fit(x, y, steps=300, generator=seeded(2)) for _ in range(2)
    ]
    low, high = (models[0].sample(torch.full((2000, 1), v), generator=seeded()).mean(0) for v in (-1.0, 1.0))
    assert (high - low)[0] > 2 and (high - low)[
        1
    ] < -1  # 4 and -2 in the data; a code that is told, too, keeps some
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    assert not models[0].training and all(p.grad is None for p in models[0].parameters())


@pytest.mark.parametrize("options", [{}, {"labels": 2, "noise": 0.5, "beta": 2.0, "hidden": ()}])
def test_saved_and_read_again(options, tmp_path):
    model, x = small(**options), torch.randn(3, 7)
    y = torch.randn(3, 2) if "labels" in options else None
    if model.log_noise is not None:
        model.log_noise.data.fill_(-0.7)
    model.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert torch.equal(again(x, y).prediction, model(x, y).prediction)
    assert torch.equal(again(x, y).loss, model(x, y).loss)
    assert again.noise_variance.item() == pytest.approx(0.5 if "noise" in options else math.exp(-0.7))
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == "response-vae" and on_disk["latents"] == 3
    assert not again.training


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"inputs": 0}, "inputs=0"),
        ({"latents": 1.5}, "latents=1.5"),
        ({"labels": -1}, "labels=-1"),
        ({"hidden": (4, 0)}, "hidden layer=0"),
        ({"latents": True}, "latents=True"),
        ({"noise": 0.0}, "noise=0.0"),
        ({"noise": float("inf")}, "noise=inf"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"latent": 2}, "perhaps latents"),
    ],
)
def test_options_that_no_model_can_be_built_from(wrong, said):
    with pytest.raises(DataError, match=said):
        VAEConfig(**wrong)


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
        (lambda m, x, y: m.decode(x, y), r"latents of shape \(3, 7\)"),
        (lambda m, x, y: m.loss(x, y, samples=0), "samples=0"),
        (lambda m, x, y: m.sample(), "count=None"),
        (lambda m, x, y: m.sample(count=2), "no labels"),
        (lambda m, x, y: m.sample(y, count=2), "labels of shape"),
        (lambda m, x, y: small()(x, y), "labels for a model without"),
        (lambda m, x, y: m.sample(count=0), "count=0"),
        (lambda m, x, y: m.fit(x, y[:2]), r"labels of shape \(2, 2\)"),
        (lambda m, x, y: m.fit(x[:0], y[:0]), "0 trials"),
        (lambda m, x, y: m.fit(x, y, batch=0), "batch=0"),
        (lambda m, x, y: m.fit(x, y, rate=-1.0), "rate=-1.0"),
        (lambda m, x, y: m.fit(x, y, steps=20, rate=1e30), "not finite"),
    ],
)
def test_inputs_that_do_not_fit(call, said):
    with pytest.raises(DataError, match=said):
        call(small(labels=2), torch.randn(3, 7), torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [VAE, GAN, Diffusion, FlowMatching])
def test_bfloat16_weights_answer_and_learn_nearly_as_float32(kind, dtype):
    torch.manual_seed(0)
    model, x, y = kind(kind.config_class(inputs=6, labels=3)).eval(), torch.randn(8, 6), torch.randn(8, 3)

    def answer(x, y):
        if kind is Diffusion:
            return model.predict(x, torch.arange(10, 90, 10), y)
        if kind is FlowMatching:
            return model.velocity(x, 0.5, y)
        return model(x, y).logits if kind is GAN else model.encode(x, y)[0]

    with torch.no_grad():
        full = answer(x, y)
        model.to(torch.bfloat16)
        x, y = x.to(dtype), y.to(dtype)
        assert (answer(x, y).float() - full).norm() < 0.05 * full.norm()
        assert torch.isfinite(model.sample(y)).all()
    loss = model.judge_loss(x, y) + model.generator_loss(y) if kind is GAN else model.loss(x, y)
    loss.mean().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
