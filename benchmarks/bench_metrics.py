"""Time `single_trial_correlation` against a plain loop over `np.corrcoef`, side by side in one process.

python benchmarks/bench_metrics.py --out FILE.json

The arrays have the size of the test tier of study 1: 62 samples, 227 neurons, 140 frames, float32.
Both run in turn, `--repeats` times; the ratios are those of the medians, of time and of processor time, which other
programs on the machine disturb less. What is left of the library's time is mostly the cast of float32 to float64 and
five sums over it. Tried and no faster on one core: larger and smaller blocks, one product of matrices for each row
(its call costs more than the row), sums that cast as they go (they cast once for each sum). Sums in float32 would be
faster, and wrong in the eighth digit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from side_by_side import timed

from cortexlit.core import provenance, rng, write_json
from cortexlit.metrics import single_trial_correlation

SHAPE = (62, 227, 140)


def loop(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    "One call of np.corrcoef per sample and neuron."
    out = np.empty(labels.shape[:2])
    for sample in range(labels.shape[0]):
        for neuron in range(labels.shape[1]):
            out[sample, neuron] = np.corrcoef(predictions[sample, neuron], labels[sample, neuron])[0, 1]
    return out


def peak_bytes(function: Callable[[], np.ndarray]) -> int:
    "Largest memory allocated during the call, result included, inputs not."
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def compare(last: int | None, repeats: int) -> dict[str, object]:
    "Both ways on the same arrays."
    generator = rng(0, "bench_metrics")
    labels = generator.gamma(1.0, 1.0, SHAPE).astype(np.float32)
    predictions = (0.2 * labels + generator.normal(size=SHAPE)).astype(np.float32)
    cut = slice(None) if last is None else slice(-last, None)

    def fast() -> np.ndarray:
        return single_trial_correlation(predictions, labels, last, reduce=None)

    def slow() -> np.ndarray:
        return loop(predictions[..., cut], labels[..., cut])

    def clocked(function: Callable[[], np.ndarray], name: str) -> np.ndarray:
        busy = time.process_time()
        seconds, found = timed(function)
        spent[f"{name}_processor_s"].append(time.process_time() - busy)
        spent[f"{name}_s"].append(seconds)
        return found

    fast()
    spent = {f"{name}{kind}": [] for kind in ("_s", "_processor_s") for name in ("loop", "library")}
    for _ in range(repeats):
        expected = clocked(slow, "loop")
        for _ in range(5):
            found = clocked(fast, "library")
    middle = {name: statistics.median(values) for name, values in spent.items()}
    return {
        "last": last,
        **spent,
        "ratio_of_medians": middle["loop_s"] / middle["library_s"],
        "ratio_of_processor_time": middle["loop_processor_s"] / middle["library_processor_s"],
        "largest_difference": float(np.abs(found - expected).max()),
        "peak_mib": peak_bytes(fast) / 2**20,
        "inputs_mib": (predictions.nbytes + labels.nbytes) / 2**20,
    }


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of the loop (5 of the library's to each)"
    )
    args = parser.parse_args()
    load = [round(os.getloadavg()[0], 2)]  # processes that wanted a processor, before and after
    cases = [compare(last, args.repeats) for last in (None, 66)]
    load.append(round(os.getloadavg()[0], 2))
    about = provenance(omp_num_threads=os.environ.get("OMP_NUM_THREADS"), load=load)
    write_json(args.out, {"shape": SHAPE, "cases": cases, "provenance": about})
    for case in cases:
        print(json.dumps({k: v for k, v in case.items() if not k.endswith("_s")}))


if __name__ == "__main__":
    main()
