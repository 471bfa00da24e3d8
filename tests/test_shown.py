"What objects say of themselves: facts in a terminal, a card in Jupyter, and no tree of a network."

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_recording

from cortexlit.data.cached import ThingsDataset, build_things
from cortexlit.data.clips import MouseDataset, build_dataset
from cortexlit.data.things import open_things
from cortexlit.evaluation.comparison import compare
from cortexlit.shown import Shown, card_html, curve_html, picture_html, table_text
from cortexlit.simulate.subject import write_things
from cortexlit.training.decoders import FoldFits
from cortexlit.training.trainer import Fit


def well_formed(html: str) -> bool:
    "Whether every element that is opened is closed, in order."
    opened = []
    for end, name, single in re.findall(r"<(/?)(\w+)[^>]*?(/?)>", html):
        if end and (not opened or opened.pop() != name):
            return False
        if not end and not single:
            opened.append(name)
    return not opened


def test_a_tier_of_clips(tmp_path):
    data = MouseDataset(
        build_dataset(toy_recording(), tmp_path / "a", clip_frames=10, size=(6, 8), gap=2), "train"
    )
    text, html = repr(data), data._repr_html_()
    assert "object at" not in text and f"neurons: {len(data.neurons)}" in text and "6 x 8 pixels" in text
    assert f"samples: {len(data)}, of {data.samples['clip'].nunique()} videos of 10 frames" in text
    assert well_formed(html) and html.count("<img") == 1 and "alt=" in html


def test_a_subject(tmp_path):
    study = write_things(tmp_path / "study", "tiny", layouts=("figshare",))
    opened = open_things(study)
    assert f"trials: {len(opened)} (" in repr(opened) and well_formed(opened._repr_html_())
    data = ThingsDataset(build_things(opened, tmp_path / "cache"))
    text = repr(data)
    assert f"trials: {len(data)} (" in text and f"voxels: {int(data.mask.sum())} of" in text
    assert "ratings: none given" in text and well_formed(data._repr_html_())


def test_a_fit_shows_its_score_and_not_its_layers():
    history = pd.DataFrame({"epoch": [1, 2, 3], "validation_correlation": [0.1, 0.3, 0.2]})
    run = Fit(torch.nn.Linear(3, 2), history, Path("somewhere"))
    text, html = repr(run), run._repr_html_()
    assert "after epoch 2 of 3: 0.300" in text and "weights: 8" in text and "in_features" not in text + html
    assert well_formed(html) and "<polyline" in html and "<circle" in html


def test_folds_that_were_not_run_are_not_counted():
    table = pd.DataFrame({"validation correlation": [0.2, 0.4]})
    fits = FoldFits(np.array([[0.0, 1.0], [np.nan, np.nan], [2.0, 1.0]]), table, Path("somewhere"))
    assert "2 of 3 trials, 2 outputs" in repr(fits) and "0.200 to 0.400" in repr(fits)


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, np.nan], [np.nan, 1.0]])
def test_no_curve_of_less_than_two_values(values):
    assert curve_html(values, "nothing") == ""


@pytest.mark.parametrize("pixels", [np.zeros((3, 4)), np.full((3, 4), np.nan), np.array([[0.0, np.inf]])])
def test_a_flat_picture_or_one_with_gaps_is_drawn(pixels):
    assert picture_html(pixels, "grey").startswith("<img")


def test_pictures_need_two_axes():
    with pytest.raises(ValueError, match=r"\(rows, columns\)"):
        picture_html(np.zeros((2, 3, 4)), "a film")


def test_what_is_text_stays_text():
    html = card_html('<script>"x"</script>', {"a<b": SimpleNamespace(c="<i>")})
    assert "<script>" not in html and "<i>" not in html and "a&lt;b" in html and well_formed(html)


def test_what_is_printed_fits_80_columns():
    class Long(Shown):
        def _facts(self):
            return "Long", {"warnings": "a word and another " * 20}

    text = repr(Long())
    assert max(map(len, text.split("\n"))) <= 80 and text.count("another") == 20


def test_a_wide_table_is_broken_between_columns_and_between_words_only():
    row = {"model": "one of them", "note": "some words " * 20} | {f"ruler {k}": 0.125 + k for k in range(12)}
    text = table_text([row, row | {"model": "the other"}], "a title that is long " * 6)
    assert max(map(len, text.split("\n"))) <= 80 and text.count("words") == 40
    for k in range(12):
        assert text.count(f" {0.125 + k:.4f}") == 2
    assert text.count("ruler") == 12
    assert text.count("one of them") == text.count("the other") > 1
    named = [
        {"model": "control: random core (seed 0)"}
        | {f"ruler {k}": f"0.0098 [-0.0018, {k}.0214]" for k in "ab"}
    ]
    assert table_text(named).count("control: random core  ") == 1 and "\n  (seed 0)" in table_text(named)
    assert table_text([{"path": "x" * 99, "n": 1}]).count("x" * 99) == 1  # one word stays whole


def test_a_comparison_fits_80_columns():
    one = np.random.default_rng(0).normal(0.1, 0.05, (12, 40))
    found = compare({f"model number {k}": one - k / 10 for k in range(4)}, clip=np.arange(12))
    text = repr(found)
    assert max(map(len, text.split("\n"))) <= 80 and found.statement in " ".join(text.split())
    assert all(f"{v:.4f}" in text for v in found.pairs["difference"]) and "may be best" in " ".join(
        text.split()
    )
    assert well_formed(found._repr_html_())
