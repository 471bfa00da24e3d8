"""Words that mean one thing: the three studies by number, the terms of the glossary, the literature by its key.

Read from the notebooks, nothing is run.
"""

import ast
import csv
import json
import re
import sys
from pathlib import Path

import pytest
from test_notebooks import NOTEBOOKS, ROOT, cells

sys.path.insert(0, str(ROOT / "tools"))
import check_docs  # noqa: E402

STUDIES = "00_the_studies.ipynb"
PAGES = [p for p in NOTEBOOKS if p.parent.name == "neuro_nbs" and p.name != STUDIES]
BEING_REMADE: set[str] = set()  # pages whose tables are being remade
BARE = re.compile(r"\b(?:the|this|that|our|source|original)\s+stud(?:y|ies)\b(?!\s+[123]\b)", flags=re.I)

each = pytest.mark.parametrize("path", PAGES, ids=[p.name for p in PAGES])


def prose(path: Path) -> list[str]:
    "Texts of a page without code; the first one is its title and summary."
    texts = [re.sub(r"^```.*?^```", "", c["source"], flags=re.M | re.S) for c in cells(path, "markdown")]
    return [re.sub(r"`[^`\n]*`", "", text) for text in texts]


def bare_mentions(texts: list[str]) -> list[str]:
    'Places that say "the study" without saying which of the three.'
    return [text[max(m.start() - 40, 0) : m.end() + 40] for text in texts for m in BARE.finditer(text)]


def first_mentions(texts: list[str]) -> list[str]:
    "Numbered studies whose first mention below title and headings is no link to where they are told."
    body = "\n".join(line for text in texts[1:] for line in text.splitlines() if not line.startswith("#"))
    unlinked = []
    for number in "123":
        found = re.search(rf"(\[?)\bstudy {number}\b(\]\(([^)]*)\))?", body, flags=re.I)
        if found and found.group(3) != f"{STUDIES}#study-{number}":
            unlinked.append(f"study {number}: ...{body[max(found.start() - 40, 0) : found.end() + 40]}")
    return unlinked


@each
def test_a_study_is_named_by_its_number_and_linked_where_it_comes_first(path):
    if path.name in BEING_REMADE:
        pytest.xfail("its tables are being remade; the words follow")
    assert not bare_mentions(prose(path)), 'say "study 1", "study 2" or "study 3"'
    assert not first_mentions(prose(path)), f"link it: [study 1]({STUDIES}#study-1)"


@pytest.mark.parametrize(
    ("text", "bare", "unlinked"),
    [
        (f"as [study 1]({STUDIES}#study-1) did, and study 1 says so", 0, 0),
        ("as study 1 did", 0, 1),
        ("as the study did", 1, 0),
        ("The study's own space; the source study's", 2, 0),
        (f"[study 2]({STUDIES}#study-1)", 0, 1),
        (f"## Of study 3\n\nas [Study 3]({STUDIES}#study-3) did", 0, 0),
        ("an Optuna study, `study`, studies of cells", 0, 0),
    ],
)
def test_what_is_noticed(text, bare, unlinked):
    texts = ["# Title", text]
    assert len(bare_mentions(texts)) == bare
    assert len(first_mentions(texts)) == unlinked


# --- the glossary -----------------------------------------------------------------------------------------------------

GLOSSARY = next(p for p in NOTEBOOKS if p.name == "00b_glossary.ipynb")


def targets(path: Path) -> list[tuple[str, str]]:
    "(term, link) of each row that the page shows."
    shown = [
        "".join(o.get("data", {}).get("text/markdown", "")) for c in cells(path, "code") for o in c["outputs"]
    ]
    return re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \|", "\n".join(shown), flags=re.M)


def lost(found: list[tuple[str, str]], folder: Path) -> list[str]:
    "Terms whose link leads to no page, or to no heading of it."
    missing = []
    for term, link in found:
        page, _, anchor = link.partition("#")
        path = folder / page
        if not path.is_file() or anchor not in check_docs.anchors("\n\n".join(prose_with_code(path))):
            missing.append(f"{term}: {link}")
    return missing


def prose_with_code(path: Path) -> list[str]:
    return [c["source"] for c in cells(path, "markdown")]


def test_every_term_of_the_glossary_leads_to_a_heading():
    found = targets(GLOSSARY)
    terms = {term for term, _ in found}
    assert {
        "tier",
        "clip",
        "FEVE",
        "core",
        "head",
        "readout",
        "tubelet",
        "beta",
        "oracle, other repeats",
    } <= terms
    assert lost(found, GLOSSARY.parent) == []


def test_a_term_that_leads_nowhere_is_noticed():
    folder = GLOSSARY.parent
    assert lost([("tier", "03_dataset.ipynb#clips-and-tears")], folder)
    assert lost([("tier", "03_no_such_page.ipynb#clips-and-tiers")], folder)
    assert lost([("tier", "03_dataset.ipynb#clips-and-tiers")], folder) == []


def test_the_glossary_was_run_since_its_table_was_changed():
    source = next(c["source"] for c in cells(GLOSSARY, "code") if "TERMS =" in c["source"])
    table = next(n.value.value for n in ast.parse(source).body if isinstance(n, ast.Assign))
    terms = [row["term"].replace("_", r"\_") for row in csv.DictReader(table.splitlines())]
    assert sorted(terms) == sorted(term for term, _ in targets(GLOSSARY))


SHOWINGS = re.compile(r"\b(?:a|one|single|each|every|two|three|ten|per|between|of) showings?\b", flags=re.I)


@each
def test_a_stimulus_has_repeats_presentations_and_trials_but_no_showings(path):
    assert not SHOWINGS.findall("\n".join(prose(path))), "see the glossary"


# --- the literature ---------------------------------------------------------------------------------------------------

ENTRY = """@article{{{key},
  author = {{Lurz, Konstantin-Klemens and others}},
  title = {{Generalization}},
  volume = {{1}},
  year = {{2021}},
  {more}
}}
"""


def library(folder: Path, bib: str, text: str, code: str = "") -> list[str]:
    "What is found in a checkout of one page and one bibliography."
    (folder / "neuro_nbs").mkdir()
    (folder / "references.bib").write_text(bib, encoding="utf-8")
    page = {
        "cells": [
            {"cell_type": "markdown", "source": text},
            {"cell_type": "code", "source": code, "outputs": []},
        ]
    }
    (folder / "neuro_nbs" / "page.ipynb").write_text(json.dumps(page), encoding="utf-8")
    return check_docs.citation_problems(folder)


def test_every_citation_has_an_entry_and_every_entry_is_cited():
    assert check_docs.citation_problems() == []


@pytest.mark.parametrize(
    ("key", "more", "text", "code", "problem"),
    [
        ("lurz2021", "doi = {10.1101/2020.10.05.326256}", "A readout [@lurz2021].", "", None),
        ("lurz2021", "eprint = {2010.05326}", "Lurz [-@lurz2021], `[@nobody]`, x@y.z", "", None),
        ("lurz2021", "", "", "# a readout (Lurz et al. 2021)", None),
        ("lurz2021", "", "[@lurz2021; @willeke2022]", "", "@willeke2022 is not in references.bib"),
        ("lurz2021", "", "", "", "nothing cites @lurz2021"),
        ("lurz2021", "doi = {https://doi.org/10.1101/2020}", "[@lurz2021]", "", "is no DOI"),
        ("lurz2021", "eprint = {arXiv:2010.05326}", "[@lurz2021]", "", "is no number of arXiv"),
        ("lurz2020", "", "[@lurz2020]", "", "its key should be lurz2021"),
        ("lurz2021", "", "[@lurz2021], as Li et al. (2023)", "", "should be a citation"),
        ("lurz2021", "", "[@lurz2021]", "# Dupré la Tour et al. 2022", "dupre 2022, named in code"),
        (
            "lurz2021",
            "doi = {10.1234/a}",
            "[@lurz2021] [doi:10.1234/a](https://doi.org/10.1234/b)",
            "",
            "leads to",
        ),
    ],
)
def test_what_is_wrong_with_a_citation_is_told(tmp_path, key, more, text, code, problem):
    found = library(tmp_path, ENTRY.format(key=key, more=more), text, code)
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


def test_a_list_of_further_reading_cites_by_itself_and_its_numbers_must_be_known(tmp_path):
    entry = ENTRY.format(key="lurz2021", more="doi = {10.1101/2020.10.05.326256}")
    listed = "## Further reading\n\n* Lurz et al. (2021), readouts. [doi:%s](https://doi.org/%s)"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert library(tmp_path / "a", entry, listed % (("10.1101/2020.10.05.326256",) * 2)) == []
    (problem,) = library(tmp_path / "b", entry, listed % (("10.1101/2020.10.05.326257",) * 2))
    assert "10.1101/2020.10.05.326257 is not in references.bib" in problem


def test_an_entry_that_stands_twice_or_lacks_a_field_is_told(tmp_path):
    bib = ENTRY.format(key="lurz2021", more="") * 2
    assert any("twice" in text for text in library(tmp_path, bib, "[@lurz2021]"))
    assert check_docs.entry_problems("a2020", {"author": "A", "year": "2020"}) == ["@a2020 has no title"]
    printed = {"kind": "article", "author": "A", "year": "2020", "title": "T", "doi": "10.1234/a"}
    assert "no volume" in check_docs.entry_problems("a2020", printed)[0]
    assert check_docs.entry_problems("a2020", printed | {"volume": "3"}) == []


# --- the two front pages ----------------------------------------------------------------------------------------------

FENCE = re.compile(r"^```(python|bash)\n(.*?)^```", flags=re.M | re.S)


def programs(text: str) -> list[str]:
    "What a front page asks to type: Python programs, and calls of the command."
    blocks = FENCE.findall(text)
    return [code for kind, code in blocks if kind == "python"] + [
        line
        for kind, code in blocks
        if kind == "bash"
        for line in code.splitlines()
        if line.startswith("cortexlit ")
    ]


def test_the_home_page_and_the_readme_show_the_same_programs():
    home = "\n\n".join(c["source"] for c in cells(ROOT / "index.ipynb", "markdown"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(programs(home)) > 4
    assert programs(home) == programs(readme)


def test_the_paths_of_the_home_page_add_up():
    text = next(c["source"] for c in cells(ROOT / "index.ipynb", "markdown") if "Seven stops" in c["source"])
    rows = [line.split("|")[2:-1] for line in text.splitlines() if re.match(r"\| (\d )?\|", line)]
    stops, total = rows[-8:-1], rows[-1]
    for column in range(4):
        minutes = sum(int(re.search(r", (\d+) *$", row[column]).group(1)) for row in stops)
        assert f"{minutes // 60} h {minutes % 60:02d}" == total[column].strip()
