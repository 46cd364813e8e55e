"""From a path to the tensors of the adapter file that it means, whatever the file is made of, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from veneer.core.errors import AdapterError, collapsed, listed, named, nearest, shown
from veneer.files.folder import CONFIG, WEIGHTS
from veneer.files.peft import inside
from veneer.safe.ordered import save_ordered
from veneer.safe.stored import read_header, read_tensors

_ARCHIVE, _PICKLE = b"PK\x03\x04", b"\x80"  # how files of torch.save begin, now and before torch 1.6
_HEADER = b"{"  # what a safetensors file has after its header's length, which may begin like a pickle
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WHOLE = ("I64", "I32", "I16", "I8", "U8")
_RUN = "adapter"  # where a run's folder has its adapter
_WRAPPERS = ("state_dict", "model_state_dict")  # what trainers put around the tensors


@dataclass
class Stored:
    """The tensors of one file by name, and what it says of itself; `faults` is what is wrong with them.

    A list of tensors, as torch saves it, has the names "0", "1", and so on.
    """

    where: Path
    tensors: dict[str, Tensor]
    about: dict[str, str]
    faults: list[str] = field(default_factory=list)


def adapter_file(path: Path) -> Path:
    """The file that the path means, or the PEFT folder, which may hold several.

    Raises `AdapterError` that says what is there instead.
    """
    try:
        if not path.exists():
            siblings = map(str, path.parent.glob("*"))
            raise AdapterError(f"{path} does not exist{nearest(str(path), siblings)}")
        if not path.is_dir():
            return path.parent if path.name == WEIGHTS and (path.parent / CONFIG).is_file() else path
        if (path / CONFIG).is_file():
            return path
        if (own := in_run(path)) != path:
            return adapter_file(own)
        if inside(path):
            return path
        found = sorted(
            file for file in path.iterdir() if file.suffix == ".safetensors" and not file.name.startswith(".")
        )
        there = sorted(file.name for file in path.iterdir())
        if not found and any((inner / CONFIG).is_file() for inner in path.iterdir()):
            return path  # PEFT's folder of several adapters, or of a pipeline's parts
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(f"{path} has several files, name one: {listed((file.name for file in found), say=named)}")
    said = f"{path} holds no adapter: no {CONFIG} and no .safetensors file, but {listed(there, say=named)}"
    pickles = [name for name in there if name.endswith(PICKLES)]
    said += f"; a pickle is opened when you name the file itself: {path / pickles[0]}" if pickles else ""
    raise AdapterError(said)


def in_run(path: Path) -> Path:
    """Of a run's folder the adapter in it, whatever its format; else the path itself."""
    own = path / _RUN
    return own if any(own.glob("*.safetensors")) or any(own.glob(f"*/{CONFIG}")) else path


def mapped(path: Path) -> Stored:
    """The tensors of a file, mapped: their values are not read yet. Raises `AdapterError` when it is not whole."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    archive = start.startswith(_ARCHIVE)
    if archive or (start.startswith(_PICKLE) and start[8:] != _HEADER):
        return Stored(path, *_unpickled(path, archive))
    header, about = read_header(path)
    whole = {name for name, entry in header.items() if _is_whole_number(entry)}
    # an α may be a whole number, which says no less
    tensors, faults = read_tensors(path, {k: {**v, "dtype": "F32"} if k in whole else v for k, v in header.items()})
    tensors |= {name: tensors[name].float() for name in whole & tensors.keys()}
    strange = [key for key, value in about.items() if not isinstance(value, str)]
    faults += [f"the file's own words should be strings, which {listed(strange)} are not"] if strange else []
    return Stored(path, tensors, about, faults)


def _is_whole_number(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("dtype") in _WHOLE and entry.get("shape") in ([], [1])


def save(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises `AdapterError`."""
    try:
        save_ordered(tensors, path, {**about, "format": "pt"})
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot be written: {error}") from error


def _unpickled(path: Path, archive: bool) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """What `torch.save` wrote, of tensors and plain values alone: anything else that a pickle could do is refused."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
    except Exception as error:  # whatever a pickle makes of the reader
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise AdapterError(
            f"{path} cannot be opened safely: only tensors in lists and dictionaries are read from a pickle "
            f"(torch.load, weights_only=True): {reason}"
        ) from None
    while isinstance(found, Mapping) and (inner := next((key for key in _WRAPPERS if key in found), None)):
        found = found[inner]
    if isinstance(found, (list, tuple)):
        found = {str(place): value for place, value in enumerate(found)}
    if not isinstance(found, Mapping) or not found:
        raise AdapterError(f"{path}: expected tensors by name or in a list, found {shown(found)}")
    tensors = {str(key): value.detach() for key, value in found.items() if isinstance(value, Tensor)}
    strange = [key for key, value in tensors.items() if not value.is_floating_point() or value.layout != torch.strided]
    others: list[Any] = [key for key, value in found.items() if not isinstance(value, Tensor)]
    about = {str(key): value for key in others if isinstance(value := found[key], str)}
    wrong = [str(key) for key in others if str(key) not in about]
    told = (("no tensors", wrong), ("no plain tensors of floats", strange))
    return tensors, about, [f"{what}: {collapsed(names)}" for what, names in told if names]
