"""Time and peak memory of V1T's attention at the published size against the explicit softmax as published.

python benchmarks/bench_v1t.py --out FILE.json [--parts attention core step] [--rounds 3] [--batch 2] [--device cpu]

Images of 36 x 64 pixels: 1654 tokens, 4 heads of width 155, 4 blocks. Every variant runs in a process of its own (so
that its peak memory is its own), all variants in turn, `--rounds` times; the ratios are those of medians and of minima
over all runs, and of the least processor time (all threads together), which other programs on the machine disturb less.
The explicit variant multiplies queries and keys, takes the softmax, drops weights and multiplies with the values;
the fused one is torch's scaled_dot_product_attention, which the library takes, but for dropped weights on a CPU.

attention: one layer's attention on queries, keys, values: forward; forward and backward, without and with dropout.
core:      the core's forward pass without gradient.
step:      a training step of the whole model (forward, backward, AdamW) with the published dropouts, float32 and
           bfloat16, and with the blocks computed again in the backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import side_by_side
import torch

from cortexlit.models import v1t
from cortexlit.models.v1t import V1T, V1TConfig

DROPOUT = V1TConfig().dropout
# part -> variants; the first of each part is what the others are compared with
VARIANTS = {
    "attention forward": ["explicit", "library"],
    "attention forward+backward": ["explicit", "library"],
    "attention forward+backward, dropout": ["explicit", "fused", "library"],
    "core": ["explicit, float32", "library, float32", "explicit, bfloat16", "library, bfloat16"],
    "step": [
        "explicit, float32",
        "fused, float32",
        "library, float32",
        "library, float32, checkpointing",
        "library, bfloat16",
    ],
}


def explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0, local: bool = False
) -> torch.Tensor:
    "Attention written out, in place of `v1t.attention`."
    assert not local
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.nn.functional.dropout(weights, dropout) @ v


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0, local: bool = False
) -> torch.Tensor:
    "Torch's attention, in place of `v1t.attention`."
    assert not local
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def published(batch: int, device: str) -> tuple[V1T, dict[str, torch.Tensor]]:
    "The published model with random weights of a size at which attention is not uniform, and random images."
    torch.manual_seed(0)
    model = V1T(V1TConfig())
    with torch.no_grad():
        for module in model.core.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
    fields = {"image": torch.randn(batch, 1, 36, 64), "behavior": torch.randn(batch, 3)}
    fields |= {"pupil_center": torch.randn(batch, 2), "labels": torch.rand(batch, 174)}
    return model.to(device), {name: value.to(device) for name, value in fields.items()}


def prepared(part: str, variant: str, args: argparse.Namespace) -> Callable[[], torch.Tensor | None]:
    "The function to be timed."
    for other in (explicit, fused):
        if variant.startswith(other.__name__):
            v1t.attention = other
    model, batch = published(args.batch, args.device)

    def autocast() -> torch.autocast:
        return torch.autocast(args.device, torch.bfloat16, enabled="bfloat16" in variant)

    if part.startswith("attention"):
        with torch.no_grad():
            q, k, v = model.core.blocks[0].mha._project(model.core.patch_embedding(batch["image"]))
        if part == "attention forward":
            return torch.no_grad()(lambda: v1t.attention(q, k, v))
        dropout = DROPOUT if "dropout" in part else 0.0
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        pull = torch.randn_like(v)

        def both_ways() -> torch.Tensor | None:
            gradients = torch.autograd.grad(v1t.attention(*inputs, dropout), inputs, pull)
            return None if dropout else torch.stack(gradients, 1).flatten(2, 3)  # what is dropped differs

        return both_ways

    if part == "core":
        model.eval()
        fields = {name: value for name, value in batch.items() if name != "labels"}

        @torch.no_grad()
        def forward() -> torch.Tensor:
            with autocast():
                return model.encode(**fields)

        return forward

    model.train()
    if "checkpointing" in variant:
        model.core.gradient_checkpointing = True
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    "Command line."
    parser = side_by_side.parser(__doc__, ["attention", "core", "step"])
    parser.add_argument("--batch", type=int, default=2, help="images at once")
    args = parser.parse_args()
    side_by_side.run(args, VARIANTS, lambda part, variant: prepared(part, variant, args), batch=args.batch)


if __name__ == "__main__":
    main()
