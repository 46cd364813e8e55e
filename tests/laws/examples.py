"""Genuine base layers of every kind, and their formulas."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Example:
    """A genuine base layer, an input of it for a batch's shape, and its formula for a matrix `(out, in)`."""

    make: Callable[[], nn.Module]
    inputs: Callable[..., Tensor]
    formula: Callable[[Any, Tensor, Tensor], Tensor]
    batches: tuple[tuple[int, ...], ...]
    parameters: tuple[str, ...] = ()  # adapted by name
    vectors: bool = False  # some of its matrices have one column


class Halving(nn.Linear):
    """A subclass with a forward of its own: y = W x + b / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias / 2


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


BATCHES = ((3,), (), (2, 3), (2, 3, 4), (0,), (2, 0))


def affine(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    y = x @ weight.T
    return y if layer.bias is None else y + layer.bias


def _linear(make: Callable[[], nn.Module], formula: Callable[[Any, Tensor, Tensor], Tensor] = affine) -> Example:
    return Example(make, lambda *batch: torch.randn(*batch, 6), formula, BATCHES)


def looked_up(layer: Any, table: Tensor, x: Tensor) -> Tensor:
    return nn.functional.embedding(x, table.T, layer.padding_idx)


def _table(make: Callable[[], nn.Module], formula: Callable[[Any, Tensor, Tensor], Tensor] = looked_up) -> Example:
    return Example(make, lambda *batch: torch.randint(0, 6, batch), formula, BATCHES)


def scaled_table() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(6, 5, 2, embed_scale=1.5)


class Shifted(nn.Embedding):
    """A table with a forward of its own: y = W[x + 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


def convolved(layer: Any, matrix: Tensor, x: Tensor) -> Tensor:
    """With the padding written out."""
    batched = x if x.ndim == layer.weight.ndim else x.unsqueeze(0)
    kernel = matrix.view_as(layer.weight)
    if layer.padding_mode != "zeros":
        padded = nn.functional.pad(batched, layer._reversed_padding_repeated_twice, layer.padding_mode)
    else:
        padded = nn.functional.pad(batched, layer._reversed_padding_repeated_twice)
    y = torch.convolution(
        padded, kernel, layer.bias, layer.stride, [0] * (kernel.ndim - 2), layer.dilation,
        False, [0] * (kernel.ndim - 2), layer.groups,
    )  # fmt: skip
    return y if x.ndim == layer.weight.ndim else y.squeeze(0)


def _conv(make: Callable[[], Any], *places: int) -> Example:
    return Example(
        make, lambda *batch: torch.randn(*batch, make().in_channels, *places), convolved, ((3,), (), (1,), (0,))
    )


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own: y = 2 W ∗ x + b."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 2 * self.weight, self.bias)


def normal(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


class OwnRMSNorm(nn.Module):
    """A norm layer of a family's own, as Gemma's is: y = (1 + scale) · x / rms(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (6,), 1 + self.weight, 1e-5)


def _norm(make: Callable[[], nn.Module], run: Callable[..., Tensor], *places: int) -> Example:
    """`run(x, scale and perhaps bias)`."""

    def formula(layer: Any, matrix: Tensor, x: Tensor) -> Tensor:
        return run(x, *matrix.T.reshape(-1, *layer.weight.shape))

    batches = ((3,), (1,)) if places else BATCHES
    example = Example(lambda: normal(make()), lambda *batch: torch.randn(*batch, *(places or (6,))), formula, batches)
    return replace(example, vectors=not hasattr(make(), "bias"))


class Experts(nn.Module):
    """y = Σ sᵢ(x) · Wᵢ x + b, with s the gate's softmax: a stack, a matrix and a vector."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.empty(3, 6, 5) if is_transposed else torch.empty(3, 5, 6))
        self.gate, self.shift = nn.Parameter(torch.empty(3, 6)), nn.Parameter(torch.empty(5))

    def forward(self, x: Tensor) -> Tensor:
        stack = self.stack.transpose(1, 2) if self.is_transposed else self.stack
        return mixed(self, {"stack": stack, "gate": self.gate, "shift": self.shift.unsqueeze(1)}, x)


def mixed(_: Any, matrices: Mapping[str, Tensor], x: Tensor) -> Tensor:
    shares = (x @ matrices["gate"].T).softmax(-1)
    return torch.einsum("...e,eoi,...i->...o", shares, matrices["stack"], x) + matrices["shift"].squeeze(1)


def _experts(is_transposed: bool, *parameters: str) -> Example:
    table = _linear(lambda: normal(Experts(is_transposed)), mixed)
    return replace(table, parameters=parameters, vectors="shift" in parameters)


class SelfAttention(nn.MultiheadAttention):
    """One input for all: queries are x, keys and values its first places."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(*self.three(x), need_weights=False)[0]

    def three(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, x[..., : self.kdim], x[..., : self.vdim]


def attended(layer: SelfAttention, matrices: Mapping[str, Tensor], x: Tensor) -> Tensor:
    together = "in_proj" in matrices
    weights = matrices["in_proj"].chunk(3) if together else [matrices[f"{name}_proj"] for name in "qkv"]
    heads = [
        nn.functional.linear(one, weight, bias).unflatten(-1, (2, 2)).transpose(-2, -3)
        for one, weight, bias in zip(layer.three(x), weights, layer.in_proj_bias.chunk(3), strict=True)
    ]
    shares = (heads[0] @ heads[1].transpose(-1, -2) / 2**0.5).softmax(-1)
    return nn.functional.linear(
        (shares @ heads[2]).transpose(-2, -3).flatten(-2), matrices["out_proj"], layer.out_proj.bias
    )


def _attention(**sizes: int) -> Example:
    def make() -> nn.Module:
        return SelfAttention(4, 2, batch_first=True, **sizes)

    return Example(make, lambda *batch: torch.randn(*batch, 3, 4), attended, ((3,), ()))


def whole(_: Any, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Two linear layers, a tanh between."""
    hidden = torch.tanh(x @ values["0/weight"].T + values["0/bias"])
    return hidden @ values["2/weight"].T


_F = nn.functional
# A kind that is added gives its examples here, by name; a kind without any fails every law.
EXAMPLES: Mapping[str, dict[str, Example]] = {
    "AdaptedLinear": {
        "linear": _linear(lambda: nn.Linear(6, 5)),
        "linear-without-bias": _linear(lambda: nn.Linear(6, 5, bias=False)),
    },
    "AdaptedOwnLinear": {
        "linear-of-its-own": _linear(
            lambda: Halving(6, 5), lambda layer, weight, x: affine(layer, weight, x) - layer.bias / 2
        )
    },
    "AdaptedConv1D": {"conv1d": _linear(conv1d)},
    "AdaptedEmbedding": {
        "table": _table(lambda: nn.Embedding(6, 5)),
        "table-with-padding": _table(lambda: nn.Embedding(6, 5, padding_idx=2)),
        "table-scaled": _table(scaled_table, lambda layer, table, x: looked_up(layer, table, x) * 1.5),
    },
    "AdaptedOwnEmbedding": {
        "table-of-its-own": _table(lambda: Shifted(7, 5), lambda layer, table, x: looked_up(layer, table, x + 1))
    },
    "AdaptedConv": {
        "conv1": _conv(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), 5),
        "conv2": _conv(lambda: nn.Conv2d(2, 4, (3, 2), (1, 2), (1, 0), dilation=(2, 1)), 4, 4),
        "conv2-same": _conv(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect", bias=False), 3, 3),
        "conv2-valid": _conv(lambda: nn.Conv2d(2, 3, 2, padding="valid", padding_mode="replicate"), 3, 3),
        "conv2-groups": _conv(lambda: nn.Conv2d(4, 6, 2, padding=1, groups=2), 3, 3),
        "conv3": _conv(lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate", dilation=2), 3, 3, 3),
    },
    "AdaptedOwnConv": {
        "conv-of-its-own": Example(
            lambda: Doubled(2, 3, 2),
            lambda *batch: torch.randn(*batch, 2, 3, 3),
            lambda layer, matrix, x: convolved(layer, 2 * matrix, x),
            ((3,), ()),
        )
    },
    "AdaptedNorm": {
        "layer-norm": _norm(lambda: nn.LayerNorm(6), lambda x, *own: _F.layer_norm(x, (6,), *own)),
        "layer-norm-2": _norm(lambda: nn.LayerNorm((2, 3)), lambda x, *own: _F.layer_norm(x, (2, 3), *own), 2, 3),
        "rms-norm": _norm(lambda: nn.RMSNorm(6, eps=1e-5), lambda x, scale: _F.rms_norm(x, (6,), scale, 1e-5)),
        "group-norm": _norm(lambda: nn.GroupNorm(2, 4), lambda x, *own: _F.group_norm(x, 2, *own), 4, 3),
        "norm-of-its-own": _norm(OwnRMSNorm, lambda x, scale: _F.rms_norm(x, (6,), 1 + scale, 1e-5)),
    },
    "AdaptedAttention": {"attention": _attention(), "attention-of-sizes": _attention(kdim=2, vdim=3)},
    "AdaptedParameters": {
        "parameters-flat": _experts(False, "gate", "shift"),
        "parameters": _experts(False, "stack", "gate", "shift"),
        "parameters-transposed": _experts(True, "stack"),
    },
    "AdaptedModule": {
        "module": _linear(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5, bias=False)), whole),
        "module-table": replace(
            _table(lambda: nn.Embedding(6, 5, padding_idx=2)),
            formula=lambda layer, own, x: looked_up(layer, own["weight"].T, x),
        ),
    },
}
