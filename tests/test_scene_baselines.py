"""Baselines and scores of static datasets: slow references, invariances, planted cells, leaks, wrong input."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import Ridge

from cortexlit.core import DataError, MissingError, rng
from cortexlit.data.exchange import export_sensorium2022, import_arrays, import_sensorium2022
from cortexlit.data.scenes import SceneArrays, load_scenes
from cortexlit.evaluation.baselines import gabor_bank
from cortexlit.evaluation.intervals import contributions, spread
from cortexlit.evaluation.scenes import (
    MIN_FEVE,
    as_clips,
    average_table,
    correlation_table,
    feve_table,
    gabor_energies,
    other_repeats,
    picture_ridge,
    scene_baselines,
    score_scenes,
)  # fmt: skip
from cortexlit.metrics import (
    correlation_to_average,
    feve,
    flattened_correlation,
    mean_score,
)

PICTURES, REPEATS, CELLS, SIZE = 60, 6, 5, (6, 8)
CORRELATIONS = ("single-trial correlation", "correlation to average")


def toy_arrays(seed: int = 0) -> dict:
    "Linear cells on noise pictures, shown in random order to a mouse that runs."
    draw = rng(seed, "toy scene scores")
    images = draw.normal(size=(PICTURES, *SIZE)).astype("float32")
    image_id = draw.permutation(np.repeat(np.arange(PICTURES), REPEATS))
    weights = draw.normal(size=(SIZE[0] * SIZE[1], CELLS)) / 8
    running = draw.normal(5, 2, (len(image_id), 1))
    drive = (images.reshape(PICTURES, -1) @ weights)[image_id] + 0.2 * running
    return {
        "images": images,
        "responses": 3 + drive + 0.3 * draw.normal(size=drive.shape),
        "image_id": image_id,
        "behavior": running,
        "behavior_names": ["running"],
    }


@pytest.fixture(scope="module")
def arrays():
    return toy_arrays()


@pytest.fixture(scope="module", params=["images", "presentations"])
def folder(request, arrays, tmp_path_factory):
    return import_arrays(**arrays, out=tmp_path_factory.mktemp(request.param) / "data", split=request.param)


def random_tier(seed: int, pictures: int = 7, repeats: int = 4, neurons: int = 3):
    "Predictions, labels, image: signal and noise, presentations out of order."
    draw = rng(seed, "random tier")
    image = draw.permutation(np.repeat(np.arange(pictures), repeats))
    signal = draw.normal(size=(pictures, neurons))
    labels = 1 + signal[image] + 0.7 * draw.normal(size=(len(image), neurons))
    return 2 + 0.5 * signal[image] + 0.5 * draw.normal(size=labels.shape), labels, image


# ------------------------------------------------------------------ tables of contributions


def slow_feve(guess, labels, image):
    "One neuron at a time, with plain loops."
    found = []
    for p, y in zip(guess.T, labels.T, strict=True):
        error, noise = 0.0, 0.0
        for a, b in zip(p, y, strict=True):
            error += (a - b) ** 2 / len(y)
        for picture in set(image.tolist()):
            group = [b for b, i in zip(y, image, strict=True) if i == picture]
            mean = sum(group) / len(group)
            noise += len(group) * sum((b - mean) ** 2 for b in group) / (len(group) - 1) / len(y)
        total = y.var(ddof=1)
        found.append(1 - (error - noise) / (total - noise) if total - noise > 0.15 * total else np.nan)
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
def test_the_columns_of_the_tables_average_to_the_metrics(seed):
    guess, labels, image = random_tier(seed)
    slow = [np.corrcoef(a, b)[0, 1] for a, b in zip(guess.T, labels.T, strict=True)]
    np.testing.assert_allclose(correlation_table(guess, labels).mean(0), slow)
    np.testing.assert_allclose(
        slow, flattened_correlation(guess[..., None], labels[..., None], reduce=None), rtol=1e-6
    )
    means = [[v[image == p].mean(0) for p in range(7)] for v in (guess, labels)]
    slow = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(np.array(m).T for m in means), strict=True)]
    np.testing.assert_allclose(average_table(guess, labels, image).mean(0), slow)
    np.testing.assert_allclose(
        slow, correlation_to_average(guess[..., None], labels[..., None], image, reduce=None), rtol=1e-6
    )
    found = feve_table(guess, labels, image).mean(0)
    np.testing.assert_allclose(found, slow_feve(guess, labels, image))
    np.testing.assert_allclose(
        found, feve(guess[..., None], labels[..., None], image, reduce=None), rtol=1e-6
    )


def test_feve_with_unequal_numbers_of_repeats():
    guess, labels, image = random_tier(5)
    keep = np.delete(np.arange(len(image)), np.flatnonzero(image == 2)[:2])
    found = feve_table(guess[keep], labels[keep], image[keep]).mean(0)
    np.testing.assert_allclose(found, slow_feve(guess[keep], labels[keep], image[keep]))


def influence_by_leaving_out(score, n):
    "Each sample's pull on a score, by giving it slightly less weight than the others."
    step, even = 1e-5, np.full(n, 1 / n)
    pulls = []
    for i in range(n):
        less = even * (1 - step)
        less[i] += step
        pulls.append((score(less) - score(even)) / step)
    return np.array(pulls)


def test_an_entry_is_the_score_plus_the_influence_of_its_presentation():
    guess, labels, _ = random_tier(1, neurons=1)
    p, y = guess[:, 0], labels[:, 0]

    def correlation(w):
        a, b = p - w @ p, y - w @ y
        return (w @ (a * b)) / np.sqrt((w @ a**2) * (w @ b**2))

    table = correlation_table(guess, labels)[:, 0]
    pulls = influence_by_leaving_out(correlation, len(p))
    np.testing.assert_allclose(table - table.mean(), pulls, atol=1e-3)


@pytest.mark.parametrize("table", ["correlation", "feve"])
def test_the_error_is_that_of_starting_over_with_drawn_pictures(table):
    many = 120  # influence is the first term of a series
    guess, labels, image = random_tier(2, pictures=many, repeats=5, neurons=4)
    guess = labels.mean(0) + 0.6 * (guess - guess.mean(0))
    make = {
        "correlation": lambda p, y, i: correlation_table(p, y),
        "feve": lambda p, y, i: feve_table(p, y, i),
    }[table]
    each = contributions(make(guess, labels, image)[None], image)[1].sum(-1, keepdims=True)  # these neurons
    error = spread(each[None]).error[0]
    draw, slow = rng(0, "starting over"), []
    rows = [np.flatnonzero(image == p) for p in range(many)]
    for _ in range(200):
        drawn = [rows[k] for k in draw.integers(many, size=many)]
        ids = np.repeat(np.arange(many), [len(r) for r in drawn])  # a picture drawn twice is two pictures
        at = np.concatenate(drawn)
        slow.append(np.nanmean(make(guess[at], labels[at], ids).mean(0)))
    assert error == pytest.approx(np.std(slow), rel=0.15)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), shift=st.floats(-50, 50), neurons=st.integers(1, 4)
)  # fmt: skip
def test_invariances_of_the_tables(seed, scale, shift, neurons):
    guess, labels, image = random_tier(seed, neurons=neurons)
    table = correlation_table(guess, labels)
    np.testing.assert_allclose(correlation_table(shift + scale * guess, labels), table, atol=1e-6)
    np.testing.assert_allclose(correlation_table(guess, shift + scale * labels), table, atol=1e-6)
    np.testing.assert_allclose(correlation_table(labels, guess), table, atol=1e-9)
    np.testing.assert_allclose(correlation_table(-guess, labels).mean(0), -table.mean(0), atol=1e-9)
    order = rng(seed, "order").permutation(len(image))
    np.testing.assert_allclose(correlation_table(guess[order], labels[order]), table[order], atol=1e-9)
    np.testing.assert_allclose(
        average_table(guess[order], labels[order], image[order]), average_table(guess, labels, image), atol=1e-9
    )  # fmt: skip
    explained = feve_table(guess, labels, image)
    np.testing.assert_allclose(
        feve_table(shift + scale * guess, shift + scale * labels, image), explained, atol=1e-5
    )
    np.testing.assert_allclose(
        feve_table(guess[order], labels[order], image[order]), explained[order], atol=1e-9
    )
    np.testing.assert_allclose(feve_table(guess, labels, image + 100), explained)  # numbers are only names


def test_a_constant_prediction_scores_zero_and_a_constant_label_nothing():
    guess, labels, image = random_tier(0)
    guess[:, 1] = 4
    table = correlation_table(guess, labels)
    assert (table[:, 1] == 0).all() and np.isfinite(table[:, [0, 2]]).all() and table[:, [0, 2]].any(0).all()
    np.testing.assert_allclose(mean_score(table), table.mean())
    still = labels.copy()
    still[:, 2] = 0.1
    assert np.isnan(correlation_table(guess, still)[:, 2]).all()
    np.testing.assert_allclose(correlation_table(guess * 1e-9, labels), table, atol=1e-9)
    centre = np.broadcast_to(labels.mean(0), labels.shape)
    assert np.nanmax(np.abs(feve_table(centre, labels, image).mean(0))) < 0.2  # the mean explains nothing


def test_other_repeats_against_a_loop():
    _, labels, image = random_tier(4)
    image[0] = 99  # shown once
    found = other_repeats(labels, image)
    assert np.isnan(found[0]).all()
    for i in range(1, len(image)):
        others = [labels[j] for j in range(len(image)) if image[j] == image[i] and j != i]
        np.testing.assert_allclose(found[i], np.mean(others, 0))


# ------------------------------------------------------------------ models


def test_ridge_on_means_is_ridge_on_all_presentations():
    draw = rng(0, "ridge on means")
    features = draw.normal(size=(9, 4))
    image = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4])
    train = SceneArrays(features, image, image, image, draw.normal(size=(9, 2)).astype("float32"), None, None)
    seen = np.array([5, 6, 6, 7])
    validation = replace(train, image=seen, labels=draw.normal(size=(4, 2)).astype("float32"))
    found, chosen = picture_ridge(features, train, validation, np.array([8, 5, 8]), alphas=[1.0, 30.0])
    mean, std = features[image].mean(0), features[image].std(0)
    z = (features - mean) / std
    for neuron in range(2):
        models = {a: Ridge(alpha=a).fit(z[image], train.labels[:, neuron]) for a in (1.0, 30.0)}
        errors = {
            a: ((m.predict(z[seen]) - validation.labels[:, neuron]) ** 2).mean() for a, m in models.items()
        }
        best = min(errors, key=errors.get)
        assert chosen[neuron] == best
        np.testing.assert_allclose(found[:, neuron], models[best].predict(z[[8, 5, 8]]), rtol=1e-4, atol=1e-5)


def test_energies_against_the_sums_they_stand_for():
    images = rng(0, "energies").normal(size=(3, *SIZE)).astype("float32")
    bank = gabor_bank(SIZE, (4.0, 8.0), 3)
    found = gabor_energies(images, (4.0, 8.0), 3)
    assert found.shape == (3, 3 * len(bank)) and found.dtype == np.float32
    for k in (0, len(bank) // 2, len(bank) - 1):
        even = (images[1] * bank[k].real).sum()
        odd = -(images[1] * bank[k].imag).sum()
        expected = [np.hypot(even, odd), even, odd]
        np.testing.assert_allclose(found[1, [k, len(bank) + k, 2 * len(bank) + k]], expected, atol=1e-5)
    np.testing.assert_allclose(
        gabor_energies(-images, (4.0, 8.0), 3)[:, : len(bank)], found[:, : len(bank)], atol=1e-5
    )  # contrast reversed: same energy


def test_the_bank_grows_with_the_picture():
    images = rng(0, "sizes").normal(size=(2, 36, 64)).astype("float32")
    small, large = gabor_energies(images), gabor_energies(images.repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(small, gabor_energies(images, (6.0, 12.0, 24.0)))
    assert small.shape == large.shape
    n = small.shape[1] // 3
    assert np.corrcoef(small[0, :n], large[0, :n])[0, 1] > 0.95  # the same places, twice as wide


def test_planted_cells_are_recovered():
    draw = rng(0, "planted")
    images = gaussian_filter(draw.normal(size=(400, 12, 12)), (0, 1, 1)).astype("float32") * 3
    pair = np.einsum("fyx,nyx->nf", gabor_bank((12, 12), (6.0,)), images)[:, 5]
    planted = np.stack([pair.real, np.abs(pair)], 1)
    labels = (planted / planted.std(0) + 0.05 * draw.normal(size=planted.shape)).astype("float32")
    parts = [
        SceneArrays(images, np.arange(a, b), np.arange(a, b), np.zeros(b - a, int), labels[a:b], None, None)
        for a, b in ((0, 280), (280, 340), (340, 400))
    ]
    scores = {}
    for name, features in (("pixels", images.reshape(400, -1)), ("energies", gabor_energies(images))):
        guess, _ = picture_ridge(features, *parts[:2], parts[2].image)
        scores[name] = [np.corrcoef(a, b)[0, 1] for a, b in zip(guess.T, planted[340:].T, strict=True)]
    assert scores["pixels"][0] > 0.95 and abs(scores["pixels"][1]) < 0.4
    assert scores["energies"][0] > 0.9 and scores["energies"][1] > 0.8


def test_a_tier_as_clips_of_one_frame(folder):
    data = load_scenes(folder, "test")
    clips = as_clips(data)
    assert clips.labels.shape == (*data.labels.shape, 1) and clips.videos.shape == (PICTURES, 1, *SIZE)
    np.testing.assert_array_equal(clips.behavior[..., 0], data.behavior)
    assert clips.pupil_center is None


# ------------------------------------------------------------------ the sheet


def test_rows_of_the_sheet(folder):
    sheet = score_scenes(folder).table()
    split = sheet["split"].iloc[0]
    table = sheet.set_index(["model", "metric"])
    assert len(table) == 23 and (sheet["tier"] == "test").all() and sheet["split_hash"].nunique() == 1
    row = table.loc[("picture mean", CORRELATIONS[0])]
    if split == "images":
        assert np.isnan(row["value"]) and "never shown in train" in row["note"]
        assert row["baseline"] == table.loc[("pixel ridge", CORRELATIONS[0]), "value"]
    else:
        assert row["value"] > 0.5 and row["baseline"] == row["value"]
    assert tuple(table.loc[("train mean", CORRELATIONS[0]), ["value", "undefined"]]) == (0, 0)
    assert "would be compared with" in table.loc[("other repeats", "FEVE"), "note"]
    scored = table.loc[("energy + behaviour", CORRELATIONS[0])]
    assert scored["low"] < scored["value"] < scored["high"]
    test = load_scenes(folder, "test")
    assert (scored["n_clips"], scored["n_samples"], scored["n_neurons"]) == (
        len(np.unique(test.image)), len(test.image), CELLS,
    )  # fmt: skip
    for metric in CORRELATIONS:  # these cells are linear and hardly noisy
        assert table.loc[("pixel ridge", metric), "value"] > 0.25
        assert table.loc[("pixel ridge", metric), "ceiling"] > 0.8
    parts = [load_scenes(folder, t) for t in ("train", "validation", "test")]
    labels, image = (np.concatenate([getattr(d, k) for d in parts]) for k in ("labels", "image"))
    others = np.stack([
        (labels[image == i].sum(0) - y) / ((image == i).sum() - 1) for i, y in zip(test.image, test.labels, strict=True)
    ])  # fmt: skip
    oracle = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(others.T, test.labels.T, strict=True)])
    np.testing.assert_allclose(table.loc[("other repeats", CORRELATIONS[0]), "value"], oracle, rtol=1e-4)
    joint, alone = (
        table.loc[(m, CORRELATIONS[0]), "value"] for m in ("energy + behaviour", "behaviour ridge")
    )
    assert joint > alone > 0.1


def test_a_perfect_model_reaches_the_ceiling(tmp_path):
    draw = rng(0, "ceiling")
    signal, image = draw.normal(size=(60, 40)), np.repeat(np.arange(60), 10)
    noisy = signal[image] + 1.5 * draw.normal(size=(600, 40))
    out = import_arrays(
        draw.normal(size=(60, 4, 4)), noisy, tmp_path / "data", image_id=image, split="presentations"
    )
    test = load_scenes(out, "test")
    truth = signal[test.scene] / noisy.std(0)
    table = score_scenes(out, {"truth": truth}).table().set_index(["model", "metric"])
    for metric in CORRELATIONS:
        row = table.loc[("truth", metric)]
        assert abs(row["value"] - row["ceiling"]) < 0.04
    counts = np.unique(test.image, return_counts=True)[1]
    assert counts.min() == 1  # left out of the averages
    shown = 1 / np.mean(1 / counts[counts > 1])
    assert table.loc[("truth", CORRELATIONS[1]), "n_clips"] == (counts > 1).sum()
    for metric, repeats in zip(CORRELATIONS, (1, shown), strict=True):
        expected = np.sqrt(1 / (1 + 1.5**2 / repeats))
        assert abs(table.loc[("truth", metric), "ceiling"] - expected) < 0.05
    oracle = table.loc[("other repeats", CORRELATIONS[0]), "value"]
    assert oracle < table.loc[("truth", CORRELATIONS[0]), "value"]


def test_models_enter_by_name_and_seed(folder):
    test = load_scenes(folder, "test")
    draw = rng(0, "models")
    guesses = [test.labels + k * draw.normal(size=test.labels.shape) for k in (1, 3)]
    rows = score_scenes(folder, {("net", 0): guesses[0], ("net", 1): guesses[1], "plain": guesses[0]}).table()
    rows = rows[rows["metric"] == CORRELATIONS[0]]
    found = rows[rows["model"].isin(["net", "plain"])]
    assert found["seed"].tolist()[:2] == [0, 1] and found["seed"].isna().tolist() == [False, False, True]
    for value, guess in zip(found["value"], guesses, strict=False):
        slow = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(guess.T, test.labels.T, strict=True)])
        np.testing.assert_allclose(value, slow)


def test_test_responses_do_not_change_predictions(arrays, tmp_path):
    tiers = np.array(["train"] * 42 + ["validation"] * 6 + ["test"] * 12)[arrays["image_id"]]
    first = import_arrays(**arrays, out=tmp_path / "a", split=list(tiers))
    other = arrays["responses"].copy()
    other[tiers == "test"] = rng(9, "other").normal(size=other[tiers == "test"].shape)
    second = import_arrays(**(arrays | {"responses": other}), out=tmp_path / "b", split=list(tiers))
    before, after = scene_baselines(first), scene_baselines(second)
    assert not np.allclose(load_scenes(first, "test").labels, load_scenes(second, "test").labels)
    assert before.keys() == after.keys()
    for name, guess in before.items():
        np.testing.assert_array_equal(guess, after[name])
    changed = arrays["responses"].copy()
    changed[tiers == "validation"] = rng(9, "validation").normal(size=changed[tiers == "validation"].shape)
    third = scene_baselines(
        import_arrays(**(arrays | {"responses": changed}), out=tmp_path / "c", split=list(tiers))
    )
    assert not np.allclose(before["pixel ridge"], third["pixel ridge"])  # the check above can fail


def test_behaviour_of_the_test_tier_does_not_teach(arrays, tmp_path):
    tiers = np.array(["train"] * 42 + ["validation"] * 6 + ["test"] * 12)[arrays["image_id"]]
    first = scene_baselines(import_arrays(**arrays, out=tmp_path / "a", split=list(tiers)))
    moved = arrays["behavior"].copy()
    moved[tiers == "test"] += 3
    second = scene_baselines(
        import_arrays(**(arrays | {"behavior": moved}), out=tmp_path / "b", split=list(tiers))
    )
    np.testing.assert_array_equal(first["energy ridge"], second["energy ridge"])
    shift = second["behaviour ridge"] - first["behaviour ridge"]
    np.testing.assert_allclose(second["energy + behaviour"] - first["energy + behaviour"], shift, atol=1e-5)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-4)  # linear, same slope


@pytest.mark.parametrize("repeated", [MIN_FEVE - 1, MIN_FEVE])
def test_no_feve_from_a_few_pictures(tmp_path, repeated):
    "Of the pictures of each tier, so many are shown twice, and one once."
    draw, count = rng(0, "few"), 3 * (repeated + 1)
    image = np.repeat(np.arange(count), np.where(np.arange(count) < count - 3, 2, 1))
    tier = np.array(["train", "validation", "test"])[image % 3]
    signal = draw.normal(size=(count, 4)).astype("float32")
    responses = signal[image] + 0.1 * draw.normal(size=(len(image), 4))
    out = import_arrays(
        draw.normal(size=(count, 9, 9)), responses, tmp_path / "data", image_id=image, split=list(tier)
    )
    mine = {"mine": signal[load_scenes(out, "test").image]}
    row = score_scenes(out, mine).table().set_index(["model", "metric"]).loc[("mine", "FEVE")]
    if repeated < MIN_FEVE:
        told = f"{repeated} pictures were shown twice or more, {MIN_FEVE} are needed"
        assert np.isnan(row["value"]) and np.isnan(row["baseline"]) and row["note"] == told
    else:
        assert row["value"] > 0.9 and row["n_clips"] == repeated


def test_without_behaviour_and_without_repeats(tmp_path):
    draw = rng(0, "bare")
    out = import_arrays(draw.normal(size=(60, 5, 5)), draw.normal(size=(60, 3)), tmp_path / "data")
    table = score_scenes(out, name="bare").table().set_index(["model", "metric"])
    assert "was measured" in table.loc[("behaviour ridge", CORRELATIONS[0]), "note"]
    assert "needs repeats" in table.loc[("pixel ridge", "FEVE"), "note"]
    assert "shown once" in table.loc[("other repeats", CORRELATIONS[0]), "note"]
    assert np.isfinite(table.loc[("pixel ridge", CORRELATIONS[0]), "value"])
    assert (
        np.isnan(table.loc[("pixel ridge", CORRELATIONS[0]), "ceiling"])
        and (table["dataset"] == "bare").all()
    )


def test_scores_survive_the_layout_of_sensorium_2022(folder, tmp_path):
    tree = export_sensorium2022(folder, tmp_path / "tree")
    back = import_sensorium2022(tree, tmp_path / "back", allow_shared_stimuli=True)
    columns = ["model", "metric", "value", "low", "high", "ceiling", "n_clips", "n_samples"]
    before, after = (score_scenes(f).table()[columns] for f in (folder, back))
    pd.testing.assert_frame_equal(before, after)


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda y: y[:-1], "a row for each presentation"),
        (lambda y: y[:, :2], "a column for each neuron"),
        (lambda y: y[..., None], "of shape"),
        (lambda y: np.where(np.arange(y.size).reshape(y.shape) == 7, np.nan, y), "presentation 1, neuron 2"),
        (lambda y: np.where(np.arange(y.size).reshape(y.shape) == 7, np.inf, y), "1 values are not finite"),
        (lambda y: y.astype(str), "predictions of net"),
    ],
)
def test_wrong_predictions_are_refused(folder, wrong, words):
    with pytest.raises(DataError, match=words):
        score_scenes(folder, {"net": wrong(load_scenes(folder, "test").labels)})


def test_a_model_cannot_take_the_name_of_a_baseline(folder):
    labels = load_scenes(folder, "test").labels
    for name in ("pixel ridge", "other repeats", "ceiling: split halves"):
        with pytest.raises(DataError, match="another name"):
            score_scenes(folder, {name: labels})
    assert len(score_scenes(folder, {("pixel ridge", 0): labels})) == 26  # a seed of its own is another row


def test_a_tier_is_missing(arrays, tmp_path):
    tiers = np.where(arrays["image_id"] < 45, "train", "test")
    out = import_arrays(**arrays, out=tmp_path / "data", split=list(tiers))
    with pytest.raises((DataError, MissingError), match="validation"):
        score_scenes(out)


def test_a_damaged_folder_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "data")
    samples = pd.read_csv(broken / "samples.csv")
    samples["tier"] = samples["tier"].sample(frac=1, random_state=0).to_numpy()
    samples.to_csv(broken / "samples.csv", index=False)
    with pytest.raises(DataError):
        score_scenes(broken)
