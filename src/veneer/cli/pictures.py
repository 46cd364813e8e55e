"""The pictures that an adapted pipeline makes, for `veneer generate`."""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from veneer import files, library, zoo
from veneer.cli.merge import base_of
from veneer.core.errors import AdapterError, listed, nearest, shown
from veneer.library.source import called
from veneer.safe.whole import write_whole
from veneer.train.diffusion.prompts import Tag, parsed_prompt, written

if TYPE_CHECKING:
    from PIL import Image

    from veneer.core.adapter import Adapter
    from veneer.train.diffusion.adapted import AdaptedPipeline
    from veneer.train.diffusion.painter import Sampling

_FOLDER = Path("drawn")  # where pictures go that are not told where
_OTHERS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TRIGGER = "modelspec.trigger_phrase"
_LARGEST_SEED = 2**32 - 1  # of what other programs take


@dataclass(frozen=True)
class Asked:
    """A picture, and which adapters act on it."""

    text: str
    seed: int
    strength: float
    tags: tuple[Tag, ...]


def pictures(
    adapters: Sequence[tuple[str, float]],
    prompts: Sequence[str],
    base: str | None,
    seed: str,
    out: Path | None,
    compare: bool,
    dtype: str,
    device: str,
    strength: str | None = None,
    grid: bool = False,
    merged: bool = False,
    lora_dir: Path | None = None,
    decoder: str | None = None,
    negative: str | None = None,
    **more: Any,
) -> None:
    """Draw every prompt with every seed at every strength: a file each, or all on one sheet."""
    strengths = numbers(strength or "1", "--strength")
    strengths = [0.0] * compare + [own for own in strengths if own or not compare]
    asked, found = _asked(adapters, prompts, seeds(seed), strengths, lora_dir)
    targets = _targets(asked, out, grid or compare)
    held = {name: files.read(path) for name, path in found.items()}
    place = zoo.resolve(base or base_of(list(held.values())))
    _note_triggers(asked, held)
    try:
        from veneer.train.diffusion.adapted import AdaptedPipeline
        from veneer.train.diffusion.painter import Sampling, Wish, paint
    except ImportError as error:
        raise AdapterError(f"pictures need: pip install 'veneer[diffusion]' ({error})") from None

    adapted = AdaptedPipeline.load(place, found, dtype, device, zoo.resolve(decoder) if decoder else None)
    sampling = Sampling(negative_prompt=negative, **more).over(adapted.sampling)
    wishes = [Wish(own.text, own.seed, adapted.acting(own.tags)) for own in asked]
    drawn = paint(adapted.pipeline, wishes, sampling, adapted.carriers, merged, _progress)
    texts = [_infotext(own, adapted, sampling, picture, place) for own, picture in zip(asked, drawn, strict=True)]
    if grid or compare:
        drawn = [_sheet(asked, drawn, compare)]
    _write(targets, drawn, texts, asked)


def _asked(
    adapters: Sequence[tuple[str, float]],
    prompts: Sequence[str],
    every_seed: list[int],
    strengths: list[float],
    lora_dir: Path | None,
) -> tuple[list[Asked], dict[str, Path]]:
    """Every picture, and where the adapters are, by the names that the tags have."""
    found, given = dict[str, Path](), list[Tag]()
    for text, weight in adapters:
        name = _free(called(PurePath(text)), found)
        found[name] = library.find(text)
        given.append(Tag(name, weight, weight))
    parsed = [parsed_prompt(prompt) for prompt in prompts]
    for name in dict.fromkeys(tag.name for _, tags in parsed for tag in tags):
        if name not in found:
            found[name] = _named(name, found, lora_dir)
    asked = []
    for text, tags in parsed:
        own = {tag.name: tag for tag in [*given, *tags]}.values()  # what a prompt says goes before
        for seed in every_seed:
            for strength in strengths:
                acting = [replace(t, text=t.text * strength, denoiser=t.denoiser * strength) for t in own]
                asked.append(Asked(text, seed, strength, tuple(t for t in acting if t.text or t.denoiser)))
    return asked, found


def _named(name: str, given: dict[str, Path], folder: Path | None) -> Path:
    """The adapter that `<lora:name>` means: in the folder, else a path or a name of the library."""
    there = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))} if folder else {}
    there |= {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()} if folder else {}
    if name in there:
        return there[name]
    try:
        return library.find(name)
    except AdapterError as error:
        known = [*given, *there]
        said = f"<lora:{name}> is none of those given: {listed(known)}{nearest(name, known)}"
        raise AdapterError(f"{said}; and {error}") from None


def _note_triggers(asked: Sequence[Asked], held: "dict[str, Adapter]") -> None:
    """Say on stderr which words an adapter was trained with that its prompts lack."""
    words = {name: adapter.metadata.get(_TRIGGER, "") for name, adapter in held.items()}
    lacking = {
        f"the prompt {own.text!r} lacks the word that {tag.name} was trained with: {words[tag.name]}"
        for own in asked
        for tag in own.tags
        if words[tag.name].lower() not in own.text.lower()
    }
    for line in sorted(lacking):
        print(f"note: {line}", file=sys.stderr)


def _free(name: str, taken: dict[str, Path]) -> str:
    number = 2
    while name in taken:
        name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
    return name


def seeds(text: str) -> list[int]:
    """`1,5` or `1-4`. Raises `AdapterError`."""
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= _LARGEST_SEED or last - first > 9999:
            raise AdapterError(
                f"--seed: expected numbers from 0 to {_LARGEST_SEED}, as 1,5 or 1-4, found {shown(text)}"
            )
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def numbers(text: str, option: str) -> list[float]:
    """`0,0.5,1`. Raises `AdapterError`."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise AdapterError(f"{option}: expected finite numbers, as 0,0.5,1, found {shown(text)}")
    return list(dict.fromkeys(found))


def _targets(asked: Sequence[Asked], out: Path | None, sheet: bool) -> list[Path]:
    """The files to write. Raises `AdapterError` for what is there already, before anything is drawn."""
    out = out or _FOLDER
    one = sheet or len(asked) == 1
    if out.suffix.lower() == ".png" and not out.is_dir():
        if not one:
            raise AdapterError(f"{len(asked)} pictures are not one file: --grid makes a sheet, or --out names a folder")
        found = [out]
    elif out.suffix.lower() in _OTHERS and not out.is_dir():
        raise AdapterError(f"{out}: pictures are written as .png, with what made them inside")
    elif sheet:
        found = [out / f"{_slug(asked[0].text)}-grid.png"]
    else:
        several = len({own.strength for own in asked}) > 1
        names = [f"{_slug(a.text)}-{a.seed}" + f"-x{a.strength:g}" * several for a in asked]
        found, taken = [], dict[str, Path]()
        for name in names:
            taken[own] = path = out / f"{(own := _free(name, taken))}.png"
            found.append(path)
    if there := [path for path in found if path.exists()]:
        raise AdapterError(f"{listed(there, say=str)} exists already; nothing was drawn (--out names another place)")
    home = next(place for place in found[0].absolute().parents if place.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        why = "may not be written to" if home.is_dir() else "is no folder"
        raise AdapterError(f"{found[0]}: {home} {why}; nothing was drawn (--out names another place)")
    return found


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-") or "picture"


def _infotext(own: Asked, adapted: "AdaptedPipeline", sampling: "Sampling", picture: "Image.Image", place: Path) -> str:
    from veneer.train.diffusion.infotext import infotext, sampler_of
    from veneer.train.diffusion.painter import default_of

    def value(setting: str) -> Any:
        said = getattr(sampling, setting)
        return default_of(adapted.pipeline, setting) if said is None else said

    facts = {
        "Steps": value("steps"),
        "Sampler": sampler_of(adapted.pipeline),
        "CFG scale": value("guidance"),
        "CFG Rescale": value("guidance_rescale") or None,
        "Seed": own.seed,
        "Size": f"{picture.width}x{picture.height}",
        "Model": place.name,
        "RNG": "CPU",
    }
    tags = [replace(tag, name=called(PurePath(tag.name))) for tag in own.tags]
    return infotext(written(own.text, tags), sampling.negative_prompt or "", facts)


def _sheet(asked: Sequence[Asked], drawn: Sequence["Image.Image"], compare: bool) -> "Image.Image":
    """Strengths beside each other; of one strength, seeds."""
    from veneer.train.drawing.grid import grid

    several = len({own.strength for own in asked}) > 1
    rows: dict[str, list[Any]] = {}
    for own, picture in zip(asked, drawn, strict=True):
        label = f"{own.text}, seed {own.seed}" if several else own.text
        rows.setdefault(label, []).append(picture)
    if several:
        said = dict.fromkeys(own.strength for own in asked)
        columns = ["base" if compare and not strength else f"strength {strength:g}" for strength in said]
    else:
        columns = [f"seed {seed}" for seed in dict.fromkeys(own.seed for own in asked)]
    return grid(list(rows.items()), columns)


def _write(
    targets: Sequence[Path], drawn: Sequence["Image.Image"], texts: Sequence[str], asked: Sequence[Asked]
) -> None:
    from veneer.train.diffusion.infotext import save_png

    own = [
        {"parameters": text, "seed": a.seed, "strength": a.strength, "adapters": [vars(tag) for tag in a.tags]}
        for text, a in zip(texts, asked, strict=True)
    ]
    sheet = len(drawn) < len(asked)
    writers = {
        path: partial(save_png, picture, None if sheet else texts[place], own if sheet else own[place])
        for place, (path, picture) in enumerate(zip(targets, drawn, strict=True))
    }
    try:
        for folder in {path.parent for path in targets}:
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(writers)
    except OSError as error:
        raise AdapterError(f"{error.filename or targets[0]} cannot be written: {error.strerror or error}") from error
    print(*targets, sep="\n")


def _progress(done: float, every: int) -> None:
    """On a terminal in place, elsewhere a line for each picture."""
    terminal = sys.stderr.isatty()
    if terminal:
        print(f"\r{done:.2f} of {every} pictures", end="\n" if done == every else "", file=sys.stderr, flush=True)
    elif done == int(done):
        print(f"{int(done)} of {every} pictures", file=sys.stderr)
