"""Training survives kill -9, spreads over processes, and scores as `cortexlit.metrics` does."""

import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import Process
from toy_training import LAST, Toy, tiers, tiny_model, weights, without_sampling
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from cortexlit.core import DataError, read_json, rng
from cortexlit.data.audit import sample_marks
from cortexlit.data.clips import MouseDataset, build_dataset
from cortexlit.metrics import single_trial_correlation
from cortexlit.models.adapters import Adapters, load_adapters
from cortexlit.models.losses import LOSSES
from cortexlit.models.viv1t import ViV1T, ViViT
from cortexlit.training.features import fingerprint
from cortexlit.training.trainer import Fit, _Batches, _last_checkpoint, _Looked, _Mice, fit, predict, several

pytestmark = pytest.mark.usefixtures("no_curves")
CURVES = Fit.curves

FAST = {"epochs": 2, "last": LAST, "lr": 0.01, "progress": False}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    "Bit for bit."
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- scores


def test_the_best_model_has_the_score_in_the_history(tmp_path):
    train, validation = tiers()
    run = fit(tiny_model(), (train, validation), out=tmp_path / "run", **FAST | {"epochs": 4, "cache": False})
    labels = np.stack([item["labels"][:, -LAST:].numpy() for item in validation.items])
    score = single_trial_correlation(predict(run.model, validation, last=LAST), labels)
    assert score == pytest.approx(run.correlation, abs=1e-6)
    assert run.correlation == run.history["validation_correlation"].max()
    best = ViV1T.from_pretrained(run.best)
    assert same(best.state_dict(), run.model.state_dict())
    np.testing.assert_array_equal(predict(best, validation, LAST), predict(run.model, validation, LAST))
    assert not run.model.training


def test_predict_is_the_same_in_batches_from_cache_and_for_a_named_mouse(tmp_path):
    from cortexlit.training.features import cached_features

    model, (_, data) = tiny_model({"A": 5, "B": 3}), tiers()
    one = predict(model, data, LAST, mouse_id="A")
    assert one.shape == (4, 5, LAST) and one.dtype == np.float32 and not np.isnan(one).any()
    np.testing.assert_allclose(predict(model, data, LAST, "A", batch_size=3), one, rtol=1e-5)
    cache = cached_features(model, data, tmp_path, LAST, dtype="float32", progress=False)
    np.testing.assert_allclose(predict(model, cache, LAST, "A"), one, rtol=1e-5)
    with pytest.raises(DataError, match="mouse_id=None"):
        predict(model, data, LAST)


# --- order


def test_batches_hold_one_mouse_and_every_sample_and_do_not_depend_on_processes():
    rows = {"A": list(range(7)), "B": list(range(7, 10)), "C": [10]}
    whole = _Batches(rows, 4, seed=3)
    batches = list(whole)
    assert len(batches) == len(whole) == 2 + 1 + 1
    assert {row for batch in batches for row in batch} == set(range(11))
    for batch in batches:
        assert len(batch) == 4 and len({next(m for m in rows if r in rows[m]) for r in batch}) == 1
    shares = [_Batches(rows, 4, 3, process, 2) for process in (0, 1)]
    for batch, first, second in zip(batches, *shares, strict=True):
        assert batch[::2] == first and batch[1::2] == second
    assert list(whole) == batches  # the same epoch, the same order
    whole.set_epoch(1)
    assert list(whole) != batches


# --- run folder


def test_run_folder_and_resuming_a_finished_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Fit, "curves", CURVES)
    model, data, out = tiny_model(), tiers(), tmp_path / "run"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = fit(model, data, out=out, **FAST)
    assert capsys.readouterr().out == ""
    assert same(before, model.state_dict()), "the model passed in has been changed"
    names = {path.name for path in out.iterdir()}
    files = {"config.json", "provenance.json", "history.csv", "curves.png", "best", "tensorboard"}
    assert names == files | {f"checkpoint-{2 * 8}"}
    table = pd.read_csv(out / "history.csv")
    pd.testing.assert_frame_equal(table, run.history)
    assert list(table)[:4] == ["epoch", "step", "lr", "loss"] and table["step"].tolist() == [8, 16]
    assert read_json(out / "config.json")["loss"] == "mse"
    stamp = (out / "checkpoint-16" / "model.safetensors").stat().st_mtime_ns
    again = fit(model, data, out=out, **FAST)
    assert (out / "checkpoint-16" / "model.safetensors").stat().st_mtime_ns == stamp, "it trained again"
    assert same(again.model.state_dict(), run.model.state_dict())
    pd.testing.assert_frame_equal(again.history, run.history)


def test_tensorboard_holds_the_history(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(tiny_model(), tiers(), out=tmp_path / "run", **FAST)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scores = [event.value for event in events.Scalars("eval/correlation")]
    np.testing.assert_allclose(scores, run.history["validation_correlation"], rtol=1e-6)
    assert [event.step for event in events.Scalars("train/loss")] == [8, 16]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lr": 0.02}, "lr"), ({"loss": "poisson"}, "loss"), ({"seed": 1}, "seed"), ({"epochs": 3}, "epochs"),
        ({"batch_size": 2}, "batch_size"), ({"precision": "bfloat16"}, "precision"), ({"cache": False}, "cache"),
    ],
)  # fmt: skip
def test_another_option_is_named(tmp_path, change, name, finished):
    with pytest.raises(DataError, match=f"has {name}: "):
        fit(tiny_model(), tiers(), out=finished, **FAST | change)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    "A run that is done."
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(tiny_model(), tiers(), out=folder, **FAST)
    return folder


def test_other_weights_other_data_and_a_foreign_folder_are_refused(tmp_path, finished):
    other = tiny_model()
    torch.nn.init.ones_(other.readouts["A"].bias)
    with pytest.raises(DataError, match="has starting weights"):
        fit(other, tiers(), out=finished, **FAST)
    with pytest.raises(DataError, match="has model.attention_dropout: 0.0"):
        fit(tiny_model(attention_dropout=0.5), tiers(), out=finished, **FAST)
    shuffled = Toy(8, seed=1)
    shuffled.items[0]["labels"] = shuffled.items[1]["labels"]
    with pytest.raises(DataError, match="has data.A.train.labels"):
        fit(tiny_model(), (shuffled, tiers()[1]), out=finished, **FAST)
    with pytest.raises(DataError, match="resume=True"):
        fit(tiny_model(), tiers(), out=finished, resume=False, **FAST)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(DataError, match="holds no run"):
        fit(tiny_model(), tiers(), out=tmp_path, **FAST)


def test_without_out_the_same_call_finds_its_run(private_folders):
    first, again = (fit(tiny_model(), tiers(), **FAST) for _ in range(2))
    other = fit(tiny_model(), tiers(), **FAST | {"lr": 0.02})
    assert first.folder == again.folder != other.folder
    assert first.folder.parent == private_folders / "_runs"


# --- what can be asked for


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapt": "adapter"}, "head, lora, full"), ({"adapt": "lora"}, r"adapters=Adapters\(\.\.\.\)"),
        ({"adapters": Adapters()}, "adapt='head' with adapters"), ({"core_lr": 1e-3}, "core does not learn"),
        ({"epochs": ()}, "epochs"), ({"epochs": (2, 3), "schedule": "plateau"}, "2 phases"), ({"loss": "huber"}, "poisson"), ({"schedule": "step"}, "plateau"),
        ({"precision": "float16"}, "bfloat16"), ({"epochs": 0}, r"epochs=\[0\]"), ({"patience": 0}, "patience=0"),
        ({"last": 17}, "1 to 16"),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        fit(tiny_model(), tiers(), out=tmp_path / "run", **FAST | change)


@pytest.mark.parametrize(
    ("mice", "dataset", "words"),
    [
        ({"A": 5, "B": 3}, tiers(), "mice"), ({"A": 5}, {"C": tiers()}, "no mouse 'C'"),
        ({"A": 5}, tiers(neurons=3), "labels of 3 neurons"), ({"A": 5}, tiers()[0], "dataset folder"),
    ],
)  # fmt: skip
def test_wrong_data(tmp_path, mice, dataset, words):
    with pytest.raises(DataError, match=words):
        fit(tiny_model(mice), dataset, out=tmp_path / "run", **FAST)


def test_a_diverging_run_and_a_flat_one_end_with_an_explanation(tmp_path):
    with pytest.raises(DataError, match="not finite"):
        fit(tiny_model(), tiers(), out=tmp_path / "up", **FAST | {"lr": 1e30, "schedule": "constant"})
    flat = tiers()
    for item in flat[1].items:
        item["labels"][:] = 1.0
    with pytest.raises(DataError, match="not defined after any epoch"):
        fit(tiny_model(), flat, out=tmp_path / "flat", **FAST)


def test_dataset_folders_by_path(tmp_path):
    from toys import toy_recording

    folder = build_dataset(
        toy_recording(), tmp_path / "data", clip_frames=20, size=(10, 14), split="stimuli", gap=5
    )
    found = fit(tiny_model(), folder, out=tmp_path / "a", **FAST | {"epochs": 1})
    pair = [MouseDataset(folder, tier) for tier in ("train", "validation")]
    other = fit(tiny_model(), {"A": pair}, out=tmp_path / "b", **FAST | {"epochs": 1})
    assert same(found.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_losses(tmp_path, loss):
    run = fit(tiny_model(), tiers(), loss=loss, out=tmp_path / "run", **FAST | {"epochs": 4})
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert run.model.config.loss == loss and run.model.config.loss_frames == LAST


def test_head_leaves_the_core_alone_and_in_evaluation_mode(tmp_path, monkeypatch):
    modes = set()
    forward = ViV1T.encode
    monkeypatch.setattr(
        ViV1T, "encode", lambda self, *a, **k: modes.add(self.core.training) or forward(self, *a, **k)
    )
    model = tiny_model(dropout=0.5)
    start = {k: v.clone() for k, v in model.core.state_dict().items()}
    run = fit(model, tiers(), out=tmp_path / "head", cache=False, **FAST)
    assert modes == {False}
    assert same(start, run.model.core.state_dict())
    assert not same(model.readouts.state_dict(), run.model.readouts.state_dict())
    run = fit(model, tiers(), adapt="full", out=tmp_path / "full", **FAST)
    assert modes == {False, True}
    assert not same(start, run.model.core.state_dict())


def test_cached_and_uncached_head_training_give_the_same_curve(tmp_path):
    runs = [
        fit(
            without_sampling(tiny_model(dropout=0.5)),
            tiers(),
            out=tmp_path / str(cache),
            cache=cache,
            **FAST | {"epochs": 4},
        )
        for cache in (True, False)
    ]
    a, b = (run.history[["loss", "validation_loss", "validation_correlation"]] for run in runs)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_shuffled_labels_share_the_cache(private_folders):
    data = tiers()
    fit(tiny_model(), data, **FAST)
    made = sorted((private_folders / "_data" / "features").glob("*/features.npy"))
    labels = [item["labels"] for item in data[0].items]
    for item, other in zip(data[0].items, reversed(labels), strict=True):
        item["labels"] = other
    fit(tiny_model(), data, **FAST)
    assert sorted((private_folders / "_data" / "features").glob("*/features.npy")) == made and len(made) == 2


def test_accumulated_batches_are_one_large_batch(tmp_path):
    few = {"schedule": "constant", "epochs": 1, "cache": False}
    large = fit(without_sampling(tiny_model()), tiers(), batch_size=8, out=tmp_path / "a", **FAST | few)
    small = fit(without_sampling(tiny_model()), tiers(), accumulate=8, out=tmp_path / "b", **FAST | few)
    assert len(large.history) == len(small.history) == 1
    np.testing.assert_allclose(large.history["loss"], small.history["loss"], rtol=1e-5)
    for a, b in zip(large.model.state_dict().values(), small.model.state_dict().values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_phases_start_the_schedule_anew(tmp_path):
    run = fit(tiny_model(), tiers(), out=tmp_path / "run", **FAST | {"epochs": (1, 3), "lr": 1e-30})
    step = np.concatenate([[7 / 8], np.arange(1, 4) / 3 - 1 / 24])
    np.testing.assert_allclose(run.history["lr"] / 1e-30, (1 + np.cos(np.pi * step)) / 2, atol=1e-6)


def test_the_core_may_have_its_own_learning_rate(tmp_path):
    options = FAST | {"adapt": "full", "schedule": "constant", "epochs": 1, "weight_decay": 0.0}
    start = tiny_model()
    still = fit(start, tiers(), core_lr=1e-30, out=tmp_path / "still", **options).model
    for name, weight in still.core.state_dict().items():
        torch.testing.assert_close(weight, start.core.state_dict()[name], rtol=0, atol=1e-20)
    assert not same(still.readouts.state_dict(), start.readouts.state_dict())
    one, two = (
        fit(start, tiers(), core_lr=lr, out=tmp_path / str(lr), **options).model for lr in (None, 0.01)
    )
    assert same(one.state_dict(), two.state_dict())


def test_optimiser_options_arrive(tmp_path):
    fit(tiny_model(), tiers(), betas=(0.8, 0.98), eps=1e-6, weight_decay=0.2, out=tmp_path / "run", **FAST)
    groups = torch.load(_last_checkpoint(tmp_path / "run") / "optimizer.pt", weights_only=True)[
        "param_groups"
    ]
    assert {(tuple(g["betas"]), g["eps"]) for g in groups} == {((0.8, 0.98), 1e-6)}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.2}


@pytest.mark.parametrize("head", [False, True])
def test_adapters_learn_and_nothing_else_does(tmp_path, head):
    model, data = tiny_model(dropout=0.2), tiers()
    adapters = Adapters(rank=2, head=head)
    run = fit(model, data, adapt="lora", adapters=adapters, out=tmp_path / "run", **FAST | {"epochs": 4})
    assert type(run.model) is ViV1T and all(p.requires_grad for p in run.model.parameters())
    changed = {
        name for name, v in model.state_dict().items() if not torch.equal(v, run.model.state_dict()[name])
    }
    adapted = {name for name in model.state_dict() if any(f"{end}.weight" in name for end in adapters.layers)}
    assert len(adapted) == 6 and adapted <= changed
    assert bool(changed - adapted) == head and all(n in adapted or not n.startswith("core.") for n in changed)
    best = ViV1T.from_pretrained(run.best)
    assert same(best.state_dict(), run.model.state_dict())
    again = tiny_model()
    load_adapters(again, run.best / "adapters")
    expected = predict(run.model, data[1], LAST)
    np.testing.assert_allclose(predict(again, data[1], LAST), expected, rtol=1e-4, atol=1e-5)
    assert {"adapters.rank", "rank"} & {*read_json(run.folder / "config.json")["adapters"]}


@pytest.mark.parametrize("by_video", [False, True])
def test_cached_tokens_give_the_same_curve(tmp_path, by_video):
    data = tiers()
    for tier in data:  # two repeats of each clip
        for k in range(0, len(tier), 2):
            tier.items[k + 1]["video"] = tier.items[k]["video"].clone()
    options = FAST | {"adapt": "lora", "adapters": Adapters(rank=2), "batch_size": 2, "by_video": by_video}
    model = without_sampling(tiny_model(core_state=False))
    runs = [fit(model, data, cache=cache, out=tmp_path / str(cache), **options) for cache in (True, False)]
    a, b = (run.history[["loss", "validation_loss", "validation_correlation"]] for run in runs)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_batches_by_video_need_fewer_passes(tmp_path, monkeypatch):
    data, sizes = tiers(), []
    for k in range(0, 8, 2):
        data[0].items[k + 1]["video"] = data[0].items[k]["video"].clone()
    forward = ViViT.forward
    monkeypatch.setattr(ViViT, "forward", lambda self, v, s: sizes.append(len(v)) or forward(self, v, s))
    options = FAST | {"adapt": "full", "epochs": 1, "batch_size": 2}
    fit(tiny_model(core_state=False), data, by_video=True, out=tmp_path / "a", **options)
    assert sizes == [1] * 4 + [2] * 2  # four training batches, two of validation
    sizes.clear()
    fit(tiny_model(), data, by_video=True, out=tmp_path / "b", **options)
    assert sizes[:8] == [2] * 8  # running differs: samples are repeated to fill their batches


class Static(PreTrainedModel):
    "A model without mice, time or core."

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.weigh = torch.nn.Linear(3, 2)
        self.post_init()

    def forward(self, picture: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        logits = self.weigh(picture)
        return ModelOutput(loss=None if labels is None else (logits - labels).square().mean(), logits=logits)

    def correlation(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        assert predictions.shape == labels.shape == (6, 2)
        return float(np.corrcoef(predictions.T, labels.T).diagonal(2).mean())


def test_a_model_without_mice_and_time(tmp_path):
    draw = rng(0, "static")
    pictures = draw.normal(size=(26, 3)).astype("float32")
    labels = pictures @ draw.normal(size=(3, 2)).astype("float32")
    items = [
        {"picture": torch.tensor(x), "labels": torch.tensor(y)} for x, y in zip(pictures, labels, strict=True)
    ]
    model = Static(PretrainedConfig())
    options = {"adapt": "full", "loss": None, "lr": 0.05, "progress": False}
    run = fit(model, (items[:20], items[20:]), out=tmp_path / "run", epochs=30, batch_size=4, **options)
    assert run.correlation > 0.99 and "data.train.picture" in read_json(run.folder / "config.json")
    assert predict(run.model, items[20:]).shape == (6, 2)
    with pytest.raises(DataError, match="no core to freeze"):
        fit(
            model,
            (items[:20], items[20:]),
            out=tmp_path / "head",
            **options | {"adapt": "head", "cache": False},
        )


def test_schedules(tmp_path):
    lr = {
        name: fit(tiny_model(), tiers(), schedule=name, out=tmp_path / name, batch_size=4, **FAST | {"epochs": 8, "lr": 1e-30})
        .history["lr"].to_numpy() / 1e-30
        for name in ("cosine", "linear", "constant", "plateau")
    }  # fmt: skip
    last_step = np.arange(1, 9) * 2 - 1
    np.testing.assert_allclose(lr["linear"], 1 - last_step / 16, atol=1e-6)
    np.testing.assert_allclose(lr["cosine"], (1 + np.cos(np.pi * last_step / 16)) / 2, atol=1e-6)
    np.testing.assert_allclose(lr["constant"], 1)
    np.testing.assert_allclose(
        lr["plateau"], [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    )  # nothing can be learned at this rate


def test_early_stopping_keeps_the_best(tmp_path):
    train, validation = tiers()
    run = fit(
        tiny_model(),
        (train, validation),
        out=tmp_path / "run",
        patience=2,
        **FAST | {"epochs": 30, "lr": 0.05},
    )
    assert run.best_epoch + 2 == len(run.history) < 30
    labels = np.stack([item["labels"][:, -LAST:].numpy() for item in validation.items])
    score = single_trial_correlation(predict(run.model, validation, LAST), labels)
    assert score == pytest.approx(run.correlation, abs=1e-3)
    again = fit(tiny_model(), tiers(), out=tmp_path / "run", patience=2, **FAST | {"epochs": 30, "lr": 0.05})
    assert len(again.history) == len(run.history), "a stopped run went on"


def test_bfloat16_trains_and_leaves_a_float32_model(tmp_path):
    for cache in (True, False):
        run = fit(tiny_model(), tiers(), precision="bfloat16", cache=cache, out=tmp_path / str(cache), **FAST)
        other = fit(tiny_model(), tiers(), cache=cache, out=tmp_path / f"{cache}32", **FAST)
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        gap = np.abs(run.history["loss"] / other.history["loss"] - 1)
        assert 0 < gap.max() < 0.05
        assert not hasattr(run.model, "_original_forward"), "forward is still wrapped in autocast"


def test_several_mice_take_turns(tmp_path):
    mice = {"A": tiers(), "B": tiers(neurons=3)}
    run = fit(tiny_model({"A": 5, "B": 3, "C": 4}), mice, batch_size=2, out=tmp_path / "run", **FAST)
    h = run.history
    np.testing.assert_allclose(
        h["validation_correlation"], (h["validation_correlation_A"] + h["validation_correlation_B"]) / 2
    )
    start = tiny_model({"A": 5, "B": 3, "C": 4})
    changed = [
        m for m in "ABC" if not same(start.readouts[m].state_dict(), run.model.readouts[m].state_dict())
    ]
    assert changed == ["A", "B"]
    assert [len(axis.lines) for axis in CURVES(run).axes] == [
        2,
        4,
    ]  # two losses; two mice, their mean, the best
    assert predict(run.model, mice["B"][1], LAST, mouse_id="B").shape == (4, 3, LAST)


# --- processes

LONG = {
    "full": {"adapt": "full", "schedule": "plateau", "patience": 4, "accumulate": 2, "epochs": 5},
    "lora": {"adapt": "lora", "adapters": Adapters(rank=2, head=True), "accumulate": 2, "epochs": (3, 2)},
}


class Deadly(Toy):
    "Kills its process in the middle of the third epoch."

    left = 5

    def __init__(self, out: Path, *args, **options):
        self.third = out / "checkpoint-8" / "complete"
        super().__init__(*args, **options)

    def __getitem__(self, i):
        if self.third.exists():
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def is_killed(out: Path, adapt: str) -> None:
    fit(tiny_model(dropout=0.2), (Deadly(out, 8, seed=1), tiers()[1]), out=out, **FAST | LONG[adapt])


@pytest.mark.parametrize("adapt", LONG)
def test_resume_after_kill_9_gives_the_same_bits(tmp_path, adapt):
    options = FAST | LONG[adapt]
    whole = fit(tiny_model(dropout=0.2), tiers(), out=tmp_path / "whole", **options)
    code, told = Process(tmp_path, is_killed, tmp_path / "cut", adapt).ended()
    assert code == -signal.SIGKILL, told
    assert _last_checkpoint(tmp_path / "cut").name == "checkpoint-8"
    assert not (tmp_path / "cut" / "curves.png").exists()
    half = tmp_path / "cut" / "checkpoint-12"  # as if the next checkpoint had been cut short, too
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 3.0, "glob')
    resumed = fit(tiny_model(dropout=0.2), tiers(), out=tmp_path / "cut", **options)
    columns = [c for c in whole.history if c != "seconds"]
    pd.testing.assert_frame_equal(resumed.history[columns], whole.history[columns], check_exact=True)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    ends = [_last_checkpoint(tmp_path / name) for name in ("whole", "cut")]
    assert ends[0].name == ends[1].name
    assert same(*map(weights, ends))
    states = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    state = [json.loads((end / "trainer_state.json").read_text()) for end in ends]
    assert state[0]["best_global_step"] == state[1]["best_global_step"]


SHARED = {"head": {}, "full": {"adapt": "full", "accumulate": 2}}


def two_mice() -> tuple[ViV1T, dict]:
    return without_sampling(tiny_model({"A": 5, "B": 3})), {"A": tiers(), "B": tiers(neurons=3)}


def shared(out: Path) -> None:
    "What `accelerate launch` starts twice."
    for name, options in SHARED.items():
        fit(*two_mice(), out=out / name, batch_size=2, **FAST | options)
    print("processes", PartialState().num_processes)


def test_two_processes_give_the_losses_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend",
             "no", "--main_process_port", str(port), "shared.py"]  # fmt: skip
    launched = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(words))[0])
    group = launched | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    both = [
        Process(tmp_path, shared, tmp_path / "two", environment=group | {"RANK": k, "LOCAL_RANK": k})
        for k in "01"
    ]
    codes, told = zip(*(process.ended() for process in both), strict=True)
    assert codes == (0, 0), told
    assert all("processes 2" in out for out in told), told
    model, mice = two_mice()
    for name, options in SHARED.items():
        one = fit(model, mice, out=tmp_path / "one" / name, batch_size=2, **FAST | options)
        two = fit(
            model, mice, out=tmp_path / "two" / name, batch_size=2, **FAST | options
        )  # finished: only read
        assert read_json(two.folder / "provenance.json")["seed"] == 0
        columns = [c for c in one.history if c != "seconds"]
        np.testing.assert_allclose(two.history[columns], one.history[columns], rtol=1e-3, atol=1e-4)


def test_a_batch_of_one_sample_is_its_tensors_and_no_copy():
    item = {"labels": torch.rand(2, 3), "features": torch.rand(4), "weight": 0.5}
    batch, joined = several([item], [0]), several([item, item], [0, 1])
    for name, value in joined.items():
        torch.testing.assert_close(batch[name], value[:1])
    assert batch["features"].data_ptr() == item["features"].data_ptr()
    assert _Mice({"A": [item]}).__getitems__([0])["mouse_id"] == "A"


class InOneRead(list):
    "Items that can be read many at a time."

    def stacked(self, rows):
        return torch.utils.data.default_collate([self[i] for i in rows])


def test_what_reads_many_at_a_time_is_the_same_data():
    draw = rng(0, "many at a time")
    items = [
        {"voxels": torch.from_numpy(draw.normal(size=4)), "labels": torch.arange(9.0) + i} for i in range(70)
    ]
    read = InOneRead(items)
    assert fingerprint(read) == fingerprint(items) and fingerprint(read) != fingerprint(
        InOneRead(items[::-1])
    )
    assert sample_marks(read) == sample_marks(items)
    assert fingerprint(_Looked(read, "training", 9)) == fingerprint(items)
    items[66]["voxels"][2] = float("nan")
    for data in (items, InOneRead(items)):
        with pytest.raises(DataError, match="voxels of training sample 66: 1 of 4"):
            fingerprint(_Looked(data, "training", 9))
        with pytest.raises(DataError, match="labels of training sample 0: 9"):
            fingerprint(_Looked(data, "training", 8))
