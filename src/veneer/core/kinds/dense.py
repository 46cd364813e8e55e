"""The fallback for everything: a layer's own forward, run with W + ΔW in the place of its parameters."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.kinds.rows import forward_by_row
from veneer.core.update import Make, Parts, Stack, Update


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


class AdaptedParts(AdaptedDense):
    """A layer of several matrices, each with an update of its own."""

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        """The parameters that change: part → name."""
        raise NotImplementedError

    @classmethod
    def matrices(cls, layer: nn.Module) -> dict[str, Tensor]:
        return {part: _as_matrix(attrgetter(name)(layer)) for part, name in cls.names(layer).items()}

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {part: name for part, name in cls.names(layer).items() if part in matrices}
        return {name: matrices[part].reshape(attrgetter(name)(layer).shape) for part, name in names.items()}

    @classmethod
    def build(cls, make: Make, layer: nn.Module, configs: Mapping[str, LoraConfig]) -> Any:
        updates = Parts()
        for part, matrix in cls.matrices(layer).items():
            config = configs.get(part, configs.get(""))
            if config is not None:
                if hasattr(updates, part):
                    raise AdapterError(f"a parameter named {part!r} cannot be adapted: the name is taken")
                updates[part] = cls.part(make, matrix, config)
        return updates

    @classmethod
    def part(cls, make: Make, matrix: Tensor, config: LoraConfig) -> Update:
        """The update of one of them."""

        def one(weight: Tensor, config: LoraConfig) -> Update:
            return make(weight, config, cls.start)

        return one(matrix, config) if matrix.ndim == 2 else Stack(one, matrix, config)


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
        return {part: _turned(layer, matrix) for part, matrix in super().matrices(layer).items()}

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


def _as_matrix(parameter: Tensor) -> Tensor:
    return parameter.unsqueeze(1) if parameter.ndim == 1 else parameter


def _turned(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Its own inverse."""
    return matrix.transpose(1, 2) if matrix.ndim == 3 and getattr(layer, "is_transposed", False) else matrix
