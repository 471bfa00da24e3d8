"""What a model is fed: recorded in its config, read from published options, compared with every dataset it is given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset
from toy_training import FRAMES, tiny_model
from toys import toy_recording

import cortexlit as cx
from cortexlit.core import DataError
from cortexlit.data.clips import MouseDataset, build_dataset, load_tier
from cortexlit.data.exchange import import_arrays
from cortexlit.data.inputs import InputScheme, check_inputs, comparable, open_for, scheme_of
from cortexlit.metrics import scored_frames
from cortexlit.models.v1t import V1T, V1TConfig, published_v1t_config
from cortexlit.models.viv1t import ViV1T, ViV1TConfig, published_viv1t_config
from cortexlit.training.features import cached_features
from cortexlit.training.heads import at_rate, fresh_head, train_head
from cortexlit.training.lora import Grid, clip_folds
from cortexlit.training.recipes import Recipe
from cortexlit.training.trainer import fit, last_frames, predict

pytestmark = pytest.mark.usefixtures("no_curves")

LAST = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    "A dataset folder, and a core that was taught with `closed-loop`."
    folder = tmp_path_factory.mktemp("inputs")
    build_dataset(toy_recording(), folder / "data", clip_frames=FRAMES, size=(10, 14), split="stimuli", gap=5)
    core = tiny_model(core_state=False)
    core.config.normalisation = "closed-loop"
    core.save_core(folder / "core")
    return folder / "data", folder / "core"


@pytest.fixture(autouse=True)
def private(private_folders):
    "Heads and features of these tests are not those of the checkout."


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    "The normalisations with which datasets are opened from now on."
    found, init = [], MouseDataset.__init__

    def spy(self, root, tier, normalisation="range"):
        found.append(normalisation)
        init(self, root, tier, normalisation)

    monkeypatch.setattr(MouseDataset, "__init__", spy)
    return found


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"transform_mode": 1}, "viv1t-standardised"),
        ({"transform_mode": 2}, "viv1t"),
        ({"transform_mode": 3}, None),
        ({"transform_input": 1}, "closed-loop"),
        ({}, None),
    ],
)
def test_published_options_say_what_was_fed(given, name):
    config = published_viv1t_config(given)
    assert (config.normalisation, config.channels, config.rate) == (name, ["pupil_area", "running"], 30.0)


def test_weights_alone_say_nothing_and_are_not_guessed_at(inputs, tmp_path):
    root, core = inputs
    ViV1T.from_published(core, core_only=True, normalisation=None).save_core(tmp_path / "silent")
    with pytest.raises(DataError, match="do not say what they were fed") as error:
        train_head(root, tmp_path / "silent", last=LAST, epochs=1)
    assert 'normalisation="..."' in str(error.value)


def test_everything_that_trains_opens_folders_as_the_core_was_taught(inputs, tmp_path, opened):
    root, core = inputs
    head = train_head(root, core, last=LAST, epochs=1, batch_size=4, out=tmp_path / "head", progress=False)
    fit(
        head.model,
        root,
        adapt="full",
        last=LAST,
        epochs=1,
        batch_size=4,
        out=tmp_path / "full",
        progress=False,
    )
    clip_folds(root, 2, 0, head.model)
    grid = Grid(root, [Recipe("full", {"adapt": "full", "lr": 0.01, "schedule": "cosine", "epochs": 1})], [0], core=core, out=tmp_path / "grid", last=LAST,
                head={"epochs": 1}, batch_size=4)  # fmt: skip
    grid.run(progress=False).predictions()
    assert set(opened) == {"closed-loop"}
    assert head.model.config.normalisation == "closed-loop"
    assert ViV1T.from_pretrained(head.best).config.normalisation == "closed-loop"


def test_a_head_writes_down_channels_and_rate(inputs):
    model = fresh_head(*inputs)
    card = MouseDataset(inputs[0], "train", "closed-loop")
    assert model.config.channels == card.channels["behavior"]
    assert model.config.rate == card.card["rate"]
    assert scheme_of(model.config) == InputScheme(
        "closed-loop", tuple(model.config.channels), (10, 14), model.config.rate
    )


@pytest.mark.parametrize("use", ["fit", "predict", "features", "subset", "several"])
def test_another_normalisation_is_refused_wherever_a_dataset_is_used(inputs, tmp_path, use):
    model, wrong = fresh_head(*inputs), [MouseDataset(inputs[0], tier) for tier in ("train", "validation")]
    uses = {
        "fit": lambda: fit(model, tuple(wrong), last=LAST, epochs=1, out=tmp_path / "x"),
        "predict": lambda: predict(model, wrong[0], LAST),
        "features": lambda: cached_features(model, wrong[0], tmp_path / "f", LAST, progress=False),
        "subset": lambda: predict(model, Subset(wrong[0], [0]), LAST),
        "several": lambda: predict(model, ConcatDataset(wrong), LAST),
    }
    with pytest.raises(DataError, match="'closed-loop', with which the model was taught"):
        uses[use]()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 12.0}, "frames per second"),
        ({"size": (12, 14)}, "frames of 10 x 14 pixels"),
        ({"channels": ["pupil_area", "running"], "core_state": True}, "behaviour channels are"),
    ],
)
def test_another_clock_size_or_order_is_refused(inputs, options, words):
    known = {
        "normalisation": "range",
        "channels": None,
        "core_state": False,
        "behavior_channels": 2,
        "pupil_channels": 2,
    }
    config = ViV1TConfig.from_dict(fresh_head(*inputs).config.to_dict() | known | options)
    with pytest.raises(DataError, match=words) as error:
        open_for(config, inputs[0], "train")
    assert "do: " in str(error.value)


def test_a_rate_within_five_percent_is_the_same_clock(inputs):
    config = fresh_head(*inputs).config
    for share, fits in ((1.04, True), (0.96, True), (1.06, False), (0.94, False)):
        other = ViV1TConfig.from_dict(config.to_dict() | {"rate": share * config.rate})
        if fits:
            open_for(other, inputs[0], "train")
        else:
            with pytest.raises(DataError, match="frames per second"):
                open_for(other, inputs[0], "train")


def test_a_copy_of_a_core_at_another_rate_says_so(inputs, tmp_path):
    copy = ViV1T.from_published(at_rate(inputs[1], 16, tmp_path / "copy"), core_only=True)
    was = ViV1T.from_published(inputs[1], core_only=True)
    assert copy.config.rate == 16.0
    assert all((copy.core.state_dict()[k] == v).all() for k, v in was.core.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalisation": 3}, "normalisation=3"),
        ({"rate": 0}, "rate=0"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"rate": True}, "rate=True"),
        ({"channels": ["running"]}, "channels="),
        ({"channels": [1, 2]}, "channels="),
    ],
)
def test_options_that_cannot_be_true_are_refused(options, words):
    with pytest.raises(DataError, match=words):
        ViV1TConfig(**options)


def test_an_unknown_normalisation_is_named(inputs):
    with pytest.raises(DataError, match="minmax"):
        open_for(ViV1TConfig(normalisation="minmax"), inputs[0], "train")


def test_models_without_a_scheme_and_other_datasets_are_left_alone(inputs):
    check_inputs(object(), MouseDataset(inputs[0], "train"))
    check_inputs(fresh_head(*inputs), [{"video": None}])


def test_predictions_come_back_in_one_unit(inputs):
    for scheme in ("range", "closed-loop", "viv1t-standardised"):
        data = MouseDataset(inputs[0], "train", scheme)
        labels = np.stack([data.read(i, "responses") for i in range(len(data))])
        plain = load_tier(inputs[0], "train").labels
        np.testing.assert_allclose(comparable(data, labels[..., -LAST:]), plain[..., -LAST:], rtol=1e-4)
        if scheme == "viv1t-standardised":
            assert not np.allclose(labels, plain, rtol=1e-2)


def test_nothing_that_trains_opens_a_folder_past_the_model():
    "`MouseDataset(...)` in the library's training would take the default normalisation, whatever the core was taught."
    # the hash of a folder; clips dealt to folds without a model; the shapes for a model that is yet to be made
    known = {"folds.py": 1, "lora.py": 1, "films.py": 1}
    root = Path(__file__).resolve().parents[1] / "cortexlit"
    files = [*(root / "training").glob("*.py"), root / "cli.py", *(root / "commands").glob("*.py")]
    found = {path.name: path.read_text(encoding="utf-8").count("MouseDataset(") for path in files}
    assert {name: n for name, n in found.items() if n} == known


def test_nobody_has_to_say_how_many_frames_count(inputs, tmp_path):
    "As many as a sheet scores: 66 of 140, in proportion for other lengths."
    assert last_frames(None, [{"labels": torch.zeros(3, 140)}]) == 66
    assert last_frames(5, []) == 5 and last_frames(None, [{"labels": torch.zeros(3)}]) == 66
    head = train_head(*inputs, epochs=1, batch_size=4, out=tmp_path / "head", progress=False)
    assert head.model.config.loss_frames == scored_frames(FRAMES) == 9
    test = open_for(head.model, inputs[0], "test")
    assert predict(head.model, test).shape[-1] == 9
    full = Recipe("full", {"adapt": "full", "lr": 0.01, "schedule": "cosine", "epochs": 1})
    assert Grid(inputs[0], [full], [0], core=inputs[1], out=tmp_path / "grid").last == 9


def test_a_core_that_skips_frames_is_not_scored_as_if_it_answered_all(inputs, tmp_path):
    core = tiny_model(core_state=False, stride=(2, 3, 3))
    core.save_core(tmp_path / "core")
    head = train_head(
        inputs[0], tmp_path / "core", last=6, epochs=1, batch_size=4, out=tmp_path / "head", progress=False
    )
    with pytest.raises(DataError, match="one frame in 2"):
        cx.score(inputs[0], head)


# --- pictures

SEES = {"size": (10, 14), "patch": 4, "stride": 2, "emb_dim": 8, "heads": 1, "mlp_dim": 8, "depth": 1}
SEES |= {"behavior": "block-mlp", "behavior_channels": 2, "pupil_channels": 0, "shift": "none"}
SEES |= {"channels": ["pupil_area", "running"]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    "Pictures with pupil and running, in the order of the file: running first."
    draw = np.random.default_rng(0)
    return import_arrays(
        draw.uniform(0, 255, (30, 10, 14)), draw.gamma(2, 1, (30, 3)), tmp_path_factory.mktemp("scenes") / "data",
        behavior=draw.gamma(2, 1, (30, 2)), behavior_names=["running", "pupil_area"], image_id=np.arange(30),
    )  # fmt: skip


def test_pictures_are_opened_for_a_v1t_and_its_config_says_what_it_is_fed(scenes, tmp_path):
    model = V1T(V1TConfig({"data": 3}, **SEES))
    opened = open_for(model, scenes, "train")
    assert scheme_of(model.config) == InputScheme("standardised", ("pupil_area", "running"), (10, 14), None)
    check_inputs(model, Subset(opened, [0]))
    model.save_pretrained(tmp_path / "saved")
    assert scheme_of(V1T.from_pretrained(tmp_path / "saved").config) == scheme_of(model.config)
    fed = published_v1t_config({"patch_size": 8})
    assert (fed.normalisation, fed.channels) == (
        "standardised",
        ["pupil_area", "pupil_area_change", "running"],
    )
    run = fit(model, scenes, adapt="full", epochs=1, batch_size=8, out=tmp_path / "run", progress=False)
    assert run.model.config.channels == ["pupil_area", "running"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalisation": None}, "do not say what they were fed"),
        ({"normalisation": "range"}, "'range', with which the model was taught"),
        ({"channels": ["running", "pupil_area"]}, "behaviour channels are"),
        ({"size": (12, 14)}, "pictures of 10 x 14 pixels"),
    ],
)
def test_pictures_that_do_not_match_are_refused(scenes, options, words):
    with pytest.raises(DataError, match=words):
        open_for(V1TConfig({"data": 3}, **SEES | options), scenes, "train")


def test_movies_are_no_pictures(scenes, inputs):
    with pytest.raises(DataError, match="a folder of pictures"):
        check_inputs(tiny_model(core_state=False), open_for(V1TConfig({}, **SEES), scenes, "train"))
    with pytest.raises(DataError, match="wrong kind of folder"):
        open_for(V1TConfig({}, **SEES), inputs[0], "train")
    with pytest.raises(DataError, match="names of 2 behaviour channels"):
        V1TConfig({}, **SEES | {"channels": ["running"]})
