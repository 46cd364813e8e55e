"""`Update`: the change that one adapter makes to one layer. A method is a subclass."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from veneer.core.errors import AdapterError
from veneer.core.start import PLAIN

if TYPE_CHECKING:
    from veneer.core.config import LoraConfig
    from veneer.core.search import Search

# `peft_names` of its methods
LYCORIS_NAMES: dict[str, str | None] = {"lora_alpha": "alpha", "init_lora_weights": "init_weights"}
_BLOCK = 2**18  # entries of a weight that are summed at once


class Option(NamedTuple):
    """A number or name that only one method knows: what it is if not said, and what it may be."""

    default: Any
    holds: Callable[[Any], bool]
    expected: str


def switch(default: bool) -> Option:
    """An option that is on or off."""
    return Option(default, lambda value: isinstance(value, bool), "true or false")


class Factors(NamedTuple):
    """A low-rank change: ΔW = scale · B A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float


class Few(NamedTuple):
    """A change of a few tokens: what is added to their rows of a table, or of a head's weight."""

    ids: Tensor  # (number)
    values: Tensor  # (number, width)

    def at(self, x: Tensor) -> Tensor:
        """What is added for tokens x `(…)`, few of which may be among them: `(…, width)`."""
        ids, order = self.ids.sort()
        place = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        found = F.embedding(order[place], self.values)
        return torch.where((ids[place] == x).unsqueeze(-1), found, found.new_zeros(()))


class Update(nn.Module):
    """What a method must say: its parameters (`__init__`) and what it does to a matrix (`delta`).

    Everything else, merging, exporting, combining, is derived from `delta`. A method whose change is a product of two
    thin matrices says these (`factors`), and gets the fast forward of its layer's kind.
    """

    file_names: ClassVar[dict[str, str]]  # own parameter name → its name in a PEFT file
    # own parameter name → "A" `(r, in)`, "B" `(out, r)` or "l", one for each row or column: in PEFT's files these have
    # other shapes where a layer's weight is no matrix
    forms: ClassVar[dict[str, str]] = {}
    peft_names: ClassVar[dict[str, str | None]] = {}  # config field → its name in PEFT's config, None where it has none
    options: ClassVar[dict[str, Option]] = {}
    naming: ClassVar[tuple[str, ...]] = ()  # the options that name layers: in one layer's config, whether it is one
    starts: ClassVar[tuple[bool | str, ...]] = PLAIN  # what init_lora_weights may be
    share: ClassVar[Callable[..., nn.Module] | None] = None  # makes what the updates of an adapter have in common
    reads_weight: ClassVar[bool] = True  # whether ΔW depends on more of W than its size
    faster: ClassVar[tuple[str, ...]] = ()  # the parameters that LoRA+ gives a larger rate
    simple: bool = False  # whether all that it does is `scale` · B A, of its parameters as they are
    turned: bool | None = None  # of another layer's change, whose weight this layer shares: whether it is transposed
    dropout: float = 0.0  # probability that an input of the change is dropped in training
    scale: float = 1.0  # what a product of its parameters is multiplied by

    @classmethod
    def placed(cls, config: "LoraConfig", search: "Search", paths: list[str]) -> dict[str, dict[str, Any]]:
        """The fields of `config` that layers have for themselves, by path; what is wrong is told to the search."""
        return {}

    @classmethod
    def sides(cls, tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """The size `(out, in)` of ΔW, where a file's tensors say it."""
        named = {form: flat(tensors[name]) for name, form in cls.forms.items() if name in tensors}
        return (named["B"][0], named["A"][1]) if {"A", "B"} <= named.keys() else None

    def fit(self, tensors: Mapping[str, Tensor], biased: bool) -> None:
        """Before it is filled: take the form that a file's tensors have, where the method has several; `biased` is
        whether the layer's bias can change.
        """

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW for the base's `weight`, both `(out, in)`, in the precision of the method's parameters."""
        factors = self.factors()
        assert factors is not None, "a method says `delta`, or `factors`, or both"
        return factors.scale * (factors.B @ factors.A)

    def forward(self, weight: Tensor) -> Tensor:
        """`delta` in that precision under autocast too: a change of weights is no activation."""
        with torch.autocast(weight.device.type, enabled=False):
            return self.delta(weight)

    def onto(self, weight: Tensor) -> Tensor:
        """W + ΔW, in that precision; a method may know it without the sum."""
        return self.added(weight.to(own_precision(weight)), weight, 1)

    def added(self, total: Tensor, weight: Tensor, share: float) -> Tensor:
        """total + share · ΔW, in the precision of `total`."""
        if (factors := self.factors()) is None:
            return total + share * self(weight)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(total, factors.B.to(total.dtype), factors.A.to(total.dtype), alpha=share * factors.scale)

    def factors(self) -> Factors | None:
        """The same change as two thin matrices, where it is one."""
        return None

    def few(self, weight: Tensor) -> Few | None:
        """The same change as that of a few tokens, where it is one: columns of a table's matrix, rows of a head's."""
        return None

    @classmethod
    def shifts(cls, config: "LoraConfig") -> bool:
        """Whether such updates change the layer's bias too; only kinds that are `biased` take them."""
        return False

    def shift(self, bias: Tensor | None) -> Tensor | None:
        """Δb `(out)` for the layer's `bias`, or None where it stays as it is."""
        return None

    @property
    def own_bias(self) -> nn.Parameter | None:
        """b′, where the adapter trains the layer's bias beside its method."""
        return self._parameters.get("bias")

    @own_bias.setter
    def own_bias(self, bias: Tensor) -> None:
        self.register_parameter("bias", nn.Parameter(bias))
        self.simple = False

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        """Δb `(out)` in all: the method's shift, and b′ - b."""
        shift, own = self.shift(bias), self.own_bias
        if own is None or bias is None:
            return shift
        return own - bias if shift is None else own - bias + shift

    def parts(self) -> dict[str, "Update"]:
        """The updates of the layer's matrices, by part; most layers are one matrix, called ""."""
        return {"": self}

    def by_rows(self, weight: Tensor) -> tuple[Tensor, Factors | None] | None:
        """The same change as g `(out)` and perhaps factors, with ΔW = g ⊙ W + scale · B A, where it is one."""
        return None

    def by_columns(self) -> Tensor | None:
        """The same change as c `(in)` with ΔW = W ⊙ c, where all that it does is to rescale the inputs."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by the names in `file_names`; the live tensors, not copies."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if name != "bias"}

    def shared_tensors(self) -> dict[str, Tensor]:
        """What a file holds once for all layers of the adapter."""
        return {}

    def materialise(self, device: torch.device) -> None:
        """Memory on `device` for what was built on "meta", to be filled from a file."""
        for inner in self.children():
            if isinstance(inner, Update):
                inner.materialise(device)
        self._apply(lambda own: torch.empty_like(own, device=device) if own.is_meta else own, recurse=False)

    @classmethod
    def saved_config(cls, config: "LoraConfig") -> "LoraConfig":
        """The config under which `tensors` are read back."""
        return config


class Parts(nn.ModuleDict):
    """The updates that one adapter has on a layer of several matrices, by part."""

    def __init__(self, parts: Mapping[str, Update]) -> None:
        """Raises `AdapterError` for a name that a module has already."""
        super().__init__()
        for part, update in parts.items():
            if hasattr(self, part):
                raise AdapterError(f"a parameter named {part!r} cannot be adapted: the name is taken")
            self[part] = update

    def parts(self) -> dict[str, Update]:
        return dict(self.items())  # type: ignore[arg-type]


class Stack(Update):
    """ΔW[i] = the change of any method for W[i], of a stack of matrices `(number, out, in)`.

    Its parameters are the method's, each with a first dimension more.
    """

    def __init__(self, build: Callable[[Tensor], Update], weight: Tensor) -> None:
        super().__init__()
        each = [build(matrix) for matrix in weight]
        filed = each[0].tensors().keys()
        if [*each[0].children(), *each[0].buffers()] or filed != each[0]._parameters.keys():
            raise AdapterError(
                f"a stack of matrices {tuple(weight.shape)} is adapted by trained factors alone: "
                "without use_dora, and without a start from the weight"
            )
        self.forms, self.faster = each[0].forms, each[0].faster  # type: ignore[misc]
        self.dropout, self.scale = each[0].dropout, each[0].scale
        for name, first in each[0].named_parameters():
            stacked = torch.stack([update.get_parameter(name) for update in each])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=first.requires_grad))
        self._one = [each[0].to("meta")]  # in a list, so that it is no part of the module: only its code is used

    def delta(self, weight: Tensor) -> Tensor:
        def one(values: dict[str, Tensor], matrix: Tensor) -> Tensor:
            return functional_call(self._one[0], values, (matrix,))

        return torch.vmap(one)(dict(self.named_parameters()), weight)


def summed(weight: Tensor, changes: Sequence[tuple[Any, float]]) -> Tensor:
    """W + Σ share · ΔW, summed in fp32 at least and rounded once to W's dtype."""
    turns = {update.turned for update, _ in changes}
    if turns in ({False}, {True}):  # by the other layer's sums, so that both have the same bits
        others = [(update.of, share) for update, share in changes]
        return summed(weight.t(), others).t() if True in turns else summed(weight, others)
    if turns == {None} and not torch.is_grad_enabled() and weight.ndim == 2:
        thin = [(factors, share) for update, share in changes if (factors := update.factors())]
        if len(thin) == len(changes):
            return _summed_thin(weight, thin)
    if len(changes) == 1 and changes[0][1] == 1:
        return changes[0][0].onto(weight).to(weight.dtype)
    total = weight.to(own_precision(weight))
    for update, share in changes:
        total = update.added(total, weight, share)
    return total.to(weight.dtype)


def _summed_thin(weight: Tensor, changes: Sequence[tuple[Factors, float]]) -> Tensor:
    """The same, some rows at a time: what lies between stays in the processor's cache."""
    result = torch.empty_like(weight)
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            total = weight[rows].to(own_precision(weight), copy=True)
            for (A, B, scale), share in changes:
                total.addmm_(B[rows].to(total.dtype), A.to(total.dtype), alpha=share * scale)
            result[rows] = total
    return result


def flat(tensor: Tensor) -> tuple[int, int]:
    """The shape of what a file holds as a matrix: a kernel's dimensions but the first one are its columns."""
    return tensor.shape[:1].numel(), tensor.shape[1:].numel()


def own_precision(weight: Tensor) -> torch.dtype:
    """That of a method's parameters: fp32, or fp64 for an fp64 base."""
    return torch.promote_types(weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
