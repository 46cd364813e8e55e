"""Factors that are known, and the change of the weight that they mean, by the methods' own formulas in float64."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Draw = Callable[..., Tensor]
RANKS = 1, 2, 3, 4
ALPHAS = 2.0, 1.0, 8.0, 2.0, 0.5, 3.0, 2.0  # with the ranks, α / r is 1/8 to 8, and not always a power of two


def normal(seed: int) -> Draw:
    """Values around one: the changes are larger than the weights, so that rounding the sum tells little."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def pair(layer: nn.Module, r: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """up (out, r, 1, 1), down (r, in, kernel) of a convolution; (out, r), (r, in) of a linear layer."""
    out, into, *kernel = layer.weight.shape
    return draw(out, r, *(1 for _ in kernel)), draw(r, into, *kernel)


def lora(layer: nn.Module, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """ΔW = scale · up down (Hu et al. 2021, arXiv:2106.09685), whatever trailing ones the two have."""
    return (scale * up.double().flatten(1) @ down.double().flatten(1)).view(layer.weight.shape)


def tucker(layer: nn.Module, up: Tensor, mid: Tensor, down: Tensor, scale: float) -> Tensor:
    """ΔW[o, i, …] = scale · Σ_rs up[o, r] mid[r, s, …] down[s, i]."""
    product = torch.einsum("or,rs...,si->oi...", up.double().flatten(1), mid.double(), down.double().flatten(1))
    return (scale * product).view(layer.weight.shape)


def loha(layer: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """ΔW = scale · (a₁ b₁) ⊙ (a₂ b₂) (Hyeon-Woo et al. 2022, arXiv:2108.06098); with cores t, a is (r, out)."""

    def half(i: int) -> Tensor:
        a, b = (tensors[f"hada_w{i}_{letter}"].double() for letter in "ab")
        if (core := tensors.get(f"hada_t{i}")) is None:
            return (a @ b).view(layer.weight.shape)
        return torch.einsum("rs...,ro,si->oi...", core.double(), a, b)

    return scale * half(1) * half(2)


def lokr(layer: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """ΔW = scale · w₁ ⊗ w₂ (Yeh et al. 2024, arXiv:2309.14859), each whole or a product, w₂ maybe with a core."""
    kernel = layer.weight.shape[2:]
    given = {name.removeprefix("lokr_"): tensor.double() for name, tensor in tensors.items()}
    w1 = given["w1"] if "w1" in given else given["w1_a"] @ given["w1_b"]
    if "w2" in given:
        w2 = given["w2"]
    elif "t2" in given:
        w2 = torch.einsum("rs...,ro,si->oi...", given["t2"], given["w2_a"], given["w2_b"])
    else:
        w2 = (given["w2_a"] @ given["w2_b"].flatten(1)).unflatten(1, (-1, *kernel))
    # the outer product, whose pairs of sizes (out₁, out₂) and (in₁, in₂) are the layer's out and in
    return scale * torch.einsum("ac,bd...->abcd...", w1, w2).reshape(layer.weight.shape)


def dora(layer: nn.Module, change: Tensor, magnitude: Tensor) -> Tensor:
    """ΔW = m (W + change) / ‖W + change‖ − W (Liu et al. 2024, arXiv:2402.09353).

    The norm is over what m has one number for: each output, or each input where m lies along the inputs.
    """
    weight = layer.weight.double()
    moved = weight + change
    along = 0 if magnitude.numel() == weight.shape[0] and magnitude.shape[0] != 1 else 1
    norm = moved.transpose(0, along).flatten(1).norm(dim=1)
    shape = [1] * weight.dim()
    shape[along] = -1
    return moved * (magnitude.double().flatten() / norm).view(shape) - weight
