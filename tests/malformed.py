"""Malformed input for every reader and every command: for the property tests, and for `tools/torture.py`, which counts.

`READERS` of `readers()` name a file each, and the call that reads it; `spoil` changes that file as its kind may be wrong:
bytes, arrays, tables, JSON, archives, HDF5, NIfTI, weights. `words` makes command lines that cannot be right.
"""

import csv
import gzip
import io
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cortexlit.data import checks


@dataclass(frozen=True)
class Reader:
    "A file, what reads it, and whether it is a tool that knows nothing of what the file should hold."

    path: Path
    read: Callable[[], Any]
    bare: bool = False
    card: Path | None = None  # of a folder whose files have hashes


# --- bytes, arrays


def _bytes(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    at = draw.randrange(len(whole) or 1)
    made = {
        "cut": whole[:at],
        "empty": b"",
        "bits turned": whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] if whole else b"x",
        "bytes follow": whole + draw.randbytes(7),
        "a page": b"<!DOCTYPE html><html>404 not found</html>",
        "brackets": b"[" * 100_000,
        "zeros": bytes(len(whole)),
        "noise": draw.randbytes(min(len(whole), 5000)),
    }
    name = draw.choice(list(made))
    return name, name not in ("bits turned", "bytes follow", "cut"), made[name]


def _array(a: np.ndarray, draw: random.Random) -> tuple[str, bool, np.ndarray]:
    "An array that is none of what was there."
    flat = a.astype(float) if a.dtype.kind in "fiub" else a.copy()

    def with_value(value: float) -> np.ndarray:
        changed = flat.copy()
        if changed.size:
            changed.flat[draw.randrange(changed.size)] = value
        return changed

    made = {
        "complex": np.ones(a.shape, complex),
        "text": np.full(a.shape, "x"),
        "scalar": np.float64(3),
        "no rows": a[:0] if a.ndim else a,
        "one row": a[:1] if a.ndim else a,
        "a row less": a[:-1] if a.ndim else a,
        "twice": np.concatenate([a, a]) if a.ndim else np.stack([a, a]),
        "an axis less": a[0] if a.ndim and len(a) else np.float64(3),
        "an axis more": a[None],
        "axes turned": np.ascontiguousarray(a.T) if a.ndim > 1 and a.shape != a.T.shape else a[None],
        "times": np.zeros(a.shape, "M8[s]"),
    }
    if a.dtype.kind in "fiub":
        made |= {"NaN": with_value(np.nan), "infinite": with_value(np.inf), "huge": with_value(1e300)}
        made |= {"negative": with_value(-3), "fraction": with_value(0.5), "all NaN": flat * np.nan}
    name = draw.choice(list(made))
    return name, name not in ("negative", "fraction"), made[name]


def _npy(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    out = io.BytesIO()
    if draw.random() < 0.15:
        name = draw.choice(["objects", "a header of exabytes"])
        if name == "objects":
            np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        else:
            header = {"descr": "<f8", "fortran_order": False, "shape": (10**18,)}
            np.lib.format.write_array_header_1_0(out, header)
        return name, True, out.getvalue()
    name, known, array = _array(np.load(io.BytesIO(whole)), draw)
    np.save(out, array)
    return name, known, out.getvalue()


def _npz(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    arrays = dict(np.load(io.BytesIO(whole), allow_pickle=False))
    key, out = draw.choice(list(arrays)), io.BytesIO()
    if draw.random() < 0.3:
        arrays["other"] = arrays.pop(key)
        name, known = f"{key} called otherwise", True
    else:
        name, known, arrays[key] = _array(arrays[key], draw)
        name = f"{key}: {name}"
    np.savez(out, **arrays)
    return name, known, out.getvalue()


# --- tables, JSON, YAML

CELLS = [
    "",
    "x",
    "-1",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "99999999999999999999",
    "1,5",
    "TRUE",
    "2020-01-01",
    "\u00fc",
    " ",
]


def _table(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    mark = "\t" if b"\t" in whole.split(b"\n", 1)[0] else ","
    rows = list(csv.reader(io.StringIO(whole.decode()), delimiter=mark))
    head, row, column = rows[0], draw.randrange(1, len(rows)), draw.randrange(len(rows[0]))
    name = draw.choice(["cell", "cell", "cell", "no column", "no header", "ragged", "row twice", "row gone", "no rows",
                        "column twice", "semicolons", "another encoding", "NUL"])  # fmt: skip
    known = name in ("no header", "no rows")
    if name == "cell":
        rows[row][column] = draw.choice(CELLS)
        name = f"{head[column]} = {rows[row][column]!r}"
    elif name == "no column":
        rows = [[c for k, c in enumerate(r) if k != column] for r in rows]
        name = f"no column {head[column]}"
    elif name == "no header":
        rows = rows[1:]
    elif name == "ragged":
        rows[row] = rows[row] + ["1"] * draw.randint(1, 3) if draw.random() < 0.5 else rows[row][:-1]
    elif name == "row twice":
        rows.insert(row, rows[row])
    elif name == "row gone":
        del rows[row]
    elif name == "no rows":
        rows = rows[:1]
    elif name == "column twice":
        rows = [[*r, r[column]] for r in rows]
    out = io.StringIO()
    csv.writer(out, delimiter=";" if name == "semicolons" else mark, lineterminator="\n").writerows(rows)
    text = out.getvalue()
    if name == "another encoding":
        return name, False, ("\u00e4" + text).encode("latin-1")
    return name, known, text.encode() + (b"\0" if name == "NUL" else b"")


VALUES = [None, "x", "", -1, 0, 10**9, 0.5, 1e308, True, [], {}, [[1]], "../../x", {"a": 1}]


def _inside(content: Any, draw: random.Random) -> str:
    "Change one place of nested lists and dictionaries; which."
    where = []
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw.choice(keys)
        where.append(str(key))
        value = content[key]
        if not isinstance(value, dict | list) or not value or draw.random() < 0.3:
            break
        content = value
    if isinstance(content, dict) and draw.random() < 0.3:
        del content[key]
        return f"no {'.'.join(where)}"
    content[key] = draw.choice(VALUES)
    return f"{'.'.join(where)} = {content[key]!r}"


def _json(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    content = json.loads(whole)
    if draw.random() < 0.15 or not content:
        value = draw.choice(VALUES)
        return f"all is {value!r}", False, json.dumps(value).encode()
    name = _inside(content, draw)
    return name, False, json.dumps(content).encode()


def _yaml(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    import yaml

    text = draw.choice(
        ["", "- 1", "x", "a: [", "!!python/object/apply:os.system ['true']", "\x07", None, None, None]
    )
    if text is not None:
        return repr(text), True, text.encode()
    content = yaml.safe_load(whole)
    name = _inside(content, draw)
    return name, False, yaml.safe_dump(content).encode()


# --- HDF5, NIfTI, weights


def _h5(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    memory = io.BytesIO(whole)
    with h5py.File(memory, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = draw.choice(names)
        if draw.random() < 0.3:
            parts = name.split("/")
            name = "/".join(parts[: draw.randint(max(1, len(parts) - 2), len(parts))])
            del file[name]
            told, known = f"no {name}", False
        else:
            value = file[name][()]
            value = np.asarray(value)
            told, known, changed = _array(
                value if value.dtype.kind in "fiub" else np.zeros(value.shape), draw
            )
            if changed.dtype.kind in "UM":
                changed = changed.astype("S8")
            attributes = dict(file[name].attrs)
            del file[name]
            file[name] = changed
            file[name].attrs.update(attributes)
            told, known = f"{name}: {told}", False
    return told, known, memory.getvalue()


def _nifti(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    raw = bytearray(gzip.decompress(whole) if whole[:2] == b"\x1f\x8b" else whole)
    fields = {
        "no dimensions": (40, "<h", 0), "nine dimensions": (40, "<h", 9), "a negative size": (42, "<h", -3),
        "a huge size": (42, "<h", 30_000), "unknown numbers": (70, "<h", 999), "complex numbers": (70, "<h", 32),
        "colours": (70, "<h", 128), "wide": (70, "<h", 64), "early data": (108, "<f", 4.0), "late data": (108, "<f", 1e9),
        "NaN slope": (112, "<f", np.nan), "infinite slope": (112, "<f", np.inf), "NaN offset": (116, "<f", np.nan),
        "flat voxels": (80, "<f", 0.0), "NaN place": (280, "<f", np.nan), "flat affine": (296, "<f", 0.0),
        "another affine": (292, "<f", 7.0), "no magic": (344, "<i", 0), "another length": (0, "<i", 540),
    }  # fmt: skip
    name = draw.choice([*fields, "bits turned in the header", "gzip cut"])
    if name in fields:
        at, form, value = fields[name]
        struct.pack_into(form, raw, at, value)
    elif name.startswith("bits"):
        raw[draw.randrange(348)] ^= 1 << draw.randrange(8)
    done = gzip.compress(bytes(raw), 1) if whole[:2] == b"\x1f\x8b" else bytes(raw)
    return name, False, done[:-9] if name == "gzip cut" else done


def _safetensors(path: Path, whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    tensors = load_file(path)
    key = draw.choice(sorted(tensors))
    name = draw.choice(
        ["gone", "called otherwise", "of another shape", "NaN", "one more", "of another type", "no tensors"]
    )
    if name == "gone":
        del tensors[key]
    elif name == "called otherwise":
        tensors["x." + key] = tensors.pop(key)
    elif name == "of another shape":
        tensors[key] = tensors[key][None].clone()
    elif name == "NaN":
        tensors[key] = tensors[key].double() * float("nan")
        tensors[key] = tensors[key].float()
    elif name == "one more":
        tensors["x"] = torch.zeros(3)
    elif name == "of another type":
        tensors[key] = tensors[key].to(torch.complex64)
    else:
        tensors = {}
    other = path.with_name("other")
    save_file(tensors, other, metadata={"format": "pt"})
    data = other.read_bytes()
    other.unlink()
    return f"{key} {name}", True, data


class _Strange:
    "Not to be loaded."


def _torch(whole: bytes, draw: random.Random) -> tuple[str, bool, bytes]:
    made = {"a list": [1], "a text": "x", "a number": 3, "no keys": {}, "an object": _Strange(), "tensors of nothing": {"model": {}},
            "another key": {"x": torch.zeros(2)}, "numbers": {"model": {"core.x": 3}}}  # fmt: skip
    name, out = draw.choice(list(made)), io.BytesIO()
    torch.save(made[name], out)
    return name, True, out.getvalue()


def spoil(path: Path, whole: bytes, draw: random.Random) -> tuple[str, bool]:
    "Write something that is not what a file of this kind should hold; what, and whether no such file can be right."
    kinds = {".npy": _npy, ".npz": _npz, ".csv": _table, ".tsv": _table, ".json": _json, ".yaml": _yaml, ".h5": _h5, ".nwb": _h5,
             ".nii": _nifti, ".gz": _nifti, ".pt": _torch, ".pth": _torch}  # fmt: skip
    if path.suffix == ".safetensors" and draw.random() < 0.75:
        name, known, data = _safetensors(path, whole, draw)
    elif path.suffix in kinds and draw.random() < 0.75:
        name, known, data = kinds[path.suffix](whole, draw)
    else:
        name, known, data = _bytes(whole, draw)
    path.write_bytes(data)
    return name, known


def sign(card: Path, path: Path) -> None:
    "Make the card of a folder say that a changed file belongs there."
    from cortexlit.core import seal, sha256

    content = json.loads(card.read_text())
    if path != card:
        content["files"][path.relative_to(card.parent).as_posix()] = sha256(path)
    card.write_text(json.dumps(seal(content)))


# --- everything that reads

SLOW = ("session", "events", "checkpoint", "run, config", "run, prov")  # readers that take seconds begin so


def content(found: Any) -> Any:
    "What a reader has found, as plain numbers that can be compared."
    from cortexlit.core import sha256

    if isinstance(found, Path):
        return {p.name: sha256(p) for p in sorted(found.rglob("*.np[yz]"))}
    if isinstance(found, torch.nn.Module):
        return {k: content(v) for k, v in found.state_dict().items()}
    if isinstance(found, torch.Tensor | np.ndarray):
        array = np.asarray(found)
        return [str(array.dtype), array.shape, array.tobytes() if array.dtype.kind != "O" else array.tolist()]
    if hasattr(found, "to_csv"):
        return found.to_csv()
    if isinstance(found, dict):
        return {str(k): content(v) for k, v in found.items()}
    if isinstance(found, list | tuple):
        return [content(v) for v in found]
    return repr(found)


def models(root: Path) -> dict[str, tuple[type, Path]]:
    "A small model of every kind, saved."
    import test_classifiers
    import test_cnn_vit
    import test_v1t
    import test_vit3d
    import toy_training

    from cortexlit.models.autoencoders import VAE, VAEConfig
    from cortexlit.models.diffusion import Diffusion, DiffusionConfig
    from cortexlit.models.flows import FlowMatching, FlowMatchingConfig
    from cortexlit.models.gan import GAN, GANConfig

    made = {
        "viv1t": toy_training.tiny_model(), "v1t": test_v1t.tiny_model(), "vit3d": test_vit3d.model(),
        "cnn_vit": test_cnn_vit.model(), "classifier": test_classifiers.small(),
        "vae": VAE(VAEConfig(inputs=5, labels=2, hidden=(4,))),
        "flow": FlowMatching(FlowMatchingConfig(inputs=5, labels=2, hidden=(4,))),
        "gan": GAN(GANConfig(inputs=5, labels=2, latents=3, hidden=(4,), judge=(4,))),
        "diffusion": Diffusion(DiffusionConfig(inputs=5, labels=2, hidden=(4,), rank=2)),
    }  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: (type(model), root / name) for name, model in made.items()}


def published(root: Path) -> Path:
    "A run folder of the published code."
    import yaml
    from toy_training import FRAMES, SIZE, tiny_model

    model = tiny_model()
    c = model.config
    args = {"core": "vivit", "core_emb_dim": c.emb_dim, "core_num_heads": c.heads, "core_head_dim": c.head_dim,
            "core_mlp_dim": c.mlp_dim, "core_spatial_depth": 1, "core_temporal_depth": 1, "max_frame": c.max_frames,
            "core_p_dropout": 0.0, "core_mha_dropout": 0.0, "core_ff_dropout": 0.0, "core_drop_path": 0.0,
            "core_temporal_patch_size": 5, "core_spatial_patch_size": 5, "core_temporal_patch_stride": 1,
            "core_spatial_patch_stride": 3, "input_shapes": {"video": [1, FRAMES, *SIZE]},
            "output_shapes": {"A": [5, FRAMES]}}  # fmt: skip
    (root / "ckpt").mkdir(parents=True)
    (root / "args.yaml").write_text(yaml.safe_dump(args))
    torch.save({"model": model.to_published()}, root / "ckpt/model_state.pt")
    return root


def park(path: Path) -> Path:
    "A small file in the layout of the open recordings."
    from scipy.io import savemat

    draw = np.random.default_rng(0)
    series = {name: draw.random((4, 9)) for name in ("neuron1", "neuron2", "speed", "pupil_zscore")}
    savemat(path, {"D": series, "TE": {"direction": [0, 45, 90, 135]}, "t": np.arange(9) / 16})
    return path


def readers(root: Path, study: Path, cache: Path) -> dict[str, Reader]:
    "Files and folders of every kind; `study` is a tiny one of `write_things`, `cache` a tiny session."
    from test_faults import READERS, clips, one, recording, scenes, tree
    from toy_training import LAST, Toy, tiers, tiny_model

    from cortexlit.core import load_array
    from cortexlit.data import allen, cached, opendata, splits, things
    from cortexlit.data import volumes as nifti
    from cortexlit.data.clips import MouseDataset
    from cortexlit.data.exchange import import_arrays, import_sensorium2022, import_tree
    from cortexlit.data.folds import build_folds, fold_folders, pooled_tier
    from cortexlit.data.scenes import ScenesDataset
    from cortexlit.evaluation.scores import ScoreSheet
    from cortexlit.models.adapters import Adapters, add_adapters, load_adapters, save_adapters
    from cortexlit.models.viv1t import ViV1T
    from cortexlit.simulate import session as synthetic
    from cortexlit.simulate import subject
    from cortexlit.training.features import cached_features
    from cortexlit.training.trainer import best_folder, fit

    made = {"clips": clips(root / "clips"), "scenes": scenes(root / "scenes")}
    made["folds"] = build_folds(recording(), root / "folds", folds=3, clip_frames=10, size=(6, 8), gap=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made["things"] = cached.build_things(things.open_things(study, "01", "figshare"), root / "things")
    for layout in READERS:
        made[layout] = tree(root / layout, layout)
    for layout in ("figshare", "volumes"):
        shutil.copytree(study / layout, root / f"fmri-{layout}")
    shutil.copy(study / "ratings/animacy.csv", root)
    np.save(root / "images.npy", np.random.default_rng(0).random((9, 4, 5)))
    np.savez(root / "arrays.npz", a=np.arange(9.0), b=np.array(["x"]))
    split = splits.split_by_concept(cached.ThingsDataset(made["things"]).trials)
    split.save(root / "split.json")
    out, responses = root / "out", np.random.default_rng(1).random((9, 2))

    session = sorted(allen.synthetic_sessions(cache))[0]
    shutil.copytree(cache, root / "allen")
    for sums in (root / "allen").rglob("*.sha256.json"):
        sums.unlink()
    mouse, saved = root / "allen", models(root / "models")
    sheet = ScoreSheet()
    sheet.save(root / "sheet")
    which = Adapters(2, "fused", head=True)
    save_adapters(add_adapters(tiny_model(), which), which, root / "adapters")
    kept = cached_features(tiny_model(), Toy(3), root / "kept", last=LAST, progress=False).folder
    options = {"last": LAST, "batch_size": 4, "progress": False}

    class Stop(Exception):
        pass

    def stop(history: Any) -> None:
        raise Stop

    fit(tiny_model(), tiers(), out=root / "run", epochs=1, **options)
    try:
        fit(tiny_model(), tiers(), out=root / "cut", epochs=2, on_epoch=stop, **options)
    except Stop:
        pass
    (newest,) = (root / "cut").glob("checkpoint-*")

    def importing(call: Callable, *arguments: Any, **more: Any) -> Path:
        shutil.rmtree(out, ignore_errors=True)
        return call(*arguments, out, **more)

    def every(folder: Path, kind: Callable) -> list:
        data = kind(folder, "train")
        return [data[i] for i in range(len(data))]

    def voxels(layout: str, whole: bool = False) -> list:
        found = things.open_things(root / f"fmri-{layout}", "01", layout)
        return [found.index.table, found.rois, found.mask, found.read() if whole else None]

    def recording(**more: Any) -> list:
        found = allen.open_session(session, mouse, **more)
        return [found.traces, found.timestamps, found.stimulus_tables, dict(found.templates), found.running,
                found.pupil_area, found.neurons]  # fmt: skip

    def model(name: str) -> list:
        kind, folder = saved[name]
        found = kind.from_pretrained(folder)
        return [found.config.to_diff_dict(), found]

    def resumed() -> list:
        copy = root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root / "cut", copy)
        return [fit(tiny_model(), tiers(), out=copy, epochs=2, **options).model]

    run = published(root / "published")
    cards = {name: made[name] / "card.json" for name in ("clips", "scenes", "things")}
    figshare, volumes = root / "fmri-figshare", root / "fmri-volumes"
    nwb = mouse / f"ophys_experiment_data/{session}.nwb"
    voxel_cache = {
        "read": lambda: [(d := cached.ThingsDataset(made["things"])).responses, d.rois, d.trials, d.mask]
    }
    found = {
        "array": Reader(root / "images.npy", lambda: load_array(root / "images.npy"), bare=True),
        "arrays": Reader(root / "arrays.npz", lambda: checks.load_arrays(root / "arrays.npz", ["a"]), bare=True),
        "table": Reader(made["clips"] / "neurons.csv", lambda: checks.load_table(made["clips"] / "neurons.csv", ["cell_id"]), bare=True),
        "split": Reader(root / "split.json", lambda: splits.Split.load(root / "split.json")),
        "tree": Reader(made["sensorium"] / "data/responses/3.npy", lambda: importing(import_tree, made["sensorium"])),
        "tree, behaviour": Reader(made["sensorium"] / "data/behavior/3.npy", lambda: importing(import_tree, made["sensorium"])),
        "tree, pupil": Reader(made["sensorium"] / "data/pupil_center/3.npy", lambda: importing(import_tree, made["sensorium"])),
        "tree, tiers": Reader(made["sensorium"] / "meta/trials/tiers.npy", lambda: importing(import_tree, made["sensorium"])),
        "tree, neurons": Reader(made["sensorium"] / "meta/neurons/cell_motor_coordinates.npy", lambda: importing(import_tree, made["sensorium"])),
        "study 1": Reader(made["study1"] / "train/videos/3.npy", lambda: importing(import_tree, made["study1"])),
        "2022": Reader(made["2022"] / "data/images/3.npy", lambda: importing(import_sensorium2022, made["2022"])),
        "2022, responses": Reader(made["2022"] / "data/responses/3.npy", lambda: importing(import_sensorium2022, made["2022"])),
        "2022, ids": Reader(made["2022"] / "meta/neurons/unit_ids.npy", lambda: importing(import_sensorium2022, made["2022"])),
        "laboratory": Reader(root / "images.npy", lambda: importing(import_arrays, root / "images.npy", responses)),
        "ratings": Reader(root / "animacy.csv", lambda: things.load_properties(root / "animacy.csv", ["lives"])),
        "volume": Reader(one(volumes, "sub-01*brainmask*"), partial(nifti.read_nifti, one(volumes, "sub-01*brainmask*")), bare=True),
        "mask": Reader(one(volumes, "sub-01*brainmask*"), lambda: voxels("volumes")),
        "region": Reader(one(volumes, "*_parcels/sub-01_*.nii.gz"), lambda: voxels("volumes")),
        "areas": Reader(one(volumes, "prf/sub-01/resampled_varea.nii.gz"), lambda: voxels("volumes")),
        "betas": Reader(one(volumes, "sub-01_*run-01_betas.nii.gz"), lambda: voxels("volumes", True)),
        "conditions": Reader(one(volumes, "sub-01*_conditions.tsv"), lambda: voxels("volumes")),
        "stimuli": Reader(one(figshare, "sub-01_Stim*"), lambda: voxels("figshare")),
        "voxels": Reader(one(figshare, "sub-01_Voxel*"), lambda: voxels("figshare")),
        "responses": Reader(one(figshare, "sub-01_Resp*"), lambda: voxels("figshare", True)),
        "session": Reader(nwb, recording),
        "events": Reader(mouse / f"ophys_experiment_events/{session}_events.npz", lambda: recording(signal="events")),
        "score sheet": Reader(root / "sheet/scores.json", lambda: ScoreSheet.load(root / "sheet").table()),
        "features": Reader(kept / "features.npy", lambda: every(kept.parent, lambda f, _: cached_features(tiny_model(), Toy(3), f, last=LAST, progress=False))),
        "features, card": Reader(kept / "card.json", lambda: every(kept.parent, lambda f, _: cached_features(tiny_model(), Toy(3), f, last=LAST, progress=False))),
        "run": Reader(root / "run/best/model.safetensors", lambda: ViV1T.from_pretrained(best_folder(root / "run")), card=root / "run/best/card.json"),
        "run, card": Reader(root / "run/best/card.json", lambda: ViV1T.from_pretrained(best_folder(root / "run")), card=root / "run/best/card.json"),
        "published, options": Reader(run / "args.yaml", lambda: ViV1T.from_published(run)),
        "published, weights": Reader(run / "ckpt/model_state.pt", lambda: ViV1T.from_published(run)),
        "core": Reader(saved["viv1t"][1] / "model.safetensors", lambda: ViV1T.from_published(saved["viv1t"][1]), card=saved["viv1t"][1] / "card.json"),
        "core, options": Reader(saved["viv1t"][1] / "config.json", lambda: ViV1T.from_published(saved["viv1t"][1]), card=saved["viv1t"][1] / "card.json"),
    }  # fmt: skip
    files = {"": "adapter_model.safetensors", ", options": "adapter_config.json", ", head": "head.safetensors",
             ", base": "base.json", ", card": "card.json"}  # fmt: skip
    for what, name in files.items():
        found[f"adapters{what}"] = Reader(
            root / "adapters" / name,
            lambda: load_adapters(tiny_model(), root / "adapters"),
            card=root / "adapters/card.json",
        )
    for path in sorted(mouse.glob("*.json")):
        if path.name != "cortexlit.json":
            found[f"session, {path.name}"] = Reader(path, lambda: [recording(), allen.list_sessions(mouse)])
    for name in saved:
        for what, file in {"": "model.safetensors", ", options": "config.json"}.items():
            card = saved[name][1] / "card.json"
            found[f"model {name}{what}"] = Reader(saved[name][1] / file, lambda n=name: model(n), card=card)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"):
        found[f"checkpoint, {name}"] = Reader(newest / name, resumed)
    for name in ("config.json", "provenance.json"):
        found[f"run, {name}"] = Reader(root / "cut" / name, resumed)
    for kind, call in (("clips", MouseDataset), ("scenes", ScenesDataset)):
        for path in sorted(made[kind].glob("*.*")):
            if path.suffix in (".npy", ".csv", ".json"):
                found[f"{kind}, {path.name}"] = Reader(
                    path, lambda k=kind, c=call: every(made[k], c), card=cards[kind]
                )
    for path, ident in ((mouse / "cortexlit.json", "sessions"), (mouse / f"truth/{session}.npz", "arrays")):
        found[f"truth, {ident}"] = Reader(
            path,
            lambda: synthetic.load_truth(mouse, session),
            card=mouse / "cortexlit.json" if ident == "arrays" else None,
        )
    shutil.copytree(study / "truth", root / "subjects" / "truth")
    shutil.copy(study / "things.json", root / "subjects")
    found["truth of a subject"] = Reader(
        root / "subjects/truth/sub-01.npz",
        lambda: subject.load_subject_truth(root / "subjects", "01"),
        card=root / "subjects/things.json",
    )
    found["open recording"] = Reader(park(root / "park.mat"), lambda: opendata._read_park(root / "park.mat"))
    for name in ("card.json", "samples.csv", "0/card.json"):
        found[f"folds, {name}"] = Reader(
            made["folds"] / name,
            lambda: [
                pooled_tier(made["folds"]),
                *(every(f, MouseDataset) for f in fold_folders(made["folds"])),
            ],
            card=made["folds"] / "card.json",
        )
    for path in sorted(made["things"].glob("*.*")):
        if path.suffix in (".npy", ".npz", ".csv", ".json"):
            found[f"cache, {path.name}"] = Reader(path, voxel_cache["read"], card=cards["things"])
    return found


# --- every command

WHOLE = ["-1", "x", "1.5", "99999999999999999999", "", "nan"]
REAL = ["nan", "inf", "-1", "x", "1e400"]
SPACE = ["nothing", "lr=", "lr=2..1", "lr=a..b", "=1,2", "epochs=1,2", "foo=1,2", "lr=0.1..nan", "depth=-1,x"]
NAME = ["x", "", "../x", "\u00fc", "a" * 300]


def commands(root: Path) -> dict[str, tuple[list[str], dict[str, list[str]]]]:
    "Command -> words that are right, and for each option (or argument, by its number) values that are not."
    from test_faults import clips, recording, scenes
    from toy_training import tiny_model

    from cortexlit.data import things
    from cortexlit.data.cached import build_things
    from cortexlit.data.folds import build_folds
    from cortexlit.simulate import subject

    (root / "file").write_text("precious")
    (root / "thesis").mkdir()
    (root / "thesis/chapter1.tex").write_text("years")
    study = subject.embedded_things("tiny", layouts=("figshare",))
    data, pictures = str(clips(root / "clips")), str(scenes(root / "scenes"))
    cache = str(build_things(things.open_things(study), root / "cache"))
    folds = str(build_folds(recording(), root / "folds", folds=3, clip_frames=10, size=(6, 8), gap=2))
    model = tiny_model(core_state=False, size=(6, 8))
    model.save_core(root / "core")
    model.save_pretrained(root / "model")
    run = str(root / "model")
    (root / "arrays").mkdir()
    for name, shape in (("images", (30, 6, 8)), ("responses", (30, 4))):
        np.save(root / "arrays" / f"{name}.npy", np.random.default_rng(0).random(shape))
    out = str(root / "new")
    outs = [
        str(root / "file"),
        str(root / "file/below"),
        str(root / ("n" * 300)),
        "/proc/nowhere/x",
        str(root / "thesis"),
    ]
    folders = [str(root / name) for name in ("nowhere", "file", "thesis")] + [
        data,
        folds,
        pictures,
        cache,
        "",
    ]

    def not_(*kinds: str) -> list[str]:
        return [f for f in folders if f not in kinds]

    embedded, ratings = ["--embedded", "tiny"], str(study / "ratings")
    sessions = ["x", "-1", "0", "99999999999999999999", "1.5", "\u00b2", "park_x", ""]
    core = ["--core", str(root / "core")]
    cores = [str(root / "file"), str(root / "thesis"), data, "x", "owner/nothing"]
    things_options = {"--rois": NAME, "--properties": NAME, "--folds": [*WHOLE, "0", "1", "2"], "--seed": WHOLE,
                      "--ratings": [*not_(), ratings + "/x"], "0": not_(cache)}  # fmt: skip
    return {
        "sessions": (embedded, {"--area": NAME, "--cre-line": NAME, "--depth": WHOLE, "--stimulus": NAME, "--embedded": NAME}),
        "build": (["900000001", *embedded, "--out", out], {
            "0": sessions, "--split": NAME, "--alignment": NAME, "--clip-frames": [*WHOLE, "0"], "--gap": WHOLE,
            "--resample": NAME, "--pupil": NAME, "--embedded": NAME, "--out": outs}),
        "score": ([data, "--last", "5"], {"0": not_(data), "--last": [*WHOLE, "0", "1000"], "--run": not_(), "--out": outs[:4]}),
        "import": ([str(root / "arrays"), "--out", out], {
            "0": not_(), "--frames": [*WHOLE, "5"], "--constant-neurons": NAME, "--out": outs}),
        "export": ([data, "--out", out], {"0": not_(data, pictures), "--layout": NAME, "--out": outs}),
        "fit": ([data, *core, "--last", "5"], {
            "0": not_(data), "--adapt": NAME, "--rank": ["8", *WHOLE], "--targets": ["all", *NAME], "--seed": WHOLE,
            "--core": cores, "--out": outs, "--scale": [*NAME, "paper"], "--last": [*WHOLE, "0", "1000"],
            "--epochs": ["-1", "0", "x"], "--lr": [*REAL, "0"], "--batch-size": [*WHOLE, "0"]}),
        "grid": ([data, *core, "--last", "5", "--seeds", "1"], {
            "0": not_(data), "--rank": WHOLE, "--targets": NAME, "--seeds": [*WHOLE, "0"], "--core": cores, "--out": outs,
            "--storage": [*NAME, "sqlite:////proc/nowhere/x.db", "nothing://x", "journal:///nowhere/x.log"], "--scale": NAME, "--last": [*WHOLE, "0", "1000"]}),
        "design": ([data, "--last", "5"], {
            "0": not_(data, folds), "--effect": [*REAL, "0", "3"], "--power": [*REAL, "0", "1"], "--last": [*WHOLE, "0", "1000"]}),
        "folds": ([folds, *core, "--last", "5"], {
            "0": not_(folds), "--adapt": NAME, "--seeds": [*WHOLE, "0"], "--core": cores, "--out": outs[:4], "--scale": NAME,
            "--last": [*WHOLE, "0", "1000"]}),
        "scenes build": (["900000002", *embedded, "--out", out], {
            "0": sessions, "--split": NAME, "--signal": NAME, "--delay": REAL, "--window": [*REAL, "0"],
            "--size": ["0 0", "-3 5", "100000 100000", "x 3"], "--constant-neurons": NAME, "--out": outs}),
        "scenes fit": ([pictures], {"0": not_(pictures), "--model": NAME, "--session": [*WHOLE, "0", "7"], "--seed": WHOLE,
            "--epochs": ["-1", "0", "x"], "--lr": [*REAL, "0"], "--batch-size": [*WHOLE, "0"], "--out": outs, "--scale": NAME}),
        "scenes tune": ([pictures, "--set", "lr=1e-3,1e-2", "--epochs", "1"], {"0": not_(pictures), "--set": SPACE, "--model": NAME,
            "--trials": [*WHOLE, "0"], "--sampler": NAME, "--pruner": NAME, "--storage": ["nothing://x", "journal:///nowhere/x.log"],
            "--seed": WHOLE, "--epochs": ["-1", "0", "x"], "--lr": [*REAL, "0"], "--batch-size": [*WHOLE, "0"], "--out": outs}),
        "scenes score": ([pictures], {"0": not_(pictures), "--run": not_(), "--out": outs[:4]}),
        "things build": ([str(study), "--out", out], {"0": not_(), "--subject": [*NAME, "04"], "--layout": NAME, "--zscore": NAME, "--out": outs}),
        "things fit": ([cache, "--ratings", ratings, "--out", out], things_options | {
            "--model": NAME, "--patch": ["0 0 0", "-1 2 2", "999 999 999"], "--layers": [*WHOLE, "0"], "--noise": REAL, "--mixing": REAL,
            "--augment": NAME, "--ratio": [*REAL, "101"],
            "--epochs": ["-1", "0", "x"], "--patience": ["-1", "0", "x"], "--lr": [*REAL, "0"], "--batch-size": [*WHOLE, "0"], "--out": outs}),
        "things tune": ([cache, "--ratings", ratings, "--set", "layers=1,2", "--epochs", "1"], things_options | {
            "--set": SPACE, "--model": NAME, "--patch": ["0 0 0", "-1 2 2"], "--trials": [*WHOLE, "0"], "--fold": [*WHOLE, "99"],
            "--sampler": NAME, "--pruner": NAME, "--storage": ["nothing://x", "journal:///nowhere/x.log"],
            "--epochs": ["-1", "0", "x"], "--lr": [*REAL, "0"], "--batch-size": [*WHOLE, "0"], "--out": outs}),
        "things score": ([cache, "--ratings", ratings], things_options | {
            "--bands": NAME, "--permutations": WHOLE, "--run": not_(), "--out": outs[:4]}),
        "data": ([], {"--nothing": NAME}),
        "pretrain": (["--out", out], {"--seed": WHOLE, "--out": outs}),
        "demo": ([], {"--out": outs[:4]}),
        "insilico tune": ([run, data, "--out", out, "--trust", "--degrees", "60", "120"], {
            "0": [*not_(), "owner/nothing"], "1": not_(data), "--neurons": [*WHOLE, "10000"], "--directions": [*WHOLE, "0"], "--out": outs}),
        "insilico fields": ([run, data, "--out", out, "--trust", "--degrees", "60", "120"], {
            "0": [*not_(), "owner/nothing"], "1": not_(data), "--neurons": [*WHOLE, "10000"], "--pictures": [*WHOLE, "0", "1"],
            "--seed": WHOLE, "--out": outs}),
        "insilico excite": ([run, data, "--out", out, "--trust", "--degrees", "60", "120"], {
            "0": [*not_(), "owner/nothing"], "1": not_(data), "--neurons": [*WHOLE, "10000"], "--seeds": [*WHOLE, "0"],
            "--steps": [*WHOLE, "0"], "--contrast": ["nothing", "0", "-1", "2", "nan"], "--unseen": not_(), "--kind": ["nothing", "", "avi", "gif.txt"],
            "--out": outs}),
    }  # fmt: skip


def words(command: str, right: list[str], wrong: dict[str, list[str]], draw: random.Random) -> list[str]:
    "A command line with one value that is not right."
    name = draw.choice(list(wrong))
    value = draw.choice(wrong[name])
    line = list(right)
    if name.isdigit():
        line[int(name)] = value
    else:
        if name in line:
            at = line.index(name)
            del line[at : at + 2]
        line += [name, *value.split(" ")] if name in ("--size", "--patch") else [f"{name}={value}"]
    if name in ("--rank", "--targets") and command == "fit" and value in ("8", "all"):
        return [*command.split(), *line]  # without --adapt lora
    if name in ("--rank", "--targets") and command == "fit":
        line.append("--adapt=lora")
    return [*command.split(), *line]
