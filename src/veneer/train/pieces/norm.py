"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): y = w ⊙ x / √(mean x² + ε), computed in fp32."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.fused import is_traced
from veneer.train.pieces.piece import ROWS, Piece, StandIn, agrees, samples

BLOCK = 2**17  # numbers in fp32 that stay in a core's cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _RMSNorm(torch.autograd.Function):
    """Keeps x itself and 1/rms `(rows, 1)`. With h = g ⊙ w: dx = (h - x̂ mean(h ⊙ x̂)) / rms, where x̂ = x / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Any) -> Tensor:
        ctx.kernels = kernels
        if kernels:
            y, rstd = kernels[0](x.detach(), weight, eps)
            ctx.save_for_backward(x, rstd, weight)
            return y
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (rows, 1)
        rstd = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight)
        if x.dtype == torch.float32:
            return torch.mul(x, rstd).mul_(weight)
        y = torch.empty_like(x)
        for rows in _blocks(x):
            torch.mul(x[rows].float().mul_(rstd[rows]), weight, out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        if ctx.kernels:
            return ctx.kernels[1](grad.data, x.detach(), rstd, weight), None, None, None
        weight = weight.float()
        dx = torch.empty_like(x)
        for rows in _blocks(x):
            block, scale, h = x[rows].float(), rstd[rows], grad[rows].float()
            dot = torch.mv(product := h * block, weight, out=scale.new_empty(len(scale))).unsqueeze(1)
            pull = dot.mul_(scale).mul_(scale).mul_(scale).div_(-x.shape[-1])  # (rows, 1)
            torch.mul(h, weight, out=product)
            torch.addcmul(product.mul_(scale), block, pull, out=dx[rows])
        return dx, None, None, None


def _blocks(x: Tensor) -> list[slice]:
    """The rows of x, some at a time where that saves passes through memory."""
    size = max(1, BLOCK // x.shape[-1]) if x.device.type == "cpu" and x.dtype != torch.float32 else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Any = None) -> Tensor:
    """y = w ⊙ x / √(mean x² + ε) in the dtype of x `(..., n)`; w `(n)` has no gradient."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, kernels).view(x.shape)


class QuickNorm(Piece):
    """An RMSNorm whose weight is frozen; any other call runs the module's own forward."""

    offset: ClassVar[float] = 0.0  # what is added to the weight
    kernels: ClassVar[Any] = None  # compiled ones, of the forward and of the backward
    inputs: ClassVar[int] = 1
    weight: Tensor

    @property
    def width(self) -> int:
        return len(self.weight)

    @property
    def example(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight
        other = args or kwargs or weight.requires_grad or x.dtype not in DTYPES or x.dtype != weight.dtype
        return self.own(x, *args, **kwargs) if other or is_traced() else self.run(x, self.kernels)

    def run(self, x: Tensor, kernels: Any) -> Tensor:
        weight = self.weight.float() + self.offset if self.offset else self.weight
        return rms_norm(x, weight, _eps(self), kernels)


class QuickNormFromOne(QuickNorm):
    """Gemma's: y = (1 + w) ⊙ x / rms."""

    offset = 1.0


def quick_norm(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it is an RMSNorm."""
    weight = getattr(module, "weight", None)
    alone = isinstance(weight, Tensor) and weight.ndim == 1 and len(list(module.parameters())) == 1
    if not alone or not type(module).__name__.endswith("Norm") or not isinstance(_eps(module), float):
        return None
    x, w = samples(ROWS, len(weight), dtype=torch.float32, number=2)  # type: ignore[arg-type]
    stand_in = StandIn(module, weight=w[ROWS // 2])

    def own(x: Tensor) -> Any:
        return type(module).forward(stand_in, x)

    for piece in (QuickNorm, QuickNormFromOne):
        if agrees(own, lambda x, by=piece: rms_norm(x, stand_in.weight + by.offset, _eps(module)), [x]):
            return piece
    return None


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
