"""`cortexlit things` as a job script uses it."""

import json
import sys

import numpy as np
import pytest

from cortexlit import cli
from cortexlit.data.things import write_things


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_things(tmp_path_factory.mktemp("things") / "study", "tiny")


def run(capsys, monkeypatch, *words: str) -> tuple[int, dict | list]:
    "Exit code and the JSON document of `cortexlit things WORDS --json`."
    monkeypatch.setattr(sys, "argv", ["cortexlit", "things", *map(str, words), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    return int(end.value.code or 0), json.loads(capsys.readouterr().out)


def test_from_a_folder_to_scores(study, tmp_path, capsys, monkeypatch):
    caches = {}
    for layout in ("figshare", "openneuro", "volumes"):
        code, found = run(capsys, monkeypatch, "build", study / layout, "--out", tmp_path / layout)
        assert code == 0 and (found["layout"], found["subject"], found["trials"]) == (layout, "01", 96)
        caches[layout] = np.load(tmp_path / layout / "responses.npy")
    assert np.allclose(caches["figshare"], caches["openneuro"], atol=1e-4)
    words = [
        "score",
        tmp_path / "figshare",
        "--ratings",
        study / "ratings",
        "--permutations",
        "3",
        "--folds",
        "3",
    ]
    code, rows = run(capsys, monkeypatch, *words, "--out", tmp_path / "scores")
    assert code == 0 and {r["model"] for r in rows} == {"mean", "median", "Huber constant", "ridge"}
    assert (tmp_path / "scores" / "scores.json").is_file()
    assert run(capsys, monkeypatch, *words)[1] == rows


@pytest.mark.parametrize("model", ["parcels", "patches", "study"])
def test_a_trained_decoder_joins_the_sheet(study, tmp_path, capsys, monkeypatch, model):
    run(capsys, monkeypatch, "build", study / "figshare", "--out", tmp_path / "cache")
    common = [tmp_path / "cache", "--ratings", study / "ratings", "--folds", "3"]
    words = ["fit", *common, "--out", tmp_path / "net", "--model", model, "--epochs", "1"]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 0 and [row["fold"] for row in found["folds"]] == [0, 1, 2], found
    assert run(capsys, monkeypatch, *words)[1] == found  # read back
    score = ["score", *common, "--permutations", "0", "--run", tmp_path / "net"]
    code, rows = run(capsys, monkeypatch, *score)
    assert code == 0 and "net" in {r["model"] for r in rows}
    assert {r["split_hash"] for r in rows} == {found["split_hash"]}
    code, refused = run(capsys, monkeypatch, *score, "--seed", "1")
    assert code == 1 and "trained with the split" in refused["error"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["build", "STUDY/figshare", "--out", "OUT/c", "--subject", "09"], "subject 09"),
        (["build", "STUDY/ratings", "--out", "OUT/c"], "no THINGS-fMRI data"),
        (["score", "OUT/nothing", "--ratings", "STUDY/ratings"], "nothing"),
        (["score", "OUT/figshare", "--ratings", "STUDY/figshare"], "no property ratings"),
        (["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--rois", "V9"], "no ROI 'V9'"),
        (["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--folds", "1"], "1 folds"),
        (
            ["fit", "OUT/figshare", "--ratings", "STUDY/ratings", "--out", "OUT/n", "--model", "cnn"],
            "parcels, patches, study",
        ),
        (["build", "STUDY/figshare", "--out", "OUT/figshare"], "exists already"),
    ],
)
def test_what_cannot_be_is_refused(study, tmp_path, capsys, monkeypatch, words, told):
    run(capsys, monkeypatch, "build", study / "figshare", "--out", tmp_path / "figshare")
    words = [w.replace("STUDY", str(study)).replace("OUT", str(tmp_path)) for w in words]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 1 and told in found["error"]
