"""`AdaptedLayer`: what every layer kind shares. A kind says how a layer is seen as a matrix and applies changes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError
from veneer.core.joint import Joint, joined, parted
from veneer.core.plan import Plan, Term
from veneer.core.reclass import Reclassed, base_of
from veneer.core.update import Update, own_precision, summed


def is_plain(weight: Tensor) -> bool:
    """Whether its values can be read as they stand: floats, of two bytes at least, in an ordinary tensor.

    Of a quantised weight, or one that is spread over processes, only the layer knows what it stands for.
    """
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _never_called(module: nn.Module, inputs: object) -> None:
    """Adapters are a container: nobody calls them."""


class Adapters(nn.ModuleDict):
    """The one child that an adapted layer has more than its base: an `Update` for each adapter name."""

    plan: Plan
    key: str
    original: dict[str, Tensor] | None = None  # the layer's own parameters, while adapters are merged
    joint: Joint | None = None  # the memory that the factors of several adapters share, once rows were mixed

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        plan.layers += 1
        vars(self).update(plan=plan, key=str(plan.layers))
        # nn.TransformerEncoderLayer reads its linear layers' weights itself, unless a module inside has a hook; entered
        # under no handle's number, as making a handle takes longer than all the rest
        self._forward_pre_hooks[-1] = _never_called

    def __setitem__(self, name: str, update: nn.Module) -> None:
        self._modules[name] = update  # `_refuse_name` asked all that `add_module` would
        self.plan.updates[name][self.key] = update

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.plan.updates[name][self.key]

    def __getstate__(self) -> dict[str, Any]:
        self.part()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, update in self.items():
            self.plan.updates[name][self.key] = update

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapters":
        self.part()
        super()._apply(fn, recurse)
        if self.original is not None:  # what comes back goes wherever the layer went
            self.original = {name: fn(tensor) for name, tensor in self.original.items()}
        return self

    def acting(self, terms: tuple[Term, ...] | None = None) -> Iterator[tuple[Update, float]]:
        """The updates that act on this layer, with their weights: those of `terms`, or of the plan."""
        for term, own in self.plan.now() if terms is None else self.plan.found(terms):
            if self.key in own:
                if term.rows is not None:
                    raise AdapterError("a layer that runs on changed weights cannot be mixed by rows: run them apart")
                yield own[self.key], term.weight

    def by_row(self) -> tuple[Term, ...]:
        """In a mixed batch, the terms that act on this layer."""
        return tuple(term for term in self.plan.terms if term.rows is not None and term.adapter in self._modules)

    def _save_to_state_dict(self, *into: Any) -> None:
        self.part()
        super()._save_to_state_dict(*into)

    def train(self, mode: bool = True) -> "Adapters":
        if mode:
            self.part()
        return super().train(mode)

    def part(self) -> None:
        """Give the parameters memory of their own, where they shared one."""
        if self.joint is not None:
            parted(self)
            self.joint = None

    def alone(self, training: bool) -> tuple[Tensor, Tensor, float] | None:
        """A, B and weight · scale, where one such product on every row is all that acts."""
        acting = self.plan.acting
        if len(acting) != 1 or acting[0][0].rows is not None:
            return None
        term, own = acting[0]
        update: Any = own.get(self.key)
        if update is None or not update.simple or (training and update.dropout):
            return None
        return update._parameters["A"], update._parameters["B"], term.weight * update.scale

    def jointly(self, x: Tensor, training: bool) -> Tensor | None:
        """Σ weight · ΔW x of all that acts on x `(rows, …, in)` in a mixed batch, if it can be had at once."""
        plan, modules = self.plan, self._modules
        if not plan.terms or plan.terms[0].rows is None:
            return None
        names = tuple(filter(modules.__contains__, plan.names))
        if len(names) < 2 or (training and any(modules[name].dropout for name in names)):
            return None
        self.joint = joined(self.joint, self, names)
        return None if self.joint is None else self.joint.change(x, names, plan.groups(names, x))

    def acting_on(self, x: Tensor) -> Iterator[tuple[Update, float, Tensor | None]]:
        """The same for an input or output x `(rows, …)`, and in a mixed batch the weight `(rows)` of each row."""
        for term, own in self.plan.now():
            if self.key in own:
                rows = None if term.rows is None else self.plan.row_weights(term, x)
                yield own[self.key], term.weight, rows


class AdaptedLayer(Reclassed):
    """A layer that carries adapters and is still the layer: same place, same parameters, same keys."""

    adapters: Adapters
    weight: Tensor
    bias: Tensor | None
    linear: ClassVar[bool] = False  # belongs to "all-linear"
    norm: ClassVar[bool] = False  # belongs to "norm"
    drops: ClassVar[bool] = True  # its change has an input of its own, which dropout can drop
    biased: ClassVar[bool] = False  # y = W x + b, where b, called `bias`, may be None and may change

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        """Whether this kind can adapt `layer`."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, layer: nn.Module, config: LoraConfig) -> str | None:
        """Why this one layer cannot be adapted so though its kind can, as the end of a sentence."""
        if config.lora_dropout and not cls.drops:
            return f"whose change has no input that lora_dropout={config.lora_dropout} could drop: set it to 0"
        if config.method.share and not cls.linear:
            return f"and {config.peft_type} adapts linear layers alone: its projections are shared among these"
        if config.method.shifts(config) and not cls.biased:
            return "and this adapter changes biases too, which it does for linear layers and convolutions alone"
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and not is_plain(weight):
            return cls.quantised(layer, config)
        return None

    @classmethod
    def quantised(cls, layer: nn.Module, config: LoraConfig) -> str | None:
        """Why a layer with a quantised weight cannot be adapted so, as the end of a sentence."""
        return f"whose weight is quantised ({layer.weight.dtype}), which is adapted in linear layers alone"

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The layer's weight seen as `(out, in)`, without a copy."""
        raise NotImplementedError

    @classmethod
    def matrices(cls, layer: nn.Module) -> dict[str, Tensor]:
        """What of the layer changes, by part; most layers are one matrix `(out, in)`, called ""."""
        return {"": cls.matrix(layer.weight)}  # type: ignore[arg-type]

    @classmethod
    def values(cls, layer: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `matrices`: the layer's parameters by name, for other matrices, of all parts or some."""
        return {"weight": cls.matrix(matrices[""])} if matrices else {}

    @classmethod
    def places(cls, update: Update) -> dict[str, str]:
        """Where each part stands in a PEFT file: part → what follows the layer's path there."""
        return {"": ""}

    @classmethod
    def filed(cls, layer: nn.Module, form: str, tensor: Tensor) -> Tensor:
        """A method's parameter of that form (`Update.forms`) in the shape that PEFT's files give it on this kind."""
        return tensor

    @classmethod
    def unfiled(cls, form: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `filed`."""
        return tensor.reshape(shape)

    @classmethod
    def start(cls, update: Update, how: bool | str) -> None:
        """Starting values that this kind wants in the place of the method's own."""

    def changed(self, terms: tuple[Term, ...] | None = None) -> dict[str, Tensor]:
        """W + Σ weight · ΔW, and b + Σ weight · Δb, by parameter name, over `terms` or those of the plan.

        Summed in fp32 (fp64 for an fp64 base), rounded once to the base's dtype.
        """
        originals = self.matrices(self)
        acting: dict[str, list[tuple[Update, float]]] = {}
        for update, weight in self.adapters.acting(terms):
            for part, own in update.parts().items():
                acting.setdefault(part, []).append((own, weight))
        values = self.values(self, {part: summed(originals[part], changes) for part, changes in acting.items()})
        return {**values, **self.shifted(terms)}

    def shifted(self, terms: tuple[Term, ...] | None = None) -> dict[str, Tensor]:
        """b + Σ weight · Δb, likewise, where a change has one; a layer that has no b gets one."""
        shifts = []
        if self.biased:
            own = ((weight, update.bias_change(self.bias)) for update, weight in self.adapters.acting(terms))
            shifts = [weight * shift for weight, shift in own if shift is not None]
        if not shifts:
            return {}
        bias = self.weight.new_zeros(len(shifts[0])) if self.bias is None else self.bias
        return {"bias": sum(shifts, bias.to(own_precision(bias))).to(bias.dtype)}

    def changing(self, terms: tuple[Term, ...]) -> list[str]:
        """The names of the parameters that `changed` would give."""
        parts = {part for update, _ in self.adapters.acting(terms) for part in update.parts()}
        values = self.values(self, {part: m for part, m in self.matrices(self).items() if part in parts})
        return [*values, *self.shifted(terms)]

    def own_forward(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The base class's own forward, with these parameters in the place of the layer's."""
        homes: dict[str, tuple[dict[str, Any], str]] = {}
        for name in values:
            path, _, last = name.rpartition(".")
            owner = self.get_submodule(path)
            homes[name] = (owner._parameters if last in owner._parameters else vars(owner), last)
        own = {name: home[last] for name, (home, last) in homes.items()}
        try:
            for name, (home, last) in homes.items():
                home[last] = values[name]
            return base_of(self).forward(self, *args, **kwargs)
        finally:
            for name, (home, last) in homes.items():
                home[last] = own[name]
