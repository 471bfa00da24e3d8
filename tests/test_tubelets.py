"""Tubelets against the published tokens and against the way that copies every patch out."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tubelets import unfolded_tokens
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from cortexlit.core import DataError
from cortexlit.models.tubelets import Tubelets, folded, inverse_deviation

FIXTURE = Path(__file__).parent / "fixtures" / "viv1t_tiny.safetensors"
CHECKED = settings(max_examples=40, deadline=None)


def made(seed: int = 0, **options) -> Tubelets:
    "Tubelets none of whose weights are trivial, ready for evaluation."
    options = {"frames": 12, "size": (9, 12), "emb_dim": 6, "patch": (4, 3, 5), "state_channels": 2} | options
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = Tubelets(**options)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return layer.eval()


def clip(
    layer: Tubelets, frames: int, batch: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    "A random clip and state that fit the layer, the state on another level than the video."
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 1, frames, *layer.size, generator=generator)
    if not layer.state_channels:
        return video, None
    return video, 2 * torch.randn(batch, layer.state_channels, frames, generator=generator) + 1


# --- the published model --------------------------------------------------------------------------------


def test_tokens_are_the_published_ones():
    prefix = "state.core.vivit.tokenizer."
    with safe_open(FIXTURE, "pt") as f:
        c = json.loads(f.metadata()["config"])
        weights = {key[len(prefix) :]: f.get_tensor(key) for key in f.keys() if key.startswith(prefix)}
        video, expected = f.get_tensor("in.video"), f.get_tensor("out.tokens")
        state = torch.cat([f.get_tensor("in.behavior"), f.get_tensor("in.pupil_center")], 1)
    space = c["spatial_patch_size"]
    layer = Tubelets(
        c["frames"],
        (c["height"], c["width"]),
        emb_dim=c["emb_dim"],
        patch=(c["temporal_patch_size"], space, space),
        stride=(1, c["spatial_patch_stride"], c["spatial_patch_stride"]),
        max_frames=c["max_frame"],
    )
    layer.load_state_dict(weights)  # strict: the names and shapes are the published ones
    torch.testing.assert_close(layer.eval()(video, state), expected, rtol=0, atol=1e-5)


def test_published_size():
    layer = Tubelets(140, (36, 64), max_frames=300)
    assert layer.grid(140) == (116, 15, 29)
    assert layer.tokenizer["1"].normalized_shape == (6125,)
    assert layer.temporal_pos_embedding.shape == (1, 276, 1, 112)
    assert sum(p.numel() for p in layer.parameters()) == 778_218


# --- against unfolding ----------------------------------------------------------------------------------


@given(st.data())
@CHECKED
def test_any_size_equals_unfolding(data):
    patch = tuple(data.draw(st.integers(1, 5), label=f"patch {axis}") for axis in "tyx")
    stride = tuple(data.draw(st.integers(1, 4), label=f"stride {axis}") for axis in "tyx")
    frames, *size = (p + data.draw(st.integers(0, 6), label="room") for p in patch)
    layer = made(
        frames=frames,
        size=tuple(size),
        patch=patch,
        stride=stride,
        state_channels=data.draw(st.integers(0, 4), label="state"),
        max_frames=frames + data.draw(st.integers(0, 5), label="spare frames"),
    )
    video, state = clip(layer, frames, batch=data.draw(st.integers(1, 3), label="batch"))
    expected = unfolded_tokens(layer.double(), video.double(), None if state is None else state.double())
    found = layer.float()(video, state)
    times, rows, columns = layer.grid(frames)
    assert found.shape == (len(video), times, rows * columns, 6)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=5e-4)


def test_tubelets_of_one_frame_equal_unfolding():
    for stride in range(1, 4):  # a convolution over one channel went wrong with stride 2
        layer = made(frames=1, size=(4, 3), patch=(1, 2, 3), stride=(1, 1, stride), state_channels=1)
        video, state = clip(layer, 1, batch=3)
        torch.testing.assert_close(
            layer(video, state), unfolded_tokens(layer, video, state), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("channels", [0, 3])
def test_gradients_of_weights_and_inputs_equal_unfolding(channels):
    layer = made(state_channels=channels)
    grads = []
    for tokens in (Tubelets.forward, unfolded_tokens):
        video, state = clip(layer, 11, batch=2)
        inputs = [x.requires_grad_() for x in (video, state) if x is not None]
        layer.zero_grad()
        out = tokens(layer, video, state)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([p.grad.clone() for p in [*layer.parameters(), *inputs]])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_each_sample_by_itself():
    layer = made()
    video, state = clip(layer, 12, batch=3)
    video[1] += 50  # its own level must not reach its neighbours
    together = layer(video, state)
    alone = torch.cat([layer(video[i : i + 1], state[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_token_sees_its_tubelet_only():
    layer = made()
    video, state = clip(layer, 12)
    changed = video.clone()
    changed[:, :, 7:] += torch.randn(5, 9, 12, generator=torch.Generator().manual_seed(1))
    same = (layer(video, state) - layer(changed, state)).abs().amax((0, 2, 3)) < 1e-4
    assert same.tolist() == [True] * 4 + [False] * 5  # windows 0..3 end before frame 7


# --- numbers that are hard ------------------------------------------------------------------------------


@pytest.mark.parametrize("level, tolerance", [(0, 2e-5), (100, 1e-3), (-3000, 2e-2)])
def test_a_level_common_to_all_values_costs_no_more_than_rounding_the_input(level, tolerance):
    layer = made()
    video, state = clip(layer, 12)
    torch.testing.assert_close(
        layer(video + level, state + level), layer(video, state), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("level", [0.0, 0.5, 200.0])
def test_a_grey_clip_gives_finite_tokens(level):
    layer = made(state_channels=0)
    video = torch.full((1, 1, 12, 9, 12), level)
    torch.testing.assert_close(layer(video), unfolded_tokens(layer, video), rtol=0, atol=1e-3)


def test_a_grey_corner_beside_strong_contrast():
    layer = made(state_channels=0)
    video, _ = clip(layer, 12)
    video[..., :6, :7] = 1.5
    expected = unfolded_tokens(layer.double(), video.double()).float()
    torch.testing.assert_close(layer.float()(video), expected, rtol=0, atol=5e-3)


def test_a_bright_grey_corner_gives_finite_tokens():
    layer = made(state_channels=0)
    video, _ = clip(layer, 12)
    video[..., :6, :7] = 1234.5  # rounding makes the variance of these tubelets fall below zero
    assert layer(video).isfinite().all()


def test_inverse_deviation_is_torch_std():
    layer = made(patch=(4, 3, 3))
    video, state = clip(layer, 9)
    found = inverse_deviation(video, state, (4, 3, 3), (1, 2, 2), 0.0)
    box = torch.cat([video[0, :, 2:6, 4:7, 6:9], state[0, :, 2:6, None, None].expand(-1, -1, 3, 3)])
    torch.testing.assert_close(1 / found[0, 2, 2, 3], box.std(correction=0))


def test_folded_rows_sum_to_zero():
    layer = made()
    video_kernel, state_kernel, constant = folded(layer.tokenizer["1"], layer.tokenizer["2"], layer.patch)
    assert video_kernel.shape == (6, 4, 3, 5) and state_kernel.shape == (6, 2, 4) and constant.shape == (6,)
    total = video_kernel.sum((1, 2, 3)) + state_kernel.sum((1, 2))
    torch.testing.assert_close(total, torch.zeros(6), rtol=0, atol=1e-5)


# --- precision, dropout, memory -------------------------------------------------------------------------


def test_autocast_changes_nothing():
    layer = made()
    inputs = clip(layer, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(*inputs)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, layer(*inputs), rtol=0, atol=0)


def test_bfloat16_weights_and_inputs():
    layer, inputs = made(), clip(made(), 12)
    expected = layer(*inputs)
    found = layer.bfloat16()(*(x.bfloat16() for x in inputs))
    assert found.dtype == torch.bfloat16
    assert torch.corrcoef(torch.stack([found.float().flatten(), expected.flatten()]))[0, 1] > 0.999


def test_dropout_in_training_only_and_not_of_positions():
    layer = made(dropout=0.5)
    inputs = clip(layer, 12)
    torch.testing.assert_close(layer(*inputs), layer(*inputs), rtol=0, atol=0)
    dropped = layer.train()(*inputs) - layer.spatial_pos_embedding - layer.temporal_pos_embedding[:, :9]
    assert 0.4 < (dropped.abs() < 1e-5).float().mean() < 0.6


class Largest(TorchDispatchMode):
    "Remembers the largest storage that any operation returned."

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_no_array_of_patches_is_made():
    layer = made(frames=40, size=(36, 64), emb_dim=16, patch=(15, 7, 7), stride=(1, 2, 2), state_channels=4)
    inputs = clip(layer, 40)
    sizes = []
    for tokens in (Tubelets.forward, unfolded_tokens):
        with Largest() as largest:
            tokens(layer, *inputs).sum().backward()
        sizes.append(largest.bytes)
    assert sizes[1] == 26 * 435 * 5 * 15 * 49 * 4
    assert sizes[0] * 50 < sizes[1]


# --- errors ---------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused():
    layer = made(max_frames=14)
    video, state = clip(layer, 12)
    for bad, words in [
        ((video[:, :, :3], state[..., :3]), "4 to 14 frames"),
        (clip(layer, 15), "4 to 14 frames"),
        ((video[..., :11], state), r"\(batch, 1, frames, 9, 12\)"),
        ((video[:, 0], state), r"\(batch, 1, frames, 9, 12\)"),
        ((video.expand(-1, 2, -1, -1, -1), state), r"\(batch, 1, frames, 9, 12\)"),
        ((video, state[:, :1]), r"\(1, 2, 12\)"),
        ((video, state[..., 1:]), r"\(1, 2, 12\)"),
        ((video, None), "state of shape None"),
    ]:
        with pytest.raises(DataError, match=words):
            layer(*bad)
    with pytest.raises(DataError, match="None"):
        made(state_channels=0)(video, state)
    with pytest.raises(DataError, match="fit in the clip"):
        Tubelets(10, (6, 64), patch=(4, 7, 7))


def test_the_longest_clip_with_a_stride_in_time():
    layer = made(frames=13, stride=(3, 1, 1))
    assert layer.grid(13)[0] == 4 and layer.grid(15)[0] == 4
    assert layer(*clip(layer, 15)).shape[1] == 4
    with pytest.raises(DataError, match="4 to 15 frames"):
        layer(*clip(layer, 16))
