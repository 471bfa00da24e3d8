"""`cortexlit scenes` as a job script uses it."""

import json
import sys

import numpy as np
import pytest

from cortexlit import cli
from cortexlit.data.exchange import import_arrays

pytestmark = pytest.mark.usefixtures("no_curves")


def run(capsys, monkeypatch, *words) -> tuple[int, dict | list]:
    "Exit code and the JSON document of `cortexlit scenes WORDS --json`."
    monkeypatch.setattr(sys, "argv", ["cortexlit", "scenes", *map(str, words), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    return int(end.value.code or 0), json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path, tiny_cache, capsys, monkeypatch):
    words = ["build", "900000002", "--cache", tiny_cache, "--signal", "events", "--out", tmp_path / "scenes"]
    words += ["--constant-neurons", "drop"]  # the tiny session is short
    code, found = run(capsys, monkeypatch, *words)
    assert code == 0 and found["signal"] == "events" and found["options"]["split"] == "images", found
    return tmp_path / "scenes"


def test_from_a_folder_to_scores(tmp_path, capsys, monkeypatch):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(40, 36, 64)).cumsum(2)
    image = np.repeat(np.arange(40), 3)
    responses = np.exp(images[image, 10:20, 20:50:10].mean(1) / 5) + draw.normal(size=(120, 3))
    folder = import_arrays(
        images, responses, tmp_path / "data", coordinates=[[0, 0], [100, 0], [200, 5]], image_id=image
    )
    words = ["fit", folder, "--session", "4", "--out", tmp_path / "run"]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 0 and found["folder"] == str(tmp_path / "run"), found
    assert run(capsys, monkeypatch, *words)[1] == found  # read back
    code, rows = run(
        capsys, monkeypatch, "score", folder, "--run", tmp_path / "run", "--out", tmp_path / "scores"
    )
    assert code == 0 and {"pixel ridge", "V1T run"} <= {r["model"] for r in rows}
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["rows"] == rows
    words = ["fit", folder, "--model", "conv", "--epochs", "1", "--out", tmp_path / "other"]
    assert run(capsys, monkeypatch, *words)[0] == 0
    code, rows = run(capsys, monkeypatch, "score", folder, "--run", tmp_path / "other")
    assert code == 0 and "V1T (conv, factorised) other" in {r["model"] for r in rows}


def test_a_search_goes_on_and_its_best_run_is_scored(folder, tmp_path, capsys, monkeypatch):
    words = [
        "tune",
        folder,
        "--model",
        "conv",
        "--set",
        "lr=1e-3,1e-2",
        "--epochs",
        "1",
        "--sampler",
        "random",
    ]
    code, found = run(capsys, monkeypatch, *words, "--trials", "1", "--out", tmp_path / "search")
    assert code == 0 and found["best"]["lr"] in (1e-3, 1e-2) and len(found["trials"]) == 1, found
    code, more = run(capsys, monkeypatch, *words, "--trials", "2", "--out", tmp_path / "search")
    assert code == 0 and more["trials"][0] == found["trials"][0] and len(more["trials"]) == 2
    assert more["validation_correlation"] == max(t["validation"] for t in more["trials"])
    assert run(capsys, monkeypatch, "score", folder, "--run", more["best_runs"][0])[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune", "FOLDER", "--set", "lr=1,2", "--model", "cnn"], "v1t or conv"),
        (["tune", "FOLDER", "--set", "foo=1,2"], "no option 'foo'"),
        (["fit", "FOLDER", "--session", "7"], "1 to 6"),
        (["fit", "FOLDER", "--session", "1"], "(144, 256)"),
        (["fit", "FOLDER", "--session", "4", "--scale", "big"], "demo, paper"),
        (["fit", "FOLDER", "--scale", "demo"], "without --session"),
        (["fit", "FOLDER", "--model", "cnn"], "v1t or conv"),
        (["fit", "FOLDER", "--model", "conv", "--session", "4"], "v1t, which the sessions are of"),
        (["fit", "FOLDER", "--lr", "-1"], "lr"),
        (["score", "FOLDER", "--run", "FOLDER"], "no finished run"),
        (["build", "park_230809", "--out", "x"], "Allen session id"),
    ],
)
def test_what_cannot_be_is_refused(folder, capsys, monkeypatch, words, told):
    code, found = run(capsys, monkeypatch, *[str(folder) if w == "FOLDER" else w for w in words])
    assert code == 1 and told in found["error"], found
