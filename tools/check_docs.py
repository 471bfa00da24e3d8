"""Build the pages of the site and check what a reader would click on. Quarto is not needed.

nbdev's half of the documentation build runs on a temporary copy of the project, so no tracked file changes;
the pages end up in _proc/, where `make docs` lets Quarto render them. Checked are, on every page: a title of
its own, links and their anchors, pictures, rendered signatures, saved errors, names in backticks that should
have become links; and that the sidebar lists every notebook once. README.md and CONTRIBUTING.md are checked
for links to files and headings. The table of concepts must name every section of the course, and no other.
Every key that a page cites must be in references.bib, whose DOIs and numbers of arXiv must have the right form.
Exit status 1 and a list of problems if there are any. With `--site FOLDER` the HTML that Quarto has made of the pages
is checked instead: links, anchors, pictures, and what every head must hold.
"""

import ast
import csv
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import yaml
from nbdev.config import get_config
from project import LIBRARY, ROOT, copy_project, notebooks

MESSAGES = ".messages.txt"  # of nbdev
GUIDES = ("README.md", "CONTRIBUTING.md")
BIBLIOGRAPHY = "references.bib"  # of all pages
CONCEPTS = "nbs/00b_concepts.ipynb"  # the table of the course's concepts
STANDING = (
    re.compile(  # sections that every chapter has, or that are about the library: no concept of their own
        r"What it does for neurons|Easily got wrong|Exercises|Five (sentences|questions)|Where it is used|"
        r"Further reading|For the library"
    )
)


@dataclass
class Page:
    "One page of the site: its source, its address, and what is on it."

    source: str  # nbs/00_core.ipynb
    address: str  # nbs/core.html
    title: str
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


# ---- reading markdown ------------------------------------------------------------------------------------


def without_code(text: str, inline: bool = True) -> str:
    "Markdown without fenced code and, unless told, without `inline code`."
    text = re.sub(r"^( {0,3})(```+|~~~+).*?^ {0,3}\2[`~]*[ \t]*$", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S) if inline else text


def slug(heading: str) -> str:
    "The anchor Pandoc gives to a heading."
    named = re.search(r"\{[^}]*#([\w.:-]+)[^}]*\}\s*$", heading)
    if named:
        return named.group(1)
    text = re.sub(r"\s*\{[^}]*\}\s*$", "", heading)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links: their text
    text = re.sub(r"-{2,3}", "", text.lower())  # dashes
    text = re.sub(r"[^\w\s.-]", "", text)
    text = re.sub(r"\s+", "-", text.strip())
    return re.sub(r"^[\W\d_]+", "", text) or "section"


def anchors(text: str) -> list[str]:
    "Anchors of all headings of a page, repeated ones numbered, and of elements with an id."
    found, used = [], {}
    plain = without_code(text, inline=False)
    for heading in re.findall(r"^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", plain, flags=re.M):
        name = slug(heading)
        used[name] = used.get(name, -1) + 1
        found.append(f"{name}-{used[name]}" if used[name] else name)
    found += re.findall(r"<\w+[^>]*\sid=[\"']([^\"']+)", plain)
    return found + re.findall(r"^:{3,}\s*\{[^}]*#([\w-]+)", plain, flags=re.M)


def links(text: str) -> list[str]:
    "Targets of markdown and HTML links and pictures."
    plain = without_code(text)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", plain)
    html = re.findall(r"<(?:a|img)\b[^>]*\s(?:href|src)=[\"']([^\"']+)", plain)
    reference = re.findall(r"^\[[^\]^]+\]:\s*<?(\S+?)>?\s*$", plain, flags=re.M)
    return [*inline, *html, *reference]


def is_external(target: str) -> bool:
    return bool(re.match(r"[a-z][a-z0-9+.-]*:", target, flags=re.I)) or target.startswith("//")


@cache
def library_names() -> set[str]:
    "Every module of the library and what each defines at its top level, with the members of classes."
    found = set()
    for path in (ROOT / LIBRARY).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found |= {f"{module}.{name}" for name in defined(node)}
            if isinstance(node, ast.ClassDef):
                members = {name for item in node.body for name in defined(item)}
                found |= {f"{module}.{node.name}.{name}" for name in members}
    return found


def defined(node: ast.AST) -> set[str]:
    "Names that a statement binds."
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}


def unlinked(text: str) -> list[str]:
    "Names of this library in backticks that are neither a link nor something the library has."
    plain = without_code(text, inline=False)
    plain = re.sub(r"\[`[^`]+`\]\([^)]*\)", "", plain)  # nbdev made a link of it
    names = re.findall(rf"`({LIBRARY}(?:\.\w+)+)(?:\(\))?`", plain)
    return [name for name in names if name not in library_names()]


# ---- reading pages ---------------------------------------------------------------------------------------


def text_of(value: str | list[str] | None) -> str:
    return value if isinstance(value, str) else "".join(value or "")


def read_page(path: Path, proc: Path) -> Page:
    "Collect what a processed notebook holds."
    source = path.relative_to(proc).as_posix()
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    front = {}
    if cells and cells[0]["cell_type"] == "raw":
        front = yaml.safe_load(text_of(cells[0]["source"]).strip().strip("-")) or {}
    name = front.get("output-file", Path(source).with_suffix(".html").name)
    page = Page(source, (Path(source).parent / name).as_posix(), str(front.get("title", "")))
    if not page.title:
        page.problems.append("no title: the first cell must be '# Title', a blank line, '> summary'")

    parts = []
    for cell in cells:
        code, shown = text_of(cell.get("source")), []
        if cell["cell_type"] == "markdown":
            shown.append(code)
            for attached in re.findall(r"\]\(attachment:([^)\s]+)", code):
                if unquote(attached) not in cell.get("attachments", {}):
                    page.problems.append(f"attached picture {attached} is missing")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                page.problems.append(f"saved output is an error: {output['ename']}: {output['evalue'][:80]}")
            shown.append(text_of(output.get("data", {}).get("text/markdown")))
        call = re.search(r"^show_doc\(.*", code, flags=re.M)
        if call and not any(shown):
            page.problems.append(f"{call.group(0)} rendered nothing")
        parts += shown
    page.problems += [text for cell in cells for text in leftovers(cell, path.name.startswith("19"))]
    text = "\n\n".join(parts)
    page.anchors, page.links = set(anchors(text)), links(text)
    page.problems += [f"`{name}` is not in the library" for name in unlinked(text)]
    return page


def places(
    pages: list[Page],
    proc: Path,  # the folder of all pages
) -> dict[Path, Page]:  # page of each notebook and of each HTML file
    "Where the pages lie."
    names = [(name, page) for page in pages for name in (page.source, page.address)]
    return {(proc / name).resolve(): page for name, page in names}


def check_link(page: Page, target: str, by_place: dict[Path, Page], proc: Path, base: str) -> str | None:
    "What is wrong with one link, if anything."
    target = target.replace("&amp;", "&")
    if target.startswith(base):
        address, _, anchor = target[len(base) :].partition("#")
        found = by_place.get((proc / (address or "index.html")).resolve())
        if found is None:
            return f"no page for {target}"
    elif is_external(target):
        return None
    else:
        where, _, anchor = target.partition("#")
        folder = proc if where.startswith("/") else (proc / page.source).parent
        file = (folder / unquote(where).lstrip("/") if where else proc / page.source).resolve()
        found = by_place.get(file)
        if found is None:
            return None if file.exists() else f"no such file: {target}"
    if anchor and unquote(anchor) not in found.anchors:
        return f"no heading #{anchor} on {found.source} (link {target})"
    return None


def sidebar_problems(pages: list[Page], config: dict) -> list[str]:
    "Notebooks missing from the sidebar, listed twice, or listed but not there."
    listed = re.findall(r'"([\w./-]+\.(?:ipynb|qmd))"', json.dumps(config["website"]))
    have = {page.source for page in pages}
    return [
        *(
            f"_quarto.yml: the sidebar lists {name}, which does not exist"
            for name in sorted(set(listed) - have)
        ),
        *(f"_quarto.yml: {name} is not in the sidebar" for name in sorted(have - set(listed))),
        *(
            f"_quarto.yml: {name} is listed twice"
            for name in sorted({n for n in listed if listed.count(n) > 1})
        ),
    ]


def name_problems(config: dict, home: str) -> list[str]:
    "Pages whose short name in the sidebar is not that of the map on the home page."
    called = dict(re.findall(r"^\| \[([^\]]+)\]\(([\w./-]+\.ipynb)\) \|", home, flags=re.M))
    called = {page: name for name, page in called.items()}
    found, entries = [], [*config["website"]["sidebar"]["contents"]]
    while entries:
        entry = entries.pop(0)
        if isinstance(entry, str):
            found.append(f"_quarto.yml: {entry} needs a short name in the sidebar (text and href)")
        elif "contents" in entry:
            entries += entry["contents"]
        elif entry["href"] != "index.ipynb" and entry.get("text") != called.get(entry["href"]):
            at_home = called.get(entry["href"], "not on the home page")
            found.append(
                f"_quarto.yml: {entry['href']} is {entry.get('text')!r} in the sidebar, {at_home!r} at home"
            )
    return found


def guide_problems(name: str) -> list[str]:
    "Dead links to files and headings in a markdown file of the repository."
    path = ROOT / name
    if not path.exists():
        return [f"{name}: missing"]
    text = path.read_text(encoding="utf-8")
    problems = [f"{name}: `{missing}` is not in the library" for missing in unlinked(text)]
    for target in links(text):
        where, _, anchor = target.partition("#")
        if is_external(target):
            continue
        file = path.parent / unquote(where) if where else path
        if not file.exists():
            problems.append(f"{name}: no such file: {target}")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            problems.append(f"{name}: no heading #{anchor} in {file.name}")
    return problems


# ---- the concepts of the course --------------------------------------------------------------------------


def concept_rows(cells: list[dict]) -> list[dict[str, str]] | None:
    "Rows of the table that a cell of the page assigns to CONCEPTS; None if none does."
    for source in (text_of(c["source"]) for c in cells if c["cell_type"] == "code"):
        if re.search(r"^CONCEPTS\s*=", source, flags=re.M):
            nodes = [n for n in ast.parse(source).body if isinstance(n, ast.Assign)]
            table = next(n.value.value for n in nodes if n.targets[0].id == "CONCEPTS")
            return list(csv.DictReader(table.splitlines()))
    return None


def concept_problems(
    root: Path = ROOT,  # a checkout
) -> list[str]:  # concepts that lead nowhere, sections that no concept names, a page not run since
    "Compare the table of concepts with the sections of the chapters, and with the page's own output."
    page = root / CONCEPTS
    if not page.exists():
        return [f"{CONCEPTS}: missing"]
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    rows = concept_rows(cells)
    if not rows:
        return [f"{CONCEPTS}: no cell assigns the table CONCEPTS"]
    shown = "\n".join(
        text_of(o.get("data", {}).get("text/markdown")) for c in cells for o in c.get("outputs", [])
    )
    targets, problems = set(links(shown)), []
    for path in sorted(page.parent.glob("[0-9][0-9]_*.ipynb")):
        chapter = path.name[:2]
        if chapter == "00":
            continue
        source = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(text_of(c["source"]) for c in source if c["cell_type"] == "markdown")
        headings = re.findall(r"^##[ \t]+(.+?)[ \t]*$", without_code(text, inline=False), flags=re.M)
        named = [row["heading"] for row in rows if row["chapter"] == chapter]
        for heading in dict.fromkeys(named):
            target = f"{path.name}#{slug(heading)}"
            if heading not in headings:
                problems.append(f"{CONCEPTS}: {path.name} has no section {heading!r}")
            elif target not in targets:
                problems.append(f"{CONCEPTS}: run it again, its output has no link to {target}")
        problems += [
            f"{CONCEPTS}: no concept of the section {heading!r} of {path.name}"
            for heading in headings
            if heading not in named and not STANDING.match(heading)
        ]
    return problems


# ---- the literature ---------------------------------------------------------------------------------------

CITED = re.compile(r"(?<![\w@.])-?@([a-zA-Z][\w:-]*)")
NEEDED = ("author", "title", "year")
DOI = re.compile(r"10\.\d{4,9}/\S*[^\s.,;]")
EPRINT = re.compile(r"\d{4}\.\d{4,5}(v\d+)?")
# "Lurz et al. 2021", "Ding, Li and Jordan (2010)", also with a "de" or "la" before the name.
_NAME = r"(?:(?:de|den|der|van|Van) )*[A-Z](?![A-Z])[\w'-]*[^\W\d_A-Z](?: la [A-Z][a-z]+)?"
AUTHORS = re.compile(
    rf"\b({_NAME})(?:, {_NAME})*(?:,? (?:and|&) {_NAME})?(?: et al\.?)?,? \(?((?:18|19|20)\d\d)\)?"
)
NO_AUTHORS = {"Sensorium", "Apache", "Python", "Version", "Since", "Nov", "In", "Until", "Before"}


def entries(text: str) -> dict[str, dict[str, str]]:
    "key -> field -> value of a BibTeX file whose fields stand in lines of their own; a key met twice has 'twice'."
    found: dict[str, dict[str, str]] = {}
    for kind, key, body in re.findall(r"^@(\w+)\{([^,\s]+),\n(.*?)^\}", text, flags=re.M | re.S):
        fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?\s*$", body, flags=re.M))
        found[key] = fields | {"kind": kind} | ({"twice": key} if key in found else {})
    return found


def family(name: str) -> str:
    "A family name as keys have it: plain lower case letters of its first word that is no particle."
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip("{} ").lower()
    plain = re.sub(r"^(?:(?:de|den|der|van) )+", lambda m: m.group().replace(" ", ""), plain)
    return re.split(r"[^a-z]", plain)[0]


def entry_problems(key: str, fields: dict[str, str]) -> list[str]:
    "What is wrong with one entry of the bibliography."
    problems = [f"@{key} has no {name}" for name in NEEDED if not fields.get(name, "").strip()]
    if "twice" in fields:
        problems.append(f"@{key} stands there twice")
    if fields.get("kind") == "article" and "doi" in fields and "volume" not in fields:
        problems.append(f"@{key} has no volume: it would be said to be ahead of print")
    doi, eprint = fields.get("doi"), fields.get("eprint")
    if doi is not None and not DOI.fullmatch(doi):
        problems.append(f"@{key}: {doi!r} is no DOI (10.1234/name, without https://)")
    if eprint is not None and not EPRINT.fullmatch(eprint):
        problems.append(f"@{key}: {eprint!r} is no number of arXiv (2101.00001)")
    author = fields.get("author", "").split(" and ")[0].split(",")[0]
    expected = family(author) + fields.get("year", "")
    if not problems and not re.fullmatch(rf"{expected}[a-z]?", key):
        problems.append(f"@{key}: its key should be {expected}, from the first author and the year")
    return problems


@dataclass
class Citations:
    "What one notebook says of the literature."

    cited: set[str] = field(default_factory=set)  # keys
    named: set[tuple[str, str]] = field(default_factory=set)  # (family, year) in comments and docstrings
    listed: set[tuple[str, str]] = field(default_factory=set)  # (family, year) in the list of further reading
    bare: list[tuple[str, str, str]] = field(default_factory=list)  # (as written, family, year) in its text
    numbers: set[str] = field(default_factory=set)  # DOIs and numbers of arXiv


def page_citations(path: Path) -> Citations:
    "Read what a notebook cites, names and lists."
    found = Citations()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = text_of(cell["source"])
        if cell["cell_type"] == "code":
            said = "\n".join(re.findall(r'"[^"\n]*"|#.*|^    .*', text, flags=re.M))
            found.named |= {(who, year) for _, who, year in mentions(text) if f"{year}" in said}
            continue
        found.numbers |= {
            x.removeprefix("10.48550/arXiv.") for x in re.findall(r"\[(?:doi|arXiv):(\S+?)\]\(", text)
        }
        text = re.sub(r"\]\([^)]*\)|<?https?://\S+", "]", without_code(text))
        found.cited |= set(CITED.findall(text))
        text, _, reading = text.partition("## Further reading")
        found.bare += mentions(text)
        found.listed |= {(who, year) for _, who, year in mentions(reading)}
    return found


def mentions(text: str) -> list[tuple[str, str, str]]:
    "(as written, family, year) of each author with a year."
    found = [m for m in AUTHORS.finditer(text) if m.group(1).split()[0] not in NO_AUTHORS]
    return [(m.group(0), family(m.group(1)), m.group(2)) for m in found]


def citation_problems(
    root: Path = ROOT,  # a checkout
) -> list[str]:  # of the bibliography, of citations without an entry, of entries that nobody cites
    "Compare references.bib with what the pages cite, and with the DOIs of their lists of further reading."
    file = root / BIBLIOGRAPHY
    if not file.exists():
        return [f"{BIBLIOGRAPHY}: missing"]
    known = entries(file.read_text(encoding="utf-8"))
    problems = [
        f"{BIBLIOGRAPHY}: {text}" for key, fields in known.items() for text in entry_problems(key, fields)
    ]
    used: set[str] = set()
    keys: dict[tuple[str, str], set[str]] = {}
    for key, fields in known.items():
        keys.setdefault((family(fields.get("author", "").split(",")[0]), fields.get("year", "")), set()).add(
            key
        )
    numbers = {fields[kind] for fields in known.values() for kind in ("doi", "eprint") if kind in fields}
    for path in notebooks(root):
        name, page = path.relative_to(root).as_posix(), page_citations(path)
        missing = [f"@{key}" for key in sorted(page.cited - set(known))]
        missing += sorted(page.numbers - numbers)
        neuro = name.startswith("neuro_nbs/")
        missing += [
            f"{who} {year}, named in code,"
            for who, year in sorted(page.named)
            if neuro and (who, year) not in keys
        ]
        problems += [f"{name}: {text} is not in {BIBLIOGRAPHY}" for text in missing]
        bare = [text for text, who, year in page.bare if neuro or (who, year) in keys]
        problems += [f"{name}: {text!r} should be a citation, [@key]" for text in bare]
        used |= {
            key for key, fields in known.items() if {fields.get("doi"), fields.get("eprint")} & page.numbers
        }
        used |= page.cited | {key for pair in page.named | page.listed for key in keys.get(pair, ())}
        for shown, target in re.findall(
            r"\[doi:(\S+?)\]\(https://doi\.org/([^()\s]+(?:\([^)]*\)[^()\s]*)*)\)",
            path.read_text(encoding="utf-8"),
        ):
            if not DOI.fullmatch(shown) or unquote(target) != shown:
                problems.append(f"{name}: doi:{shown} leads to {target}")
    return problems + [f"{BIBLIOGRAPHY}: nothing cites @{key}" for key in sorted(set(known) - used)]


# ---- the whole -------------------------------------------------------------------------------------------


LINKED = re.compile(r"\[(`+[^`\n]+`+)\]\((https?://[^)\s]*|[\w./-]*\.(?:html|ipynb)[^)\s]*)\)")
EXPORTED = re.compile(r"^#\| code-fold: show(\n#\| code-summary: \"Exported source\")", flags=re.M)
BINDER = "https://mybinder.org/v2/gh/{repository}/{branch}?urlpath=lab/tree/{page}"  # as binder/ says
COLAB = "https://colab.research.google.com/github/{repository}/blob/{branch}/{page}"
COMMANDS = "cli.html#"  # the page whose functions are commands: `demo` elsewhere is a size, not the command


def unlink_code(text: str) -> str:
    "Markdown in which names within fenced code are no links: there they would be shown as brackets and addresses."
    return re.sub(
        r"^(```+)[^\n]*\n.*?^\1[ \t]*$", lambda m: LINKED.sub(r"\1", m.group()), text, flags=re.M | re.S
    )


def mended(text: str, commands: bool) -> str:
    "A text of a page without links in code and, unless it is about `commands`, without links to them by accident."
    text = unlink_code(text)
    return (
        text if commands else LINKED.sub(lambda m: m.group(1) if COMMANDS in m.group(2) else m.group(), text)
    )


def run_line(
    page: str,  # neuro_nbs/19_cli.ipynb
    repository: str,  # "owner/name" on GitHub
    branch: str,
) -> str:  # markdown
    "Where a page can be run without installing anything."
    at = {"repository": repository, "branch": branch, "page": page}
    return f"Run this page: [Binder]({BINDER.format(**at)}) \u00b7 [Colab]({COLAB.format(**at)})"


def mend(
    proc: Path,  # pages that nbdev has made; changed
) -> None:
    "Take out what nbdev puts in and nobody wants: links inside code, wrong links, messages; close exported source."
    settings = get_config(path=ROOT)
    repository = settings.git_url.removeprefix("https://github.com/")
    for path in notebooks(proc):
        book = json.loads(path.read_text(encoding="utf-8"))
        commands = path.name.startswith("19")
        if any(cell["cell_type"] == "code" for cell in book["cells"]):
            page = path.relative_to(proc).as_posix()
            told = run_line(page, repository, settings.branch)
            line = {"cell_type": "markdown", "id": "run-line", "metadata": {}, "source": told}
            book["cells"].insert(1 if book["cells"][0]["cell_type"] == "raw" else 0, line)
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = mended(text_of(cell["source"]), commands)
            elif EXPORTED.search(text_of(cell["source"])):
                cell["source"] = EXPORTED.sub(r"#| code-fold: true\1", text_of(cell["source"]))
            made = "show_doc(" in text_of(cell["source"])  # by the build, not by whoever ran the notebook
            outputs = [o for o in cell.get("outputs", []) if not (made and o.get("name") == "stderr")]
            for output in outputs:
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = mended(
                        text_of(output["data"]["text/markdown"]), commands
                    )
            if "outputs" in cell:
                cell["outputs"] = outputs
        path.write_text(json.dumps(book), encoding="utf-8")


def leftovers(
    cell: dict,  # of a page
    commands: bool,  # whether the page is about the command line
) -> list[str]:  # links in code, links to commands by accident, paths of the machine that built the page
    "What `mend` should have removed."
    shown = [text_of(o.get("data", {}).get("text/markdown")) for o in cell.get("outputs", [])]
    shown += [text_of(cell["source"])] if cell["cell_type"] == "markdown" else []
    told = "\n".join([*shown, *(text_of(o.get("text")) for o in cell.get("outputs", []))])
    problems = [
        f"a link inside code: {m.group()[:80]}"
        for t in shown
        for m in LINKED.finditer(t)
        if t != unlink_code(t)
    ]
    if not commands:
        problems += [
            f"{m.group(1)} leads to a command"
            for t in shown
            for m in LINKED.finditer(t)
            if COMMANDS in m.group(2)
        ]
    return problems + [f"a path of this machine: {m}" for m in re.findall(r"\S*/site-packages/\S*", told)[:1]]


# On Linux all are forked: what this process has imported need not be imported again, and none runs IPython's clean-up
# at its exit, a sweep of the whole memory for each page, half of the build's time.
FORK = "fork" if sys.platform == "linux" else "spawn"


def process(
    copy: Path,  # of the project
) -> None:
    "nbdev's part of the build, in a process of its own whose messages go to a file beside the pages."
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["PYTHONWARNINGS"] = "ignore"  # pages are no place for them
    os.environ.pop("IN_TEST", None)  # nbdev refuses to export when it is set
    sys.path.insert(0, str(copy))
    with (copy / MESSAGES).open("w", buffering=1) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        from fastcore.parallel import parallel
        from nbdev import serve
        from nbdev.doclinks import _build_modidx
        from nbdev.quarto import refresh_quarto_yml

        warnings.simplefilter("ignore")
        _build_modidx()
        refresh_quarto_yml()
        serve.parallel = lambda *args, **options: parallel(*args, **(options | {"method": FORK}))
        serve.proc_nbs(n_workers=2)


def build(
    copy: Path,  # an empty folder
) -> str:  # what went wrong, or ""
    "Process the notebooks as nbdev_docs does, without its calls of Quarto, pip and curl."
    copy_project(copy)
    nbdev = multiprocessing.get_context(FORK).Process(target=process, args=(copy,))
    nbdev.start()
    nbdev.join()
    if nbdev.exitcode:
        said = (copy / MESSAGES).read_text(errors="replace")
        causes = re.findall(r"^(?:\w+\.)*\w*Error\b.*", said, flags=re.M)
        cell = said.rpartition("\nException: ")[2].strip()[:1000]
        return "building the pages failed: " + "\n".join([*dict.fromkeys(causes), cell])
    mend(copy / "_proc")
    made = {p.relative_to(copy / "_proc").as_posix() for p in notebooks(copy / "_proc")}
    lost = {p.relative_to(ROOT).as_posix() for p in notebooks()} - made
    if lost:
        return (
            f"nbdev made no page of {', '.join(sorted(lost))}; it skips everything below a hidden folder, "
            f"so if {copy} is below one, set TMPDIR to another place"
        )
    return ""


def check(proc: Path) -> tuple[list[Page], list[str]]:
    "All pages and all problems found."
    settings = get_config(path=ROOT)
    base = f"{settings.doc_host}{settings.doc_baseurl}".rstrip("/") + "/"
    pages = [read_page(path, proc) for path in notebooks(proc)]
    problems, seen, by_place = [], {}, places(pages, proc)
    for page in pages:
        if page.address in seen:
            problems.append(f"{page.source}: writes the same page as {seen[page.address]} ({page.address})")
        seen.setdefault(page.address, page.source)
        found = [*page.problems, *(check_link(page, link, by_place, proc, base) for link in page.links)]
        problems += [f"{page.source}: {text}" for text in dict.fromkeys(found) if text]
    config = yaml.safe_load((proc / "_quarto.yml").read_text(encoding="utf-8"))
    home = json.loads((ROOT / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    problems += sidebar_problems(pages, config)
    problems += name_problems(config, "\n\n".join(text_of(c["source"]) for c in home))
    for name in GUIDES:
        problems += guide_problems(name)
    return pages, problems + concept_problems() + citation_problems()


# ---- the rendered site ------------------------------------------------------------------------------------


def site_problems(
    site: Path,  # folder of the HTML that Quarto wrote
    pages: list[str],  # addresses that must be there: neuro_nbs/cli.html
    base: str,  # address of the site
) -> list[str]:
    "Dead links, anchors and pictures of the rendered pages, pictures without words, and what belongs in every head."
    found = {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    plain = {
        path: re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", text, flags=re.S)
        for path, text in found.items()
    }
    ids = {path: set(re.findall(r"\s(?:id|name)=\"([^\"]+)\"", text)) for path, text in found.items()}
    problems = [f"{page}: not rendered" for page in pages if site / page not in found]
    for path, text in found.items():
        name = path.relative_to(site).as_posix()
        if name not in pages:
            continue
        heads = {"title": "<title>", "icon": 'rel="icon"'}
        heads |= {"card": 'property="og:image"'} if name == "index.html" else {}
        problems += [f"{name}: its head has no {what}" for what, mark in heads.items() if mark not in text]
        if re.search(r"\$\$|\\\(|\\frac|\[@\w", re.sub(r"<math\b.*?</math>", "", plain[path], flags=re.S)):
            problems.append(f"{name}: a formula or a citation was left as it is written")
        for tag in re.findall(r"<img\b[^>]*>", plain[path]):
            if not re.search(r"\balt=", tag) and 'role="presentation"' not in tag:
                problems.append(f"{name}: a picture without words: {tag[:80]}")
        for target in dict.fromkeys(
            re.findall(r"<(?:a|img)\b[^>]*?\s(?:href|src)=\"([^\"]*)\"", plain[path])
        ):
            target = target.replace("&amp;", "&").removeprefix(base)
            if is_external(target) or target.startswith("data:"):
                continue
            where, _, anchor = unquote(target).partition("#")
            file = (path.parent / where if where else path).resolve()
            file = (site / where).resolve() if not file.exists() and (site / where).exists() else file
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                problems.append(f"{name}: no such file: {target}")
            elif anchor and file in ids and anchor not in ids[file]:
                problems.append(f"{name}: no place #{anchor} on {file.name}")
    return problems


def check_site(site: Path) -> int:
    "After Quarto: the pages that were made before are all there, and nothing on them is dead."
    settings = get_config(path=ROOT)
    base = f"{settings.doc_host}{settings.doc_baseurl}".rstrip("/") + "/"
    pages = [read_page(path, ROOT / "_proc").address for path in notebooks(ROOT / "_proc")]
    problems = site_problems(site.resolve(), pages, base)
    for problem in problems:
        print("PROBLEM", problem)
    print(f"{len(pages)} rendered pages, {len(problems)} problems")
    return bool(problems)


def main(words: Sequence[str] = ()) -> int:
    "`--site FOLDER`: check rendered pages; nothing: build the pages and check them."
    if list(words[:1]) == ["--site"] and len(words) == 2:
        return check_site(Path(words[1]))
    if not notebooks():
        print("PROBLEM no notebooks found")
        return 1
    with tempfile.TemporaryDirectory(prefix="cortexlit-") as folder:
        copy = Path(folder).resolve()
        failure = build(copy)
        if failure:
            print("PROBLEM", failure)
            return 1
        shutil.rmtree(ROOT / "_proc", ignore_errors=True)
        shutil.move(copy / "_proc", ROOT / "_proc")
    pages, problems = check(ROOT / "_proc")
    for problem in problems:
        print("PROBLEM", problem)
    counted = sum(len(p.links) for p in pages), sum(len(p.anchors) for p in pages)
    print(
        f"{len(pages)} pages in _proc/, {counted[0]} links, {counted[1]} headings, {len(problems)} problems"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
