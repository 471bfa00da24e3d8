"""A pytest plugin: after a while without a finished test, one line says which tests are running and what is left."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TextIO

import pytest

SILENCE = 20.0  # s


class Progress:
    """Counts tests as they start and end, in this process or in the workers of pytest-xdist.

    Parameters
    ----------
    out : file
        Where the lines go; a copy of standard output, since pytest captures the original while a test runs.
    silence : float
        Seconds after which a line is due.
    """

    def __init__(self, out: TextIO, silence: float = SILENCE):
        self.out, self.silence = out, silence
        self.running: dict[str, float] = {}
        self.total = self.done = 0
        self.began = self.told = time.monotonic()
        self.over = threading.Event()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = max(self.total, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.total = max(self.total, len(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.done += 1
        self.told = time.monotonic()

    def line(self) -> str:
        "What is running, what is done and what is left."
        now = time.monotonic()
        names = [f"{n.rpartition('/')[2]} for {now - since:.0f} s" for n, since in list(self.running.items())]
        left = (self.total - self.done) * (now - self.began) / self.done if self.done else None
        return f"    {self.done} of {self.total} done; running: {', '.join(names) or 'collecting'}" + (
            f"; left: about {left / 60:.0f} min" if left is not None else ""
        )

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self.over.set()

    def _watch(self) -> None:
        while not self.over.wait(min(1.0, self.silence)):
            if time.monotonic() - self.told >= self.silence:
                self.out.write(f"\n{self.line()}\n")
                self.out.flush()
                self.told = time.monotonic()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker; the process that started it tells
        return
    try:
        out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    except (OSError, ValueError):  # standard output is no file
        return
    config.pluginmanager.register(Progress(out, float(os.environ.get("PYTEST_SILENCE", SILENCE))))
