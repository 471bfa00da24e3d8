"""ViV1T: parity with the published code, its checkpoints in every form, and the contract of the model."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from malformed import sign
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from cortexlit.core import CortexlitError, DataError, MissingError
from cortexlit.models import viv1t
from cortexlit.models.losses import LOSSES
from cortexlit.models.readouts import MODULATORS
from cortexlit.models.viv1t import ViV1T, ViV1TConfig, published_viv1t_config

FIXTURE = Path(__file__).parent / "fixtures" / "viv1t_tiny.safetensors"
SENSORIUM = dict(
    zip("ABCDEFGHIJ", (7440, 7928, 8285, 7671, 7495, 7863, 7908, 8202, 7939, 8122), strict=True)
)  # neurons of the five old and five new mice of the Sensorium 2023 competition


@pytest.fixture(scope="module")
def published() -> dict:
    "Weights, inputs, outputs and gradients of the published code at small sizes, and its options under our names."
    arrays = load_file(FIXTURE)
    with safe_open(FIXTURE, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    parts = {"state": {}, "in": {}, "out": {}, "grad": {}}
    for name, value in arrays.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = value
    args = {
        "core": "vivit",
        "core_emb_dim": sizes["emb_dim"],
        "core_num_heads": sizes["num_heads"],
        "core_head_dim": sizes["head_dim"],
        "core_mlp_dim": sizes["mlp_dim"],
        "core_spatial_depth": sizes["spatial_depth"],
        "core_temporal_depth": sizes["temporal_depth"],
        "core_temporal_patch_size": sizes["temporal_patch_size"],
        "core_temporal_patch_stride": 1,
        "core_spatial_patch_size": sizes["spatial_patch_size"],
        "core_spatial_patch_stride": sizes["spatial_patch_stride"],
        "core_behavior_mode": 2,
        "core_patch_mode": 0,
        "core_pos_encoding": 3,
        "core_parallel_attention": True,
        "core_norm_qk": False,
        "core_p_dropout": 0.1338,
        "core_mha_dropout": 0.358,
        "core_ff_dropout": 0.0592,
        "core_drop_path": 0.0505,
        "max_frame": sizes["max_frame"],
        "readout": "gaussian2d",
        "readout_grid_mode": 1,
        "readout_bias_mode": 2,
        "readout_dropout": 0.0,
        "shifter_mode": 1,
        "shifter_layers": 3,
        "shifter_size": 5,
        "modulator_mode": 0,
        "output_mode": 1,
        "output_dir": "runs/viv1t_001",
        "grad_norm": None,
        "input_shapes": {"video": [1, sizes["frames"], sizes["height"], sizes["width"]]},
        "output_shapes": {"A": [sizes["neurons"], sizes["frames"]]},
    }
    config = published_viv1t_config(args)
    config.loss_frames = None
    return parts | {"args": args, "config": config}


def inputs(published: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return published["in"]["video"], published["in"]["behavior"], published["in"]["pupil_center"]


def write_run(folder: Path, published: dict, **args) -> Path:
    "A run folder as the published code leaves it: numpy scalars in the scheduler, an optimizer, text options."
    (folder / "ckpt").mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(published["args"] | args))
    checkpoint = {
        "epoch": 137,
        "value": 0.2507,
        "model": published["state"],
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0)}},
            "param_groups": [{"lr": 0.0048, "params": [0]}],
        },
        "scheduler": {"best_value": np.float64(0.2507), "num_reduce": np.int64(1), "ok": np.bool_(True)}
        | {"loss": np.float32(3.5), "checkpoint_dir": "runs/viv1t_001/ckpt", "min_lr": 1e-7},
    }
    torch.save(checkpoint, folder / "ckpt" / "model_state.pt")
    return folder


def tiny(**options) -> ViV1TConfig:
    "Options of a model that takes milliseconds."
    small = {"neurons": {"A": 5}, "frames": 14, "size": (10, 16), "patch": (5, 4, 4), "stride": (1, 2, 2)}
    small |= {"emb_dim": 8, "heads": 2, "head_dim": 4, "mlp_dim": 12, "spatial_depth": 1, "temporal_depth": 1}
    return ViV1TConfig(**(small | {"max_frames": 20, "loss_frames": None} | options))


def tiny_model(seed: int = 0, **options) -> ViV1T:
    torch.manual_seed(seed)
    model = ViV1T(tiny(**options)).eval()
    for mouse, neurons in model.config.neurons.items():
        if model.config.positions == "predicted":
            model.set_coordinates(mouse, torch.randn(neurons, 3))
        with torch.no_grad():  # as if trained: neurons differ
            model.readouts[mouse].features.normal_()
    return model


def tiny_clip(config: ViV1TConfig, batch: int = 2, seed: int = 1, frames: int | None = None) -> dict:
    g = torch.Generator().manual_seed(seed)
    frames = frames or config.frames
    clip = {"video": torch.randn(batch, 1, frames, *config.size, generator=g)}
    clip |= {"behavior": torch.randn(batch, config.behavior_channels, frames, generator=g)}
    clip |= {"pupil_center": torch.randn(batch, config.pupil_channels, frames, generator=g)}
    return clip


# ---------------------------------------------------------------- parity with the published code


def test_every_stage_equals_the_published_code(published):
    model = ViV1T.from_published(published["state"], published["config"])
    video, behavior, pupil = inputs(published)
    out, close = published["out"], {"atol": 1e-5, "rtol": 0}
    with torch.no_grad():
        tokens = model.core.tokenizer(video, torch.cat([behavior, pupil], 1))
        torch.testing.assert_close(tokens, out["tokens"], **close)
        core = model.encode(video, behavior, pupil)
        torch.testing.assert_close(core, out["core"], **close)
        shifts = model.shifters["A"](pupil[..., -core.shape[2] :])
        torch.testing.assert_close(shifts, out["shifts"], **close)
        torch.testing.assert_close(model.read(core, behavior, pupil), out["raw"], **close)
        torch.testing.assert_close(model(video, behavior, pupil).logits, out["response"], **close)


def test_every_gradient_equals_the_published_code(published):
    model = ViV1T.from_published(published["state"], published["config"])
    loss = model(*inputs(published)).logits.square().mean()
    torch.testing.assert_close(loss, published["out"]["loss"][0], atol=1e-5, rtol=0)
    loss.backward()
    seen = set()
    for name, parameter in model.named_parameters():
        name = name.replace("core.", "core.vivit.", 1)
        expected = published["grad"][name]
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        seen.add(name)
    assert seen == set(published["grad"])
    assert (published["grad"]["readouts.A.sigma"] == 0).all()  # the only one without: not used in evaluation


def test_coordinates_are_standardised_as_published(published):
    model = ViV1T(published["config"])
    model.set_coordinates(None, published["in"]["coordinates"])
    torch.testing.assert_close(model.readouts["A"].source_grid, published["state"]["readouts.A.source_grid"])


@pytest.mark.parametrize("neurons", [{"A": 227}, SENSORIUM])
def test_parameter_counts_are_the_published_ones(neurons):
    with torch.device("meta"):
        model = ViV1T(ViV1TConfig(neurons=neurons))

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert count(model.core) == 2_916_074
    assert count(model) == (2_956_282 if len(neurons) == 1 else 12_278_365)
    assert count(model.core.tokenizer) == 778_218
    assert count(model.core.spatial_transformer) == 3 * 267_232
    assert count(model.shifters["A"]) == 57
    assert count(model.readouts["A"]) == 117 * neurons["A"] + 152 + 13_440
    assert model.config.grid == (116, 15, 29)


@pytest.mark.parametrize(
    ("modulator", "total"), [("mlp", 2_957_473), ("mlp-v2", 2_956_763), ("mlp-v3", 2_957_190)]
)
def test_parameter_counts_with_modulators(modulator, total):
    with torch.device("meta"):
        model = ViV1T(ViV1TConfig(modulator=modulator))
    assert sum(p.numel() for p in model.parameters()) == total


# ---------------------------------------------------------------- published checkpoints


def test_published_layout_is_written_back_exactly(published):
    model = ViV1T.from_published(published["state"], published["config"])
    model.config.drop_path = round(1 - float(published["state"][_keep_prob()]), 4)
    written = model.to_published()
    assert written.keys() == published["state"].keys()
    for name, value in published["state"].items():
        torch.testing.assert_close(written[name], value, atol=1e-7, rtol=0)
    written["readouts.A.bias"] += 1  # a copy, not the model's own memory
    assert torch.equal(model.readouts["A"].bias, published["state"]["readouts.A.bias"])


def _keep_prob() -> str:
    return "core.vivit.spatial_transformer.blocks.0.drop_path1.keep_prob"


def same_answers(model: ViV1T, published: dict) -> None:
    assert not model.training
    with torch.no_grad():
        got = model(*inputs(published)).logits
    torch.testing.assert_close(got, published["out"]["response"], atol=1e-5, rtol=0)


def test_every_form_of_source_gives_the_same_model(published, tmp_path):
    folder = write_run(tmp_path / "bryanlimy" / "ViV1T" / "viv1t_001", published)
    same_answers(ViV1T.from_published(folder), published)  # options from args.yaml
    same_answers(ViV1T.from_published(str(folder)), published)
    same_answers(ViV1T.from_published(folder / "ckpt" / "model_state.pt", published["config"]), published)
    os.chdir(tmp_path)  # the id of the hub, and a folder of that name
    same_answers(ViV1T.from_published("bryanlimy/ViV1T/viv1t_001"), published)
    bare = {name: value for name, value in published["state"].items() if value.ndim}  # without the constants
    same_answers(ViV1T.from_published(bare, published["config"]), published)
    compiled = {k.replace("core.", "core._orig_mod."): v for k, v in published["state"].items()}
    same_answers(ViV1T.from_published({"model": compiled}, published["config"]), published)
    save_file(bare, tmp_path / "weights.safetensors")
    same_answers(ViV1T.from_published(tmp_path / "weights.safetensors", published["config"]), published)
    model = ViV1T.from_published(folder)
    model.save_pretrained(tmp_path / "ours")
    same_answers(ViV1T.from_published(tmp_path / "ours"), published)
    same_answers(ViV1T.from_pretrained(tmp_path / "ours"), published)


def test_hub_id_is_read_from_the_hub_cache_without_a_network(published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--bryanlimy--ViV1T"
    old, new = "a" * 40, "b" * 40
    write_run(repository / "snapshots" / old / "viv1t_001", published)
    changed = published | {
        "state": {k: v + 1 if k == "readouts.A.bias" else v for k, v in published["state"].items()}
    }
    write_run(repository / "snapshots" / new / "viv1t_001", changed)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(old)
    (repository / "refs" / "v2").write_text(new)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same_answers(ViV1T.from_published("bryanlimy/ViV1T/viv1t_001"), published)
    same_answers(ViV1T.from_published(f"bryanlimy/ViV1T/viv1t_001@{old}"), published)
    for revision in (new, "v2"):
        model = ViV1T.from_published(f"bryanlimy/ViV1T/viv1t_001@{revision}")
        assert torch.equal(model.readouts["A"].bias, changed["state"]["readouts.A.bias"])
    with pytest.raises(MissingError, match="--revision v3 --local-dir"):
        ViV1T.from_published("bryanlimy/ViV1T/viv1t_001@v3")
    with pytest.raises(MissingError) as error:
        ViV1T.from_published("bryanlimy/ViV1T/viv1t_002")
    for words in ("viv1t_002", "hf download bryanlimy/ViV1T --include 'viv1t_002/*'", "DIR/viv1t_002"):
        assert words in str(error.value)


def test_hub_download_of_both_layouts(published, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    hub = tmp_path / "hub"
    write_run(hub / "lab" / "repo" / "run", published)
    ViV1T.from_published(hub / "lab" / "repo" / "run").save_pretrained(hub / "lab" / "ours")
    (hub / "lab" / "empty").mkdir()

    def fetch(repo, filename, subfolder=None, revision=None):
        path = hub / repo / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    same_answers(ViV1T.from_published("lab/repo/run"), published)
    same_answers(ViV1T.from_published("lab/ours"), published)
    with pytest.raises(MissingError, match="has no args.yaml or config.json in its root"):
        ViV1T.from_published("lab/empty")


def test_options_and_weights_are_of_one_commit(published, tmp_path, monkeypatch):
    "A push between the two downloads does not mix two versions of a run."
    import huggingface_hub

    asked = []
    for commit in ("a" * 40, "b" * 40):
        write_run(tmp_path / "snapshots" / commit / "run", published)

    def fetch(repo, filename, subfolder=None, revision=None):
        asked.append(revision)
        commit = revision or ("a" if len(asked) == 1 else "b") * 40  # the branch has moved
        return str(tmp_path / "snapshots" / commit / subfolder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    same_answers(ViV1T.from_published("lab/repo/run"), published)
    assert asked == [None, "a" * 40]


def test_core_only_starts_fresh_heads_for_new_neurons(published, tmp_path):
    folder = write_run(tmp_path / "run", published)
    xy = np.random.default_rng(0).normal(size=(9, 3)) * 100
    torch.manual_seed(0)
    model = ViV1T.from_published(folder, mice={"new": xy}, core_only=True)
    assert model.config.neurons == {"new": 9} and list(model.readouts) == ["new"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode(*inputs(published)), published["out"]["core"], atol=1e-5, rtol=0
        )
    assert (model.readouts["new"].bias == 0).all() and model.readouts["new"].source_grid.abs().max() == 1
    assert ViV1T.from_published(folder, core_only=True).config.neurons == {}
    heads = {k: v for k, v in published["state"].items() if not k.startswith("core.")}
    core = {k: v for k, v in published["state"].items() if k.startswith("core.")}
    again = ViV1T.from_published(core, published["config"], mice={"new": xy}, core_only=True)
    assert torch.equal(
        again.core.tokenizer.tokenizer["2"].weight, core["core.vivit.tokenizer.tokenizer.2.weight"]
    )
    with pytest.raises(DataError, match="missing: core.vivit"):
        ViV1T.from_published(heads, published["config"], mice={"new": xy}, core_only=True)
    for mice, words in ((["new"], "name: coordinates"), ({"new": 9}, "predicted from coordinates")):
        with pytest.raises(DataError, match=words):
            ViV1T.from_published(folder, mice=mice, core_only=True)


def test_reading_a_saved_model_prints_nothing(tmp_path, capsys):
    "A sheet is printed after it; those who want bars for other models keep them."
    tiny_model().save_pretrained(tmp_path)
    logging.enable_progress_bar()
    capsys.readouterr()
    ViV1T.from_pretrained(tmp_path)
    told = capsys.readouterr()
    assert told.out == told.err == "" and logging.is_progress_bar_enabled()


def test_saved_core_has_no_mouse_and_starts_new_ones(tmp_path):
    model = tiny_model(neurons={"A": 5, "B": 7})
    model.save_core(tmp_path / "core")
    names = load_file(tmp_path / "core" / "model.safetensors")
    assert all(name.startswith("core.") for name in names)
    new = ViV1T.from_published(tmp_path / "core", core_only=True, mice={"C": torch.randn(3, 2)})
    clip = tiny_clip(model.config)
    assert torch.equal(new.encode(**clip), model.encode(**clip))
    assert new(**clip).logits.shape == (2, 3, 10)
    assert ViV1T.from_pretrained(tmp_path / "core").config.neurons == {}
    with pytest.raises(DataError, match="core_only=True"):
        ViV1T.from_published(tmp_path / "core", mice=["A"])


def test_some_of_the_mice_can_be_kept():
    model = tiny_model(neurons={"A": 5, "B": 7, "C": 3}, modulator="mlp")
    kept = ViV1T.from_published(model.to_published(), model.config, mice=["C", "A"])
    clip = tiny_clip(model.config)
    assert (
        set(kept.readouts)
        == set(kept.shifters)
        == set(kept.modulators)
        == set(kept.config.neurons)
        == {"A", "C"}
    )
    assert torch.equal(kept(**clip, mouse_id="C").logits, model(**clip, mouse_id="C").logits)


@pytest.mark.parametrize(
    "options",
    [
        {"modulator": "mlp", "output": "elu1"},
        {"modulator": "mlp-v2", "shifter": False},
        {"modulator": "mlp-v3", "positions": "free", "output": "softplus"},
        {"state_encoder": False, "neurons": {"x": 3, "y": 4}},
    ],
)
def test_optional_parts_survive_the_published_layout(options):
    model = tiny_model(**options)
    state = model.to_published()
    again = ViV1T.from_published(state, model.config)
    clip, mouse = tiny_clip(model.config), next(iter(model.config.neurons))
    assert torch.equal(again(**clip, mouse_id=mouse).logits, model(**clip, mouse_id=mouse).logits)
    seen = viv1t._visible_config(state)  # what names and constants alone tell
    hidden = {"output"} if options.get("output") == "softplus" else set()
    for name in {
        "neurons",
        "modulator",
        "shifter",
        "positions",
        "state_encoder",
        "output",
        "drop_path",
    } - hidden:
        assert getattr(seen, name) == getattr(model.config, name), name


def test_missing_unexpected_and_misshapen_arrays_are_named(published):
    state = dict(published["state"])
    del state["readouts.A.bias"], state["core.vivit.tokenizer.tokenizer.2.bias"]
    state["core.vivit.cls_token"] = torch.zeros(3)
    state["shifters.B.mlp.0.weight"] = torch.zeros(5, 2)
    state["readouts.A.features"] = torch.zeros(1, 16, 12)
    with pytest.raises(DataError) as error:
        ViV1T.from_published(state, published["config"])
    text = str(error.value)
    for words in (
        "2 missing: core.vivit.tokenizer.tokenizer.2.bias, readouts.A.bias",
        "2 unexpected: core.vivit.cls_token, shifters.B.mlp.0.weight",
        "1 of another shape: readouts.A.features [1, 16, 12] instead of [1, 16, 11]",
        "config=ViV1TConfig",
    ):
        assert words in text


def test_heads_of_another_width_are_refused_although_every_shape_fits(published):
    config = ViV1TConfig(**(published["config"].to_dict() | {"heads": 6, "head_dim": 4}))
    with pytest.raises(DataError, match=r"heads of width 8(.|\n)*head_dim=4"):
        ViV1T.from_published(published["state"], config)


def test_pickles_that_could_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    torch.save({"model": {}, "scheduler": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="do not trust"):
        ViV1T.from_published(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_damaged_files_are_named(published, tmp_path, damage):
    path = write_run(tmp_path / "run", published) / "ckpt" / "model_state.pt"
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}.get(damage, pickle.dumps(3))
    )
    with pytest.raises(CortexlitError) as error:
        ViV1T.from_published(tmp_path / "run")
    assert "model_state.pt" in str(error.value)


def test_incomplete_folders_and_unknown_names(published, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="args.yaml or config.json"):
        ViV1T.from_published(tmp_path / "empty")
    folder = write_run(tmp_path / "run", published)
    (folder / "ckpt" / "model_state.pt").unlink()
    with pytest.raises(MissingError, match="model_state.pt"):
        ViV1T.from_published(folder)
    with pytest.raises(MissingError, match="owner/repository/run"):
        ViV1T.from_published("no_such_folder")
    with pytest.raises(DataError, match="no state dict"):
        ViV1T.from_published({"model": {"a": 3}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("core", "factorized_baseline"),
        ("core_patch_mode", 2),
        ("core_pos_encoding", 5),
        ("core_behavior_mode", 3),
        ("core_parallel_attention", False),
        ("core_norm_qk", True),
        ("core_ff_activation", "swiglu"),
        ("readout", "factorized"),
        ("readout_grid_mode", 2),
        ("readout_bias_mode", 0),
        ("shifter_mode", 2),
        ("modulator_mode", 2),
        ("output_mode", 7),
        ("modulator_history_size", 9),
    ],
)
def test_published_options_without_counterpart_are_refused(published, name, value):
    with pytest.raises(DataError) as error:
        published_viv1t_config(published["args"] | {name: value})
    assert f"{name} is {value!r}" in str(error.value)


def test_published_options_get_their_names(published):
    config = published_viv1t_config(
        {"input_shapes": {"video": [1, 140, 36, 64]}, "output_shapes": {"A": [227, 140]}}
    )
    fed = {"normalisation": None, "channels": ["pupil_area", "running"], "rate": 30.0}  # it does not say how
    assert {k: v for k, v in config.to_dict().items() if k != "transformers_version"} == {
        k: v for k, v in (ViV1TConfig().to_dict() | fed).items() if k != "transformers_version"
    }
    other = published_viv1t_config(
        {"modulator_mode": 4, "output_mode": 0, "shifter_mode": 0, "readout_grid_mode": 0}
    )
    assert (other.modulator, other.output, other.shifter, other.positions) == (
        "mlp-v3",
        "elu1",
        False,
        "free",
    )
    assert published["config"].patch == [9, 7, 7] and published["config"].neurons == {"A": 11}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"emb_dim": 0}, "emb_dim=0"),
        ({"heads": 2.5}, "heads=2.5"),
        ({"spatial_depth": -1}, "spatial_depth=-1"),
        ({"size": (36,)}, "2 whole numbers"),
        ({"patch": (25, 7)}, "3 whole numbers"),
        ({"stride": (0, 2, 2)}, "stride[0]=0"),
        ({"drop_path": 1.0}, "probability"),
        ({"output": "relu"}, "'exp', 'elu1', 'softplus'"),
        ({"loss": "mae"}, "'mse'"),
        ({"positions": "grid"}, "'predicted', 'free'"),
        ({"modulator": "gru"}, "None, 'mlp', 'mlp-v2', 'mlp-v3'"),
        ({"frames": 20}, "25 frames in a clip of 20"),
        ({"size": (36, 5)}, "7 columns in a clip of 5"),
        ({"frames": 301}, "max_frames=300"),
        ({"neurons": {"A": 0}}, "neurons['A']=0"),
        ({"neurons": {"a.b": 3}}, "'a.b'"),
        ({"neurons": {"keys": 3}}, "'keys'"),
        ({"neurons": {7: 3}}, "mouse id 7"),
        ({"loss_frames": 0}, "loss_frames=0"),
        ({"pupil_channels": 0}, "shifter=False"),
        ({"pupil_channels": 0, "behavior_channels": 0, "shifter": False}, "neither behaviour nor pupil"),
        ({"emb_dims": 16}, "perhaps emb_dim"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(DataError) as error:
        ViV1TConfig(**options)
    assert words in str(error.value)


def test_options_survive_json(tmp_path):
    config = tiny(modulator="mlp-v2", output="softplus", neurons={"900000001": 64}, loss_frames=3)
    config.save_pretrained(tmp_path)
    again = ViV1TConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in again.to_dict().items() if k in vars(config)}.items() >= {
        k: v for k, v in vars(config).items() if k in ("neurons", "size", "patch", "modulator", "loss_frames")
    }.items()
    assert json.loads(again.to_json_string()) == json.loads(ViV1TConfig(**again.to_dict()).to_json_string())


def test_the_defaults_are_not_shared():
    one, two = ViV1TConfig(), ViV1TConfig()
    one.neurons["B"] = 3
    one.patch[0] = 9
    assert two.neurons == {"A": 227} and two.patch == [25, 7, 7]
    given = {"A": 3}
    three = ViV1TConfig(neurons=given)
    given["B"] = 1
    assert three.neurons == {"A": 3}


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("size", [(10, 16), (16, 10), (8, 30), (4, 4)])
def test_the_grid_is_carried_not_guessed(size):
    "Without attention blocks the map must hold each token at its own row and column."
    model = tiny_model(size=size, spatial_depth=0, temporal_depth=0)
    clip = tiny_clip(model.config)
    with torch.no_grad():
        tokens = model.core.tokenizer(clip["video"], torch.cat([clip["behavior"], clip["pupil_center"]], 1))
        features = model.encode(**clip)
    t, h, w = model.config.grid
    assert features.shape == (2, 8, t, h, w)
    for row in range(h):
        for column in range(w):
            assert torch.equal(features[:, :, :, row, column], tokens[:, :, row * w + column].transpose(1, 2))


@pytest.mark.parametrize("frames", [5, 9, 14, 20])
def test_any_clip_length_up_to_the_table(frames):
    model = tiny_model()
    assert model(**tiny_clip(model.config, frames=frames)).logits.shape == (2, 5, frames - 4)


def test_clips_that_are_too_short_or_long_are_refused():
    model = tiny_model()
    for frames in (4, 21):
        with pytest.raises(DataError, match="frames"):
            model(**tiny_clip(model.config, frames=frames))


def test_features_take_the_place_of_the_video():
    model = tiny_model(neurons={"A": 5, "B": 3}, modulator="mlp-v3")
    clip = tiny_clip(model.config)
    whole = model(**clip, mouse_id="B").logits
    traces = {name: clip[name] for name in ("behavior", "pupil_center")}
    for last in (None, 10, 4, 1):
        features = model.encode(**clip, last=last)
        got = model(**traces, features=features, mouse_id="B").logits
        torch.testing.assert_close(got, whole[..., -(last or 10) :])
        half = model(**traces, features=features.half(), mouse_id="B").logits
        torch.testing.assert_close(half, got, atol=0.05, rtol=0.01)
    for bad in ({}, clip | {"features": features}):
        with pytest.raises(DataError, match="one of them"):
            model(**bad)
    with pytest.raises(DataError, match="1 to 10"):
        model.encode(**clip, last=11)


def test_loss_counts_the_last_frames_of_labels_and_responses():
    model = tiny_model(loss_frames=6)
    clip, labels = tiny_clip(model.config), torch.rand(2, 5, 14)
    for name, loss in LOSSES.items():
        model.config.loss = name
        out = model(**clip, labels=labels)
        torch.testing.assert_close(out.loss, loss(out.logits[..., -6:], labels[..., -6:]))
        assert torch.equal(
            model(**clip, labels=labels[..., -10:]).loss, out.loss
        )  # labels without the run-up
    model.config.loss_frames = 11
    with pytest.raises(DataError, match="10 frames"):
        model(**clip, labels=labels)
    model.config.loss_frames = 6
    with pytest.raises(DataError, match="at least 10"):
        model(**clip, labels=labels[..., -9:])
    for wrong in (labels[:, :1], labels[:1], labels[:, :, None]):  # shapes that would broadcast
        with pytest.raises(DataError):
            model(**clip, labels=wrong)


def test_a_temporal_stride_answers_for_the_last_frame_of_each_tubelet():
    model = tiny_model(stride=(3, 2, 2), frames=14, loss_frames=None)
    assert model.config.grid[0] == 4
    labels = torch.arange(14.0).expand(1, 1, 14)
    assert model.align(labels, 4)[0, 0].tolist() == [4, 7, 10, 13]
    assert model.align(labels, 2)[0, 0].tolist() == [10, 13]
    assert model(**tiny_clip(model.config), labels=torch.rand(2, 5, 14)).loss.isfinite()


def test_behaviour_is_aligned_with_the_response_not_with_the_clip():
    "The readout must see the behaviour of the frame it answers for."
    model = tiny_model(spatial_depth=0, temporal_depth=0)
    clip = tiny_clip(model.config)
    features = model.encode(**clip)
    traces = {name: clip[name] for name in ("behavior", "pupil_center")}
    with torch.no_grad():
        before = model.read(features, **traces)
        clip["behavior"][..., 7] += 3.0  # frame 7 of 14 is response frame 7 - 4 = 3
        changed = (model.read(features, **traces) - before).abs().amax((0, 1)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [3]


def test_mice_are_told_apart_by_name():
    model = tiny_model(neurons={"A": 5, "B": 7})
    clip = tiny_clip(model.config)
    assert model(**clip, mouse_id="B").logits.shape == (2, 7, 10)
    for wrong in (None, "C"):
        with pytest.raises(DataError, match="'A', 'B'"):
            model(**clip, mouse_id=wrong)
    with pytest.raises(DataError, match="no mouse yet"):
        tiny_model(neurons={})(**clip)


def test_add_mouse_starts_at_the_mean_response():
    model = tiny_model(neurons={}).train()
    mean = torch.tensor([0.2, 1.0, 5.0])
    model.add_mouse("new", 3, torch.randn(3, 2), mean_response=mean)
    assert model.config.neurons == {"new": 3} and model.readouts["new"].training
    model.eval()
    with torch.no_grad():
        model.readouts["new"].features.zero_()
        got = model(**tiny_clip(model.config)).logits
    torch.testing.assert_close(got, mean[None, :, None].expand(2, 3, 10))
    for arguments, words in (
        (("new", 3, torch.randn(3, 2)), "already"),
        (("other", 3), "coordinates"),
        (("a.b", 3, torch.randn(3, 2)), "without dots"),
        (("other", 3, torch.randn(4, 2)), "4 neurons"),
    ):
        with pytest.raises(DataError, match=words):
            model.add_mouse(*arguments)
    assert (
        set(model.readouts) == set(model.config.neurons) == {"new"}
    )  # a failed attempt leaves nothing behind


def test_order_of_neurons_and_batch_do_not_matter():
    model = tiny_model()
    clip = tiny_clip(model.config, batch=3)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        whole = model(**clip).logits
        for i in range(3):
            one = model(**{name: value[i : i + 1] for name, value in clip.items()}).logits
            torch.testing.assert_close(one, whole[i : i + 1], atol=1e-5, rtol=1e-4)
        readout = model.readouts["A"]
        for name in ("source_grid", "bias"):
            getattr(readout, name).copy_(getattr(readout, name)[order])
        readout.features.copy_(readout.features[:, :, order])
        torch.testing.assert_close(model(**clip).logits, whole[:, order], atol=1e-5, rtol=1e-4)


def test_a_frozen_core_learns_nothing_and_drops_nothing():
    model = tiny_model().train().freeze_core()
    before = {name: value.clone() for name, value in model.core.state_dict().items()}
    assert not model.core.training and model.readouts.training
    clip = tiny_clip(model.config)
    assert torch.equal(model.encode(**clip), model.encode(**clip))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**clip, labels=torch.rand(2, 5, 14)).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in model.core.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.core.state_dict().items())
    model.core.requires_grad_(True)
    assert model.train().core.training


def test_training_is_random_and_evaluation_is_not():
    model = tiny_model()
    clip = tiny_clip(model.config)
    assert torch.equal(model(**clip).logits, model(**clip).logits)
    model.train()
    assert not torch.equal(model(**clip).logits, model(**clip).logits)


def test_every_parameter_gets_a_gradient_in_training():
    model = tiny_model(modulator="mlp").train()
    model(**tiny_clip(model.config), labels=torch.rand(2, 5, 14)).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_recomputed_activations_give_the_same_gradients():
    clip, labels, gradients = None, torch.rand(2, 5, 14), []
    for recompute in (False, True):
        model = tiny_model(spatial_depth=2, temporal_depth=2).train()
        clip = clip or tiny_clip(model.config)
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(**clip, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)


def test_half_precision_core_gives_nearly_the_same_responses():
    model = tiny_model()
    clip = tiny_clip(model.config)
    with torch.no_grad():
        full = model(**clip).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(**clip).logits
    assert half.dtype == torch.float32
    assert np.corrcoef(half.flatten(), full.flatten())[0, 1] > 0.999


@pytest.mark.parametrize(
    "options",
    [{}, *({"modulator": name} for name in MODULATORS), {"positions": "free"}, {"core_state": False},
     {"core": "conv", "size": (36, 64), "shifter": False, "readout": "factorised"}],
)  # fmt: skip
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_answer_nearly_as_float32(options, given):
    model = tiny_model(**options) if "core" not in options else ViV1T(tiny(**options)).eval()
    clip = tiny_clip(model.config)
    with torch.no_grad():
        full = model(**clip).logits
        half = model.to(torch.bfloat16)(**{name: x.to(given) for name, x in clip.items()}).logits
    assert torch.isfinite(half).all() and half.shape == full.shape
    assert (half.float() - full).norm() < 0.05 * full.norm()
    loss = model.train()(**clip, labels=torch.rand_like(full)).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_without_behaviour_and_pupil():
    model = tiny_model(behavior_channels=0, pupil_channels=0, shifter=False, state_encoder=False)
    video = tiny_clip(model.config)["video"]
    assert model(video).logits.shape == (2, 5, 10)
    with pytest.raises(DataError, match="behavior was not given"):
        tiny_model()(video)
    with pytest.raises(DataError, match=r"pupil_center has shape \(2, 3, 14\)"):
        tiny_model()(video, torch.randn(2, 2, 14), torch.randn(2, 3, 14))


def test_a_core_without_state_serves_heads_with_any_state(tmp_path):
    model = tiny_model(core_state=False, neurons={"A": 5})
    clip = tiny_clip(model.config)
    features = model.encode(clip["video"])
    assert torch.equal(features, model.encode(**clip))
    moved = clip | {"behavior": clip["behavior"] + 1}
    assert not torch.equal(model(**clip).logits, model(**moved).logits)  # the head still listens
    model.save_core(tmp_path)
    xy = torch.randn(3, 2)
    assert ViV1T.from_published(tmp_path, mice={"B": xy}, core_only=True)(**clip).logits.shape == (2, 3, 10)
    other = {
        "pupil_channels": 0,
        "behavior_channels": 1,
        "shifter": False,
        "positions": "free",
        "loss": "poisson",
    }
    new = ViV1T.from_published(tmp_path, mice={"B": 4}, core_only=True, **other)
    assert torch.equal(new.encode(clip["video"]), features)
    assert new(clip["video"], clip["behavior"][:, :1]).logits.shape == (2, 4, 10)
    assert new.config.loss == "poisson" and not len(new.shifters)
    config = ViV1TConfig(**(model.config.to_dict() | other | {"neurons": {}}))
    assert ViV1T.from_published(tmp_path, config, core_only=True).config.positions == "free"
    with pytest.raises(DataError, match="of another shape: core.vivit.tokenizer"):
        ViV1T.from_published(tmp_path, core_only=True, core_state=True)


def test_saved_models_must_be_complete(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    clip = tiny_clip(model.config)
    assert torch.equal(ViV1T.from_pretrained(tmp_path)(**clip).logits, model(**clip).logits)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["readouts.A.bias"]
    weights["readouts.A.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sign(tmp_path / "card.json", tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"1 missing: readouts.A.bias; 1 unexpected: readouts.A.extra"):
        ViV1T.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rank", "fused", "everything"), [(8, 3.8148, 5.5610), (16, 7.3492, 10.5361), (32, 13.6921, 19.0637)]
)
def test_lora_trains_the_published_share(rank, fused, everything):
    peft = pytest.importorskip("peft")
    for targets, share in ((["fused_linear"], fused), (["fused_linear", "attn_out", "ff_out.2"], everything)):
        with torch.device("meta"):
            model = ViV1T(ViV1TConfig())
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
            trained, total = peft.get_peft_model(model, config).get_nb_trainable_parameters()
        assert round(100 * trained / total, 4) == share
