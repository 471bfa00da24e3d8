"""Time questions to all neurons of a model at once against the same questions neuron by neuron.

python benchmarks/bench_insilico.py --out FILE.json

The model has the published size (36 x 64 pixels, 227 neurons) and random weights: what it answers means nothing, and
takes as long. Two questions. Tuning: 8 directions x 5 spatial x 5 temporal frequencies, 25 frames each, shown once to
all neurons, against a loop that shows them to each neuron for itself. Most exciting films: a few steps of the climb
for 64 neurons in one batch, against a climb for each. Loops run over `--loop` neurons only; seconds are per neuron,
both ways, and both ways must give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from side_by_side import timed

from cortexlit.core import provenance, rng, write_json
from cortexlit.insilico.excite import exciting_films
from cortexlit.insilico.stimuli import Screen, Twin, grating_table
from cortexlit.insilico.tuning import show_gratings
from cortexlit.models.viv1t import ViV1T, ViV1TConfig

NEURONS, CLIMBED, FRAMES = 227, 64, 25


def published_twin() -> Twin:
    "The published size with random weights, before a screen."
    torch.manual_seed(0)
    model = ViV1T(ViV1TConfig({"A": NEURONS})).eval()
    model.set_coordinates("A", rng(0, "coordinates").uniform(0, 400, (NEURONS, 2)))
    with torch.no_grad():  # readouts of different neurons, so that their answers differ
        for readout in model.readouts.values():
            readout.features.normal_(0, 0.1)
    state = {name: np.full(2, 0.3, np.float32) for name in ("behavior", "pupil_center")}
    neurons = pd.DataFrame({"cell_id": np.arange(NEURONS)})
    return Twin(model, "A", Screen(), (0.0, 255.0), state, neurons, {}, np.full(NEURONS, np.nan))


def compare(name: str, together: Callable, alone: Callable, cells: int, loop: int, repeats: int) -> dict:
    "Seconds per neuron of one call for all `cells`, and of a call for each of `loop`; they take turns."
    all_s, loop_s, worst = [], [], 0.0
    for r in range(repeats):
        spent, whole = timed(together)
        all_s.append(spent / cells)
        for cell in range(r * loop // repeats, (r + 1) * loop // repeats):
            spent, one = timed(lambda cell=cell: alone(cell))
            loop_s.append(spent)
            worst = max(worst, float(np.abs(one - whole[cell]).max() / np.abs(whole[cell]).max()))
    fast, slow = statistics.median(all_s), statistics.median(loop_s)
    return {"question": name, "cells": cells, "cells_of_the_loop": loop, "one_by_one_s": loop_s, "together_s": all_s,
            "together_cells_per_s": 1 / fast, "one_by_one_cells_per_s": 1 / slow,
            "ratio_of_medians": slow / fast, "largest_relative_difference": worst}  # fmt: skip


def main() -> None:
    "Command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--loop", type=int, default=4, help="neurons of the loops")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each")
    parser.add_argument("--steps", type=int, default=2, help="of the climb")
    args = parser.parse_args()
    twin = published_twin()
    gratings = grating_table(
        direction=np.arange(8) * 45.0,
        spatial_frequency=(0.01, 0.02, 0.04, 0.08, 0.16),
        temporal_frequency=(0.5, 1.0, 2.0, 4.0, 8.0),
    )

    def tuned(cell: int | None = None) -> np.ndarray:
        answers = show_gratings(twin, gratings, FRAMES).T
        return answers if cell is None else answers[cell]

    def climbed(rows: range) -> np.ndarray:
        return exciting_films(twin, rows, FRAMES, steps=args.steps).answers[0]

    cases = [
        compare("tuning, 8 x 5 x 5 gratings", tuned, tuned, NEURONS, args.loop, args.repeats),
        compare(f"most exciting film, {args.steps} steps", lambda: climbed(range(CLIMBED)),
                lambda cell: climbed(range(cell, cell + 1))[0], CLIMBED, args.loop, args.repeats),
    ]  # fmt: skip
    threads = {"torch_threads": torch.get_num_threads(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    write_json(args.out, {"cases": cases, "provenance": provenance(**threads)})
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
