"""Frozen linear layers and convolutions: y = W x + b, where only x has a gradient; of the activations nothing is kept.

PyTorch's own convolution keeps its input, which only the gradient of W wants. On a CPU that is slow at products of
half precision they are computed in fp32, as those of adapted layers are.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from veneer.core.fused import HALF, is_traced, product_dtype, wide_linear, wide_product
from veneer.train.pieces.piece import Piece


class _Linear(torch.autograd.Function):
    """dx = g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, own: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.own = own
        return wide_linear(x.to(own), weight, bias).to(x.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return wide_product(grad.to(ctx.own), weight).to(grad.dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    """By the kernel of the device; or as one product of what is seen `(places, in · kernel)` with W `(out, …)`,
    where there are fewer places than outputs: a CPU's kernel would first spend longer on rearranging W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: "Window") -> Tensor:
        size, dtype = window.size(x), x.dtype
        own = product_dtype(x.new_empty(0).expand(len(x) * size[0] * size[1], 0))
        ctx.save_for_backward(weight)
        ctx.own, ctx.window, ctx.shape, x = own, window, x.shape, x.to(own)
        ctx.as_product = x.device.type == "cpu" and len(x) * size[0] * size[1] < len(weight)
        if not ctx.as_product:
            bias = None if bias is None else bias.to(own)
            return F.conv2d(x, weight.to(own), bias, window.stride, window.padding, window.dilation).to(dtype)
        y = wide_linear(_places(window.seen(x)), weight.flatten(1), bias).view(len(x), -1, len(weight))
        return y.new_empty(len(x), len(weight), *size, dtype=dtype).copy_(y.transpose(1, 2).view(len(x), -1, *size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        wide, window = grad.to(ctx.own), ctx.window
        if ctx.as_product:
            seen = wide_product(_places(wide.flatten(2)), weight.flatten(1)).view(len(grad), -1, weight[0].numel())
            dx = window.seen_by(seen.transpose(1, 2), ctx.shape)
        else:
            dx = conv2d_input(ctx.shape, weight.to(ctx.own), wide, window.stride, window.padding, window.dilation)
        return dx.to(grad.dtype), None, None, None


def _places(x: Tensor) -> Tensor:
    """(rows, channels, places) → (rows · places, channels)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


class Window(NamedTuple):
    """What a convolution sees; down and across."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def size(self, x: Tensor) -> tuple[int, int]:
        """How many places there are."""
        down, across = (
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, dilation in zip(x.shape[2:], *self, strict=True)
        )
        return down, across

    def seen(self, x: Tensor) -> Tensor:
        """What each place sees, `(rows, channels · kernel, places)`, of x `(rows, channels, down, across)`."""
        size, (down, across) = self.size(x), self.padding
        x = F.pad(x, (across, across, down, down))
        of_kernel = [step * own for step, own in zip(x.stride()[2:], self.dilation, strict=True)]
        of_places = [step * own for step, own in zip(x.stride()[2:], self.stride, strict=True)]
        view = x.as_strided((*x.shape[:2], *self.kernel, *size), (*x.stride()[:2], *of_kernel, *of_places))
        return view.reshape(len(x), -1, size[0] * size[1])

    def seen_by(self, seen: Tensor, shape: torch.Size) -> Tensor:
        """For each input `shape`, the sum over the places that saw it: the transpose of `seen`."""
        down, across = self.padding
        x = seen.new_zeros(*shape[:2], shape[2] + 2 * down, shape[3] + 2 * across)
        high, wide = self.size(x[:, :, down : down + shape[2], across : across + shape[3]])
        seen = seen.reshape(*shape[:2], *self.kernel, high, wide)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                y = x[:, :, i * self.dilation[0] :: self.stride[0], j * self.dilation[1] :: self.stride[1]]
                y[:, :, :high, :wide] += seen[:, :, i, j]
        return x[:, :, down : down + shape[2], across : across + shape[3]]


class QuickLinear(Piece):
    """A frozen `nn.Linear` of half precision."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = *inputs, *named.values()  # by whatever name the base calls it
        if not _is_ready(self, x) or (own := product_dtype(flat := x.reshape(-1, x.shape[-1]))) == x.dtype:
            return self.own(x)
        return _Linear.apply(flat, self.weight, self.bias, own).view(*x.shape[:-1], len(self.weight))


class QuickConv2d(Piece):
    """A frozen `nn.Conv2d`."""

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = *inputs, *named.values()  # by whatever name the base calls it
        if x.ndim != 4 or not _is_ready(self, x):
            return self.own(x)
        window = Window(self.kernel_size, self.stride, self.padding, self.dilation)
        return _Conv2d.apply(x, self.weight, self.bias, window)


def _is_ready(module: Any, x: Tensor) -> bool:
    """Whether only x has a gradient, and the plain kernels would be called with what is here."""
    weight, bias = module.weight, module.bias
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    return frozen and alike and not is_traced() and not torch.is_autocast_enabled(x.device.type)


def quick_frozen(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it is such a layer and nothing more."""
    weight, forward = getattr(module, "weight", None), type(module).forward
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.requires_grad:
        return None
    if forward is nn.Linear.forward:
        return QuickLinear if weight.dtype in HALF else None
    plain = forward is nn.Conv2d.forward and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return QuickConv2d if plain and module.groups == 1 else None
