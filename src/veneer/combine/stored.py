"""The weights of stored models: safetensors files, in several pieces or one, of a model or a pipeline's parts."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.core.errors import AdapterError, collapsed, listed, named, shown
from veneer.safe.stored import parsed, read_bytes, read_header

# the folders of a pipeline that adapters are made for
PARTS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Home(NamedTuple):
    """Where a tensor is, and its shape."""

    path: Path
    key: str
    shape: tuple[int, ...]


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files, by name; each is read when it is asked for, and none is kept."""

    def __init__(self, homes: Mapping[str, "Home"], parts: tuple[str, ...]) -> None:
        self._homes, self.parts = homes, parts

    def __getitem__(self, name: str) -> Tensor:
        path, key, _ = self._homes[name]
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AdapterError(f"{path}: {key} cannot be read: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for that."""
        return self._homes[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


def weights_of(source: str | os.PathLike[str]) -> StoredWeights:
    """The weights that a file or a folder holds, by name; of a pipeline's folder, under its parts' names.

    Raises `AdapterError` for what is no such thing, and for pickles, which could run code.
    """
    path = Path(source)
    if path.is_file():
        return StoredWeights(_in_file(path), ())
    if not path.is_dir():
        raise AdapterError(f"{path} does not exist: expected a model's folder or a .safetensors file")
    if (path / "model_index.json").is_file():
        parts = tuple(part for part in PARTS if (path / part).is_dir())
        inner = {part: _in_folder(path / part) for part in parts}
        homes = {f"{part}.{name}": home for part, own in inner.items() for name, home in own.items()}
        return StoredWeights(homes, parts)
    return StoredWeights(_in_folder(path), ())


def _in_folder(folder: Path) -> dict[str, Home]:
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for stem in _STEMS:
        for name in (f"{stem}.safetensors.index.json", *_like(files, stem, ".safetensors.index.")):
            if name in files:
                return _in_pieces(folder, files[name])
        for name in (f"{stem}.safetensors", *_like(files, stem, ".safetensors")):
            if name in files:
                return _in_file(files[name])
    rest = [name for name in files if name.endswith(".safetensors")]
    if len(rest) == 1:
        return _in_file(files[rest[0]])
    pickles = [name for name in files if name.endswith(_PICKLES)]
    more = f"; {listed(pickles, say=named)} are pickles, which could run code, and are not opened" if pickles else ""
    raise AdapterError(f"{folder} holds no model: expected safetensors, found {listed(files, say=named)}{more}")


def _like(files: Mapping[str, Path], stem: str, ending: str) -> list[str]:
    """Variants, as `model.fp16.safetensors`."""
    return [name for name in files if name.startswith(f"{stem}.") and ending in name]


def _in_pieces(folder: Path, index: Path) -> dict[str, Home]:
    placed = parsed(read_bytes(index), str(index)).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise AdapterError(f"{index}: expected a weight_map of names to files")
    names = sorted(set(placed.values()))
    if strange := [name for name in names if Path(name).name != name]:
        raise AdapterError(f"{index}: expected names of files beside it, found {listed(strange)}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise AdapterError(f"{folder} is not whole: {listed(absent, say=named)} are missing")
    return {key: home for name in names for key, home in _in_file(folder / name).items()}


def _in_file(path: Path) -> dict[str, Home]:
    if path.suffix in _PICKLES:
        raise AdapterError(
            f"{path} is a pickle, which could run code: expected a .safetensors file, found {shown(path.suffix)}"
        )
    header, faults = read_header(path)[0], []
    homes = {}
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape):
            homes[name] = Home(path, name, tuple(shape))
        else:
            faults.append(name)
    if faults:
        raise AdapterError(f"{path} is not a whole safetensors file: no shapes of {collapsed(faults)}")
    return homes
