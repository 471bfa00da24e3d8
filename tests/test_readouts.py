"""Readouts, shifters and modulators against plain loops, grid_sample and statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cortexlit.core import DataError
from cortexlit.models.readouts import (
    MODULATORS,
    OUTPUTS,
    Gaussian2dReadout,
    Shifter,
    elu1,
    initial_bias,
    output_named,
    sample_map,
    standard_coordinates,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def library_sample(features: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    "torch's own bilinear sampling, as (B * T, N, C)."
    maps = features.transpose(1, 2).flatten(0, 1)
    return F.grid_sample(maps, points[:, :, None], align_corners=True)[..., 0].transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    t=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    n=st.integers(1, 5),
    reach=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_sample_map_is_grid_sample(b, c, t, h, w, n, reach, seed):
    features = normal(b, c, t, h, w, seed=seed)
    points = (torch.rand(b * t, n, 2, generator=generator(seed)) * 2 - 1) * reach
    torch.testing.assert_close(
        sample_map(features, points), library_sample(features, points), atol=1e-5, rtol=1e-5
    )


def test_sample_map_at_edges_corners_and_beyond():
    features = normal(1, 3, 1, 4, 5)
    ends = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1], [0, 0], [1.0001, 0], [-1.2, 1.2], [9, 9]])[
        None
    ]
    got = sample_map(features, ends)
    torch.testing.assert_close(got, library_sample(features, ends), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[0, 0], features[0, :, 0, 0, 0])
    torch.testing.assert_close(got[0, 3], features[0, :, 0, 3, 4])
    assert (got[0, 7] == 0).all()


def test_sample_map_has_the_gradients_of_grid_sample():
    gradients = []
    for sample in (sample_map, library_sample):
        features = normal(2, 3, 4, 5, 6).requires_grad_()
        points = normal(8, 7, 2, seed=1).requires_grad_()
        (sample(features, points) * normal(8, 7, 3, seed=2)).sum().backward()
        gradients.append((features.grad, points.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_sample_map_passes_nan_on_and_survives_it():
    points = torch.zeros(1, 2, 2)
    points[0, 0, 0] = torch.nan
    got = sample_map(torch.ones(1, 3, 1, 4, 4), points)
    assert got[0, 0].isnan().all() and got[0, 1].isfinite().all()


def plain_readout(readout: Gaussian2dReadout, features, shifts, state) -> torch.Tensor:
    "Neuron by neuron and frame by frame, in words: look, add the state, weigh, add the bias."
    b, _, t = features.shape[:3]
    out = torch.zeros(b, readout.neurons, t)
    for i in range(b):
        for frame in range(t):
            encoded = readout.state_encoder(state[i : i + 1, :, frame])[0]
            for neuron, position in enumerate(readout.positions()):
                point = (position + shifts[i, :, frame])[None, None, None]
                seen = F.grid_sample(features[i : i + 1, :, frame], point, align_corners=True)[0, :, 0, 0]
                weights = readout.features[0, :, neuron]
                out[i, neuron, frame] = (seen + encoded) @ weights + readout.bias[neuron]
    return out


@pytest.mark.parametrize("positions", ["predicted", "free"])
def test_readout_equals_the_plain_loop(positions):
    torch.manual_seed(0)
    readout = Gaussian2dReadout(6, 5, positions=positions, state_channels=3).eval()
    if positions == "predicted":
        readout.set_coordinates(normal(5, 3) * 100)
    with torch.no_grad():
        readout.features.copy_(normal(1, 6, 5, seed=3))
        readout.set_bias(normal(5, seed=4))
        features, shifts, state = (
            normal(2, 6, 4, 3, 7),
            normal(2, 2, 4, seed=1) * 0.2,
            normal(2, 3, 4, seed=2),
        )
        got = readout(features, shifts, state)
        torch.testing.assert_close(got, plain_readout(readout, features, shifts, state), atol=1e-5, rtol=1e-5)


def test_training_samples_the_neurons_own_gaussian():
    "On a map that is the x (or y) coordinate itself, responses are sampled coordinates."
    torch.manual_seed(0)
    readout = Gaussian2dReadout(2, 2, positions="free")
    x, y = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 5), indexing="xy")
    features = torch.stack([x, y])[None, :, None].repeat(1, 1, 40_000, 1, 1)
    sigma = torch.tensor([[0.1, 0.0], [0.05, 0.08]])
    with torch.no_grad():
        readout._mu.copy_(torch.tensor([0.2, -0.1]).expand(1, 2, 1, 2))
        readout.sigma.copy_(sigma.expand(1, 2, 2, 2))
        readout.features.copy_(torch.eye(2)[None])  # neuron 0 reports x, neuron 1 reports y
        drawn = readout(features)[0]
        assert torch.allclose(drawn.mean(1), torch.tensor([0.2, -0.1]), atol=0.002)
        assert torch.allclose(drawn.std(1), (sigma @ sigma.T).diagonal().sqrt(), atol=0.002)
        assert abs(np.corrcoef(drawn.numpy())[0, 1]) < 0.02  # each neuron draws for itself
        assert abs(np.corrcoef(drawn[0, :-1], drawn[0, 1:])[0, 1]) < 0.02  # anew in every frame
        readout.eval()
        torch.testing.assert_close(readout(features)[0, :, 0], torch.tensor([0.2, -0.1]))
        readout.train().sigma.mul_(1000)
        assert readout(features[:, :, :50]).abs().mean() > 0.95  # held at the edge, not lost beyond it


def test_free_positions_stay_on_the_map():
    readout = Gaussian2dReadout(2, 3, positions="free")
    with torch.no_grad():
        readout._mu.fill_(5.0)
    assert (readout.positions() == 1).all() and (readout._mu == 1).all()


def test_positions_ignore_unit_and_offset_of_coordinates():
    torch.manual_seed(0)
    readout, xyz = Gaussian2dReadout(4, 6), normal(6, 3)
    readout.set_coordinates(xyz)
    one = readout.positions().detach()
    readout.set_coordinates(xyz.numpy().astype(np.float64) * 1000 + 3000)
    torch.testing.assert_close(readout.positions().detach(), one, atol=1e-5, rtol=1e-4)
    assert standard_coordinates(xyz).abs().max() == 1
    assert (standard_coordinates(torch.ones(4, 2)) == 0).all()


def test_readout_keeps_full_precision_under_autocast():
    torch.manual_seed(0)
    readout = Gaussian2dReadout(8, 5, normal(5, 2), state_channels=4).eval()
    features, state = normal(1, 8, 3, 4, 6), normal(1, 4, 3, seed=1)
    with torch.no_grad():
        full = readout(features, None, state)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(readout(features, None, state), full)


def test_readout_warns_once_when_no_coordinates_were_given():
    readout = Gaussian2dReadout(4, 3)
    with pytest.warns(UserWarning, match="set_coordinates"):
        readout(normal(1, 4, 2, 3, 3))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        readout(normal(1, 4, 2, 3, 3))
        Gaussian2dReadout(4, 3, normal(3, 2))(normal(1, 4, 2, 3, 3))
        Gaussian2dReadout(4, 3).eval()(normal(1, 4, 2, 3, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gaussian2dReadout(4, 3, positions="grid"), '"predicted" or "free"'),
        (lambda: Gaussian2dReadout(4, 3, normal(4, 2)), "4 neurons"),
        (lambda: Gaussian2dReadout(4, 3, normal(3, 2), positions="free"), "free positions"),
        (lambda: Gaussian2dReadout(4, 3, torch.full((3, 2), torch.nan)), "3 of 3 neurons"),
        (lambda: standard_coordinates(normal(3, 1)), "2 or more"),
        (lambda: Gaussian2dReadout(4, 3).set_bias(np.zeros(2)), "(2,)"),
        (lambda: Gaussian2dReadout(4, 3, state_channels=2).eval()(normal(1, 4, 2, 3, 3)), "state encoder"),
        (lambda: initial_bias(np.array([1.0, np.nan])), "1 bad"),
        (lambda: initial_bias(np.ones(2), "tanh"), "exp, elu1, softplus"),
        (lambda: output_named("relu"), "relu"),
    ],
)
def test_errors_say_what_was_expected(make, words):
    with pytest.raises(DataError) as error:
        make()
    assert words in str(error.value)


@settings(max_examples=40, deadline=None)
@given(mean=st.floats(0.02, 80), name=st.sampled_from(sorted(OUTPUTS)))
def test_initial_bias_inverts_the_output(mean, name):
    got = OUTPUTS[name](initial_bias(np.array([mean]), name))
    assert float(got) == pytest.approx(mean, rel=1e-4)


def test_initial_bias_of_silent_and_negative_neurons_is_finite():
    for name in OUTPUTS:
        assert initial_bias(np.array([0.0, -3.0]), name).isfinite().all()
    assert elu1(torch.tensor([-50.0, 0.0, 3.0])).tolist() == pytest.approx([0.0, 1.0, 4.0])


def test_shifter_moves_within_the_map_and_frame_by_frame():
    torch.manual_seed(0)
    shifter, pupil = Shifter(), normal(2, 2, 7) * 100
    shifts = shifter(pupil)
    assert shifts.shape == pupil.shape and shifts.abs().max() <= 1
    torch.testing.assert_close(shifter(pupil[:, :, 3:4]), shifts[:, :, 3:4])
    assert [type(m).__name__ for m in Shifter(4, 2).mlp] == ["Linear", "Tanh"] * 2


def plain_modulator(name: str, modulator, raw, state) -> torch.Tensor:
    "Each variant of the published code, one response at a time."
    b, n, t = raw.shape
    out = torch.zeros_like(raw)
    for i in range(b):
        for neuron in range(n):
            for frame in range(t):
                own = [float(raw[i, neuron, f]) if f >= 0 else 0.0 for f in range(frame - 5, frame + 1)]
                now = state[i, :, frame]
                if name == "mlp":
                    gain = modulator.history_encoder(torch.tensor(own[:-1])).sigmoid()
                    offset = modulator.behavior_encoder(now)[neuron].tanh()
                    out[i, neuron, frame] = raw[i, neuron, frame] * gain + offset
                elif name == "mlp-v2":
                    past = [
                        float(state[i, channel, f]) if f >= 0 else 0.0
                        for channel in range(state.shape[1])
                        for f in range(frame - 5, frame + 1)
                    ]
                    offset = modulator.encoder(torch.tensor(own + past)).tanh()
                    out[i, neuron, frame] = raw[i, neuron, frame] + offset
                else:
                    out[i, neuron, frame] = raw[i, neuron, frame] + modulator.modulator(now)[neuron]
    return out


@pytest.mark.parametrize("name", sorted(MODULATORS))
def test_modulators_equal_the_plain_loop(name):
    torch.manual_seed(0)
    modulator, raw, state = MODULATORS[name](3), normal(2, 3, 8), normal(2, 4, 8, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(
            modulator(raw, state), plain_modulator(name, modulator, raw, state), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("name", "parameters"), [("mlp", 1191), ("mlp-v2", 481), ("mlp-v3", 908)])
def test_modulators_have_the_published_sizes(name, parameters):
    assert sum(p.numel() for p in MODULATORS[name](227).parameters()) == parameters


@pytest.mark.parametrize("name", sorted(MODULATORS))
def test_modulators_never_look_ahead(name):
    torch.manual_seed(0)
    modulator, raw, state = MODULATORS[name](3), normal(1, 3, 8), normal(1, 4, 8, seed=1)
    with torch.no_grad():
        before = modulator(raw, state)
        raw[..., 5:], state[..., 5:] = 9.0, 9.0
        torch.testing.assert_close(modulator(raw, state)[..., :5], before[..., :5])
