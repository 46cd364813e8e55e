"""What must be the same for a resumed run to end with the bits of an undisturbed one."""

import platform
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from veneer import __version__
from veneer.core.errors import shown
from veneer.core.fused import HALF, is_quick
from veneer.train.settings import Recipe

_PACKAGES = ("torch", "transformers", "diffusers", "tokenizers", "safetensors", "bitsandbytes", "pillow")
_BLOCK, _BLOCKS = 1 << 20, 64  # of a large file, so many blocks of so many bytes are read
FREE = ("output", "name", "resume", "checkpoint", "log")  # keys of a recipe that do not touch the numbers
# where something is, which digests hold to what it was: a run may go on on another machine
PLACES = ("base", "data.path", "data.eval_path", "data.masks", "data.eval_masks")


def circumstances(device: torch.device, processes: int) -> dict[str, str]:
    """What besides recipe, data and base decides the bits of a run: the machine, its threads, the packages."""
    here = {
        "veneer": __version__,
        "threads": str(torch.get_num_threads()),
        "processes": str(processes),
    }
    if device.type == "cpu":
        units = "".join(f" {str(dtype).removeprefix('torch.')}" for dtype in HALF if is_quick(dtype))
        here["processor"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{units}"
    elif device.type == "cuda":
        here["processor"] = torch.cuda.get_device_name(device)
    else:
        here["processor"] = f"{device.type} {platform.machine()}"
    for package in _PACKAGES:
        try:
            here[package] = version(package)
        except PackageNotFoundError:
            continue
    return here


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each key whose value is another one, with both values."""
    changed = [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]
    return [f"{key} was {_said(then.get(key))} and is {_said(now.get(key))}" for key in changed]


def asked(recipe: Recipe) -> dict[str, Any]:
    """What a recipe asks for, by dotted key, but what does not touch the numbers."""
    return dict(_dotted(recipe.model_dump(mode="json", exclude=set(FREE))))


def digest_of_base(folder: Path) -> str:
    """A name for the content of a model's folder: its configs, and its weights by their sizes, heads, ends, and evenly
    spread blocks. Two models that differ in all their weights differ in it; a single number changed may be missed.
    """
    digest = sha256()
    kinds = {".json", ".safetensors", ".bin", ".gguf", ".txt", ".model"}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in kinds and not path.name.startswith("."):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}".encode())
            for block in _blocks(path):
                digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    whole = size <= _BLOCK * _BLOCKS
    places = range(0, max(1, size), _BLOCK) if whole else [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)]
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            yield file.read(_BLOCK)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _said(value: Any) -> str:
    text = "not said" if value is None else value if isinstance(value, str) else shown(value)
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text
