"""The diffusion model over responses: times, loss, steps, guidance, labels, saving, refusals."""

import json
import math

import diffusers
import pytest
import torch

from cortexlit.core import DataError
from cortexlit.models.diffusion import Diffusion, DiffusionConfig


def small(**options):
    torch.manual_seed(0)
    return Diffusion(DiffusionConfig(**({"inputs": 7, "hidden": (11,), "rank": 4} | options))).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("hidden", [(), (5,), (9, 6)])
def test_shapes_and_gradients_reach_every_weight(labels, hidden):
    model = small(labels=labels, hidden=hidden)
    x, y = torch.randn(4, 7), torch.randn(4, labels) if labels else None
    assert model.loss(x, y).shape == (4,)
    assert model.predict(x, torch.tensor([1, 5, 999, 1000]), y).shape == (4, 7)
    assert model.sample(y, None if labels else 4, steps=3).shape == (4, 7)
    model(x, y).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_is_kept_is_the_library_s():
    theirs = diffusers.DDPMScheduler(beta_schedule="linear").alphas_cumprod
    ours = small().kept(torch.arange(1001))
    assert ours[0] == 1
    torch.testing.assert_close(ours[1:], theirs, rtol=1e-4, atol=1e-7)


def test_loss_is_the_squared_error_of_the_noise():
    model, x, y = small(labels=2, drop=0.5), torch.randn(6, 7), torch.randn(6, 2)
    got, draw = model.loss(x, y, seeded(3)), seeded(3)
    times, known = torch.randint(1, 1001, (6,), generator=draw), torch.rand(6, generator=draw) >= 0.5
    noise, left = torch.randn(6, 7, generator=draw), model.kept(times)[:, None]
    assert 0 < known.sum() < 6
    found = model.predict(left.sqrt() * x + (1 - left).sqrt() * noise, times, y, known)
    torch.testing.assert_close(got, (found - noise).square().mean(1))


def test_a_hidden_label_is_not_seen_and_a_shown_one_is():
    model, x, times = small(labels=2), torch.randn(3, 7), torch.tensor([10, 400, 900])
    a, b, hidden = torch.ones(3, 2), -torch.ones(3, 2), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(model.predict(x, times, a, hidden), model.predict(x, times, b, hidden))
    assert not torch.allclose(model.predict(x, times, a), model.predict(x, times, b))
    zero = torch.zeros(3, 2)  # a label of zeros is not a hidden one
    assert not torch.allclose(model.predict(x, times, zero), model.predict(x, times, zero, hidden))


def test_all_steps_with_fresh_noise_are_ddpm_and_few_without_are_ddim():
    model = small(times=20, betas=(0.01, 0.2))
    options = {"num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.2, "clip_sample": False}
    library, draw = diffusers.DDPMScheduler(**options), seeded(5)
    x = torch.randn(4, 7, generator=draw)
    for t in range(20, 0, -1):
        noise = model.predict(x, torch.full((4,), t)).detach()
        x = library.step(noise, t - 1, x, generator=draw).prev_sample
    torch.testing.assert_close(
        model.sample(count=4, steps=20, fresh=1.0, generator=seeded(5)), x, rtol=1e-3, atol=1e-3
    )
    library = diffusers.DDIMScheduler(**options, timestep_spacing="trailing")
    library.set_timesteps(5)
    x = torch.randn(4, 7, generator=seeded(5))
    for t in library.timesteps:
        noise = model.predict(x, torch.full((4,), int(t) + 1)).detach()
        x = library.step(noise, t, x).prev_sample
    torch.testing.assert_close(model.sample(count=4, steps=5, generator=seeded(5)), x, rtol=1e-3, atol=1e-3)


def test_guidance_weighs_two_predictions():
    model, y = small(labels=2), torch.randn(3, 2)
    x, times, hidden = torch.randn(3, 7, generator=seeded(1)), torch.full((3,), 1000), torch.zeros(3)
    for w in (-1.0, 0.0, 3.0):
        noise = (1 + w) * model.predict(x, times, y) - w * model.predict(x, times, y, hidden)
        left = model.kept(times)[:, None]
        clean = (x - (1 - left).sqrt() * noise) / left.sqrt()
        got = model.sample(y, steps=1, guidance=w, generator=seeded(1))
        torch.testing.assert_close(got, clean.detach(), rtol=1e-3, atol=1e-2)
    a, b = (model.sample(v, steps=3, guidance=-1.0, generator=seeded()) for v in (y, -y))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_start_of_little_noise_comes_back():
    model = small()
    start = torch.randn(5, 7)
    back = model.sample(start=start, since=1, steps=1, generator=seeded())
    assert (back - start).abs().max() < 0.1
    far = model.sample(start=start, generator=seeded())
    assert (far - start).abs().max() > 0.3


def test_training_finds_mean_spread_and_label_and_repeats():
    y = torch.randn(1000, 1, generator=seeded())
    x = torch.cat([0.8 * y, 1 - 0.8 * y], 1) + torch.tensor([0.3, 0.9]) * torch.randn(
        1000, 2, generator=seeded(1)
    )
    model = small(inputs=2, labels=1, rank=2, hidden=(32,))
    again = small(inputs=2, labels=1, rank=2, hidden=(32,))
    model.fit(x, y, steps=600, generator=seeded()), again.fit(x, y, steps=600, generator=seeded())
    made = model.sample(torch.ones(4000, 1), generator=seeded(1))
    torch.testing.assert_close(made.mean(0), torch.tensor([0.8, 0.2]), atol=0.2, rtol=0)
    torch.testing.assert_close(made.std(0), torch.tensor([0.3, 0.9]), atol=0.2, rtol=0)
    assert torch.equal(made, again.sample(torch.ones(4000, 1), generator=seeded(1)))
    assert not model.training and not made.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"labels": 2, "hidden": (), "times": 30, "betas": (0.01, 0.3)}])
def test_saved_and_read_again(options, tmp_path):
    model = small(**options)
    y = torch.randn(3, 2) if "labels" in options else None
    model.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    count = None if options else 3
    assert torch.equal(again.sample(y, count, generator=seeded()), model.sample(y, count, generator=seeded()))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "response-diffusion"
    assert not again.training


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"inputs": 0}, "inputs=0"),
        ({"labels": -1}, "labels=-1"),
        ({"rank": 0}, "rank=0"),
        ({"times": 1}, "times=1"),
        ({"times": 2.5}, "times=2.5"),
        ({"hidden": (4, 0)}, "hidden layer=0"),
        ({"betas": (0.0, 0.1)}, "betas="),
        ({"betas": (0.2, 0.1)}, "betas="),
        ({"betas": (0.2, 1.0)}, "betas="),
        ({"betas": (0.2,)}, "betas="),
        ({"betas": (0.1, float("nan"))}, "betas="),
        ({"drop": 1.0}, "drop=1.0"),
        ({"drop": -0.1}, "drop=-0.1"),
        ({"label": 2}, "perhaps labels"),
    ],
)
def test_options_that_no_model_can_be_built_from(wrong, said):
    with pytest.raises(DataError, match=said):
        DiffusionConfig(**wrong)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, x, y: m(x), "no labels"),
        (lambda m, x, y: m(x, y[:2]), r"labels of shape \(2, 2\)"),
        (lambda m, x, y: m(x[:, :5], y), r"responses of shape \(3, 5\)"),
        (lambda m, x, y: m(x * math.nan, y), "responses that are not finite"),
        (lambda m, x, y: m.loss(x, y / 0), "labels that are not finite"),
        (lambda m, x, y: m.predict(x, torch.ones(3), y), "whole numbers"),
        (lambda m, x, y: m.predict(x, torch.ones(2).long(), y), "whole numbers"),
        (lambda m, x, y: m.predict(x, torch.tensor([0, 1, 2]), y), "1 to 1000"),
        (lambda m, x, y: m.predict(x, torch.tensor([1, 1, 1001]), y), "1 to 1000"),
        (lambda m, x, y: m.sample(), "count=None"),
        (lambda m, x, y: m.sample(count=2), "no labels"),
        (lambda m, x, y: m.sample(y, count=2), "labels of shape"),
        (lambda m, x, y: m.sample(y, steps=0), "steps=0"),
        (lambda m, x, y: m.sample(y, since=1001), "since=1001"),
        (lambda m, x, y: m.sample(y, since=0), "since=0"),
        (lambda m, x, y: m.sample(y, fresh=1.5), "fresh=1.5"),
        (lambda m, x, y: m.sample(y, guidance=math.inf), "guidance=inf"),
        (lambda m, x, y: m.sample(y, start=x[:2]), "start of shape"),
        (lambda m, x, y: small().sample(start=x, count=2), "start of shape"),
        (lambda m, x, y: m.sample(y, start=x * math.nan), "start that are not finite"),
        (lambda m, x, y: small().sample(count=2, guidance=1.0), "guidance=1.0"),
        (lambda m, x, y: m.fit(x * math.inf, y), "responses that are not finite"),
        (lambda m, x, y: m.fit(x[:0], y[:0]), "0 trials"),
        (lambda m, x, y: m.fit(x, y, steps=0), "steps=0"),
        (lambda m, x, y: m.fit(x, y, rate=math.nan), "rate=nan"),
        (lambda m, x, y: m.fit(x, y, average=1.0), "average=1.0"),
        (lambda m, x, y: m.fit(x, y, steps=20, rate=1e30), "not finite"),
        (lambda m, x, y: small()(x, y), "labels for a model without"),
    ],
)
def test_inputs_that_do_not_fit(call, said):
    with pytest.raises(DataError, match=said):
        call(small(labels=2), torch.randn(3, 7), torch.ones(3, 2))
