"""Files that may come from a stranger: plain files only, read within limits, judged before anything is made of them.

Nothing here follows a name that a file holds, and nothing runs: no pickle is opened. A symbolic link is followed, as
model caches are made of them; what it leads to is judged like any other file.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.core.errors import AdapterError, collapsed, listed, named, nearest, shown

OBJECT_LIMIT = 4 << 20  # bytes of a config: each layer of a large mixture of experts may be named
_HEADER_LIMIT = 8 << 20  # seventy thousand tensors, which take some two seconds
_TENSORS_LIMIT = 64 << 30  # a sparse file may be of any size, and cost nothing to send
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_DIMENSIONS, _LARGEST_DIMENSION = 8, 2**40
_LARGEST = torch.finfo(torch.float32).max
# what safetensors and torch are known to raise for a file; a bug of theirs may well raise something else
_UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError, MemoryError)


def existing(folder: Path, name: str) -> Path:
    """The plain file called `name` in `folder`. Raises `AdapterError` that says what is there instead."""
    try:
        if not folder.is_dir():
            siblings = map(str, folder.parent.glob("*"))  # none where there is no such folder either
            raise AdapterError(f"adapter folder {folder} does not exist{nearest(str(folder), siblings)}")
        if not (folder / name).is_file():
            there = sorted(path.name for path in folder.iterdir())
            said = ", ".join(map(named, there[:8])) or "nothing"
            said += ", which is no plain file" if name in there else ""
            said += ": a .bin is a pickle, which could run code, and is never opened" if ".bin" in said else ""
            raise AdapterError(f"{folder} is not an adapter folder: no {name}; it holds {said}")
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error}") from None
    return folder / name


def read_bytes(path: Path) -> bytes:
    """All of a small file. Raises `AdapterError`."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > OBJECT_LIMIT:
                raise AdapterError(f"{path} is too large: expected at most {OBJECT_LIMIT} bytes, found {size}")
            return file.read(size)  # and not to the end: some files of /proc have none
    except (OSError, MemoryError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None


def parsed(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises `AdapterError`."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError, MemoryError) as error:
        raise AdapterError(f"{where} is not valid JSON: {str(error)[:300]}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One value for a key: of two, readers take different ones."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"keys are given twice: {listed(key for key in values if keys.count(key) > 1)}")
    return values


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a safetensors file says of its tensors, and of itself. Raises `AdapterError`."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(min(size, 8)), "little")
            if size > _TENSORS_LIMIT:
                raise AdapterError(f"{path} is too large: expected at most {_TENSORS_LIMIT} bytes, found {size}")
            if length > min(size - 8, _HEADER_LIMIT):
                raise AdapterError(f"{path} is not a whole safetensors file: {_said_of(file, length, size)}")
            header = parsed(file.read(length), f"{path} is not a whole safetensors file: its header")
            _expect_whole(path, header, 8 + length, size)
    except (OSError, MemoryError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    about = header.pop("__metadata__", {})
    return header, about if isinstance(about, dict) else {}


def _said_of(file: BinaryIO, length: int, size: int) -> str:
    """Why a header of `length` bytes cannot be: the file is empty, something else, or was cut short."""
    if size == 0:
        return "it is empty; fetch it again"
    if length > _HEADER_LIMIT:
        file.seek(0)
        return (
            f"it begins with {shown(file.read(16))}, where the size of its header should be; it is another kind of file"
        )
    return f"it has {size} bytes, of {8 + length} that its header alone takes; fetch it again"


def _expect_whole(path: Path, header: dict[str, Any], start: int, size: int) -> None:
    """Raises `AdapterError` for a file that ends before its tensors do, as one whose download broke off."""
    offsets = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    ends = [own[1] for own in offsets if isinstance(own, list) and len(own) == 2 and isinstance(own[1], int)]
    if size < (whole := start + max(ends, default=0)):
        raise AdapterError(f"{path} is not a whole safetensors file: it has {size} bytes of {whole}; fetch it again")


def read_tensors(path: Path, header: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a safetensors file, by name, and what is wrong with them; their values are not read yet.

    Raises `AdapterError` when the file is not whole.
    """
    absurd = {name for name, entry in header.items() if not _is_shape(entry)}
    strange = [
        name for name, entry in header.items() if isinstance(entry, dict) and entry.get("dtype") not in [*_FLOATS]
    ]
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header if name not in absurd}
    except _UNREADABLE as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {str(error)[:300]}") from None
    kinds = ", ".join(sorted({shown(header[name].get("dtype")) for name in strange})[:8])
    said = (
        (f"expected tensors of {', '.join(sorted(_FLOATS))}, found {kinds} in", strange),
        ("of an absurd shape", absurd),
    )
    return tensors, [f"{what}: {collapsed(names)}" for what, names in said if names]


def _is_shape(entry: object) -> bool:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(isinstance(size, int) and 0 <= size < _LARGEST_DIMENSION for size in shape)
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite in float32, in which adapters are held; without a copy of the tensor.

    Of other types than floats, which are told as such, nothing is said here.
    """
    if tensor.numel() == 0 or tensor.dtype not in _FLOATS.values():
        return True
    return all(abs(value.item()) <= _LARGEST for value in tensor.aminmax())


def is_near(rounded: Tensor, wide: Tensor, share: float | None = None) -> bool:
    """Whether `rounded` misses no more of ‖wide‖ than a share, if not said what rounding to its precision takes: so
    that nothing was too large for it, or too small.
    """
    lost, whole = (torch.linalg.vector_norm(own, dtype=torch.float64) for own in (wide - rounded, wide))
    return bool(lost <= (share or torch.finfo(rounded.dtype).eps) * whole)
