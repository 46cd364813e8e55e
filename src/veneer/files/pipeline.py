"""A diffusers pipeline's folder: what it is made of; and adapters into its weights, for good: W + Σ weight · ΔW.

Würstchen's models have moved. Folders of old say that they are of `wuerstchen`, those of today of `diffusers`, and
diffusers from 0.38 on finds neither, nor takes them ready-made; so they are found here, and its pipelines put together.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed, listed, shown
from veneer.files.attach import attach
from veneer.files.parts import prior_places
from veneer.safe.stored import parsed, read_bytes, read_header
from veneer.safe.whole import write_folder

INDEX = "model_index.json"
_ROOMS = ("diffusers", "transformers")  # whose classes are made: a pipeline brings no programs
_MOVED = ("WuerstchenPrior", "WuerstchenDiffNeXt", "PaellaVQModel")
_HOMES = ("diffusers.pipelines.deprecated.wuerstchen", "diffusers.pipelines.wuerstchen")  # now, and before
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor", "CLIPTokenizerFast": "CLIPTokenizer"}  # by transformers 5
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
    places = {part: part for part in kinds} | prior_places(kinds)
    wanted = {part: places.get(part, "") for adapter, _ in adapters for part in adapter.parts}
    if missing := [part for part, place in wanted.items() if not place]:
        raise AdapterError(f"the adapters are for {listed(missing)} too, and {base} has {listed(kinds)} alone")

    def fill(folder: Path) -> None:
        faults = []
        for part, place in wanted.items():
            try:
                _merge_part(base / place, kinds[place], part, adapters, folder / place, dtype)
            except AdapterError as error:
                faults += [f"{part}: {error}"]
        if faults:
            raise AdapterError("\n".join(faults))
        shutil.copyfile(base / INDEX, folder / INDEX)
        for part in kinds:
            if part not in wanted.values() and (base / part).is_dir():
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
    made_by = _class(place, kind)
    found = {path: match[1] for path in sorted(place.glob("*")) if (match := _WEIGHTS.fullmatch(path.name))}
    if not found:
        raise AdapterError(f"{place} has no weights in safetensors")
    variant = None if None in found.values() else next(iter(found.values()))
    precision = getattr(torch, dtype) if dtype else _stored([path for path, own in found.items() if own == variant])
    told = {"torch_dtype": precision, "variant": variant, "output_loading_info": True}
    if made_by.__module__.startswith("diffusers.") and find_spec("accelerate") is None:
        told["low_cpu_mem_usage"] = False  # as it would be after a warning
    model, found_out = _made(made_by, place, **told)
    if missing := sorted(found_out["missing_keys"]):  # which would be random
        raise AdapterError(f"{place} lacks weights of a {kind[1]}: {collapsed(missing, 8)}")
    return model, variant


def load_pipeline(folder: str | os.PathLike[str], dtype: str | None = None) -> Any:
    """The diffusers pipeline of a folder on this machine, in `dtype` or each part as it is stored; Würstchen's too,
    which `from_pretrained` does not load. Raises one `AdapterError` with all that lacks or cannot be read.
    """
    folder = Path(folder)
    if not is_pipeline(folder):
        raise AdapterError(f"{folder} is no diffusers pipeline: it has no {INDEX}")
    index, kinds = parsed(read_bytes(folder / INDEX), str(folder / INDEX)), part_kinds(folder)
    made_by = _class(folder, ("diffusers", str(index.get("_class_name"))))
    if not (isinstance(made_by, type) and issubclass(made_by, import_module("diffusers").DiffusionPipeline)):
        raise AdapterError(f"{folder / INDEX}: {shown(index['_class_name'])} is no pipeline of diffusers")
    taken = signature(made_by).parameters
    given = {
        key: None if isinstance(value, list) else value
        for key, value in index.items()
        if key in taken and key not in kinds
    }
    held = load_components(folder, kinds, dtype)
    try:
        return made_by(**given, **held)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder} holds not what a {made_by.__name__} is made of: {error}") from error


def load_components(folder: Path, parts: Iterable[str], dtype: str | None = None) -> dict[str, Any]:
    """These parts of a pipeline's folder: models, tokenizers, schedulers. Raises one `AdapterError` for all."""
    kinds, found, faults = part_kinds(folder), dict[str, Any](), []
    for part in parts:
        try:
            if part not in kinds:
                raise AdapterError(f"{folder / INDEX} names no {part}")
            found[part] = _component(folder / part, kinds[part], dtype)
        except AdapterError as error:
            faults.append(str(error))
    if faults:
        raise AdapterError("\n".join(faults))
    return found


def _component(place: Path, kind: tuple[str, str], dtype: str | None) -> Any:
    made_by = _class(place, kind)
    if not (isinstance(made_by, type) and hasattr(made_by, "from_pretrained")):
        raise AdapterError(f"{place}: {shown(kind[1])} of {kind[0]} is no part of a pipeline")
    return load_part(place, kind, dtype)[0] if issubclass(made_by, torch.nn.Module) else _made(made_by, place)


def _class(place: Path, kind: tuple[str, str]) -> Any:
    """The class of a part, wherever it is by now."""
    library, name = kind
    if absent := [room for room in _ROOMS if find_spec(room) is None]:
        raise AdapterError(f"a {shown(name)} needs: pip install 'veneer[diffusion]' ({listed(absent)} is missing)")
    homes = _HOMES if name in _MOVED else (library,)
    if library not in _ROOMS and name not in _MOVED:
        homes = (f"diffusers.pipelines.{library}",)  # a safety checker's, say
        if not library.isidentifier() or find_spec(homes[0]) is None:
            known = " and ".join(_ROOMS)
            raise AdapterError(f"{place} is a {shown(name)} of {shown(library)}; models of {known} are read")
    said = ""
    for home, own in ((home, own) for home in homes for own in (name, _RENAMED.get(name, name))):
        with suppress(ImportError, AttributeError):
            try:
                return getattr(import_module(home), own)
            except RuntimeError as error:  # what a class of diffusers needs cannot be imported
                said = f": {str(error).splitlines()[-1]}"
    raise AdapterError(f"{place}: {listed(homes, say=str, between=' and ')} have no {shown(name)}{said}")


def _made(made_by: Any, place: Path, **more: Any) -> Any:
    try:
        return made_by.from_pretrained(place, local_files_only=True, **more)
    except ImportError as error:
        raise AdapterError(f"a {made_by.__name__} needs: pip install 'veneer[diffusion]' ({error})") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{place} cannot be loaded as a {made_by.__name__}: {said}") from error


def _stored(paths: list[Path]) -> torch.dtype:
    """The type of most of the tensors."""
    kinds = Counter(entry.get("dtype") for path in paths for entry in read_header(path)[0].values())
    return next((_DTYPES[kind] for kind, _ in kinds.most_common() if kind in _DTYPES), torch.float32)
