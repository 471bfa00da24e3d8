"""What `pip install` gets: an sdist that builds, a wheel made of it, and no requirement that the library does not use."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import cortexlit

ROOT = Path(__file__).resolve().parents[1]
# Names of modules where they differ from those of the distribution.
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
INDIRECT = {"tensorboard": "the Trainer writes its files", "accelerate": "the Trainer runs on it"}


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_the_library_imports_all_that_it_requires(settings):
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "cortexlit").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from)\s+(\w+)", source, re.M))
    for requirement in settings["requirements"].split():
        name = re.match(r"[\w.-]+", requirement)[0]
        assert MODULES.get(name, name) in imported or name in INDIRECT, (
            f"{name} is required, and not imported"
        )


def run(*words: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=cwd, check=True, capture_output=True)


def test_the_sdist_builds_the_wheel(tmp_path):
    parts = ("cortexlit", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")
    for name in (*parts, "constraints.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    run("sdist", cwd=tmp_path)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    run("bdist_wheel", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "cortexlit").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert wanted <= held, sorted(wanted - held)
    assert any(name.endswith("entry_points.txt") for name in held)


def test_the_version_is_the_same_everywhere(settings):
    version = settings["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert cortexlit.__version__ == version == citation["version"]
    assert re.search(rf"\b{re.escape(version)}\b", site["page-footer"]["left"])
    assert re.search(
        rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )


def test_the_citation_has_what_its_format_asks_for(settings):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all("name" in who or {"family-names", "given-names"} <= set(who) for who in citation["authors"])
    assert citation["repository-code"] == settings["git_url"]
    assert citation["url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert citation["license"] == "Apache-2.0" and settings["license"] == "apache2"
