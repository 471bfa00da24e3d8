"""Time and peak memory of ViV1T at the published size against its straightforward implementation.

python benchmarks/bench_viv1t.py --out FILE.json [--parts tokenizer core step] [--rounds 3] [--device cpu]

One clip of 140 frames at 36 x 64 pixels, five channels, core of 2,916,074 parameters, 227 neurons. Every variant
runs in a process of its own (so that its peak memory is its own), all variants in turn, `--rounds` times; the
ratios are those of medians and of minima over all runs, and of the least processor time (all threads together),
which other programs on the machine disturb less. The straightforward implementation is
tests/reference_tubelets.py: tubelets copied out, whole batch block by block, torch's attention, float32.

tokenizer: tokens from a clip, forward alone, and forward with backward.
core:      the core's forward pass, one improvement added at a time, with the correlation to the straightforward output.
step:      a training step of the whole model (forward, backward, AdamW), with and without activation checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import side_by_side
import torch

from cortexlit.models import layers
from cortexlit.models.viv1t import ViV1T, ViV1TConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference_tubelets import plain_core, unfolded_tokens, written_out  # noqa: E402

# part -> variants; the first of each part is what the others are compared with
VARIANTS = {
    "tokenizer forward": ["straightforward", "library"],
    "tokenizer forward+backward": ["straightforward", "library"],
    "core": [
        "straightforward, float32",
        "attention written out, float32",
        "folded tokenizer, float32",
        "library, float32",
        "straightforward, bfloat16",
        "folded tokenizer, bfloat16",
        "library unsplit, bfloat16",
        "library, bfloat16",
    ],
    "step": [
        "straightforward, float32",
        "library, float32",
        "library, float32, checkpointing",
        "library, bfloat16",
        "library, bfloat16, checkpointing",
        "library, bfloat16, head only",
    ],
}


def published(device: str) -> tuple[ViV1T, dict[str, torch.Tensor]]:
    "The published model with random weights of a size at which attention is not uniform, and one random clip."
    torch.manual_seed(0)
    model = ViV1T(ViV1TConfig(neurons={"A": 227}))
    with torch.no_grad():
        for module in model.core.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
    batch = {
        "video": torch.rand(1, 1, 140, 36, 64),
        "behavior": torch.rand(1, 2, 140),
        "pupil_center": torch.rand(1, 2, 140),
        "labels": torch.rand(1, 227, 140),
    }
    return model.to(device), {name: x.to(device) for name, x in batch.items()}


def folded_tokens(tokenizer: torch.nn.Module, video: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    "The library's tokenizer, to be put into the straightforward core."
    return tokenizer(video, state)


def prepared(part: str, variant: str, device: str) -> Callable[[], torch.Tensor | None]:
    "The function to be timed."
    model, batch = published(device)
    video, state = batch["video"], torch.cat([batch["behavior"], batch["pupil_center"]], 1)
    core, half = model.core, "bfloat16" in variant

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=half)

    if part.startswith("tokenizer"):
        core.eval()
        tokens = unfolded_tokens if variant == "straightforward" else folded_tokens
        if part == "tokenizer forward":
            return torch.no_grad()(lambda: tokens(core.tokenizer, video, state))
        gradient = torch.randn(1, 116, 435, 112, device=device)

        def both_ways() -> None:
            model.zero_grad()
            tokens(core.tokenizer, video, state).backward(gradient)

        return both_ways

    if part == "core":
        core.eval()
        if "unsplit" in variant:
            layers.TOKENS_AT_ONCE = sys.maxsize
        options = {"tokens": folded_tokens} if variant.startswith("folded") else {}
        if variant.startswith("attention"):
            options["attention"] = written_out
        plain = not variant.startswith(("library", "compiled"))
        run = torch.compile(core) if variant.startswith("compiled") else core

        @torch.no_grad()
        def forward() -> torch.Tensor:
            with autocast():
                return plain_core(core, video, state, **options) if plain else run(video, state)

        return forward

    model.train()
    if "head" in variant:
        model.freeze_core()
    if "checkpointing" in variant:
        model.gradient_checkpointing_enable()
    if variant.startswith("straightforward"):
        model.core.forward = lambda video, state: plain_core(core, video, state)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    "Command line."
    parser = side_by_side.parser(__doc__, ["tokenizer", "core", "step"])
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the core")
    args = parser.parse_args()
    if args.compile:
        VARIANTS["core"] += ["compiled, float32", "compiled, bfloat16"]
    if args.worker and args.worker[0] == "step":
        args.runs = 1  # a step takes long
    side_by_side.run(args, VARIANTS, lambda part, variant: prepared(part, variant, args.device))


if __name__ == "__main__":
    main()
