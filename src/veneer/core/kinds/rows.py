"""Mixed rows for a layer that runs on changed weights: once for each set of adapters that some rows share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.core.plan import Term

if TYPE_CHECKING:
    from veneer.core.kinds.layer import AdaptedLayer


def forward_by_row(
    layer: "AdaptedLayer", terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """y[i] = f(x[i]; W + Σ weight[i] · ΔW), where f is the layer's own forward on inputs `(rows, …)`.

    For rows of the base f runs on the whole batch, as a batch of another size may round differently. Raises
    `AdapterError` for inputs and outputs that are not tensors of rows.
    """
    inputs = [value for value in (*args, *kwargs.values()) if not isinstance(value, bool | int | float | str | None)]
    _expect_rows(layer, "called with", inputs)
    for value in inputs:
        layer.adapters.plan.count(value)
    groups: dict[tuple[Term, ...], list[int]] = {}
    number = len(terms[0].rows or ())
    for row in range(number):
        weights = ((term.adapter, term.rows[row]) for term in terms if term.rows)
        groups.setdefault(tuple(Term(name, weight) for name, weight in weights if weight), []).append(row)
    places = torch.arange(len(inputs[0]), device=inputs[0].device).view(number, -1)
    order = [places[rows].flatten() for rows in groups.values()]

    def run(own: tuple[Term, ...], chosen: Tensor) -> Any:
        def picked(value: Any) -> Any:
            return value[chosen] if own and isinstance(value, Tensor) else value

        named = {name: picked(value) for name, value in kwargs.items()}
        y = layer.own_forward(layer.changed(own), *map(picked, args), **named)
        _expect_rows(layer, "that gives", [y])
        return y if own else y[chosen]

    return torch.cat(list(map(run, groups, order)))[torch.cat(order).argsort()]


def _expect_rows(layer: "AdaptedLayer", how: str, values: Sequence[object]) -> None:
    if not values or not all(isinstance(value, Tensor) and value.ndim for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
        raise AdapterError(
            f"a {type(layer).__name__} {how} {kinds} cannot be mixed by rows: expected tensors (rows, …); "
            "run them apart"
        )
