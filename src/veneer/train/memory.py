"""How much memory a run will take, from real passes of a few rows."""

import os
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from veneer.train.heap import step_heap
from veneer.train.loop import count_steps, rows_of
from veneer.train.pieces import quick_pieces
from veneer.train.record import held_memory, peak_memory
from veneer.train.settings import TrainSettings
from veneer.train.task import Batch, Task

ADAM = 4  # fp32 numbers a trained parameter: itself, its gradient, two averages
STEPS = 64  # how many steps are looked through for the largest pass
# measured on CPUs: what matrix libraries keep of their own, and, as a share of the activations of passes of many sizes,
# what glibc's heap holds freed between them (0.2 to 0.6; next to nothing where layers run again, see heap.py)
KERNELS, SLACK = 100e6, 0.4


@dataclass
class Estimate:
    """Bytes, by what takes them."""

    process: int  # the interpreter, its libraries and the rows; 0 where the model is on a device of its own
    base: int
    adapter: int  # with its gradient and the optimizer's averages
    activations: int  # the most that a pass holds at once beside these
    slack: int  # of matrix libraries and of the memory allocator
    loading: int  # the most that was held until the model stood

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return max(self.loading, self.process + self.base + self.adapter + self.activations + self.slack)


def estimate(task: Task, settings: TrainSettings) -> Estimate:
    """What the largest pass of the first steps holds at once, as passes of about an eighth and a quarter of its rows
    tell: what is live grows with the tokens by a line.
    """
    loading = peak_memory()
    largest, rows = _largest(task, settings)
    eighth = max(1, len(rows) // 8)
    few, more = (max(task.batches(rows[:count]), key=_size) for count in (eighth, 2 * eighth))
    task.model.train()
    with torch.no_grad(), step_heap(keeps=False):
        task.loss(few)  # the weights and kernels that a pass needs are in memory from now on
    device = next(task.model.parameters()).device
    tensors = list(chain(task.model.parameters(), task.model.buffers()))
    base = sum(bytes_of(tensor) for tensor in tensors if not tensor.requires_grad)
    trained = sum(bytes_of(tensor) for tensor in tensors if tensor.requires_grad)
    process = max(0, held_memory() - base - trained) if device.type == "cpu" else 0
    with quick_pieces(task.model):
        _live(task, few, device)
        low, high = _live(task, few, device), _live(task, more, device)  # gradients are there by now
    task.model.zero_grad(set_to_none=True)
    slope = (high - low) / max(1, _size(more) - _size(few))
    activations = int(high + slope * (largest - _size(more)))
    share = 0.0 if settings.gradient_checkpointing else SLACK
    slack = int(KERNELS + share * activations) if device.type == "cpu" else 0
    return Estimate(process, base, ADAM * trained, activations, slack, loading)


def _largest(task: Task, settings: TrainSettings) -> tuple[int, list[int]]:
    """The size of the largest pass of the first steps, and the rows of its step."""
    found: tuple[int, list[int]] = (0, [])
    for step in range(min(STEPS, count_steps(settings, task.size))):
        rows = list(chain(*rows_of(step, settings, task.size, task.groups)))
        found = max(found, (max(map(_size, task.batches(rows))), rows), key=lambda pair: pair[0])
    return found


def _size(batch: Batch) -> int:
    return max(value.numel() for value in batch.inputs.values() if isinstance(value, Tensor))


def bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor, those inside of a quantised one included."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def _live(task: Task, batch: Batch, device: torch.device) -> int:
    """The most bytes of tensors that a forward and backward hold at once, beside what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task.loss(batch).backward()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler would tell that it begins and ends
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        task.loss(batch).backward()
    events: list[Any] = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(live, default=0)
