"""One sheet of two learned styles: the base, one style at several strengths, the other, both blended, with measures.

veneer train emoji-high-contrast
veneer train emoji-delft
python examples/emoji/style_sheet.py                  # of the newest runs; `make demo-images` does all three
"""

import argparse
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from veneer import recipes, zoo
from veneer.cli.terminal import TerminalReporter
from veneer.core.errors import AdapterError
from veneer.safe.whole import write_whole
from veneer.train.diffusion.adapted import AdaptedPipeline
from veneer.train.diffusion.painter import Wish, paint
from veneer.train.diffusion.prompts import Tag
from veneer.train.diffusion.style import distance, looks
from veneer.train.drawing.grid import grid

STYLES = {"high contrast": "emoji-high-contrast", "Delft": "emoji-delft"}  # to their recipes
ROWS: dict[str, dict[str, float]] = {
    "before": {},
    "high contrast 0.25": {"high contrast": 0.25},
    "high contrast 0.5": {"high contrast": 0.5},
    "high contrast 0.75": {"high contrast": 0.75},
    "high contrast": {"high contrast": 1.0},
    "Delft": {"Delft": 1.0},
    "both, 0.5 and 0.5": {"high contrast": 0.5, "Delft": 0.5},
    "both, 0.25 and 0.75": {"high contrast": 0.25, "Delft": 0.75},
}


def main() -> None:
    """Draw, measure, write and print."""
    given = arguments()
    newest = {style: newest_run(given.runs, recipe) for style, recipe in STYLES.items()}
    adapted = AdaptedPipeline.load(zoo.resolve("emoji"), {style: run / "adapter" for style, run in newest.items()})
    sample = recipes.load(STYLES["high contrast"])["sample"]
    prompts, seed = sample["prompts"], sample["seeds"][0]
    weights = [adapted.acting(Tag(style, own, own) for style, own in row.items()) for row in ROWS.values()]
    wishes = [Wish(prompt, seed, own) for own in weights for prompt in prompts]
    with TerminalReporter() as reporter:
        drawn = paint(
            adapted.pipeline,
            wishes,
            adapted.sampling,
            adapted.carriers,
            progress=lambda done, every: reporter.progress("drawing", int(done), every),
        )
    rows = {label: drawn[place * len(prompts) :][: len(prompts)] for place, label in enumerate(ROWS)}
    measured = {label: measures(pictures, rows["before"]) for label, pictures in rows.items()}
    told = [(f"{label}:   {line(measured[label])}", pictures) for label, pictures in rows.items()]
    picture = grid(told, prompts)
    write_whole({given.out: lambda path: picture.save(path, format="PNG", optimize=True)})
    show(measured)
    print(f"the sheet is {given.out}")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-styles.png"), help="the PNG file to write")
    return parser.parse_args()


def newest_run(folder: Path, recipe: str) -> Path:
    """The newest run of a recipe that has an adapter. Raises `AdapterError` where there is none."""
    found = [path for path in folder.glob(f"{recipe}-*") if (path / "adapter").is_dir()]
    if not found:
        raise AdapterError(f"{folder} has no run of {recipe}: `veneer train {recipe}` makes one")
    return max(found, key=lambda path: (path / "adapter").stat().st_mtime)


def measures(pictures: list[Image.Image], before: list[Image.Image]) -> dict[str, float]:
    """How pictures look, how far they are from each style's held-out ones, what is left of the base's shapes."""
    found = looks(pictures, before=before)
    away = {f"to {style}": distance(pictures, own_pictures(recipe)) for style, recipe in STYLES.items()}
    return {"saturation": found.saturation, "ink": found.ink, **away, "shape kept": found.shape or 0.0}


def line(row: dict[str, float]) -> str:
    """The measures of a row in a line."""
    return "   ".join(f"{name} {value:.2f}" for name, value in row.items())


def own_pictures(recipe: str) -> list[Image.Image]:
    """The held-out pictures of a style."""
    folder = Path(recipes.load(recipe)["data"]["eval_path"])
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def show(measured: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", *next(iter(measured.values()))):
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    for label, row in measured.items():
        table.add_row(label, *(f"{value:.3f}" for value in row.values()))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
