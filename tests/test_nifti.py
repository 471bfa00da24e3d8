"""Responses from any list of NIfTI files: equal to the published layout, and refused by name."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cortexlit as cx
from cortexlit.core import DataError, MissingError
from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.nifti import bids_trials, open_nifti
from cortexlit.data.things import open_things
from cortexlit.data.volumes import write_nifti
from cortexlit.simulate.subject import write_things


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    study = write_things(tmp_path_factory.mktemp("nifti") / "study", "tiny", layouts=("volumes",))
    return open_things(study, "01")


def table(published) -> pd.DataFrame:
    betas = {(s, r): path for s, r, path, _ in published.layout.runs}
    shown = published.index.stimuli
    files = [str(betas[key]) for key in zip(shown["session"], shown["run"], strict=True)]
    return shown[["volume", "image", "concept", "session", "run", "role"]].assign(file=files)


def mask_of(published) -> Path:
    return published.layout.files["mask"]


@pytest.mark.parametrize("zscore", ["session", "run", "none"])
def test_a_table_gives_what_the_published_layout_gives(published, zscore, tmp_path):
    own = open_nifti(table(published), mask_of(published))
    a, b = (ThingsDataset(build_things(s, tmp_path / n, zscore)) for n, s in (("a", own), ("b", published)))
    assert np.array_equal(a.responses, b.responses)
    assert a.trials.equals(b.trials) and np.array_equal(a.mask, b.mask)
    assert np.array_equal(own.read(), published.read())


def test_the_order_of_the_rows_does_not_matter_and_a_file_may_be_a_csv(published, tmp_path):
    shuffled = table(published).sample(frac=1, random_state=0)
    shuffled = shuffled.sort_values("volume", kind="stable")  # of a run the trials stay in order
    shuffled.to_csv(tmp_path / "trials.csv", index=False)
    own = open_nifti(tmp_path / "trials.csv", mask_of(published))
    assert np.array_equal(own.read(), published.read())


def test_runs_of_unequal_length_are_taken_and_volumes_without_a_column_are_in_order(tmp_path):
    draw = np.random.default_rng(0)
    mask = draw.random((4, 5, 3)) < 0.5
    write_nifti(tmp_path / "mask.nii.gz", mask.astype(np.uint8), np.eye(4))
    values = {n: draw.normal(size=(4, 5, 3, n)).astype(np.float32) for n in (3, 5)}
    for n, stack in values.items():
        write_nifti(tmp_path / f"{n}.nii.gz", stack, np.eye(4))
    write_nifti(tmp_path / "one.nii.gz", values[3][..., 0], np.eye(4))
    names = ["3.nii.gz"] * 3 + ["5.nii.gz"] * 5 + ["one.nii.gz"]
    trials = pd.DataFrame({"file": names, "image": [f"{k}.png" for k in range(9)], "run": [1] * 3 + [2] * 6})
    own = open_nifti(trials, "mask.nii.gz", root=tmp_path)
    wanted = np.concatenate([values[3][mask].T, values[5][mask].T, values[3][..., 0][mask][None]])
    assert np.array_equal(own.read(), wanted)
    assert own.index.stimuli["trial"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    subject = cx.open_dataset(cx.build(own, tmp_path / "subject", zscore="run"), "train")
    assert subject.trials["concept"].nunique() == 9 and len(subject[0]["voxels"]) == mask.sum()


def test_regions_are_masks_on_the_grid(published, tmp_path):
    region = np.zeros(published.mask.shape, np.uint8)
    region[
        np.where(published.mask)[0][:40], np.where(published.mask)[1][:40], np.where(published.mask)[2][:40]
    ] = 1
    write_nifti(tmp_path / "v1.nii.gz", region, published.affine)
    own = open_nifti(table(published), mask_of(published), rois={"V1": tmp_path / "v1.nii.gz"})
    assert own.rois["V1"].sum() == 40
    built = ThingsDataset(build_things(own, tmp_path / "subject", rois=["V1"], zscore="none"))
    assert np.array_equal(built.responses, published.read()[:, own.rois["V1"].to_numpy()].astype(np.float32))


def test_a_masker_of_nilearn_is_asked_for_the_values(published):
    maskers = pytest.importorskip("nilearn.maskers")
    masker = maskers.NiftiMasker(str(mask_of(published)))
    with pytest.raises(DataError, match="fitted"):
        open_nifti(table(published), masker)
    own = open_nifti(table(published), masker.fit())
    np.testing.assert_allclose(own.read(), published.read(), rtol=1e-5)
    smooth = maskers.NiftiMasker(str(mask_of(published)), smoothing_fwhm=8).fit()
    assert open_nifti(table(published), smooth).read().std() < 0.8 * published.read().std()


def faulty(published, tmp_path, fault: str):
    trials, mask = table(published), mask_of(published)
    if fault == "missing":
        trials["file"] = trials["file"].str.replace("ses-things02", "ses-things12")
    elif fault == "twice":
        trials.loc[3, "volume"] = trials.loc[2, "volume"]
    elif fault == "beyond":
        trials.loc[3, "volume"] = 99
    elif fault == "concepts":
        trials.loc[trials["image"].duplicated(), "concept"] = "another"
    elif fault == "role":
        trials.loc[0, "role"] = "catch"
    elif fault == "column":
        trials = trials.drop(columns="image")
    elif fault == "empty":
        trials = trials.iloc[:0]
    elif fault == "fraction":
        trials = trials.assign(session=trials["session"] + 0.5)
    elif fault == "grid":
        write_nifti(tmp_path / "mask.nii.gz", np.ones((3, 3, 3), np.uint8), np.eye(4))
        mask = tmp_path / "mask.nii.gz"
    elif fault == "nan":
        values = np.full((*published.mask.shape, 1), np.nan, np.float32)
        write_nifti(tmp_path / "nan.nii.gz", values, published.affine)
        trials = trials.iloc[:1].assign(file=str(tmp_path / "nan.nii.gz"), volume=0)
    return trials, mask


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        ("missing", MissingError, "2 of 6 files(.|\n)*ses-things12"),
        ("twice", DataError, "listed twice"),
        ("beyond", DataError, "volume 99 of"),
        ("concepts", DataError, "two concepts"),
        ("role", DataError, "catch"),
        ("column", DataError, "no column image"),
        ("empty", DataError, "no row"),
        ("fraction", DataError, "session"),
        ("grid", DataError, "another grid(.|\n)*betas.nii.gz"),
        ("nan", DataError, "nan.nii.gz"),
    ],
)
def test_what_is_wrong_is_named(published, tmp_path, fault, error, told):
    trials, mask = faulty(published, tmp_path, fault)
    with pytest.raises(error, match=told):
        build_things(open_nifti(trials, mask), tmp_path / "out", zscore="none")
    assert not (tmp_path / "out").exists()


def derivative(published, folder: Path, events: Path) -> None:
    for session, run, path, _ in published.layout.runs:
        stem = f"sub-01_ses-{session:02d}_task-things_run-{run}"
        for place in (folder, events):
            (place / "sub-01").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "sub-01" / f"{stem}_space-T1w_betas.nii.gz")
        rows = published.index.table.query("session == @session and run == @run")
        image = rows["image"].where(rows["role"] != "catch", "images/blank.png")
        listed = pd.DataFrame({"onset": 4.0 * rows["volume"], "stim_file": image})
        end = pd.DataFrame({"onset": [1e6], "stim_file": ["n/a"]})  # of the run: no picture
        listed = pd.concat([listed, end])
        listed.sample(frac=1, random_state=1).to_csv(
            events / "sub-01" / f"{stem}_events.tsv", sep="\t", index=False
        )


def test_a_bids_derivative_is_paired_with_its_events(published, tmp_path):
    derivative(published, tmp_path / "derivatives", tmp_path / "raw")
    found = bids_trials(tmp_path / "derivatives", "01", task="things", events=tmp_path / "raw")
    found = found[found["image"] != "blank.png"]
    assert np.array_equal(open_nifti(found, mask_of(published)).read(), published.read())
    with pytest.raises(MissingError, match="0 files sub-01_ses-01_task-things_run-1_events.tsv"):
        bids_trials(tmp_path / "derivatives", "01")
    with pytest.raises(MissingError, match="no responses of subject 02"):
        bids_trials(tmp_path / "derivatives", "02")
    with pytest.raises(MissingError, match="task-faces"):
        bids_trials(tmp_path / "derivatives", "01", task="faces")
    some = sorted((tmp_path / "raw").rglob("*.tsv"))[0]
    some.write_text("\n".join(some.read_text().splitlines()[:-3]) + "\n")
    with pytest.raises(DataError, match="volumes, .* events"):
        bids_trials(tmp_path / "derivatives", "01", events=tmp_path / "raw")
