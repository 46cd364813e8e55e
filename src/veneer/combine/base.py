"""The weights of a base model, for changes that depend on them."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from veneer.combine.stored import weights_of
from veneer.core.errors import AdapterError, shown
from veneer.core.kinds import kind_of
from veneer.core.kinds.layer import is_plain

Source = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


class Base:
    """A base model: a module, tensors by their names, `{part: module}` of a pipeline, or a folder or file of one."""

    def __init__(self, source: Source) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._values: Mapping[str, Tensor] = {}
        if isinstance(source, nn.Module):
            self._modules = dict(source.named_modules())
        elif isinstance(source, Mapping) and any(isinstance(part, nn.Module) for part in source.values()):
            for name, part in source.items():
                self._modules |= {f"{name}.{path}".rstrip("."): module for path, module in part.named_modules()}
        else:
            self._values = source if isinstance(source, Mapping) else weights_of(source)
        self._turned: bool | None = None

    def value(self, path: str) -> Tensor | None:
        """The parameter of that name, or None."""
        if not self._modules:
            return self._values.get(path)
        owner, _, name = path.rpartition(".")
        return self._modules[owner]._parameters.get(name) if owner in self._modules else None

    def row(self, path: str, columns: int) -> tuple[int, ...]:
        """The shape of a row of the layer's weight in files: `(in, *kernel)` of a convolution."""
        weight = self.value(f"{path}.weight")
        known = weight is not None and weight.ndim > 2 and weight[0].numel() == columns
        return tuple(weight.shape[1:]) if weight is not None and known else (columns,)

    def matrix(self, path: str, shape: tuple[int, int] | None, is_table: bool) -> Tensor:
        """The layer's weight `(out, in · kernel)`, as its kind sees it. Raises `AdapterError`."""
        module = self._modules.get(path)
        kind = None if module is None else kind_of(module)
        if module is not None and kind is not None:
            matrices = kind.matrices(module)
            if set(matrices) != {""} or not is_plain(matrices[""]):
                raise AdapterError(f"{path}: its weight is quantised, or not one matrix")
            return matrices[""].detach()
        if (weight := self.value(f"{path}.weight")) is None:
            raise AdapterError(f"{path}: the base has no {shown(f'{path}.weight')}")
        weight = weight.detach()
        matrix = weight[:, None] if weight.ndim == 1 else weight.flatten(1)
        turned = matrix.t()
        if is_table or (shape is not None and tuple(matrix.shape) != shape == tuple(turned.shape)):
            matrix = turned  # a table, or a layer that holds its weight transposed (GPT-2's)
        if shape is not None and tuple(matrix.shape) != shape:
            raise AdapterError(f"{path}: the base's weight is {tuple(matrix.shape)}, and the change {shape}")
        return matrix
