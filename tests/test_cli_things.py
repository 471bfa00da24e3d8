"""`cortexlit things` as a job script uses it."""

import json
import math
import shutil
import sys

import numpy as np
import pytest

from cortexlit import cli
from cortexlit.core import DataError, MissingError, read_json
from cortexlit.data.audit import openings, sample_marks
from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.splits import split_by_concept
from cortexlit.data.things import load_properties, open_things
from cortexlit.evaluation.decoding import score_subject
from cortexlit.evaluation.scores import ScoreSheet
from cortexlit.simulate.subject import write_things
from cortexlit.training.decoders import decoding_tiers

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_things(tmp_path_factory.mktemp("things") / "study", "tiny")


@pytest.fixture(scope="module")
def cache(study, tmp_path_factory):
    "The subject as `things build` leaves it, made once for all tests: read it, never write."
    return build_things(open_things(study / "figshare"), tmp_path_factory.mktemp("cache") / "figshare")


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
def test_a_trained_decoder_joins_the_sheet(study, cache, tmp_path, capsys, monkeypatch, model):
    common = [cache, "--ratings", study / "ratings", "--folds", "3"]
    words = ["fit", *common, "--out", tmp_path / "net", "--model", model, "--epochs", "1", "--layers", "1"]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 0 and [row["fold"] for row in found["folds"]] == [0, 1, 2], found
    assert run(capsys, monkeypatch, *words)[1] == found  # read back
    score = ["score", *common, "--permutations", "0", "--run", tmp_path / "net"]
    code, rows = run(capsys, monkeypatch, *score)
    assert code == 0 and "net" in {r["model"] for r in rows}
    assert {r["split_hash"] for r in rows} == {found["split_hash"]}
    code, refused = run(capsys, monkeypatch, *score, "--seed", "1")
    assert code == 1 and "trained with the split" in refused["error"]
    if model == "patches":  # subject 02 saw the same trials, so split and ratings are the same
        other = build_things(open_things(study / "figshare", "02"), tmp_path / "other")
        code, refused = run(capsys, monkeypatch, "score", other, *score[2:])
        assert code == 1 and "trained on other responses" in refused["error"]


def test_a_search_stays_within_its_fold(study, cache, tmp_path, capsys, monkeypatch):
    words = [
        "tune",
        cache,
        "--ratings",
        study / "ratings",
        "--folds",
        "3",
        "--set",
        "layers=1,2",
        "--epochs",
        "1",
    ]
    code, found = run(
        capsys, monkeypatch, *words, "--trials", "2", "--fold", "1", "--out", tmp_path / "search"
    )
    assert code == 0 and found["best"]["layers"] in (1, 2) and len(found["trials"]) == 2, found
    assert read_json(tmp_path / "search" / "best.json")["fit"]["loss"] == "mse"
    data = ThingsDataset(cache, load_properties(study / "ratings"), "visual")
    seen, split = read_json(tmp_path / "search" / "marks.json"), split_by_concept(data.trials, 3, 0)
    train, validation, test = decoding_tiers(data, split, 1)
    assert not set(sample_marks(test)) & set(seen)
    assert set(sample_marks(train)) | set(sample_marks(validation)) == set(seen)
    more = [*words, "--model", "study", "--trials", "1", "--out", tmp_path / "study"]
    assert run(capsys, monkeypatch, *more)[0] == 0  # by the loss of the study, as `fit` trains it
    assert read_json(tmp_path / "study" / "best.json")["fit"]["loss"] == "huber"
    for wrong, told in ((["--fold", "3"], "0 to 2"), (["--set", "depth=1,2"], "layers, noise, mixing")):
        code, refused = run(capsys, monkeypatch, *words, *wrong, "--out", tmp_path / "other")
        assert code == 1 and told in refused["error"], refused


def test_a_synthetic_subject_says_where_its_ratings_lie(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, found = run(capsys, monkeypatch, "build", "--embedded", "tiny", "--out", "cache")
    assert code == 0 and (found["subject"], found["layout"], found["trials"]) == ("01", "figshare", 96)
    assert (tmp_path / found["ratings"]).is_dir()
    code, rows = run(
        capsys, monkeypatch, "score", "cache", "--ratings", found["ratings"], "--permutations", "0"
    )
    assert code == 0 and len({r["model"] for r in rows}) == 4
    code, found = run(
        capsys, monkeypatch, "build", "--embedded", "tiny", "--layout", "volumes", "--out", "other"
    )
    assert code == 0 and found["layout"] == "volumes"


def test_banded_ridge_is_early_visual_cortex_against_the_rest(study, cache, tmp_path, capsys, monkeypatch):
    words = ["score", cache, "--ratings", study / "ratings", "--permutations", "0"]
    code, rows = run(capsys, monkeypatch, *words, "--bands", "early")
    data = ThingsDataset(cache, load_properties(study / "ratings"), "visual")
    early = data.rois[["V1", "V2", "V3"]].any(axis=1).to_numpy()
    x, split = data.responses.astype(float), split_by_concept(data.trials)
    sheet = score_subject(
        x, data.labels.astype(float), data.trials["concept"].to_numpy(), split, data.properties,
        bands={"early": x[:, early], "rest": x[:, ~early]}, permutations=0, dataset="d", root=None,
    )  # fmt: skip
    expected = [r.value for r in sheet.rows if r.model == "banded ridge" and not math.isnan(r.value)]
    found = [r["value"] for r in rows if r["model"] == "banded ridge" and r["value"] is not None]
    assert code == 0 and len(found) == 30 and np.allclose(found, expected)


def test_opening_the_test_of_a_subject_is_counted_by_split(study, cache, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(cache, tmp_path / "02", ignore=shutil.ignore_patterns(".test-openings.json"))
    words = ["score", folder, "--ratings", study / "ratings", "--permutations", "0", "--folds", "3"]
    for seed in (0, 0, 1):
        out = tmp_path / f"scores-{seed}"
        assert run(capsys, monkeypatch, *words, "--seed", str(seed), "--out", out)[0] == 0
    assert list(ScoreSheet.load(tmp_path / "scores-0").opened.values()) == [2]
    assert list(ScoreSheet.load(tmp_path / "scores-1").opened.values()) == [1]
    assert openings(folder)[["by", "function"]].to_numpy().tolist() == [["baselines", "score_subject"]] * 3


def test_a_subject_that_is_scored_without_the_command_is_counted_too(study, cache, tmp_path):
    folder = shutil.copytree(cache, tmp_path / "02", ignore=shutil.ignore_patterns(".test-openings.json"))
    data = ThingsDataset(folder, load_properties(study / "ratings"), "visual")
    split, labels = split_by_concept(data.trials, 3), data.labels.astype(float)
    given = data.responses.astype(float), labels, data.trials["concept"].to_numpy(), split, data.properties
    sheets = [
        score_subject(*given, p, permutations=0, dataset="d", root=root)
        for p, root in (({("net", 1): labels}, folder), (None, None), (None, folder))
    ]
    assert [sheet.opened for sheet in sheets] == [{"d": 1}, {}, {"d": 2}]
    found = openings(folder)
    assert found["by"].tolist() == ["net (seed 1)", "baselines"] and set(found["split_hash"]) == {split.hash}
    with pytest.raises(MissingError, match="card.json"):  # at once, and not after the work
        score_subject(*given, permutations=0, dataset="d", root=tmp_path / "elsewhere")


def test_ratings_of_ones_choice(study, cache, tmp_path, capsys, monkeypatch):
    common = [cache, "--ratings", study / "ratings", "--folds", "3"]
    two, turned = (
        [w for p in ps for w in ("--properties", p)] for ps in (("lives", "size"), ("size", "lives"))
    )
    words = ["fit", *common, "--out", tmp_path / "net", "--epochs", "1", *two]
    assert run(capsys, monkeypatch, *words)[0] == 0
    assert np.load(tmp_path / "net" / "predictions.npy").shape == (96, 2)
    score = ["score", *common, "--permutations", "0", "--run", tmp_path / "net"]
    code, rows = run(capsys, monkeypatch, *score, *two)
    found = {r["metric"] for r in rows if r["model"] == "net" and "component" not in r["metric"]}
    assert code == 0 and found == {"R2 mean", "r mean", "R2 lives", "R2 size"}
    code, refused = run(capsys, monkeypatch, *score, *turned)  # same shape, other meaning
    assert (
        code == 1 and "trained with other ratings" in refused["error"] and "size, lives" in refused["error"]
    )


def test_one_rating_is_enough(study, cache, tmp_path, capsys, monkeypatch):
    words = ["score", cache, "--ratings", study / "ratings", "--properties", "heavy"]
    code, rows = run(capsys, monkeypatch, *words, "--permutations", "2")
    assert code == 0
    assert {r["metric"] for r in rows} == {"R2 mean", "r mean", "R2 heavy", "R2 component 1"}


@pytest.mark.parametrize(
    ("model", "words", "depth", "patience"),
    [
        ("study", [], 6, 5),
        ("study", ["--layers", "3", "--patience", "2"], 3, 2),
        ("parcels", [], 1, 5),
        ("parcels", ["--layers", "2"], 2, 5),
    ],
)
def test_layers_and_patience(study, cache, tmp_path, capsys, monkeypatch, model, words, depth, patience):
    seen = {}

    def fit_folds(build, data, split, out, **options):
        seen.update(options, depth=build().config.depth)
        raise DataError("enough seen")

    monkeypatch.setattr("cortexlit.training.decoders.fit_folds", fit_folds)
    common = [cache, "--ratings", study / "ratings", "--out", tmp_path / "net", "--model", model]
    _, found = run(capsys, monkeypatch, "fit", *common, *words)
    assert found["error"] == "enough seen" and (seen["depth"], seen["patience"]) == (depth, patience)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--augment", "vea"], "augmentation 'vea', perhaps vae"),
        (["--augment", "flow"], "augmentation 'flow', which the study does not find worth having"),
        (["--augment", "noise"], "augmentation 'noise', which the study does not find worth having"),
        (["--augment", "vae", "--ratio", "-1"], "ratio=-1.0"),
        (["--augment", "vae", "--model", "study"], "--augment with --model study"),
    ],
)
def test_made_trials_that_cannot_be_are_refused(study, cache, tmp_path, capsys, monkeypatch, words, error):
    common = [cache, "--ratings", study / "ratings", "--out", tmp_path / "net"]
    code, found = run(capsys, monkeypatch, "fit", *common, *words)
    assert code == 1 and found["error"].startswith(error) and not (tmp_path / "net").exists()
    if "study does not" in error:
        assert (
            "one of none, normal, vae, gan" in found["error"] and "13b_augmentation.ipynb" in found["error"]
        )


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], None),
        (["--augment", "normal"], ("normal", 1.0)),
        (["--augment", "vae"], ("vae", 1.0)),
        (["--augment", "gan", "--ratio", "0.5"], ("gan", 0.5)),
    ],
)
def test_made_trials_are_asked_for_by_name(study, cache, tmp_path, capsys, monkeypatch, words, asked):
    seen = {}

    def fit_folds(build, data, split, out, **options):
        seen.update(options)
        raise DataError("enough seen")

    monkeypatch.setattr("cortexlit.training.decoders.fit_folds", fit_folds)
    run(capsys, monkeypatch, "fit", cache, "--ratings", study / "ratings", "--out", tmp_path / "net", *words)
    assert ((seen["augment"], seen["ratio"]) if "augment" in seen else None) == asked


def test_the_demonstration_trains_as_fit_does_by_default(study, tmp_path, capsys, monkeypatch):
    seen = []

    def fit_folds(build, data, split, out=None, **options):
        seen.append((build().config.to_dict(), {"seed": 0, "loss": "mse"} | options))
        raise DataError("enough seen")

    monkeypatch.setattr("cortexlit.training.decoders.fit_folds", fit_folds)
    monkeypatch.setattr("cortexlit.simulate.subject.embedded_things", lambda size: study)
    with pytest.raises(DataError, match="enough seen"):
        cli._demo_fmri(tmp_path)
    words = [tmp_path / "datasets" / "things", "--ratings", study / "ratings", "--out", tmp_path / "net"]
    assert run(capsys, monkeypatch, "fit", *words)[1] == {"error": "enough seen"}
    assert seen[0] == seen[1]


def test_the_printed_sheet_has_notes(study, cache, tmp_path, capsys, monkeypatch):
    words = ["score", cache, "--ratings", study / "ratings", "--permutations", "3"]
    monkeypatch.setattr(sys, "argv", ["cortexlit", "things", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    told = " ".join(capsys.readouterr().out.split())
    assert "(3 permutations)" in told and "strongest penalty of the grid chosen" in told


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
        (["build", "--out", "OUT/c"], "neither a folder nor --embedded"),
        (["build", "STUDY/figshare", "--embedded", "tiny", "--out", "OUT/c"], "a folder and --embedded"),
        (["build", "--embedded", "large", "--out", "OUT/c"], "size 'large'"),
        (
            ["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--run", "OUT/nofolder"],
            "expected: a folder made by `cortexlit things fit`",
        ),
        (
            ["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--run", "OUT/figshare"],
            "expected: a folder made by `cortexlit things fit`",
        ),
        (
            ["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--properties", "alive"],
            "unknown property 'alive'; meant lives",
        ),
        (
            ["fit", "OUT/figshare", "--ratings", "STUDY/ratings", "--out", "OUT/n", "--properties", "alive"],
            "unknown property 'alive'; meant lives",
        ),
        (["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--bands", "V9"], "no ROI 'V9'"),
        (
            ["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--rois", "V1", "--bands", "early"],
            "--bands early: 31 of the 31 voxels of --rois",
        ),
        (
            ["score", "OUT/figshare", "--ratings", "STUDY/ratings", "--rois", "V1", "--bands", "FFA"],
            "--bands FFA: 0 of the 31 voxels of --rois",
        ),
        (
            ["fit", "OUT/figshare", "--ratings", "STUDY/ratings", "--out", "OUT/n", "--layers", "0"],
            "depth=0",
        ),
        (
            ["fit", "OUT/figshare", "--ratings", "STUDY/ratings", "--out", "OUT/n", "--patience", "0"],
            "patience=0",
        ),
    ],
)
def test_what_cannot_be_is_refused(study, cache, tmp_path, capsys, monkeypatch, words, told):
    places = {"OUT/figshare": cache, "STUDY": study, "OUT": tmp_path}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 1 and told in found["error"]
