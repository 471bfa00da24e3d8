"""Time and memory of a training step with adapters, against full fine-tuning, and with kept tokens.

python benchmarks/bench_lora.py --out FILE.json [--rounds 2] [--steps 2] [--threads 2] [--device cpu] [--in-turn] [--frames 140]

published: the published size, one clip of 140 frames. Adapters are those of study 1. Full fine-tuning is what the
           others are compared with; "by peft" computes the adapted layers as peft itself does.
demo:      the demonstration core, a batch of the ten repeats of one clip (the core runs once for them), float32.
Every variant runs in a process of its own, all in turn, `--rounds` times; the ratios are those of medians, of time
and of processor time (all threads together), which other programs on the machine disturb less. With `--in-turn` the
steps of all variants alternate in one process, so that all of them meet the same disturbance, and processes of their
own measure only memory; `--frames` cuts the clip of the published size, whose steps take half a minute. Losses are recorded,
so that variants which must agree can be seen to. `--precision` holds for all variants of the published size; a
processor without bfloat16 in hardware multiplies it many times slower than float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from bench_viv1t import published
from peft.tuners import lora
from side_by_side import peak_mib

from cortexlit.core import provenance, write_json
from cortexlit.models.adapters import Adapters, add_adapters
from cortexlit.models.viv1t import ViV1T
from cortexlit.training.pretraining import demo_core

VARIANTS = {
    "published": ["full", "r8-all", "r8-all, kept tokens", "r8-all, by peft", "r8-fused", "r32-all"],
    "demo": ["full", "r8-all", "r8-all, kept tokens", "r8-all, core once per repeat"],
}


def demo(device: str) -> tuple[ViV1T, dict[str, torch.Tensor]]:
    "The demonstration core with a fresh head, and ten repeats of one random clip."
    torch.manual_seed(0)
    model = ViV1T.from_published(demo_core(), core_only=True, mice={})
    model.add_mouse("A", 64, torch.rand(64, 2), torch.rand(64))
    batch = {
        "video": torch.rand(1, 1, 140, 36, 64).expand(10, -1, -1, -1, -1),
        "behavior": torch.rand(10, 2, 140),
        "pupil_center": torch.rand(10, 2, 140),
        "labels": torch.rand(10, 64, 140),
    }
    return model.to(device), {name: x.to(device) for name, x in batch.items()}


def held_mib(device: str) -> float:
    "Memory this process holds now."
    held = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    return held / 2**20


def prepared(part: str, variant: str, args: argparse.Namespace) -> Callable[[], float]:
    "A training step; returns its loss."
    device, half = args.device, part == "published" and args.precision == "bfloat16"
    model, batch = (published if part == "published" else demo)(device)
    if part == "published" and args.frames < 140:
        batch = {
            k: x[:, :, : args.frames] if k == "video" else x[..., : args.frames] for k, x in batch.items()
        }
        model.config.loss_frames = None
    if variant != "full":
        rank, targets = variant.split(",")[0].split("-")
        add_adapters(model, Adapters(int(rank[1:]), targets))
    if "by peft" in variant:
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.__class__ = lora.Linear
    if "tokens" in variant:
        with torch.no_grad():
            state = {name: batch[name] for name in ("behavior", "pupil_center")}
            batch["tokens"] = model.embed(batch.pop("video"), **state)
    if "once per repeat" in variant:
        batch["video"] = batch["video"].clone()
        batch["video"][1:, ..., 0, 0, 0] += 1e-6  # no longer equal
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(1)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def clocked(step: Callable[[], float], device: str) -> tuple[float, float, float]:
    "Seconds, processor seconds and loss of one step."
    start, busy = time.perf_counter(), time.process_time()
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy, loss


def told(clocks: list[tuple[float, float, float]]) -> dict[str, list[float]]:
    "Lists of seconds, without the first step, and of losses."
    seconds, processor, losses = map(list, zip(*clocks, strict=True))
    return {"seconds": seconds[1:], "processor": processor[1:], "losses": losses}


def work(part: str, variant: str, args: argparse.Namespace) -> dict[str, object]:
    "Seconds, memory and losses of one variant in this process."
    torch.set_num_threads(args.threads)
    step = prepared(part, variant, args)
    before = held_mib(args.device)
    measured = told([clocked(step, args.device) for _ in range(args.steps + 1)])
    return measured | {"extra_mib": peak_mib(args.device) - before}


def in_turn(part: str, variants: list[str], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    "Steps of all variants, one after the other, in this process; each draws its own random numbers."
    torch.set_num_threads(args.threads)
    steps = {variant: prepared(part, variant, args) for variant in variants}
    drawn = dict.fromkeys(variants, torch.get_rng_state())
    clocks: dict[str, list] = {variant: [] for variant in variants}
    for _ in range(args.rounds * args.steps + 1):
        for variant, step in steps.items():
            torch.set_rng_state(drawn[variant])
            clocks[variant].append(clocked(step, args.device))
            drawn[variant] = torch.get_rng_state()
    return {variant: told(found) for variant, found in clocks.items()}


def compare(part: str, args: argparse.Namespace) -> list[dict[str, object]]:
    "All variants of a part in turn; one case for each but the first."
    asked = [variant for variant in VARIANTS[part] if args.variants is None or variant in args.variants]
    found: dict[str, list[dict]] = {variant: [] for variant in asked}
    for _ in range(1 if args.in_turn else args.rounds):
        for variant in found:
            steps = 0 if args.in_turn else args.steps
            job = [sys.executable, __file__, "--worker", part, variant, "--steps", str(steps)]
            job += ["--threads", str(args.threads), "--device", args.device, "--precision", args.precision]
            job += ["--frames", str(args.frames)]
            done = subprocess.run(job, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{part}: {variant}\n{done.stderr}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            least = min(found[variant][-1]["seconds"], default=float("nan"))
            print(
                f"{part}: {variant}: {least:.3f} s, {found[variant][-1]['extra_mib']:.0f} MiB",
                file=sys.stderr,
            )
    memory = {variant: max(run["extra_mib"] for run in runs) for variant, runs in found.items()}
    if args.in_turn:
        found = {variant: [run] for variant, run in in_turn(part, asked, args).items()}
    seconds = {variant: [s for run in runs for s in run["seconds"]] for variant, runs in found.items()}
    busy = {variant: [s for run in runs for s in run["processor"]] for variant, runs in found.items()}
    losses = {variant: runs[0]["losses"] for variant, runs in found.items()}
    plain = losses["r8-all"]
    return [
        {
            "part": part,
            "variant": variant,
            "full_s": seconds["full"],
            "variant_s": seconds[variant],
            "ratio_of_medians": statistics.median(seconds["full"]) / statistics.median(seconds[variant]),
            "full_processor_s": busy["full"],
            "variant_processor_s": busy[variant],
            "ratio_of_processor_time": statistics.median(busy["full"]) / statistics.median(busy[variant]),
            "full_extra_mib": memory["full"],
            "extra_mib": memory[variant],
            "ratio_of_memory": memory["full"] / memory[variant],
            "losses": losses[variant],
            **(
                {
                    "against_r8_all": statistics.median(seconds["r8-all"])
                    / statistics.median(seconds[variant]),
                    "largest_difference_of_losses": float(
                        np.abs(np.array(losses[variant]) / plain - 1).max()
                    ),
                }
                if variant.startswith("r8-all,")
                else {}
            ),
        }
        for variant in asked[1:]
    ]


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--parts", nargs="+", default=list(VARIANTS), help="what to measure")
    parser.add_argument(
        "--variants", nargs="+", help="not all of them, but these; full and r8-all among them"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes started for each variant")
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each process")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "bfloat16"], help="published size"
    )
    parser.add_argument("--in-turn", action="store_true", help="alternate the steps in one process")
    parser.add_argument("--frames", type=int, default=140, help="published size: frames of the clip")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker, args)))
        return
    if not args.out:
        parser.error("--out is needed")
    cases = [case for part in args.parts for case in compare(part, args)]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    options = {
        name: getattr(args, name) for name in ("threads", "rounds", "steps", "precision", "in_turn", "frames")
    }
    options["device"] = device
    write_json(args.out, {"cases": cases, "provenance": provenance(**options)})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if not k.endswith("_s")}))


if __name__ == "__main__":
    main()
