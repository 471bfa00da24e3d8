"""Folds: every clip is tested once, nothing near it is trained on, and the pooled sheet is what a slow loop would make."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import FRAMES, tiny_model
from toys import toy_recording

from cortexlit.core import DataError, MissingError, SplitLeak, read_json
from cortexlit.data import folds as data_folds
from cortexlit.data.audit import openings
from cortexlit.data.clips import MouseDataset, build_dataset, load_tier
from cortexlit.data.folds import build_folds, fold_clips, fold_folders, fold_of, fold_tiers, pool, pooled_tier
from cortexlit.evaluation.baselines import behaviour_ridge, clip_baselines, score_dataset
from cortexlit.evaluation.intervals import score_interval
from cortexlit.metrics import flattened_correlation, mean_score
from cortexlit.models.adapters import Adapters
from cortexlit.training import features, folds
from cortexlit.training.folds import HEAD, SharedCore, fold_predictions, predict_fold
from cortexlit.training.heads import fresh_head, train_head
from cortexlit.training.trainer import predict

pytestmark = pytest.mark.usefixtures("no_curves")

LAST = 8
SMALL = {"clip_frames": FRAMES, "size": (10, 14), "gap": 5, "folds": 3}
QUICK = {"epochs": 1, "batch_size": 4}
LORA = {"adapt": "lora", "adapters": Adapters(2, "fused"), "lr": 0.01, "epochs": 1, "batch_size": 4}


def recording():
    "A toy recording whose neurons follow running, so that a ridge has something to predict."
    toy = toy_recording()
    drive = np.outer(1 + np.arange(toy.n_neurons), np.nan_to_num(toy.running, nan=5.0)) / 2
    return replace(toy, traces=(toy.traces + drive).astype("float32"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "Folds of a small session, and a core that sees the film alone."
    folder = tmp_path_factory.mktemp("folds")
    build_folds(recording(), folder / "data", **SMALL)
    tiny_model(core_state=False).save_core(folder / "core")
    return folder / "data", folder / "core"


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    "Heads of all folds with two seeds, made once: what was predicted, in which folder, and what it took."
    root, core = inputs
    place, passed = tmp_path_factory.mktemp("whole"), []
    frozen, before = features._frozen, opened(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CORTEXLIT_DATA", str(place / "data"))
        patch.setattr(
            features,
            "_frozen",
            lambda model, items, *a: passed.append(len(items)) or frozen(model, items, *a),
        )
        found = fold_predictions(root, out=place / "out", seeds=(0, 1), **options_of(core))
    return SimpleNamespace(
        found=found, place=place, out=place / "out", passed=passed, opened=opened(root) - before
    )


def options_of(core: Path) -> dict:
    return {"core": core, "last": LAST, "head": QUICK, "progress": False}


def opened(root: Path) -> int:
    return sum(len(openings(folder)) for folder in fold_folders(root))


@pytest.fixture(autouse=True)
def private(private_folders):
    "Heads and features of these tests are not those of the checkout."


# --- which clip is where


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 1200), min_size=1, max_size=5),
    st.integers(1, 60),
    st.integers(3, 8),
    st.integers(0, 40),
)
def test_every_clip_is_tested_once_and_nothing_near_it_trains(lengths, clip_frames, count, gap):
    movies = {f"m{k}": (frames, 3) for k, frames in enumerate(lengths)}
    try:
        clips = fold_clips(movies, clip_frames, count, gap)
    except DataError as error:
        assert "cannot be cut" in str(error)
        return
    assert not clips.duplicated(["movie", "start"]).any()
    assert set(clips["fold"]) == set(range(count))
    for movie, part in clips.groupby("movie"):
        assert part["start"].min() >= 0 and part["start"].max() + clip_frames <= movies[movie][0]
        assert (np.diff(part["start"]) >= clip_frames).all()
    longest = max(frames // clip_frames for frames, _ in movies.values())
    lost = sum(frames // clip_frames for frames, _ in movies.values()) - len(clips)
    assert 0 <= lost < longest
    where = clips["movie"].to_numpy(), clips["start"].to_numpy()
    same = where[0][:, None] == where[0][None]
    near = same & (np.abs(where[1][:, None] - where[1][None]) < clip_frames + gap)
    for fold in range(count):
        tiers = fold_tiers(clips, fold)
        assert ((tiers == "test") == (clips["fold"] == fold)).all() and set(tiers) == {
            "train",
            "validation",
            "test",
        }
        assert not (near & (tiers[:, None] != tiers[None])).any()


def test_the_session_of_the_study_loses_no_clip():
    clips = fold_clips({"natural_movie_one": (900, 10), "natural_movie_three": (3600, 10)})
    assert len(clips) == 31 and clips["fold"].value_counts().sort_index().tolist() == [7, 7, 7, 5, 5]


@pytest.mark.parametrize(
    "options", [{"folds": 2}, {"folds": 2.5}, {"gap": -1}, {"clip_frames": 0}, {"folds": 40}]
)
def test_impossible_folds_are_refused(options):
    with pytest.raises(DataError):
        fold_clips({"one": (900, 10)}, **options)


# --- what is written


def test_folds_on_disk(inputs):
    root = inputs[0]
    folders, table = fold_folders(root), pd.read_csv(root / "samples.csv")
    seen = []
    for k, folder in enumerate(folders):
        card, samples = read_json(folder / "card.json"), pd.read_csv(folder / "samples.csv")
        assert card["options"]["split"] == "folds" and card["options"]["fold"] == k
        assert all(row["gap"] is None or row["gap"] >= 5 for row in card["audit"])
        assert not any(row["shared_frames"] or row["same_clips"] for row in card["audit"])
        for _, part in samples.groupby("clip"):  # all repeats of a clip together
            assert part["tier"].nunique() == 1
        seen += samples[samples["tier"] == "test"]["sample"].tolist()
        assert (fold_of(root)[samples["tier"] == "test"] == k).all()
    assert sorted(seen) == table["sample"].tolist()
    assert len({(root / f / "videos.npy").stat().st_ino for f in "012"}) == 1  # one copy on disk


def test_statistics_are_those_of_the_training_tier_alone(inputs):
    for folder in fold_folders(inputs[0]):
        samples = pd.read_csv(folder / "samples.csv")
        raw = {k: np.load(folder / f"{k}.npy") for k in ("responses", "behavior", "pupil_center")}
        train = (samples["tier"] == "train").to_numpy()
        for name, array in raw.items():
            known = read_json(folder / "statistics.json")[name]
            part = array[train].astype(float).transpose(1, 0, 2).reshape(array.shape[1], -1)
            np.testing.assert_allclose(known["mean"], np.nanmean(part, 1), rtol=1e-5)
            np.testing.assert_allclose(known["std"], np.nanstd(part, 1), rtol=1e-5)
            np.testing.assert_allclose(known["max"], np.nanmax(part, 1), rtol=1e-6)


def test_held_out_responses_move_nothing_that_trains(inputs, tmp_path):
    "Responses of the test clips of fold 0 are replaced by noise: its training tier keeps every bit."
    toy, root = recording(), inputs[0]
    samples = pd.read_csv(root / "0" / "samples.csv")
    traces = np.array(toy.traces)
    for row in samples[samples["tier"] == "test"].itertuples():
        traces[:, row.first_frame : row.last_frame + 1] += 50 * (
            1 + np.arange(row.last_frame + 1 - row.first_frame)
        )
    other = build_folds(replace(toy, traces=traces), tmp_path / "other", **SMALL)
    for tier in ("train", "validation"):
        assert (load_tier(root / "0", tier).labels == load_tier(other / "0", tier).labels).all()
    assert not (load_tier(root / "1", "train").labels == load_tier(other / "1", "train").labels).all()


def test_an_8_bit_film_is_scaled_alike_in_all_folds_and_others_by_the_training_tier(inputs, tmp_path):
    films = [load_tier(folder, "train").videos for folder in fold_folders(inputs[0])]
    assert all((film == films[0]).all() for film in films) and 0 <= films[0].min() and films[0].max() <= 1
    toy = recording()
    grey = replace(toy, templates={k: v / 7.0 for k, v in toy.templates.items()})
    for folder in fold_folders(build_folds(grey, tmp_path / "grey", **SMALL)):
        samples, videos = pd.read_csv(folder / "samples.csv"), np.load(folder / "videos.npy")
        train = videos[samples[samples["tier"] == "train"]["clip"].unique()]
        known = read_json(folder / "statistics.json")["videos"]
        assert (known["min"], known["max"]) == pytest.approx((train.min(), train.max()))


def test_neurons_that_are_silent_in_one_training_tier_are_left_out_of_all(inputs, tmp_path):
    toy, samples = recording(), pd.read_csv(inputs[0] / "0" / "samples.csv")
    traces = np.array(toy.traces)
    kept = traces[1].copy()
    traces[1] = 3.0
    for row in samples[samples["tier"] == "test"].itertuples():  # answers in the test clips of fold 0 only
        traces[1, row.first_frame : row.last_frame + 1] = kept[row.first_frame : row.last_frame + 1]
    silent = replace(toy, traces=traces)
    with pytest.raises(DataError, match="never changes in the train tier"):
        build_folds(silent, tmp_path / "a", **SMALL)
    assert not (tmp_path / "a").exists()
    root = build_folds(silent, tmp_path / "b", constant_neurons="drop", **SMALL)
    assert {load_tier(f, "test").labels.shape[1] for f in fold_folders(root)} == {toy.n_neurons - 1}
    with pytest.raises(DataError, match="constant_neurons"):
        build_folds(toy, tmp_path / "c", constant_neurons="keep", **SMALL)


def test_a_film_that_returns_under_another_name_is_a_leak(tmp_path):
    toy = toy_recording({"one": (100, 3), "two": (100, 3)})
    twice = replace(toy, templates={"one": toy.templates["one"], "two": toy.templates["one"]})
    with pytest.raises(SplitLeak, match="share stimuli"):
        build_folds(twice, tmp_path / "leak", **SMALL)
    assert not (tmp_path / "leak").exists()


def test_damaged_or_other_folders_are_refused(inputs, tmp_path):
    plain = build_dataset(
        recording(), tmp_path / "plain", clip_frames=FRAMES, size=(10, 14), split="stimuli", gap=5
    )
    with pytest.raises(DataError, match="wrong kind"):
        fold_folders(plain)
    with pytest.raises(DataError, match="folds of one session"):
        MouseDataset(inputs[0], "train")
    with pytest.raises(MissingError):
        fold_folders(tmp_path / "nothing")
    root = build_folds(recording(), tmp_path / "data", **SMALL)
    with pytest.raises(DataError, match="exists already"):
        build_folds(recording(), root, **SMALL)
    (root / "samples.csv").write_text((root / "samples.csv").read_text().replace(",0\n", ",1\n", 1))
    with pytest.raises(DataError, match="differs from what the card recorded"):
        fold_of(root)
    build_folds(recording(), root, overwrite=True, **SMALL)
    (root / "1" / "card.json").write_text("{}")
    with pytest.raises(DataError, match="differs"):
        fold_folders(root)


def test_disks_without_hard_links_hold_copies(inputs, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not here")

    monkeypatch.setattr(data_folds.os, "link", no_links)
    root = build_folds(recording(), tmp_path / "data", **SMALL)
    assert (load_tier(root / "2", "test").labels == load_tier(inputs[0] / "2", "test").labels).all()


# --- pooled


def test_pooling_puts_every_sample_back(inputs):
    root, everything = inputs[0], pooled_tier(inputs[0])
    again = pool(root, [load_tier(folder, "test").labels for folder in fold_folders(root)])
    np.testing.assert_allclose(again, everything.labels, rtol=1e-5)
    with pytest.raises(DataError, match="one for each"):
        pool(root, [again])
    with pytest.raises(DataError, match="fold 0: predictions of shape"):
        pool(root, [again] * 3)


def test_the_pooled_sheet_is_that_of_the_slow_obvious_loop(inputs):
    root, everything = inputs[0], pooled_tier(inputs[0])
    sheet = score_dataset(root, last=LAST)
    single, flat = {}, {}
    for k, folder in enumerate(fold_folders(root)):
        train, validation, test = (load_tier(folder, t) for t in ("train", "validation", "test"))
        spread = np.float32(read_json(folder / "statistics.json")["responses"]["std"])
        predicted = behaviour_ridge(train, validation, test)[0] * spread[:, None]
        samples, raw = pd.read_csv(folder / "samples.csv"), np.load(folder / "responses.npy")
        tested = samples[samples["tier"] == "test"]["sample"].tolist()
        for i, row in enumerate(tested):
            pair = predicted[i, :, -LAST:].astype(float), raw[row, :, -LAST:].astype(float)
            single[row] = [np.corrcoef(p, y)[0, 1] for p, y in zip(*pair, strict=True)]
        for n in range(len(spread)):
            p, y = predicted[:, n, -LAST:].astype(float), raw[tested, n, -LAST:].astype(float)
            flat.setdefault(n, []).append((p - p.mean(), y - y.mean()))
        assert (fold_of(root)[tested] == k).all() and (fold_of(root) == k).sum() == len(tested)
    table = np.array([single[row] for row in range(len(single))])
    (row,) = [r for r in sheet.rows if (r.model, r.metric) == ("behaviour ridge", "single-trial correlation")]
    assert row.value == pytest.approx(mean_score(table), abs=1e-6)
    assert (row.low, row.high) == pytest.approx(score_interval(table, everything.clip), abs=1e-6)
    assert row.n_clips == len(np.unique(everything.clip)) and row.split == "folds"
    (row,) = [r for r in sheet.rows if (r.model, r.metric) == ("behaviour ridge", "flattened correlation")]
    slow = [
        np.corrcoef(*(np.concatenate([x.ravel() for x in side]) for side in zip(*parts, strict=True)))[0, 1]
        for parts in flat.values()
    ]
    assert row.value == pytest.approx(np.mean(slow), abs=1e-5)


def test_a_constant_in_each_fold_scores_zero_though_its_levels_lean_the_wrong_way(inputs):
    root, everything = inputs[0], pooled_tier(inputs[0])
    dull = clip_baselines(root)["train mean"]
    assert flattened_correlation(dull, everything.labels) < 0
    for row in score_dataset(root, last=LAST).rows:
        if row.model == "train mean" and row.metric != "FEVE" and not np.isnan(row.value):
            assert row.value == 0, row


def test_the_level_of_a_fold_moves_no_score_within_folds(inputs, tmp_path):
    "Responses of one fold are raised: ceilings and other repeats score as before."
    toy, root = recording(), inputs[0]
    samples = pd.read_csv(root / "0" / "samples.csv")
    traces = np.array(toy.traces, float)
    for row in samples[samples["tier"] == "test"].itertuples():
        traces[:, row.first_frame : row.last_frame + 1] += 64
    raised = build_folds(replace(toy, traces=traces), tmp_path / "raised", **SMALL)
    sheets = [
        score_dataset(r, last=LAST, baselines={"stimulus-blind mean": pooled_tier(r).labels})
        for r in (root, raised)
    ]
    for a, b in zip(*(sheet.rows for sheet in sheets), strict=True):
        if a.metric != "FEVE":
            assert (a.model, a.metric) == (b.model, b.metric)
            assert (a.value, a.ceiling) == pytest.approx((b.value, b.ceiling), abs=1e-4, nan_ok=True)


# --- trained


def test_the_core_runs_once_for_all_folds_tiers_and_seeds(inputs, whole):
    clips = pd.read_csv(inputs[0] / "samples.csv")["clip"].nunique()
    assert sum(whole.passed) == clips + 1  # the first once more, as a check of what is kept


def test_features_of_all_folds_are_those_of_the_fold(inputs):
    root, core = inputs
    for folder in fold_folders(root):
        model = fresh_head(folder, core)
        shared = SharedCore(model, root, LAST)
        for tier in ("train", "validation", "test"):
            data = MouseDataset(folder, tier)
            kept = shared(model, data)
            for i in range(len(data)):
                item = data[i]
                direct = model.encode(item["video"][None], last=LAST)[0]
                np.testing.assert_allclose(kept[i]["features"], direct.detach(), atol=2e-3)
                assert (kept[i]["labels"] == item["labels"]).all() and "video" not in kept[i]


def test_a_core_that_sees_behaviour_runs_for_each_fold(inputs, tmp_path):
    root = inputs[0]
    tiny_model().save_core(tmp_path / "core")
    model = fresh_head(root / "1", tmp_path / "core")
    shared = SharedCore(model, root, LAST)
    data = MouseDataset(root / "1", "train")
    item, state = data[0], ("behavior", "pupil_center")
    direct = model.encode(item["video"][None], *(item[name][None] for name in state), last=LAST)[0]
    np.testing.assert_allclose(shared(model, data)[0]["features"], direct.detach(), atol=2e-3)


def test_predictions_are_those_of_each_fold_by_itself(inputs, whole, monkeypatch):
    root, core = inputs
    monkeypatch.chdir(whole.place)  # where the heads of the folds lie
    found = fold_predictions(root, {HEAD: None, "small": LORA}, **options_of(core))
    assert set(found) == {(HEAD, 0), ("small", 0)}
    assert (found["small", 0] != found[HEAD, 0]).any()  # something was adapted
    parts = []
    for folder in fold_folders(root):
        done = train_head(folder, core, last=LAST, progress=False, **QUICK)
        parts.append(predict(done.model, MouseDataset(folder, "test"), LAST))
    alone = pool(root, parts)
    np.testing.assert_allclose(
        found[HEAD, 0], alone, rtol=0.05, atol=0.02 * alone.std()
    )  # features in 16 bits
    adapted = [predict_fold(folder, LORA, core, last=LAST, head=QUICK) for folder in fold_folders(root)]
    np.testing.assert_allclose(found["small", 0], pool(root, adapted), rtol=0.05, atol=0.02 * alone.std())
    sheet = score_dataset(root, last=LAST, models=found)
    assert {"small", HEAD} <= {row.model for row in sheet.rows}


def test_interrupted_and_resumed_is_the_same_to_the_bit(inputs, whole, tmp_path, monkeypatch):
    root, core = inputs
    options = options_of(core) | {"seeds": (0, 1)}
    before = opened(root)
    assert whole.opened == 6  # three folds, two seeds
    calls, honest = [], folds.predict_fold

    def dies(*args, **rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args, **rest)

    monkeypatch.setattr(folds, "predict_fold", dies)
    with pytest.raises(KeyboardInterrupt):
        fold_predictions(root, out=tmp_path / "parts", **options)
    assert len(list((tmp_path / "parts").glob("*.npy"))) == 2
    again = fold_predictions(root, out=tmp_path / "parts", **options)
    assert len(calls) == 3 + 4  # four of six were missing
    assert again.keys() == whole.found.keys() == {(HEAD, 0), (HEAD, 1)}
    assert all((again[key] == whole.found[key]).all() for key in again)
    fold_predictions(root, out=tmp_path / "parts", **options)
    assert len(calls) == 7 and opened(root) == before + 7  # what is kept is not opened again


def test_what_was_made_from_other_data_or_options_is_refused(inputs, whole, tmp_path, monkeypatch):
    root, core = inputs
    shutil.copytree(whole.out, tmp_path / "out")
    options = {"core": core, "last": LAST, "progress": False, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(folds, "predict_fold", None)  # the control: all is there
        found = fold_predictions(root, head=QUICK, **options)
    assert (found[HEAD, 0] == whole.found[HEAD, 0]).all()
    with pytest.raises(DataError, match="made from other head"):
        fold_predictions(root, head=QUICK | {"lr": 0.5}, **options)
    toy = recording()
    other = build_folds(replace(toy, traces=np.array(toy.traces) + 1), tmp_path / "other", **SMALL)
    with pytest.raises(DataError, match="the run in this folder has data"):
        fold_predictions(other, head=QUICK, **options)


def test_options_are_looked_at_before_anything_is_trained(inputs, monkeypatch):
    root, core = inputs
    monkeypatch.setattr(folds, "SharedCore", None)
    for wrong, message in (
        ({"seeds": ()}, "one or more"),
        ({"controls": ["nothing"]}, "random core"),
        ({"head": {"lr": -1}}, "lr"),
        ({"adapt": {"x": LORA | {"lr": -1}}}, "lr"),
        ({"adapt": {"x": LORA | {"adapters": Adapters(2, ("nowhere",))}}}, "nowhere"),
        ({"adapt": {"x": {"lr": 0.1}}}, "nothing is adapted"),
    ):
        with pytest.raises(DataError, match=message):
            fold_predictions(root, **({"core": core, "last": LAST, "progress": False} | wrong))
