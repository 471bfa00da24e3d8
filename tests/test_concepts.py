"""The table of concepts and the sections of the course name each other: read from the notebooks, nothing is run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_docs  # noqa: E402


@pytest.fixture
def course(tmp_path) -> Path:
    "A copy of the course, to be spoilt."
    (tmp_path / "nbs").mkdir()
    for path in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"):
        shutil.copy2(path, tmp_path / "nbs")
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    "Replace text in the cells of a notebook, outputs left alone."
    book = json.loads(path.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        cell["source"] = check_docs.text_of(cell["source"]).replace(old, new)
    path.write_text(json.dumps(book), encoding="utf-8")


def test_every_section_of_the_course_is_in_the_table():
    assert check_docs.concept_problems() == []


def test_a_renamed_section_is_missed_by_the_table_and_in_it(course):
    change(course / "nbs" / "10_attention.ipynb", "## Heads", "## Many heads")
    problems = check_docs.concept_problems(course)
    assert len(problems) == 2
    assert any("has no section 'Heads'" in p for p in problems)
    assert any("no concept of the section 'Many heads'" in p for p in problems)


def test_a_page_that_was_not_run_again_is_noticed(course):
    change(course / "nbs" / "10_attention.ipynb", "## Heads", "## Many heads")
    change(course / "nbs" / "00b_concepts.ipynb", ",Heads,", ",Many heads,")
    (problem,) = check_docs.concept_problems(course)
    assert "run it again" in problem and "10_attention.ipynb#many-heads" in problem


def test_standing_sections_need_no_concept_and_new_chapters_do(course):
    change(course / "nbs" / "10_attention.ipynb", "## Exercises", "## Exercises, for two")
    assert check_docs.concept_problems(course) == []
    shutil.copy2(course / "nbs" / "10_attention.ipynb", course / "nbs" / "99_more.ipynb")
    assert check_docs.concept_problems(course)


def test_without_a_table_nothing_passes(course):
    change(course / "nbs" / "00b_concepts.ipynb", "CONCEPTS = ", "TABLE = ")
    assert "no cell assigns" in check_docs.concept_problems(course)[0]
    (course / "nbs" / "00b_concepts.ipynb").unlink()
    assert "missing" in check_docs.concept_problems(course)[0]
