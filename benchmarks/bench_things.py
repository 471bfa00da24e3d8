"""Reading THINGS-fMRI: the cached subject, building the cache beside the straightforward way, and a full-size subject.

python benchmarks/bench_things.py --out FILE.json [--parts load build table volumes] [--rounds 2] [--voxels 211339]

load: the cached subject of 9,840 trials, opened and brought into memory, against reading its HDF5 file whole and
z-scoring it within session. build: the same two ways from a table of 20,000 voxels to the cache file. Both ways run in
processes of their own, in turn; the extra memory is what such a process holds at most beyond its start.
table, volumes: no reference, which would need 25 GB of memory and more. One `build_things` of a subject of the published size
(211,339 voxels, random numbers in float64, 17 GB and 43 GB), then its 18,394 voxels in regions through `ThingsDataset`;
the peak memory is that of the whole process.
The 120 runs of the volumes are links to one file. Needs 25 GB of disk, in TMPDIR; all of it is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from side_by_side import peak_mib

from cortexlit.core import locked, provenance, write_json
from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.things import load_properties, open_things, things_table
from cortexlit.data.volumes import write_nifti
from cortexlit.simulate.subject import embedded_things

PARTS = ["load", "build", "table", "volumes"]
GRID, VOXELS, IN_REGIONS, SMALLER = (72, 91, 75), 211_339, 18_394, 20_000


def ellipsoid(voxels: int) -> np.ndarray:
    "A mask with this many voxels of the box of subject 01."
    axes = [np.linspace(-1, 1, n) for n in GRID]
    distance = sum(a**2 for a in np.meshgrid(*axes, indexing="ij"))
    mask = np.zeros(distance.size, bool)
    mask[np.argsort(distance.ravel(), kind="stable")[:voxels]] = True
    return mask.reshape(GRID)


def write_anatomy(root: Path, mask: np.ndarray) -> np.ndarray:
    "The brain mask; where the voxels in regions are (the first of the mask, as V1)."
    write_nifti(
        root / "brainmasks/sub-01_space-T1w_brainmask.nii.gz",
        mask.astype(np.uint8),
        np.diag([2.0, 2.0, 2.0, 1.0]),
    )
    return np.arange(mask.sum()) < IN_REGIONS * mask.sum() // VOXELS


def write_table(root: Path, voxels: int) -> Path:
    "A subject in the figshare layout, of random numbers; the real trial table."
    mask = ellipsoid(voxels)
    folder = root / "betas_csv"
    folder.mkdir(parents=True)
    table = pd.DataFrame(np.argwhere(mask), columns=["voxel_x", "voxel_y", "voxel_z"])
    table.insert(0, "voxel_id", np.arange(voxels))
    table.insert(1, "subject_id", 1)
    table["V1"] = write_anatomy(root, mask).astype(int)
    table.to_csv(folder / "sub-01_VoxelMetadata.csv", index=False)
    stimuli = folder / "sub-01_StimulusMetadata.csv"
    shutil.copyfile(things_table(stimuli.name), stimuli)
    trials, generator = len(pd.read_csv(stimuli)), np.random.default_rng(0)
    with h5py.File(folder / "sub-01_ResponseData.h5", "w") as file:
        values = file.create_dataset("ResponseData/block0_values", (voxels, trials), "f8")
        file["ResponseData/block1_values"] = np.arange(voxels)[:, None]
        for start in range(0, voxels, 2000):
            stop = min(start + 2000, voxels)
            values[start:stop] = 0.1 * generator.standard_normal((stop - start, trials))
    return root


def write_volumes(root: Path, voxels: int) -> Path:
    "A subject in the volume layout: the real trials with ten catch trials in each run, one file of random numbers."
    mask, generator = ellipsoid(voxels), np.random.default_rng(0)
    inside = write_anatomy(root, mask)
    area = np.zeros(GRID, np.int16)
    area[mask] = inside  # code 1 is V1
    write_nifti(root / "rois/prf/sub-01/resampled_varea.nii.gz", area, np.diag([2.0, 2.0, 2.0, 1.0]))
    first = None
    for (session, run), shown in pd.read_csv(things_table("sub-01_StimulusMetadata.csv")).groupby(
        ["session", "run"]
    ):
        stem = f"sub-01/ses-things{session:02d}/sub-01_ses-things{session:02d}_run-{run:02d}"
        names = [f"{c}/{i}" for c, i in zip(shown["concept"], shown["stimulus"], strict=True)]
        names = generator.permutation([*names, *(f"catch{k:03d}.jpg" for k in range(1, 11))])
        path = root / "betas_vol" / f"{stem}_betas.nii.gz"
        if first is None:
            stack = np.zeros((*GRID, len(names)))
            stack[mask] = 0.1 * generator.standard_normal((voxels, len(names)))
            first = write_nifti(path, stack, np.diag([2.0, 2.0, 2.0, 1.0]))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(first, path)
        pd.DataFrame({"image_filename": names}).to_csv(
            path.with_name(f"{Path(stem).name}_conditions.tsv"), sep="\t"
        )
    return root


def straightforward(root: Path) -> tuple[np.ndarray, pd.DataFrame]:
    "All of the table in memory, z-scored within session."
    trials = pd.read_csv(next(root.rglob("sub-01_StimulusMetadata.csv")))
    with h5py.File(next(root.rglob("sub-01_ResponseData.h5"))) as file:
        values = file["ResponseData/block0_values"][:].T
    for rows in trials.groupby("session").indices.values():
        values[rows] = (values[rows] - values[rows].mean(0)) / values[rows].std(0)
    return values.astype(np.float32), trials


def load(variant: str, root: Path) -> np.ndarray:
    "Responses and labels of the cached subject."
    ratings = load_properties(next(root.parent.rglob("animacy.csv")))
    if variant == "library":
        return ThingsDataset(cache(root), ratings).responses
    values, trials = straightforward(root)
    ratings.loc[trials["concept"]].to_numpy(np.float32)
    return values


def cache(root: Path) -> Path:
    "Where the cached subject of `load` is."
    return root.parent.with_name(f"{root.parent.name}-cache")


def build(variant: str, root: Path) -> np.ndarray:
    "A cache file made anew."
    out = root.with_name("cache")
    if variant == "library":
        shutil.rmtree(out, ignore_errors=True)
        return np.load(build_things(open_things(root), out) / "responses.npy", mmap_mode="r")
    np.save(root / "whole.npy", straightforward(root)[0])
    return np.load(root / "whole.npy", mmap_mode="r")


def full(variant: str, root: Path) -> None:
    "A full-size subject, cached; or the voxels of its regions, from the cache."
    out = root.with_name("cache")
    if variant == "build":
        build_things(open_things(root), out)
    else:
        _ = ThingsDataset(out, rois="V1").responses


def work(part: str, variant: str, root: Path, runs: int) -> dict[str, object]:
    "Seconds of each run in this process, and its memory; load is warmed up first."
    function = {"load": load, "build": build}.get(part, full)
    before = peak_mib("cpu")
    if part == "load":
        function(variant, root)
    seconds = []
    values = None
    for _ in range(runs):
        del values  # as after the last use
        start = time.perf_counter()
        values = function(variant, root)
        seconds.append(time.perf_counter() - start)
    peak = peak_mib("cpu")
    result = {"seconds": seconds, "peak_mib": peak, "extra_mib": peak - before}
    return (
        result if values is None else result | {"shape": values.shape, "sample": values[::97, ::97].tolist()}
    )


def apart(part: str, variant: str, root: Path, runs: int = 1) -> dict[str, object]:
    "`work` in a process of its own."
    job = [sys.executable, sys.argv[0], "--worker", part, variant, str(root), str(runs)]
    done = subprocess.run(job, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part}: {variant}\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{part}: {variant}: {min(result['seconds']):.2f} s, peak {result['peak_mib']:.0f} MiB",
        file=sys.stderr,
    )
    return result


def compare(part: str, what: str, root: Path, rounds: int, runs: int) -> dict[str, object]:
    "Both ways in turn."
    seconds: dict[str, list[float]] = {"straightforward": [], "library": []}
    memory = dict.fromkeys(seconds, 0.0)
    last = {}
    for _ in range(rounds):
        for variant in seconds:
            last[variant] = apart(part, variant, root, runs)
            seconds[variant] += last[variant]["seconds"]
            memory[variant] = max(memory[variant], last[variant]["extra_mib"])
    trials, voxels = last["library"]["shape"]
    samples = [np.array(found["sample"]) for found in last.values()]
    return {
        "what": what,
        "trials": trials,
        "voxels": voxels,
        **{f"{variant}_s": times for variant, times in seconds.items()},
        "ratio_of_medians": statistics.median(seconds["straightforward"])
        / statistics.median(seconds["library"]),
        "straightforward_extra_mib": memory["straightforward"],
        "extra_mib": memory["library"],
        "ratio_of_memory": memory["straightforward"] / memory["library"],
        "largest_difference": float(np.abs(samples[0] - samples[1]).max()),
    }


def whole_subject(part: str, voxels: int) -> dict[str, object]:
    "Seconds and peak memory of a subject of the published size."
    with tempfile.TemporaryDirectory() as tmp:
        root = (write_table if part == "table" else write_volumes)(Path(tmp) / "subject", voxels)
        made = apart(part, "build", root)
        card = json.loads((Path(tmp) / "cache/card.json").read_text())
        read = apart(part, "read", root)
    return {
        "trials": card["shape"][0],
        "voxels": card["shape"][1],
        "regions": IN_REGIONS * voxels // VOXELS,
        "build_s": made["seconds"][0],
        "build_peak_mib": round(made["peak_mib"]),
        "read_regions_s": read["seconds"][0],
        "read_regions_peak_mib": round(read["peak_mib"]),
    }


def measured(part: str, rounds: int) -> dict[str, object]:
    "A case: a part in which both ways are compared."
    if part == "load":
        root = embedded_things("design", layouts=("figshare",)) / "figshare"
        with locked(cache(root)):
            if not cache(root).exists():
                build_things(open_things(root), cache(root))
        return compare(part, "load a subject, warm", root, rounds, 5)
    with tempfile.TemporaryDirectory() as tmp:
        root = write_table(Path(tmp) / "subject", SMALLER)
        return compare(part, "build the cache of a table", root, rounds, 1)


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--rounds", type=int, default=2, help="processes started for each way")
    parser.add_argument("--voxels", type=int, default=VOXELS, help="of the full-size subject")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        part, variant, root, runs = args.worker
        print(json.dumps(work(part, variant, Path(root), int(runs))))
        return
    if not args.out:
        sys.exit("--out is needed")
    result = {"cases": [], "whole_subject": {}}
    result["provenance"] = provenance(omp_num_threads=os.environ.get("OMP_NUM_THREADS"))
    for part in args.parts:
        if part in ("load", "build"):
            result["cases"].append(measured(part, args.rounds))
        else:
            result["whole_subject"][part] = whole_subject(part, args.voxels)
        write_json(args.out, result)  # after each part: the last ones take minutes
    print(json.dumps(result["whole_subject"], indent=1))


if __name__ == "__main__":
    main()
