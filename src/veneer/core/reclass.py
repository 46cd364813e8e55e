"""An object keeps its place and its name and gets another class: nothing is wrapped, nothing is moved.

`reclass(layer, Mixin)` makes the object an instance of (Mixin, its own class); `restore` gives its class back.
PyTorch's `fully_shard` works like this.
"""

from typing import Any

from torch import nn

from veneer.core.errors import AdapterError


class Reclassed(nn.Module):
    """What a mixin inherits to be used with `reclass`: copies and pickles are rebuilt from the base class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = super().__reduce_ex__(max(protocol, 2))
        assert isinstance(parts, tuple)
        return (_rebuild, _PARTS[type(self)], *parts[2:])


# Kept here and not on the classes: a model may well have a submodule called `base`.
_JOINED: dict[tuple[type[Reclassed], type[nn.Module]], type[Reclassed]] = {}
_PARTS: dict[type, tuple[type[Reclassed], type[nn.Module]]] = {}


def _joined(mixin: type[Reclassed], base: type[nn.Module]) -> type[Reclassed]:
    if (mixin, base) not in _JOINED:
        body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        metaclass: Any = type(base)
        joined = metaclass(base.__name__, (mixin, base), body)
        _JOINED[mixin, base], _PARTS[joined] = joined, (mixin, base)
    return _JOINED[mixin, base]


def _rebuild(mixin: type[Reclassed], base: type[nn.Module]) -> nn.Module:
    joined = _joined(mixin, base)
    return joined.__new__(joined)


def reclass(module: nn.Module, mixin: type[Reclassed]) -> None:
    """Put `mixin` in front of the module's own class. Its place, parameters and state-dict keys stay."""
    object.__setattr__(module, "__class__", _joined(mixin, type(module)))  # past what `nn.Module` looks for


def is_fixed(module: nn.Module) -> bool:
    """Whether Python cannot change the object's class, as it cannot where a base class comes before `nn.Module` and
    has a layout of its own (`abc.ABC`).
    """
    base = type(module)
    try:
        object.__setattr__(base.__new__(base), "__class__", _joined(Reclassed, base))
    except TypeError:
        return True
    return False


def restore(module: Reclassed) -> None:
    """Give the module its own class back."""
    refuse_changed(module)
    module.__class__ = base_of(module)  # type: ignore[assignment]


def refuse_changed(module: Reclassed) -> None:
    """Raise `AdapterError` for a module whose class something else changed again, as `fully_shard` does."""
    if type(module) not in _PARTS:
        raise AdapterError(f"something else changed the class of this {type(module).__name__} since: undo that first")


def mixin_of(module: Reclassed) -> type[Reclassed]:
    """The mixin that the module was given."""
    return _parts(module)[0]


def base_of(module: Reclassed) -> type[nn.Module]:
    """The class that the module was made with."""
    return _parts(module)[1]


def _parts(module: Reclassed) -> tuple[type[Reclassed], type[nn.Module]]:
    # something else may have changed the class again since
    return next(_PARTS[cls] for cls in type(module).__mro__ if cls in _PARTS)
