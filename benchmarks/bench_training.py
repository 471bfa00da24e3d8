"""Time an epoch of head training from kept features against one that runs the frozen core for every sample.

python benchmarks/bench_training.py --out FILE.json

The model has the published size (36 x 64 pixels, 140 frames, 227 neurons); the data are random, and few: the time of
an epoch is proportional to their number. Both runs share model, data, seed and order, and take turns. The readouts
do not draw their positions at random, so that the loss curves can be compared. Seconds are those of the training
part of each epoch; making the features once, and their size, are reported beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from cortexlit.core import provenance, rng, write_json
from cortexlit.models.viv1t import ViV1T, ViV1TConfig
from cortexlit.training.features import cached_features
from cortexlit.training.trainer import fit

NEURONS, FRAMES, SIZE, LAST = 227, 140, (36, 64), 66


class Noise:
    "Random samples in the shapes of study 1."

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i >= self.samples:
            raise IndexError(i)
        draw = rng(0, "bench_training", self.seed, i)
        shapes = {"video": (1, FRAMES, *SIZE), "behavior": (2, FRAMES), "pupil_center": (2, FRAMES)}
        item = {name: torch.from_numpy(draw.random(shape, np.float32)) for name, shape in shapes.items()}
        return item | {"labels": torch.from_numpy(draw.gamma(1.0, 1.0, (NEURONS, FRAMES)).astype(np.float32))}


def published_model() -> ViV1T:
    "The published size with random weights, and readouts whose Gaussians have no width."

    def narrow(readout: torch.nn.Module, _: tuple) -> None:
        readout.sigma.data.zero_()

    torch.manual_seed(0)
    model = ViV1T(ViV1TConfig({"A": NEURONS}))
    model.set_coordinates("A", rng(0, "coordinates").uniform(0, 400, (NEURONS, 2)))
    model.readouts["A"].register_forward_pre_hook(narrow)
    return model


def compare(samples: int, epochs: int, folder: Path) -> dict[str, object]:
    "Both ways on the same samples."
    data = Noise(samples, 0), Noise(1, 1)
    model = published_model()
    start = time.perf_counter()
    cache = cached_features(model, data[0], folder / "features", LAST, progress=False)
    build_s = time.perf_counter() - start
    options = {"last": LAST, "epochs": epochs, "progress": False}
    kept = fit(model, data, out=folder / "kept", **options).history
    run = fit(model, data, out=folder / "run", cache=False, **options).history
    curves = [h[["loss", "validation_loss", "validation_correlation"]].to_numpy() for h in (kept, run)]
    library_s, core_s = kept["seconds"].tolist(), run["seconds"].tolist()
    return {
        "samples": samples,
        "epochs": epochs,
        "core_each_time_s": core_s,
        "from_features_s": library_s,
        "ratio_of_medians": statistics.median(core_s) / statistics.median(library_s),
        "largest_difference_of_losses": float(np.abs(curves[0][:, :2] / curves[1][:, :2] - 1).max()),
        "largest_difference_of_correlations": float(np.abs(curves[0][:, 2] - curves[1][:, 2]).max()),
        "making_features_once_s": [build_s],
        "features_mb": (cache.folder / "features.npy").stat().st_size / 1e6,
    }


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=4, help="clips in the training tier")
    parser.add_argument("--epochs", type=int, default=3, help="epochs, both ways")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = compare(args.samples, args.epochs, Path(folder))
    threads = {"torch_threads": torch.get_num_threads(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    write_json(args.out, {"cases": [case], "provenance": provenance(**threads)})
    print(json.dumps(case, indent=1))


if __name__ == "__main__":
    main()
