"""Faults of runs and storage, by kind: what is killed goes on, what is not ours stays, what does not belong is refused by name."""

import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import malformed
import numpy as np
import optuna
import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toy_training import LAST, tiers, tiny_model, weights

from cortexlit import cli, core
from cortexlit.core import DataError, MissingError, StorageError
from cortexlit.data.clips import build_dataset
from cortexlit.models.adapters import Adapters, add_adapters, load_adapters, save_adapters
from cortexlit.training import lora, pretraining, trainer, tuning
from cortexlit.training.features import cached_features
from cortexlit.training.recipes import Recipe
from cortexlit.training.trainer import best_folder, check_options, check_trained_on, fit

pytestmark = pytest.mark.usefixtures("no_curves")  # dozens of tiny models are trained
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits as Linux has them")


def child(work) -> int:
    "Status of a forked process: its exit code, or minus the signal that ended it."
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except core.CortexlitError as error:
            print(error)
            os._exit(3)
        except BaseException as error:
            print(type(error), error)
            os._exit(4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(work, event: str, when) -> None:
    "Run work() in a process that is killed at the first audit event of which when(args) is true."

    def watched() -> None:
        def hook(name, args):
            if name == event and when(args):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    assert child(watched) == -signal.SIGKILL


def write(folder: Path, text: str, kind: str = "toy", **options) -> None:
    with core.atomic_folder(folder, **options) as tmp:
        (tmp / "a.txt").write_text(text)
        core.write_json(tmp / "card.json", {"kind": kind, "files": {"a.txt": ""}})


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith((".tmp", ".old"))]


# What is not ours is never replaced ------------------------------------------------------------------------


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path):
    write(tmp_path / "data", "old")
    write(tmp_path / "data", "new", overwrite=True)
    assert (tmp_path / "data/a.txt").read_text() == "new" and not hidden(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "data", "newer")
    with pytest.raises(DataError, match="of the kind 'toy'"):
        write(tmp_path / "data", "newer", kind="other", overwrite=True)
    (tmp_path / "data/notes.txt").touch()
    with pytest.raises(DataError, match=r"also holds notes\.txt"):
        write(tmp_path / "data", "newer", overwrite=True)
    assert (tmp_path / "data/a.txt").read_text() == "new" and not hidden(tmp_path)


def test_of_two_builders_the_second_is_refused(tmp_path):
    with pytest.raises(DataError, match="exists already"), core.atomic_folder(tmp_path / "data") as slow:
        (slow / "a.txt").write_text("slow")
        write(tmp_path / "data", "fast")  # by another process, meanwhile
    assert (tmp_path / "data/a.txt").read_text() == "fast" and not hidden(tmp_path)
    with core.atomic_folder(tmp_path / "data", overwrite=True) as slow:
        core.write_json(slow / "card.json", {"kind": "toy", "files": {"a.txt": ""}})
        (slow / "a.txt").write_text("slow")
        write(tmp_path / "data", "fast", overwrite=True)
    assert (tmp_path / "data/a.txt").read_text() == "slow" and not hidden(tmp_path)


@pytest.mark.parametrize("card", [None, "{}", "[1]", "{", '{"name": "mine"}'])
def test_a_foreign_folder_stays(tmp_path, card):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("years")
    if card is not None:
        (thesis / "card.json").write_text(card)
    with pytest.raises(DataError, match="not replaced"):
        write(thesis, "x", overwrite=True)
    with pytest.raises(DataError, match="holds no run"):
        core.claim(thesis, {})
    assert (thesis / "chapter1.tex").read_text() == "years"


def test_a_file_stays_and_a_link_leads_to_what_is_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match="a file is in the way"):
        write(tmp_path / "notes.txt", "x", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "precious"
    write(tmp_path / "disk", "old")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    write(tmp_path / "data", "new", overwrite=True)
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk/a.txt").read_text() == "new"


def test_foreign_scores_stay(tmp_path):
    from cortexlit.evaluation.scores import ScoreSheet

    for folder in (tmp_path / "demo", tmp_path / "demo2/decoding"):
        folder.mkdir(parents=True)
        (folder / "scores.csv").write_text("student,grade\n")
        with pytest.raises(DataError, match="has not written"):
            cli.run_demo(tmp_path / folder.relative_to(tmp_path).parts[0], print)
        assert (folder / "scores.csv").read_text() == "student,grade\n"

    ScoreSheet().save(tmp_path / "ours")
    ScoreSheet().save(tmp_path / "ours")
    (tmp_path / "ours/scores.json").unlink()  # killed between the two files
    ScoreSheet().save(tmp_path / "ours")
    for name, text in {"scores.csv": "student,grade\n", "scores.json": '{"grades": []}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
        with pytest.raises(DataError, match="has not written"):
            ScoreSheet().save(tmp_path / name)
        assert (tmp_path / name / name).read_text() == text


# Killed while a folder is replaced, or written -------------------------------------------------------------


@linux
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_between_two_renames_nothing_is_lost(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(core, "_exchange", lambda *_: False)
    folder = tmp_path / "data"
    write(folder, "old")
    killed_at(lambda: write(folder, "new", overwrite=True), "os.rename", lambda a: str(a[1]) == str(folder))
    assert core.read_json(folder / "card.json")["kind"] == "toy"  # a reader finds it
    assert (folder / "a.txt").read_text() == "old"
    write(folder, "new", overwrite=True)
    assert (folder / "a.txt").read_text() == "new" and not hidden(tmp_path)


@linux
def test_what_dead_processes_leave_is_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "data"
    for _ in range(2):
        killed_at(lambda: write(folder, "x"), "open", lambda a: "card.json" in str(a[0]))
    live = core._beside(folder)
    live.mkdir()
    other = tmp_path / f".data.{'0' * 8}-1-1-abcdef.tmp"  # of another machine
    other.mkdir()
    stale = tmp_path / f".data.{'0' * 8}-1-1-abcde0.tmp"
    stale.touch()
    os.utime(stale, (0, 0))
    mine = tmp_path / ".data.backup.tmp"
    mine.touch()
    assert len(hidden(tmp_path)) == 5  # the second has removed what the first left
    write(folder, "x")
    assert set(hidden(tmp_path)) == {live.name, other.name, mine.name}


# The system refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR,
                                    errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.EAGAIN, errno.ELOOP])  # fmt: skip
def test_what_the_system_refuses_is_named(number):
    with pytest.raises(StorageError, match=r"x\.npy") as error, core.named_errors("x.npy"):
        raise OSError(number, os.strerror(number))
    assert "do: " in str(error.value) and isinstance(error.value, OSError) and error.value.errno == number


def test_missing_damaged_and_short(tmp_path):
    with pytest.raises(MissingError, match=r"gone\.npy"), core.named_errors("elsewhere"):
        np.load(tmp_path / "gone.npy")
    with pytest.raises(DataError, match="cannot be read"), core.named_errors("x.h5"):
        raise OSError("Unable to open file (file signature not found)")
    with pytest.raises(StorageError, match="no space"), core.named_errors("x.npy"):
        raise OSError("1000 requested and 45 written")
    with pytest.raises(KeyError), core.named_errors("x.npy"):
        {}["a"]


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="do: "):
            core.check_out(out)
        with pytest.raises(core.CortexlitError):
            write(out, "x")
    core.check_out(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    with pytest.raises(StorageError):
        core.claim(tmp_path / "file", {})
    with pytest.raises(core.CortexlitError), core.locked("/proc/nowhere"):
        pass


@linux
def test_a_full_disk_does_not_end_the_process(tmp_path):
    def limited(work):
        def run() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            work()

        return run

    def h5() -> None:
        with core.h5_file(tmp_path / "a.h5") as file:
            file["x"] = np.zeros(100_000)

    def mapped() -> None:
        core.new_array(tmp_path / "a.npy", np.float32, (100_000,))[:] = 1

    def plain() -> None:
        core.save_array(tmp_path / "b.npy", np.zeros(100_000))

    for work in (h5, mapped, plain):
        assert child(limited(work)) == 3, work
        assert child(work) == 0, work
    assert not hidden(tmp_path)


# A run goes on from wherever it was killed ------------------------------------------------------------------


class Stop(Exception):
    "Ends a run after an epoch."


def stop_after(epochs: int):
    def stop(history) -> None:
        if len(history) == epochs:
            raise Stop

    return stop


def run(out: Path, **options):
    return fit(
        tiny_model(),
        tiers(),
        out=out,
        **{"last": LAST, "epochs": 3, "batch_size": 4, "progress": False} | options,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The folder of a run that nothing disturbed, made once for each set of options."
    made: dict[str, Path] = {}

    def folder(**options) -> Path:
        if str(options) not in made:
            made[str(options)] = run(tmp_path_factory.mktemp("whole") / "run", **options).folder
        return made[str(options)]

    return folder


def same(one: Path, other: Path) -> bool:
    a, b = weights(one / "best"), weights(other / "best")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "options", [{"schedule": "linear"}, {"schedule": "linear", "epochs": (2, 2), "adapt": "lora", "adapters": Adapters(2, "fused")}, {"schedule": "plateau"}]
)  # fmt: skip
def test_every_schedule_is_resumed_to_the_same_bits(tmp_path, undisturbed, options):
    with pytest.raises(Stop):
        run(tmp_path / "cut", on_epoch=stop_after(1), **options)
    run(tmp_path / "cut", **options)
    assert same(undisturbed(**options), tmp_path / "cut")


@linux
@pytest.mark.parametrize(
    ("event", "name"),
    [
        ("os.link", "config.json"),
        ("os.remove", "config.json"),
        ("os.rename", "provenance.json"),
        ("os.rename", "best"),
    ],
)
def test_killed_in_the_first_seconds_and_before_the_best_is_saved(tmp_path, undisturbed, event, name):
    out = tmp_path / "cut"

    def when(args: tuple) -> bool:
        "The file gets its name; or its draft, which has served, is removed."
        draft = str(args[0]).startswith(str(out / f".{name}."))
        return draft if event == "os.remove" else str(args[1]) == str(out / name)

    killed_at(lambda: run(out, epochs=1), event, when)
    run(out, epochs=1)
    assert same(undisturbed(epochs=1), out) and not hidden(out)
    assert best_folder(out) == out / "best" and (out / "provenance.json").is_file()


def test_a_run_that_would_go_on_has_no_best_model_yet(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path / "run", on_epoch=stop_after(2))
    with pytest.raises(DataError, match="not finished: 2 of 3 epochs"):
        best_folder(tmp_path / "run")
    run(tmp_path / "run")
    assert best_folder(tmp_path / "run").is_dir()
    early = run(tmp_path / "early", epochs=9, lr=0.1, patience=1)  # ends sooner, and is finished
    assert len(early.history) < 9 and best_folder(tmp_path / "early").is_dir()


@linux
def test_what_gets_its_name_is_on_the_disk_before(tmp_path, monkeypatch):
    safe: set[str] = set()
    names = []

    def fsync(number: int, real=os.fsync) -> None:
        safe.add(os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    def replace(new, path, real=os.replace) -> None:
        parts = [new, *Path(new).rglob("*")] if Path(new).is_dir() else [new]
        assert {str(p) for p in parts} <= safe, f"{path} gets its name before its content is safe"
        names.append(Path(path).name)
        real(new, path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    monkeypatch.setattr(os, "link", lambda new, path, real=os.link: replace(new, path, real))
    write(tmp_path / "data", "x")
    core.save_array(tmp_path / "a.npy", np.ones(3))
    cached_features(tiny_model(), tiers()[0], tmp_path / "kept", last=LAST, progress=False)
    assert str(tmp_path) in safe and str(tmp_path / "kept") in safe  # the names, too
    assert {"data", "a.npy", "card.json"} < set(names) and len(names) > 5
    run(tmp_path / "run", epochs=1)
    (mark,) = (tmp_path / "run").glob("checkpoint-*/complete")
    assert {str(p) for p in mark.parent.iterdir() if p != mark} <= safe


def test_a_damaged_checkpoint_is_named_and_what_to_delete(tmp_path, undisturbed):
    with pytest.raises(Stop):
        run(tmp_path / "cut", on_epoch=stop_after(2))
    checkpoint = trainer._last_checkpoint(tmp_path / "cut").name
    for k, name in enumerate(
        ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors")
    ):
        for how in ("missing", "differs"):
            out = tmp_path / f"{k}-{how}"
            shutil.copytree(tmp_path / "cut", out)
            path = out / checkpoint / name
            data = path.read_bytes()
            path.unlink() if how == "missing" else path.write_bytes(data[: len(data) // 2])
            with pytest.raises(DataError, match=f"{name} of this checkpoint .*{how}") as error:
                run(out)
            assert f"delete {checkpoint}" in str(error.value)
    (tmp_path / "cut/checkpoint-x").mkdir()
    (tmp_path / "cut/checkpoint-x/complete").touch()
    shutil.rmtree(out / checkpoint)  # as the message says
    done, control = run(out), run(tmp_path / "cut")
    assert same(done.folder, control.folder) and same(control.folder, undisturbed())
    path = control.folder / "best/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="model.safetensors of this best model differs"):
        best_folder(control.folder)


# Options are looked at before anything is trained -----------------------------------------------------------

WRONG = [{"lr": -1}, {"lr": float("nan")}, {"lr": "fast"}, {"weight_decay": -1}, {"betas": (0.9,)}, {"betas": (0.9, 1.0)},
         {"eps": 0}, {"seed": -1}, {"seed": 2**32}, {"seed": 0.5}, {"epochs": 0}, {"epochs": ()}, {"epochs": 1.5}, {"batch_size": 0}, {"last": 0},
         {"patience": 0}, {"schedule": "cosin"}, {"precision": "float64"}, {"core_lr": 0.0}, {"learning_rate": 1}]  # fmt: skip


@pytest.mark.parametrize("option", WRONG, ids=str)
def test_wrong_options_are_named(option, tmp_path):
    (name,) = option
    with pytest.raises(DataError, match=name):
        check_options(**{"adapt": "full"} | option)
    check_options(
        epochs=np.int64(3), last=np.int64(2), seed=np.int32(1), lr=np.float32(0.1), betas=[0.9, 0.99]
    )


ONE = Recipe("good", {"adapt": "lora", "adapters": Adapters(2, "fused"), "lr": 0.1, "epochs": 1})


def test_every_way_to_train_looks_first(tmp_path, monkeypatch):
    from cortexlit.training import decoders

    for module in (lora, trainer, tuning, decoders):
        monkeypatch.setattr(module, "fit" if module is not trainer else "_train", None)
    folder = build_dataset(
        toys.toy_recording(), tmp_path / "ds", clip_frames=20, size=(10, 14), split="stimuli", gap=5
    )
    tiny_model(core_state=False).save_core(tmp_path / "core")
    with pytest.raises(DataError, match="cosin"):
        ONE.but("bad", fit={"schedule": "cosin"})
    layer = ONE.but("layer", fit={"adapters": Adapters(2, ("nowhere",))})
    for configuration in (layer, ONE.but("other", fit={"adapters": Adapters(2, ("nowhere",)), "epochs": 2})):
        with pytest.raises(DataError, match="nowhere"):
            lora.Grid(folder, [configuration], [0], core=tmp_path / "core", last=LAST, out=tmp_path / "grid")
        with pytest.raises(DataError, match="nowhere"):
            lora.cross_validate(folder, configuration, core=tmp_path / "core", last=LAST)
    for options in ({"lr_": 1}, {"head": {"lr": -1}}, {"weight_decay": -1}, {"seeds": [-1]}):
        with pytest.raises(DataError):
            lora.Grid(folder, [ONE], core=tmp_path / "core", last=LAST, **options)
    with pytest.raises(DataError, match="lr="):
        tuning.tune(
            lambda p: tiny_model(), tiers(), tuning.Space({"lr": tuning.Range(-1.0, 1.0)}), out=tmp_path / "t"
        )
    with pytest.raises(DataError, match="batch_size="):
        run(tmp_path / "r", batch_size=10**9)
    with pytest.raises(DataError, match="last="):
        run(tmp_path / "r", last=1000)
    assert not any((tmp_path / name).exists() for name in ("grid", "t", "r"))


@pytest.mark.parametrize(
    "wrong", [["--rank", "99999999999"], ["--targets", "everything"], ["--seed", "-1"], ["--last", "1000"]]
)
def test_the_head_is_not_trained_before_the_rest_is_looked_at(tmp_path, monkeypatch, wrong):
    from cortexlit.training import heads

    folder = build_dataset(
        toys.toy_recording(), tmp_path / "d", clip_frames=20, size=(10, 14), split="stimuli", gap=5
    )
    tiny_model(core_state=False).save_core(tmp_path / "core")
    given = ["fit", str(folder), "--core", str(tmp_path / "core"), "--adapt", "lora", *wrong]
    monkeypatch.setattr(sys, "argv", ["cortexlit", *given])

    @functools.wraps(trainer.fit)
    def never(*_, **__):
        raise AssertionError("training has begun")

    for module in (heads, trainer):
        monkeypatch.setattr(module, "fit", never)
    with pytest.raises(SystemExit):
        cli.main()


def test_numbers_of_numpy_are_numbers():
    space = tuning.Space(
        {"depth": tuning.Range(np.int64(3), np.int64(8)), "wide": tuning.Choice((np.int64(2), 4))}
    )
    assert space.parameters["depth"].whole and space.parameters["wide"].values == (2, 4)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    found = [space.suggest(study.ask())["depth"] for _ in range(5)]
    assert all(type(v) is int for v in found)
    for low, high in (("1", "2"), (True, 2), (None, 1)):
        with pytest.raises(DataError):
            tuning.Range(low, high)


@pytest.mark.parametrize("tier", [0, 1])
@pytest.mark.parametrize("field", ["labels", "video", "behavior"])
def test_every_sample_is_looked_at_before_anything_is_trained(tmp_path, tier, field):
    data = tiers()
    data[tier].items[-1][field].view(-1)[-1] = float("nan")
    with pytest.raises(DataError, match=f"{field} of {('train', 'validation')[tier]} sample .*not finite"):
        fit(tiny_model(), data, out=tmp_path / "r", last=LAST, epochs=1, progress=False)
    data = tiers()
    data[tier].items[-1]["labels"] = data[tier].items[-1]["labels"][:3]
    with pytest.raises(DataError, match="labels of .* sample .: 3"):
        fit(tiny_model(), data, out=tmp_path / "r", last=LAST, epochs=1, progress=False)
    data = tiers()
    data[tier].items.clear()
    with pytest.raises(DataError, match=r"no (training|validation) samples|has no samples"):
        fit(tiny_model(), data, out=tmp_path / "r", last=LAST, epochs=1, progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("seed", [-1, 0.5, None, "0", True])
def test_seeds_are_whole_numbers_from_zero_up(seed, tmp_path):
    for call in (core.rng, core.seed_everything):
        with pytest.raises(DataError, match="seed="):
            call(seed)
    with pytest.raises(DataError, match="seed=4294967296"):
        core.seed_everything(2**32)
    from cortexlit.training.pretraining import pretrain

    for call in (lambda: pretrain(tmp_path / "core", seed=10**20), core.seeded(2**32).__enter__):
        with pytest.raises(DataError, match="a whole number from 0 to 4294967295"):
            call()
    assert core.rng(np.int64(3), "a").random() == core.rng(3, "a").random()


# Results belong to what made them ---------------------------------------------------------------------------


def test_two_mice_with_one_split_are_two_grids(tmp_path):
    tiny_model(core_state=False).save_core(tmp_path / "core")
    names = []
    for k, seed in enumerate((0, 1, 0)):
        folder = build_dataset(
            toys.toy_recording(seed=seed),
            tmp_path / f"d{k}",
            clip_frames=20,
            size=(10, 14),
            split="stimuli",
            gap=5,
        )
        names.append(lora.Grid(folder, [ONE], [0], core=tmp_path / "core", last=LAST).name)
    assert names[0] == names[2] != names[1]
    other = tiny_model(core_state=False)
    with torch.no_grad():
        next(other.core.parameters()).view(-1)[0] += 1e-6
    other.save_core(tmp_path / "core2")
    assert lora.Grid(folder, [ONE], [0], core=tmp_path / "core2", last=LAST).name not in names


def test_kept_arrays_belong_to_what_made_them(tmp_path):
    path = tmp_path / "a.npy"
    assert core.made_once(path, {"data": "x"}, lambda: np.ones(2)).sum() == 2
    assert core.made_once(path, {"data": "x"}, None).sum() == 2
    with pytest.raises(DataError, match="other data"):
        core.made_once(path, {"data": "y"}, None)
    good = path.read_bytes()
    for damage in (good[:-4], good[:-1] + b"\x07", b"", b"<html>"):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="differs"):
            core.made_once(path, {"data": "x"}, None)
    path.write_bytes(good)
    row = {}
    assert core.made_once(path, {"data": "x"}, None, row).sum() == 2 and row == {}  # nothing was told of it
    other = tmp_path / "b.npy"
    core.made_once(other, {"data": "x"}, lambda: row.update(score=0.5) or np.ones(3), row)
    core.made_once(other, {"data": "x"}, None, again := {"kept": 1})
    assert again == {"score": 0.5, "kept": 1}
    path.with_suffix(".json").unlink()  # killed before the record was written: made again
    assert core.made_once(path, {"data": "x"}, lambda: np.zeros(2)).sum() == 0


def test_a_run_is_scored_on_its_own_dataset_only(tmp_path):
    class Carded(list):
        card = {"name": "m", "files": {"a.npy": "1"}, "split_hash": "s"}

    train, validation = (Carded(tier.items) for tier in tiers())
    done = fit(
        tiny_model(),
        (train, validation),
        out=tmp_path / "run",
        last=LAST,
        epochs=1,
        batch_size=4,
        progress=False,
    )
    check_trained_on(done.folder, validation)
    other = Carded(validation)
    other.card = Carded.card | {"split_hash": "t"}
    with pytest.raises(DataError, match="another dataset or with another split"):
        check_trained_on(done.folder, other)
    (done.folder / "provenance.json").unlink()
    with pytest.raises(MissingError, match="does not say"):
        check_trained_on(done.folder, validation)


def test_adapters_are_whole_and_on_their_own_base(tmp_path):
    which = Adapters(2, "fused", head=True)
    save_adapters(add_adapters(tiny_model(), which), which, tmp_path / "a")
    load_adapters(tiny_model(), tmp_path / "a")  # control
    name = "adapter_model.safetensors"
    parts = load_file(tmp_path / "a" / name)
    first = sorted(parts)[0]
    edits = {
        "lacks": {k: v for k, v in parts.items() if k != first},
        "renamed": {k.replace("base_model.model.", ""): v for k, v in parts.items()},
        "beyond": parts | {first.replace("blocks.0", "blocks.7"): parts[first].clone()},
    }
    for how, tensors in edits.items():
        shutil.copytree(tmp_path / "a", tmp_path / how)
        save_file(tensors, tmp_path / how / name)
        with pytest.raises(DataError, match=f"{name} of this folder of adapters differs"):
            load_adapters(tiny_model(), tmp_path / how)
        (tmp_path / how / "card.json").unlink()  # as of another program
        model = tiny_model()
        with pytest.raises(DataError, match="parts, such as"):
            load_adapters(model, tmp_path / how)
        assert not any("lora" in k for k in model.state_dict())
    for file in (name, "head.safetensors"):
        shutil.copytree(tmp_path / "a", tmp_path / f"no-{file}")
        (tmp_path / f"no-{file}" / file).unlink()
        with pytest.raises(DataError, match=f"{file} of this folder of adapters is missing"):
            load_adapters(tiny_model(), tmp_path / f"no-{file}")
        (tmp_path / f"no-{file}" / "card.json").unlink()
        with pytest.raises(MissingError, match=file):
            load_adapters(tiny_model(), tmp_path / f"no-{file}")
    (tmp_path / "lacks" / name).write_bytes(b"x" * 20)
    with pytest.raises(DataError, match="damaged"):
        load_adapters(tiny_model(), tmp_path / "lacks")
    other = tiny_model()
    with torch.no_grad():
        next(other.core.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(DataError, match="other weights"):
        load_adapters(other, tmp_path / "a")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return malformed.models(tmp_path_factory.mktemp("saved"))


DAMAGES = {
    "a weight less": (lambda w, k: {n: v for n, v in w.items() if n != k}, "1 missing"),
    "a weight more": (lambda w, k: w | {"x": torch.zeros(2)}, "1 unexpected"),
    "NaN": (lambda w, k: w | {k: w[k] * float("nan")}, "not finite"),
    "another shape": (lambda w, k: w | {k: w[k][None]}, "mismatched|damaged"),
    "cut": (None, "damaged"),
    "options": (None, "damaged"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "name", ["viv1t", "v1t", "vit3d", "cnn_vit", "classifier", "vae", "gan", "diffusion", "flow"]
)
def test_a_saved_model_is_read_back_whole(saved, tmp_path, name, how):
    kind, folder = saved[name]
    want = kind.from_pretrained(folder).state_dict()  # the control
    first = load_file(folder / "model.safetensors")
    assert all(torch.equal(want[k], v) for k, v in first.items())
    shutil.copytree(folder, tmp_path / "m")
    path, (change, why) = tmp_path / "m/model.safetensors", DAMAGES[how]
    if how == "options":
        (tmp_path / "m/config.json").write_text("[1]")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        key = next(k for k in sorted(first) if first[k].is_floating_point() and first[k].ndim)
        save_file(change(first, key), path, metadata={"format": "pt"})
    for changed in (path, tmp_path / "m/config.json"):
        malformed.sign(tmp_path / "m/card.json", changed)  # what is wrong is found all the same
    with pytest.raises(DataError, match=rf"(?s)({why}).*{tmp_path}"):
        kind.from_pretrained(tmp_path / "m")
    with pytest.raises(MissingError, match="no local folder"):
        kind.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "- 1", "x", "a: [", "!!python/object/apply:os.system ['true']", "core_emb_dim: {}"]
)
def test_the_options_of_a_published_run_are_named_if_they_are_none(tmp_path, text):
    from cortexlit.models.viv1t import ViV1T

    run = malformed.published(tmp_path / "run")
    ViV1T.from_published(run)  # the control
    (run / "args.yaml").write_text(text)
    with pytest.raises(DataError, match="args.yaml|run|emb_dim"):
        ViV1T.from_published(run)


# What was written is what is read ---------------------------------------------------------------------------


def flipped(path: Path) -> None:
    "Turn one bit in the middle of a file."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused_if_changed(folder: Path, read) -> None:
    "Every file that the card lists, and the card: one bit turned is refused by the file's name; whole, all is read."
    names = [*core.read_json(folder / "card.json")["files"], "card.json"]
    for name in names:
        whole = (folder / name).read_bytes()
        flipped(folder / name)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read()
        (folder / name).write_bytes(whole)
    read()


def said_once(folder: Path, read) -> None:
    "Without its card a folder is read; that nothing vouches for it is said at the first time only."
    (folder / "card.json").unlink()
    with pytest.warns(UserWarning, match="nothing says what these files were"):
        read()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read()


@pytest.mark.parametrize("head", [True, False])
def test_a_bit_of_saved_adapters(tmp_path, head):
    which = Adapters(2, "fused", head=head)
    for out in ("a", "b"):
        save_adapters(add_adapters(tiny_model(), which), which, tmp_path / out)
    refused_if_changed(tmp_path / "a", lambda: load_adapters(tiny_model(), tmp_path / "a"))
    said_once(tmp_path / "a", lambda: load_adapters(tiny_model(), tmp_path / "a"))
    save_adapters(add_adapters(tiny_model(), Adapters(2, "fused")), Adapters(2, "fused"), tmp_path / "b")
    assert (tmp_path / "b/head.safetensors").exists() is False  # nothing of the former is left
    load_adapters(tiny_model(), tmp_path / "b")


@pytest.mark.parametrize("name", ["viv1t", "v1t", "vit3d", "cnn_vit", "classifier", "vae"])
def test_a_bit_of_a_saved_model(saved, tmp_path, name):
    kind, folder = saved[name]
    shutil.copytree(folder, tmp_path / "m")
    ways = [kind.from_pretrained, *([kind.from_published] if hasattr(kind, "from_published") else [])]
    for way in ways:
        refused_if_changed(tmp_path / "m", lambda way=way: way(tmp_path / "m"))
    said_once(tmp_path / "m", lambda: ways[-1](tmp_path / "m"))


@linux
def test_a_save_that_is_killed_leaves_no_card_of_other_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    other = tiny_model(neurons={"A": 5, "B": 3})
    killed_at(lambda: other.save_pretrained(tmp_path / "m"), "open", lambda a: ".card.json." in str(a[0]))
    with pytest.warns(UserWarning, match="nothing says"):
        found = type(other).from_pretrained(tmp_path / "m")
    assert list(found.config.neurons) == ["A", "B"]


def test_a_bit_of_the_state_of_pretraining(tmp_path):
    pretraining._save_state(tmp_path / "s.pt", {"step": 3, "core": {"w": torch.ones(50)}})
    assert pretraining._load_state(tmp_path / "s.pt")["step"] == 3
    whole = (tmp_path / "s.pt").read_bytes()
    at = whole.index(np.ones(50, np.float32).tobytes()) + 2
    (tmp_path / "s.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"(?s)differs from what was written.*s\.pt"):
        pretraining._load_state(tmp_path / "s.pt")
    torch.save({"step": 4}, tmp_path / "s.pt")  # by an earlier version
    assert pretraining._load_state(tmp_path / "s.pt") == {"step": 4}


def test_a_score_that_was_edited(tmp_path):
    from cortexlit.evaluation.scores import ScoreSheet

    sheet = ScoreSheet()
    values = np.random.default_rng(0).random((9, 4))
    sheet.add("m", "r", values, tier="test", dataset="d", split="s", split_hash="h")
    path = sheet.save(tmp_path) / "scores.json"
    assert ScoreSheet.load(tmp_path).table().equals(sheet.table())
    content = core.read_json(path)
    for change in ({"rows": [content["rows"][0] | {"value": 0.9}]}, {"opened": {"d": 1}}, {"rows": []}):
        core.write_json(path, content | change)
        with pytest.raises(DataError, match=r"(?s)differs from its own hash.*scores\.json"):
            ScoreSheet.load(tmp_path)
    core.write_json(path, {k: v for k, v in content.items() if k != "hash"})  # by an earlier version
    assert ScoreSheet.load(tmp_path).table().equals(sheet.table())


# Weights and sizes that no model has ------------------------------------------------------------------------


def spoilt(folder: Path, **tensors) -> None:
    "Change tensors of a saved model, and sign its card anew."
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    malformed.sign(folder / "card.json", path)


@pytest.mark.parametrize("name", ["vit3d", "cnn_vit"])
def test_places_are_those_of_the_config(saved, tmp_path, name):
    kind, folder = saved[name]
    stored = load_file(folder / "model.safetensors")
    places = [k for k, v in stored.items() if not v.is_floating_point() and not k.endswith("tracked")]
    assert "embedding.places" in places or name == "vit3d"
    for key in places:
        value = stored[key]
        changes = {"not finite": value * float("nan"), "holds numbers of": value + 0.5, "not what the config": ~value if value.dtype == torch.bool else value + 1}  # fmt: skip
        for why, changed in changes.items():
            shutil.copytree(folder, tmp_path / "m")
            spoilt(tmp_path / "m", **{key: changed})
            with pytest.raises(DataError, match=why) as error:
                kind.from_pretrained(tmp_path / "m")
            assert key in str(error.value)
            shutil.rmtree(tmp_path / "m")


def test_weights_that_are_no_numbers_are_named_on_every_way(saved, tmp_path):
    for name in ("viv1t", "v1t"):
        kind, folder = saved[name]
        stored = load_file(folder / "model.safetensors")
        key = next(k for k in sorted(stored) if k.startswith("core."))
        for value in (float("nan"), float("inf"), 1j):
            shutil.copytree(folder, tmp_path / "m")
            spoilt(tmp_path / "m", **{key: stored[key] * value})
            for read in (kind.from_pretrained, kind.from_published):
                with pytest.raises(DataError, match=key.replace(".", r"\.")):
                    read(tmp_path / "m")
            shutil.rmtree(tmp_path / "m")
    run = malformed.published(tmp_path / "run")
    weights_of = torch.load(run / "ckpt/model_state.pt", weights_only=True)["model"]
    key = next(k for k, v in weights_of.items() if v.ndim > 1)
    torch.save({"model": weights_of | {key: weights_of[key] * float("nan")}}, run / "ckpt/model_state.pt")
    with pytest.raises(DataError, match=f"not finite: .*{key.rsplit('.', 2)[-2]}"):
        saved["viv1t"][0].from_published(run)
    which = Adapters(2, "fused")
    save_adapters(add_adapters(tiny_model(), which), which, tmp_path / "a")
    parts = load_file(tmp_path / "a/adapter_model.safetensors")
    first = sorted(parts)[0]
    torch.save(
        parts | {first: parts[first] * float("nan")}, tmp_path / "a/adapter_model.bin"
    )  # as older peft
    for name in ("adapter_model.safetensors", "card.json"):
        (tmp_path / "a" / name).unlink()
    model = tiny_model()
    with pytest.raises(DataError, match="not finite"), pytest.warns(UserWarning, match="nothing says"):
        load_adapters(model, tmp_path / "a")
    assert not any("lora" in k for k in model.state_dict())


HUGE = [
    ("viv1t", {"temporal_depth": 10**9}), ("viv1t", {"spatial_depth": 10**5}), ("viv1t", {"mlp_dim": 2**24, "emb_dim": 2**20}),
    ("viv1t", {"neurons": {"A": 10**9}}), ("viv1t", {"frames": 10**9, "max_frames": 10**9}), ("v1t", {"depth": 10**9}), ("v1t", {"size": [2**24] * 2}),
    ("vit3d", {"depth": 10**9}), ("vit3d", {"grid": [2**20] * 3}), ("vit3d", {"patch": [10**5] * 3, "pad": True}),
    ("vit3d", {"emb_dim": 2**24}), ("cnn_vit", {"channels": [2**24] * 2}), ("cnn_vit", {"grid": [10**9] * 3}),
    ("classifier", {"kind": "logistic", "shape": [2**24] * 3}), ("vae", {"hidden": [2**24] * 2}), ("vae", {"inputs": 10**9}),
    ("gan", {"latents": 10**9}), ("gan", {"judge": [2**24] * 2}), ("diffusion", {"times": 10**9}), ("diffusion", {"rank": 10**9}),
    ("flow", {"steps": 10**9}), ("flow", {"hidden": [2**24] * 2}),
]  # fmt: skip


@linux
@pytest.mark.parametrize(("name", "sizes"), HUGE, ids=str)
def test_sizes_that_no_memory_holds(saved, tmp_path, name, sizes):
    kind, folder = saved[name]
    shutil.copytree(folder, tmp_path / "m")
    told = core.read_json(tmp_path / "m/config.json")
    core.write_json(tmp_path / "m/config.json", told | sizes)
    malformed.sign(tmp_path / "m/card.json", tmp_path / "m/config.json")
    resource_limit = resource.getrlimit(resource.RLIMIT_AS)
    here = (
        2**30 + sum(int(x) for x in Path("/proc/self/statm").read_text().split()[:1]) * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (here, resource_limit[1]))  # a gigabyte more than there is now
    try:
        ways = [kind.from_pretrained, *([kind.from_published] if hasattr(kind, "from_published") else [])]
        for way in ways:
            with pytest.raises(DataError, match="at most"):
                way(tmp_path / "m")
        given = {k: v for k, v in (told | sizes).items() if k in sizes or k in ("grid", "patch", "mask")}
        given |= {"concepts": ["a", "b"]} if name == "classifier" else {}
        given.pop("mask", None) if "grid" in sizes else None
        with pytest.raises(DataError, match="at most"):
            kind(kind.config_class(**given))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, resource_limit)


def test_the_options_of_a_published_run_have_sizes(tmp_path):
    import yaml

    from cortexlit.models.viv1t import ViV1T

    run = malformed.published(tmp_path / "run")
    given = yaml.safe_load((run / "args.yaml").read_text())
    for name in ("core_temporal_depth", "core_spatial_depth", "core_emb_dim", "core_mlp_dim", "max_frame"):
        (run / "args.yaml").write_text(yaml.safe_dump(given | {name: 10**9}))
        with pytest.raises(DataError, match="at most"):
            ViV1T.from_published(run)


def test_counting_a_model_draws_no_random_number(saved):
    from cortexlit.models.viv1t import _need_memory

    torch.manual_seed(3)
    want = torch.random.get_rng_state()
    for kind, folder in saved.values():
        _need_memory(kind, kind.config_class.from_pretrained(folder))
    assert torch.equal(torch.random.get_rng_state(), want)


# Places that take nothing -----------------------------------------------------------------------------------


@linux
def test_a_place_is_tried_and_not_asked(tmp_path, monkeypatch):
    for place in (
        "/proc/nowhere/x",
        "/proc/x",
        "/sys/nowhere",
        "/dev/null/x",
    ):  # root may write there, by its bits
        with pytest.raises(StorageError, match=f"(?s)file: .*{place.split('/')[1]}"):
            core.check_out(place)
    core.check_out(tmp_path / "a/b")
    core.check_out(tmp_path)
    assert not list(tmp_path.iterdir())
    killed_at(lambda: core.check_out(tmp_path / "a/b"), "os.rmdir", lambda a: True)
    assert len(hidden(tmp_path)) == 1
    core.check_out(tmp_path / "a/b")
    assert not list(tmp_path.iterdir())

    def simulate(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr(pretraining, "simulate", simulate)
    with pytest.raises(StorageError, match="/proc"):
        pretraining.pretrain("/proc/nowhere/x")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(StorageError, match=r"(?s)permit.*closed"):
            core.check_out(tmp_path / "closed/x")


# What is printed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['pip install "cortexlit[allen]"', "runs/[a]/[/b]/x", "[/]", "[red]", "a" * 200 + "/b"]
)
def test_messages_keep_their_brackets(monkeypatch, capsys, text):
    def app() -> None:
        raise MissingError("gone", path=text)

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["cortexlit"])
    with pytest.raises(SystemExit):
        cli.main()
    assert text in capsys.readouterr().err
    cli.show(text[:60], [{"[b]": "[/c]"}])
    assert "[/c]" in capsys.readouterr().out


def test_what_the_system_refuses_a_command_is_named(monkeypatch, capsys):
    def app() -> None:
        open("/nowhere/[x]")

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["cortexlit", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "/nowhere/[x]" in json.loads(capsys.readouterr().out)["error"]


# Every command ----------------------------------------------------------------------------------------------

COMMANDS = ["sessions", "build", "score", "import", "export", "fit", "grid", "design", "folds", "scenes build", "scenes fit", "scenes tune", "scenes score", "things build",
            "things fit", "things tune", "things score", "data", "pretrain", "demo", "insilico tune", "insilico fields",
            "insilico excite"]  # fmt: skip
SLOW = ("sessions", "build", "scenes build")


@pytest.fixture(scope="module")
def lines(tmp_path_factory, tiny_cache):
    "Command lines that are right, and values that are not."
    root = tmp_path_factory.mktemp("lines")
    (root / "settings.ini").write_text("lib_name = cortexlit\n")  # `_data/` and `_runs/` lie here
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shutil.copytree(tiny_cache, core.generated("sessions", "tiny-0"))
        found = malformed.commands(root)
    return root, found


def _commands(app, before: str = "") -> list[str]:
    "Names of all commands of a typer application."
    own = [before + (c.name or c.callback.__name__) for c in app.registered_commands]
    return own + [n for g in app.registered_groups for n in _commands(g.typer_instance, f"{before}{g.name} ")]


def test_every_command_is_in_the_list(lines):
    assert list(lines[1]) == COMMANDS
    assert {" ".join(c.split()) for c in _commands(cli.app)} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_by_name(lines, command, monkeypatch, capsys):
    root, every = lines
    monkeypatch.chdir(root)

    def enough(*_, **__):
        raise DataError("all options are accepted")  # what takes long is not what is tested here

    from cortexlit.evaluation import baselines, decoding, scenes

    for where, name in ((trainer, "_train"), (lora.Grid, "run"), (pretraining, "pretrain"), (cli, "run_demo"),
                        (baselines, "score_dataset"), (scenes, "score_scenes"), (decoding, "score_subject")):  # fmt: skip
        monkeypatch.setattr(where, name, enough)

    @settings(
        max_examples=3 if command in SLOW else 6, suppress_health_check=list(HealthCheck), deadline=None
    )
    @given(st.integers(0, 10**6))
    def check(seed):
        line = malformed.words(command, *every[command], random.Random(seed))
        monkeypatch.setattr(sys, "argv", ["cortexlit", *line])
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, 1, 2)
        finally:
            shutil.rmtree(root / "new", ignore_errors=True)
        assert "Traceback" not in capsys.readouterr().err
        assert (root / "file").read_text() == "precious" and (root / "thesis/chapter1.tex").is_file()

    check()
