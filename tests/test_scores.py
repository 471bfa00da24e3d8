"""The score sheet: what a row holds, what it refuses, and that saving loses nothing."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError, MissingError, seal
from cortexlit.evaluation.intervals import score_interval
from cortexlit.evaluation.scores import Score, ScoreSheet
from cortexlit.metrics import mean_score

WHERE = dict(dataset="A", tier="test", split="repeats", split_hash="0123456789abcdef")
CLIP = np.repeat(np.arange(6), 2)


@pytest.fixture
def values():
    g = np.random.default_rng(0)
    table = g.normal(0.1, 0.1, (12, 5))
    table[g.random(table.shape) < 0.2] = np.nan
    return table


def full_sheet(values):
    sheet = ScoreSheet()
    sheet.add("model", "r", values, clip=CLIP, baseline=0.05, ceiling=0.3, seed=0, **WHERE)
    sheet.add("model", "r", values * 0.9, clip=CLIP, baseline=0.05, ceiling=0.3, seed=1, **WHERE)
    sheet.add(
        "model",
        "CC_norm",
        values[:6],
        clip=CLIP[::2],
        samples=12,
        ceiling=1,
        note='a <b> & \u00e4, "c"\nd',
        **WHERE,
    )
    sheet.add("constant", "r", np.full((12, 5), np.nan), clip=CLIP, **WHERE)
    sheet.add(
        "repeat mean",
        "r",
        None,
        dataset="A",
        tier="test",
        split="stimuli",
        split_hash="ff",
        note="no training response",
    )
    return sheet


def test_row_is_computed_from_the_values(values):
    row = ScoreSheet().add("model", "r", values, clip=CLIP, chance=0.01, **WHERE)
    assert row.value == mean_score(values)
    assert (row.low, row.high) == score_interval(values, CLIP)
    assert (row.n_clips, row.n_samples, row.n_neurons) == (6, 12, 5)
    assert row.undefined == np.isnan(values).mean()
    assert row.chance == 0.01 and math.isnan(row.baseline) and math.isnan(row.ceiling)
    assert row.seed is None and row.note == ""


def test_counts_without_clip_and_for_rows_that_are_clips(values):
    sheet = ScoreSheet()
    row = sheet.add("a", "r", values, **WHERE)
    assert (row.n_clips, row.n_samples, row.n_neurons) == (12, 12, 5)
    row = sheet.add("b", "r", values[:6], clip=np.arange(6), samples=60, **WHERE)
    assert (row.n_clips, row.n_samples, row.n_neurons) == (6, 60, 5)
    assert (row.low, row.high) == score_interval(values[:6])


def test_values_per_neuron_are_refused_and_four_clips_have_no_interval(values):
    sheet = ScoreSheet()
    with pytest.raises(DataError, match="reduce="):
        sheet.add("a", "flattened", np.arange(5.0), **WHERE)
    row = sheet.add("b", "r", values[:4], **WHERE)
    assert math.isnan(row.low) and math.isnan(row.high) and "4 clips, 5 or more" in row.note


def test_mostly_undefined_scores_say_so(values):
    row = ScoreSheet().add("a", "single-trial r", np.where(values > 0.1, values, np.nan), clip=CLIP, **WHERE)
    assert row.undefined > 0.5 and "flattened" in row.note


def test_rows_without_value_are_kept_with_a_reason(values):
    table = full_sheet(values).table()
    assert table.value.isna().tolist() == [False, False, False, True, True]
    assert (table.note[table.value.isna()] != "").all()
    assert table.undefined[3] == 1 and math.isnan(table.undefined[4])
    assert table.n_neurons.tolist()[3] == 5 and table.n_neurons[4] is pd.NA
    assert "no training response" in repr(full_sheet(values))
    with pytest.raises(DataError, match="say in note"):
        ScoreSheet().add("x", "r", None, **WHERE)


def test_own_note_wins_over_the_automatic_one():
    row = ScoreSheet().add("x", "r", np.full((6, 3), np.nan), note="mine", **WHERE)
    assert row.note == "mine"


def test_one_clip_has_a_value_but_no_interval():
    row = ScoreSheet().add("x", "r", [[0.1, 0.2]], **WHERE)
    assert row.value == pytest.approx(0.15) and math.isnan(row.low) and math.isnan(row.high)
    assert "1 clips" in row.note


def test_save_and_load_lose_nothing(values, tmp_path):
    sheet = full_sheet(values)
    again = ScoreSheet.load(sheet.save(tmp_path / "new" / "run"))
    pd.testing.assert_frame_equal(again.table(), sheet.table(), check_exact=True)
    assert list(again.table().dtypes) == list(sheet.table().dtypes)
    content = json.loads(
        (tmp_path / "new/run/scores.json").read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    assert content["rows"][3]["value"] is None and content["rows"][4]["n_clips"] is None
    table = pd.read_csv(tmp_path / "new/run/scores.csv", dtype={"note": str})
    np.testing.assert_allclose(table.value, sheet.table().value)


FLOAT = st.floats(allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    value=FLOAT, low=FLOAT, ceiling=FLOAT, undefined=st.one_of(st.just(math.nan), st.floats(0, 1)),
    counts=st.one_of(st.none(), st.integers(0, 2**40)), seed=st.one_of(st.none(), st.integers(0, 2**31)),
    note=st.text(st.characters(codec="utf-8"), min_size=1),
)  # fmt: skip
def test_any_row_survives_the_file(tmp_path_factory, value, low, ceiling, undefined, counts, seed, note):
    limits = (0.0, low, ceiling)
    row = Score(
        "m", "t", "r", value, low, low, counts, counts, counts, undefined, *limits, "A", "s", "h", seed, note
    )
    folder = tmp_path_factory.mktemp("sheet")
    again = ScoreSheet.load(ScoreSheet([row]).save(folder)).rows[0]
    assert repr(again) == repr(row)


def test_empty_sheet(tmp_path):
    again = ScoreSheet.load(ScoreSheet().save(tmp_path))
    assert len(again) == 0 and "empty" in repr(again)
    assert list(again.table().columns) == list(Score.__dataclass_fields__)


def test_provenance_is_that_of_the_computation(values, tmp_path):
    full_sheet(values).save(tmp_path)
    path = tmp_path / "scores.json"
    content = json.loads(path.read_text())
    content["provenance"]["python"] = "1.0"
    path.write_text(json.dumps(content))
    again = ScoreSheet.load(tmp_path)
    again.save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy/scores.json").read_text())["provenance"]["python"] == "1.0"
    again.add("new", "r", values, **WHERE)
    again.save(tmp_path / "changed")
    assert json.loads((tmp_path / "changed/scores.json").read_text())["provenance"]["python"] != "1.0"


def test_failed_save_keeps_the_old_file(values, tmp_path, monkeypatch):
    sheet, folder = full_sheet(values), tmp_path / "run"
    sheet.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, path, **_: (path.write_text("half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        ScoreSheet(sheet.rows[:1]).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_duplicates_raise_but_seeds_and_splits_do_not(values):
    sheet = full_sheet(values)
    with pytest.raises(DataError, match="already"):
        sheet.add("model", "r", values, seed=1, **WHERE)
    assert len(sheet) == 5
    sheet.add("model", "r", values, seed=2, **WHERE)
    sheet.add("model", "r", values, seed=2, **{**WHERE, "split_hash": "other"})
    sheet.add("model", "r", values, seed=2, **{**WHERE, "tier": "validation"})
    sheet.add("model", "r", values, seed=2, **{**WHERE, "dataset": "B"})
    with pytest.raises(DataError, match="already"):
        ScoreSheet([*sheet.rows, sheet.rows[0]])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(values=np.zeros((2, 12, 2, 2))), r"\(samples, neurons\)"),
        (dict(values=0.3), r"\(samples, neurons\)"),
        (dict(values=[]), "empty or infinite"),
        (dict(values=[[np.inf, 1.0]]), "empty or infinite"),
        (dict(clip=[0, 1]), "one id per sample"),
        (dict(model=""), "column model"),
        (dict(split_hash=""), "column split_hash"),
        (dict(dataset=""), "column dataset"),
        (dict(tier=None), "column tier"),
        (dict(ceiling=math.inf), "column ceiling"),
        (dict(seed=-3), "column seed"),
    ],
)
def test_wrong_rows_raise(change, words):
    arguments = dict(model="m", metric="r", values=np.ones((12, 5)), clip=CLIP, **WHERE) | change
    with pytest.raises(DataError, match=words):
        ScoreSheet().add(**arguments)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: [],
        lambda c: c | {"format": 2},
        lambda c: c | {"rows": None},
        lambda c: c | {"rows": [1]},
        lambda c: c | {"rows": [{**c["rows"][0], "extra": 1}]},
        lambda c: c | {"rows": [{k: v for k, v in c["rows"][0].items() if k != "note"}]},
        lambda c: c | {"rows": [{**c["rows"][0], "value": "0.1"}]},
        lambda c: c | {"rows": [{**c["rows"][0], "n_clips": 2.5}]},
        lambda c: c | {"rows": [{**c["rows"][0], "value": None}]},
        lambda c: c | {"rows": c["rows"][:1] * 2},
    ],
)
def test_damaged_files_raise(damage, values, tmp_path):
    path = full_sheet(values).save(tmp_path) / "scores.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(DataError):
        ScoreSheet.load(tmp_path)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(MissingError):
        ScoreSheet.load(tmp_path)
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        ScoreSheet.load(tmp_path)


def test_html_is_escaped(values):
    html = full_sheet(values)._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html


def test_plot_shows_every_row(values):
    figure = full_sheet(values).plot()
    axes = figure.axes
    assert len(axes) == 4  # two metrics by two splits
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert labels == ["model (seed 0)", "model (seed 1)", "model", "constant", "repeat mean"]
    dots = [
        line for line in axes[0].lines if line.get_marker() == "o" and not np.isnan(line.get_xdata()).any()
    ]
    assert [float(line.get_xdata()[0]) for line in dots] == [row.value for row in full_sheet(values).rows[:2]]
    ceilings = [
        line for line in axes[0].lines if line.get_color() == "tab:red" and line.get_xdata()[0] == 0.3
    ]
    assert len(ceilings) == 2
    assert [text.get_text() for text in axes[2].texts] == ["no value"]
    with pytest.raises(DataError, match="nothing to plot"):
        ScoreSheet().plot()


@pytest.mark.parametrize("opened", ["x", ["x"], {"a": "often"}])
def test_a_sheet_whose_count_of_openings_is_none(tmp_path, opened):
    ScoreSheet().save(tmp_path)
    path = tmp_path / "scores.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(seal(content | {"opened": opened})))
    with pytest.raises(DataError, match="opened"):
        ScoreSheet.load(tmp_path)


def fact(text: str) -> str:
    "Without the breaks of lines that a narrow print puts in."
    return " ".join(text.split())


def test_a_print_fits_80_columns_and_leaves_nothing_out(values):
    sheet = full_sheet(values)
    for k in range(5):
        sheet.add(f"a model with a long name, number {k}", "r", values - k, clip=CLIP, ceiling=0.3, **WHERE)
    sheet.opened["A"] = 3
    text = repr(sheet)
    assert max(map(len, text.split("\n"))) <= 80 and "A: test tier opened 3 times" in text
    for row in sheet.rows:
        numbers = [row.value, row.low, row.high, row.chance, row.baseline, row.ceiling]
        told = [f"{v:.4f}" for v in numbers if not math.isnan(v)]
        counts = [row.n_clips, row.n_samples, row.n_neurons, row.seed]
        told += [str(v) for v in counts if v is not None]
        told += [
            *row.model.split(),
            row.metric,
            row.dataset,
            row.tier,
            row.split,
            row.split_hash[:8],
            fact(row.note),
        ]
        told += [] if math.isnan(row.undefined) else [f"{row.undefined:.0%}"]
        assert [t for t in told if t not in fact(text)] == []
    assert "ceiling 0.3000" not in text  # CC_norm has another one: it stands in the table of the rulers


def test_a_row_unlike_the_others_is_told_in_a_line_of_its_own(values):
    sheet = ScoreSheet()
    sheet.add("one", "r", values, clip=CLIP, **WHERE)
    sheet.add("two", "r", values, clip=CLIP, **WHERE)
    assert "two (r)" not in repr(sheet)
    sheet.add("three", "r", values[:6], **WHERE)
    (line,) = [line for line in repr(sheet).split("\n") if line.startswith("three (r)")]
    assert "samples 6" in line


def test_html_scrolls_by_itself(values):
    html = full_sheet(values)._repr_html_()
    assert html.count("<table") == html.count("<div style='overflow-x:auto'><table")
