"""What is drawn for each picture of a step: from (seed, step, row) and the row's place in the step, which (seed, step)
decides; so any split over processes and a run that goes on later have the same bits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def generator(seed: int, what: str, *numbers: int) -> torch.Generator:
    """A source of random numbers on the CPU that `what` is drawn from: one for each (seed, what, numbers)."""
    digest = hashlib.sha256(" ".join(map(str, (seed, what, *numbers))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Moment(NamedTuple):
    """When a row is learned: the so-manieth time in a step, and its place among all rows of the step."""

    step: int
    turn: int = 0
    stratum: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Draw:
    """A timestep and noise, of one picture; or, stacked, of n, with n before each shape."""

    t: Tensor  # (), of the schedule
    noise: Tensor  # (channels, height, width), which is learned
    mixed: Tensor  # which is mixed in: the noise, or the perturbed noise

    def to(self, device: torch.device) -> "Draw":
        """The same on a device."""
        noise = self.noise.to(device)
        return Draw(self.t.to(device), noise, noise if self.mixed is self.noise else self.mixed.to(device))


def stacked(draws: Sequence[Draw]) -> Draw:
    """The draws of pictures of one size, as those of a batch."""
    noise = torch.stack([draw.noise for draw in draws])
    same = all(draw.mixed is draw.noise for draw in draws)
    return Draw(
        torch.stack([draw.t for draw in draws]), noise, noise if same else torch.stack([draw.mixed for draw in draws])
    )
