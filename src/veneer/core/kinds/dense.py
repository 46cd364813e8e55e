"""The fallback for everything: a layer's own forward, run with W + ΔW in the place of its parameters."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.plan import Term
from veneer.core.update import Update


class AdaptedDense(AdaptedLayer):
    """y = f(x; W + Σ weight · ΔW), where f is the layer's own forward.

    In a mixed batch, f runs once for each set of adapters that some rows share, on these rows.
    """

    drops = False
    rowwise: ClassVar[bool] = True  # the first dimension of its inputs is the batch's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rowwise and (terms := self.adapters.by_row()):
            return self._forward_by_row(terms, args, kwargs)
        return self.own_forward(self.changed(), *args, **kwargs)

    def _forward_by_row(self, terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """y[i] = f(x[i]; W + Σ weight[i] · ΔW), on inputs `(rows, …)`.

        For rows of the base f runs on the whole batch, as a batch of another size may round differently. Raises
        `AdapterError` for inputs and outputs that are not tensors of rows.
        """
        inputs = [own for own in (*args, *kwargs.values()) if not isinstance(own, bool | int | float | str | None)]
        _expect_rows(self, "called with", inputs)
        for value in inputs:
            self.adapters.plan.count(value)
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
            y = self.own_forward(self.changed(own), *map(picked, args), **named)
            _expect_rows(self, "that gives", [y])
            return y if own else y[chosen]

        return torch.cat(list(map(run, groups, order)))[torch.cat(order).argsort()]


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


class AdaptedParts(AdaptedDense):
    """A layer of several matrices, each with an update of its own."""

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        """The parameters that change: part → name."""
        raise NotImplementedError

    @classmethod
    def matrices(cls, layer: nn.Module) -> dict[str, Tensor]:
        return {part: attrgetter(name)(layer) for part, name in cls.names(layer).items()}

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {part: name for part, name in cls.names(layer).items() if part in matrices}
        return {name: matrices[part].reshape(attrgetter(name)(layer).shape) for part, name in names.items()}


class AdaptedParameters(AdaptedParts):
    """Any parameters of a layer, by name: vectors `(n, 1)`, matrices as they are, stacks `(number, out, in)`.

    Stacks are the experts of a mixture, each with a change of rank r. A layer that says `is_transposed` holds
    `(number, in, out)`.
    """

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        return {name: name for name, parameter in layer.named_parameters(recurse=False) if 1 <= parameter.ndim <= 3}

    @classmethod
    def matrices(cls, layer: nn.Module) -> dict[str, Tensor]:
        values = super().matrices(layer)
        return {part: own.unsqueeze(1) if own.ndim == 1 else _turned(layer, own) for part, own in values.items()}

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().values(layer, {part: _turned(layer, matrix) for part, matrix in matrices.items()})

    @classmethod
    def places(cls, update: Update) -> dict[str, str]:
        """PEFT wraps the layer once for each parameter, the last one outermost."""
        parts = update.parts()
        return {part: ".base_layer" * (len(parts) - 1 - i) for i, part in enumerate(parts)}

    @classmethod
    def filed(cls, layer: nn.Module, form: str, tensor: Tensor) -> Tensor:
        """PEFT's files hold a stack's A as `(number · r, in)` and B as `(out, r · number)`."""
        if tensor.ndim == 3 and form == "A":
            return tensor.flatten(0, 1)
        return tensor.permute(1, 2, 0).flatten(1) if tensor.ndim == 3 and form == "B" else tensor

    @classmethod
    def unfiled(cls, form: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        if len(shape) == 3 and form == "B":
            number, rows, r = shape
            return tensor.reshape(rows, r, number).permute(2, 0, 1)
        return super().unfiled(form, tensor, shape)


class AdaptedAttention(AdaptedParts):
    """y = attention(q, k, v; W + Σ weight · ΔW), for the projections of the inputs and that of the output at once.

    The inputs' projections are one matrix `(3 · dim, dim)`, or three where keys or values have sizes of their own.
    """

    rowwise = False  # batch_first and the masks say which dimension it is

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.MultiheadAttention)

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        together = getattr(layer, "in_proj_weight", None) is not None
        inputs = ("in_proj",) if together else ("q_proj", "k_proj", "v_proj")
        return {**{name: f"{name}_weight" for name in inputs}, "out_proj": "out_proj.weight"}

    @classmethod
    def places(cls, update: Update) -> dict[str, str]:
        """The inputs' projection stands at the layer itself, the output's inside PEFT's wrapper; PEFT has no others."""
        own = {"in_proj": "", "out_proj": ".base_layer.out_proj"}
        return {part: own.get(part, f".{part}") for part in update.parts()}


class AdaptedModule(AdaptedParts):
    """y = f(x; W + Σ weight · (W′ - W)) for parameters W of a module of any class, those of modules in it included.

    One adapter with weight 1 gives y = f(x; W′), to the bit.
    """

    @classmethod
    def refusal(cls, layer: nn.Module, config: LoraConfig) -> str | None:
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        if buffers := [name for name in layer.state_dict() if name not in parameters]:
            return f"with buffers, which training changes and no adapter holds: {listed(buffers)}"
        if quantised := [name for name, own in parameters.items() if not own.is_floating_point()]:
            return f"with quantised parameters, which cannot be trained: {listed(quantised)}"
        if type(layer).forward is nn.Module.forward:
            return "that is never called itself: name the modules in it"
        return None if parameters else "without parameters"

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        names = (name for name, _ in layer.named_parameters() if not name.startswith("adapters."))
        return {name.replace(".", "/"): name for name in names}  # modules are not named with dots

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {part.replace("/", "."): value for part, value in matrices.items()}

    @classmethod
    def places(cls, update: Any) -> dict[str, str]:
        return {part: "." + part.replace("/", ".") for part in update.parts()}

    def own_forward(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base class's own forward; it may run all that it holds (`nn.Sequential`), so it does not see adapters."""
        adapters = self._modules.pop("adapters")
        try:
            return super().own_forward(values, *args, **kwargs)
        finally:
            self._modules["adapters"] = adapters


def _expect_rows(layer: AdaptedLayer, how: str, values: Sequence[object]) -> None:
    if not values or not all(isinstance(value, Tensor) and value.ndim for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
        raise AdapterError(
            f"a {type(layer).__name__} {how} {kinds} cannot be mixed by rows: expected tensors (rows, …); "
            "run them apart"
        )


def _turned(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Its own inverse."""
    return matrix.transpose(1, 2) if matrix.ndim == 3 and getattr(layer, "is_transposed", False) else matrix
