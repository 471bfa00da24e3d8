"""Draw the small pictures of the site from figures that the notebooks hold: one per stop of the home page, and the card.

A stop is a page that the table "Where to begin" of index.ipynb links; its thumbnail is a figure of that page, made
small. The card is what a message shows that quotes the site: the figure of the home page under
its name. Each picture keeps the digest of the figure that it was drawn from, so that `--check` (and a test) can tell
which are out of date without comparing pixels. Run it after a page with a thumbnail has been run anew.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import sys
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from project import ROOT

HOME = "index.ipynb"
FOLDER = Path("nbs/images/stops")
CARD = Path("nbs/images/card.png")
SIZE, COLOURS = (216, 144), 32  # of a thumbnail, in pixels
CARD_SIZE = (1200, 630)  # as the networks cut it
# Which figure of a page, where that is not the first: the one that is closest to the page's answer and still
# recognised when small.
CHOSEN = {
    "neuro_nbs/03_dataset.ipynb": 1,
    "neuro_nbs/04_metrics.ipynb": 1,
    "neuro_nbs/05_baseline.ipynb": 4,
    "neuro_nbs/06_viv1t.ipynb": 1,
    "neuro_nbs/06b_trainer.ipynb": 2,
    "neuro_nbs/06c_own_parts.ipynb": 2,
    "neuro_nbs/08_head_training.ipynb": 3,
    "neuro_nbs/13_vit3d.ipynb": 1,
    "neuro_nbs/14_attention_maps.ipynb": 1,
    "neuro_nbs/16_classifiers.ipynb": 3,
    "neuro_nbs/20_in_silico_stimuli.ipynb": 3,
}
WIDEST = 2.4  # a figure that is longer than this many times its height is cut at the right


def figures(
    page: Path,  # a notebook with outputs
) -> list[bytes]:  # its PNG figures, in order
    book = json.loads(page.read_text(encoding="utf-8"))
    found = [o.get("data", {}).get("image/png") for c in book["cells"] for o in c.get("outputs", [])]
    return [base64.b64decode("".join(f)) for f in found if f]


def stops(
    root: Path = ROOT,  # a checkout
) -> list[str]:  # pages of the table, each once
    cells = json.loads((root / HOME).read_text(encoding="utf-8"))["cells"]
    (table,) = (t for c in cells if "## Where to begin" in (t := "".join(c["source"])))
    rows = "\n".join(re.findall(r"^\|.*", table, flags=re.M))
    return list(dict.fromkeys(re.findall(r"\]\((\w+/[\w.]+\.ipynb)\)", rows)))


def place(page: str) -> Path:
    "Where the thumbnail of a page lies, from the root of the checkout."
    return FOLDER / f"{Path(page).stem}.png"


def source(page: str, root: Path = ROOT) -> bytes:
    "The figure that the thumbnail of a page is drawn from."
    found, number = figures(root / page), CHOSEN.get(page, 0)
    if number >= len(found):
        raise SystemExit(f"{page}: figure {number} is wanted, and it has {len(found)}")
    return found[number]


def digest(figure: bytes) -> str:
    return hashlib.sha256(figure).hexdigest()[:16]


def opened(figure: bytes) -> Image.Image:
    "A figure on white."
    picture = Image.open(io.BytesIO(figure)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def thumbnail(figure: bytes) -> Image.Image:
    "A figure made small, on white; what is very wide is cut, what is very high loses its lower part."
    picture = opened(figure)
    width, height = picture.size
    picture = picture.crop((0, 0, min(width, round(height * WIDEST)), min(height, width)))
    picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", SIZE, "white")
    sheet.paste(picture, ((SIZE[0] - picture.width) // 2, (SIZE[1] - picture.height) // 2))
    return sheet


def card(figure: bytes) -> Image.Image:
    "Name, sentence and figure of the home page."
    sheet = Image.new("RGB", CARD_SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    for text, y, size, weight in (
        ("cortexlit", 60, 84, "bold"),
        ("from a recording of visual cortex to a score you can defend", 180, 36, "normal"),
    ):
        file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
        draw.text((40, y), text, fill="#1f2933", font=ImageFont.truetype(file, size))
    picture = opened(figure)
    width = CARD_SIZE[0] - 40
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    sheet.paste(picture, (20, 270))
    return sheet


def wanted(root: Path = ROOT) -> dict[Path, bytes]:
    "Every picture of the site, with the figure that it is drawn from."
    home = figures(root / HOME)
    return {place(page): source(page, root) for page in stops(root)} | {CARD: home[0]}


def outdated(
    root: Path = ROOT,  # a checkout
) -> list[str]:  # what is missing, drawn from another figure, or no longer wanted
    drawn_from, problems = wanted(root), []
    for path, figure in drawn_from.items():
        if not (root / path).exists():
            problems.append(f"{path.as_posix()}: missing")
        elif Image.open(root / path).info.get("source") != digest(figure):
            problems.append(f"{path.as_posix()}: drawn from another figure than the page has now")
    unwanted = {p.relative_to(root) for p in (root / FOLDER).glob("*.png")} - set(drawn_from)
    return problems + [f"{path.as_posix()}: no stop has it" for path in sorted(unwanted)]


def draw_all(root: Path = ROOT) -> None:
    "Draw what is out of date, and remove what is no longer wanted."
    stale = {text.partition(":")[0] for text in outdated(root)}
    drawn_from = wanted(root)
    for name in sorted(stale):
        path = Path(name)
        if path not in drawn_from:
            (root / path).unlink()
            continue
        figure = drawn_from[path]
        picture = card(figure) if path == CARD else thumbnail(figure)
        info = PngInfo()
        info.add_text("source", digest(figure))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        colours = 64 if path == CARD else COLOURS
        picture.quantize(colours, dither=Image.Dither.NONE).save(root / path, optimize=True, pnginfo=info)
        print(f"{name}: {(root / path).stat().st_size / 1000:.1f} kB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if one is out of date")
    if parser.parse_args().check:
        problems = outdated()
        print("\n".join(f"PROBLEM {text}" for text in problems) or "the pictures of the site are up to date")
        return bool(problems)
    draw_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
