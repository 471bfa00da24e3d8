"""Training speed of the fMRI networks on whole volumes of 72 x 91 x 75 voxels, side by side, with memory.

python benchmarks/bench_fmri.py --out FILE.json [--rounds 1] [--steps 5] [--batch 2] [--threads 2] [--device cpu]

A step is forward, backward and AdamW on one batch of random volumes. The mask is an ellipsoid with 43 % of the voxels,
as in a subject of THINGS. Every variant runs in a process of its own (so that its peak memory is its own), all in turn,
`--rounds` times; ratios are those of medians, against the study's ViT3D with (6, 7, 5) patches and 6 layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from side_by_side import peak_mib
from transformers import PreTrainedModel

from cortexlit.core import provenance, write_json
from cortexlit.models.classifiers import ClassifierConfig, ConceptClassifier
from cortexlit.models.cnn_vit import CNNViT, CNNViTConfig
from cortexlit.models.vit3d import ViT3D, ViT3DConfig

GRID, CONCEPTS = (72, 91, 75), 157
FIRST = "ViT3D of the study, patches (6, 7, 5)"
NETWORKS = (
    FIRST,
    "ViT3D of the study, patches (12, 13, 15)",
    "ViT3D, tokens in the brain",
    "CNN + ViT of the study",
    "CNN + ViT, sound, whole box",
    "CNN + ViT, sound, tokens in the brain",
    "3-D CNN of the study",
    "3-D CNN of the study, means of 2 x 2 x 2",
)
VARIANTS = tuple(name + kind for name in NETWORKS for kind in ("", ", bfloat16"))


def ellipsoid() -> np.ndarray:
    "A mask of about 211,000 voxels."
    axes = [np.linspace(-1, 1, n) for n in GRID]
    distance = sum(a**2 for a in np.meshgrid(*axes, indexing="ij"))
    return distance <= np.quantile(distance, 0.43)


def made(variant: str, batch: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    "The model, and a batch for it."
    torch.manual_seed(0)
    mask, volume = ellipsoid(), torch.randn(batch, 1, *GRID)
    if variant.startswith("3-D CNN"):
        shape = GRID if "means" not in variant else tuple(-(-n // 2) for n in GRID)
        model = ConceptClassifier(ClassifierConfig.study("cnn", shape, [f"c{k}" for k in range(CONCEPTS)]))
        return model, {
            "volume": torch.randn(batch, 1, *shape),
            "labels": torch.randint(CONCEPTS, (batch,)),
        }
    labels = torch.randn(batch, 10)
    if variant.startswith("CNN + ViT of"):
        return CNNViT(CNNViTConfig.study(outputs=10)), {"volume": volume, "labels": labels}
    if variant.startswith("ViT3D of"):
        patch = (12, 13, 15) if "12" in variant else (6, 7, 5)
        return ViT3D(ViT3DConfig.study(patch, layers=6)), {"volume": volume, "labels": labels}
    if "whole box" in variant:
        return CNNViT(CNNViTConfig(grid=GRID)), {"volume": volume, "labels": labels}
    kind = (CNNViT, CNNViTConfig) if variant.startswith("CNN") else (ViT3D, ViT3DConfig)
    voxels = torch.randn(batch, int(mask.sum()))
    return kind[0](kind[1](grid=GRID, mask=mask)), {"voxels": voxels, "labels": labels}


def work(variant: str, args: argparse.Namespace) -> dict[str, object]:
    "Seconds of each step, extra memory, tokens and parameters of one variant in this process."
    torch.set_num_threads(args.threads)
    model, batch = made(variant, args.batch)
    model.to(args.device).train()
    batch = {name: value.to(args.device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters())
    before, seconds = peak_mib(args.device), []
    for _ in range(args.steps + 1):  # the first is not counted
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled="bfloat16" in variant):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"tokens": getattr(model, "tokens", None), "parameters": parameters}
    return {"seconds": seconds[1:], "extra_mib": peak_mib(args.device) - before, **facts}


def compare(args: argparse.Namespace) -> list[dict[str, object]]:
    "All variants in turn, each in its own process."
    found: dict[str, dict] = {}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            job = [sys.executable, __file__, "--worker", variant, "--device", args.device]
            job += ["--batch", str(args.batch), "--steps", str(args.steps), "--threads", str(args.threads)]
            done = subprocess.run(job, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{variant}\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            known = found.setdefault(variant, result | {"seconds": [], "extra_mib": 0.0})
            known["seconds"] += result["seconds"]
            known["extra_mib"] = max(known["extra_mib"], result["extra_mib"])
            print(f"{variant}: {statistics.median(known['seconds']):.2f} s", file=sys.stderr)
    first, cases = found[FIRST], []
    for variant, result in found.items():
        median = statistics.median(result["seconds"])
        cases.append(
            {
                "variant": variant,
                "step_s": result["seconds"],
                "volumes_per_s": args.batch / median,
                "ratio_of_medians": statistics.median(first["seconds"]) / median,
                "extra_mib": result["extra_mib"],
                "ratio_of_memory": first["extra_mib"] / max(result["extra_mib"], 1.0),
                "tokens": result["tokens"],
                "parameters": result["parameters"],
            }
        )
    return cases


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=1, help="processes started for each variant")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process")
    parser.add_argument("--batch", type=int, default=2, help="volumes in a batch")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--worker", metavar="VARIANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return
    if not args.out:
        parser.error("--out is needed")
    cases = compare(args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    options = {"threads": args.threads, "rounds": args.rounds, "steps": args.steps, "batch": args.batch}
    write_json(args.out, {"cases": cases, "provenance": provenance(**options, device=device)})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if k != "step_s"}))


if __name__ == "__main__":
    main()
