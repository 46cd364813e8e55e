"""cloneofsimo/lora (2022, the first LoRA for diffusion models): ΔW = up · down, layer after layer, without names.

A file holds `unet:0:up`, `unet:0:down`, …, `text_encoder:0:up`, …, and for each part the classes of the modules whose
layers they are (`["CrossAttention", "Attention", "GEGLU"]`); the older one is a list, up, down, up, down, … of a part.
The layers stand in the order in which these modules were made: diffusers' transformer blocks of that time made attn1,
ff, attn2, later ones attn1, attn2, ff; the factors' shapes say which. Learned tokens (`<s1>`) are rows of the token
table whose place no file says.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.apart.changes import Change, adapter_of
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.files.attach import models_of
from veneer.files.blocks import TEXT, UNET, layouts, sides, widths
from veneer.files.factors import Pair, pairs
from veneer.files.parts import canonical, is_text
from veneer.files.stored import save
from veneer.safe.stored import parsed

NAME = "cloneofsimo"
_NAME = re.compile(r"(\w+):(\d{1,6}):(up|down)")
_TOKEN = "<embed>"
_TEXT_LAYERS = {768: 12, 1024: 23}  # of the text encoders of Stable Diffusion 1 and 2, by their width
Ends = tuple[Tensor, Tensor]  # up (out, r, …), down (r, in, …)


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether they are numbered ups and downs, or a list of these."""
    numbered = any(map(_NAME.fullmatch, names))
    return numbered or _is_list(names)


def _is_list(names: Collection[str]) -> bool:
    return len(names) >= 2 and set(names) == {str(place) for place in range(len(names))}


def read(tensors: Mapping[str, Tensor], about: Mapping[str, str], where: str, *, model: Any = None) -> Adapter:
    """The adapter of a file for Stable Diffusion 1 or 2, or for `model`: the pipeline, or {part: model}.

    Raises `AdapterError` when the number and shapes of the factors are not those of such a model's layers.
    """
    models = models_of(model) if model is not None else {}
    ends, tokens, faults = _ends(tensors, about)
    every: dict[str, Change] = {}
    for part, own in ends.items():
        if found := _unfit(own):
            faults.append(f"{part}: ups and downs that do not fit each other: {collapsed(found)}")
            continue
        alone = models.get("") if len(ends) == 1 else None
        try:
            paths = _paths(part, own, _classes(part, about), models.get(part, alone), model is not None)
        except AdapterError as error:
            faults.append(str(error))
            continue
        for path, (up, down) in zip(paths, own, strict=True):
            every[canonical(f"{part}.{path}")] = Change(_config(len(down)), {"A": down, "B": up})
    if faults or not every:
        raise AdapterError("\n".join([f"{where}:", *(faults or ["it holds no layer's factors"])]))
    if tokens:
        said = f"{where}: learned tokens are left out, as the file does not say their ids: {listed(tokens)}"
        warnings.warn(said, stacklevel=3)
    own_words = {key for key in about if key in ends or ":" in key or about[key] == _TOKEN}
    metadata = {key: value for key, value in about.items() if key not in own_words and key != "format"}
    return adapter_of(every, metadata=metadata, parts=tuple(ends))


def write(adapter: Adapter, path: Path) -> None:
    """Write it in the order of the layers in Stable Diffusion 1 and 2, when the modules were made attn1, ff, attn2.

    A layer that the adapter leaves alone gets factors of rank 1 that are zero. Raises `AdapterError` with all layers
    that those models have not, or whose size nothing says.
    """
    if not adapter.parts:
        raise AdapterError("cloneofsimo files are for the parts of a pipeline, and this adapter is of one model: say "
                           "which part it is (--part unet, or joined({'unet': adapter}))")  # fmt: skip
    every = pairs(adapter, NAME)
    flat: dict[str, Tensor] = {}
    faults, about = [], {key: value for key, value in adapter.metadata.items() if value != _TOKEN}
    for part in adapter.parts:
        own = {name.removeprefix(f"{part}."): pair for name, pair in every.items() if name.startswith(f"{part}.")}
        shapes = {name: _shape((pair.B, pair.A)) for name, pair in own.items()}
        sizes, odd = widths(shapes)
        classes, paths = _layout(part, own, sizes)
        strange = [f"{name} {shapes[name]}" for name in own if name not in paths]
        faults += [f"{part}: no layers that they count: {collapsed(strange)}"] if strange else []
        faults += [f"{part}: not of the size that Stable Diffusion 1 or 2 has there: {collapsed(odd)}"] if odd else []
        missing = [name for name in paths if name not in own and _none(name, sizes) is None]
        faults += [f"{part}: the size of other layers is not known: {collapsed(missing)}"] if missing else []
        about |= {part: json.dumps(classes)}
        for place, name in enumerate(() if faults else paths):
            up, down = (own[name].B, own[name].A) if name in own else _zeros(_none(name, sizes), own)
            flat |= {f"{part}:{place}:up": up, f"{part}:{place}:down": down}
            about[f"{part}:{place}:rank"] = str(len(down))
    if faults:
        raise AdapterError("cloneofsimo files are for Stable Diffusion 1 and 2 alone:\n" + "\n".join(faults))
    save(flat, path, about)


def _ends(
    tensors: Mapping[str, Tensor], about: Mapping[str, str]
) -> tuple[dict[str, list[Ends]], list[str], list[str]]:
    """Ups and downs by part, in their order; the names of tokens; and what is wrong."""
    if _is_list(tensors):
        own_list = [tensors[str(place)] for place in range(len(tensors))]
        own = list(zip(own_list[::2], own_list[1::2], strict=False))
        odd = ["a list of an odd number of tensors is not ups and downs"] if len(tensors) % 2 else []
        return {_part(own): own}, [], odd
    numbered: dict[str, dict[tuple[int, str], Tensor]] = {}
    tokens: list[str] = []
    strangers: list[str] = []
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            numbered.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            (tokens if about.get(name) == _TOKEN else strangers).append(name)
    faults = [f"unexpected tensors: {collapsed(strangers)}"] if strangers else []
    found: dict[str, list[Ends]] = {}
    for part, numbers in sorted(numbered.items(), key=lambda item: not item[0].startswith("unet")):
        count = 1 + max(place for place, _ in numbers)
        wanted = [(place, end) for place in range(min(count, len(numbers))) for end in ("up", "down")]
        if missing := [f"{part}:{place}:{end}" for place, end in wanted if (place, end) not in numbers]:
            faults.append(f"missing: {listed(missing, say=str)}")
        else:
            found[part] = [(numbers[place, "up"], numbers[place, "down"]) for place in range(count)]
    return found, tokens, faults


def _part(own: Sequence[Ends]) -> str:
    """The part that a list is of: in text encoders all layers are square and of one size."""
    return "text_encoder" if len({size for ends in own for size in _shape(ends)}) == 1 else "unet"


def _shape(ends: Ends) -> tuple[int, int]:
    """(out, in) of the layer."""
    return ends[0].shape[0], ends[1].shape[1]


def _unfit(own: Sequence[Ends]) -> list[str]:
    return [
        f"{place} {tuple(up.shape)} and {tuple(down.shape)}"
        for place, (up, down) in enumerate(own)
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != len(down) or not len(down)
    ]


def _classes(part: str, about: Mapping[str, str]) -> list[set[str]]:
    """The sets of classes that the layers may be of."""
    if part in about:
        named = parsed(f'{{"classes": {about[part]}}}'.encode("utf-8", "replace"), f"what it says of {part}")["classes"]
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise AdapterError(f"what it says of {part} should be a list of classes, found {about[part][:100]!r}")
        return [set(named)]
    return [TEXT] if is_text(part) else list(UNET)


def _paths(part: str, own: Sequence[Ends], classes: list[set[str]], model: Any, given: bool) -> list[str]:
    """The paths of the layers that have these shapes in this order."""
    if given and model is None:
        raise AdapterError(f"{part}: the model that was given has no such part")
    orders = [order for some in classes for order in layouts(some, len(own) // 4, model)]
    every = list(dict.fromkeys(map(tuple, orders)))
    counts = sorted({len(order) for order in every})
    fitting = [order for order in every if len(order) == len(own) and _fits(order, own, model)]
    if len(fitting) == 1:
        return list(fitting[0])
    what = "the model that was given" if given else "Stable Diffusion 1 or 2"
    if len(fitting) > 1:
        raise AdapterError(f"{part}: its layers could be those of {what} in several orders")
    again = "" if given else "; give the model that it is for (model=pipeline)"
    if len(own) not in counts:
        raise AdapterError(f"{part}: it has {len(own)} layers, and {what} has {listed(counts)} such{again}")
    raise AdapterError(f"{part}: its layers' shapes are not those of {what} in any order{again}")


def _fits(order: Sequence[str], own: Sequence[Ends], model: nn.Module | None) -> bool:
    shapes = {path: _shape(ends) for path, ends in zip(order, own, strict=True)}
    if model is None:
        return not widths(shapes)[1]
    weights = {path: model.get_submodule(path).get_parameter("weight") for path in order}
    return all(shapes[path] == tuple(weight.shape[:2]) for path, weight in weights.items())


@cache
def _config(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=r)


def _layout(part: str, own: Mapping[str, Pair], sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The fewest classes that have all of these layers, and the paths of the layers of those."""
    last = max((int(number) for name in own for number in re.findall(r"\.layers\.(\d+)\.", name)), default=0)
    layers = _TEXT_LAYERS.get(sizes.get("text", 0), last + 1)
    for classes in [TEXT] if is_text(part) else UNET:
        paths = layouts(classes, layers)[0]
        if own.keys() <= set(paths):
            break
    return sorted(classes), paths


def _none(path: str, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """(out, in) of a layer that the adapter leaves alone, where the others say it."""
    known = [side.times * sizes[side.size] for side in sides(path) if side and side.size in sizes]
    return (known[0], known[1]) if len(known) == 2 and ".resnets." not in path else None


def _zeros(shape: tuple[int, int] | None, own: Mapping[str, Pair]) -> Iterator[Tensor]:
    assert shape is not None
    like = next(iter(own.values())).B
    return iter((like.new_zeros(shape[0], 1), like.new_zeros(1, shape[1])))
