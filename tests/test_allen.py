"""cortexlit.data.allen against a real HTTP server on the loopback, and against damaged files."""

from __future__ import annotations

import json
import shutil
import threading
import time

import h5py
import numpy as np
import pandas as pd
import pytest
from allen_server import AllenServer
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError, MissingError
from cortexlit.data import allen

A, B = 900000001, 900000002
PIPELINE = "processing/brain_observatory_pipeline"


@pytest.fixture(scope="session")
def pristine(tiny_cache, tmp_path_factory):
    return shutil.copytree(tiny_cache, tmp_path_factory.mktemp("allen") / "session")


@pytest.fixture
def embedded(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "session")


@pytest.fixture(params=["cortexlit", "allensdk"])
def folder(request, pristine, tmp_path):
    "A copy that may be damaged; without its marker, it is read as if it were a real one: by allensdk."
    copy = shutil.copytree(pristine, tmp_path / "session")
    if request.param == "allensdk":
        request.getfixturevalue("allensdk")
        (copy / "cortexlit.json").unlink()
    return copy


@pytest.fixture
def server(allensdk, pristine, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with AllenServer(pristine) as s:
        yield s


def nwb(root, session=A):
    return root / "ophys_experiment_data" / f"{session}.nwb"


def fetch(server, cache, **kwargs):
    return allen.open_session(A, cache, base_uri=server.uri, progress=False, **kwargs)


def leftovers(cache):
    folder = cache / "ophys_experiment_data"
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []


# --- downloads ------------------------------------------------------------------------------------


def test_download_lands_where_allensdk_looks(server, pristine, tmp_path):
    recording = fetch(server, tmp_path / "c")
    assert recording.source == "allen" and recording.metadata["synthetic"] is False
    assert leftovers(tmp_path / "c") == [f"{A}.nwb", f"{A}.nwb.sha256.json"]
    assert nwb(tmp_path / "c").read_bytes() == nwb(pristine).read_bytes()
    note = json.loads(allen.checksum_file(nwb(tmp_path / "c")).read_text())
    assert note["size"] == nwb(pristine).stat().st_size and note["url"].startswith(server.uri)
    server.stop()

    from allensdk.core.brain_observatory_cache import BrainObservatoryCache

    boc = BrainObservatoryCache(
        manifest_file=str(tmp_path / "c" / "manifest.json"), base_uri="http://127.0.0.1:9"
    )
    dataset = boc.get_ophys_experiment_data(A)  # plain allensdk, server gone
    np.testing.assert_array_equal(dataset.get_fluorescence_timestamps(), recording.timestamps)
    again = allen.open_session(
        A, tmp_path / "c", base_uri="http://127.0.0.1:9"
    )  # and we need no server either
    assert again.metadata["nwb_sha256"] == recording.metadata["nwb_sha256"]


def test_cut_connection_is_resumed(server, pristine, tmp_path):
    server.cuts = [500_000, 700_000]
    fetch(server, tmp_path)
    assert server.ranges_asked[0] is None and len(server.ranges_asked) == 3
    first, second = (int(r.removeprefix("bytes=").rstrip("-")) for r in server.ranges_asked[1:])
    assert 400_000 < first <= 500_000 < second <= 1_200_000
    assert nwb(tmp_path).read_bytes() == nwb(pristine).read_bytes()
    assert leftovers(tmp_path) == [f"{A}.nwb", f"{A}.nwb.sha256.json"]


def test_cut_for_good_keeps_the_part_and_a_later_call_goes_on(server, pristine, tmp_path):
    server.cuts = [300_000] * 4
    with pytest.raises(MissingError, match="download failed 4 times, 1,1.* bytes are kept in"):
        fetch(server, tmp_path)
    part = nwb(tmp_path).with_name(f"{A}.nwb.part")
    assert part.stat().st_size > 1_000_000 and not nwb(tmp_path).exists()
    have = part.stat().st_size
    fetch(server, tmp_path)
    assert server.ranges_asked[-1] == f"bytes={have}-"
    assert nwb(tmp_path).read_bytes() == nwb(pristine).read_bytes()


def test_server_without_ranges_starts_clean(server, pristine, tmp_path):
    server.ranges, server.cuts = False, [500_000]
    fetch(server, tmp_path)
    assert server.ranges_asked[1].startswith("bytes=")  # asked, and not honoured
    assert nwb(tmp_path).read_bytes() == nwb(pristine).read_bytes()


def test_a_new_version_on_the_server_is_not_glued_to_the_old_part(server, pristine, tmp_path):
    good = nwb(pristine).read_bytes()
    server.body = good[:1000] + bytes(len(good) - 1000)  # version 1: as long, other bytes
    server.cuts = [500_000] + [0] * 3
    with pytest.raises(MissingError):
        fetch(server, tmp_path)
    server.etag, server.body = '"v2"', None
    fetch(server, tmp_path)
    assert server.ranges_asked[-1].startswith("bytes=4")  # asked for the rest, got everything
    assert nwb(tmp_path).read_bytes() == good


@pytest.mark.parametrize("shift", [4096, -4096])
def test_an_answer_for_another_place_is_not_appended(server, pristine, tmp_path, shift):
    server.cuts, server.shift = [500_000], shift
    fetch(server, tmp_path)
    assert [r and "bytes" for r in server.ranges_asked] == [None, "bytes", None]
    assert nwb(tmp_path).read_bytes() == nwb(pristine).read_bytes()


def test_a_transfer_that_ends_early_without_an_error_is_noticed(pristine, tmp_path, monkeypatch):
    good = nwb(pristine).read_bytes()

    class Answer:  # what older urllib3 does when the connection breaks
        def __init__(self, asked):
            start = int((asked or "bytes=0-")[6:-1])
            self.status_code, self.piece = (206 if start else 200), good[start : start + 900_000]
            self.headers = {
                "Content-Length": str(len(good) - start),
                "Content-Range": f"bytes {start}-{len(good) - 1}/{len(good)}",
            }

        url = "https://x"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def raise_for_status(self):
            pass

        def iter_content(self, _):
            yield self.piece

    monkeypatch.setattr(allen.requests, "get", lambda url, headers, **_: Answer(headers.get("Range")))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert allen.download("https://x/8.nwb", tmp_path / "8.nwb", progress=False).read_bytes() == good
    with pytest.raises(MissingError, match="900,000 of 2,"):
        allen.download("https://x/9.nwb", tmp_path / "9.nwb", progress=False, tries=1)


def test_another_size_on_the_server_is_not_glued_either(server, pristine, tmp_path):
    server.etag = None  # no version to compare, only sizes
    part = nwb(tmp_path).with_name(f"{A}.nwb.part")
    part.parent.mkdir()
    part.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 1000)
    url = f"{server.uri}/file/ophys_experiment_data/{A}.nwb"
    part.with_name(part.name + ".json").write_text(json.dumps({"url": url, "size": 5000, "version": None}))
    fetch(server, tmp_path)
    assert server.ranges_asked == ["bytes=1008-", None]
    assert nwb(tmp_path).read_bytes() == nwb(pristine).read_bytes()


def test_a_part_longer_than_the_file_and_a_finished_part(server, pristine, tmp_path):
    good = nwb(pristine).read_bytes()
    url = f"{server.uri}/file/ophys_experiment_data/{A}.nwb"
    for name, content, asked in (("long", good + b"x", [None]), ("done", good, [])):
        server.ranges_asked.clear()
        target = tmp_path / f"{name}.nwb"
        part = target.with_name(target.name + ".part")
        part.write_bytes(content)
        part.with_name(part.name + ".json").write_text(
            json.dumps({"url": url, "size": len(good), "version": '"v1"'})
        )
        allen.download(url, target, progress=False)
        assert target.read_bytes() == good and server.ranges_asked == asked


def test_no_content_length(server, pristine, tmp_path):
    server.length = False
    fetch(server, tmp_path)
    assert nwb(tmp_path).read_bytes() == nwb(pristine).read_bytes()


def test_no_content_length_and_cut_is_seen_by_opening(server, tmp_path):
    server.length, server.cuts = False, [500_000]
    with pytest.raises(DataError, match="cut off or damaged"):
        fetch(server, tmp_path)
    assert not nwb(tmp_path).exists()


def test_truncated_file_on_the_server(server, pristine, tmp_path):
    server.body = nwb(pristine).read_bytes()[:800_000]  # complete as a transfer, cut as a file
    with pytest.raises(DataError, match="cut off or damaged"):
        fetch(server, tmp_path)
    assert leftovers(tmp_path) == []
    server.body = None
    fetch(server, tmp_path)


def test_html_page_instead_of_the_file_does_not_touch_the_part(server, pristine, tmp_path):
    server.cuts = [500_000] + [0] * 3
    with pytest.raises(MissingError):
        fetch(server, tmp_path)
    part = nwb(tmp_path).with_name(f"{A}.nwb.part")
    kept = part.read_bytes()
    server.body, server.ranges = b"<html>please log in</html>", False
    with pytest.raises(DataError, match="(?s)begins with b'<html>.*in a browser"):
        fetch(server, tmp_path)
    assert part.read_bytes() == kept
    server.body, server.ranges = None, True
    fetch(server, tmp_path)
    assert server.ranges_asked[-1] == f"bytes={len(kept)}-"


def test_valid_hdf5_that_is_no_session(server, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros(1000)
    server.body = other.read_bytes()
    with pytest.raises(DataError, match="not an Allen session"):
        fetch(server, tmp_path / "c")


def test_status_codes(server, tmp_path):
    server.status = 503
    with pytest.raises(MissingError, match="(?s)failed 4 times, nothing arrived.*503"):
        fetch(server, tmp_path)
    assert len(server.ranges_asked) == 4
    server.status = 404
    with pytest.raises(MissingError, match="answers 404"):
        fetch(server, tmp_path)
    assert len(server.ranges_asked) == 5  # no use in asking again
    assert leftovers(tmp_path) == []


def test_unknown_id_names_the_way_to_the_ids(server, tmp_path):
    with pytest.raises(MissingError, match=r"(?s)no NWB file of session 123.*list_sessions\(\)"):
        allen.open_session(123, tmp_path, base_uri=server.uri)


def test_server_down(allensdk, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    cache, nobody = tmp_path / "c", "http://127.0.0.1:9"
    with pytest.raises(MissingError, match="(?s)cannot be reached.*check the network"):
        allen.open_session(A, cache, base_uri=nobody)
    with pytest.raises(MissingError, match="(?s)cannot be reached.*check the network"):
        allen.list_sessions(cache, base_uri=nobody)
    assert sorted(p.name for p in cache.iterdir()) == ["manifest.json"]  # no half-made list


def test_api_failures_are_not_cached(server, tmp_path):
    for answer, text in (
        (b"<html>502</html>", "sent no JSON"),
        (b'{"success": false, "msg": "no such column"}', "no such column"),
    ):
        server.answer = answer
        with pytest.raises(DataError, match=text):
            allen.list_sessions(tmp_path, base_uri=server.uri)
        assert not (tmp_path / "ophys_experiments.json").exists()
    server.answer = None
    assert len(allen.list_sessions(tmp_path, base_uri=server.uri)) == 2


def test_a_silent_server_times_out(tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, never answers
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/8.nwb"
        with pytest.raises(MissingError, match="(?s)failed 2 times.*timed out"):
            allen.download(url, tmp_path / "8.nwb", progress=False, timeout=0.2, tries=2)


def test_two_at_once_download_once(server, pristine, tmp_path):
    url = f"{server.uri}/file/ophys_experiment_data/{A}.nwb"
    threads = [
        threading.Thread(target=allen.download, args=(url, tmp_path / "8.nwb", False)) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert server.ranges_asked == [None]
    assert (tmp_path / "8.nwb").read_bytes() == nwb(pristine).read_bytes()


def test_existing_file_is_left_alone(server, tmp_path):
    (tmp_path / "8.nwb").write_bytes(b"mine")
    allen.download(f"{server.uri}/file/ophys_experiment_data/{A}.nwb", tmp_path / "8.nwb")
    assert (tmp_path / "8.nwb").read_bytes() == b"mine" and server.ranges_asked == []


def test_allensdk_methods_on_the_cache_object_use_the_same_download(server, pristine, tmp_path):
    server.cuts = [500_000]
    boc = allen.open_cache(tmp_path, base_uri=server.uri)
    dataset = boc.get_ophys_experiment_data(A)
    assert dataset.get_metadata()["ophys_experiment_id"] == A and server.ranges_asked[1].startswith("bytes=")
    assert boc.get_ophys_experiment_events(A).shape[0] == dataset.number_of_cells


def test_events_are_fetched_and_checked(server, pristine, tmp_path):
    recording = fetch(server, tmp_path, signal="events")
    assert recording.signal == "events"
    events = tmp_path / "ophys_experiment_events" / f"{A}_events.npz"
    want = np.load(pristine / "ophys_experiment_events" / f"{A}_events.npz")["ev"]
    np.testing.assert_array_equal(recording.traces, want.astype(np.float32))
    with open(events, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="1,000 bytes"):
        fetch(server, tmp_path, signal="events")


# --- files that changed or are damaged ------------------------------------------------------------


def test_changed_and_truncated_file(folder):
    allen.open_session(A, folder)
    good = nwb(folder).read_bytes()
    nwb(folder).write_bytes(good[:1_000_000] + bytes([good[1_000_000] ^ 1]) + good[1_000_001:])
    with pytest.raises(DataError, match=rf"(?s)has changed.*{A}\.nwb.*fetch it anew"):
        allen.open_session(A, folder)
    nwb(folder).write_bytes(good[:1_000_000])
    with pytest.raises(DataError, match=rf"(?s)1,000,000 bytes.*expected: {len(good):,} bytes"):
        allen.open_session(A, folder)
    allen.checksum_file(nwb(folder)).unlink()  # as left behind by a plain allensdk download
    with pytest.raises(DataError, match="cut off or damaged"):
        allen.open_session(A, folder)
    assert not allen.checksum_file(nwb(folder)).exists()
    nwb(folder).write_bytes(b"")
    with pytest.raises(DataError, match="no .nwb file"):
        allen.open_session(A, folder)


def test_file_of_another_session(folder):
    shutil.copy(nwb(folder, B), nwb(folder, A))
    with pytest.raises(DataError, match=rf"(?s)holds session {B}.*expected: {A}"):
        allen.open_session(A, folder)


def edit(folder, session=A):
    allen.checksum_file(nwb(folder, session)).unlink(missing_ok=True)
    return h5py.File(nwb(folder, session), "r+")


def test_metadata_that_cannot_be_parsed(folder):
    with edit(folder) as file:
        del file["general/subject/age"]
        file["general/subject/age"] = np.bytes_("unknown")
    with pytest.raises(
        DataError, match="cannot read the file: (OSError: Could not parse age|ValueError: .*'unknown')"
    ):
        allen.open_session(A, folder)


def test_eye_tracking_flag_is_no_promise(embedded):
    with edit(embedded) as file:
        del file[f"{PIPELINE}/PupilTracking"], file[f"{PIPELINE}/EyeTracking"]
    assert allen.list_sessions(embedded).loc[A, "eye_tracking"]
    recording = allen.open_session(A, embedded)
    assert recording.pupil_area is None and recording.pupil_center is None
    assert recording.metadata["pupil_source"].startswith("none")


def test_size_without_location_and_no_valid_sample(folder):
    with edit(folder) as file:
        del file[f"{PIPELINE}/EyeTracking"]
    recording = allen.open_session(A, folder)
    assert recording.pupil_area is not None and recording.pupil_center is None
    with edit(folder) as file:
        file[f"{PIPELINE}/PupilTracking/pupil_size/data"][...] = np.nan
    recording = allen.open_session(A, folder)
    assert recording.pupil_area is None and "without a valid sample" in recording.metadata["pupil_source"]


def test_pupil_on_another_clock(folder):
    straight = allen.open_session(A, folder)
    ts = straight.timestamps
    camera = np.arange(ts[0] - 0.01, ts[-1], 1 / 30)
    camera = camera[(camera < ts[100]) | (camera > ts[140])]  # a hole of more than a second
    with edit(folder) as file:
        for path in ("PupilTracking/pupil_size", "EyeTracking/pupil_location_spherical"):
            old = file[f"{PIPELINE}/{path}/data"][()]
            del file[f"{PIPELINE}/{path}/data"], file[f"{PIPELINE}/{path}/timestamps"]
            file[f"{PIPELINE}/{path}/data"] = np.repeat(camera[:, None], 2, 1) if old.ndim == 2 else camera
            file[f"{PIPELINE}/{path}/timestamps"] = camera
    recording = allen.open_session(A, folder)
    assert "interpolated from its own clock" in recording.metadata["pupil_source"]
    assert np.isnan(recording.pupil_area[101:140]).all()
    valid = np.isfinite(recording.pupil_area)
    assert valid.mean() > 0.95
    np.testing.assert_allclose(recording.pupil_area[valid], ts[valid])
    np.testing.assert_allclose(recording.pupil_center[valid], np.repeat(ts[valid, None], 2, 1))


def test_running_missing_or_off_the_clock(folder):
    speed = f"{PIPELINE}/BehavioralTimeSeries/running_speed"
    with edit(folder) as file:
        times = file[f"{speed}/timestamps"][()]
        del file[f"{speed}/timestamps"]
        file[f"{speed}/timestamps"] = times + 0.001
    recording = allen.open_session(A, folder)
    assert recording.running is None and "not on the two-photon clock" in recording.metadata["running_source"]
    with edit(folder) as file:
        del file[f"{speed}/data"], file[f"{speed}/timestamps"]
        clock = recording.timestamps
        file[f"{speed}/timestamps"] = np.append(clock, clock[-1] + np.arange(1, 4) / 30)
        file[f"{speed}/data"] = np.ones(len(clock) + 3)
    recording = allen.open_session(A, folder)
    assert recording.running is None and "values for" in recording.metadata["running_source"]
    with edit(folder) as file:
        del file[f"{PIPELINE}/BehavioralTimeSeries"]
    recording = allen.open_session(A, folder)
    assert recording.running is None and "no running speed" in recording.metadata["running_source"]


def test_bad_stimulus_table_is_left_out_with_its_reason(folder):
    with edit(folder) as file:
        group = file["stimulus/presentation/natural_movie_one_stimulus"]
        for name in ("data", "frame_duration"):
            rows = group[name][()][:-3]  # an incomplete repeat
            del group[name]
            group[name] = rows
    with pytest.warns(UserWarning, match="natural_movie_one is left out"):
        recording = allen.open_session(A, folder)
    assert "natural_movie_one" not in recording.stimulus_tables
    assert "natural_movie_one" in recording.metadata["skipped_stimuli"]
    assert recording.movies() == ["natural_movie_three"]
    assert (
        recording.epochs is None and "natural_movie_one cannot be used" in recording.metadata["epochs_source"]
    )


def test_rows_with_nan_times_do_not_pass(folder):
    with edit(folder) as file:
        group = file["stimulus/presentation/natural_movie_one_stimulus"]
        rows = group["frame_duration"][()].astype(float)
        rows[7] = np.nan
        del group["frame_duration"]
        group["frame_duration"] = rows
    with pytest.warns(UserWarning, match="natural_movie_one is left out"):
        recording = allen.open_session(A, folder)
    assert "rows outside" in recording.metadata["skipped_stimuli"]["natural_movie_one"]


def test_epochs_of_an_unknown_kind_of_session(folder):
    with edit(folder) as file:
        del file["general/session_type"]
        file["general/session_type"] = np.bytes_("three_session_X")
    recording = allen.open_session(A, folder)
    assert recording.epochs is None
    assert recording.metadata["epochs_source"].startswith(("none: NotImplementedError", "none: KeyError"))
    assert set(recording.movies()) == {"natural_movie_one", "natural_movie_three"}


def test_dead_cell_is_left_out(folder):
    with edit(folder) as file:
        file[f"{PIPELINE}/DfOverF/imaging_plane_1/data"][2] = np.nan
    whole = allen.open_session(A, folder)
    with pytest.warns(UserWarning, match="left out 1 cells"):
        recording = allen.open_session(A, folder, signal="dff")
    assert recording.n_neurons == whole.n_neurons - 1 == len(recording.roi_masks)
    assert recording.metadata["left_out_cells"] == [whole.neurons["cell_id"][2]]
    assert recording.neurons["cell_id"].tolist() == whole.neurons["cell_id"].drop(2).tolist()


def test_missing_demixed_traces(folder):
    with edit(folder) as file:
        del file[f"{PIPELINE}/Fluorescence/imaging_plane_1_demixed_signal"]
    for signal in ("demixed", "corrected_fluorescence"):
        with pytest.raises(MissingError, match=f"(?s)no {signal} traces.*another signal"):
            allen.open_session(A, folder, signal=signal)
    assert allen.open_session(A, folder, signal="dff").signal == "dff"


# --- content --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def recording(pristine):
    return allen.open_session(A, pristine)


def same(one, other, where):
    "Equal to the last bit, types included."
    assert type(one) is type(other), where
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key], f"{where}, {key}")
    else:
        assert one == other, where


def test_both_readers_give_the_same_bits(allensdk, pristine, tmp_path):
    """h5py reads an embedded session; with the marker gone, allensdk reads the same files as a real one."""
    plain = shutil.copytree(pristine, tmp_path / "plain")
    (plain / "cortexlit.json").unlink()
    for session in (A, B):
        for signal in allen.SIGNALS:
            ours, theirs = (allen.open_session(session, root, signal=signal) for root in (pristine, plain))
            assert (ours.source, theirs.source) == ("synthetic", "allen")
            for name in ("traces", "timestamps", "neurons", "stimulus_tables", "running", "pupil_area"):
                same(getattr(ours, name), getattr(theirs, name), name)
            for name in ("pupil_center", "epochs", "roi_masks", "max_projection", "name", "signal"):
                same(getattr(ours, name), getattr(theirs, name), name)
            same(dict(ours.templates), dict(theirs.templates), "templates")
            differ = {"epochs_source": ("cortexlit", "allensdk"), "synthetic": (True, False)}
            assert {key: (ours.metadata[key], theirs.metadata[key]) for key in differ} == differ
            same(ours.metadata, theirs.metadata | {k: v[0] for k, v in differ.items()}, "metadata")
    boc = allen.open_cache(pristine)
    for record in boc.get_ophys_experiments():
        row = allen.list_sessions(pristine).loc[record["id"]]
        assert (row["cre_line"], row["session_type"]) == (record["cre_line"], record["session_type"])
    sdk = allen._sdk()
    assert {kind: shown for kind, (_, shown) in allen._SESSIONS.items()}.items() <= sdk.stimuli.items()


def test_an_embedded_session_loads_no_allensdk(pristine, monkeypatch):
    monkeypatch.setattr(allen, "_sdk", lambda: pytest.fail("allensdk"))
    assert allen.open_session(A, pristine).templates["natural_movie_one"].any()
    assert list(allen.list_sessions(pristine).index) == [A, B]


def test_a_file_without_the_mark_is_refused_in_an_embedded_folder(embedded):
    with edit(embedded) as file:
        del file["identifier"]
        file["identifier"] = np.bytes_(f"{A}")  # as in a real file
    with pytest.raises(DataError, match=rf"(?s)identifier is '{A}', not the mark.*{A}\.nwb"):
        allen.open_session(A, embedded)


def test_agrees_with_allensdk(allensdk, pristine, recording):
    from allensdk.core.brain_observatory_nwb_data_set import BrainObservatoryNwbDataSet

    dataset = BrainObservatoryNwbDataSet(str(nwb(pristine)))
    for signal, read in allen.SIGNALS.items():
        if read:
            clock, traces = getattr(dataset, read)()
            got = allen.open_session(A, pristine, signal=signal)
            np.testing.assert_array_equal(got.traces, traces.astype(np.float32))
            np.testing.assert_array_equal(got.timestamps, clock)
    np.testing.assert_array_equal(recording.running, dataset.get_running_speed()[0])
    np.testing.assert_array_equal(recording.pupil_area, dataset.get_pupil_size()[1])
    np.testing.assert_array_equal(recording.pupil_center, dataset.get_pupil_location()[1])
    assert np.isnan(recording.running[[0, -1]]).all()
    pd.testing.assert_frame_equal(recording.epochs, dataset.get_stimulus_epoch_table())
    np.testing.assert_array_equal(recording.roi_masks, dataset.get_roi_mask_array())
    for name in recording.movies():
        table = recording.table(name)
        want = dataset.get_stimulus_table(name).sort_values(["repeat", "frame"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(table, want)
        n = table["frame"].nunique()
        assert (table["frame"].to_numpy().reshape(-1, n) == np.arange(n)).all()
        np.testing.assert_array_equal(recording.templates[name], dataset.get_stimulus_template(name))


def test_templates_do_not_fill_allensdks_store(allensdk, recording):
    from allensdk.core.brain_observatory_nwb_data_set import BrainObservatoryNwbDataSet

    before = BrainObservatoryNwbDataSet.get_stimulus_template.cache_size()
    one = recording.templates["natural_movie_one"]
    assert BrainObservatoryNwbDataSet.get_stimulus_template.cache_size() == before
    one[:] = 0
    assert recording.templates["natural_movie_one"].any()
    assert "spontaneous" not in recording.templates and recording.templates.get("spontaneous") is None
    with pytest.raises(KeyError, match="natural_movie_one"):
        recording.templates["spontaneous"]


def test_coordinates(pristine, recording):
    rows, columns = np.where(recording.roi_masks[0])
    scale = 400 / recording.roi_masks.shape[2]
    assert recording.neurons.loc[0, "x_um"] == pytest.approx(columns.mean() * scale)
    assert recording.neurons.loc[0, "y_um"] == pytest.approx(rows.mean() * scale)
    other = allen.open_session(A, pristine, coordinates="sensorium").neurons
    assert other.loc[0, "x_um"] == pytest.approx(-620 + 1.24 * columns.mean())
    assert other.loc[0, "y_um"] == pytest.approx(-1.24 * rows.mean())


def test_metadata_is_plain_json(recording):
    again = json.loads(json.dumps(recording.metadata))
    assert again["cre_line"] == "Rorb-IRES2-Cre" and again["labelled_cells"] == "excitatory, layer 4"
    assert again["session_id"] == A and isinstance(recording.metadata["session_id"], int)
    assert again["nwb_sha256"] and again["synthetic"] is True and recording.source == "synthetic"
    assert again["rate_hz"] == pytest.approx(recording.rate)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.005, 0.3), min_size=3, max_size=40),
    st.lists(st.booleans(), min_size=40, max_size=40),
    st.lists(st.floats(-1, 12), min_size=1, max_size=30),
)
def test_to_clock_is_exact_for_a_line_and_never_bridges_a_gap(steps, missing, clock):
    times, clock = np.cumsum(steps), np.sort(clock)
    values = np.where(missing[: len(times)], np.nan, 3 * times - 1)
    out = allen.to_clock(times, values, clock)
    known = np.isfinite(out)
    np.testing.assert_allclose(out[known], 3 * clock[known] - 1, atol=1e-9)
    for t, ok in zip(clock, known, strict=True):
        exact = values[times == t]
        left, right = values[times < t], values[times > t]
        if len(exact):
            want = np.isfinite(exact[0])
        else:
            want = len(left) and len(right) and np.isfinite([left[-1], right[0]]).all()
            want = want and times[times > t][0] - times[times < t][-1] <= 0.1
        assert ok == bool(want)


# --- the list -------------------------------------------------------------------------------------


def test_list_over_the_server_then_offline(server, tmp_path, monkeypatch):
    real = json.loads(json.dumps(server.experiments[0]))
    real |= {"id": 501729039, "fail_eye_tracking": True}  # a flag of the older tracking, to be overwritten
    failed = json.loads(json.dumps(real)) | {"id": 5, "experiment_container": {"failed": True}}
    foreign = json.loads(json.dumps(real)) | {"id": 6, "stimulus_name": "behavior_images"}
    server.experiments = [real, failed, foreign]
    server.eye_sessions = [610491688]
    table = allen.list_sessions(tmp_path, base_uri=server.uri)
    assert list(table.index) == [501729039] and table["eye_tracking"].tolist() == [True]
    assert (
        table["cells"].isna().all()
        and table["container_cells"].isna().all()
        and not table["downloaded"].any()
    )
    assert list(allen.list_sessions(tmp_path, base_uri=server.uri, include_failed=True).index) == [
        5,
        501729039,
    ]
    assert len(server.queries) == 2  # the list and the eye tracking, once each
    server.stop()
    offline = allen.list_sessions(tmp_path, base_uri=server.uri, eye_tracking=True)
    assert list(offline.index) == [501729039]
    (tmp_path / "eye_mapping_files.json").unlink()  # a cache filled by plain allensdk
    with pytest.warns(UserWarning, match="eye_tracking is left empty"):
        assert allen.list_sessions(tmp_path, base_uri=server.uri)["eye_tracking"].isna().all()
    with (
        pytest.warns(UserWarning),
        pytest.raises(MissingError, match="which sessions have eye tracking is not known"),
    ):
        allen.list_sessions(tmp_path, base_uri=server.uri, eye_tracking=True)


def test_list_of_a_synthetic_folder_is_offline_and_complete(embedded, monkeypatch):
    monkeypatch.setattr(allen.requests, "get", lambda *a, **k: pytest.fail("network"))
    table = allen.list_sessions(embedded)
    assert list(table.index) == [A, B] and table["eye_tracking"].tolist() == [True, False]
    assert table["cells"].tolist() == [8, 8] and table["downloaded"].all()
    assert list(allen.list_sessions(embedded, eye_tracking=True).index) == [A]
    assert len(allen.list_sessions(embedded, stimulus="natural_movie_three", eye_tracking=False)) == 0
    nwb(embedded, B).write_bytes(b"damaged")
    assert allen.list_sessions(embedded)["cells"].isna().tolist() == [False, True]
    with pytest.raises(MissingError, match=rf"(?s)expected: one of the sessions \[{A}, {B}\]"):
        allen.open_session(1, embedded)


def test_allensdks_own_calls_stay_offline_too(allensdk, pristine):
    with pytest.raises(MissingError, match="expected: one of the sessions"):
        allen.open_cache(pristine).get_ophys_experiment_data(1)


def test_the_default_address_is_encrypted(allensdk, tmp_path):
    assert allen.open_cache(tmp_path).api.api_url == "https://api.brain-map.org"


@pytest.mark.parametrize(
    "filters, allowed",
    [
        ({"area": "V1"}, r"VISp \(primary visual area, V1\)"),
        ({"cre_line": "Rorb-IRES-Cre"}, r"Rorb-IRES2-Cre \(excitatory, layer 4\)"),
        ({"depth_um": 1}, "expected: one of"),
        ({"stimulus": ["natural_scenes", "movie"]}, "natural_movie_one"),
        ({"session_type": "D"}, "three_session_A"),
    ],
)
def test_unknown_filter_values_list_the_allowed_ones(pristine, filters, allowed):
    with pytest.raises(MissingError, match=f"(?s){next(iter(filters))[:4]}.*{allowed}"):
        allen.list_sessions(pristine, **filters)


def test_manifest_names(pristine, embedded):
    assert len(allen.list_sessions(embedded / "manifest.json")) == 2
    (embedded / "manifest.json").rename(embedded / "brain_observatory_manifest.json")
    assert len(allen.list_sessions(embedded)) == 2 and not (embedded / "manifest.json").exists()


def test_damaged_list_names_the_file(embedded):
    (embedded / "ophys_experiments.json").write_text('[{"id": 1')
    with pytest.raises(DataError, match="(?s)not valid JSON.*ophys_experiments.json"):
        allen.list_sessions(embedded)
