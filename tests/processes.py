"""Processes of their own for tests, real ones that can be killed, without the seconds of importing torch in each.

They are forked from a server process that has imported the library and has run nothing. It starts when the first test
asks for a process, and ends with pytest.
"""

import contextlib
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "hypothesis", "cortexlit.training.tuning", "cortexlit.data.clips"])


def _child(
    told: Path, folder: str, path: list[str], environment: dict, target: Callable, args: tuple
) -> None:
    gc.freeze()  # what was imported stays: sweeps of the memory need not look at it
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with (
        told.open("w", buffering=1) as out,
        told.with_suffix(".err").open("w", buffering=1) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            target(*args)
        except BaseException:
            traceback.print_exc()
            raise


class Process:
    "`target(*args)` in a process of its own, in `folder`; what it prints is kept."

    def __init__(
        self, folder: Path, target: Callable, *args: object, environment: Mapping[str, str] | None = None
    ):
        self._told = told = folder / f"told-{len(list(folder.glob('told-*.out')))}.out"
        for end in (".out", ".err"):
            told.with_suffix(end).touch()
        surroundings = {**os.environ, **(environment or {})}
        job = (told, str(folder), sys.path, surroundings, target, args)
        self._process = _CONTEXT.Process(target=_child, args=job)
        self._process.start()

    def ended(self, timeout: float = 240) -> tuple[int | None, str]:
        "Exit code (minus the signal that killed it, None if it still runs) and what it has printed; after a failure, errors too."
        self._process.join(timeout)
        code, out = self._process.exitcode, self._told.read_text()
        return code, out + self._told.with_suffix(".err").read_text() if code is None or code > 0 else out


def barrier(parties: int):
    "A barrier that processes can be given."
    return _CONTEXT.Barrier(parties)
