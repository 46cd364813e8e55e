"""Which timesteps are learned, and how often."""

from bisect import bisect_right
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.train.diffusion.objective_settings import PORTION, ObjectiveSettings
from veneer.train.diffusion.schedule import Schedule


class Timesteps:
    """t = F⁻¹(u), u uniform on [0, 1): F's density is the multiplier on the timesteps that are preferred, 1 on the
    other ones that are learned, 0 elsewhere, up to a factor.
    """

    def __init__(self, schedule: Schedule, settings: ObjectiveSettings) -> None:
        """Raises `AdapterError` for ends that the schedule does not have, and for a bias that prefers all or none."""
        self.whole = schedule.whole
        low, high = settings.timesteps or (0, schedule.length)
        begin, end = self._preferred(schedule, settings)
        faults = [
            f"{name} should be within 0 to {schedule.length:g}{', whole numbers' * self.whole}, found {list(ends)}"
            for name, ends in (("timesteps", (low, high)), ("timestep_bias.range", (begin, end)))
            if ends[1] > schedule.length or (self.whole and not all(float(value).is_integer() for value in ends))
        ]
        begin, end = max(begin, low), min(end, high)  # of those that are learned
        if settings.timestep_bias.strategy != "none" and (begin >= end or (begin, end) == (low, high)):
            faults.append(
                f"timestep_bias prefers {'none' if begin >= end else 'all'} of the timesteps that are learned"
            )
        if faults:
            raise AdapterError("; ".join(f"train.{fault}" for fault in faults))
        inner = [edge for edge in (begin, end) if low < edge < high] if begin < end else []
        self.edges = sorted({low, high, *inner})
        multiplier = settings.timestep_bias.multiplier or 1.0
        self.density = [multiplier if begin <= a < end else 1.0 for a, _ in pairwise(self.edges)]
        lengths = (d * (b - a) for d, (a, b) in zip(self.density, pairwise(self.edges), strict=True))
        self.sums = list(accumulate(lengths, initial=0.0))

    @staticmethod
    def _preferred(schedule: Schedule, settings: ObjectiveSettings) -> tuple[float, float]:
        bias, length = settings.timestep_bias, schedule.length
        if bias.strategy == "range" and bias.range:
            return bias.range
        share = (bias.portion or PORTION) * length
        share = max(1, int(share)) if schedule.whole else share
        return {"earlier": (0, share), "later": (length - share, length)}.get(bias.strategy, (0, 0))

    def at(self, u: float) -> Tensor:
        """The timestep `()` of a number in [0, 1): int64 where the schedule has a table, else fp32."""
        sought = u * self.sums[-1]
        piece = min(bisect_right(self.sums, sought) - 1, len(self.density) - 1)
        begin, end = self.edges[piece : piece + 2]
        t = begin + (sought - self.sums[piece]) / self.density[piece]
        return torch.tensor(min(int(t), int(end) - 1)) if self.whole else torch.tensor(t, dtype=torch.float32)
