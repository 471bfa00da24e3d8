"""A tiny model and tiny random datasets for the tests of `cortexlit.training`; also used by the processes they start."""

from pathlib import Path

import numpy as np
import torch

from cortexlit.core import rng
from cortexlit.models.viv1t import ViV1T, ViV1TConfig

DROPOUTS = ("patch_dropout", "attention_dropout", "ff_dropout", "drop_path")
FRAMES, SIZE, LAST = 20, (10, 14), 8


class Toy:
    "Map-style dataset with the items of `MouseDataset`: labels follow brightness, running and the pupil."

    def __init__(self, samples: int = 8, neurons: int = 5, seed: int = 0):
        draw = rng(seed, "toy")
        self.items, weights = [], rng(0, "weights").random((neurons, 3))
        for _ in range(samples):
            video, state = draw.random((1, FRAMES, *SIZE)), draw.random((4, FRAMES))
            causes = np.stack([10 * video.mean((0, 2, 3)), state[0], state[3]])
            labels = weights @ causes + 0.3 * draw.random((neurons, FRAMES))
            arrays = {"video": video, "behavior": state[:2], "pupil_center": state[2:], "labels": labels}
            self.items.append({k: torch.tensor(v, dtype=torch.float32) for k, v in arrays.items()})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return dict(self.items[i])


def tiny_model(neurons: dict[str, int] | None = None, dropout: float = 0.0, **options) -> ViV1T:
    "A `ViV1T` of a few hundred weights, the same each time."
    torch.manual_seed(0)
    sizes = {"frames": FRAMES, "size": SIZE, "patch": (5, 5, 5), "stride": (1, 3, 3), "max_frames": 30}
    sizes |= {"emb_dim": 8, "heads": 2, "head_dim": 4, "mlp_dim": 8, "spatial_depth": 1, "temporal_depth": 1}
    model = ViV1T(ViV1TConfig(neurons or {"A": 5}, **(sizes | dict.fromkeys(DROPOUTS, dropout) | options)))
    for mouse, n in model.config.neurons.items():
        model.set_coordinates(mouse, rng(0, mouse).random((n, 2)))
    return model


def without_sampling(model: ViV1T) -> ViV1T:
    "The same model, whose readouts draw from Gaussians that a step of training cannot widen."

    def narrow(readout: torch.nn.Module, _: tuple) -> None:
        readout.sigma.data.zero_()

    for readout in model.readouts.values():
        readout.register_forward_pre_hook(narrow)
    return model


def tiers(**changes) -> tuple[Toy, Toy]:
    "(train, validation)"
    return Toy(8, seed=1, **changes), Toy(4, seed=2, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    "The model saved in a folder."
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")
