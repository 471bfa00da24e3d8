"""ViV1T's core written down plainly, to test and to time the library against.

Tubelets are copied out (unfold), normalised and projected one by one; the transformers run block by block over
the whole batch, with torch's own attention or with the attention weights written out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unfolded_tokens(tubelets: nn.Module, video: Tensor, state: Tensor | None = None) -> Tensor:
    "What `Tubelets.forward` computes, with every tubelet copied out."
    (pt, ph, pw), (st, sh, sw) = tubelets.patch, tubelets.stride
    if state is not None:
        video = torch.cat([video, state[..., None, None].expand(-1, -1, -1, *video.shape[3:])], 1)
    patches = video.unfold(2, pt, st).unfold(3, ph, sh).unfold(4, pw, sw)
    patches = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(2, 3)
    first, linear, last = tubelets.tokenizer.values()
    tokens = last(linear(first(patches)))
    return tokens + tubelets.spatial_pos_embedding + tubelets.temporal_pos_embedding[:, : tokens.shape[1]]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    "Attention with its weights as an array."
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_block(block: nn.Module, x: Tensor, attention: Callable) -> Tensor:
    "What `ParallelBlock.forward` computes in evaluation."
    inner = block.heads * block.head_dim
    *qkv, ff = block.fused_linear(block.norm(x)).split([inner] * 3 + [block.ff_out[2].in_features], -1)
    q, k, v = (part.unflatten(-1, (block.heads, block.head_dim)).transpose(1, 2) for part in qkv)
    attended = attention(q, k, v).transpose(1, 2).flatten(2)
    return x + block.attn_out(attended) + block.ff_out(ff)


def plain_core(
    core: nn.Module,
    video: Tensor,
    state: Tensor | None = None,
    tokens: Callable = unfolded_tokens,
    attention: Callable = F.scaled_dot_product_attention,
) -> Tensor:
    "What the core of `ViV1T` computes in evaluation: (batch, emb, T', H', W')."
    times, rows, columns = core.tokenizer.grid(video.shape[2])
    x = tokens(core.tokenizer, video, state).flatten(0, 1)
    for block in core.spatial_transformer.blocks:
        x = plain_block(block, x, attention)
    x = x.unflatten(0, (-1, times)).transpose(1, 2).flatten(0, 1)
    for block in core.temporal_transformer.blocks:
        x = plain_block(block, x, attention)
    return x.unflatten(0, (-1, rows, columns)).permute(0, 4, 3, 1, 2)
