"""Building and reading a dataset of the full-size embedded session, and resizing, beside the straightforward loops.

python benchmarks/bench_dataset.py --out benchmarks/results/dataset.json [--size demo]
"""

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
from scipy.ndimage import zoom

from cortexlit.core import provenance, write_json
from cortexlit.data.clips import MouseDataset, resize_frames
from cortexlit.data.exchange import export_tree
from cortexlit.simulate.session import embedded_session

BUILD = """
import json, resource, sys, time
from cortexlit.data.allen import open_session
from cortexlit.data.clips import build_dataset
start = time.perf_counter()
session = open_session(900000001, cache_dir=sys.argv[1])
opened = time.perf_counter()
build_dataset(session, sys.argv[2])
done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"open_s": opened - start, "build_s": done - opened, "total_s": done - start, "peak_mb": peak,
                  "neurons": session.n_neurons, "frames": session.n_frames, "movie": list(session.templates["natural_movie_three"].shape)}))
"""


def seconds(run: Callable[[], object], repeats: int = 5) -> list[float]:
    "Wall time of several runs, after one to warm up."
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def case(
    what: str, ours: Callable[[], object], reference: Callable[[], object], repeats: int = 5, **more: object
) -> dict[str, object]:
    "One line of the table: the reference's times and ours, taken in turn."
    slow, fast = seconds(reference, repeats), seconds(ours, repeats)
    return {
        "what": what,
        **more,
        "reference_s": slow,
        "cortexlit_s": fast,
        "ratio_of_medians": statistics.median(slow) / statistics.median(fast),
    }


def resizing() -> list[dict[str, object]]:
    "One clip of 140 frames, 304 x 608 to 36 x 64: against SciPy's zoom, frame by frame, at its default and at order one."
    frames = np.random.default_rng(0).integers(0, 256, (140, 304, 608)).astype("uint8")
    factor = (36 / 304, 64 / 608)
    grid = [zoom(f.astype("float64"), factor, order=1, grid_mode=True, mode="nearest") for f in frames[:3]]
    apart = float(np.abs(resize_frames(frames[:3], (36, 64), "bilinear") - grid).max())
    return [
        case("antialiased, against zoom (order 3, its default)", lambda: resize_frames(frames, (36, 64)), lambda: [zoom(f.astype("float32"), factor) for f in frames], 3),
        case(
            "bilinear, against zoom (order 1)", lambda: resize_frames(frames, (36, 64), "bilinear"),
            lambda: [zoom(f.astype("float32"), factor, order=1) for f in frames], 15, max_abs_difference=apart,
        ),
    ]  # fmt: skip


def reading(folder: Path, tmp: Path) -> dict[str, object]:
    "Every training sample in a shuffled order, warm cache: against np.load of one file per clip and field, as study 1 stored them."
    data = MouseDataset(folder, "train")
    tree = export_tree(folder, tmp / "tree", "study1") / "train"
    names = [f"{i:05d}.npy" for i in data.samples["sample"]]
    order = np.random.default_rng(0).permutation(len(data))

    def ours() -> None:
        for i in order:
            data[i]

    def theirs() -> None:
        for i in order:
            for field in ("videos", "behavior", "pupil_center", "labels"):
                torch.from_numpy(np.load(tree / field / names[i]))

    row = case("read an epoch, against one .npy per clip", ours, theirs, 3, samples=len(data))
    return row | {"samples_per_s": len(data) / statistics.median(row["cortexlit_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", default="full", help="embedded session: full (default), demo or tiny")
    args = parser.parse_args()
    cache = embedded_session(args.size)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "data"
        done = subprocess.run(
            [sys.executable, "-c", BUILD, str(cache), str(folder)], capture_output=True, text=True, check=True
        )
        build = json.loads(done.stdout.splitlines()[-1])
        build["folder_mb"] = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
        result = {"build": build, "cases": [*resizing(), reading(folder, Path(tmp))]}
    result["provenance"] = provenance(size=args.size, threads=torch.get_num_threads())
    write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
