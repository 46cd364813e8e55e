"""PEFT's folder: `adapter_config.json` beside `adapter_model.safetensors`, or `adapter_model.bin` where it is named.

A pipeline's adapter has a folder for each part in it.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.apart.changes import Change, adapter_of, beside, changes
from veneer.core.adapter import Adapter
from veneer.core.config import scaling
from veneer.core.errors import AdapterError, collapsed, listed, named, nearest
from veneer.core.methods.lokr import divided
from veneer.core.update import flat
from veneer.files.folder import CONFIG, by_layer, content, examine, faultless, put, read_config
from veneer.files.parts import PARTS, STILL_FLAT, by_part, joined, unresolved

NAME = "peft"
_PREFIX = ("base_model.model.", "base_model.vera_A", "base_model.vera_B")
_OF_LORA = ("bias", "target_parameters", "trainable_token_indices")  # fields that PEFT's other methods have not
_KERNELS = (1, 9, 3, 4, 25, 16, 49)  # points of the kernels that there are; a decomposed D does not say it
_AS_LORA = "make it a plain LoRA first (veneer resize), or save it as veneer's own folder"


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether a file's tensors are called as in `adapter_model.safetensors`."""
    return bool(names) and all(name.startswith(_PREFIX) for name in names)


def inside(folder: Path) -> list[str]:
    """The folders in this one that are PEFT folders."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if (path / CONFIG).is_file())


def read(tensors: Mapping[str, Tensor], about: Mapping[str, str], where: str, *, adapter: str | None = None) -> Adapter:
    """What the folder `where` holds; or its file `where`, whose tensors are given, with the config beside it.

    Of several adapters that PEFT saved in folders inside, `adapter` names one. Folders that are called like a
    pipeline's parts are one adapter. Raises `AdapterError` that says all that is wrong.
    """
    place = Path(where)
    if not place.is_dir():
        if not (place.parent / CONFIG).is_file():
            raise AdapterError(f"{place} says neither method nor alpha: its {CONFIG} should stand beside it")
        found, strangers = by_layer(tensors, read_config(place.parent), about)
        found.faults += [f"{place}: unexpected tensors: {collapsed(strangers)}"] if strangers else []
        return faultless(found)
    there = inside(place)
    if adapter is not None and adapter not in there:
        raise AdapterError(f"{place} has no adapter {named(adapter)}: it has {listed(there)}{nearest(adapter, there)}")
    if adapter is not None:
        return faultless(examine(place / adapter))
    if (place / CONFIG).is_file() or not there:
        return faultless(examine(place))
    if set(there) <= set(PARTS):
        return joined({part: faultless(examine(place / part)) for part in there})
    if len(there) > 1:
        raise AdapterError(f"{place} holds several adapters, name one: {listed(there, 20)} (adapter=…, or its folder)")
    return faultless(examine(place / there[0]))


def write(adapter: Adapter, path: Path) -> None:
    """Write a folder that PEFT reads, a folder for each part in it where there are parts: all whole, or nothing.

    Raises `AdapterError` with every reason why PEFT cannot hold the adapter; `Adapter.save` writes what veneer reads.
    """
    if flat_names := unresolved(adapter):
        raise AdapterError(f"PEFT cannot hold all of this adapter: {STILL_FLAT}: {collapsed(flat_names, 8)}")
    parts = by_part(adapter) if adapter.parts else {"": adapter}
    folders = {path / part: held(own) for part, own in parts.items()}
    if stale := [name for name in inside(path) if adapter.parts and name not in parts]:
        raise AdapterError(f"{path} holds {listed(stale, say=named)} too, which would be read with it: write elsewhere")
    if adapter.parts and (path / CONFIG).exists():
        raise AdapterError(f"{path} holds an adapter of one model, which would be read instead: write elsewhere")
    put({file: write for folder, own in folders.items() for file, write in content(own, folder).items()}, path)


def held(adapter: Adapter) -> Adapter:
    """The same adapter as PEFT says it. Raises `AdapterError` with all that it cannot say."""
    every, rest = changes(adapter), beside(adapter)
    reasons: dict[str, list[str]] = {}
    kinds = {(change.config.peft_type, change.config.use_dora) for change in every.values()}
    if len(kinds) > 1:
        told = sorted(f"{peft_type}{' with DoRA' * dora}" for peft_type, dora in kinds)
        reasons[f"several methods, where PEFT has one for all layers ({', '.join(told)})"] = list(every)
    for path, change in every.items():
        for reason in _reasons(change):
            reasons.setdefault(reason, []).append(path)
    if any(kind != "LORA" for kind, _ in kinds):
        for name in _OF_LORA:
            if getattr(adapter.config, name) not in (None, [], "none"):
                reasons[f"{name}, which PEFT has for LoRA alone"] = list(rest)
    if len({change.config.r for change in every.values()}) > 1 and ("VERA", False) in kinds:
        reasons["ranks that differ, where PEFT's VeRA has one"] = list(every)
    factor = _lokr(every)
    if factor is None:
        reasons["a LoKr that is not divided as PEFT divides by one decompose_factor"] = list(every)
    if reasons:
        told = [f"- {reason}: {collapsed(paths, 8)}" for reason, paths in reasons.items()]
        raise AdapterError("\n".join([f"PEFT cannot hold all of this adapter ({_AS_LORA}):", *told]))
    biased = any("b" in change.tensors for change in every.values() if change.config.peft_type == "LORA")
    mixed = len({change.config.use_rslora for change in every.values()}) > 1
    own = {path: _said(change, biased, mixed, factor or {}) for path, change in every.items()}
    return adapter_of(own, like=adapter)


def _reasons(change: Change) -> list[str]:
    method, dora = change.config.peft_type, change.config.use_dora
    found = []
    if method == "FULL":
        found.append("changes of full size")
    elif method == "IA3" and not change.config.options["scales_bias"]:
        found.append("(IA)³ that leaves biases as they are, where PEFT's scales them")
    elif dora and method != "LORA":
        found.append(f"DoRA over {method}, which PEFT has over LoRA alone")
    elif dora and change.tensors["magnitude"].ndim == 2 and len(change.tensors["magnitude"]) == 1:
        found.append("DoRA on columns, where PEFT has it on rows")
    return found


def _said(change: Change, biased: bool, mixed: bool, options: Mapping[str, Any]) -> Change:
    """The change as one config for all can have it: b or none, α / r or α / √r."""
    config, tensors = change.config, dict(change.tensors)
    if biased and "b" not in tensors:
        tensors["b"] = tensors["B"].new_zeros(len(tensors["B"]))
    if config.use_rslora and (mixed or config.peft_type != "LORA"):
        alpha = scaling(config.r, config.lora_alpha, True) * config.r
        config = replace(config, use_rslora=False, lora_alpha=alpha)
    own = {name: value for name, value in config.options.items() if name in ("feedforward_modules", "freeze_A")}
    if biased:
        options = {**options, "lora_bias": True}
    changed = {**config.options, **options, **own}
    if changed != config.options:
        config = replace(config, options={})
        config.options |= changed  # in one layer's, whether it is named
    return replace(change, config=config, tensors=tensors)


def _lokr(every: Mapping[str, Change]) -> dict[str, Any] | None:
    """The options under which PEFT divides and decomposes as all these LoKr are, where there are such."""
    own = [change for change in every.values() if change.config.peft_type == "LOKR"]
    if not own:
        return {}
    both = any("C_A" in change.tensors for change in own)
    factors = [own[0].config.options["decompose_factor"], -1]
    factors += [size for change in own for size in flat(change.tensors[_whole(change, "C", "B")])]
    for factor in dict.fromkeys(factors):
        if factor and all(any(_divides(change, factor, both, points) for points in _KERNELS) for change in own):
            return {"decompose_factor": factor, "decompose_both": both}
    return None


def _whole(change: Change, name: str, factor: str) -> str:
    return name if name in change.tensors else f"{name}_{factor}"


def _divides(change: Change, factor: int, both: bool, points: int) -> bool:
    """Whether PEFT divides so, by the channels of a kernel of so many points, and decomposes the same of C and D."""
    own, r = change.tensors, change.config.r
    rows = [len(own[_whole(change, name, "B")]) for name in "CD"]
    columns = [flat(own[_whole(change, name, "A")])[1] for name in "CD"]
    if columns[1] % points:
        return False
    outer, inner = (rows[0], columns[0]), (rows[1], columns[1] // points)
    sides = [divided(rows[0] * rows[1], factor), divided(columns[0] * inner[1], factor)]
    decomposed = ("C" in own, "D" in own) == (not both or 2 * r >= max(outer), 2 * r >= max(inner))
    return sides == [*zip(outer, inner, strict=True)] and decomposed
