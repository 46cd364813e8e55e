"""A base that sees: with the head of a task, and what of the head is trained and saved with the adapter."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError, collapsed, listed
from veneer.train.bases.heads import load_config, load_with_head

Normalising = nn.modules.batchnorm._BatchNorm


def load_seeing(
    folder: Path, kind: str, dtype: str | None, device: torch.device, quantization: str, labels: list[str]
) -> tuple[Any, list[str], list[str]]:
    """The model that transformers' class `kind` makes of `folder`, for these labels; the paths of the modules that
    start at random and can be saved; and those of the batch normalisations among what starts at random.
    """
    config: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {own: i for i, own in enumerate(labels)}}
    if hasattr(load_config(folder), "use_auxiliary_head"):  # which helps a training of all weights, and is then left
        config["use_auxiliary_head"] = False
    model, heads = load_with_head(folder, kind, dtype, device, quantization, **config)
    if body := [path for path in heads if path.partition(".")[0] in ("backbone", model.base_model_prefix)]:
        raise AdapterError(f"base {folder} is not whole: {listed(body)} have no weights there; choose another base")
    modules = [f"{path}.{name}".rstrip(".") for path in heads for name, _ in model.get_submodule(path).named_modules()]
    new = [path for path in modules if isinstance(model.get_submodule(path), Normalising)]
    saved = [own for path in heads for own in savable(model, path)]
    random = [f"{path}.{name}" for path in heads for name, _ in model.get_submodule(path).named_parameters()]
    if lost := [name for name in random if not any(name.startswith(f"{own}.") for own in (*saved, *new))]:
        raise AdapterError(
            f"base {folder}: {collapsed(lost)} start at random, and no adapter can hold them: choose a base with a head"
        )
    return model, saved, new


def savable(model: nn.Module, path: str) -> list[str]:
    """The module, or the outermost ones in it, that hold parameters and no buffers and are called themselves.

    What is left out are batch normalisations. A new one, which is kept still, changes nothing: mean 0, variance 1,
    weight 1, bias 0, here as everywhere that the head is made anew.
    """
    module = model.get_submodule(path)
    if not list(module.parameters()):
        return []
    if type(module).forward is not nn.Module.forward and not [*module.buffers()] and not _is_list(module):
        return [path]
    return [own for name, _ in module.named_children() for own in savable(model, f"{path}.{name}")]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def still(model: nn.Module) -> list[nn.Module]:
    """The batch normalisations: their averages are the base's, which training must not change."""
    return [module for module in model.modules() if isinstance(module, Normalising)]


@contextmanager
def scaling(model: nn.Module, heads: list[str], new: list[str]) -> Iterator[None]:
    """Inside, one pass makes w[i] ← w[i] / √Var(y[i]) for each output y[i] of a new layer before a new normalisation,
    which is kept still and would leave the layers behind it next to nothing (after Mishkin & Matas 2016,
    arXiv:1511.06422).
    """
    called: list[nn.Module] = []

    def scale(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        y, layer = inputs[0], called[-1] if called else None
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or len(layer.weight) != y.shape[1]:
            return None
        by = (y.float().transpose(0, 1).flatten(1).var(1) + 1e-5).rsqrt().to(y.dtype)  # (channels,)
        for parameter in layer.parameters():
            parameter.mul_(by.to(parameter.dtype).view(-1, *[1] * (parameter.ndim - 1)))
        return (y * by.view(1, -1, *[1] * (y.ndim - 2)), *inputs[1:])

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        called.append(module)

    hooks = [model.get_submodule(path).register_forward_hook(note) for path in heads]
    hooks += [model.get_submodule(path).register_forward_pre_hook(scale) for path in new]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def options_for(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What the forward is told for pictures of that size."""
    own = getattr(model.config, "image_size", None)
    usual = (own, own) if isinstance(own, int) else tuple(own) if isinstance(own, list | tuple) else size
    known = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
    return {"interpolate_pos_encoding": True} if known and usual != size else {}
