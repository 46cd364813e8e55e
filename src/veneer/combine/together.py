"""Whether adapters can be one, and what is said of the one."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, listed, named

# what a file says of the ranks and bytes that it had
_STALE = ("ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_MOST = 20  # faults that are told one by one


def refuse_apart(adapters: Sequence[Adapter], weights: Sequence[object], names: Sequence[str], how: str) -> None:
    """Raise `AdapterError` for what is wrong with them as they stand, and warn of different bases."""
    wrong = [fault for adapter in adapters for fault in adapter.faults]
    if not adapters:
        wrong.append("no adapters are given to combine")
    if not len(adapters) == len(weights) == len(names):
        wrong.append(f"expected a weight for each adapter, found {len(adapters)} adapters and {len(weights)} weights")
    if how == "slerp" and len(adapters) != 2:
        wrong.append(f"slerp is between two adapters, found {len(adapters)}")
    if len({bool(adapter.parts) for adapter in adapters}) > 1:
        told = [
            f"{name} of {listed(own.parts, say=str) if own.parts else 'one model'}"
            for name, own in zip(names, adapters, strict=False)
        ]
        wrong.append(f"some are adapters of a pipeline's parts and others of one model: {listed(told, say=str)}")
    if wrong:
        raise AdapterError("\n".join(wrong))
    bases = {own.config.base_model_name_or_path: name for name, own in zip(names, adapters, strict=True)}
    if len(bases.keys() - {None}) > 1:
        made = [f"{name} for {named(base)}" for base, name in bases.items() if base]
        warnings.warn(f"the adapters were made for different bases: {listed(made, say=str)}", stacklevel=4)


def agreed(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What `adapter_of` is told beside the changes: what all say, or, of the base, the first that says something."""
    first = adapters[0]
    alike = {
        key: text for key, text in first.metadata.items() if all(own.metadata.get(key) == text for own in adapters)
    }
    metadata = {key: text for key, text in alike.items() if key not in _STALE}
    parts = tuple(dict.fromkeys(part for adapter in adapters for part in adapter.parts))
    base = next((own.config.base_model_name_or_path for own in adapters if own.config.base_model_name_or_path), None)
    tasks = {own.config.task_type for own in adapters}
    return {"metadata": metadata, "parts": parts, "base": base, "task_type": tasks.pop() if len(tasks) == 1 else None}


def precision(adapters: Sequence[Adapter], least: torch.dtype | None = torch.float32) -> torch.dtype:
    """The widest among the tensors, and that of `least`, if any."""
    own = {tensor.dtype for adapter in adapters for tensors in adapter.tensors.values() for tensor in tensors.values()}
    kinds = {dtype for dtype in own if dtype.is_floating_point} | ({least} if least else set())
    return functools.reduce(torch.promote_types, kinds or {torch.float32})


def told(faults: Sequence[str]) -> str:
    """All of them, each once; of very many the first."""
    return listed(dict.fromkeys(faults), _MOST, str, "\n")
