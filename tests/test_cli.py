"""`cortexlit fit` and `cortexlit grid` as a job script uses them."""

import contextlib
import json
import sys

import pytest
from toy_training import FRAMES, LAST, tiny_model
from toys import toy_recording

from cortexlit import cli
from cortexlit.data.clips import build_dataset
from cortexlit.training import recipes

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "Dataset folder and core folder, as text."
    folder = tmp_path_factory.mktemp("cli")
    build_dataset(toy_recording(), folder / "data", clip_frames=FRAMES, size=(10, 14), split="stimuli", gap=5)
    tiny_model(core_state=False).save_core(folder / "core")
    return str(folder / "data"), str(folder / "core")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "One epoch of the head, in place of six."
    monkeypatch.setitem(recipes.STUDY_HEAD.demo["fit"], "epochs", 1)


def run(capsys, monkeypatch, *words: str) -> tuple[int, dict]:
    "Exit code and the JSON document of `cortexlit WORDS --json`."
    monkeypatch.setattr(sys, "argv", ["cortexlit", *words, "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    out = capsys.readouterr().out
    return int(end.value.code or 0), json.loads(out)


def test_scores_as_json(inputs, tmp_path, capsys, monkeypatch):
    code, rows = run(capsys, monkeypatch, "score", inputs[0], "--last", str(LAST), "--out", str(tmp_path))
    saved = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert code == 0 and rows == saved and {"train mean", "behaviour ridge"} <= {r["model"] for r in rows}


@pytest.mark.parametrize(
    "adapt",
    [(), ("--adapt", "lora", "--rank", "3", "--targets", "fused_linear,ff_out.2"), ("--adapt", "full")],
)
def test_fit_and_again(inputs, tmp_path, capsys, monkeypatch, adapt):
    data, core = inputs
    words = ["fit", data, "--core", core, "--last", str(LAST), "--out", str(tmp_path / "run"), *adapt]
    code, found = run(capsys, monkeypatch, *words)
    assert (
        code == 0 and found["folder"] == str(tmp_path / "run") and -1 <= found["validation_correlation"] <= 1
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["adapt"] == (adapt[1] if adapt else "head")
    assert (config["adapters"] or {}).get("rank") == (3 if "lora" in adapt else None)
    again = run(capsys, monkeypatch, *words)
    assert again == (code, found), again[1].get("error")
    code, refused = run(capsys, monkeypatch, *words, "--no-resume")
    assert code == 1 and "there is a run in this folder" in refused["error"]


def test_the_convolutional_baseline_of_films_joins_the_sheet(inputs, tmp_path, capsys, monkeypatch):
    data, last = inputs[0], ("--last", str(LAST))
    out = tmp_path / "conv"
    words = ["fit", data, "--model", "conv", "--epochs", "2", "--seed", "3", "--out", str(out), *last]
    code, found = run(capsys, monkeypatch, *words)
    assert code == 0 and found["folder"] == str(out), found
    config = json.loads((out / "config.json").read_text())
    assert (config["adapt"], config["epochs"], config["seed"], config["by_video"]) == ("full", [2], 3, True)
    assert run(capsys, monkeypatch, *words) == (code, found)  # read back
    (out / "history.csv").unlink()  # a score needs the model alone
    code, rows = run(capsys, monkeypatch, "score", data, "--run", str(out), *last)
    ours = [row for row in rows if row["model"] == "ViV1T (conv, factorised) conv"]
    assert (
        code == 0 and {row["seed"] for row in ours} == {3} and len(ours) == len({r["metric"] for r in rows})
    )
    assert {"train mean", "behaviour ridge"} <= {row["model"] for row in rows}
    code, refused = run(capsys, monkeypatch, "score", data, "--run", data)
    assert code == 1 and "no finished run" in refused["error"]


def test_a_rank_that_is_given_twice_is_run_once():
    assert [c.name for c in cli._configurations([4, 8, 4], ["all", "all"])] == ["r4-all", "r8-all"]
    assert len(cli._configurations(None, None)) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--adapt", "adapters"], "head, lora, full"),
        (["fit", "--rank", "8"], "--adapt lora"),
        (["fit", "--adapt", "full", "--targets", "all"], "--adapt lora"),
        (["fit", "--adapt", "lora", "--rank", "0"], "from 1 up"),
        (["fit", "--adapt", "lora", "--rank", "99999999999"], "a smaller rank"),
        (["fit", "--adapt", "lora", "--targets", "everything"], "all, fused"),
        (["fit", "--adapt", "lora", "--targets", "attn_out,everything"], "attn_out"),
        (["fit", "--scale", "large"], "demo, paper"),
        (["fit", "--model", "cnn"], "viv1t or conv"),
        (["fit", "--model", "conv", "--adapt", "lora"], "--adapt with --model conv"),
        (["fit", "--model", "conv", "--targets", "all"], "--targets with --model conv"),
        (["fit", "--model", "conv", "--scale", "demo"], "--scale with --model conv"),
        (["fit", "--model", "conv"], "--core with --model conv"),
        (["grid", "--rank", "8", "--rank", "-9"], "from 1 up"),
        (["grid", "--rank", "8", "--rank", "99999999999"], "a smaller rank"),
        (["grid", "--targets", "head"], "all, fused"),
        (["grid", "--seeds", "0"], "from 1 up"),
        (["grid", "--storage", "grid.db", "--seeds", "1"], "database URL"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(inputs, capsys, monkeypatch, words, told):
    data, core = inputs
    code, refused = run(capsys, monkeypatch, words[0], data, *words[1:], "--core", core, "--last", str(LAST))
    assert code == 1 and told in refused["error"]


def test_paper_scale_wants_published_weights(inputs, capsys, monkeypatch):
    code, refused = run(capsys, monkeypatch, "grid", inputs[0], "--scale", "paper")
    assert code == 1 and "--core" in refused["error"]


def test_grid_shows_every_run_and_goes_on(inputs, tmp_path, capsys, monkeypatch):
    data, core = inputs
    storage = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    words = [
        "grid",
        data,
        "--core",
        core,
        "--last",
        str(LAST),
        "--out",
        str(tmp_path / "grid"),
        "--storage",
        storage,
    ]
    words += ["--rank", "8", "--targets", "fused", "--full"]
    code, found = run(capsys, monkeypatch, *words, "--seeds", "1")
    assert code == 0 and found["storage"] == storage
    assert [(r["configuration"], r["seed"]) for r in found["runs"]] == [("r8-fused", 0), ("full", 0)]
    code, found = run(capsys, monkeypatch, *words, "--seeds", "2")
    assert [r["seed"] for r in found["runs"]] == [0, 1, 0, 1] and found["best"] in ("r8-fused", "full")
    code, refused = run(capsys, monkeypatch, *words, "--seeds", "2", "--no-resume")
    assert code == 1 and "finished runs" in refused["error"]


def test_sessions_fit_into_80_columns(tiny_cache, capsys, monkeypatch):
    monkeypatch.setattr(cli.OUT, "width", 80)
    monkeypatch.setattr(sys, "argv", ["cortexlit", "sessions", "--cache", str(tiny_cache)])
    with contextlib.suppress(SystemExit):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    told = "\n".join(lines)
    assert "…" not in told and max(map(len, lines)) <= 80
    assert "900000001" in told and "Rorb-IRES2-Cre" in told and " A " in told and " B " in told
