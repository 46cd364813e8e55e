"""Fluent Emoji (Microsoft, MIT licence) → the captioned pictures of the base `emoji` and of the shipped style sets.

npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/fluent-emoji-high-contrast@1.2.6
pip install pillow resvg-py
python examples/emoji/pictures.py src/veneer/recipes/data        # writes emoji-delft/ and emoji-high-contrast/
"""

import argparse
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import resvg_py
from PIL import Image

FLAT, HIGH_CONTRAST = "iconify-json-fluent-emoji-flat-1.2.6.tgz", "iconify-json-fluent-emoji-high-contrast-1.2.6.tgz"
SUBJECTS = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)  # not people, hands, flags, letters and signs
CLOCKS = ("-oclock", "-thirty")
SIZE = 64  # pixels a side
# the prompts of the style sheet: no style is trained on them
SHOWN = ("red-apple", "pizza", "rocket", "green-heart", "sunflower", "cat-face", "crab", "grinning-face")
TRAINED, HELD_OUT = 100, 20  # pictures of a style
DELFT = ((0, 116, 186), (0, 166, 237), (143, 220, 255), (255, 255, 255))  # dark to light, of Fluent's own blues
CONTOUR = "#0050a0"

Bodies = dict[str, str]  # a picture's name → the inside of its SVG


def read(package: Path, file: str) -> dict:
    """A JSON file of an npm package, as `npm pack` leaves it."""
    with tarfile.open(package) as archive:
        return json.load(archive.extractfile(f"package/{file}"))


def bodies(package: Path) -> Bodies:
    """The pictures of a package, by name."""
    return {name: icon["body"] for name, icon in read(package, "icons.json")["icons"].items()}


def subjects(folder: Path) -> list[str]:
    """The names of what the base draws: pictures of both packages, without people, flags, letters, signs and clocks."""
    categories = read(folder / FLAT, "metadata.json")["categories"]
    both = bodies(folder / FLAT).keys() & bodies(folder / HIGH_CONTRAST).keys()
    names = {name for category in SUBJECTS for name in categories[category]}
    return sorted(name for name in names & both if not name.endswith(CLOCKS))


def caption(name: str) -> str:
    """`red-apple` → `red apple`."""
    return name.replace("-", " ")


def render(body: str) -> Image.Image:
    """The picture on white."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=SIZE, height=SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def high_contrast(body: str) -> Image.Image:
    """Black on white, as Microsoft drew it."""
    return render(body.replace("currentColor", "#000"))


def delft(body: str) -> Image.Image:
    """A flat picture painted like Dutch tiles: its lightness in shades of blue, every shape with a blue contour."""

    def painted(match: re.Match[str]) -> str:
        return f'fill="{_blue(match[1])}" stroke="{CONTOUR}" stroke-width="1" stroke-linejoin="round"'

    return render(re.sub(r'fill="#([0-9a-f]{3,6})"', painted, body))


def _blue(colour: str) -> str:
    """The shade of DELFT with a colour's lightness, between its two nearest."""
    if len(colour) == 3:
        colour = "".join(2 * digit for digit in colour)
    red, green, blue = bytes.fromhex(colour)
    place = (0.30 * red + 0.59 * green + 0.11 * blue) / 255 * (len(DELFT) - 1)
    below = min(int(place), len(DELFT) - 2)
    mixed = (a + (b - a) * (place - below) for a, b in zip(DELFT[below], DELFT[below + 1], strict=True))
    return "#" + bytes(round(value) for value in mixed).hex()


def write_style(folder: Path, paint: Callable[[str], Image.Image], drawn: Bodies, chosen: list[str]) -> None:
    """Write `train/` and `held-out/`: small PNG files, and their captions in metadata.jsonl."""
    for part, names in (("held-out", chosen[:HELD_OUT]), ("train", chosen[HELD_OUT:])):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
        rows = []
        for name in sorted(names):
            picture = paint(drawn[name]).quantize(32, dither=Image.Dither.NONE)
            picture.save(folder / part / f"{name}.png", optimize=True)
            rows.append(json.dumps({"file_name": f"{name}.png", "text": caption(name)}))
        (folder / part / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Write both style sets: the same subjects in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that gets emoji-delft/ and emoji-high-contrast/")
    parser.add_argument("--packages", type=Path, default=Path(), help="where the two .tgz files of npm lie")
    given = parser.parse_args()
    others = [name for name in subjects(given.packages) if name not in SHOWN]
    chosen = [*SHOWN, *random.Random(0).sample(others, TRAINED + HELD_OUT - len(SHOWN))]
    write_style(given.out / "emoji-high-contrast", high_contrast, bodies(given.packages / HIGH_CONTRAST), chosen)
    write_style(given.out / "emoji-delft", delft, bodies(given.packages / FLAT), chosen)


if __name__ == "__main__":
    main()
