"""Starting values of the factors: a fresh adapter changes nothing, unless it is asked to."""

import math

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError

PLAIN = (True, False, "gaussian")
# those that are found in the base's weight
FROM_WEIGHT = ("pissa", "pissa_niter_N", "olora")
# those that are found in data, which comes later; until then the factors start like the default (veneer/starts)
FROM_DATA = ("eva", "lora_ga")
FROM_THE_START = (*FROM_WEIGHT, "lora_ga")  # the change is counted from where it started, for B A is not zero there


def start(A: Tensor, B: Tensor, how: bool | str) -> None:
    """Fill A `(r, in)` and B `(out, r)`.

    True: A uniform in ±1/√in, B = 0 (LoRA's own code). "gaussian": A normal with deviation 1/r, B = 0
    (diffusers). "orthogonal": both normal with deviation 1/10, A in half of the rank and B in the other, so that
    B A = 0 while both learn from the first step. False: both uniform, so that the change is not zero; for tests.
    """
    A, B = A.detach(), B.detach()  # a tenth of what `no_grad` takes
    if how == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    elif how == "orthogonal":
        nn.init.normal_(A, std=0.1)[A.shape[0] - A.shape[0] // 2 :] = 0
    else:
        _uniform(A)
    if how == "orthogonal":
        nn.init.normal_(B, std=0.1)[:, : B.shape[1] - B.shape[1] // 2] = 0
    elif how is False:
        _uniform(B)
    else:
        B.zero_()


def _uniform(factor: Tensor) -> None:
    """In ±1/√columns. On a CPU in 65,536 even steps: four values for one draw of 64 bits take half the time."""
    bound, size = 1 / math.sqrt(factor.shape[1]), factor.numel()
    if factor.device.type != "cpu":
        factor.uniform_(-bound, bound)
        return
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    factor.copy_(bits[:size].view_as(factor)).mul_(bound / 2**15)


@torch.no_grad()
def start_from_weight(A: Tensor, B: Tensor, how: str, weight: Tensor, scale: float) -> None:
    """Fill A and B from W = U S Vᵀ: "pissa" with scale · B A the first r singular components (Meng et al. 2024,
    arXiv:2404.02948), "pissa_niter_N" with these found by N iterations on a random subspace (Halko et al. 2011);
    from W = Q R: "olora" with B, A the first r columns and rows (Büyükakyüz 2024, arXiv:2406.01775).

    Raises `AdapterError` when W has fewer than r components, or the scale is not positive.
    """
    r, W = A.shape[0], weight.to(A.dtype)
    if r > min(W.shape) or scale <= 0:
        raise AdapterError(
            f"init_lora_weights={how!r} of a weight {tuple(W.shape)} needs r of at most {min(W.shape)} "
            f"and lora_alpha above 0, found r={r} and a scale of {scale}"
        )
    if how == "olora":
        Q, R = torch.linalg.qr(W)
        A.copy_(R[:r])
        B.copy_(Q[:, :r])
        return
    if how == "pissa":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    else:
        wider = min(r + 8, *W.shape)  # a few components more than are wanted make these few exact
        U, S, V = torch.svd_lowrank(W, wider, niter=int(how.rpartition("_")[2]))
        Vt = V.t()
    root = (S[:r] / scale).sqrt()
    A.copy_(root[:, None] * Vt[:r])
    B.copy_(U[:, :r] * root)
