"A trained model is opened, asked and written down: refused where it knows nothing, whole or not at all, by call and by command."

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import cortexlit as cx
from cortexlit.cli import app
from cortexlit.core import DataError, MissingError, check_card, read_json, write_json
from cortexlit.insilico.excite import exciting_films, fix_contrast, save_stimulus, true_cells
from cortexlit.insilico.fields import gradient_fields
from cortexlit.insilico.reports import excite_report, fields_report, tuning_report
from cortexlit.insilico.stimuli import Screen, open_twin, present, screen_of, white_noise
from cortexlit.models.viv1t import ViV1T
from cortexlit.plots import ffmpeg, save_pages
from cortexlit.simulate.cortex import filter_pictures, motion_energy, rate_of
from cortexlit.simulate.screen import FIELD, resize
from cortexlit.training.trainer import best_folder

pytestmark = pytest.mark.usefixtures("no_curves")
FEW = {"directions": 6, "spatial_frequencies": [0.02], "temporal_frequencies": [2.0]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A dataset folder of the tiny session, and the run of a head that was hardly trained."
    root = tmp_path_factory.mktemp("insilico")
    session = cx.open_session(900000001, cache_dir=cx.embedded_session("tiny"))
    mouse = cx.build(session, root / "mouse", split="stimuli", clip_frames=40, gap=5)
    run = cx.train_head(mouse, epochs=1, last=12, progress=False, out=root / "run")
    return mouse, run.folder


@pytest.fixture(scope="module")
def twin(trained):
    return open_twin(trained[1], trained[0], trust=True, last=12)


def test_a_model_that_knows_less_than_its_baselines_is_refused(trained):
    mouse, run = trained
    model = ViV1T.from_pretrained(best_folder(run))
    for readout in model.readouts.values():  # a head that answers with the same number whatever it sees
        for weight in readout.parameters():
            weight.data.zero_()
    with pytest.raises(DataError, match="the model predicts 0.0000 on the validation tier, and the"):
        open_twin(model, mouse)
    assert open_twin(model, mouse, trust=True).scores["model"] == 0


def test_a_twin_is_that_of_its_mouse_and_screen(trained, twin, tmp_path):
    mouse, run = trained
    card = read_json(mouse / "card.json")
    assert twin.mouse == card["name"] and len(twin.neurons) == len(twin.trial_correlation)
    assert twin.screen == screen_of(mouse) and twin.screen.rate == pytest.approx(card["rate"])
    model = ViV1T.from_pretrained(best_folder(run))
    model.config.neurons = {"another": model.config.neurons[twin.mouse]}
    with pytest.raises(DataError, match="the model has no mouse"):
        open_twin(model, mouse, trust=True)


def test_what_is_shown_is_what_the_dataset_would_show(trained, twin):
    "A film of the folder, as contrast, gives the model's answer to the clip with behaviour at its mean."
    mouse, _ = trained
    test = cx.open_dataset(mouse, "test")
    film = (np.load(mouse / "videos.npy")[int(test.samples["clip"].iloc[0])] / 127.5 - 1).clip(-1, 1)
    answer = present(twin, film[None].astype(np.float32))
    assert answer.shape[1] == len(twin.neurons) and np.isfinite(answer).all()
    assert np.ptp(answer, axis=-1).max() > 0
    again = present(twin, np.stack([film, film]).astype(np.float32))
    np.testing.assert_allclose(again[0], again[1], atol=1e-5)
    np.testing.assert_allclose(again[0], answer[0], atol=1e-5)


def test_reports_are_whole_and_say_what_was_asked(twin, tmp_path):
    tuned = tuning_report(twin, tmp_path / "tuning", [4, 2], **FEW)
    found = fields_report(twin, tmp_path / "fields", [4, 2], pictures=3)
    for kind, table in (("tuning", tuned), ("fields", found)):
        card = check_card(tmp_path / kind, "report", "again", [f"{kind}.csv", f"{kind}.json", f"{kind}.png"])
        assert card["kind"] == kind and card["mouse"] == twin.mouse and card["neurons"] == 2
        assert card["validation correlation"] == pytest.approx(twin.scores)
        written = pd.read_csv(tmp_path / kind / f"{kind}.csv")
        pd.testing.assert_frame_equal(written, table, check_dtype=False)
        assert written["cell_id"].tolist() == twin.neurons["cell_id"].iloc[[4, 2]].tolist()
    other = tuning_report(twin, tmp_path / "all", **FEW)
    columns = ["orientation", "direction"]  # a neuron's answer is the same alone and among all others
    np.testing.assert_allclose(other.iloc[[4, 2]][columns], tuned[columns], atol=1e-3)


@pytest.mark.parametrize(
    ("neurons", "told"),
    [([99], "neuron 99"), ([-1], "neuron -1"), ([], "from 0"), ([1, 1], "each once"), ([0.5], "from 0")],
)
def test_neurons_that_are_none_are_named(twin, tmp_path, neurons, told):
    for report in (tuning_report, fields_report, excite_report):
        with pytest.raises(DataError, match=told):
            report(twin, tmp_path / "x", neurons)
    assert not (tmp_path / "x").exists()


def test_a_report_replaces_its_own_kind_only(twin, tmp_path):
    tuning_report(twin, tmp_path / "r", [1], **FEW)
    with pytest.raises(DataError, match="exists already"):
        tuning_report(twin, tmp_path / "r", [1], **FEW)
    tuning_report(twin, tmp_path / "r", [2], **FEW, overwrite=True)
    assert pd.read_csv(tmp_path / "r" / "tuning.csv")["neuron"].tolist() == [2]
    with pytest.raises(DataError, match="tuning"):
        fields_report(twin, tmp_path / "r", [1], pictures=2, overwrite=True)
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "thesis.json", {})
    with pytest.raises(DataError):
        tuning_report(twin, tmp_path / "other", [1], **FEW, overwrite=True)
    assert (tmp_path / "other" / "thesis.json").exists()


def test_films_are_those_of_the_climb_and_can_be_read(twin, tmp_path):
    table = excite_report(twin, tmp_path / "e", [4, 2], still=True, seeds=2, steps=3, unseen=twin)
    films = np.load(tmp_path / "e" / "films.npy")
    direct = exciting_films(twin, [4, 2], still=True, seeds=(0, 1), steps=3, unseen=twin)
    best = direct.unseen.argmax(0)
    np.testing.assert_allclose(films, direct.films[best, [0, 1]], atol=1e-3)
    np.testing.assert_allclose(table["answer"], direct.answers[best, [0, 1]], rtol=1e-3)
    np.testing.assert_allclose(table["unseen"], table["answer"], rtol=1e-3)
    check_card(tmp_path / "e", "report", "again", ["excite.csv", "neuron_2.gif", "neuron_4.gif", "films.npy"])
    with Image.open(tmp_path / "e" / "neuron_4.gif") as gif:
        assert b"120 x 60 degrees" in gif.info["comment"]


def test_fields_of_some_neurons_are_those_among_all_and_a_bar_says_how_far(twin, tmp_path, capsys):
    pictures = white_noise(twin.screen, 5, seed=2)
    every, some = gradient_fields(twin, pictures), gradient_fields(twin, pictures, rows=[4, 2])
    for one, other in zip(every, some, strict=True):
        np.testing.assert_allclose(other, one[[4, 2]], atol=1e-6)
    for rows in ([], [99], [-1]):
        with pytest.raises(DataError, match="one or more, 0 to"):
            gradient_fields(twin, pictures, rows=rows)
    capsys.readouterr()
    fields_report(twin, tmp_path / "quiet", [1], pictures=2)
    assert "looking" not in capsys.readouterr().err
    fields_report(twin, tmp_path / "told", [1], pictures=2, progress=True)
    assert "looking" in capsys.readouterr().err


def test_a_climb_goes_up_and_a_suppressing_one_down_within_the_rules(twin):
    up, down = (exciting_films(twin, [1, 3], steps=6, suppress=s) for s in (False, True))
    assert (up.answers > up.climb[0]).all() and (down.answers < down.climb[0]).all()
    for films in (up.films, down.films):
        assert films.shape == (1, 2, 13, *twin.screen.size) and np.abs(films).max() <= 1
        np.testing.assert_allclose(films.std((2, 3, 4)), 0.28, rtol=0.01)
        np.testing.assert_allclose(films.mean((2, 3, 4)), 0, atol=1e-3)
    alone = exciting_films(twin, [3], steps=6)
    np.testing.assert_allclose(alone.films[0, 0], up.films[0, 1], atol=0.02)


def test_true_cells_answer_as_the_simulator_does():
    screen, size = Screen(), "tiny"
    cells = true_cells(size, screen)
    film = fix_contrast(np.random.default_rng(0).standard_normal((1, 20, 36, 64)), 0.3)
    for k, (_, neuron) in enumerate(cells.neurons.iterrows()):
        signal = filter_pictures(resize(film[0], FIELD), cells.neurons.iloc[[k]], [(0.0, 0.0)])[0, :, 0]
        rate = rate_of(motion_energy(signal, neuron, screen.rate) / float(cells.scale[k]), neuron)
        answer = cells.answers(torch.from_numpy(film), [k])[0].numpy()
        np.testing.assert_allclose(answer, rate[12:], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"seeds": 0}, "1 to 100"), ({"steps": 0}, "1 to 10000 steps"), ({"contrast": 0.9}, "up to 0.7"), ({"contrast": float("nan")}, "up to 0.7")],
)  # fmt: skip
def test_a_climb_that_makes_no_sense_is_refused(twin, tmp_path, options, told):
    with pytest.raises(DataError, match=told):
        excite_report(twin, tmp_path / "x", [0], **options)
    assert not (tmp_path / "x").exists()


def test_the_commands_write_the_same(trained, twin, tmp_path):
    mouse, run = map(str, trained)
    words = [run, mouse, "--trust", "--neurons", "1", "--neurons", "3", "--json"]
    done = CliRunner().invoke(
        app, ["insilico", "fields", *words, "--pictures", "2", "--out", str(tmp_path / "f")]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [row["neuron"] for row in told["neurons"]] == [1, 3]
    direct = fields_report(twin, tmp_path / "direct", [1, 3], pictures=2)
    np.testing.assert_allclose(direct["azimuth"], [row["azimuth"] for row in told["neurons"]], atol=1e-6)
    done = CliRunner().invoke(
        app, ["insilico", "tune", *words, "--directions", "6", "--curves", "--out", str(tmp_path / "t")]
    )
    assert done.exit_code == 0 and (tmp_path / "t" / "tuning.png").stat().st_size > 1000
    told = pd.read_csv(tmp_path / "t" / "tuning.csv")
    assert told["neuron"].tolist() == [1, 3] and {
        "c50",
        "c50_low",
        "diameter",
        "suppression",
        "diameter_r2",
    } <= set(told)
    done = CliRunner().invoke(
        app,
        [
            "insilico",
            "excite",
            *words,
            "--still",
            "--steps",
            "2",
            "--kind",
            "mp4",
            "--unseen",
            run,
            "--out",
            str(tmp_path / "e"),
        ],
    )
    assert done.exit_code == 0 and (tmp_path / "e" / "neuron_3.mp4").stat().st_size > 500
    told = json.loads(done.stdout)["neurons"]
    assert [row["answer"] for row in told] == pytest.approx([row["unseen"] for row in told])
    done = CliRunner().invoke(
        app, ["insilico", "tune", str(tmp_path / "no"), mouse, "--out", str(tmp_path / "n")]
    )
    assert done.exit_code and isinstance(done.exception, (DataError, MissingError, SystemExit))
    assert not (tmp_path / "n").exists()


def test_what_lies_around_climbs_and_what_is_kept_stays(twin):
    x, y = twin.screen.angles()
    masks = np.stack([np.hypot(x, y) < 15, np.hypot(x - 10, y) < 10])
    held = np.broadcast_to(np.where(masks, 0.7, 0.0)[:, None], (2, 1, 36, 64))
    up, down = (
        exciting_films(twin, [3, 1], still=True, steps=6, around=(held, masks), suppress=s)
        for s in (False, True)
    )
    for found in (up, down):
        np.testing.assert_allclose(found.films[0, :, 0][masks], 0.7, atol=1e-6)
        assert np.abs(found.films[0, :, 0][~masks]).max() > 0.1
    assert (up.answers > up.climb[0]).all() and (down.answers < down.climb[0]).all()
    for wrong in (
        (held[:1], masks),
        (held, masks.astype(float)),
        (2 * held, masks),
        (held[..., :9], masks),
        (held.repeat(3, 1), masks),
    ):
        with pytest.raises(DataError, match="and bool"):
            exciting_films(twin, [3, 1], still=True, steps=2, around=wrong)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_film_is_written_as_its_suffix_says_with_the_screen_in_it(tmp_path, suffix):
    screen = Screen((9, 16), (30.0, 60.0), rate=25.0)
    film = np.linspace(-1, 1, 6 * 9 * 16).reshape(6, 9, 16)
    path = save_stimulus(film, tmp_path / f"a{suffix}", screen, "a ramp", enlarge=2)
    with Image.open(path) as opened:
        told = opened.info["comment"].decode() if suffix == ".gif" else opened.getexif()[0x010E]
        assert told.startswith("a ramp; 60 x 30 degrees") and "25 Hz" in told
        assert (opened.n_frames, opened.size) == (6, (32, 18))
        opened.seek(3)
        again = np.asarray(opened.convert("L"), float)[::2, ::2] / 127.5 - 1
        assert opened.info["duration"] == 40
    np.testing.assert_allclose(again, film[3], atol=0.005)


@pytest.mark.parametrize(("size", "enlarge", "held"), [((9, 16), 2, "32x18"), ((9, 15), 1, "16x10")])
def test_an_mp4_has_every_frame_at_the_rate_of_the_screen_as_browsers_play_it(tmp_path, size, enlarge, held):
    screen = Screen(size, (30.0, 60.0), rate=30.168)
    film = np.random.default_rng(0).uniform(-1, 1, (7, 1, 1)) * np.ones((7, *size))
    path = save_stimulus(film, tmp_path / "a.mp4", screen, "steps of grey", enlarge=enlarge)
    pipe = [ffmpeg(), "-hide_banner", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    done = subprocess.run(pipe, capture_output=True, check=True)
    told = done.stderr.decode().split("Output #0")[0]
    assert (
        "h264" in told
        and "yuv420p" in told
        and f" {held}" in told
        and "steps of grey; 60 x 30 degrees" in told
    )
    assert float(re.search(r"([\d.]+) fps", told)[1]) == 30.17
    seconds = re.search(r"Duration: 00:00:([\d.]+)", told)[1]
    assert abs(float(seconds) - 7 / 30.168) < 0.01
    wide, high = map(int, held.split("x"))
    again = np.frombuffer(done.stdout, np.uint8).reshape(-1, high, wide)
    assert len(again) == 7
    np.testing.assert_allclose(again / 127.5 - 1, np.broadcast_to(film[:, :1, :1], again.shape), atol=0.02)


def test_an_mp4_without_ffmpeg_is_refused_before_anything_is_climbed_and_names_the_extra(
    twin, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr("cortexlit.insilico.reports.exciting_films", lambda *_, **__: pytest.fail("climbed"))
    for call in (lambda: save_stimulus(np.zeros((2, 36, 64)), tmp_path / "a.mp4", Screen()),
                 lambda: excite_report(twin, tmp_path / "b", [3], kind="mp4")):  # fmt: skip
        with pytest.raises(MissingError, match=r'pip install "cortexlit\[film\]"'):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["", "avi", "GIF", "x/y.gif", "gif.txt"])
def test_kinds_of_films_that_are_none_are_refused(twin, tmp_path, kind):
    with pytest.raises(DataError, match="gif, webp or mp4"):
        excite_report(twin, tmp_path / "a", [3], kind=kind)
    assert not list(tmp_path.iterdir())


def test_a_film_that_ffmpeg_refuses_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="ffmpeg cannot write"):
        save_pages([np.zeros((0, 4), np.uint8)], tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.avi", "a", "a.GIF.txt"])
def test_other_kinds_of_films_are_refused_by_name(tmp_path, name):
    with pytest.raises(DataError, match=f"(?s){name}.*ends in .gif, .webp or .mp4"):
        save_stimulus(np.zeros((2, 36, 64)), tmp_path / name, Screen())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("film", [np.zeros((36, 64)), np.zeros((2, 9, 64)), np.full((2, 36, 64), 1.5),
                                  np.full((2, 36, 64), np.nan)])  # fmt: skip
def test_what_is_not_for_the_screen_is_refused_alike_by_all(twin, tmp_path, film):
    takers = [lambda: save_stimulus(film, tmp_path / "a.gif", Screen()), lambda: present(twin, [film]),
              lambda: gradient_fields(twin, film)]  # fmt: skip
    for taker in takers:
        with pytest.raises(DataError, match="36, 64"):
            taker()
