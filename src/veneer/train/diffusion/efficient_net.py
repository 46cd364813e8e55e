"""EfficientNetV2 (Tan & Le 2021, arXiv:2104.00298), as Würstchen sees pictures, by torchvision's names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.core.errors import AdapterError, collapsed

STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the stages, of which the small one has six
FACTOR = 32  # pixels of a latent's point, in each direction
_BLOCK = re.compile(r"backbone\.(\d+)\.(\d+)\.block\.(\d+)\.(0|fc1)\.weight")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures
_EPSILON = 1e-3


class EfficientNetEncoder(nn.Module):
    """Pictures `(n, 3, height, width)` in [-1, 1] to `(n, channels, height / 32, width / 32)`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Of the widths and depths that the shapes of its weights say."""
        super().__init__()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        blocks: dict[int, dict[int, dict[int, tuple[int, ...]]]] = {}
        for name, shape in shapes.items():
            if found := _BLOCK.fullmatch(name):
                stage, block, layer = map(int, found.groups()[:3])
                blocks.setdefault(stage, {}).setdefault(block, {})[layer] = shape if found[4] == "0" else shape[:2]
        stages = [_normed(shapes["backbone.0.0.weight"], 2)]
        for stage, stride in zip(sorted(blocks), STRIDES, strict=False):
            own = [layers for _, layers in sorted(blocks[stage].items())]
            stages.append(nn.Sequential(*(_Block(layers, 1 if i else stride) for i, layers in enumerate(own))))
        stages.append(_normed(shapes[f"backbone.{len(stages)}.0.weight"], 1))
        self.backbone = nn.Sequential(*stages)
        made, seen = shapes["mapper.0.weight"][:2]
        self.mapper = nn.Sequential(nn.Conv2d(seen, made, 1, bias=False), nn.BatchNorm2d(made))
        self.load_state_dict(dict(tensors))

    @classmethod
    def load(cls, path: Path) -> "EfficientNetEncoder":
        """The encoder of a safetensors file. Raises `AdapterError` where it holds another model."""
        try:
            return cls(load_file(path))
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error
        except KeyError as error:
            raise AdapterError(f"{path} is no EfficientNetV2 with a mapper: it lacks {collapsed(error.args)}") from None
        except (RuntimeError, ValueError) as error:
            raise AdapterError(f"{path} is no EfficientNetV2 with a mapper: {error}") from error

    def forward(self, pixels: Tensor) -> Tensor:
        mean, deviation = (pixels.new_tensor(own).view(3, 1, 1) for own in (_MEAN, _DEVIATION))
        latents: Tensor = self.mapper(self.backbone(((pixels + 1) / 2 - mean) / deviation))
        return latents


class _Block(nn.Module):
    """x + block(x), where the two are of one shape: a convolution that expands, the depthwise one with its gate, or
    both in one, and a last one that projects.
    """

    def __init__(self, layers: Mapping[int, tuple[int, ...]], stride: int) -> None:
        super().__init__()
        made: list[nn.Module] = []
        for number, shape in sorted(layers.items()):
            if len(shape) == 2:
                made.append(_Gate(shape[1], shape[0]))
                continue
            wide = shape[2] > 1  # the one that sees more than a point has the stride
            active = number < max(layers) or len(layers) == 1
            made.append(_normed(shape, stride if wide else 1, active))
        self.block = nn.Sequential(*made)
        first, last = layers[min(layers)], layers[max(layers)]
        self.skips = stride == 1 and _inputs(first) == last[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.skips else y


class _Gate(nn.Module):
    """x · σ(W₂ silu(W₁ mean(x))) (Hu et al. 2017, arXiv:1709.01507)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)


def _inputs(shape: tuple[int, ...]) -> int:
    """The channels that a convolution sees; a depthwise one says 1."""
    return shape[0] if shape[1] == 1 else shape[1]


def _normed(shape: tuple[int, ...], stride: int, active: bool = True) -> nn.Sequential:
    """A convolution, its normalisation, and SiLU where `active`."""
    groups = shape[0] if shape[1] == 1 else 1
    convolution = nn.Conv2d(_inputs(shape), shape[0], shape[2], stride, shape[2] // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(shape[0], eps=_EPSILON), *[nn.SiLU()] * active)
