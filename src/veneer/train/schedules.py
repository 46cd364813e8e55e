"""Learning rates: pure functions of the step."""

import math


def rate(step: int, steps: int, lr: float, schedule: str, warmup: float) -> float:
    """The learning rate of step 0 … steps - 1.

    It rises linearly over the warm-up (a share of all steps below 1, else a number of steps), then falls as a half
    cosine or a line to 0, or stays.
    """
    rising = min(round(warmup * steps) if warmup < 1 else int(warmup), steps)
    if step < rising:
        return lr * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)  # 0 … 1, both ends not reached
    falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return lr * falls[schedule]
