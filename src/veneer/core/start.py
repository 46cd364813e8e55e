"""Starting values of the factors: a fresh adapter changes nothing, unless it is asked to."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def start(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Fill A `(r, in)` and B `(out, r)`.

    True: A uniform in ±1/√in, B = 0 (LoRA's own code). "gaussian": A normal with deviation 1/r, B = 0
    (diffusers). False: both uniform, so that the change is not zero; for tests.
    """
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)
