"""How much memory a run will take, from one real forward of one row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.train.settings import TrainSettings
from veneer.train.task import Task

ADAM = 4  # fp32 numbers a trained parameter: itself, its gradient, two averages


@dataclass
class Estimate:
    """Bytes, by what takes them."""

    base: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; the interpreter and its libraries, some 0.5 GB, are not counted."""
        return self.base + self.adapter + self.activations


def estimate(task: Task, settings: TrainSettings, longest: int) -> Estimate:
    """What a step of full batches of the longest rows will hold at once.

    The activations that autograd keeps are counted in a forward of the longest row, by its number.
    """
    parameters = list(task.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    base = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    (batch,) = task.batches([longest])
    task.model.train()
    return Estimate(base, trained * 4 * ADAM, _kept_bytes(task, batch) * settings.batch_size)


def _kept_bytes(task: Task, batch: object) -> int:
    """The bytes that a forward keeps for its backward, each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in task.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(batch)  # type: ignore[arg-type]
    del loss
    return sum(kept.values())
