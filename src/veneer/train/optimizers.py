"""AdamW on what trains: matrices decay as said, biases and scales do not; its steps, with the loss scaled for fp16.

Parts of a model may learn at rates of their own; and LoRA+: B learns faster than A.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.inject import adapted_layers
from veneer.core.update import Update
from veneer.train.processes import World

if TYPE_CHECKING:  # LoRA+ needs none of what reads recipes
    from veneer.train.settings import TrainSettings

UNTRAINED = "no adapter got a gradient: the adapted layers were never called"


def optimizer(
    model: nn.Module, settings: "TrainSettings", rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over the parameters that require gradients.

    `rates` are the highest learning rates of modules that have their own, by path; of modules inside each other the
    innermost's counts. Each group says in `share` its rate as a share of `lr`, whatever step it is. Raises
    `AdapterError` for modules that train nothing.
    """
    shares = {path: rate / settings.lr for path, rate in (rates or {}).items()}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if idle := [path for path in shares if not any(_within(name, path) for name, _ in named)]:
        raise AdapterError(f"{listed(idle)} should have a learning rate of its own, and nothing of it is trained")
    ratio = settings.loraplus_ratio or 1.0
    fast = _faster(model) if settings.loraplus_ratio else set()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        within = [path for path in shares if _within(name, path)]
        share = shares[max(within, key=len)] if within else 1.0
        share *= ratio if id(parameter) in fast else 1.0
        groups.setdefault((share, parameter.ndim >= 2), []).append(parameter)
    every = [
        {"params": own, "share": share, "lr": share * settings.lr, "weight_decay": settings.weight_decay * decays}
        for (share, decays), own in groups.items()
    ]
    return torch.optim.AdamW(every, lr=settings.lr, betas=settings.betas, fused=True)


def _within(name: str, path: str) -> bool:
    """Whether a parameter is one of the module at `path`."""
    return name.startswith(f"{path}.")


class Stepper:
    """AdamW's steps. Over a base in float16 the loss is multiplied by a scale, and the gradients divided by it, so that
    small gradients do not vanish on their way through the base (Micikevicius et al. 2018, arXiv:1710.03740).

    A step whose gradients overflow is skipped and the scale halved; after 2000 good ones it is doubled.
    """

    def __init__(self, model: nn.Module, settings: "TrainSettings", rates: Mapping[str, float] | None = None) -> None:
        """`rates`: see `optimizer`."""
        self.model, self.longest = model, settings.max_grad_norm or math.inf
        self.optimizer = optimizer(model, settings, rates)
        half = [p.device.type for p in model.parameters() if p.dtype == torch.float16]
        self.scaler = torch.amp.GradScaler(half[0] if half else "cpu", enabled=bool(half))
        self.skipped = 0  # steps, since the beginning

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss. Raises `AdapterError` where it has none."""
        if not loss.requires_grad:
            raise AdapterError(UNTRAINED)
        self.scaler.scale(loss).backward()

    def add_up(self, world: World, loss: Tensor) -> None:
        """Let gradients and loss be their sums over all processes."""
        if world.size > 1:
            trained = [parameter for _, parameter in self._trained()]
            for parameter in trained:
                if parameter.grad is None:  # no row of this process reached it
                    parameter.grad = torch.zeros_like(parameter)
            world.add_up([*(parameter.grad for parameter in trained if parameter.grad is not None), loss])

    def step(self, lr: float) -> float:
        """Clip the gradients and take the step, at the rate `lr` or each group's share of it; their norm before. Where
        it is not finite, the step is not taken.

        Raises `AdapterError` when no adapter got a gradient.
        """
        trains = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if not trains:
            raise AdapterError(UNTRAINED)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trains, self.longest).item()
        if math.isfinite(norm) or self.scaler.is_enabled():
            for group in self.optimizer.param_groups:
                group["lr"] = group["share"] * lr
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: the adapter's tensors and their averages by name, and plain values."""
        tensors = {f"adapter/{name}": tensor for name, tensor in _carried(self.model)}
        for name, parameter in self._trained():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return copies, {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises `AdapterError`, with nothing changed, where it is that of other parameters."""
        live = {f"adapter/{name}": tensor for name, tensor in _carried(self.model)}
        theirs = {name: tensor for name, tensor in tensors.items() if name.startswith("adapter/")}
        shapes, wanted = ({name: tuple(t.shape) for name, t in each.items()} for each in (theirs, live))
        if wrong := [name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name)]:
            raise AdapterError(f"the checkpoint is that of another adapter, which differs in {collapsed(wrong)}")
        for name, tensor in theirs.items():
            live[name].copy_(tensor)
        for name, parameter in self._trained():
            begin = f"optimizer/{name}/"
            if own := {key.removeprefix(begin): value for key, value in tensors.items() if key.startswith(begin)}:
                self.optimizer.state[parameter] = {k: value.to(parameter.device, copy=True) for k, value in own.items()}
        self.scaler.load_state_dict(dict(plain["scaler"]))
        self.skipped = plain["skipped"]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def lowers(self, norm: float) -> bool:
        """Whether a norm that is not finite is fp16's overflow, which a lower scale mends: counted as skipped."""
        lowers = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() >= 1
        self.skipped += lowers
        return lowers


def _carried(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What a run changes, or draws at its beginning: the adapter's parameters and buffers, and all else that trains."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad or ".adapters." in name]
    return found + [(name, buffer) for name, buffer in model.named_buffers() if ".adapters." in name]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): all that trains, as groups for an optimizer, with the rate
    `ratio · lr` for each B and `lr` for the rest.

    Raises `AdapterError` when no adapter of the model trains a B.
    """
    faster = _faster(model)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trains if id(parameter) not in faster], "lr": lr},
        {"params": [parameter for parameter in trains if id(parameter) in faster], "lr": ratio * lr},
    ]


def _faster(model: nn.Module) -> set[int]:
    """Each B that trains, by its id. Raises `AdapterError` when there is none."""
    faster = {
        id(parameter)
        for _, layer in adapted_layers(model)
        for update in layer.adapters.modules()
        if isinstance(update, Update)
        for name, parameter in update.named_parameters(recurse=False)
        if name in update.faster and parameter.requires_grad
    }
    if not faster:
        raise AdapterError("LoRA+ gives the B of a LoRA a larger rate, and this model trains none")
    return faster
