"""A stand-in for the Allen API on the loopback: RMA queries in JSON, and well known files."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

FILES = {
    "NWBOphys": "ophys_experiment_data/{}.nwb",
    "ObservatoryEventsFile": "ophys_experiment_events/{}_events.npz",
}


class AllenServer:
    """Serves the sessions of a synthetic cache folder; faults are switched on by attributes.

    cuts          byte counts after which the next downloads break off
    ranges        honour Range requests; `shift`: bytes by which the answers are off
    etag, length  version sent with files (None: none), and whether Content-Length is sent
    body, status  sent instead of a file, and its status
    answer        sent instead of JSON
    ranges_asked  the Range header of each download so far; `queries`: the database queries
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.experiments = json.loads((self.folder / "ophys_experiments.json").read_text())
        self.eye_sessions: list[int] = []
        self.cuts: list[int] = []
        self.ranges, self.etag, self.length, self.shift = True, '"v1"', True, 0
        self.body: bytes | None = None
        self.answer: bytes | None = None
        self.status = 200
        self.queries: list[str] = []
        self.ranges_asked: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = unquote(self.path)
                outer.file(self, path) if path.startswith("/file/") else outer.query(self, path)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> AllenServer:
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def query(self, request: BaseHTTPRequestHandler, path: str) -> None:
        self.queries.append(path)
        kind = re.search(r"name\$eq(\w+)", path)
        wanted = re.search(r"attachable_id\$eq(\d+)", path)
        if "model::OphysExperiment" in path:
            rows = self.experiments
        elif kind and kind[1] == "EyeDlcScreenMapping":
            rows = [{"attachable_id": i, "attachable_type": "OphysSession"} for i in self.eye_sessions]
        elif kind and wanted and (self.folder / FILES[kind[1]].format(wanted[1])).exists():
            rows = [{"id": 1, "download_link": "/file/" + FILES[kind[1]].format(wanted[1])}]
        else:
            rows = []
        text = self.answer or json.dumps({"success": True, "num_rows": len(rows), "msg": rows}).encode()
        request.send_response(200)
        request.send_header("Content-Type", "text/html" if self.answer else "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        data = (
            self.body if self.body is not None else (self.folder / path.removeprefix("/file/")).read_bytes()
        )
        asked = request.headers["Range"]
        self.ranges_asked.append(asked)
        start = 0
        same_version = request.headers["If-Range"] in (None, self.etag)
        if asked and self.ranges and same_version:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= len(data) > 0 and start:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.end_headers()
            return
        request.send_response(206 if start else self.status)
        if start:
            start -= self.shift
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.etag:
            request.send_header("ETag", self.etag)
        if self.length:
            request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        request.wfile.write(data[start : None if cut is None else start + cut])
