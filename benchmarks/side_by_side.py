"""Variants of one computation in turn, each in a process of its own, so that its peak memory is its own.

The first variant of a part is the straightforward one; the others are compared with it.
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
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from cortexlit.core import provenance, write_json

Prepared = Callable[[str, str], Callable[[], torch.Tensor | None]]  # part, variant -> what is to be timed


def parser(doc: str, parts: list[str]) -> argparse.ArgumentParser:
    "The options that all of these benchmarks have."
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", help="JSON file to write")
    out.add_argument("--parts", nargs="+", default=parts, help="what to measure")
    out.add_argument("--rounds", type=int, default=3, help="processes started for each variant")
    out.add_argument("--runs", type=int, default=3, help="timed runs in each process")
    out.add_argument("--threads", type=int, default=2, help="of the CPU")
    out.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    out.add_argument("--worker", nargs=2, metavar=("PART", "VARIANT"), help=argparse.SUPPRESS)
    out.add_argument("--keep", help=argparse.SUPPRESS)
    return out


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


def work(
    first: str, part: str, variant: str, prepared: Prepared, args: argparse.Namespace
) -> dict[str, object]:
    "Seconds, memory and output of one variant in this process."
    torch.set_num_threads(args.threads)
    function = prepared(part, variant)
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
        if variant == first:
            np.save(kept, out)
        elif part == "core":
            result |= agreement(out, np.load(kept))
        else:
            result["largest_difference"] = float(np.abs(out - np.load(kept)).max())
    return result


def compare(part: str, variants: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    "All variants of a part in turn; one case for each but the first."
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    processor: dict[str, list[float]] = {variant: [] for variant in variants}
    memory = {variant: 0.0 for variant in variants}
    facts: dict[str, dict] = {}
    for _ in range(args.rounds):
        for variant in variants:
            job = [sys.executable, *sys.argv, "--worker", part, variant, "--keep", args.keep]
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


def run(
    args: argparse.Namespace, variants: Mapping[str, list[str]], prepared: Prepared, **options: object
) -> None:
    "Measure the parts that were asked for and write the file; or, in a worker, time one variant."
    if args.worker:
        part, variant = args.worker
        print(json.dumps(work(variants[part][0], part, variant, prepared, args)))
        return
    if not args.out:
        sys.exit("--out is needed")
    cases = []
    with tempfile.TemporaryDirectory() as args.keep:
        for part, names in variants.items():
            if part.split()[0] in args.parts:
                cases += compare(part, names, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    options |= {"threads": args.threads, "rounds": args.rounds, "runs": args.runs, "device": device}
    write_json(args.out, {"cases": cases, "provenance": provenance(**options)})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if not k.endswith("_s")}))


def timed(function: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    "Seconds and result of one call."
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
