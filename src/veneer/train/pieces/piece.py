"""`Piece`: a module that another forward was found for, and how one is held to the module's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.reclass import Reclassed, base_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest entry of a row
ROWS = 13  # of the inputs to compare on: of size 1e-3 to 1e3


class Piece(Reclassed):
    """The module with a quick forward. A copy or a pickle is of its own class: nobody would restore it."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = object.__reduce_ex__(self, max(protocol, 2))
        assert isinstance(parts, tuple)
        return (_plain, (base_of(self),), *parts[2:])

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return base_of(self).forward(self, *args, **kwargs)


def _plain(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


class StandIn:
    """The module as its own forward sees it, with other values for some of its attributes."""

    def __init__(self, module: nn.Module, **others: Any) -> None:
        vars(self).update(others)
        vars(self)["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


def samples(*shape: int, dtype: torch.dtype, number: int) -> list[Tensor]:
    """Random tensors `(*shape)`, the same in every call; their first dimension, `ROWS`, goes from tiny to huge."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 3, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
    return [torch.randn(shape, generator=generator, dtype=dtype) * sizes for _ in range(number)]


def agrees(own: Callable[..., Any], quick: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    """Whether both give the same outputs and gradients to rounding. What `own` cannot take, it is not agreed on."""
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            expected, found = _results(own, inputs), _results(quick, inputs)
    except Exception:  # the module's own forward is not what it was taken for, and may raise anything
        return False
    return len(expected) == len(found) and all(map(_same, expected, found))


def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, directions)]


def _same(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    size = expected.abs().amax(-1)
    return bool(((expected - found).abs().amax(-1) <= TOLERANCE[expected.dtype] * size).all())


def kept_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """What the function keeps for its backward, each memory once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x.detach().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
