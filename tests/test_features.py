"""What the core gives is kept on disk, and never mistaken for something else."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_training import LAST, Toy, tiers, tiny_model

from cortexlit.core import DataError, MissingError, read_json
from cortexlit.data.clips import MouseDataset, build_dataset
from cortexlit.models.viv1t import ViV1T
from cortexlit.training.features import CachedFeatures, cached_features, fingerprint, weights_digest

QUIET = {"last": LAST, "progress": False}


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    "How many samples went through the core, call by call."
    calls, encode = [], ViV1T.encode

    def counted(self, video, *args, **kwargs):
        calls.append(len(video))
        return encode(self, video, *args, **kwargs)

    monkeypatch.setattr(ViV1T, "encode", counted)
    return calls


def expected(model: ViV1T, data: Toy) -> torch.Tensor:
    "The core's output for all samples, (samples, channels, last, rows, columns)."
    batch = [torch.stack([item[k] for item in data.items]) for k in ("video", "behavior", "pupil_center")]
    with torch.no_grad():
        return model.eval().encode(*batch, last=LAST)


@pytest.mark.parametrize(("dtype", "step"), [("float32", 1e-6), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_items(tmp_path, dtype, step):
    model, data = tiny_model(), Toy(5)
    cache = cached_features(model, data, tmp_path, dtype=dtype, batch_size=2, **QUIET)
    assert len(cache) == 5
    for i, features in enumerate(expected(model, data)):
        item = cache[i]
        assert item.keys() == (data[i].keys() - {"video"}) | {"features"}
        assert item["features"].dtype == torch.float32 and item["features"].shape == (8, LAST, 2, 4)
        torch.testing.assert_close(item["features"], features, rtol=step, atol=1e-5)
        assert torch.equal(item["labels"], data[i]["labels"])
    assert "video" in data[0], "the dataset's own item has been changed"


def test_dropout_is_off_and_the_mode_is_given_back(tmp_path):
    model, data = tiny_model(dropout=0.5), Toy(3)
    model.train()
    cache = cached_features(model, data, tmp_path, dtype="float32", **QUIET)
    assert model.training and model.core.training
    torch.testing.assert_close(cache[1]["features"], expected(model, data)[1], rtol=1e-5, atol=1e-6)


def test_the_core_runs_once_per_sample(tmp_path, encoded):
    data = Toy(5)
    cached_features(tiny_model(), data, tmp_path, batch_size=2, **QUIET)
    assert encoded == [1, 2, 2, 1]  # one sample to learn the shape, then all
    encoded.clear()
    cached_features(tiny_model(), data, tmp_path, batch_size=2, **QUIET)
    assert encoded == [1]  # one sample to compare
    card = read_json(next(tmp_path.glob("*/card.json")))
    assert (
        card["samples"] == 5 and card["shape"] == [8, LAST, 2, 4] and card["provenance"]["packages"]["torch"]
    )


def test_what_the_key_depends_on(tmp_path, encoded):
    def made(model: ViV1T | None = None, data: Toy | None = None, **options: object) -> bool:
        encoded.clear()
        cached_features(model or tiny_model(), data or Toy(3), tmp_path, **QUIET | options)
        return sum(encoded) > 1

    assert made() and not made()
    model = tiny_model()
    torch.nn.init.ones_(model.readouts["A"].bias)
    assert not made(model), "heads do not enter"
    with torch.no_grad():
        next(model.core.parameters()).view(-1)[0] += 1e-6
    assert made(model)
    for name, enters in (("video", True), ("behavior", True), ("pupil_center", True), ("labels", False)):
        data = Toy(3)
        data.items[2][name][0, -1] += 1e-3
        assert made(data=data) == enters, name
    data = Toy(3)
    data.items.reverse()
    assert made(data=data)
    assert made(last=LAST - 1) and made(dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert made() and not made()


def test_fingerprint_tells_shape_type_and_place_apart():
    a = np.arange(6, dtype="float32")
    variants = [[a], [a.reshape(2, 3)], [a.view("int32")], [a[:3], a[3:]], [a[3:], a[:3]], [a, a]]
    hashes = [fingerprint([{"x": x} for x in items])["x"] for items in variants]
    assert len(set(hashes)) == len(hashes)
    assert fingerprint([{"x": a, "y": a}]) == fingerprint([{"y": a, "x": a}])
    assert weights_digest(tiny_model()) != weights_digest(tiny_model(emb_dim=9))


def test_equal_weights_in_another_configuration_have_features_of_their_own(tmp_path, monkeypatch):
    import cortexlit.training.features as module

    models = [tiny_model(heads=heads, head_dim=8 // heads) for heads in (2, 4)]
    for model in models:
        for name, weight in model.core.named_parameters():
            if "fused_linear" in name or "attn_out" in name:
                weight.data *= 30  # attention has to matter
    kept = [cached_features(model, Toy(3), tmp_path, **QUIET) for model in models]
    assert kept[0].folder != kept[1].folder and not torch.equal(
        kept[0][0]["features"], kept[1][0]["features"]
    )
    other_head = tiny_model(output="elu1", shifter_layers=2, readout_dropout=0.5, dropout=0.3)
    assert module._core_options(other_head) == module._core_options(tiny_model())
    monkeypatch.setattr(module, "_core_options", lambda model: None)  # a model whose options do not tell
    cached_features(models[0], Toy(3), tmp_path, **QUIET)
    with pytest.raises(DataError, match="other features for the first sample"):
        cached_features(models[1], Toy(3), tmp_path, **QUIET)


def test_damage_is_named(tmp_path):
    data = Toy(3)
    folder = cached_features(tiny_model(), data, tmp_path, **QUIET).folder
    path = folder / "features.npy"
    with pytest.raises(DataError, match="2 samples"):
        CachedFeatures(Toy(2), folder)
    rows = np.lib.format.open_memmap(path, mode="r+")
    rows[2, 0, 0, 0, 0] += 1
    rows.flush()
    with pytest.raises(DataError, match=str(path)):
        cached_features(tiny_model(), data, tmp_path, **QUIET)
    path.unlink()
    with pytest.raises(MissingError, match=str(path)):
        cached_features(tiny_model(), data, tmp_path, **QUIET)
    (folder / "card.json").unlink()
    with pytest.raises(MissingError, match="card.json"):
        cached_features(tiny_model(), data, tmp_path, **QUIET)


class Interrupted(Toy):
    "Stops the process, once, when sample 3 is read for the core."

    def __init__(self, samples: int):
        super().__init__(samples)
        self.reads = 0

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.reads += i == 3
        if i == 3 and self.reads == 2:  # the first time, its content was hashed
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_an_interrupted_cache_is_finished_later(tmp_path, encoded):
    model, data = tiny_model(), Interrupted(6)
    with pytest.raises(KeyboardInterrupt):
        cached_features(model, data, tmp_path, **QUIET)
    work = next(tmp_path.glob("*.partial"))
    assert np.load(work / "done.npy").tolist() == [True] * 3 + [False] * 3
    rows = np.lib.format.open_memmap(work / "features.npy", mode="r+")
    rows[3] = 7  # as if it had been cut while writing this row
    rows.flush()
    encoded.clear()
    cache = cached_features(model, data, tmp_path, **QUIET)
    assert sum(encoded) == 1 + 3
    assert not work.exists() and not (cache.folder / "done.npy").exists()
    torch.testing.assert_close(
        torch.stack([item["features"] for item in cache]), expected(model, data), rtol=1e-3, atol=1e-5
    )


def test_all_rows_done_but_not_yet_named(tmp_path, encoded, monkeypatch):
    import cortexlit.training.features as module

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256", cut)
        with pytest.raises(KeyboardInterrupt):
            cached_features(tiny_model(), Toy(3), tmp_path, **QUIET)
    encoded.clear()
    assert len(cached_features(tiny_model(), Toy(3), tmp_path, **QUIET)) == 3
    assert sum(encoded) == 1


def test_two_at_a_time_make_it_once(tmp_path, encoded):
    data, models = Toy(6), [tiny_model(), tiny_model()]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda model: cached_features(model, data, tmp_path, **QUIET), models))
    assert both[0].folder == both[1].folder
    assert sum(encoded) == 6 + 2


def test_size_is_announced_and_space_is_needed(tmp_path, capsys, monkeypatch):
    import cortexlit.training.features as module

    cached_features(tiny_model(), Toy(3), tmp_path / "a", last=LAST)
    assert capsys.readouterr().out == "features of 3 samples, each (8, 8, 2, 4) float16: 0.0 MB\n"
    cached_features(tiny_model(), Toy(3), tmp_path / "a", last=LAST)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match="are free"):
        cached_features(tiny_model(), Toy(3), tmp_path / "b", **QUIET)
    assert not list(Path(tmp_path / "b").rglob("features.npy"))


def test_numbers_that_do_not_fit(tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.core.temporal_transformer.blocks[0].ff_out[2].weight, 1e6)
    with pytest.raises(DataError, match='dtype="float32"'):
        cached_features(model, Toy(3), tmp_path, **QUIET)
    assert torch.isfinite(
        cached_features(model, Toy(3), tmp_path, dtype="float32", **QUIET)[0]["features"]
    ).all()
    with pytest.raises(DataError, match="one of float16"):
        cached_features(model, Toy(3), tmp_path, dtype="int8", **QUIET)
    with pytest.raises(DataError, match="last=99"):
        cached_features(model, Toy(3), tmp_path, last=99)


def test_without_behaviour(tmp_path):
    model = tiny_model(behavior_channels=0, pupil_channels=0, shifter=False, state_encoder=False)
    data = tiers()[1]
    for item in data.items:
        del item["behavior"], item["pupil_center"]
    cache = cached_features(model, data, tmp_path, **QUIET)
    assert cache[0].keys() == {"features", "labels"}


def test_a_dataset_folder(tmp_path):
    from toys import toy_recording

    folder = build_dataset(
        toy_recording(), tmp_path / "data", clip_frames=20, size=(10, 14), split="stimuli", gap=5
    )
    data = MouseDataset(folder, "train")
    cache = cached_features(tiny_model(), data, tmp_path / "cache", **QUIET)
    assert len(cache) == len(data) and cache[0]["labels"].shape == (5, 20)
