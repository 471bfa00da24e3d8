"""Kill and damage what the library is doing, and see whether anything is lost: `python tools/torture.py --minutes 15 --out FILE`.

Every job runs once undisturbed. Then it is killed (SIGKILL) at a random file-system call or at a random moment, started again,
and compared bit by bit with the undisturbed one; what is left behind is counted. After that, files of finished folders are damaged
at random and read; then what files of every kind hold is changed (arrays, tables, JSON, archives, HDF5, NIfTI, weights: `tests/malformed.py`)
and every reader of the library is called; then every command with a value that is not right. Each ends as named (an error of this
library), tolerated (the same result), other (another result, where no reader could know better), foreign (another library's
traceback), silent (another result and no word), ran (a command that found nothing wrong), hang, signal. Linux only: it forks.
"""

import argparse
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import malformed  # noqa: E402
import numpy as np  # noqa: E402
import optuna  # noqa: E402
import test_decoders  # noqa: E402
import test_tuning  # noqa: E402
import torch  # noqa: E402
from toy_training import FRAMES, LAST, Toy, tiers, tiny_model  # noqa: E402
from toys import toy_recording  # noqa: E402

from cortexlit import cli, core  # noqa: E402
from cortexlit.data.cached import ThingsDataset, build_things  # noqa: E402
from cortexlit.data.clips import MouseDataset, build_dataset  # noqa: E402
from cortexlit.data.exchange import import_arrays  # noqa: E402
from cortexlit.data.scenes import ScenesDataset  # noqa: E402
from cortexlit.data.splits import split_by_concept  # noqa: E402
from cortexlit.data.things import open_things  # noqa: E402
from cortexlit.models.adapters import Adapters, add_adapters, load_adapters, save_adapters  # noqa: E402
from cortexlit.simulate.session import embedded_session, write_session  # noqa: E402
from cortexlit.simulate.subject import write_things  # noqa: E402
from cortexlit.training import lora, trials  # noqa: E402
from cortexlit.training.decoders import FoldFits, fit_folds  # noqa: E402
from cortexlit.training.features import cached_features  # noqa: E402
from cortexlit.training.recipes import Recipe  # noqa: E402
from cortexlit.training.trainer import best_folder, fit  # noqa: E402

CLIPS = {"clip_frames": FRAMES, "size": (10, 14), "split": "stimuli", "gap": 5}
FIT = {"last": LAST, "epochs": 3, "batch_size": 4, "progress": False}
R2 = {"adapt": "lora", "adapters": Adapters(2, "fused"), "lr": 0.01, "schedule": "linear", "epochs": (2,)}
GRID = (Recipe("r2", R2),)
HUNG = 300  # s


def digest(*arrays: Any) -> str:
    known = hashlib.sha256()
    for array in arrays:
        known.update(np.ascontiguousarray(array).tobytes())
    return known.hexdigest()


def weights(folder: Path) -> str:
    return core.sha256(best_folder(folder) / "model.safetensors")


def items(data: Any) -> str:
    rows = [data[i] for i in range(len(data))]
    return digest(*(np.asarray(row[name]) for row in rows for name in sorted(row)))


def whole(root: Path, kind: Callable[..., Any]) -> str:
    return "".join(items(kind(root, tier)) for tier in ("train", "validation", "test"))


def pictures(out: Path, **options: Any) -> None:
    draw = np.random.default_rng(0)
    shown, answers = draw.random((12, 8, 8)), draw.random((60, 5))
    import_arrays(shown, answers, out, image_id=np.repeat(np.arange(12), 5), **options)


def folds(out: Path) -> Any:
    data = test_decoders.Trials()
    split = split_by_concept(data.trials, 3, 0)
    return fit_folds(test_decoders.build, data, split, out, epochs=2, batch_size=8, lr=0.05, progress=False)


def loaded_folds(out: Path) -> str:
    data = test_decoders.Trials()
    return digest(FoldFits.load(out, split_by_concept(data.trials, 3, 0)).predictions)


def grid(out: Path) -> Any:
    return lora.Grid("data", GRID, (0,), core="core", out=out, last=LAST, head={"epochs": 1}, batch_size=4)


def search(out: Path) -> Any:
    return test_tuning.search(out, trials=3, sampler="random", pruner=None)


def found(out: Path) -> str:
    done = [t for t in search(out).study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    return json.dumps(sorted((json.dumps(t.params), t.value) for t in done))


def head(out: Path) -> Any:
    return fit(tiny_model(dropout=0.1), tiers(), out=out, schedule="linear", **FIT)


def adapted(out: Path) -> Any:
    which = Adapters(2, "fused")
    return fit(tiny_model(), tiers(), out=out, adapt="lora", adapters=which, **FIT | {"epochs": (1, 2)})


def full(out: Path) -> Any:
    return fit(tiny_model(dropout=0.1), tiers(), out=out, adapt="full", schedule="plateau", **FIT)


def features(out: Path) -> Any:
    return cached_features(tiny_model(), Toy(8), out, last=LAST, progress=False)


# name -> (the job, its result, what is there before)
JOBS: dict[str, tuple[Callable, Callable, Callable | None]] = {
    "build clips": (lambda o: o.exists() or build_dataset(toy_recording(), o, **CLIPS), lambda o: whole(o, MouseDataset), None),
    "overwrite clips": (
        lambda o: build_dataset(toy_recording(), o, overwrite=True, **CLIPS), lambda o: whole(o, MouseDataset),
        lambda o: build_dataset(toy_recording(seed=1), o, **CLIPS),
    ),
    "overwrite scenes": (lambda o: pictures(o, overwrite=True), lambda o: whole(o, ScenesDataset), lambda o: pictures(o, seed=1)),
    "overwrite things": (
        lambda o: build_things(open_things("things", "01"), o, overwrite=True), lambda o: digest(ThingsDataset(o).responses),
        lambda o: build_things(open_things("things", "01"), o, zscore="none"),
    ),
    "keep features": (features, lambda o: digest(features(o)._rows), None),
    "fit head, linear": (head, weights, None),
    "fit adapters, two phases": (adapted, weights, None),
    "fit everything, plateau": (full, weights, None),
    "folds": (folds, loaded_folds, None),
    "grid": (lambda o: grid(o).run(progress=False), lambda o: digest(*grid(o).predictions().values()), None),
    "search": (search, found, None),
}  # fmt: skip
EVENTS = {"open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


def forked(
    work: Callable[[], Any], kill_at: int | None = None, kill_after: float | None = None
) -> tuple[str, Any]:
    "(how it ended, what it returned), in a process of its own; killed at an event or after a time."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event in EVENTS and not (event == "open" and "r" == args[1]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            answer = {"end": "ok", "value": work(), "events": count}
        except core.CortexlitError as error:
            answer = {"end": "named", "value": str(error).splitlines()[0]}
        except BaseException as error:
            answer = {"end": "foreign", "value": f"{type(error).__name__}: {str(error)[:120]}"}
        os.write(write, json.dumps(answer, default=str).encode()[:60_000])
        os._exit(0)
    os.close(write)
    ended, status = time.monotonic() + (HUNG if kill_after is None else kill_after), None
    while status is None:
        if os.waitpid(pid, os.WNOHANG)[0]:
            status = "ended"
        elif time.monotonic() > ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = "hang" if kill_after is None else "killed"
        else:
            time.sleep(0.01)
    text = os.read(read, 60_000)
    os.close(read)
    if text:
        answer = json.loads(text)
        return answer["end"], answer
    return ("killed" if kill_at else "signal") if status == "ended" else status, None


def left(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith((".tmp", ".old"))] + [
        str(p.relative_to(folder)) for p in folder.rglob("*.partial")
    ]


def both(work: Callable, result: Callable, out: Path) -> Any:
    work(out)
    return result(out)


def place(scratch: Path, name: str, shared: tuple[str, ...] = ("data", "core", "things")) -> Path:
    folder = scratch / name
    folder.mkdir()
    os.chdir(folder)
    (folder / "settings.ini").write_text("lib_name = cortexlit\n")
    for one in shared:
        (folder / one).symlink_to(scratch / one)
    return folder


def kills(scratch: Path, draw: random.Random, until: float) -> dict[str, Any]:
    "Kill every job in turn, as often as there is time for."
    reference, table, faults = {}, {name: Counter() for name in JOBS}, []
    for number in range(10_000):
        name = list(JOBS)[number % len(JOBS)]
        work, result, before = JOBS[name]
        if name not in reference:
            folder, started = place(scratch, f"whole-{number}"), time.monotonic()
            if before:
                before(folder / "out")
            end, answer = forked(partial(both, work, result, folder / "out"))
            if end != "ok":
                faults.append([name, "undisturbed", end, answer and answer["value"]])
            reference[name] = (
                (answer or {}).get("value"),
                (answer or {}).get("events", 1),
                time.monotonic() - started,
            )
        if time.monotonic() > until and number >= len(JOBS):
            break
        value, events, seconds = reference[name]
        folder = place(scratch, f"kill-{number}")
        out = folder / "out"
        if before:
            before(out)
            old = result(out)
        timed = number // len(JOBS) % 2
        how = (
            {"kill_after": draw.uniform(0, seconds)}
            if timed
            else {"kill_at": draw.randint(1, max(1, events))}
        )
        end, _ = forked(partial(work, out), **how)
        table[name]["killed" if end == "killed" else "ended before"] += 1
        if before:
            kept, answer = forked(partial(result, out))
            if kept != "ok" or answer["value"] not in (old, value):
                table[name]["lost"] += 1
                faults.append([name, how, "lost", answer and answer["value"]])
        end, answer = forked(partial(both, work, result, out))
        same = end == "ok" and answer["value"] == value
        table[name]["same bits" if same else f"rerun: {end}" if end != "ok" else "other bits"] += 1
        if not same:
            faults.append([name, how, end, answer and answer["value"]])
        if found := left(folder):
            table[name]["left behind"] += 1
            faults.append([name, how, "left", found])
        os.chdir(scratch)
        shutil.rmtree(folder)
    return {"table": {name: dict(count) for name, count in table.items()}, "faults": faults}


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "missing": lambda data, draw: None,
    "empty": lambda data, draw: b"",
    "cut": lambda data, draw: data[: draw.randrange(len(data) or 1)],
    "one byte": lambda data, draw: _flipped(data, draw.randrange(len(data) or 1)),
    "page of HTML": lambda data, draw: b"<!DOCTYPE html><html>404 not found</html>",
    "zeros": lambda data, draw: bytes(len(data)),
    "random bytes": lambda data, draw: draw.randbytes(len(data)),
    "doubled": lambda data, draw: data + data,
}


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else b"x"


class Stop(Exception):
    "Ends a run early."


def interrupted(out: Path) -> None:
    def stop(history: Any) -> None:
        if len(history) == 2:
            raise Stop

    try:
        fit(tiny_model(dropout=0.1), tiers(), out=out, schedule="linear", on_epoch=stop, **FIT)
    except Stop:
        pass


def saved_adapters(out: Path) -> None:
    which = Adapters(2, "fused", head=True)
    wrapper = add_adapters(tiny_model(), which)
    with torch.no_grad():
        for name, weight in wrapper.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    save_adapters(wrapper, which, out)


def with_adapters(out: Path) -> str:
    return digest(*(v.numpy() for v in load_adapters(tiny_model(), out).state_dict().values()))


# name -> (what makes the folder, what reads it)
READERS: dict[str, tuple[Callable, Callable]] = {
    "clips": (lambda o: build_dataset(toy_recording(), o, **CLIPS), lambda o: whole(o, MouseDataset)),
    "scenes": (pictures, lambda o: whole(o, ScenesDataset)),
    "things": (lambda o: build_things(open_things("things", "01"), o), lambda o: digest(ThingsDataset(o).responses)),
    "features": (features, lambda o: digest(*(features(o)[i]["features"] for i in range(8)))),
    "interrupted run": (interrupted, lambda o: (head(o), weights(o))[1]),
    "finished run": (head, lambda o: (head(o), weights(o))[1]),
    "folds": (folds, lambda o: (folds(o), loaded_folds(o))[1]),
    "adapters": (saved_adapters, with_adapters),
    "search": (search, found),
}  # fmt: skip
NOT_READ = (
    "history.csv",
    "curves.png",
    "card.md",
    "README.md",
    "events.out",
    "training_args.bin",
    ".lock",
    "best.json",
)


def damages(scratch: Path, draw: random.Random, seconds: float) -> dict[str, Any]:
    "Damage one file of a finished folder at a time, and read it."
    made, table, faults = {}, {name: Counter() for name in READERS}, []
    for name, (make, read) in READERS.items():
        folder = place(scratch, f"good-{name}")
        forked(partial(make, folder / "out"))
        os.chdir(scratch)
        copy = scratch / f"read-{name}"
        shutil.copytree(folder, copy, symlinks=True)
        os.chdir(copy)
        end, answer = forked(partial(read, copy / "out"))
        assert end == "ok", (name, end, answer)
        made[name] = answer["value"]
    number, until = 0, time.monotonic() + seconds
    while number < len(READERS) or time.monotonic() < until:
        name = list(READERS)[number % len(READERS)]
        number += 1
        folder = scratch / f"bad-{number}"
        shutil.copytree(scratch / f"good-{name}", folder, symlinks=True)
        os.chdir(folder)
        files = [
            p
            for p in sorted((folder / "out").rglob("*"))
            if p.is_file() and not any(w in p.name for w in NOT_READ)
        ]
        path, damage = draw.choice(files), draw.choice(list(DAMAGES))
        data = DAMAGES[damage](path.read_bytes(), draw)
        path.unlink() if data is None else path.write_bytes(data)
        end, answer = forked(partial(READERS[name][1], folder / "out"))
        if end == "ok":
            end = "tolerated" if answer["value"] == made[name] else "silent"
        table[name][end] += 1
        if end not in ("named", "tolerated"):
            faults.append(
                [name, str(path.relative_to(folder)), damage, end, answer and str(answer["value"])[:200]]
            )
        os.chdir(scratch)
        shutil.rmtree(folder)
    return {"table": {name: dict(count) for name, count in table.items()}, "faults": faults}


def looked(read: Callable[[], Any]) -> tuple[str, list[str]]:
    "What was read, as a hash, and what was said of it."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = hashlib.sha256(pickle.dumps(malformed.content(read()))).hexdigest()
    return found, sorted({str(w.message) for w in said if "was not measured" in str(w.message)})


def sort(end: str, same: bool, known: bool) -> str:
    "What a reader did with a file that was changed."
    if end != "ok":
        return end
    return "tolerated" if same else "silent" if known else "other"


def inputs(scratch: Path, draw: random.Random, seconds: float) -> dict[str, Any]:
    "Spoil the content of one file at a time, for every reader; `other`: what no reader could know."
    home = place(scratch, "inputs", shared=())
    cache = write_session(scratch / "session", size="tiny")
    every = malformed.readers(home, write_things(scratch / "study", "tiny"), cache)
    table, faults, others, good = {name: Counter() for name in every}, [], Counter(), {}
    number, until = 0, time.monotonic() + seconds
    while number < len(every) or time.monotonic() < until:
        turn, at = divmod(number, len(every))
        name = list(every)[at]
        number += 1
        if turn % 4 and name.startswith(malformed.SLOW):
            continue
        reader = every[name]
        whole, card = reader.path.read_bytes(), reader.card and reader.card.read_bytes()
        if name not in good:
            end, answer = forked(partial(looked, reader.read))
            assert end == "ok", (name, end, answer)
            good[name] = answer["value"]
        what, known = malformed.spoil(reader.path, whole, draw)
        signed = bool(reader.card) and draw.random() < 0.5
        if signed:
            try:
                malformed.sign(reader.card, reader.path)
            except Exception:  # the card itself is spoilt
                signed = False
        end, answer = forked(partial(looked, reader.read))
        bound = reader.card is not None and not signed
        if end == "ok" and set(answer["value"][1]) - set(
            good[name][1]
        ):  # read, and told which values are not there
            end = "named"
        told = sort(end, end == "ok" and answer["value"] == good[name], (known or bound) and not reader.bare)
        table[name][told] += 1
        if told == "other":
            others[f"{name}: {what}"[:100] + (" (signed)" if signed else "")] += 1
        elif told not in ("named", "tolerated"):
            faults.append(
                [name, what[:100], "signed" if signed else "", told, answer and str(answer["value"])[:200]]
            )
        reader.path.write_bytes(whole)
        if card is not None:
            reader.card.write_bytes(card)
    os.chdir(scratch)
    shutil.rmtree(home)
    return {
        "table": {name: dict(count) for name, count in table.items()},
        "faults": faults,
        "other": dict(sorted(others.items())),
    }


def command(line: list[str]) -> str:
    "Run `cortexlit LINE`; a refusal is an error of the library."
    sys.argv = ["cortexlit", *line]
    try:
        cli.main()
    except SystemExit as end:
        if end.code not in (0, None):
            raise core.DataError("refused") from None
    return "ran"


def lines(scratch: Path, draw: random.Random, seconds: float) -> dict[str, Any]:
    "Call every command with a value that is not right."
    home = place(scratch, "lines", shared=())
    every = malformed.commands(home)
    embedded_session("tiny")
    table, faults, ran = {name: Counter() for name in every}, [], Counter()
    number, until = 0, time.monotonic() + seconds
    while number < len(every) or time.monotonic() < until:
        name = list(every)[number % len(every)]
        number += 1
        line = malformed.words(name, *every[name], draw)
        end, answer = forked(partial(command, line))
        told = "ran" if end == "ok" else end
        if not (home / "thesis/chapter1.tex").is_file() or (home / "file").read_text() != "precious":
            told = "lost"
        table[name][told] += 1
        short = " ".join(line).replace(str(home), ".")[:160]
        if told == "ran":
            ran[short] += 1
        elif told != "named":
            faults.append([short, told, answer and str(answer["value"])[:200]])
        shutil.rmtree(home / "new", ignore_errors=True)
    os.chdir(scratch)
    shutil.rmtree(home)
    return {
        "table": {name: dict(count) for name, count in table.items()},
        "faults": faults,
        "ran": dict(sorted(ran.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=15, help="in all: 4 parts kills, 2 damages, 3 input, 1 commands"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials._HEARTBEAT = 1  # a dead worker is noticed after four seconds
    started, draw, home = time.monotonic(), random.Random(asked.seed), Path.cwd()
    scratch = Path(tempfile.mkdtemp(prefix="torture-"))
    build_dataset(toy_recording(), scratch / "data", **CLIPS)
    tiny_model(core_state=False).save_core(scratch / "core")
    write_things(scratch / "things", "tiny", layouts=("figshare",))
    part = 60 * asked.minutes / 10
    killed = kills(scratch, draw, started + 4 * part)
    damaged = damages(scratch, draw, 2 * part)
    spoilt = inputs(scratch, draw, 3 * part)
    called = lines(scratch, draw, part)
    os.chdir(home)
    shutil.rmtree(scratch)
    parts = {"kills": killed, "damaged files": damaged, "malformed input": spoilt, "command lines": called}
    for title, part in parts.items():
        total = sum(map(Counter, part["table"].values()), Counter())
        print(f"{title}: {dict(total)}")
        for name, count in part["table"].items():
            print(f"  {name:26} {count}")
        for fault in part["faults"]:
            print("  FAULT", fault)
        part["total"] = dict(total)
        for name, count in [*part.get("other", {}).items(), *part.get("ran", {}).items()]:
            print(f"  {count} times, with another result or simply done: {name}")
    tried = [sum(map(Counter, parts[name]["table"].values()), Counter()) for name in list(parts)[1:]]
    total = sum(tried, Counter())
    share = total["foreign"] / max(1, sum(total.values()))
    print(f"{sum(total.values())} inputs, {100 * share:.1f} % in the traceback of another library")
    if asked.out:
        content = {name.replace(" ", "_"): part for name, part in parts.items()} | {
            "inputs": dict(total),
            "foreign_share": round(share, 4),
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
        core.write_json(home / asked.out, content | {"provenance": core.provenance(seed=asked.seed)})


if __name__ == "__main__":
    main()
