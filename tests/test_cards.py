"""A saved model tells what it reached, is found by `AutoModel`, and goes to the hub with its card."""

import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoConfig, AutoModel

from cortexlit.core import DataError, MissingError
from cortexlit.evaluation.scores import Score, ScoreSheet
from cortexlit.models import autoencoders, classifiers, cnn_vit, diffusion, flows, gan, v1t, vit3d, viv1t

MODULES = (viv1t, v1t, vit3d, cnn_vit, classifiers, autoencoders, diffusion, flows, gan)
CLASSES = [
    cls
    for module in MODULES
    for cls in vars(module).values()
    if isinstance(cls, type)
    and issubclass(cls, viv1t.Saved)
    and cls.__module__ == module.__name__
    and hasattr(getattr(cls, "config_class", None), "model_type")
]


@pytest.fixture
def model() -> viv1t.ViV1T:
    torch.manual_seed(0)
    sizes = {"emb_dim": 22, "mlp_dim": 8, "spatial_depth": 1, "temporal_depth": 1}
    return viv1t.ViV1T(viv1t.ViV1TConfig({"mouse": 5}, **sizes))


@pytest.fixture
def sheet() -> ScoreSheet:
    def row(model: str, value: float, **more: object) -> Score:
        told = {"tier": "test", "metric": "correlation", "low": value - 0.01, "high": value + 0.01, "n_clips": 6,
                "n_samples": 60, "n_neurons": 5, "undefined": 0.0, "chance": 0.0, "baseline": 0.01, "ceiling": 0.064,
                "dataset": "session", "split": "stimuli", "split_hash": "abcdef1234", "seed": 0, "note": ""}  # fmt: skip
        return Score(model=model, value=value, **told | more)

    rows = [row("a head", 0.02), row("ridge | running", 0.01, seed=None)]
    rows.append(row("repeat mean", math.nan, low=math.nan, high=math.nan, note="no clip\nhas repeats"))
    found = ScoreSheet(rows)
    found.opened["session"] = 2
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_of_model_is_known_by_its_type(cls):
    kind = cls.config_class.model_type
    assert type(AutoConfig.for_model(kind)) is cls.config_class
    assert AutoModel._model_mapping[cls.config_class] is cls


def test_a_folder_is_opened_without_naming_the_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    found = AutoModel.from_pretrained(tmp_path)
    assert type(found) is viv1t.ViV1T and found.config.neurons == {"mouse": 5}
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_the_card_tells_every_row_and_gives_the_hub_the_models_own(model, sheet, tmp_path):
    model.save_pretrained(tmp_path, scores=sheet, scored_as="a head")
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_value, result.metric_type) == (0.02, "correlation")
    assert "session, test, split by stimuli abcdef12" == result.dataset_name
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 3 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| a head | session | stimuli | test | correlation | 0.0200 | 0.0100 | 0.0300 |" in lines[2]
    assert "no clip has repeats" in lines[4] and "nan" not in lines[4].lower()
    assert "test tier opened 2 times" in card.text and "5 neurons" in card.text
    assert viv1t.ViV1T.from_pretrained(tmp_path).config.neurons == {"mouse": 5}


def test_scores_of_the_weights_before_do_not_stay(model, sheet, tmp_path):
    model.save_pretrained(tmp_path, scores=sheet)
    assert "model-index" not in (tmp_path / "README.md").read_text()  # which of three it is was not said
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_card_of_somebody_elses_is_left_alone(model, sheet, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="not written"):
        model.save_pretrained(tmp_path, scores=sheet)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    viv1t.ViV1T.from_pretrained(tmp_path)  # refused before anything was changed


def test_an_unknown_name_in_the_sheet_is_refused_before_anything_is_written(model, sheet, tmp_path):
    with pytest.raises(DataError, match="a head, ridge"):
        model.save_pretrained(tmp_path / "m", scores=sheet, scored_as="tail")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def hub(monkeypatch) -> dict:
    "What would have been sent."
    sent: dict = {}

    def upload(self, repo_id: str, folder_path: str, **options: object) -> str:
        sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **options: sent.update(options))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return sent


@pytest.mark.parametrize("scored", [True, False])
def test_what_is_pushed_is_the_folder_with_its_card(model, sheet, hub, scored):
    told = {"scores": sheet, "scored_as": "a head"} if scored else {}
    assert model.push_to_hub("me/model", private=True, **told) == "https://hub/me/model"
    assert hub["private"] and {"config.json", "model.safetensors", "card.json"} <= set(hub)
    text = hub["README.md"].decode()
    assert ("0.0200" in text) == scored and ("No scores were given" in text) != scored


def test_without_a_network_it_is_said_what_to_do(model, monkeypatch):
    def no_network(*args: object, **options: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "create_repo", no_network)
    with pytest.raises(MissingError, match="Name or service not known(.|\n)*hf auth login"):
        model.push_to_hub("me/model")
    with pytest.raises(DataError, match="push_to_hub"):
        model.save_pretrained("folder", push_to_hub=True)
