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

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cortexlit.core import provenance, write_json
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


def peak_mib(device: str) -> float:
    "Largest memory this process has held so far."
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    "Correlation over all values, and of the channel where it is lowest."
    channels = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, expected, strict=True)]
    together = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    return {"correlation": float(together), "lowest_channel_correlation": float(min(channels))}


def work(part: str, variant: str, args: argparse.Namespace) -> dict[str, object]:
    "Seconds, memory and output of one variant in this process."
    torch.set_num_threads(args.threads)
    function = prepared(part, variant, args.device)
    before, seconds, processor, out = peak_mib(args.device), [], [], None
    runs = 1 if part == "step" else args.runs  # a step takes long
    for _ in range(runs + 1):  # the first is not counted
        del out
        start, busy = time.perf_counter(), time.process_time()
        out = function()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    result = {"seconds": seconds[1:], "processor": processor[1:], "extra_mib": peak_mib(args.device) - before}
    if out is not None:
        first = VARIANTS[part][0]
        out = out[0].float().flatten(1).cpu().numpy()
        kept = Path(args.keep) / f"{part}.npy"
        if variant == first:
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
            job += ["--device", args.device]
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
            "ratio_of_memory": memory[first] / memory[variant],
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
    parser.add_argument("--parts", nargs="+", default=["tokenizer", "core", "step"], help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="processes started for each variant")
    parser.add_argument("--runs", type=int, default=3, help="timed runs in each process")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the core")
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
                more = ["compiled, float32", "compiled, bfloat16"] if args.compile and part == "core" else []
                cases += compare(part, variants + more, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    options = {"threads": args.threads, "rounds": args.rounds, "runs": args.runs, "device": device}
    write_json(args.out, {"cases": cases, "provenance": provenance(**options)})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if not k.endswith("_s")}))


if __name__ == "__main__":
    main()
