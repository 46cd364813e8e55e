"""`Update`: the change that one adapter makes to one layer. A method is a subclass."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.core.errors import AdapterError
from veneer.core.start import PLAIN

if TYPE_CHECKING:
    from veneer.core.config import LoraConfig

# PEFT's names in the configs of LoHa and LoKr
LYCORIS_NAMES: dict[str, str | None] = {
    "lora_alpha": "alpha",
    "init_lora_weights": "init_weights",
    **dict.fromkeys(("bias", "fan_in_fan_out", "lora_dropout", "target_parameters", "use_dora", "use_rslora")),
}


class Option(NamedTuple):
    """A number or name that only one method knows: what it is if not said, and what it may be."""

    default: Any
    holds: Callable[[Any], bool]
    expected: str


# (a weight as `(out, in)`, its config, what the kind of layer does to the starting values) → a fresh update
Make = Callable[[Tensor, "LoraConfig", Callable[["Update", bool | str], None]], "Update"]


class Factors(NamedTuple):
    """A low-rank change: ΔW = scale · B A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float


class Rows(NamedTuple):
    """Rescaled rows and a low-rank change: ΔW = gain ⊙ W + scale · B A."""

    gain: Tensor  # (out)
    factors: Factors


class Update(nn.Module, ABC):
    """What a method must say: its parameters (`__init__`) and what it does to a matrix (`delta`).

    Everything else, merging, exporting, combining, is derived from `delta`; a method whose change is a product
    of two thin matrices may also give its `factors`, and gets the fast forward of its layer's kind.
    """

    file_names: ClassVar[dict[str, str]]  # own parameter name → its name in a PEFT file
    peft_names: ClassVar[dict[str, str | None]] = {}  # config field → its name in PEFT's config, None where it has none
    options: ClassVar[dict[str, Option]] = {}
    starts: ClassVar[tuple[bool | str, ...]] = PLAIN  # what init_lora_weights may be
    share: ClassVar[Callable[..., nn.Module] | None] = None  # makes what the updates of an adapter have in common
    reads_weight: ClassVar[bool] = True  # whether ΔW depends on more of W than its size
    faster: ClassVar[tuple[str, ...]] = ()  # the parameters that LoRA+ gives a larger rate
    simple: bool = False  # whether `factors` are its parameters A and B with `scale`, as they are
    dropout: float = 0.0  # probability that an input of the change is dropped in training

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """ΔW for the base's `weight`, both `(out, in)`, in the precision of the method's parameters."""

    def forward(self, weight: Tensor) -> Tensor:
        """`delta` in that precision under autocast too: a change of weights is no activation."""
        with torch.autocast(weight.device.type, enabled=False):
            return self.delta(weight)

    def added(self, total: Tensor, weight: Tensor, share: float) -> Tensor:
        """total + share · ΔW, in the precision of `total`."""
        if (factors := self.factors()) is None:
            return total + share * self(weight)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(total, factors.B.to(total.dtype), factors.A.to(total.dtype), alpha=share * factors.scale)

    def factors(self) -> Factors | None:
        """The same change as two thin matrices, where it is one."""
        return None

    def parts(self) -> dict[str, "Update"]:
        """The updates of the layer's matrices, by part; most layers are one matrix, called ""."""
        return {"": self}

    def by_rows(self, weight: Tensor) -> Rows | None:
        """The same change as rescaled rows of `weight` and two thin matrices, where it is one."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by the names in `file_names`; the live tensors, not copies."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def shared_tensors(self) -> dict[str, Tensor]:
        """What a file holds once for all layers of the adapter."""
        return {}

    def materialise(self, device: torch.device) -> None:
        """Memory on `device` for what was built on "meta", to be filled from a file."""
        self.to_empty(device=device)

    @classmethod
    def saved_config(cls, config: "LoraConfig") -> "LoraConfig":
        """The config under which `tensors` are read back."""
        return config


class Parts(nn.ModuleDict):
    """The updates that one adapter has on a layer of several matrices, by part."""

    dropout = 0.0

    def parts(self) -> dict[str, Update]:
        return dict(self.items())  # type: ignore[arg-type]


class Stack(Update):
    """ΔW[i] = the change of any method for W[i], of a stack of matrices `(number, out, in)`.

    Its parameters are the method's, each with a first dimension more.
    """

    def __init__(self, build: Callable[[Tensor, Any], Update], weight: Tensor, config: Any) -> None:
        super().__init__()
        each = [build(matrix, config) for matrix in weight]
        if [*each[0].children(), *each[0].buffers()]:
            raise AdapterError(
                f"a stack of matrices {tuple(weight.shape)} is adapted by trained factors alone: "
                "without use_dora, and without a start from the weight"
            )
        self.file_names, self.faster = each[0].file_names, each[0].faster  # type: ignore[misc]
        self.dropout = each[0].dropout
        for name, first in each[0].named_parameters():
            stacked = torch.stack([update.get_parameter(name) for update in each])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=first.requires_grad))
        self._one = [each[0].to("meta")]  # in a list, so that it is no part of the module: only its code is used

    def delta(self, weight: Tensor) -> Tensor:
        def one(values: dict[str, Tensor], matrix: Tensor) -> Tensor:
            return functional_call(self._one[0], values, (matrix,))

        return torch.vmap(one)(dict(self.named_parameters()), weight)


def own_precision(weight: Tensor) -> torch.dtype:
    """That of a method's parameters: fp32, or fp64 for an fp64 base."""
    return torch.promote_types(weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
