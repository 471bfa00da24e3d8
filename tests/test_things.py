"""The three layouts hold the same numbers; keys, names, splits and the cache; and every way a folder can be broken."""

import gzip
import re
import shutil
from dataclasses import replace

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from cortexlit.core import DataError, MissingError, SplitLeak, data_home, rng
from cortexlit.data import things as module
from cortexlit.data.audit import audit_units
from cortexlit.data.cached import ThingsDataset, build_things, reliability
from cortexlit.data.splits import Split, split_by_concept, split_by_session
from cortexlit.data.things import (
    LAYOUTS,
    PROPERTIES,
    THINGS_TABLES,
    TrialIndex,
    concept_of,
    find_layout,
    load_properties,
    open_things,
    things_table,
)
from cortexlit.data.volumes import read_nifti, select_rois, write_nifti
from cortexlit.simulate.subject import SUBJECT_SIZES, load_subject_truth, write_things

KEYS = ["session", "run", "trial", "image", "concept", "role"]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "A tiny study in all layouts: read it, never write."
    return write_things(tmp_path_factory.mktemp("things") / "tiny", "tiny")


@pytest.fixture(scope="session")
def caches(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {k: build_things(open_things(root, "01", k), folder / k) for k in LAYOUTS}


@pytest.fixture
def copy(root, tmp_path):
    "A copy that may be broken."

    def make(layout):
        return shutil.copytree(root / layout, tmp_path / layout)

    return make


def complete(error, name: str) -> bool:
    "Whether a message names this file, and says what was expected and what to do."
    text = str(error.value)
    return bool(re.search(rf"\n  file: .*{re.escape(name)}\n  expected: .+\n  do: .+", text))


def values_by_hand(root, session, run, volume):
    "One volume, read with nothing but gzip and NumPy."
    path = next(root.rglob(f"sub-01_ses-things{session:02d}_run-{run:02d}_betas.nii.gz"))
    raw = gzip.decompress(path.read_bytes())
    shape = SUBJECT_SIZES["tiny"].grids["01"]
    numbers = np.frombuffer(raw, "<f8", offset=352)
    return numbers.reshape((*shape, -1), order="F")[..., volume]


@pytest.mark.parametrize("subject", ["01", "02"])
def test_table_equals_masked_volume_minus_catch_trial_by_trial(root, subject):
    table, other, volumes = (open_things(root, subject, k) for k in LAYOUTS)
    expected = table.read()
    for found in (other, volumes):
        assert found.index.stimuli[KEYS].equals(table.index.stimuli[KEYS])
        assert np.array_equal(found.read(), expected)
    assert len(np.unique(expected[:, 0])) == len(expected)  # no two trials could be confused unseen


def test_a_volume_is_where_the_index_says(root):
    things = open_things(root, "01", "volumes")
    values = things.read()
    for row in rng(0, "rows").choice(len(things), 12, replace=False):
        trial = things.index.stimuli.iloc[row]
        volume = values_by_hand(root / "volumes", trial.session, trial.run, trial.volume)
        assert np.array_equal(volume[things.mask], values[row])
        assert not volume[~things.mask].any()
        path = next(
            (root / "volumes").rglob(
                f"sub-01_ses-things{trial.session:02d}_run-{trial.run:02d}_conditions.tsv"
            )
        )
        assert path.read_text().splitlines()[0] == "\timage_filename"
        assert (
            path.read_text().splitlines()[1 + trial.volume]
            == f"{trial.volume}\t{trial.concept}/{trial.image}"
        )


def test_catch_trials_are_in_the_index_but_not_in_the_data(root):
    things = open_things(root, "01", "volumes")
    catch = things.index.table[things.index.table["role"] == "catch"]
    assert len(catch) == 12 and (catch["trial"] == -1).all() and len(things) == 96
    assert catch["image"].str.startswith("catch").all()
    assert not things.index.stimuli["image"].str.startswith("catch").any()


def test_roles_of_volumes_are_those_of_the_table(root):
    a, b = (open_things(root, "01", k).index.stimuli for k in ("figshare", "volumes"))
    assert a["role"].value_counts().to_dict() == {"train": 72, "test": 24}
    assert (a["role"] == b["role"]).all()


def test_design_is_balanced_like_the_real_one(root):
    stimuli = open_things(root, "01").index.stimuli
    train = stimuli[stimuli["role"] == "train"]
    assert (train.groupby(["session", "concept"]).size() == 1).all()
    assert train["image"].is_unique
    assert (stimuli[stimuli["role"] == "test"].groupby("image")["session"].nunique() == 3).all()


def test_same_seed_same_bytes_other_seed_other_subject(root, tmp_path):
    again = write_things(tmp_path / "again", "tiny", layouts=("volumes",))
    for path in sorted((again / "volumes").rglob("*.nii.gz")):
        assert path.read_bytes() == (root / path.relative_to(again)).read_bytes()
    other = write_things(tmp_path / "other", "tiny", seed=1, layouts=("figshare",))
    assert not np.array_equal(open_things(other).read(), open_things(root).read())


def test_parts_read_like_the_whole(root):
    for kind in LAYOUTS:
        things = open_things(root, "02", kind)
        keep = rng(0, "keep").random(len(things.voxels)) < 0.2
        assert np.array_equal(things.read(keep), things.read()[:, keep])
    table = open_things(root, "02", "figshare")
    small = np.concatenate(
        [b for _, _, b in table.blocks(np.ones(len(table.voxels), bool), limit=5000)], axis=1
    )
    assert np.array_equal(small, table.read())


def test_affines_and_grids_belong_to_the_subject(root):
    one, two = (open_things(root, s, "volumes") for s in ("01", "02"))
    assert one.mask.shape == (12, 13, 15) and two.mask.shape == (11, 14, 13)
    assert not np.allclose(one.affine, two.affine)
    assert np.array_equal(one.voxels[["voxel_x", "voxel_y", "voxel_z"]], np.argwhere(one.mask))


@pytest.mark.filterwarnings("ignore::pandas.errors.PerformanceWarning")
def test_pandas_own_file_is_read(root, tmp_path):
    """The published file was written by pandas: group and block names are its."""
    pytest.importorskip("tables")
    folder = shutil.copytree(root / "figshare", tmp_path / "figshare")
    expected = open_things(folder).read()
    frame = pd.DataFrame(expected.T)
    frame.insert(0, "voxel_id", np.arange(len(frame)))
    for key in ("ResponseData", "df"):
        path = folder / "betas_csv" / "sub-01_ResponseData.h5"
        path.unlink()
        frame.to_hdf(path, key=key, mode="w")
        assert np.array_equal(open_things(folder).read(), expected)


@pytest.mark.parametrize(
    "parent", ["betas_vol/scalematched", "scalematched", "betas_vol", "derivatives/betas_vol", "."]
)
def test_volumes_under_any_parent(root, tmp_path, parent):
    target = tmp_path / parent / "sub-01"
    shutil.copytree(root / "volumes" / "betas_vol" / "scalematched" / "sub-01", target)
    shutil.copytree(root / "volumes" / "brainmasks", tmp_path / "brainmasks")
    assert len(open_things(tmp_path, "01")) == 96


# --- names ---


def test_names():
    assert (
        concept_of("dog/dog_12s.jpg") == concept_of("dog\\dog_12s.jpg") == concept_of("dog_12s.jpg") == "dog"
    )
    assert concept_of("aircraft_carrier_04b.jpg") == "aircraft_carrier"


def test_line_breaks_and_remarks_in_roi_names(root):
    rois = open_things(root, "01", "figshare").rois
    assert {"glasser-p9-46v", "LO1", "lFFA"} <= set(rois.columns)
    header = (root / "figshare/betas_csv/sub-01_VoxelMetadata.csv").read_text()
    assert '"glasser-p9-\n46v"' in header and "LO1 (prf)" in header
    assert np.array_equal(select_rois(rois, "LO1 (prf)"), rois["LO1"])
    assert np.array_equal(select_rois(rois, ["V1", "FFA"]), rois[["V1", "lFFA", "rFFA"]].any(axis=1))
    with pytest.raises(DataError, match="no ROI 'V9'"):
        select_rois(rois, ["V1", "V9"])


def test_rois_of_volumes_equal_those_of_the_table(root):
    table, volumes = (open_things(root, "01", k).rois for k in ("figshare", "volumes"))
    assert {"V1", "LO1", "lFFA", "rPPA"} <= set(volumes.columns)
    for name in volumes:
        assert np.array_equal(volumes[name], table[name]), name


def test_measures_that_happen_to_be_zero_are_not_regions(copy):
    folder = copy("figshare")
    path = folder / "betas_csv" / "sub-01_VoxelMetadata.csv"
    table = pd.read_csv(path).assign(**{"prf-size": 0, "nc_testset": 0})
    table.to_csv(path, index=False)
    things = open_things(folder)
    assert "prf-size" in things.voxels and "prf-size" not in things.rois


def test_delimiters(root):
    folder = root / "openneuro/derivatives/ICA-betas/sub-01/voxel-metadata"
    tab = (folder / "sub-01_task-things_stimulus-metadata.tsv").read_text().splitlines()[0]
    comma = (folder / "sub-01_task-things_voxel-metadata.tsv").read_text().splitlines()[0]
    assert "\t" in tab and "\t" not in comma and "," in comma


def test_properties_from_either_file(root):
    plus = load_properties(
        root / "ratings/02_object-level/_property-ratings.tsv", [*PROPERTIES, "be-moved_sd", "size"]
    )
    short = load_properties(root / "ratings/animacy.csv", [*PROPERTIES, "be-moved_sd", "size"])
    pd.testing.assert_frame_equal(plus, short)
    assert (plus["be-moved_sd"] == 0).sum() == 1
    assert {"nameability", "consistency"} <= set(
        load_properties(root / "ratings", ["nameability", "consistency"])
    )
    with pytest.raises(DataError, match=r"unknown property 'precius'; meant precious"):
        load_properties(root / "ratings", ["precius"])
    with pytest.raises(MissingError, match="no property ratings"):
        load_properties(root / "figshare")


def test_real_names_are_understood():
    from cortexlit.data.things import _canonical

    real = {
        "property_be-moved_mean": "be-moved",
        "be.moved_mean": "be-moved",
        "be.moved_sd": "be-moved_sd",
        "property_manmade_SD": "manmade_sd",
        "property_arousal_mean": "arousal",
        "arousing_mean": "arousal",
        "image-label_nameability_mean": "nameability",
        "size_mean": "size",
    }
    assert {k: _canonical(k) for k in real} == real


# --- keys ---


def test_three_ways_to_name_a_trial(caches, root):
    ratings = load_properties(root / "ratings")
    data = ThingsDataset(caches["figshare"], ratings)
    session = ThingsDataset(caches["figshare"], ratings, sessions=[2])
    for place in (0, 17, 95):
        row = data.trials.iloc[place]
        item = data[place]
        assert torch.equal(data[row.session, row.run, row.trial]["voxels"], item["voxels"])
        assert np.array_equal(item["labels"], ratings.loc[row.concept].to_numpy(np.float32))
        if row.session == 2:
            assert torch.equal(session[row.run, row.trial]["voxels"], item["voxels"])
    assert torch.equal(data[-1]["voxels"], data[95]["voxels"])
    with pytest.raises(DataError, match="of which of 3 sessions"):
        data[1, 5]
    for key in (96, -97, (1, 9, 0), (1, 1, 16), (1, 1, -1), (1, 1, 1, 1)):
        with pytest.raises(IndexError):
            data[key]


def test_index_of_a_study_and_of_a_dataset_agree(root, caches):
    index = open_things(root).index
    data = ThingsDataset(caches["figshare"])
    for key in ((1, 1, 0), (3, 2, 15), (2, 1, 7)):
        assert index.locate(*key) == data.locate(*key)
    assert index.locate(5) == 5


def test_a_loader_batches_volumes(caches, root):
    ratings = load_properties(root / "ratings", ["heavy", "lives"])
    data = ThingsDataset(caches["volumes"], ratings, form="volume", role="train")
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=5)))
    assert batch["volume"].shape == (5, 1, 12, 13, 15) and batch["volume"].dtype == torch.float32
    assert batch["labels"].shape == (5, 2) and batch["labels"].dtype == torch.float32
    assert not batch["volume"][:, 0][:, ~data.mask].any()
    voxels = ThingsDataset(caches["volumes"], role="train")
    assert "labels" not in voxels[3]
    assert np.array_equal(batch["volume"][3, 0][data.mask], voxels[3]["voxels"])
    assert np.array_equal(voxels.responses[3], voxels[3]["voxels"])


def test_regions_of_a_dataset(caches):
    whole, part = ThingsDataset(caches["figshare"]), ThingsDataset(caches["figshare"], rois=["FFA", "V1"])
    inside = select_rois(whole.rois, ["FFA", "V1"])
    assert np.array_equal(part.responses, whole.responses[:, inside])
    assert part.mask.sum() == inside.sum() and part.brain.sum() == 1032
    assert np.array_equal(part.unmask(part.responses[0])[part.mask], part.responses[0])
    assert np.array_equal(part[0]["voxels"], part.responses[0])
    with pytest.raises(MissingError, match="no trial with role 'test' in sessions"):
        ThingsDataset(caches["figshare"], role="test", sessions=[9])


def test_a_rating_that_is_not_there_is_an_error(caches, root):
    ratings = load_properties(root / "ratings")
    with pytest.raises(DataError, match="1 concepts have no rating, e.g. dog"):
        ThingsDataset(caches["figshare"], ratings.drop("dog"))
    ratings.loc["dog", "heavy"] = np.nan
    with pytest.raises(DataError, match="heavy is missing"):
        ThingsDataset(caches["figshare"], ratings)


# --- cache ---


@pytest.mark.parametrize("zscore,columns", [("session", ["session"]), ("run", ["session", "run"])])
def test_each_voxel_is_standardised_within_its_group(root, tmp_path, zscore, columns):
    raw = open_things(root).read()
    for kind in ("figshare", "volumes"):
        data = ThingsDataset(build_things(open_things(root, "01", kind), tmp_path / kind, zscore))
        for rows in data.trials.groupby(columns).indices.values():
            expected = (raw[rows] - raw[rows].mean(0)) / raw[rows].std(0)
            assert np.allclose(data.responses[rows], expected, atol=1e-5)


def test_the_three_caches_are_one(caches):
    first, *others = (ThingsDataset(c) for c in caches.values())
    for other in others:
        assert np.allclose(other.responses, first.responses, atol=1e-6)
        assert other.trials[KEYS].equals(first.trials[KEYS])
    assert np.load(caches["figshare"] / "responses.npy", mmap_mode="r").dtype == np.float32
    assert np.load(caches["figshare"] / "metadata.npz", allow_pickle=False)["image"].shape == (96,)


def test_no_zscore_keeps_the_numbers_and_regions_save_room(root, tmp_path):
    things = open_things(root, "01", "volumes")
    folder = build_things(things, tmp_path / "raw", "none", rois="V1")
    keep = select_rois(things.rois, "V1")
    data = ThingsDataset(folder)
    assert np.array_equal(data.responses, things.read(keep).astype(np.float32))
    assert data.mask.sum() == keep.sum()
    with pytest.raises(DataError, match="zscore='trial'"):
        build_things(things, tmp_path / "x", "trial")
    with pytest.raises(DataError, match="exists already"):
        build_things(things, folder)


def test_a_voxel_without_variance_becomes_zero(copy, tmp_path):
    folder = copy("figshare")
    with h5py.File(folder / "betas_csv/sub-01_ResponseData.h5", "r+") as file:
        file["ResponseData/block0_values"][7, :32] = 0.3
    data = ThingsDataset(build_things(open_things(folder), tmp_path / "cache"))
    session = data.trials["session"] == 1
    assert not data.responses[session, 7].any() and data.responses[~session, 7].any()


def test_values_that_are_not_finite_stop_the_cache(copy, tmp_path):
    folder = copy("figshare")
    with h5py.File(folder / "betas_csv/sub-01_ResponseData.h5", "r+") as file:
        file["ResponseData/block0_values"][7, 3] = np.nan
    with pytest.raises(DataError, match="1 of 99072 values are not finite") as error:
        build_things(open_things(folder), tmp_path / "cache")
    assert complete(error, "sub-01_ResponseData.h5") and not (tmp_path / "cache").exists()


def test_the_volume_file_that_is_not_finite_is_named(copy, tmp_path):
    folder = copy("volumes")
    path = next(folder.rglob("sub-01_ses-things02_run-02_betas.nii.gz"))
    values, affine = read_nifti(path)
    values = values.copy()
    values[open_things(folder).mask] = np.nan
    write_nifti(path, values, affine)
    with pytest.raises(DataError, match="16512 of 16512 values are not finite") as error:
        build_things(open_things(folder), tmp_path / "cache")
    assert complete(error, path.name)


def test_more_than_the_memory_is_refused_with_the_number_of_voxels(root, caches, tmp_path, monkeypatch):
    data = ThingsDataset(caches["figshare"])
    needed = 96 * 1032 * 12  # float32, and the float64 copy of a decoder
    monkeypatch.setattr(module, "_MOST_BYTES", needed)
    assert data.responses.shape == (96, 1032)
    monkeypatch.setattr(module, "_MOST_BYTES", needed - 1)
    with pytest.raises(DataError, match=r"96 trials x 1032 voxels would take 0.0 GB") as error:
        _ = data.responses
    assert complete(error, "figshare") and "which is 1031 voxels" in str(error.value)
    assert "--rois visual" in str(error.value)
    assert ThingsDataset(caches["figshare"], rois="visual").responses.shape[0] == 96
    assert data[5]["voxels"].shape == (1032,)  # one at a time is always possible
    monkeypatch.setattr(module, "_MOST_BYTES", 96 * 1032 * 8 - 1)
    with pytest.raises(DataError, match="would take"):
        open_things(root).read()
    build_things(open_things(root), tmp_path / "cache")


def test_memory_of_a_large_table_stays_small(tmp_path, monkeypatch):
    """Peak of Python's allocations while caching a table many times the block size."""
    import tracemalloc

    root = write_things(tmp_path / "x", "tiny", layouts=("figshare",))
    things = open_things(root)
    blocks = things.blocks
    monkeypatch.setattr(things, "blocks", lambda keep: blocks(keep, limit=96 * 8 * 20))
    tracemalloc.start()
    build_things(things, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = np.load(tmp_path / "cache" / "responses.npy", mmap_mode="r").nbytes
    assert whole == 96 * 1032 * 4
    assert peak < 2 * whole  # metadata and one block of 20 voxels, not float64 copies of everything


# --- NIfTI ---


@pytest.mark.parametrize("dtype", ["f8", "f4", "i2", "u1", "i4"])
def test_volumes_come_back(tmp_path, dtype):
    values = rng(0, dtype).integers(0, 100, (3, 4, 5, 2)).astype(dtype)
    affine = np.array([[-2, 0.1, 0, 71], [0, 2, 0, -80], [0, 0, 2.5, -68], [0, 0, 0, 1.0]])
    path = write_nifti(tmp_path / "a.nii.gz", values, affine)
    found, placed = read_nifti(path)
    assert np.array_equal(found, values) and found.dtype == values.dtype
    assert np.allclose(placed, affine, atol=1e-6)
    plain = tmp_path / "a.nii"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert np.array_equal(read_nifti(plain)[0], values)


def test_scale_and_byte_order(tmp_path):
    values = np.arange(24, dtype="i2").reshape(2, 3, 4)
    path = write_nifti(tmp_path / "a.nii.gz", values, np.diag([2.0, 2, 2, 1]))
    image = nib.load(path)
    image.header.set_slope_inter(0.5, 3.0)
    image.header.set_data_offset(352)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[:348] = image.header.binaryblock
    (tmp_path / "scaled.nii").write_bytes(raw)
    assert np.allclose(read_nifti(tmp_path / "scaled.nii")[0], values * 0.5 + 3)
    nib.save(nib.Nifti1Image(values, image.affine, nib.Nifti1Header(endianness=">")), tmp_path / "big.nii.gz")
    found, affine = read_nifti(tmp_path / "big.nii.gz")
    assert np.array_equal(found, values) and np.allclose(affine, image.affine)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty", "no header"])
def test_damaged_volumes_are_named(tmp_path, damage):
    path = write_nifti(tmp_path / "sub-01_betas.nii.gz", rng(0).normal(size=(5, 5, 5, 8)), np.eye(4))
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    elif damage == "not gzip":
        raw = b"<html>not found</html>"
    elif damage == "empty":
        raw = b""
    else:
        raw = gzip.compress(b"\0" * 5000)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="cut off or damaged|no NIfTI file") as error:
        read_nifti(path)
    assert "sub-01_betas.nii.gz" in str(error.value)


# --- broken folders ---


def test_missing_run(copy):
    folder = copy("volumes")
    for path in folder.rglob("sub-01_ses-things02_run-01_*"):
        path.unlink()
    with pytest.raises(MissingError, match="session 2, run 1 is missing") as error:
        open_things(folder)
    assert complete(error, "ses-things02/sub-01_ses-things02_run-01_betas.nii.gz")


def test_missing_conditions(copy):
    folder = copy("volumes")
    next(folder.rglob("sub-01_ses-things02_run-01_conditions.tsv")).unlink()
    with pytest.raises(MissingError, match=r"betas but no conditions \(1 of 6 runs\)") as error:
        open_things(folder)
    assert complete(error, "sub-01_ses-things02_run-01_conditions.tsv")


def test_missing_last_run_of_a_session_in_a_table(copy):
    folder = copy("figshare")
    path = folder / "betas_csv/sub-01_StimulusMetadata.csv"
    table = pd.read_csv(path).query("not (session == 3 and run == 2)")
    table.to_csv(path, index=False)
    with pytest.raises(MissingError, match="session 3, run 2 is missing") as error:
        open_things(folder)
    assert complete(error, path.name)


@pytest.mark.parametrize("name", ["StimulusMetadata", "VoxelMetadata"])
@pytest.mark.parametrize("damage", ["absent", "empty", "text"])
def test_missing_or_damaged_table(copy, name, damage):
    folder = copy("figshare")
    path = folder / "betas_csv" / f"sub-01_{name}.csv"
    path.write_text({"absent": "", "empty": " \n", "text": "a,b\n1,2\n1,2,3,4\n"}[damage])
    if damage == "absent":
        path.unlink()
    with pytest.raises((MissingError, DataError), match="no such table|table is empty|not a table") as error:
        open_things(folder)
    assert complete(error, path.name)


def test_voxels_without_coordinates(copy):
    folder = copy("figshare")
    path = folder / "betas_csv/sub-01_VoxelMetadata.csv"
    pd.read_csv(path).drop(columns="voxel_x").to_csv(path, index=False)
    with pytest.raises(DataError, match="no column voxel_x") as error:
        open_things(folder)
    assert complete(error, path.name)


@pytest.mark.parametrize(
    "column,value,match", [("trial_type", "dream", "roles"), ("concept", "dream", "has two concepts")]
)
def test_a_table_with_a_wrong_word_is_named(copy, column, value, match):
    folder = copy("figshare")
    path = folder / "betas_csv/sub-01_StimulusMetadata.csv"
    table = pd.read_csv(path)
    table.loc[table["trial_type"].eq("test").idxmax(), column] = value
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=match) as error:
        open_things(folder)
    assert complete(error, path.name)


def test_unequal_rows(copy):
    folder = copy("volumes")
    path = next(folder.rglob("sub-01_ses-things02_run-01_conditions.tsv"))
    lines = path.read_text().splitlines()
    images = [line.split("\t")[1] for line in lines[1:] if "catch" not in line]
    rows = [f"{k}\t{image}" for k, image in enumerate(images)]
    path.write_text(
        "\n".join([lines[0], *rows]) + "\n"
    )  # no catch rows, numbered anew: trial and volume differ
    with pytest.raises(DataError, match="unequal rows: 18 volumes, 16 conditions") as error:
        open_things(folder).read()
    assert complete(error, path.name.replace("conditions.tsv", "betas.nii.gz"))
    path.write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(DataError, match="session 2, run 1 has") as error:
        open_things(folder)
    assert complete(error, path.name) and "others 16" in str(error.value)


def test_the_odd_run_is_named_even_if_it_is_the_first(copy):
    folder = copy("volumes")
    path = next(folder.rglob("sub-01_ses-things01_run-01_conditions.tsv"))
    path.write_text("\n".join(path.read_text().splitlines()[:-3]) + "\n")
    with pytest.raises(DataError, match="session 1, run 1 has .* others 16") as error:
        open_things(folder)
    assert complete(error, path.name)


# --- rows have numbers, which say where a response lies ---


def test_conditions_may_be_sorted_by_image(root, copy):
    folder = copy("volumes")
    for path in folder.rglob("*_conditions.tsv"):
        table = pd.read_csv(path, sep="\t", index_col=0).sort_values("image_filename")
        assert list(table.index) != list(range(len(table)))
        table.to_csv(path, sep="\t")
    expected, found = open_things(root, "01", "volumes"), open_things(folder)
    pd.testing.assert_frame_equal(found.index.table, expected.index.table)
    assert np.array_equal(found.read(), expected.read())


def test_a_response_is_taken_from_the_place_in_the_index(root):
    "The volume of a row decides, not the place of the row among the others."
    things = open_things(root, "01", "volumes")
    expected, table = things.read(), things.index.table
    pair = table.index[table["role"] != "catch"][:2]
    swapped = table.copy()
    swapped.loc[pair, "volume"] = table.loc[pair[::-1], "volume"].to_numpy()
    things.index = TrialIndex(swapped)
    assert np.array_equal(things.read()[[1, 0]], expected[:2])


@pytest.mark.parametrize("damage", ["row", "twice", "letters", "no index", "other name"])
def test_conditions_with_a_damaged_index(copy, damage):
    folder = copy("volumes")
    path = next(folder.rglob("sub-01_ses-things02_run-01_conditions.tsv"))
    table = pd.read_csv(path, sep="\t", index_col=0)
    if damage == "row":
        table = table.drop(index=4)
    elif damage == "twice":
        table.index = [0, *table.index[:-1]]
    elif damage == "letters":
        table.index = [f"v{k}" for k in table.index]
    elif damage == "other name":
        table.index.name = "trial"
    table.to_csv(path, sep="\t", index=damage != "no index")
    match = "the first column is" if damage in ("no index", "other name") else "is not each of 0 to"
    with pytest.raises(DataError, match=match) as error:
        open_things(folder)
    assert complete(error, path.name)


@pytest.mark.parametrize("mask", [True, False])
def test_tables_may_be_shuffled(root, copy, mask):
    folder, expected = copy("figshare"), open_things(root, "01", "figshare")
    for name in ("StimulusMetadata", "VoxelMetadata"):
        path = folder / "betas_csv" / f"sub-01_{name}.csv"
        pd.read_csv(path).sample(frac=1, random_state=1).to_csv(path, index=False)
    if not mask:
        (folder / "brainmasks/sub-01_space-T1w_brainmask.nii.gz").unlink()
    found = open_things(folder)
    pd.testing.assert_frame_equal(found.index.table, expected.index.table)
    pd.testing.assert_frame_equal(found.rois, expected.rois)
    pd.testing.assert_frame_equal(found.voxels, expected.voxels)
    assert np.array_equal(found.read(), expected.read())


@pytest.mark.parametrize("name,column", [("StimulusMetadata", "trial_id"), ("VoxelMetadata", "voxel_id")])
def test_tables_with_damaged_numbers(copy, name, column):
    folder = copy("figshare")
    path = folder / "betas_csv" / f"sub-01_{name}.csv"
    table = pd.read_csv(path)
    table.assign(**{column: table[column].replace(3, 4)}).to_csv(path, index=False)
    with pytest.raises(DataError, match=f"{column} is not each of 0 to") as error:
        open_things(folder)
    assert complete(error, path.name)
    table.drop(columns=column).to_csv(path, index=False)
    with pytest.raises(DataError, match=f"no column {column}") as error:
        open_things(folder)
    assert complete(error, path.name)


@pytest.mark.parametrize("damage", ["swapped", "absent"])
def test_responses_whose_rows_are_not_in_order(copy, damage):
    folder = copy("figshare")
    with h5py.File(folder / "betas_csv/sub-01_ResponseData.h5", "r+") as file:
        if damage == "swapped":
            file["ResponseData/block1_values"][:2, 0] = [1, 0]
        else:
            del file["ResponseData/block1_values"]
    with pytest.raises(DataError, match="rows are not numbered by voxel_id") as error:
        open_things(folder).read()
    assert complete(error, "sub-01_ResponseData.h5")


def test_responses_of_another_subject(copy):
    folder = copy("figshare")
    for name in ("ResponseData.h5",):
        shutil.copy(folder / f"betas_csv/sub-02_{name}", folder / f"betas_csv/sub-01_{name}")
    with pytest.raises(DataError, match=r"unequal rows: responses \(858, 96\), metadata list 1032 voxels"):
        open_things(folder).read()


def test_mask_of_another_subject(copy):
    folder = copy("figshare")
    masks = folder / "brainmasks"
    shutil.copy(masks / "sub-02_space-T1w_brainmask.nii.gz", masks / "sub-01_space-T1w_brainmask.nii.gz")
    with pytest.raises(DataError, match="wrong subject grid") as error:
        open_things(folder)
    assert complete(error, "sub-01_space-T1w_brainmask.nii.gz")


@pytest.mark.parametrize("what", ["shape", "affine"])
def test_volumes_of_another_subject(copy, what):
    folder = copy("volumes")
    path = next(folder.rglob("sub-01_ses-things02_run-01_betas.nii.gz"))
    if what == "shape":
        shutil.copy(next(folder.rglob("sub-02_ses-things02_run-01_betas.nii.gz")), path)
    else:
        values, affine = read_nifti(path)
        write_nifti(path, values, affine + np.array([[0, 0, 0, 1.0]] * 3 + [[0] * 4]))  # moved by 1 mm
    with pytest.raises(DataError, match="wrong subject grid") as error:
        open_things(folder).read()
    assert complete(error, path.name)


def test_region_of_another_subject(copy):
    folder = copy("volumes")
    path = next(folder.rglob("prf/sub-01/resampled_varea.nii.gz"))
    shutil.copy(next(folder.rglob("prf/sub-02/resampled_varea.nii.gz")), path)
    with pytest.raises(DataError, match="wrong subject grid") as error:
        open_things(folder)
    assert complete(error, "prf/sub-01/resampled_varea.nii.gz")


def test_two_copies(copy):
    folder = copy("volumes")
    shutil.copytree(folder / "betas_vol/scalematched/sub-01", folder / "sub-01")
    with pytest.raises(DataError, match="session 1, run 1 is there twice"):
        open_things(folder)


def test_one_session_cannot_tell_test_images(copy):
    folder = copy("volumes")
    for session in (2, 3):
        shutil.rmtree(folder / f"betas_vol/scalematched/sub-01/ses-things{session:02d}")
    with pytest.raises(MissingError, match="which images are test images") as error:
        open_things(folder)
    assert complete(error, "ses-things01")


def test_no_mask(copy):
    folder = copy("volumes")
    (folder / "brainmasks/sub-01_space-T1w_brainmask.nii.gz").unlink()
    with pytest.raises(MissingError, match="no brain mask") as error:
        open_things(folder)
    assert complete(error, "volumes")
    tables = copy("figshare")
    expected = open_things(tables)
    (tables / "brainmasks/sub-01_space-T1w_brainmask.nii.gz").unlink()
    things = open_things(tables)  # coordinates say where the voxels are; mm are unknown
    assert np.array_equal(np.argwhere(things.mask), np.argwhere(expected.mask))
    assert np.isnan(things.affine).all()


def test_damaged_hdf5(copy):
    folder = copy("figshare")
    path = folder / "betas_csv/sub-01_ResponseData.h5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="cut off or damaged|no NIfTI file") as error:
        open_things(folder).read()
    assert complete(error, path.name)


def test_hdf5_of_something_else(copy):
    folder = copy("figshare")
    path = folder / "betas_csv/sub-01_ResponseData.h5"
    with h5py.File(path, "w") as file:
        file["ResponseData/axis1"] = np.arange(3)
    with pytest.raises(DataError, match="no response data") as error:
        open_things(folder).read()
    assert complete(error, path.name)


def test_subject_is_named_in_full(root, tmp_path):
    for layout in LAYOUTS:
        with pytest.raises(MissingError, match="no THINGS-fMRI data of subject 2, but of 01, 02") as error:
            open_things(root / layout, "2")
        assert complete(error, layout) and "do: name one of the subjects" in str(error.value)
    with pytest.raises(MissingError, match="no volumes data of subject 01, but of 02"):
        shutil.copytree(root / "figshare", tmp_path / "only")
        for path in (tmp_path / "only").rglob("sub-01*"):
            path.unlink()
        open_things(tmp_path / "only", "01", "volumes")


def test_unknown_things(root, tmp_path):
    with pytest.raises(MissingError, match="no THINGS-fMRI data of subject 07"):
        open_things(root, "07")
    with pytest.raises(DataError, match="layout 'bids'"):
        find_layout(root, "01", "bids")
    with pytest.raises(MissingError):
        open_things(tmp_path / "nowhere")
    with pytest.raises(DataError, match="size 'huge'"):
        write_things(tmp_path / "x", "huge")


def test_real_tables_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("CORTEXLIT_DATA", str(tmp_path))
    for name, entry in module.THINGS_TABLES.items():
        monkeypatch.setitem(module.THINGS_TABLES, name, replace(entry, url=f"http://127.0.0.1:9/{name}"))
    with pytest.raises(MissingError, match="animacy.csv is not on this machine and could not be downloaded"):
        things_table("animacy.csv")
    with pytest.raises(MissingError, match="StimulusMetadata"):
        write_things(tmp_path / "x", "design")
    (tmp_path / "things").mkdir(exist_ok=True)
    (tmp_path / "things/animacy.csv").write_text("uniqueID\n")
    with pytest.raises(DataError, match="other bytes"):
        things_table("animacy.csv")


@pytest.mark.data
def test_the_real_trial_table():
    entries = [THINGS_TABLES[name] for name in ("sub-01_StimulusMetadata.csv", "animacy.csv")]
    if absent := [e.path for e in entries if not (data_home() / e.path).is_file()]:
        pytest.skip(f"no {', '.join(absent)} in CORTEXLIT_DATA (make data)")
    path = things_table("sub-01_StimulusMetadata.csv")
    ratings = load_properties(things_table("animacy.csv"), [*PROPERTIES, "arousal", "size"])
    stimuli = module.index_from_table(path).stimuli
    assert len(stimuli) == 9840 and stimuli["role"].value_counts().to_dict() == {"train": 8640, "test": 1200}
    assert stimuli["concept"].nunique() == 720 and stimuli["image"].nunique() == 8740
    assert (stimuli["image"].map(concept_of) == stimuli["concept"]).all()
    assert ratings.loc[stimuli["concept"].unique()].notna().all().all()
    assert (split_by_session(stimuli).fold >= 0).sum() == 8640


# --- index ---


def test_an_index_checks_itself(root):
    table = open_things(root).index.table
    with pytest.raises(DataError, match="roles"):
        TrialIndex(table.assign(role="dream"))
    with pytest.raises(DataError, match="two concepts"):
        TrialIndex(
            table.assign(
                concept=np.where(
                    table.index == table.index[table["role"] == "test"][0], "x", table["concept"]
                )
            )
        )
    with pytest.raises(DataError, match="has 15 trials"):
        TrialIndex(table.drop(table.index[-1]))


# --- splits ---


@pytest.fixture
def trials(caches):
    return ThingsDataset(caches["figshare"]).trials


def test_concepts_travel_with_all_their_trials(trials):
    split = split_by_concept(trials, folds=4)
    assert (trials.assign(fold=split.fold).groupby("concept")["fold"].nunique() == 1).all()
    tested = np.concatenate([test for _, test in split])
    assert np.array_equal(np.sort(tested), np.arange(96))
    report = split.audit()
    assert (report.query("what in ['image', 'concept']")["shared"] == 0).all()


def test_sessions_leave_test_images_apart(trials):
    split = split_by_session(trials)
    assert ((split.fold == -1) == (trials["role"] == "test")).all()
    for train, test in split:
        assert set(trials["concept"].iloc[test]) == set(trials["concept"].iloc[train])
    report = split.audit()
    assert (report.query("what == 'concept'")["shared"] == 24).all()
    assert (report.query("what in ['image', 'session']")["shared"] == 0).all()


def test_leaks_are_refused(trials):
    order = rng(0, "order").permutation(96)
    with pytest.raises(SplitLeak, match="of the test trials are concerned"):
        audit_units(trials, order[:80], order[80:])
    with pytest.raises(SplitLeak, match="1 trials are in train and test"):
        audit_units(trials, order[:81], order[80:], forbid=())
    fold = split_by_concept(trials).fold.copy()
    fold[0] = (fold[0] + 1) % 5
    with pytest.raises(SplitLeak, match="concepts"):
        Split.from_folds("concept", fold, trials).audit()
    repeated = np.where(trials["session"] == 1, 0, 1)  # test images kept: they recur
    with pytest.raises(SplitLeak, match="images"):
        Split.from_folds("session", repeated, trials).audit()


def test_a_concept_is_not_hidden_by_capitals_or_blanks(trials):
    order = np.argsort(trials["concept"].to_numpy(), kind="stable")
    name = trials["concept"].iloc[order[40]]
    rows = np.flatnonzero(trials["concept"] == name)
    apart = np.setdiff1d(np.arange(96), rows)
    train, test = np.concatenate([apart[:60], rows[:1]]), rows[1:]
    for column, hide in (("concept", str.upper), ("concept", lambda s: f"{s} "), ("image", str.upper)):
        hidden = trials.copy()
        hidden.loc[rows[1:], "concept"] = hide(name) if column == "concept" else "other"
        if column == "image":
            hidden.loc[rows[1:], "image"] = hide(trials["image"].iloc[rows[0]])
        for kind in (object, "string", "category"):  # pandas has several dtypes of text
            with pytest.raises(SplitLeak, match=f"share 1 {column}"):
                audit_units(hidden.astype({column: kind}), train, test, forbid=(column,))
    hidden = trials.copy()
    hidden.loc[rows[1:], "concept"] = name.upper()
    fold = split_by_concept(hidden).fold
    assert len(set(fold[rows])) == 1
    assert np.array_equal(fold, split_by_concept(trials).fold)


def test_z_scores_from_training_rows_do_not_see_the_others(root, tmp_path):
    things = open_things(root, "01", "figshare")
    stimuli = things.index.stimuli
    used = rng(0, "rows").random(len(stimuli)) < 0.7
    everything = ThingsDataset(build_things(things, tmp_path / "all"))
    honest = ThingsDataset(build_things(things, tmp_path / "train", statistics=used))
    raw = ThingsDataset(build_things(things, tmp_path / "raw", zscore="none"))
    session = stimuli["session"].to_numpy() == stimuli["session"].iloc[0]
    known = raw.responses[session & used].astype(float)
    expected = (raw.responses[session] - known.mean(0)) / known.std(0)
    np.testing.assert_allclose(honest.responses[session], expected, rtol=1e-3, atol=1e-3)
    assert np.abs(honest.responses - everything.responses).max() > 0.01
    assert "held out later" in everything.card["zscore_statistics"]
    assert honest.card["zscore_statistics"] == f"{used.sum()} of {len(used)} trials"
    train, test = np.flatnonzero(used), np.flatnonzero(~used)
    for data, seen in ((everything, len(test)), (honest, 0)):
        report = audit_units(data.trials, train, test, forbid=(), statistics=data.statistics).set_index(
            "what"
        )
        assert report.loc["z-score", "shared"] == seen
    with pytest.raises(DataError, match="to take mean and spread from"):
        build_things(things, tmp_path / "none", statistics=stimuli["session"].to_numpy() > 1)
    with pytest.raises(DataError, match="True or False for each trial"):
        build_things(things, tmp_path / "none", statistics=used[1:])


def test_audit_counts(trials):
    train, test = np.flatnonzero(trials["session"] < 3), np.flatnonzero(trials["session"] == 3)
    report = audit_units(trials, train, test, forbid=()).set_index("what")
    assert report.loc["image"].tolist() == [56, 32, 8, 0.25]
    assert report.loc["concept", "shared"] == 24 and report.loc["session", "shared"] == 0


def test_splits_are_stored_with_their_hash(trials, tmp_path):
    split = split_by_concept(trials, seed=3)
    loaded = Split.load(split.save(tmp_path / "split.json"))
    assert loaded.hash == split.hash and np.array_equal(loaded.fold, split.fold) and loaded.seed == 3
    shuffled = trials.sample(frac=1, random_state=0).reset_index(drop=True)
    assert split_by_concept(shuffled, seed=3).hash == split.hash
    path = tmp_path / "split.json"
    path.write_text(
        path.read_text().replace("dog_01s", "dog_02s").replace('"fold": [\n  0', '"fold": [\n  1')
    )
    with pytest.raises(DataError, match="changed after it was saved"):
        Split.load(path)
    with pytest.raises(DataError, match="99 folds"):
        split_by_concept(trials, folds=99)


# --- reliability and truth ---


def test_reliability_looks_at_training_concepts_only(trials):
    g = rng(0, "reliability")
    signal = g.normal(size=(24, 3)) * [0, 1, 3]
    codes = pd.factorize(trials["concept"], sort=True)[0]
    responses = signal[codes] + g.normal(size=(96, 3))
    chosen = sorted(trials["concept"].unique())[:20]
    found = reliability(responses, trials, chosen)
    assert found[0] < 0.6 and found[2] > 0.85
    hidden = ~trials["concept"].isin(chosen) | (trials["role"] == "test")
    changed = responses.copy()
    changed[hidden] = 1e6
    assert np.array_equal(reliability(changed, trials, chosen), found)
    with pytest.raises(DataError, match="2 concepts"):
        reliability(responses, trials, chosen[:2])


def test_truth_describes_the_data(root):
    truth, things = load_subject_truth(root), open_things(root)
    voxels = len(things.voxels)
    assert truth["concept_loadings"].shape == (voxels, 6) and truth["concepts"].shape == (24,)
    signal = np.einsum(
        "vd,de,ve->v",
        truth["concept_loadings"],
        np.cov(truth["latents"].T, ddof=0),
        truth["concept_loadings"],
    )
    signal += (truth["image_loadings"] ** 2).sum(1)
    used = truth["nc_singletrial"] > 0
    assert np.allclose(
        np.median((signal / (1 + signal))[used]), np.median(truth["nc_singletrial"][used]), rtol=0.25
    )
    assert not signal[~used].any() and not truth["informative"][things.rois["V1"]].any()
    stray = ((truth["concept_loadings"] * truth["latent_noise"]) ** 2).sum(1)
    assert np.allclose((truth["smooth_noise"] ** 2).sum(1) + stray + truth["white_noise"], 1)
    assert truth["white_noise"].min() > 0.1
    with pytest.raises(MissingError, match="no ground truth"):
        load_subject_truth(root / "figshare")
