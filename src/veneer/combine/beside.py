"""What adapters train beside their method: whole parameters and rows of tables, whose changes are combined likewise.

W + Σ wᵢ (W′ᵢ - W) is Σ wᵢ W′ᵢ where Σ wᵢ = 1, over the adapters that have it: there the base's W is not asked for.
What is the same in all adapters, to the bit, is kept. All else needs the base, or is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from veneer.apart.changes import beside
from veneer.combine.base import Base
from veneer.combine.ways import Way, along_the_arc
from veneer.core.adapter import Adapter
from veneer.core.errors import collapsed, listed

Entry = tuple[str, int | None]  # a parameter's path, or a table's with the number of one of its rows


@dataclass
class Rest:
    """The tensors by path, and what a config says of them."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def onto(self, adapter: Adapter) -> Adapter:
        """The adapter with these."""
        config = replace(adapter.config, **self.fields)
        return replace(adapter, config=config, tensors={**adapter.tensors, **self.tensors})


def combined_beside(
    adapters: Sequence[Adapter],
    share: Sequence[Mapping[str, float]],
    names: Sequence[str],
    way: Way,
    base: Base | None,
    dtype: torch.dtype,
    faults: list[str],
) -> Rest:
    """What stands beside the layers' changes in the combined adapter; what cannot be, is told to `faults`."""
    own = [beside(adapter) for adapter in adapters]
    values: list[dict[Entry, Tensor]] = [_entries(adapter, every) for adapter, every in zip(adapters, own, strict=True)]
    stacks = {path for every in own for path, tensors in every.items() if not {"value", "rows"} & tensors.keys()}
    if stacks:
        faults.append(f"parameters adapted by their name (target_parameters) are not combined: {collapsed(stacks)}")
    faults += _twice(adapters, own)
    found, torn = dict[Entry, Tensor](), dict[str, list[str]]()
    for entry in dict.fromkeys(entry for every in values for entry in every):
        having = [i for i, every in enumerate(values) if entry in every]
        terms = [(share[i][entry[0]], values[i][entry].double()) for i in having]
        start = _of_base(base, entry)
        keys = [f"{way.seed}:{entry[0]}:{entry[1]}:{i}" for i in having]
        weights = ", ".join(f"{weight:g} of {names[i]}" for i, (weight, _) in zip(having, terms, strict=True))
        if start is not None:
            found[entry] = _changed(start.double(), terms, way, keys)
        elif len(having) == len(adapters) and all(torch.equal(terms[0][1], value) for _, value in terms):
            found[entry] = terms[0][1]
        elif way.is_sum and abs(sum(weight for weight, _ in terms) - 1) < 1e-9:
            found[entry] = torch.stack([weight * value for weight, value in terms]).sum(0)
        else:
            torn.setdefault(weights, []).append(entry[0])
    for weights, paths in torn.items():
        faults.append(
            f"trained whole, and {way.how} with {weights} needs the base's values, so give the base, "
            f"or weights whose sum is 1: {collapsed(dict.fromkeys(paths))}"
        )
    return _as_filed(adapters, {entry: value.to(dtype) for entry, value in found.items()}, base, faults)


def _entries(adapter: Adapter, every: Mapping[str, Mapping[str, Tensor]]) -> dict[Entry, Tensor]:
    found: dict[Entry, Tensor] = {(path, None): own["value"] for path, own in every.items() if "value" in own}
    for path, own in every.items():
        if "rows" in own:
            found |= {(path, token): row for token, row in zip(_tokens(adapter, path), own["rows"], strict=True)}
    return found


def _tokens(adapter: Adapter, path: str) -> list[int]:
    wanted = adapter.config.trainable_token_indices or {}
    if isinstance(wanted, list):
        return wanted
    return next((rows for name, rows in wanted.items() if path.endswith(name)), [])


def _twice(adapters: Sequence[Adapter], own: Sequence[Mapping[str, object]]) -> list[str]:
    """Layers that one adapter changes by its method and another one trains whole."""
    layers = {
        path for adapter, every in zip(adapters, own, strict=True) for path in adapter.tensors if path not in every
    }
    both = [
        path for every in own for path in every if path in layers or (_owner(path) in layers and path[-5:] != ".bias")
    ]
    return [f"changed by one adapter and trained whole by another: {collapsed(dict.fromkeys(both))}"] if both else []


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def _of_base(base: Base | None, entry: Entry) -> Tensor | None:
    path, token = entry
    value = None if base is None else base.value(path if token is None else f"{path}.weight")
    return value if value is None or token is None else value[token]


def _changed(start: Tensor, terms: Sequence[tuple[float, Tensor]], way: Way, keys: Sequence[str]) -> Tensor:
    """W and the combined change."""
    changes = [(weight, value - start) for weight, value in terms]
    if way.how == "slerp":
        weights = along_the_arc([weight for weight, _ in changes], [change.reshape(1, -1) for _, change in changes])
        changes = [(weight, change) for weight, (_, change) in zip(weights, changes, strict=True)]
    if way.is_sum or way.how == "slerp":
        return start + torch.stack([weight * change for weight, change in changes]).sum(0)
    return start + way.entrywise(changes, keys)


def _as_filed(adapters: Sequence[Adapter], found: Mapping[Entry, Tensor], base: Base | None, faults: list[str]) -> Rest:
    configs = [adapter.config for adapter in adapters]
    rest = Rest({path: {"value": value} for (path, token), value in found.items() if token is None})
    rows: dict[str, dict[int, Tensor]] = {}
    for (path, token), value in found.items():
        if token is not None:
            rows.setdefault(path, {})[token] = value
    rest.tensors |= {path: {"rows": torch.stack([own[token] for token in sorted(own)])} for path, own in rows.items()}
    if rows:
        rest.fields["trainable_token_indices"] = {path: sorted(own) for path, own in rows.items()}
    if saved := [name for config in configs for name in config.modules_to_save or []]:
        rest.fields["modules_to_save"] = list(dict.fromkeys(saved))
    if biases := {config.bias for config in configs} - {"none"}:
        rest.fields["bias"] = "all" if "all" in biases else "lora_only"
        if "all" not in biases:
            _fill_biases(adapters, rest, base, faults)
    return rest


def _fill_biases(adapters: Sequence[Adapter], rest: Rest, base: Base | None, faults: list[str]) -> None:
    """With bias="lora_only", every adapted layer that has a bias needs one in the file; the base's, where none is."""
    layers = [{path for path, own in adapter.tensors.items() if "value" not in own} for adapter in adapters]
    if all(every == layers[0] for every in layers) and len({adapter.config.bias for adapter in adapters}) == 1:
        return
    if base is None:
        told = listed({adapter.config.bias for adapter in adapters})
        faults.append(f"biases are trained in some layers alone (bias is {told}, or the layers differ): give the base")
        return
    for path in dict.fromkeys(path for every in layers for path in every):
        bias = base.value(f"{path}.bias")
        if bias is not None:
            rest.tensors.setdefault(f"{path}.bias", {"value": bias.detach().clone()})
