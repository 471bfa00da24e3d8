"""Attention and the blocks of ViV1T: against plain formulas, the published weights, and what breaks in practice."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread, get_ident

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Process
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cortexlit.core import DataError
from cortexlit.models import attention, layers
from cortexlit.models.attention import attend, attention_weights
from cortexlit.models.layers import DropPath, ParallelBlock, Projection, Transformer

PUBLISHED = Path(__file__).parent / "fixtures" / "viv1t_tiny.safetensors"
SIZES = dict(dim=16, heads=3, head_dim=8, mlp_dim=20)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(
    dtype: torch.dtype, samples: int = 5, heads: int = 3, queries: int = 17, keys: int = 13
) -> list[Tensor]:
    return [numbers(samples, heads, n, 8, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys))]


def with_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    pull = numbers(*out.shape, seed=9, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, pull)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k) @ v


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention._ChunkedAttention.apply(q, k, v)[0]


# attention


def test_weights_against_torch_and_the_known_example():
    two, values = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.660477, 2.660477], [2.339523, 3.339523]])
    torch.testing.assert_close(attention_weights(two, two) @ values, expected, atol=1e-6, rtol=0)
    assert torch.equal((attention_weights(two, two, causal=True) @ values)[0], values[0])
    q, k, v = qkv(torch.float32)
    torch.testing.assert_close(plain(q, k, v), F.scaled_dot_product_attention(q, k, v))


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(0, 6), heads=st.integers(1, 4), queries=st.integers(1, 9), keys=st.integers(1, 9),
    room=st.sampled_from([1, 40, 1 << 20]), threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_chunks_and_threads_change_nothing(samples, heads, queries, keys, room, threads):
    before = torch.get_num_threads(), attention.WEIGHTS_AT_A_TIME
    torch.set_num_threads(threads)
    attention.WEIGHTS_AT_A_TIME = room
    try:
        inputs = qkv(torch.float64, samples, heads, queries, keys)
        for ours, exact in zip(with_gradients(chunked, inputs), with_gradients(plain, inputs), strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)  # row sums are kept in float32
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before[0])
        attention.WEIGHTS_AT_A_TIME = before[1]


def test_bfloat16_is_as_close_as_torchs(two_threads):
    inputs = qkv(torch.bfloat16, samples=6, queries=50, keys=40)
    reference = with_gradients(F.scaled_dot_product_attention, [x.float() for x in inputs])
    ours = with_gradients(attend, inputs)
    torchs = with_gradients(F.scaled_dot_product_attention, inputs)
    for a, b, exact in zip(ours, torchs, reference, strict=True):
        assert a.dtype == torch.bfloat16
        error, limit = ((x.float() - exact).norm() / exact.norm() for x in (a, b))
        assert error < max(4 * limit, 0.01)


def test_output_lies_as_the_next_layer_needs_it():
    "(samples, queries, heads * head_dim) must be a view of it: the block would copy otherwise."
    out = attend(*qkv(torch.bfloat16))
    assert out.transpose(1, 2).flatten(-2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("factor", [40, -40])
def test_scores_beyond_the_range_go_to_torch(factor):
    q, k, v = qkv(torch.bfloat16)
    q[0, 0], k[0, 0] = 5.0, factor  # all scores of one head: sums overflow, or vanish
    assert attention._ChunkedAttention.apply(q, k, v)[1] is False
    for ours, torchs in zip(
        with_gradients(attend, [q, k, v]),
        with_gradients(F.scaled_dot_product_attention, [q, k, v]),
        strict=True,
    ):
        assert ours.isfinite().all() and torch.equal(ours, torchs)


def test_nan_is_not_hidden():
    q, k, v = qkv(torch.bfloat16)
    q[1, 1, 1] = torch.nan
    assert attend(q, k, v)[1, 1, 1].isnan().all() and attend(q, k, v)[0].isfinite().all()


def test_every_mode_of_autograd(two_threads):
    inputs = qkv(torch.bfloat16)
    expected = attend(*inputs)
    with torch.inference_mode():
        assert torch.equal(attend(*inputs), expected)
        assert torch.equal(attend(*[x + 0 for x in inputs]), expected)
    leaf = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        assert not attend(*leaf).requires_grad
    (slope,) = torch.autograd.grad(attend(*leaf).float().square().sum(), leaf[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_threads_made_later_keep_the_setting(two_threads):
    "The workers compute with one thread each; nobody else may inherit that."
    attention._workers.cache_clear()
    attend(*qkv(torch.bfloat16))
    seen = []
    later = Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2] and torch.get_num_threads() == 2


def test_called_from_several_threads_at_once(two_threads):
    inputs = qkv(torch.bfloat16, samples=20, queries=60, keys=60)
    expected, results = attend(*inputs), []
    threads = [Thread(target=lambda: results.append(attend(*inputs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


def forks() -> None:
    torch.set_num_threads(2)
    x = torch.ones(4, 1, 3, 8, dtype=torch.bfloat16)
    attend(x, x, x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if torch.equal(attend(x, x, x), x) else 1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_survives_a_fork(tmp_path):
    "A forked process (a DataLoader worker) inherits the pool, but none of its threads."
    code, told = Process(tmp_path, forks).ended()
    assert code == 0, told


# blocks


def published_stack(state: dict[str, Tensor], name: str) -> Transformer:
    stack, prefix = Transformer(2, **SIZES), f"state.core.vivit.{name}."
    inert = ("scale", "keep_prob")  # constants which the published code stores as buffers
    weights = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith(inert)
    }
    stack.load_state_dict(weights, strict=True)
    return stack.eval()


def test_published_weights_give_the_published_core():
    state = load_file(PUBLISHED)
    tokens = state["out.tokens"]  # samples, moments, places, channels
    samples, moments, places, _ = tokens.shape
    spatial, temporal = (published_stack(state, f"{name}_transformer") for name in ("spatial", "temporal"))
    with torch.no_grad():
        core = spatial(tokens.flatten(0, 1)).unflatten(0, (samples, moments)).transpose(1, 2)
        core = temporal(core.flatten(0, 1)).unflatten(
            0, (samples, places)
        )  # samples, places, moments, channels
    core = core.permute(0, 3, 2, 1).unflatten(-1, state["out.core"].shape[-2:])
    torch.testing.assert_close(core, state["out.core"], atol=1e-5, rtol=0)


def test_parameters_of_the_published_size():
    block = ParallelBlock(dim=112, heads=11, head_dim=48, mlp_dim=136)
    assert sum(p.numel() for p in block.parameters()) == 267_232
    assert {name: tuple(p.shape) for name, p in block.state_dict().items()} == {
        "norm.weight": (112,),
        "norm.bias": (112,),
        "fused_linear.weight": (1720, 112),
        "attn_out.weight": (112, 528),
        "ff_out.2.weight": (112, 136),
    }


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4), head_dim=st.integers(1, 5), mlp=st.integers(1, 7), tokens=st.integers(1, 6),
    activation=st.sampled_from(["gelu", "relu"]),
)  # fmt: skip
def test_block_against_the_formula(heads, head_dim, mlp, tokens, activation):
    block = ParallelBlock(6, heads, head_dim, mlp, activation).double().eval()
    for i, p in enumerate(block.parameters()):
        p.data = numbers(*p.shape, seed=i, dtype=torch.float64)
    x = numbers(2, tokens, 6, dtype=torch.float64)
    normed = F.layer_norm(x, (6,), block.norm.weight, block.norm.bias)
    q, k, v, hidden = (normed @ w.T for w in block.fused_linear.weight.split(block.sizes))
    expected = x + getattr(F, activation)(hidden) @ block.ff_out[2].weight.T
    for head in range(heads):
        at = slice(head * head_dim, (head + 1) * head_dim)
        expected = expected + plain(q[..., at], k[..., at], v[..., at]) @ block.attn_out.weight[:, at].T
    torch.testing.assert_close(block(x), expected)


def test_unknown_activation():
    with pytest.raises(DataError, match="gelu, relu"):
        ParallelBlock(**SIZES, activation="sine")


def test_layers_are_called_so_that_adapters_work():
    "LoRA replaces or wraps these modules: using only their weights would skip the adapter."
    block, called = ParallelBlock(**SIZES), []
    for name in ("fused_linear", "attn_out", "ff_out.2"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    block(numbers(2, 5, 16))
    assert sorted(called) == ["attn_out", "ff_out.2", "fused_linear"]


def test_autocast_keeps_the_stream_in_float32():
    stack = Transformer(3, **SIZES).eval()
    for p in stack.parameters():
        p.data = p.data * 4 if p.ndim == 2 else p.data
    x = numbers(4, 30, 16)
    with torch.no_grad():
        exact = stack(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = stack(x)
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.999


def test_dropout_acts_on_the_attended_values_and_hidden_units():
    block = ParallelBlock(**SIZES, attention_dropout=0.4, ff_dropout=0.2)
    fed = {}
    block.attn_out.register_forward_pre_hook(lambda _, x: fed.update(attention=x[0]))
    block.ff_out[2].register_forward_pre_hook(lambda _, x: fed.update(ff=x[0]))
    x = numbers(50, 20, 16)
    block.train()(x)
    assert (fed["attention"] == 0).float().mean() == pytest.approx(0.4, abs=0.02)
    assert (fed["ff"] == 0).float().mean() == pytest.approx(0.2, abs=0.02)
    block.eval()(x)
    assert (fed["attention"] == 0).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_decides_once_per_sample(dtype):
    torch.manual_seed(0)
    kept = DropPath(0.3)(torch.ones(20_000, 2, 3, dtype=dtype))
    assert kept.dtype == dtype
    assert (kept == kept[:, :1, :1]).all()
    assert kept.float().mean() == pytest.approx(1, abs=0.02)
    assert (kept == 0).float().mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_drop_path_wants_a_probability(p):
    with pytest.raises(DataError, match="0 <= p < 1"):
        DropPath(p)


def test_branches_are_dropped_independently():
    block = ParallelBlock(**SIZES, drop_path=0.5)
    x = numbers(400, 3, 16)
    torch.manual_seed(0)
    added = block(x) - x
    block.eval()
    q, k, v, hidden = block._project(x)
    attended, ff = block.attn_out(attend(q, k, v).transpose(1, 2).flatten(-2)), block.ff_out(hidden)
    cases = [
        sum(torch.allclose(a, wanted, atol=1e-6) for a, wanted in zip(added, target, strict=True))
        for target in (2 * attended + 2 * ff, 2 * attended, 2 * ff, 0 * ff)
    ]
    assert sum(cases) == 400 and min(cases) > 60


def runs_and_gradients(stack: Transformer, x: Tensor) -> tuple[int, list[Tensor]]:
    runs = []
    hooks = [block.norm.register_forward_hook(lambda *_: runs.append(1)) for block in stack.blocks]
    torch.manual_seed(3)
    stack(x).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return len(runs), [p.grad for p in stack.parameters()]


@pytest.mark.parametrize("half", [False, True])
def test_checkpointing_gives_the_same_gradients(half):
    plain_stack = Transformer(3, **SIZES, attention_dropout=0.3, ff_dropout=0.1, drop_path=0.2)
    lean_stack = copy.deepcopy(plain_stack)
    lean_stack.gradient_checkpointing = True
    x = numbers(4, 9, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        runs, gradients = runs_and_gradients(plain_stack, x)
        more, again = runs_and_gradients(lean_stack, x)
    assert (runs, more) == (3, 6)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    lean_stack.eval()
    assert runs_and_gradients(lean_stack, x)[0] == 3  # nothing to trade outside training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_taken_in_parts_gives_the_same_result_and_gradients(checkpointing, monkeypatch):
    stack, x = Transformer(2, **SIZES), numbers(7, 5, 16)
    stack.gradient_checkpointing = checkpointing
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    results = []
    for tokens, calls in [(7 * 5, 1), (3 * 5, 3), (1, 7)]:
        monkeypatch.setattr(layers, "TOKENS_AT_ONCE", tokens)
        stack.zero_grad()
        runs, gradients = runs_and_gradients(stack, x)
        assert runs == 2 * calls * (1 + checkpointing)
        results.append([stack(x).detach(), *(gradient.clone() for gradient in gradients)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [1, 3 * 5, 1 << 11])
def test_threads_share_the_parts_where_no_gradients_are_wanted(half, tokens, monkeypatch, two_threads):
    stack, x = Transformer(2, **SIZES, ff_dropout=0.3).eval(), numbers(7, 5, 16)
    used = set()
    stack.blocks[0].norm.register_forward_hook(lambda *_: used.add((get_ident(), torch.get_num_threads())))
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = stack(x).detach()
        assert used == {(get_ident(), 2)}
        for mode in (torch.no_grad, torch.inference_mode):
            used.clear()
            with mode():
                found = stack(
                    x.transpose(0, 1).contiguous().transpose(0, 1)
                )  # a view, as the temporal stack gets
            assert 1 <= len(used) <= 2 and get_ident() not in {thread for thread, _ in used}
            assert {threads for _, threads in used} == {1}
            close = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(found, expected, **close)
        with torch.no_grad():  # dropout draws from one generator, in one order
            torch.manual_seed(0)
            first = stack.train()(x)
            torch.manual_seed(0)
            assert torch.equal(stack(x), first)


def test_a_failure_in_a_thread_is_seen(two_threads):
    stack = Transformer(1, **SIZES).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        stack(numbers(4, 5, 17))


def test_attention_maps_are_those_of_the_forward_pass():
    stack = Transformer(2, **SIZES).eval()
    x = numbers(2, 7, 16)
    maps = stack.attention_maps(x)
    assert maps.shape == (2, 2, 3, 7, 7) and not maps.requires_grad
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3, 7))
    block = stack.blocks[1]
    inner = stack.blocks[0](x)
    q, k, v, _ = block._project(inner)
    torch.testing.assert_close(maps[1] @ v, attend(q, k, v))


@pytest.mark.parametrize("samples", [0, 1, 3, 20])
def test_a_projection_is_a_linear(samples):
    project, x = Projection(16, 24), numbers(samples, 5, 16).requires_grad_()
    results = []
    for function in (project, lambda x: F.linear(x, project.weight)):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, project.weight])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(project, nn.Linear) and list(project.state_dict()) == ["weight"]
    half = project.bfloat16()(x.bfloat16())
    torch.testing.assert_close(half, F.linear(x.bfloat16(), project.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert project.float()(x).dtype == torch.bfloat16


def test_an_empty_stack_is_the_identity():
    x = numbers(1, 2, 16)
    assert Transformer(0, **SIZES)(x) is x
    assert isinstance(Transformer(1, **SIZES).blocks, nn.ModuleList)


@pytest.mark.parametrize("learns", [True, False])
def test_a_frozen_projection_does_not_keep_its_input(learns):
    project, x, kept = Projection(6, 4).requires_grad_(learns), torch.randn(2, 5, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = project(x)
    assert (x.numel() in kept) == learns
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, project.weight.sum(0).expand_as(x))
