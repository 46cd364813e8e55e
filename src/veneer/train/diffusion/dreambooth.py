"""DreamBooth's prior preservation (Ruiz et al. 2022, arXiv:2208.12242): beside each picture of the instance one of its
class is learned, as the base itself paints it, so that the class stays what it was.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from PIL import Image

from veneer.core.errors import AdapterError, listed
from veneer.safe.whole import write_whole
from veneer.train.data.pictures import inside
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.sameness import differences
from veneer.train.task import Reporter
from veneer.zoo.cache import building

FACTS = "class.json"  # beside the pictures: what painted them
PAINTED = re.compile(r"class-(\d{5,})\.png")

Paint = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]  # prompts and seeds to pictures


def partner(seed: int, step: int, row: int, count: int) -> int:
    """Which of so many class pictures goes with a row at a step."""
    return Random(f"class picture {seed} {step} {row}").randrange(count)


def lacking(data: CaptionedData) -> list[int]:
    """The numbers of the class pictures that are still to be painted, so that there are `class_pictures`."""
    folder = Path(data.class_path or "")
    there = set(inside(folder)) if folder.is_dir() else set()
    own = [name for name in there if not PAINTED.fullmatch(name)]
    return [number for number in range(data.class_pictures - len(own)) if file_of(number) not in there]


def file_of(number: int) -> str:
    """What a painted picture is called."""
    return f"class-{number:05}.png"


def paint_class(data: CaptionedData, facts: dict[str, str], paint: Paint, at_once: int, reporter: Reporter) -> None:
    """Paint the class pictures that lack in `class_path`, each from its number as the seed, `at_once` together.

    Each is written whole, so painting that was cut short goes on where it was. `facts` (the base's digest, the sampler)
    and the prompt are kept beside them: raises `AdapterError` where those that are there are of another prompt or base,
    or others would be added that are painted otherwise. Of several processes one paints, and the others wait.
    """
    if data.class_path is None or data.class_prompt is None:
        return
    folder, facts = Path(data.class_path), {"prompt": data.class_prompt, **facts}
    try:
        if not lacking(data):
            _agree(folder, {key: facts[key] for key in ("prompt", "base") if key in facts})
            return
        with building(folder / "pictures", "run that paints the same class pictures", reporter.say):
            numbers = lacking(data)  # some may have come while this one waited
            if not numbers:
                return
            _agree(folder, facts)
            if not (folder / FACTS).is_file():
                _write(folder / FACTS, facts)
            reporter.say(f"{len(numbers):,} pictures of {data.class_prompt!r} are painted into {folder}")
            for start in range(0, len(numbers), at_once):
                some = numbers[start : start + at_once]
                for number, picture in zip(some, paint([data.class_prompt] * len(some), some), strict=True):
                    _save(folder / file_of(number), picture)
                reporter.progress("painting class pictures", start + len(some), len(numbers))
    except OSError as error:
        raise AdapterError(f"data.class_path={folder}: cannot be written: {error.strerror or error}") from error


def _agree(folder: Path, facts: dict[str, str]) -> None:
    """Raise `AdapterError` where the pictures that are there were painted otherwise."""
    file = folder / FACTS
    painted = [name for name in inside(folder) if PAINTED.fullmatch(name)]
    if not file.is_file():
        return
    if not painted:  # all were deleted
        file.unlink()
        return
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{file}: not valid JSON: {error}. Delete it with the pictures {listed(painted)}") from error
    known = then if isinstance(then, dict) else {}
    if other := differences({key: known.get(key) for key in facts}, facts):
        raise AdapterError(
            f"data.class_path={folder}: {len(painted):,} pictures were painted otherwise: "
            f"{listed(other, say=str)}. Say another data.class_path, or delete them; or delete {FACTS} to take them as "
            "they are"
        )


def _write(file: Path, facts: dict[str, str]) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_whole({file: lambda path: path.write_text(text, encoding="utf-8")})


def _save(file: Path, picture: Image.Image) -> None:
    write_whole({file: lambda path: picture.save(path, format="PNG")})
