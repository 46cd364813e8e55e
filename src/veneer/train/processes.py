"""The processes of one run: who they are and what they agree on. Launchers start them; here nothing is launched.

Each takes a share of every step's rows. One flat sum of the adapter's gradients a step, over the number of learned
tokens of all, makes the step that one process would have taken.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.core.errors import AdapterError

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)  # the first tokenises a large file, or measures, while the others wait
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # and accelerate's
# what srun says of each task of a step; a batch script outside of srun has none of the last
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}


@dataclass(frozen=True)
class World:
    """The processes of a run; `rank` is this one's number."""

    rank: int = 0
    size: int = 1
    joined: bool = False  # by `join`, and not by a library that has started the processes

    def first(self, call: Callable[[], T]) -> T:
        """What the first process makes of it, for all; an `AdapterError` of its is everyone's."""
        if self.size == 1:
            return call()
        box: list[Any] = list(_tried(call)) if self.rank == 0 else [None, None]
        _told(lambda: dist.broadcast_object_list(box, src=0))
        made, error = box
        if error is not None:
            raise AdapterError(error)
        return made

    def together(self, call: Callable[[], T]) -> T:
        """What this process makes of it, when all could; else the `AdapterError` of the first that could not."""
        if self.size == 1:
            return call()
        made, error = _tried(call)
        self.refuse(error)
        return made  # type: ignore[return-value]

    def tried(self, call: Callable[[], T]) -> tuple[T | None, str | None]:
        """What a call makes; or the words of its `AdapterError`, which `refuse` raises once all know that there is one.
        A process alone raises it at once.
        """
        return _tried(call) if self.size > 1 else (call(), None)

    def refuse(self, error: str | None) -> None:
        """Raises the `AdapterError` of the first process that has one, in all of them."""
        if wrong := [(rank, text) for rank, text in enumerate(self.collected(error)) if text is not None]:
            rank, text = wrong[0]
            raise AdapterError(f"process {rank}: {text}" if rank else text)

    def collected(self, value: T) -> list[T]:
        """The value of each process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        _told(lambda: dist.all_gather_object(values, value))
        return values

    def gathered(self, numbers: Sequence[int]) -> Tensor:
        """The numbers of all processes, `(processes, numbers)`."""
        own = torch.tensor(numbers, dtype=torch.int64)
        if self.size == 1:
            return own[None]
        found = [torch.zeros_like(own) for _ in range(self.size)]
        _told(lambda: dist.all_gather(found, own))
        return torch.stack(found)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over all processes: one flat sum in fp32."""
        if self.size == 1:
            return
        device = tensors[0].device
        flat = torch.cat([tensor.detach().reshape(-1).to(device, torch.float32) for tensor in tensors])
        _told(lambda: dist.all_reduce(flat))
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def share(self, rows: Sequence[T]) -> list[T]:
        """This process's rows of those that go through the model at once."""
        return list(rows[self.rank :: self.size])

    def leave(self) -> None:
        """End the group, if it was made here."""
        if self.joined and dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()


def join(device: str = "auto") -> World:
    """Join the processes that a launcher has started: torchrun, accelerate or srun. Without one, the world is this one.

    Raises `AdapterError` where what the launcher says is not whole, or the others do not come.
    """
    if (world := joined()) is not ALONE:  # by a launcher that is a library, as Ray Train is
        return world
    said = {name: os.environ[own] for name, own in _SLURM.items() if own in os.environ} if _by_srun() else {}
    said |= {name: os.environ[name] for name in _TORCHRUN if name in os.environ}
    if int(said.get("WORLD_SIZE", 1)) < 2:
        return ALONE
    if _by_srun():
        said.setdefault("MASTER_ADDR", _first_host())
        said.setdefault("MASTER_PORT", str(29_500 + int(os.environ.get("SLURM_JOB_ID", 0)) % 1_000))
    if missing := [name for name in _TORCHRUN if name not in said]:
        raise AdapterError(
            f"{said['WORLD_SIZE']} processes are meant, and {', '.join(missing)} not said: start them with torchrun"
        )
    os.environ.update(said)
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if cuda:
        torch.cuda.set_device(int(said["LOCAL_RANK"]))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"the {said['WORLD_SIZE']} processes of the run do not find each other: {error}") from error
    return World(dist.get_rank(), dist.get_world_size(), joined=True)


def joined() -> World:
    """The processes that this one has joined by now."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return ALONE


def spread(model: nn.Module) -> None:
    """Keep a part of the frozen base in each process (FSDP2): a layer is whole while it runs. Adapters stay whole.

    Raises `AdapterError` for a model without a list of layers.
    """
    from torch.distributed.fsdp import fully_shard

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)
    if largest is None:
        raise AdapterError(f"train.shard: {type(model).__name__} has no list of layers that could be spread")
    own = {parameter for name, parameter in model.named_parameters() if parameter.requires_grad or ".adapters." in name}
    # parts that others than the model call too are whole while they run as well
    for layer in (*largest, *getattr(model, "called_alone", ())):
        fully_shard(layer, ignored_params=own)
    fully_shard(model, ignored_params=own)


def fits(model_bytes: int, device: torch.device) -> bool:
    """Whether each process of this machine can hold the base, and as much again for its work."""
    if device.type == "cuda":
        return 2 * model_bytes <= torch.cuda.get_device_properties(device).total_memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return True
    return 2 * model_bytes * local <= room


def _tried(call: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return call(), None
    except AdapterError as error:
        return None, str(error)


def _told(call: Callable[[], object]) -> None:
    """Talk to the others. Raises `AdapterError` where one of them has gone."""
    try:
        call()
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise AdapterError(
            f"another process of the run has ended, or cannot be reached ({first}): this one ends too; --resume goes on"
        ) from error


def _by_srun() -> bool:
    return "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" not in os.environ


def _first_host() -> str:
    """The first of the step's hosts."""
    hosts = os.environ.get("SLURM_STEP_NODELIST", "localhost")
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    return hosts.partition(",")[0]
