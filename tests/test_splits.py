"One split for clips, pictures, folds and fMRI: tiers in folds, what they share, and what a folder says of itself."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_recording

from cortexlit.core import DataError, MissingError, SplitLeak, read_json
from cortexlit.data.audit import audit_units
from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.clips import build_dataset
from cortexlit.data.exchange import import_arrays
from cortexlit.data.folds import build_folds, fold_folders
from cortexlit.data.splits import Split, split_by_concept, split_by_session, split_of
from cortexlit.data.things import open_things
from cortexlit.simulate.subject import write_things

SMALL = {"clip_frames": 26, "size": (10, 14), "gap": 5}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    "The tiny synthetic subject."
    return open_things(write_things(tmp_path_factory.mktemp("fmri") / "s", "tiny"), "01", "figshare")


@given(st.lists(st.integers(0, 5), min_size=6, max_size=40), st.integers(2, 4), st.integers(0, 3))
def test_a_concept_is_tested_in_one_fold_and_in_all_of_it(concept, folds, seed):
    names = np.array([f"c{k}" for k in concept])
    if len(set(names)) < folds:
        return
    trials = pd.DataFrame({"image": [f"{c}_{i}" for i, c in enumerate(names)], "concept": names})
    split = split_by_concept(trials, folds, seed)
    assert split.tier.shape == (folds, len(trials)) and ((split.tier == "test").sum(0) == 1).all()
    for k, (train, test) in enumerate(split):
        assert not set(names[train]) & set(names[test]) and np.array_equal(
            np.flatnonzero(split.fold == k), test
        )
        assert len(train) + len(test) == len(trials)


def test_hash_says_which_samples_are_where_and_nothing_else(subject):
    trials = subject.index.stimuli
    split = split_by_concept(trials, 4, seed=2)
    order = np.random.default_rng(0).permutation(len(trials))
    assert split.take(order).hash == split.hash
    assert split.take(order[1:]).hash != split.hash
    assert split_by_concept(trials, 4, seed=3).hash != split.hash
    moved = split.tier.copy()
    moved[:, [0, 1]] = "validation"
    assert Split("concept", moved, trials).hash != split.hash


def test_saved_and_loaded_with_validation_and_of_the_first_format(subject, tmp_path):
    trials = subject.index.stimuli
    split = split_by_session(trials)
    tier = np.where(
        split.tier == "train", np.where(np.arange(len(trials)) % 7, "train", "validation"), split.tier
    )
    whole = Split("session", tier, trials)
    again = Split.load(whole.save(tmp_path / "split.json"))
    assert again.hash == whole.hash and np.array_equal(again.tier, whole.tier)
    columns = ("session", "run", "trial", "image", "concept")
    old = {"format": 1, "kind": "session", "seed": None, "hash": split.hash, "fold": split.fold.tolist()}
    path = tmp_path / "old.json"
    pd.Series(old | {k: trials[k].to_list() for k in columns}).to_json(path)
    assert np.array_equal(Split.load(path).tier, split.tier)


def test_what_is_no_split_is_refused(subject):
    trials = subject.index.stimuli
    with pytest.raises(DataError, match="tier has shape"):
        Split("concept", np.full(3, "train"), trials)
    with pytest.raises(DataError, match="no tier 'dev'"):
        Split("concept", np.full((1, len(trials)), "dev"), trials)
    with pytest.raises(DataError, match="one tier only"):
        Split("concept", np.full((1, len(trials)), "train"), trials).audit()
    with pytest.raises(DataError, match="no unit 'clip'"):
        audit_units(trials, np.arange(3), np.arange(3, 6), forbid=("clip",))


def test_the_validation_tier_is_audited_too(subject):
    trials = subject.index.stimuli
    split = split_by_concept(trials, 4)
    tier = split.tier.copy()
    row = int(np.flatnonzero(tier[0] == "train")[0])
    tier[0, row] = "validation"
    with pytest.raises(SplitLeak, match="train and validation share 1 concepts: .* of the validation trials"):
        Split("concept", tier, trials).audit()


@pytest.mark.parametrize("kind", ["repeats", "stimuli"])
def test_clips_say_their_split(kind, tmp_path):
    root = build_dataset(toy_recording(), tmp_path / "clips", split=kind, **SMALL)
    split, card = split_of(root), read_json(root / "card.json")
    assert split.kind == kind and split.hash == card["split_hash"]
    for tier in ("train", "validation", "test"):
        assert (split.tier == tier).sum() == card["counts"][f"samples in {tier}"]
    if kind == "stimuli":
        assert (split.audit().query("what == 'clip'")["shared"] == 0).all()
    else:
        with pytest.raises(SplitLeak, match="clips"):
            split.audit(forbid=["clip"])


def test_folds_and_pictures_say_theirs(tmp_path):
    root = build_folds(toy_recording(), tmp_path / "folds", folds=3, clip_frames=26, gap=5, size=(10, 14))
    split = split_of(root)
    assert split.tier.shape[0] == 3 == len(fold_folders(root)) and (split.fold >= 0).all()
    split.audit()
    table = fold_folders(root)[1] / "samples.csv"
    table.write_text(table.read_text().replace("test", "train", 1))
    with pytest.raises(DataError, match="differs from what the card recorded"):
        split_of(root)
    draw = np.random.default_rng(0)
    scenes = import_arrays(draw.random((30, 8, 8)), draw.random((30, 5)), tmp_path / "scenes")
    assert (
        split_of(scenes).kind == "images"
        and (split_of(scenes).audit().query("what == 'image'")["shared"] == 0).all()
    )


def test_a_subject_keeps_the_split_it_was_built_with(subject, tmp_path):
    trials = subject.index.stimuli
    split = split_by_session(trials)
    root = build_things(subject, tmp_path / "kept", split=split)
    assert split_of(root).hash == split.hash == read_json(root / "card.json")["split_hash"]
    data = ThingsDataset(root, role="train")
    assert np.array_equal(data.split.fold, split.fold[(trials["role"] == "train").to_numpy()])
    (root / "split.json").write_text((root / "split.json").read_text().replace("test", "train", 1))
    with pytest.raises(DataError, match="split.json"):
        ThingsDataset(root)
    bare = build_things(subject, tmp_path / "bare")
    assert ThingsDataset(bare).split is None
    with pytest.raises(MissingError, match="cached without a split"):
        split_of(bare)
    other = split_by_session(trials.assign(image=trials["image"].to_numpy()[::-1]))
    with pytest.raises((DataError, SplitLeak)):
        build_things(subject, tmp_path / "other", split=other)
    late = split_by_session(trials.assign(trial=trials["trial"] + 1))
    with pytest.raises(DataError, match="a split of other trials"):
        build_things(subject, tmp_path / "other", split=late)
    assert not (tmp_path / "other").exists()


def test_a_folder_is_audited_by_frames_and_content_as_well(tmp_path):
    root = build_dataset(toy_recording(), tmp_path / "clips", split="stimuli", **SMALL)
    report = split_of(root).audit().set_index(["tiers", "what"])["shared"]
    assert (
        {"clip", "movie", "frame", "two-photon frame", "content"}
        >= set(report["train, test"].index)
        > {"frame", "content"}
    )
    assert (report["train, test"][["clip", "frame", "content"]] == 0).all()
    split = split_of(root)
    tier = split.tier.copy()
    first = int(np.flatnonzero(tier[0] == "train")[0])
    moved = split.samples.copy()
    moved.loc[tier[0] == "test", ["movie", "start"]] = [moved["movie"][first], moved["start"][first] + 1]
    with pytest.raises(SplitLeak, match="frames"):
        Split(split.kind, tier, moved, root=root).audit()


@pytest.mark.parametrize("clip_frames", [1, 7])
@pytest.mark.parametrize("seed", range(3))
def test_shared_frames_are_those_of_sets(seed, clip_frames):
    g = np.random.default_rng(seed)
    table = pd.DataFrame({"movie": g.choice(["a", "b"], 30), "start": g.integers(0, 60, 30)})
    table["first_frame"] = g.integers(0, 200, 30)
    table["last_frame"] = table["first_frame"] + g.integers(0, 9, 30)
    train, test = np.arange(20), np.arange(20, 30)
    report = audit_units(table, train, test, (), clip_frames=clip_frames).set_index("what")
    own = {"frame": lambda r: {(r.movie, r.start + k) for k in range(clip_frames)},
           "two-photon frame": lambda r: set(range(r.first_frame, r.last_frame + 1))}  # fmt: skip
    for what, frames in own.items():
        a, b = ([frames(r) for r in table.iloc[rows].itertuples()] for rows in (train, test))
        ours, theirs = set.union(*a), set.union(*b)
        both = ours & theirs
        share = np.mean([bool(x & both) for x in b])
        assert report.loc[what].tolist() == [len(ours), len(theirs), len(both), share]
