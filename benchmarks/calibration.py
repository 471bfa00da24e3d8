"""Do the intervals of scores, and of differences of models, hold what they promise? A Monte Carlo suite.

    python benchmarks/calibration.py --out benchmarks/results/calibration.json

Simulated tables of scores with effects of clips, neurons and entries (coverage of one mean), and of few seeds;
simulated responses with known signals (coverage for each metric); six models that do not differ (family-wise error
of `compare`). Beside each coverage: that of an interval over neurons alone.

With `--only metric family`, or one metric or world of them (`--only family --world "seed x model, three seeds"`), all
other cases stay as the file has them, with the provenance of their own run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from cortexlit.core import provenance, read_json, rng, write_json
from cortexlit.evaluation.comparison import compare
from cortexlit.evaluation.intervals import score_interval
from cortexlit.metrics import (
    cc_norm,
    correlation_to_average,
    feve,
    flattened_correlation,
    mean_score,
    r2_er,
    single_trial_correlation,
)

WORLDS = {  # standard deviations of the effects of clips, neurons and entries
    "clips dominate": (1.0, 0.3, 3.0),
    "balanced": (0.5, 1.6, 2.0),
    "neurons dominate": (0.1, 1.0, 1.0),
    "noise alone": (0.0, 0.0, 1.0),
}
MODELS = {  # standard deviations of each model's own effects of clips, neurons and seeds; seeds; heavy tails
    "clip x model": (0.5, 0.0, 0.0, 1, False),
    "clip x model, t with 3 degrees of freedom": (0.5, 0.0, 0.0, 1, True),
    "neuron x model": (0.0, 1.0, 0.0, 1, False),
    "clip and neuron x model": (0.5, 1.0, 0.0, 1, False),
    "noise alone": (0.0, 0.0, 0.0, 1, False),
    "clip x model, three seeds": (0.5, 0.0, 0.0, 3, False),
    "seed x model, three seeds": (0.0, 0.0, 0.2, 3, False),
    "seed x one model, three seeds": (0.0, 0.0, (0.2, 0, 0, 0, 0, 0), 3, False),
}

PLAIN = "single-trial correlation"
PARTS = ("mean", "seeds", "metric", "family")


def of_means(experiments: int, clips: int, neurons: int, world: str) -> dict[str, object]:
    "Coverage of the interval of one mean score."
    by_clip, by_neuron, rest = WORLDS[world]
    draw, hits, alone = rng(0, "means", clips, neurons, world), 0, 0
    for k in range(experiments):
        x = by_clip * draw.normal(size=(clips, 1)) + by_neuron * draw.normal(size=neurons)
        x = x + rest * draw.normal(size=(clips, neurons))
        low, high = score_interval(x, draws=400, seed=k)
        hits += low < 0 < high
        alone += abs(x.mean()) < 1.96 * x.mean(0).std(ddof=1) / np.sqrt(neurons)
    return {
        "part": "mean", "world": world, "clips": clips, "neurons": neurons, "experiments": experiments,
        "coverage": hits / experiments, "coverage_neurons_alone": alone / experiments,
    }  # fmt: skip


def of_seeds(experiments: int, seeds: int, clips: int, neurons: int, by_seed: float) -> dict[str, object]:
    "Coverage of the interval of one mean score over few seeds."
    draw, hits, half = rng(0, "seeds", seeds, clips, neurons, by_seed), 0, []
    for k in range(experiments):
        x = by_seed * draw.normal(size=(seeds, 1, 1)) + draw.normal(size=(seeds, clips, neurons))
        low, high = score_interval(x, draws=400, seed=k)
        hits += low < 0 < high
        half.append((high - low) / 2)
    return {
        "part": "seeds", "seeds": seeds, "by_seed": by_seed, "clips": clips, "neurons": neurons, "experiments": experiments,
        "coverage": hits / experiments, "median_half_width": np.median(half),
        "spread": np.sqrt(by_seed**2 / seeds + 1 / (seeds * clips * neurons)),
    }  # fmt: skip


def _responses(draw: np.random.Generator, clips: int, repeats: int, neurons: int, frames: int = 66) -> tuple:
    "Slow signals of unequal strength by clip and neuron, noise with memory, a drift that all neurons share."

    def slow(memory: float, *shape: int) -> np.ndarray:
        white = draw.normal(size=shape)
        return lfilter([np.sqrt(1 - memory**2)], [1, -memory], white, axis=-1)

    size = draw.gamma(2, 0.35, (neurons, 1)) * np.exp(0.5 * draw.normal(size=(clips, 1, 1)))
    signal = size * slow(0.9, clips, neurons, frames)
    guess = 0.7 * signal + 0.7 * size * slow(0.9, clips, neurons, frames)
    clip = np.repeat(np.arange(clips), repeats)
    noise = slow(0.8, len(clip), neurons, frames) + 0.5 * slow(0.98, len(clip), 1, frames)
    return guess[clip], signal[clip] + noise, clip


def _same_neurons(p: np.ndarray, y: np.ndarray, clip: np.ndarray) -> np.ndarray:
    "r2_ER where FEVE is defined, as score sheets show it: without a signal to speak of its values are wild."
    return np.where(np.isnan(feve(p, y, clip, reduce="table")), np.nan, r2_er(p, y, clip, reduce="table"))


METRICS: dict[str, Callable] = {
    PLAIN: lambda p, y, c: (single_trial_correlation(p, y, reduce=None), c),
    "flattened correlation": lambda p, y, c: (flattened_correlation(p, y, reduce="table", clip=c), None),
    "correlation to average": lambda p, y, c: (correlation_to_average(p, y, c, reduce="table"), None),
    "CC_norm": lambda p, y, c: (cc_norm(p, y, c, reduce="table"), None),
    "r2_ER": lambda p, y, c: (r2_er(p, y, c, reduce="table"), None),
    "r2_ER, neurons of FEVE": lambda p, y, c: (_same_neurons(p, y, c), None),
    "FEVE": lambda p, y, c: (feve(p, y, c, reduce="table"), None),
}


def of_metrics(
    experiments: int, clips: int, repeats: int, neurons: int, names: list[str]
) -> list[dict[str, object]]:
    "Coverage for each metric; the truth is the mean over all experiments."
    draw, found = rng(0, "metrics", clips, repeats, neurons), {name: [] for name in names}
    for k in range(experiments):
        p, y, clip = _responses(draw, clips, repeats, neurons)
        for name in names:
            table, groups = METRICS[name](p, y, clip)
            by_neuron = np.nanmean(table, 0)
            by_neuron = by_neuron[np.isfinite(by_neuron)]
            alone = 1.96 * by_neuron.std(ddof=1) / np.sqrt(len(by_neuron))
            found[name].append((mean_score(table), *score_interval(table, groups, draws=400, seed=k), alone))
    rows = []
    for name, values in found.items():
        value, low, high, alone = np.array(values).T
        truth = value.mean()
        rows.append({
            "part": "metric", "metric": name, "clips": clips, "repeats": repeats, "neurons": neurons,
            "experiments": experiments, "truth": truth, "spread": value.std(ddof=1),
            "median_half_width": np.median(high - low) / 2, "coverage": np.mean((low < truth) & (truth < high)),
            "coverage_neurons_alone": np.mean(abs(value - truth) < alone),
        })  # fmt: skip
    return rows


def of_families(experiments: int, clips: int, neurons: int, world: str, models: int = 6) -> dict[str, object]:
    "How often `compare` settles some pair of models that do not differ."
    by_clip, by_neuron, by_seed, seeds, heavy = MODELS[world]
    draw, wrong, beaten = rng(0, "families", clips, neurons, world), 0, 0

    def effect(*shape: int) -> np.ndarray:
        return draw.standard_t(3, shape) / np.sqrt(3) if heavy else draw.normal(size=shape)

    for k in range(experiments):
        x = effect(1, 1, clips, 1) + 2 * effect(1, 1, 1, neurons) + by_clip * effect(models, 1, clips, 1)
        x = x + by_neuron * effect(models, 1, 1, neurons)
        x = x + np.reshape(by_seed, (-1, 1, 1, 1)) * effect(models, seeds, 1, 1)
        x = x + effect(models, seeds, clips, neurons)
        found = compare({f"model {m}": x[m] for m in range(models)}, seed=k)
        wrong += bool(found.pairs["settled"].any())
        beaten += not bool(found.models.set_index("model").loc["model 0", "may be best"])
    return {
        "part": "family", "world": world, "clips": clips, "neurons": neurons, "seeds": seeds, "models": models,
        "experiments": experiments, "family_error": wrong / experiments, "best_excluded": beaten / experiments,
    }  # fmt: skip


def _cases(part: str, n: int, families: int, worlds: list[str], names: list[str]) -> list[dict[str, object]]:
    "All cases of one part; a line for each size that is done."
    cases: list[dict[str, object]] = []
    if part == "mean":
        return [of_means(n, c, m, world) for world in WORLDS for c in (5, 6, 12, 30) for m in (64, 300)]
    if part == "seeds":
        return [of_seeds(n, seeds, 12, 64, by_seed) for seeds in (2, 3, 5) for by_seed in (0.2, 0.05)]
    if part == "metric":
        for clips, repeats in ((6, 10), (12, 4), (31, 2)):
            many = [name for name in names if name == PLAIN]  # a mean, and quick: four times as many
            cases += of_metrics(2 * n, clips, repeats, 64, many)
            cases += of_metrics(n // 2, clips, repeats, 64, [name for name in names if name not in many])
            print(f"metrics on {clips} clips: done", flush=True)
        return cases
    for world in worlds:
        many = 5 * families if "seed x model" in world else families  # where 200 left a doubt
        cases += [of_families(many, c, 64, world) for c in (6, 20)]
        print(f"six models, {world}: done", flush=True)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--experiments", type=int, default=1000, help="for each mean; metrics: half, or double"
    )
    parser.add_argument("--families", type=int, default=200, help="experiments for each family of models")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to make anew")
    parser.add_argument("--world", choices=MODELS, help="of the families: this one alone")
    parser.add_argument("--metric", choices=METRICS, help="of the metrics: this one alone")
    args = parser.parse_args()
    if args.world and args.only != ["family"] or args.metric and args.only != ["metric"]:
        parser.error("--world goes with --only family, --metric with --only metric")
    one = args.world or args.metric
    whole = set(args.only) == set(PARTS) and not one
    old = {"cases": [], "provenance": {}} if whole else read_json(args.out)
    n, made, source = args.experiments, [], dict(old["provenance"])
    for part in args.only:
        start = time.process_time()
        made += _cases(part, n, args.families, [args.world] if args.world else list(MODELS),
                       [args.metric] if args.metric else list(METRICS))  # fmt: skip
        source[f"{part}, {one}" if one else part] = provenance(seconds=time.process_time() - start, seed=0)

    def what(case: dict[str, object]) -> tuple[object, ...]:
        return case["part"], case.get("world"), case.get("metric")

    anew = {what(case) for case in made}
    kept = [case for case in old["cases"] if what(case) not in anew]
    cases = sorted(kept + made, key=lambda case: PARTS.index(case["part"]))
    write_json(args.out, {"cases": cases, "provenance": source})
    for case in cases:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in case.items()})


if __name__ == "__main__":
    main()
