"""Open recordings: finding, downloading and refusing files; the Park recording against its file; gratings as physics."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat

from cortexlit.core import DataError, MissingError, data_home
from cortexlit.data import opendata
from cortexlit.data.opendata import REGISTRY, drifting_grating, fetch, open_recording

HOME = data_home()


def needs_files(test: Callable) -> Callable:
    "Marks a test that reads the real recordings, and skips it where they are not."
    absent = [entry.path for entry in REGISTRY.values() if not (HOME / entry.path).is_file()]
    skip = pytest.mark.skipif(bool(absent), reason=f"no {', '.join(absent)} in {HOME} (make data)")
    return pytest.mark.data(skip(test))


CONTENT = bytes(range(256)) * 400
NAME = "park_230809"


# --- a server on this machine stands in for the public one -----------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        body = {"/good": CONTENT, "/changed": CONTENT[::-1], "/cut": CONTENT}[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def served(server, tmp_path, monkeypatch):
    "register(page) makes the registry point to a page of the server; returns where the file belongs."
    monkeypatch.setenv("CORTEXLIT_DATA", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def register(page: str) -> Path:
        entry = replace(
            REGISTRY[NAME],
            url=f"http://127.0.0.1:{server.server_port}{page}",
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            bytes=len(CONTENT),
        )
        monkeypatch.setitem(REGISTRY, NAME, entry)
        return tmp_path / "home" / entry.path

    return register


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_download_once(served, server, tmp_path):
    path = served("/good")
    assert fetch(NAME) == path
    assert path.read_bytes() == CONTENT
    assert fetch(NAME) == path
    assert server.asked == ["/good"]
    assert files_in(tmp_path / "home") == [REGISTRY[NAME].path]


@pytest.mark.parametrize(
    ("page", "error"),
    [("/missing", MissingError), ("/cut", (MissingError, DataError)), ("/changed", DataError)],
)
def test_bad_download_leaves_nothing(served, tmp_path, page, error):
    served(page)
    with pytest.raises(error, match=page):
        fetch(NAME)
    assert files_in(tmp_path / "home") == []


def test_no_network_says_what_to_do(served, server, tmp_path):
    path = served("/good")
    url = REGISTRY[NAME].url
    server.shutdown()
    server.server_close()
    with pytest.raises(MissingError) as caught:
        fetch(NAME)
    message = str(caught.value)
    assert url in message and str(path) in message and "CORTEXLIT_DATA" in message
    assert files_in(tmp_path / "home") == []


def test_data_home_that_cannot_be_written(served, tmp_path):
    served("/good")
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(MissingError, match="CORTEXLIT_DATA"):
        fetch(NAME)


def test_wrong_file_is_kept_and_not_replaced(served, server):
    path = served("/good")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="left as it is"):
        fetch(NAME)
    assert path.read_bytes() == CONTENT[:-1]
    assert server.asked == []


def test_file_that_is_there_is_not_written_to(served, server, tmp_path):
    path = served("/good")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    before = {p: os.stat(p).st_mtime_ns for p in tmp_path.rglob("*")}
    assert fetch(NAME) == path
    assert {p: os.stat(p).st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert server.asked == []


def test_unknown_name():
    with pytest.raises(MissingError, match="park_230803"):
        fetch("park")
    with pytest.raises(MissingError, match="park_230803"):
        open_recording("park")


def test_registry_is_pinned():
    for name, entry in REGISTRY.items():
        assert entry.name == name
        assert entry.url.rsplit("/", 1)[1] == entry.path.rsplit("/", 1)[1]
        commit = entry.url.split("/")[5]
        assert len(commit) == 40 and int(commit, 16)
        assert len(entry.sha256) == 64 and int(entry.sha256, 16)
        assert entry.licence and entry.citation and "group" in entry.facts


# --- the recording against the file ----------------------------------------------------------------------------------


@needs_files
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_recording_holds_the_file(name):
    recording = open_recording(name)
    assert fetch(name).stat().st_size == REGISTRY[name].bytes
    mat = loadmat(fetch(name), simplify_cells=True)  # another way of reading than the library's
    direction, t = np.asarray(mat["TE"]["direction"]), mat["t"]
    names = [k for k in mat["D"] if k.startswith("neuron")]
    assert recording.n_neurons == len(names)
    assert recording.n_frames == 128 * 49
    seen = set()
    for movie in recording.movies():
        table = recording.table(movie)
        angle = int(movie.removeprefix("grating_"))
        for repeat, rows in table.groupby("repeat"):
            trial = np.flatnonzero(direction == angle)[repeat]
            rows = rows.sort_values("frame")
            assert rows["frame"].tolist() == list(range(49)) and (rows["start"] == rows["end"]).all()
            at = rows["start"].to_numpy()
            seen.update(at.tolist())
            cell = names[(trial * 7) % len(names)]
            expected = np.asarray(mat["D"][cell][trial], "float32")
            np.testing.assert_array_equal(
                recording.traces[int(cell.removeprefix("neuron")) - 1, at], expected
            )
            np.testing.assert_array_equal(
                recording.running[at], np.asarray(mat["D"]["speed"][trial], "float32")
            )
            np.testing.assert_array_equal(
                recording.pupil_area[at], np.asarray(mat["D"]["pupil_zscore"][trial], "float32")
            )
            np.testing.assert_allclose(recording.timestamps[at], 3 + 5 * trial + t, atol=1e-9)
    assert seen == set(range(recording.n_frames))


@needs_files
def test_recording_is_honest():
    recording = open_recording(NAME)
    meta = json.loads(json.dumps(recording.metadata))
    assert recording.signal == "dff" and recording.source == "park"
    assert recording.pupil_center is None and recording.neurons[["x_um", "y_um"]].isna().all().all()
    text = " ".join(meta["warnings"])
    for word in ("fixed order", "nominal", "assumed", "rescaled", "diameter"):
        assert word in text
    assert meta["direction_by_trial"] == list(range(0, 360, 45)) * 16
    assert meta["clock"]["nominal"] and meta["gratings"]["assumed"]
    assert meta["file"]["sha256"] == REGISTRY[NAME].sha256
    assert "knock-out" not in text
    assert "knock-out" in " ".join(open_recording("park_230803").metadata["warnings"])


@needs_files
def test_another_file_of_the_kind_opens_by_its_path(tmp_path):
    "Same content, another name: everything but what only the registry knows."
    known, path = open_recording(NAME), tmp_path / "990101_other_fov1_grat-000_data.mat"
    shutil.copy(data_home() / REGISTRY[NAME].path, path)
    recording = open_recording(path)
    assert recording.name == "990101_other_fov1"
    np.testing.assert_array_equal(recording.traces, known.traces)
    assert "not registered" in " ".join(recording.metadata["warnings"])
    assert recording.metadata["file"]["sha256"] == REGISTRY[NAME].sha256
    with pytest.raises(MissingError, match="no such file"):
        open_recording(tmp_path / "nothing.mat")
    (tmp_path / "broken.mat").write_bytes(b"no such thing")
    with pytest.raises(DataError, match="broken.mat"):
        open_recording(tmp_path / "broken.mat")


@needs_files
def test_options_reach_the_gratings_and_the_metadata():
    options = {
        "spatial_frequency": 0.02,
        "temporal_frequency": 1.0,
        "contrast": 0.5,
        "size": (18, 32),
        "field_of_view": (60.0, 100.0),
    }
    recording = open_recording(NAME, clockwise=True, **options)
    t = loadmat(fetch(NAME))["t"].ravel()
    np.testing.assert_array_equal(recording.templates["grating_045"], drifting_grating(-45, t, **options))
    gratings = recording.metadata["gratings"]
    assert (gratings["spatial_frequency"], gratings["temporal_frequency"], gratings["contrast"]) == (
        0.02,
        1.0,
        0.5,
    )
    assert gratings["clockwise"] and gratings["field_of_view_deg"] == [60.0, 100.0]


# --- gratings --------------------------------------------------------------------------------------------------------

T = np.arange(-16, 33) / 16


@pytest.mark.parametrize("direction", [0, 30, 45, 100, 225, 315])
def test_grating_moves_at_its_speed(direction):
    "The 2-D spectrum of a frame peaks at the asked frequency, and its phase runs at the temporal frequency, in the direction of drift."
    frequency, rate, size, field = 0.05, 2.0, (60, 60), (120.0, 120.0)
    movie = drifting_grating(direction, T, frequency, rate, 1.0, size=size, field_of_view=field).astype(float)
    y, x = ((np.arange(60) - 29.5) * 2 for _ in range(2))
    angle = np.deg2rad(direction)
    wave = np.exp(-2j * np.pi * frequency * (x[None, :] * np.cos(angle) - y[:, None] * np.sin(angle)))
    window = np.outer(np.hanning(60), np.hanning(60))
    projection = ((movie[16:48] - 127.5) * window * wave).sum((1, 2))
    turn = np.unwrap(np.angle(projection))
    np.testing.assert_allclose(np.diff(turn), -2 * np.pi * rate / 16, atol=0.02)
    assert np.abs(projection).min() > 0.45 * 127.5 * window.sum()


@given(
    direction=st.floats(0, 360),
    contrast=st.floats(0, 1),
    spatial=st.floats(0, 0.1),
    temporal=st.floats(0, 7.9),
    duration=st.floats(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_grating_is_grey_outside_and_within_contrast(direction, contrast, spatial, temporal, duration):
    movie = drifting_grating(
        direction, T, spatial, temporal, contrast, duration, size=(24, 32), field_of_view=(90.0, 120.0)
    )
    assert movie.shape == (49, 24, 32) and movie.dtype == np.uint8
    off = (T < 0) | (T >= duration)
    assert (movie[off] == 128).all()
    assert np.abs(movie.astype(float) - 127.5).max() <= 127.5 * contrast + 0.51


def test_opposite_directions_mirror_in_time_and_space():
    "Turning the picture by 180 degrees turns the direction by 180 degrees, and the phase is odd about the centre."
    one, other = drifting_grating(40, T).astype(int), drifting_grating(220, T).astype(int)
    assert np.abs(one[:, ::-1, ::-1] - other).max() == 0


@pytest.mark.parametrize("direction", range(0, 360, 45))
def test_a_full_turn_changes_no_bit(direction):
    "cos(270 deg) is not exactly 0: levels at a half must not be rounded by such dust."
    np.testing.assert_array_equal(drifting_grating(direction - 360, T), drifting_grating(direction, T))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"contrast": 1.2}, "contrast"),
        ({"contrast": -0.1}, "contrast"),
        ({"spatial_frequency": 0.2}, "2 pixels"),
        ({"size": (36, 8)}, "2 pixels"),
        ({"temporal_frequency": 8.0}, "2 frames"),
    ],
)
def test_gratings_that_cannot_be_shown(kwargs, text):
    with pytest.raises(DataError, match=text):
        drifting_grating(0, T, **kwargs)


def test_module_does_not_load_allensdk_or_torch():
    source = Path(opendata.__file__).read_text(encoding="utf-8")
    assert "allensdk" not in source and "torch" not in source
