"""Cores and readouts of one's own: the contract, what breaks it, and the whole way from `fit` to a sheet."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from toy_training import FRAMES, LAST, SIZE, Toy, tiers, tiny_model, weights
from toys import toy_recording

import cortexlit as cx
from cortexlit.core import DataError
from cortexlit.data.exchange import import_arrays
from cortexlit.data.inputs import open_for
from cortexlit.models import readouts
from cortexlit.models.adapters import Adapters
from cortexlit.models.parts import ConvCore, FactorisedReadout
from cortexlit.models.readouts import own_code, part_named, register_core, register_readout
from cortexlit.models.v1t import V1T, V1TConfig
from cortexlit.models.viv1t import ViV1T, ViV1TConfig
from cortexlit.training.features import cached_features
from cortexlit.training.heads import reverse_correlate
from cortexlit.training.recipes import Recipe
from cortexlit.training.trainer import best_folder, fit, model_content, predict

pytestmark = pytest.mark.usefixtures("no_curves")

CONV = {"core": "conv", "core_options": {"layers": 2, "kernel": 3, "taps": 3}}
FACTORISED = {"readout": "factorised", "readout_options": {"l1": 0.01}, "shifter": False}
BLIND = {"behavior": "none", "behavior_channels": 0, "pupil_channels": 0, "shift": "none"}
QUICK = {"last": LAST, "lr": 0.01, "batch_size": 2, "progress": False}


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    "What a test registers is forgotten after it."
    monkeypatch.setattr(readouts, "CORES", dict(readouts.CORES))
    monkeypatch.setattr(readouts, "READOUTS", dict(readouts.READOUTS))


class Mean(nn.Module):
    "A student's core, for movies and pictures: brightness in blocks of 2 x 2, scaled per channel."

    def __init__(self, config, power=1):
        super().__init__()
        self.power = power
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, config.emb_dim))

    def forward(self, video, state):
        frames = video.flatten(0, 2) if video.ndim == 5 else video.flatten(0, 1)
        small = nn.functional.avg_pool2d(frames[:, None], 2)[:, 0] ** self.power
        small = small.unflatten(0, video.shape[:-2])
        return small * self.gain.view(-1, *[1] * (video.ndim - 2))


class Whole(nn.Module):
    "A student's readout: the mean of the map, weighed."

    def __init__(self, channels, neurons, size, state_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, neurons), 0.1))
        self.bias = nn.Parameter(torch.zeros(neurons))

    def set_bias(self, bias):
        self.bias.data.copy_(torch.as_tensor(bias))

    def forward(self, features, shifts, state):
        return (features.mean((3, 4)).transpose(1, 2) @ self.weight + self.bias).transpose(1, 2)


def movie_model(**options) -> ViV1T:
    torch.manual_seed(0)
    return ViV1T(ViV1TConfig({"A": 5}, FRAMES, SIZE, emb_dim=8, **(CONV | FACTORISED | options)))


def picture_model(**options) -> V1T:
    torch.manual_seed(0)
    parts = {**CONV, "readout": "factorised", "emb_dim": 8}
    return V1T(V1TConfig({"A": 5}, size=SIZE, **(BLIND | parts | options)))


# the contract


def broken(what):
    "A core that gives something else than a map of 8 channels and at most as many frames."

    class Broken(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, video, state):
            x = video.expand(-1, 8, *video.shape[2:])
            if what == "error":
                raise ValueError("no such thing")
            return {"channels": x[:, :3], "axes": x[:, :, 0], "frames": torch.cat([x, x], 2), "tuple": (x, x),
                    "empty": x[..., :0]}[what]  # fmt: skip

    return Broken


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("channels", r"gives \(2, 3, 20, 10, 14\) for 2 inputs of \(1, 20, 10, 14\)"),
        ("axes", r"\(2, emb_dim=8, 1 to 20 frames, rows, columns\)"),
        ("frames", r"gives \(2, 8, 40, 10, 14\)"),
        ("tuple", r"gives \('tuple',\)"),
        ("empty", r"gives \(2, 8, 20, 10, 0\)"),
        ("error", r"core 'broken' cannot take \(2, 1, 20, 10, 14\); \(2, 4, 20\): ValueError: no such thing"),
    ],
)
def test_a_core_that_breaks_the_contract_is_named(what, told):
    register_core("broken")(broken(what))
    with pytest.raises(DataError, match=told):
        movie_model(core="broken", core_options={})


def test_a_core_of_pictures_gives_a_map_without_time():
    register_core("broken")(broken("axes"))
    with pytest.raises(DataError, match=r"expected: \(2, emb_dim=8, rows, columns\)"):
        picture_model(core="broken", core_options={})


def test_a_readout_that_breaks_the_contract_is_named():
    class Turned(Whole):
        def forward(self, features, shifts, state):
            return super().forward(features, shifts, state).transpose(1, 2)

    register_readout("turned")(Turned)
    told = r"readout 'turned' gives \(2, 3, 5\) for a map of \(2, 8, 3, 8, 12\)\n  expected: \(2, 5 neurons, 3 frames\)"
    with pytest.raises(DataError, match=told):
        movie_model(readout="turned", readout_options={})


@pytest.mark.parametrize(
    ("register", "name", "cls", "told"),
    [
        (register_core, "x", int, "a class made from torch.nn.Module"),
        (register_core, "x", nn.Linear(1, 1), "a class made from torch.nn.Module"),
        (register_core, "x", type("Nothing", (nn.Module,), {}), "Nothing has no forward"),
        (register_core, "vivit", Mean, "a name other than vivit"),
        (register_core, "", Mean, "a name other than"),
        (register_readout, "x", Mean, "Mean has no set_bias"),
        (register_readout, "gaussian", Whole, "a name other than"),
    ],
)
def test_what_cannot_be_registered(register, name, cls, told):
    before = dict(readouts.CORES), dict(readouts.READOUTS)
    with pytest.raises(DataError, match=told):
        register(name)(cls)
    assert before == (readouts.CORES, readouts.READOUTS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"core": "cnv"}, r'one of .*conv.*\n.*@register_core\("cnv"\)'),
        ({"core": "vit"}, "core 'vit' takes no video"),
        ({"readout": "factorized"}, "one of gaussian, factorised"),
        ({"core_options": {"kernl": 3}}, "'kernl'.*\n.*options layers, kernel"),
        ({"core": "vivit", "core_options": {"layers": 2}}, "core 'vivit', which has its own"),
        ({"core_options": {3: 3}}, "names and values"),
        ({"core_options": {"kernel": 11}}, "Kernel size"),
        ({"core_options": {"layers": 2**25}}, "at most"),
        ({"shifter": True}, "no point that the eye could move"),
    ],
)
def test_options_that_cannot_be_are_named(options, told):
    with pytest.raises(DataError, match=told):
        movie_model(**options)


def test_pictures_take_behaviour_as_channels_only():
    with pytest.raises(DataError, match=r"behavior='block-mlp' with core='conv'\n  expected: none, channels"):
        picture_model(behavior="block-mlp", behavior_channels=1)
    model = picture_model(behavior="channels", behavior_channels=1).eval()
    image = torch.zeros(2, 1, *SIZE)
    moved = [model(image, torch.full((2, 1), x)).logits for x in (0.0, 3.0)]
    assert model.core.layers[0].in_channels == 2 and not torch.equal(*moved)


# what the two parts of the library do


def test_the_map_of_a_movie_knows_nothing_of_later_frames():
    model = movie_model().eval()
    item = {k: v[None] for k, v in Toy(1)[0].items() if k != "labels"}
    first = model.encode(**item)
    assert first.shape == (1, 8, FRAMES - 4, 8, 12) and model.map_size == (8, 12)
    item = {k: v.clone() for k, v in item.items()}
    for value in item.values():
        value[:, :, 12:] += 1
    later = model.encode(**item)
    assert torch.equal(first[:, :, :8], later[:, :, :8])  # frame k of the map is frame k + 4 of the video
    assert all(not torch.equal(first[:, :, k], later[:, :, k]) for k in range(8, FRAMES - 4))


def test_labels_of_the_last_frames_are_those_of_the_map():
    model = movie_model(stride=(2, 2, 2))  # of tubelets, and there are none
    trace = torch.arange(FRAMES)
    assert model.align(trace, 16).tolist() == list(range(4, 20))


def test_a_factorised_readout_is_mask_times_weights():
    torch.manual_seed(0)
    readout = FactorisedReadout(3, 2, (4, 5), state_channels=2)
    readout.set_bias(np.array([1.0, 2.0]))
    nn.init.normal_(readout.state.weight)
    maps, state = torch.randn(1, 3, 6, 4, 5), torch.randn(1, 2, 6)
    full = torch.einsum("np,cn->ncp", readout.masks, readout.features).unflatten(-1, (4, 5))
    wanted = torch.einsum("bcthw,nchw->bnt", maps, full) + torch.tensor([1.0, 2.0])[:, None]
    wanted = wanted + torch.einsum("bst,ns->bnt", state, readout.state.weight)
    assert torch.allclose(readout(maps, None, state), wanted, atol=1e-5)
    with pytest.raises(DataError, match=r"bias of shape \(3,\)\n  expected: \(2,\)"):
        readout.set_bias(np.zeros(3))


def test_a_penalty_counts_in_training_only():
    batch = {k: v[None] for k, v in Toy(1)[0].items()}
    losses = {}
    for l1 in (0.0, 2.0):
        model = movie_model(readout_options={"l1": l1}, core_options=CONV["core_options"] | {"norm": False})
        model.config.loss_frames = LAST
        for mode in (True, False):
            losses[l1, mode] = float(model.train(mode)(**batch).loss.detach())
        penalty = float(model.readouts["A"].penalty().detach())
    assert losses[2.0, False] == losses[0.0, False] and penalty > 0
    assert losses[2.0, True] == pytest.approx(losses[0.0, True] + penalty, rel=1e-5)


# defaults are what they were


def test_configs_say_nothing_of_parts_that_are_the_published_ones():
    for config in (ViV1TConfig(), V1TConfig()):
        told = config.to_diff_dict()
        assert not {"core", "core_options", "readout", "readout_options"} & told.keys() and not own_code(
            config
        )
    register_core("mine")(Mean)
    assert not own_code(ViV1TConfig()) and not own_code(movie_model().config)


def test_a_folder_from_before_there_were_parts_is_read(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert not {"core", "readout"} & text.keys()
    again = ViV1T.from_pretrained(tmp_path)
    assert isinstance(again.core, part_named("core", "vivit"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


# saved, read, refused


@pytest.mark.parametrize("make", [movie_model, picture_model])
def test_saved_and_read_bit_by_bit(tmp_path, make):
    model = make()
    for buffer in model.buffers():  # as after training
        buffer.data += 1
    model.save_pretrained(tmp_path / "all")
    model.save_core(tmp_path / "core")
    again = type(model).from_pretrained(tmp_path / "all")
    assert isinstance(again.core, ConvCore) and again.map_size == model.map_size
    assert again.config.core_options == CONV["core_options"]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    core = type(model).from_published(tmp_path / "core", core_only=True, mice={"B": 3})
    assert all(torch.equal(v, core.core.state_dict()[k]) for k, v in model.core.state_dict().items())
    assert core.readouts["B"].masks.shape == (3, 8 * 12)


def test_a_model_whose_core_is_not_imported_is_refused_by_name(tmp_path):
    register_core("mine")(Mean)
    movie_model(core="mine", core_options={"power": 2}).save_pretrained(tmp_path)
    assert ViV1T.from_pretrained(tmp_path).core.power == 2
    del readouts.CORES["mine"]
    with pytest.raises(
        DataError, match=r'there is no core \'mine\'.*\n.*\n.*@register_core\("mine"\) above its class'
    ):
        ViV1T.from_pretrained(tmp_path)


def test_what_other_parts_lack_is_refused_plainly(tmp_path):
    model, pictures = movie_model(), picture_model()
    batch = {k: v[None] for k, v in Toy(1)[0].items() if k != "labels"}
    calls = {
        "the published code stores no such model": model.to_published,
        "core='conv', readout='factorised'": pictures.to_published,
        "core 'conv' has no tokenizer": lambda: model.embed(**batch),
        "core 'conv' has no mix": lambda: model.encode(None, tokens=torch.zeros(1, 2, 3, 8)),
        "core 'conv' has no attention_maps": lambda: pictures.attention_maps(torch.zeros(1, 1, *SIZE)),
        "readout 'factorised' has no positions": pictures.reading_points,
        "readout 'factorised' has no set_coordinates": lambda: model.set_coordinates("A", np.eye(5)),
        "readout 'factorised' has no reading points": lambda: reverse_correlate(model, *tiers(), LAST),
        "the core has no linear layer that adapters could correct": lambda: fit(
            model, tiers(), adapt="lora", adapters=Adapters(), out=tmp_path, **QUICK
        ),
    }
    for told, call in calls.items():
        with pytest.raises(DataError, match=re.escape(told)):
            call()
    assert not list(tmp_path.iterdir())


def test_reading_starts_from_the_frames_that_the_core_answers():
    "A core that answers at every second frame is compared with those frames, not with the last ones in a row."
    given = {"stride": (2, 3, 3), "core_state": False, "state_encoder": False}
    found = {}
    for name, chosen in {"all": slice(None), "answered": slice(-8, None, 2), "last": slice(-4, None)}.items():
        model, parts = tiny_model(**given), tiers()
        for item in [item for part in parts for item in part.items]:
            item["labels"] = item["labels"][:, chosen]  # four frames are taken as they are
        found[name] = reverse_correlate(model, *parts, 4), model.readouts["A"].features.detach()
    assert found["all"][0] == found["answered"][0] != found["last"][0]
    assert torch.equal(found["all"][1], found["answered"][1])


# trained


@pytest.mark.parametrize("adapt", ["head", "full"])
def test_resumed_to_the_same_bits(tmp_path, adapt):
    def cut(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    model, quick = movie_model(), QUICK | {"cache": False}  # the core runs on every batch
    whole = fit(model, tiers(), adapt=adapt, out=tmp_path / "whole", epochs=4, **quick)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tiers(), adapt=adapt, out=tmp_path / "cut", epochs=4, on_epoch=cut, **quick)
    again = fit(model, tiers(), adapt=adapt, out=tmp_path / "cut", epochs=4, **quick)
    a, b = weights(whole.best), weights(again.best)
    assert whole.best_epoch == again.best_epoch and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = model.core.state_dict()
    frozen = all(torch.equal(v, whole.model.core.state_dict()[k]) for k, v in start.items())
    assert frozen == (adapt == "head")  # batch norm's running means, too


@pytest.mark.parametrize("register_both", [False, True])
def test_movies_from_fit_to_the_sheet(tmp_path, register_both):
    root = cx.build(toy_recording(), tmp_path / "clips", clip_frames=10, size=(6, 8), gap=2)
    if register_both:
        register_core("mine")(Mean)
        register_readout("whole")(Whole)
    parts = {"core": "mine", "readout": "whole"} if register_both else CONV | {"readout": "factorised"}
    train = cx.open_dataset(root)
    item, card = train[0], train.card
    config = ViV1TConfig({}, 10, (6, 8), emb_dim=4, shifter=False, behavior_channels=len(item["behavior"]),
                         pupil_channels=len(item["pupil_center"]), channels=train.channels["behavior"], **parts)  # fmt: skip
    model = ViV1T(config)
    model.add_mouse(card["name"], len(item["labels"]), None, train.statistics["responses"]["mean"])
    run = fit(model, root, adapt="full", epochs=2, **QUICK | {"last": 6})
    test = open_for(run.model, root, "test")
    loaded = ViV1T.from_pretrained(best_folder(run.folder))
    assert np.array_equal(predict(loaded, test, 6), predict(run.model, test, 6))
    head = fit(run.model, root, adapt="head", epochs=1, **QUICK | {"last": 6})  # on kept features
    rows = cx.score(root, head, full=run).rows
    values = {row.model: row.value for row in rows if row.metric == "single-trial correlation"}
    name = f"ViV1T ({config.core}, {config.readout}), head only"
    assert {name, "full", "train mean"} <= values.keys() and np.isfinite(values["full"])


@pytest.mark.parametrize("register_both", [False, True])
def test_pictures_from_fit_to_the_sheet(tmp_path, register_both):
    draw = np.random.default_rng(0)
    root = import_arrays(draw.random((30, 10, 14)), draw.random((30, 5)), tmp_path / "scenes")
    if register_both:
        register_core("mine")(Mean)
        register_readout("whole")(Whole)
    parts = {"core": "mine", "readout": "whole"} if register_both else CONV | {"readout": "factorised"}
    chosen = Recipe(
        "own",
        {
            "adapt": "full",
            "loss": "poisson",
            "lr": 0.01,
            "epochs": 2,
            "schedule": "plateau",
            "batch_size": 16,
        },
        parts | {"emb_dim": 4},
    )
    run = cx.train_scenes(root, chosen, progress=False)
    test = cx.open_dataset(root, "test")
    assert np.array_equal(
        predict(V1T.from_pretrained(best_folder(run.folder)), test), predict(run.model, test)
    )
    name = f"V1T ({parts['core']}, {parts['readout']}), all weights"
    assert name in {row.model for row in cx.score(root, run).rows}


def test_code_that_changed_is_another_model(tmp_path):
    def tripled(self, video, state):
        return 3 * Mean.forward(self, video, state)

    register_core("mine")(Mean)
    model = movie_model(core="mine", core_options={})
    known, kept = model_content(model), cached_features(model, Toy(2), tmp_path, last=LAST, progress=False)
    assert known == model_content(model) and set(own_code(model.config)) == {"core code"}
    register_core("mine")(type("Mean", (Mean,), {"forward": tripled, "__module__": __name__}))
    again = movie_model(core="mine", core_options={})
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert model_content(again) != known
    new = cached_features(again, Toy(2), tmp_path, last=LAST, progress=False)
    assert torch.allclose(new.features(0), 3 * kept.features(0), rtol=1e-2)
