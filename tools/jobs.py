"""Run jobs in processes of their own, several at a time, and say in plain lines what runs, what is done and what is left.

The lines hold no control characters, so that they read the same on a terminal and in a log. A job that fails, or
whose process dies, does not stop the others.
"""

import gc
import heapq
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

SILENCE = 20.0  # s after which a line says what is running
PRELOAD = (
    "torch",
    "torch.utils.tensorboard",
    "pandas",
    "scipy.io",
    "scipy.signal",
    "scipy.stats",
    "sklearn.linear_model",
    "matplotlib.pyplot",
    "h5py",
    "fastcore.test",
    "nbdev.test",
    "transformers.modeling_utils",
    "transformers.trainer",
    "peft",
    "nilearn.surface",
    "optuna",
    "allensdk.core.brain_observatory_cache",
    "nibabel",
)


def preload(jobs: int) -> tuple[str, ...]:
    "Modules worth importing once for so many jobs."
    return PRELOAD if jobs > 4 else ()


class Problem(Exception):
    "What went wrong in a job, as a text for people: shown as it is, without a traceback."


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Parameters
    ----------
    name : str
        Shown, and unique.
    function, args
        Called as `function(*args)` in a process of its own; both must pickle. What it returns is kept.
    seconds : float
        How long it takes on an idle core, more or less.
    after : frozenset of str
        Names of jobs that must have ended before, well or not.
    loud : bool
        What the process prints reaches the terminal; otherwise it is shown only if the process dies.
    light : bool
        It imports little: a process of its own starts at once, while the others wait for the libraries.
    """

    name: str
    function: Callable
    args: tuple = ()
    seconds: float = 10.0
    after: frozenset[str] = frozenset()
    loud: bool = False
    light: bool = False


@dataclass
class Done:
    "How a job ended, after how long, and with how much work of a core: `value` if it went well, else the `problem`."

    name: str
    seconds: float
    cpu: float
    value: Any = None
    problem: str | None = None


@dataclass
class _Running:
    job: Job
    process: Any
    results: Any
    log: Path
    began: float = field(default_factory=time.monotonic)


def _child(results: Any, log: str | None, function: Callable, args: tuple) -> None:
    "In the process of the job: call, and send back what came of it. If the process that wanted it dies, so does this."
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    gc.freeze()  # what was imported stays: sweeps of the memory need not look at it
    if log is not None:
        with open(log, "wb") as file:  # also what C code and grandchildren print
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        answer = ("value", function(*args))
    except Problem as problem:
        answer = ("problem", str(problem))
    except BaseException:
        answer = ("problem", traceback.format_exc())
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    results.send((*answer, sum(u.ru_utime + u.ru_stime for u in used)))
    results.close()


def _outlive_nobody() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def duration(seconds: float) -> str:
    "48 s, or 3 min 20 s."
    seconds = round(seconds)
    return f"{seconds} s" if seconds < 100 else f"{seconds // 60} min {seconds % 60:02d} s"


class Progress:
    "What is known about the time that is left, and the lines that tell it."

    def __init__(self, jobs: list[Job], workers: int, say: Callable[[str], None]):
        self.total, self.workers, self.say = len(jobs), workers, say
        self.width = max((len(job.name) for job in jobs), default=0)
        self.began = self.told = time.monotonic()
        self.expected = self.took = 0.0  # of the jobs that are done

    def left(self, running: list[_Running], waiting: list[Job]) -> float:
        "Seconds until everything is done, if jobs go on as they did."
        pace = min(20.0, max(0.25, self.took / self.expected)) if self.expected > 5 else 1.0
        now = time.monotonic()
        took = [now - r.began for r in running]
        # one that is over its time will take a little longer, as far as anybody knows
        ends = [max(pace * r.job.seconds - t, 0.1 * t) for r, t in zip(running, took, strict=True)]
        ends = sorted(ends + [0.0] * (self.workers - len(ends)))
        for job in waiting:
            heapq.heapreplace(ends, ends[0] + pace * job.seconds)
        return max(ends)

    def line(self, text: str) -> None:
        "One line, after the time since the start."
        self.told = time.monotonic()
        seconds = int(self.told - self.began)
        self.say(f"{seconds // 60:3d}:{seconds % 60:02d}  {text}")

    def start(self, waiting: list[Job]) -> None:
        at_a_time = f", {self.workers} at a time, the longest first" if self.workers > 1 else ""
        self.line(f"{self.total} to run{at_a_time}; about {duration(self.left([], waiting))}")

    def finished(self, job: Job, done: Done, count: int, running: list[_Running], waiting: list[Job]) -> None:
        self.expected, self.took = self.expected + job.seconds, self.took + done.seconds
        verdict = "ok    " if done.problem is None else "FAILED"
        text = f"[{count:{len(str(self.total))}d} of {self.total}] {verdict} {done.name:{self.width}} {duration(done.seconds):>12}"
        if running or waiting:
            names = ", ".join(r.job.name for r in running)
            text += f"   now: {names or 'nothing'}; left: about {duration(self.left(running, waiting))}"
        self.line(text)

    def alive(self, running: list[_Running], waiting: list[Job]) -> None:
        "If nothing was told for a while, what is running."
        now = time.monotonic()
        if now - self.told >= SILENCE:
            names = ", ".join(f"{r.job.name} for {duration(now - r.began)}" for r in running)
            self.line(f"running: {names}; left: about {duration(self.left(running, waiting))}")


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    "Sorted by their seconds and those of the longest chain of jobs that wait for them."
    jobs = list(jobs)

    def chain(job: Job) -> float:
        return job.seconds + max((chain(other) for other in jobs if job.name in other.after), default=0.0)

    return sorted(jobs, key=lambda job: -chain(job))


def run(
    jobs: Iterable[Job],
    workers: int = 2,  # processes at a time
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    preload: tuple[str, ...] = (),  # modules imported once for all jobs
) -> list[Done]:  # in the order in which they ended
    "Run all jobs, the longest first, with what waits for them; a job that fails does not stop the others."
    waiting = longest_first(jobs)
    names = {job.name for job in waiting}
    assert len(names) == len(waiting), "two jobs of one name"
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(list(preload))
        forkserver.ensure_running()  # imports, while light jobs begin
    progress, running, done = Progress(waiting, workers, say), [], []
    progress.start(waiting)
    if preload and sys.platform == "linux":
        progress.line("importing the libraries once for all of them")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an interruption like any other
    with tempfile.TemporaryDirectory(prefix="cortexlit-jobs-") as logs:
        try:
            while waiting or running:
                ended = {d.name for d in done}
                ready = [job for job in waiting if job.after & names <= ended]
                assert ready or running, "jobs wait for each other"
                for job in sorted(ready, key=lambda job: not job.light)[: workers - len(running)]:
                    waiting.remove(job)
                    running.append(_start(context, job, Path(logs)))
                wait([r.results for r in running], timeout=1.0)
                for r in [r for r in running if r.results.poll() or r.process.exitcode is not None]:
                    running.remove(r)
                    done.append(_collect(r))
                    progress.finished(r.job, done[-1], len(done), running, waiting)
                progress.alive(running, waiting)
        finally:  # interrupted: leave nothing behind
            signal.signal(signal.SIGTERM, before)
            for r in running:
                r.process.terminate()
                r.process.join()
    return done


def _start(context: Any, job: Job, logs: Path) -> _Running:
    context = multiprocessing.get_context("spawn") if job.light else context
    results, sender = context.Pipe(duplex=False)
    log = logs / f"{job.name.replace('/', '_')}.log"
    target = (sender, None if job.loud else str(log), job.function, job.args)
    process = context.Process(target=_child, args=target, name=job.name)
    process.start()
    sender.close()  # only the child holds it: its death ends the pipe
    return _Running(job, process, results, log)


def _collect(r: _Running) -> Done:
    "The answer of a job, or how its process died."
    try:
        kind, content, cpu = r.results.recv()
    except EOFError:
        r.process.join()
        printed = r.log.read_text(errors="replace")[-2000:].strip() if r.log.exists() else ""
        content = f"its process died with exit status {r.process.exitcode}" + (
            f"; it had printed:\n{printed}" if printed else ""
        )
        kind, cpu = "problem", 0.0
    r.process.join()
    r.results.close()
    return Done(r.job.name, time.monotonic() - r.began, cpu, **{kind: content})
