"""Packaging metadata. Every value comes from settings.ini: edit there, not here."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_path"]
allen, film, tests = (cfg[f"{name}_requirements"].split() for name in ("allen", "film", "dev"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=[lib, f"{lib}.*"]),
    # The pretrained demonstration core is data, not a module.
    package_data={lib: ["weights/*/*"]},
    # The library itself runs on newer Pythons; the [allen] extra does not.
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "allen": allen,
        "film": film,
        "postgres": cfg["postgres_requirements"].split(),
        # What tests and notebooks need; those that need the Allen reader skip themselves.
        "test": tests + film,
        "dev": tests + film + allen,
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
    zip_safe=False,
)
