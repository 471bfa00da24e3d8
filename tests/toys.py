"""Small recordings made of random numbers, for tests that need a shape rather than a brain."""

import numpy as np
import pandas as pd

from cortexlit.core import rng
from cortexlit.data.recordings import Recording


def toy_recording(
    movies: dict[str, tuple[int, int]] | None = None,
    neurons: int = 5,
    seed: int = 0,
    ratio: float = 1.0056,
    **changes,
) -> Recording:
    "A recording that shows `movies` (name -> frames, repeats) one after the other, `ratio` two-photon frames per movie frame."
    movies = movies or {"one": (60, 5), "three": (200, 5)}
    draw, at, tables, templates, epochs = rng(seed, "toy"), 30, {}, {}, []
    for name, (frames, repeats) in movies.items():
        starts = np.floor(at + ratio * np.arange(frames * repeats)).astype(int)
        tables[name] = pd.DataFrame(
            {
                "frame": np.tile(np.arange(frames), repeats),
                "start": starts,
                "end": starts,
                "repeat": np.repeat(np.arange(repeats), frames),
            }
        )
        templates[name] = draw.integers(0, 256, (frames, 12, 20)).astype("uint8")
        epochs.append((name, starts[0], starts[-1]))
        at = starts[-1] + 60
    fields = {
        "name": "toy", "source": "test", "timestamps": 5 + np.arange(at) / 30.168,
        "traces": (10 + draw.standard_normal((neurons, at))).astype("float32"),
        "neurons": pd.DataFrame({"cell_id": 100 + np.arange(neurons), "x_um": draw.random(neurons), "y_um": draw.random(neurons)}),
        "stimulus_tables": tables, "templates": templates,
        "running": draw.normal(5, 3, at), "pupil_area": draw.normal(900, 90, at), "pupil_center": draw.normal(0, 3, (at, 2)),
        "epochs": pd.DataFrame(epochs, columns=["stimulus", "start", "end"]),
    }  # fmt: skip
    fields["running"][:8] = np.nan
    fields["pupil_area"][100:110] = fields["pupil_center"][100:110] = np.nan
    return Recording(**(fields | changes))
