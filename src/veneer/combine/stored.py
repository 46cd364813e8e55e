"""The weights of stored models: safetensors files, in several pieces or one, of a model or a pipeline's parts."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.core.errors import AdapterError, listed, named, shown
from veneer.safe.stored import parsed, read_bytes, read_header

# the folders of a pipeline that adapters are made for
PARTS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files, by name; each is read when it is asked for, and none is kept."""

    def __init__(self, homes: Mapping[str, tuple[Path, str]], parts: tuple[str, ...]) -> None:
        self._homes, self.parts = homes, parts

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._homes[name]
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AdapterError(f"{path}: {key} cannot be read: {error}") from None

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


def _in_folder(folder: Path) -> dict[str, tuple[Path, str]]:
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


def _in_pieces(folder: Path, index: Path) -> dict[str, tuple[Path, str]]:
    placed = parsed(read_bytes(index), str(index)).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise AdapterError(f"{index}: expected a weight_map of names to files")
    names = sorted(set(placed.values()))
    if strange := [name for name in names if Path(name).name != name]:
        raise AdapterError(f"{index}: expected names of files beside it, found {listed(strange)}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise AdapterError(f"{folder} is not whole: {listed(absent, say=named)} are missing")
    return {key: home for name in names for key, home in _in_file(folder / name).items()}


def _in_file(path: Path) -> dict[str, tuple[Path, str]]:
    if path.suffix in _PICKLES:
        raise AdapterError(
            f"{path} is a pickle, which could run code: expected a .safetensors file, found {shown(path.suffix)}"
        )
    return {name: (path, name) for name in read_header(path)[0]}
