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
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_viv1t import agreement, peak_mib

from cortexlit.core import provenance, write_json
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


def work(part: str, variant: str, args: argparse.Namespace) -> dict[str, object]:
    "Seconds, memory and output of one variant in this process."
    torch.set_num_threads(args.threads)
    function = prepared(part, variant, args)
    before, seconds, processor, out = peak_mib(args.device), [], [], None
    for _ in range(args.runs + 1):  # the first is not counted
        del out
        start, busy = time.perf_counter(), time.process_time()
        out = function()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    result = {"seconds": seconds[1:], "processor": processor[1:], "extra_mib": peak_mib(args.device) - before}
    if out is not None:
        kept = Path(args.keep) / f"{part}.npy"
        out = out[0].float().flatten(1).cpu().numpy()
        if variant == VARIANTS[part][0]:
            np.save(kept, out)
        elif part == "core":
            result |= agreement(out, np.load(kept))
        else:
            result["largest_difference"] = float(np.abs(out - np.load(kept)).max())
    return result


def compare(part: str, variants: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    "All variants of a part in turn, each in its own process; one case for each but the first."
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    processor: dict[str, list[float]] = {variant: [] for variant in variants}
    memory = {variant: 0.0 for variant in variants}
    facts: dict[str, dict] = {}
    for _ in range(args.rounds):
        for variant in variants:
            job = [sys.executable, __file__, "--worker", part, variant, "--keep", args.keep]
            job += ["--device", args.device, "--batch", str(args.batch)]
            job += ["--runs", str(args.runs), "--threads", str(args.threads)]
            done = subprocess.run(job, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{part}: {variant}\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            seconds[variant] += result.pop("seconds")
            processor[variant] += result.pop("processor")
            memory[variant] = max(memory[variant], result.pop("extra_mib"))
            facts[variant] = result
            least = f"{min(seconds[variant]):.3f} s, processor {min(processor[variant]):.3f} s"
            print(f"{part}: {variant}: {least}, {memory[variant]:.0f} MiB", file=sys.stderr)
    first = variants[0]
    return [
        {
            "part": part,
            "variant": variant,
            "straightforward_s": seconds[first],
            "variant_s": seconds[variant],
            "ratio_of_medians": statistics.median(seconds[first]) / statistics.median(seconds[variant]),
            "ratio_of_minima": min(seconds[first]) / min(seconds[variant]),
            "ratio_of_processor_time": min(processor[first]) / min(processor[variant]),
            "straightforward_extra_mib": memory[first],
            "extra_mib": memory[variant],
            "ratio_of_memory": memory[first] / max(memory[variant], 1.0),
            **facts[variant],
        }
        for variant in variants[1:]
    ]


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--parts", nargs="+", default=["attention", "core", "step"], help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="processes started for each variant")
    parser.add_argument("--runs", type=int, default=3, help="timed runs in each process")
    parser.add_argument("--batch", type=int, default=2, help="images at once")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--worker", nargs=2, metavar=("PART", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker, args)))
        return
    if not args.out:
        parser.error("--out is needed")
    cases = []
    with tempfile.TemporaryDirectory() as args.keep:
        for part, variants in VARIANTS.items():
            if part.split()[0] in args.parts:
                cases += compare(part, variants, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    options = {"threads": args.threads, "rounds": args.rounds, "runs": args.runs, "batch": args.batch}
    write_json(args.out, {"cases": cases, "provenance": provenance(**options, device=device)})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if not k.endswith("_s")}))


if __name__ == "__main__":
    main()
