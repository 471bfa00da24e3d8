"""Fixtures for all tests: private folders, and a tiny session with known ground truth."""

import functools
import gc
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import progress
import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

gc.disable()  # until all is imported: what that makes stays, and would be looked at again and again
os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network

# What hypothesis has worked out once (tables of characters, constants of the library) is found by the next process,
# although each test runs in a folder of its own.
set_hypothesis_home_dir(Path(__file__).resolve().parents[1] / ".hypothesis")

# The same examples in every run, so that a change is judged by what it changes; `pytest --hypothesis-profile search`
# looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")


LIMIT = 300  # seconds that a test may take on a busy machine; a hanging one ends with all its stacks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT))


def pytest_collection_finish() -> None:
    """What has been imported stays, and need not be looked at again."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if imports := sys.modules.get(
        "accelerate.utils.imports"
    ):  # it looks for a package twice in each training step
        imports._is_package_available = functools.cache(imports._is_package_available)


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    "For tests that train dozens of tiny models: an empty picture in place of the curves of each run."
    from matplotlib.figure import Figure

    from cortexlit.training.trainer import Fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "curves", lambda run: Figure())
        yield


@pytest.fixture(scope="session", autouse=True)
def no_sweeps() -> Iterator[None]:
    "Memory is swept when there is much to sweep, and not each time that a library asks for it, as after every training."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """What was written is not waited for until the disk itself has it: only a power failure would tell.

    Killed processes lose nothing by it. `test_what_gets_its_name_is_on_the_disk_before` watches the calls.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture(scope="session")
def numbered_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "New folders, counted here: pytest's own numbering reads the names of all there are, thousands of times."
    root = tmp_path_factory.mktemp("private")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def private_folders(numbered_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a work folder and a data home of its own, and return the work folder.

    `_data/` and `_runs/` are made in the work folder. The data home links to whatever the user's
    CORTEXLIT_DATA holds, so data that is there can be read, and what a test adds lands in the test's folder.
    """
    folder = next(numbered_folders)
    work, data = folder / "work", folder / "data"
    for made in (folder, work, data):
        made.mkdir()
    chosen = os.environ.get("CORTEXLIT_DATA", "").strip()
    if chosen and Path(chosen).is_dir():
        for entry in Path(chosen).resolve().iterdir():
            (data / entry.name).symlink_to(entry)
    monkeypatch.chdir(work)
    monkeypatch.setenv("CORTEXLIT_DATA", str(data))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("CORTEXLIT_SCALE", raising=False)
    return work


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "An allensdk cache folder with the tiny embedded sessions, made once for all tests: read it, never write."
    from cortexlit.simulate.session import write_session

    return write_session(tmp_path_factory.mktemp("sessions") / "tiny", size="tiny")


@pytest.fixture(scope="session")
def allensdk() -> None:
    "Skip what reads a session as a real one where allensdk is not installed."
    wish = "needs allensdk, which ends at Python 3.11"
    pytest.importorskip(
        "allensdk", reason=f'{wish}: pip install "cortexlit[allen]" in an environment of 3.11'
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "data: reads real files, which `cortexlit data` lists; skipped without them"
    )
    progress.pytest_configure(config)
