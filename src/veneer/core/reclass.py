"""An object keeps its place and its name and gets another class: nothing is wrapped, nothing is moved.

`reclass(layer, Mixin)` makes the object an instance of (Mixin, its own class); `restore` gives its class back.
PyTorch's `fully_shard` works like this.
"""

from typing import Any, ClassVar

from torch import nn


class Reclassed(nn.Module):
    """What a mixin inherits to be used with `reclass`: copies and pickles are rebuilt from the base class."""

    mixin: ClassVar[type["Reclassed"]]
    base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = super().__reduce_ex__(max(protocol, 2))
        assert isinstance(parts, tuple)
        return (_rebuild, (self.mixin, self.base), *parts[2:])


_JOINED: dict[tuple[type[Reclassed], type[nn.Module]], type[Reclassed]] = {}


def _joined(mixin: type[Reclassed], base: type[nn.Module]) -> type[Reclassed]:
    if (mixin, base) not in _JOINED:
        body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        metaclass: Any = type(base)
        joined = metaclass(base.__name__, (mixin, base), {**body, "mixin": mixin, "base": base})
        _JOINED[mixin, base] = joined
    return _JOINED[mixin, base]


def _rebuild(mixin: type[Reclassed], base: type[nn.Module]) -> nn.Module:
    joined = _joined(mixin, base)
    return joined.__new__(joined)


def reclass(module: nn.Module, mixin: type[Reclassed]) -> None:
    """Put `mixin` in front of the module's own class. Its place, parameters and state-dict keys stay."""
    module.__class__ = _joined(mixin, type(module))


def restore(module: Reclassed) -> None:
    """Give the module its own class back."""
    module.__class__ = module.base  # type: ignore[assignment]
