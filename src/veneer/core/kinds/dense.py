"""The fallback for everything: a layer's own forward, run with W + ΔW in the place of its parameters."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.plan import Term


class AdaptedDense(AdaptedLayer):
    """y = f(x; W + Σ weight · ΔW), where f is the layer's own forward.

    In a mixed batch, f runs once for each set of adapters that some rows share, on these rows.
    """

    drops = False
    rowwise: ClassVar[bool] = True  # the first dimension of its inputs is the batch's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rowwise and (terms := self.adapters.by_row()):
            return forward_by_row(self, terms, args, kwargs)
        return self.own_forward(self.changed(), *args, **kwargs)


class AdaptedNorm(AdaptedDense):
    """A norm layer, whose scale and bias are the two columns of one matrix `(n, 2)`; without a bias, `(n, 1)`."""

    norm = True

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        named = isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or type(layer).__name__.endswith("Norm")
        if not named or not isinstance(getattr(layer, "weight", None), Tensor):
            return False
        return {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}

    @classmethod
    def matrices(cls, layer: nn.Module) -> dict[str, Tensor]:
        columns = [getattr(layer, name, None) for name in ("weight", "bias")]
        return {"": torch.stack([column.flatten() for column in columns if column is not None], 1)}

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: column.view(layer.weight.shape)
            for matrix in matrices.values()
            for name, column in zip(("weight", "bias"), matrix.t().contiguous(), strict=False)
        }


def forward_by_row(
    layer: AdaptedLayer, terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any]
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


def _expect_rows(layer: AdaptedLayer, how: str, values: Sequence[object]) -> None:
    if not values or not all(isinstance(value, Tensor) and value.ndim for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
        raise AdapterError(
            f"a {type(layer).__name__} {how} {kinds} cannot be mixed by rows: expected tensors (rows, …); "
            "run them apart"
        )
