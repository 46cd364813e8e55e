"""Mixed rows for a layer that runs on changed weights: once for each set of adapters that some rows share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.core.plan import Term

if TYPE_CHECKING:
    from veneer.core.kinds.layer import AdaptedLayer


def forward_by_row(layer: "AdaptedLayer", terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """y[i] = f(x[i]; W + Σ weight[i] · ΔW), where f is the layer's own forward on inputs `(rows, …)`.

    For rows of the base f runs on the whole batch, as a batch of another size may round differently. Raises
    `AdapterError` for inputs and outputs that are not tensors of rows.
    """
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    strangers = [value for value in (*args, *kwargs.values()) if not _is_simple(value)]
    if not inputs or strangers or any(value.ndim == 0 for value in inputs):
        raise _refused(layer, strangers or inputs, "called with")
    for value in inputs:
        layer.adapters.plan.check_rows(terms, value)
    groups: dict[tuple[Term, ...], list[int]] = {}
    for row in range(len(terms[0].rows or ())):
        weights = ((term.adapter, term.rows[row]) for term in terms if term.rows)
        groups.setdefault(tuple(Term(name, weight) for name, weight in weights if weight), []).append(row)
    number = len(inputs[0])
    places = torch.arange(number, device=inputs[0].device).view(sum(map(len, groups.values())), -1)
    outputs, order = [], []
    for own, rows in groups.items():
        chosen = places[rows].flatten()

        def picked(value: Any, chosen: Tensor = chosen) -> Any:
            return value[chosen.to(value.device)] if isinstance(value, Tensor) else value

        order.append(chosen)
        if own:
            inner = [picked(value) for value in args], {name: picked(value) for name, value in kwargs.items()}
            outputs.append(layer.own_forward(layer.changed(own), *inner[0], **inner[1]))
        else:
            outputs.append(_each(layer, [layer.own_forward({}, *args, **kwargs)], lambda own: picked(own[0])))
    back = torch.argsort(torch.cat(order))
    return _each(layer, outputs, lambda own: torch.cat(own)[back.to(own[0].device)])


def _each(layer: "AdaptedLayer", outputs: list[Any], join: Any) -> Any:
    """`join` of the outputs, of each place where they are tuples."""
    if isinstance(outputs[0], tuple):
        return tuple(_each(layer, list(each), join) for each in zip(*outputs, strict=True))
    if outputs[0] is None:
        return None
    if not isinstance(outputs[0], Tensor) or outputs[0].ndim == 0:
        raise _refused(layer, outputs, "that gives")
    return join(outputs)


def _is_simple(value: object) -> bool:
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _refused(layer: "AdaptedLayer", values: Sequence[object], how: str) -> AdapterError:
    kinds = ", ".join(sorted({type(value).__name__ for value in values})) or "no tensor"
    return AdapterError(
        f"a {type(layer).__name__} {how} {kinds} cannot be mixed by rows: expected tensors (rows, …); run them apart"
    )
