"""Adapters into the weights of a diffusers pipeline's folder, for good: W + Σ weight · ΔW, a part at a time."""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, listed, shown
from veneer.files.attach import attach
from veneer.safe.stored import parsed, read_bytes, read_header
from veneer.safe.whole import write_folder

INDEX = "model_index.json"
_ROOMS = ("diffusers", "transformers")  # whose classes are made: a pipeline brings no programs
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Weighted = Sequence[tuple[Adapter, float]]


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a diffusers pipeline."""
    return (folder / INDEX).is_file()


def merge_pipeline(base: Path, adapters: Weighted, out: Path, dtype: str | None = None) -> None:
    """Write the pipeline in `base` with the adapters, each times its weight, in the parts that they are for.

    The other parts are copied as they are. One part is in memory at a time, in `dtype` or as it is stored. Raises one
    `AdapterError` with all that does not fit, of all parts, or `OSError`; nothing is written then.
    """
    kinds = part_kinds(base)
    if not all(adapter.parts for adapter, _ in adapters):
        raise AdapterError(
            f"{base} is a pipeline, and an adapter is for one model by itself: say which "
            "part it is for (`veneer convert IN OUT --to diffusers --part unet`, and merge that)"
        )
    wanted = list(dict.fromkeys(part for adapter, _ in adapters for part in adapter.parts))
    if missing := [part for part in wanted if part not in kinds]:
        raise AdapterError(f"the adapters are for {listed(missing)} too, and {base} has {listed(kinds)} alone")

    def fill(folder: Path) -> None:
        faults = []
        for part in wanted:
            try:
                _merge_part(base / part, kinds[part], part, adapters, folder / part, dtype)
            except AdapterError as error:
                faults += [f"{part}: {error}"]
        if faults:
            raise AdapterError("\n".join(faults))
        shutil.copyfile(base / INDEX, folder / INDEX)
        for part in kinds:
            if part not in wanted and (base / part).is_dir():
                shutil.copytree(base / part, folder / part)

    write_folder(out, fill)


def part_kinds(base: Path) -> dict[str, tuple[str, str]]:
    """Part → (library, class), of the parts that there are."""
    index = parsed(read_bytes(base / INDEX), str(base / INDEX))
    return {
        part: (kind[0], kind[1])
        for part, kind in index.items()
        if isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)
    }


@torch.no_grad()
def _merge_part(
    place: Path, kind: tuple[str, str], part: str, adapters: Weighted, out: Path, dtype: str | None
) -> None:
    model, variant = load_part(place, kind, dtype)
    merged(model, adapters, part).save_pretrained(out, variant=variant)


def merged(model: Any, adapters: Weighted, part: str = "") -> Any:
    """The plain model with W + Σ weight · ΔW; with `part`, of that part of the adapters, where they have it."""
    terms = {}
    for number, (adapter, weight) in enumerate(adapters, 1):
        if part and part not in adapter.parts:
            continue
        name = f"adapter {number}"
        terms[name] = weight
        try:
            model = attach({part: model}, adapter, name, parts=[part])[part] if part else attach(model, adapter, name)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
    return model.merge_and_unload(terms)


def load_part(place: Path, kind: tuple[str, str], dtype: str | None) -> tuple[Any, str | None]:
    """The model of one part, in `dtype` or as it is stored, and which variant of its files was read."""
    library, name = kind
    if library not in _ROOMS:
        raise AdapterError(f"{place} is a {shown(name)} of {shown(library)}; models of {' and '.join(_ROOMS)} are read")
    found = {path: match[1] for path in sorted(place.glob("*")) if (match := _WEIGHTS.fullmatch(path.name))}
    if not found:
        raise AdapterError(f"{place} has no weights in safetensors")
    variant = None if None in found.values() else next(iter(found.values()))
    precision = getattr(torch, dtype) if dtype else _stored([path for path, own in found.items() if own == variant])
    try:
        made_by = getattr(import_module(library), name)
        model = made_by.from_pretrained(place, torch_dtype=precision, variant=variant, local_files_only=True)
    except (ImportError, AttributeError) as error:
        raise AdapterError(f"a {name} needs: pip install 'veneer[diffusion]' ({error})") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"{place} cannot be loaded as a {name}: {str(error).splitlines()[0]}") from error
    return model, variant


def _stored(paths: list[Path]) -> torch.dtype:
    """The type of most of the tensors."""
    kinds = Counter(entry.get("dtype") for path in paths for entry in read_header(path)[0].values())
    return next((_DTYPES[kind] for kind, _ in kinds.most_common() if kind in _DTYPES), torch.float32)
