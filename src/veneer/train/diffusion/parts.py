"""The parts of a pipeline that learn, as one model, and which of their layers are adapted."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest
from veneer.core.kinds import kind_of
from veneer.core.model import PeftModel, get_peft_model
from veneer.core.targets import select
from veneer.files.parts import is_text
from veneer.train.diffusion.family import Family
from veneer.train.recompute import recompute_layers

# what kohya's sd-scripts adapt: the layers inside of modules of these classes; "+conv" are the U-Net's other ones
KOHYA = ("Transformer2DModel",)
KOHYA_CONV = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
KOHYA_TEXT = ("CLIPAttention", "CLIPMLP")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
PRESETS = ("attention", "kohya", "kohya+conv", "all")
FOREIGN = {"modules_to_save": None, "trainable_token_indices": None, "target_parameters": None, "bias": "none"}


class Parts(nn.Module):
    """Parts of a pipeline under the pipeline's names, with which the paths of their adapters begin."""

    def __init__(self, family: Family, names: tuple[str, ...]) -> None:
        super().__init__()
        self.family, self.reads = family, any(map(is_text, names))
        for name in names:
            self.add_module(name, family.parts[name])

    def forward(self, noisy: Tensor, t: Tensor, told: dict[str, Tensor], sizes: Tensor) -> Tensor:
        """The denoiser's answer; it is `told` the captions' numbers where text encoders learn, else what these make of
        them.
        """
        conditions = self.family.encode_tokens(told) if self.reads else told
        return self.family.predict(noisy, t, conditions, sizes)

    @property
    def called_alone(self) -> list[nn.Module]:
        """The parts: a pipeline that draws pictures calls them by themselves."""
        return list(self.children())

    def enable_gradient_checkpointing(self) -> None:
        """Each part's layers run again in the backward."""
        for part in self.children():
            recompute_layers(part)


def adapted(family: Family, config: LoraConfig, text: Any) -> PeftModel:
    """The denoiser, and the text encoders where `text` (the recipe's `text_encoder`) gives them a rank, with one fresh
    adapter. Raises `AdapterError` with all that cannot be adapted so, or not be kept for a pipeline.
    """
    if strange := [key for key, usual in FOREIGN.items() if getattr(config, key) not in (usual, [], {})]:
        raise AdapterError(
            f"adapter: {listed(strange)} cannot be kept for a part of a pipeline, whose adapters change layers alone"
        )
    names = (family.denoiser, *(family.encoders if text.r else ()))
    wanted = {name: text.target_modules if is_text(name) else config.target_modules for name in names}
    paths, faults = list[str](), list[str]()
    for name, targets in wanted.items():
        try:
            own = config if not is_text(name) else _bare(config)
            paths += [f"{name}.{path}" for path in chosen(family.parts[name], targets, own, is_text(name))]
        except AdapterError as error:
            hint = nearest(targets, PRESETS) if isinstance(targets, str) and "did you mean" not in str(error) else ""
            faults.append(f"{name}: {error}{hint}")
    if faults:
        raise AdapterError("\n".join(faults))
    whole = replace(config, target_modules=paths, exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    if text.r:
        reading = "|".join(family.encoders)
        whole.rank_pattern = {rf"({reading})\..*": text.r, **config.rank_pattern}
        whole.alpha_pattern = {rf"({reading})\..*": text.lora_alpha or text.r, **config.alpha_pattern}
    return get_peft_model(Parts(family, names), whole)


def _bare(config: LoraConfig) -> LoraConfig:
    """What of a config goes for every part."""
    return replace(
        config, exclude_modules=None, layers_to_transform=None, layers_pattern=None, rank_pattern={}, alpha_pattern={}
    )


def chosen(part: nn.Module, targets: Any, config: LoraConfig, text: bool) -> list[str]:
    """The paths of the layers that are meant: a preset's, or those that `LoraConfig`'s own words mean."""
    names = list(_preset(part, targets, text)) if targets in PRESETS else targets
    if names == []:
        raise AdapterError(f"target_modules: a {type(part).__name__} has no layers that {targets!r} means; say all")
    # patterns may name layers of other parts too: they are judged for all parts at once
    own = replace(config, target_modules=names, rank_pattern={}, alpha_pattern={}, method_pattern={})
    return list(select(part, own)[0])


def _preset(part: nn.Module, preset: str, text: bool) -> Iterator[str]:
    modules = dict(part.named_modules())
    layers = {path: module for path, module in modules.items() if path and _is_layer(module)}
    if preset == "all":
        yield from layers
    elif preset == "attention":
        ends = tuple(f".{end}" for end in (_TEXT_ATTENTION if text else _ATTENTION))
        yield from (path for path in layers if path.endswith(ends))
    else:
        classes = KOHYA_TEXT if text else KOHYA + KOHYA_CONV * (preset == "kohya+conv")
        homes = [path for path, module in modules.items() if type(module).__name__ in classes]
        inside = [path for path in layers if any(path.startswith(f"{home}.") for home in homes)]
        yield from (path for path in inside if text or preset == "kohya+conv" or not _is_wide(layers[path]))


def _is_layer(module: nn.Module) -> bool:
    """A convolution in groups is none: PEFT, and so diffusers, refuse a rank that is no multiple of their number."""
    return isinstance(module, nn.Linear | nn.Conv2d) and kind_of(module) is not None and not _is_grouped(module)


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1


def _is_wide(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
