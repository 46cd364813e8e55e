"""A pipeline with adapters from their files, to be asked for pictures."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import files
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed, listed, shown
from veneer.files.attach import models_of
from veneer.files.carriers import Carriers, Weights
from veneer.files.parts import is_text
from veneer.files.pipeline import INDEX, is_pipeline
from veneer.safe.stored import parsed, read_bytes
from veneer.train.bases.loading import choose_device, choose_dtype, first_line, quiet
from veneer.train.diffusion.painter import Sampling, said
from veneer.train.diffusion.prompts import Tag
from veneer.train.trained import usage_of


@dataclass
class AdaptedPipeline:
    """A pipeline whose parts carry adapters, and how those who made base and adapters draw with them."""

    pipeline: Any
    sampling: Sampling
    carriers: Carriers
    names: dict[str, str]  # what an adapter is called here → on the models, which take fewer names

    @classmethod
    def load(
        cls, place: Path, adapters: Mapping[str, Path], dtype: str = "auto", device: str = "auto"
    ) -> "AdaptedPipeline":
        """The pipeline in `place`, and on it the adapters of any format, by names; none acts until it is asked for.

        Raises one `AdapterError` with all that does not fit.
        """
        held = {name: files.read(path) for name, path in adapters.items()}
        names = {name: f"adapter {number}" for number, name in enumerate(adapters, 1)}
        chosen = choose_device(device)
        pipeline = load_pipeline(place, choose_dtype(dtype, chosen), chosen)
        faults = []
        for name, adapter in held.items():
            try:
                _attached(pipeline, adapter, names[name])
            except AdapterError as error:
                faults.append(f"{adapters[name]}: {error}")
        if faults:
            raise AdapterError("\n".join(faults))
        carriers = files.carriers(pipeline)
        carriers.set_adapter([])
        sampling = Sampling()
        for folder in (*adapters.values(), place):
            sampling = sampling.over(sampling_of(folder))
        return cls(pipeline, sampling, carriers, names)

    def acting(self, tags: Iterable[Tag]) -> Weights:
        """The weights of these adapters: one for all parts, or one for each part that carries it."""
        found = dict[str, float | dict[str, float]]()
        for tag in tags:
            name = self.names[tag.name]
            parts = [part for part, model in self.carriers.items() if name in model.peft_config]
            own = {part: tag.text if is_text(part) else tag.denoiser for part in parts}
            found[name] = tag.text if tag.text == tag.denoiser else own
        return found


def load_pipeline(place: Path, dtype: str, device: torch.device) -> Any:
    """The pipeline in a folder, every part from its safetensors, as still as it was saved; it brings no programs.

    Raises `AdapterError` that says what cannot be read.
    """
    if not is_pipeline(place):
        raise AdapterError(f"base {place} is no diffusers pipeline: it has no {INDEX}")
    kind = parsed(read_bytes(place / INDEX), str(place / INDEX)).get("_class_name")
    try:
        diffusers = import_module("diffusers")
    except ImportError as error:
        raise AdapterError(f"pictures need: pip install 'veneer[diffusion]' ({error})") from None
    variant = None if _has_plain(place) else next((path.name.split(".")[-2] for path in _weights(place)), None)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "variant": variant}
    bars = diffusers.utils.logging
    shows, level = bars.is_progress_bar_enabled(), bars.get_verbosity()
    try:
        bars.disable_progress_bar()
        bars.set_verbosity_error()
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype`", FutureWarning)  # which older versions call it alone
            pipeline = diffusers.DiffusionPipeline.from_pretrained(place, torch_dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise AdapterError(f"base {place} cannot be loaded as a {shown(kind)}: {first_line(error)}") from error
    finally:
        bars.set_verbosity(level)
        if shows:
            bars.enable_progress_bar()
    return pipeline.to(device)


def sampling_of(folder: Path) -> Sampling:
    """How pictures are drawn, as the folder of an adapter or a base says in its `veneer.json`."""
    own = usage_of(folder if folder.is_dir() else folder.parent).get("sample")
    known = {key for key, _ in said(Sampling())}
    return (
        Sampling(**{key: value for key, value in own.items() if key in known}) if isinstance(own, dict) else Sampling()
    )


def _attached(pipeline: Any, adapter: Adapter, name: str) -> None:
    """Put it on; one for a model by itself goes on the only part that has all its layers."""
    if adapter.parts:
        files.attach(pipeline, adapter, name)
        return
    models = models_of(pipeline)
    fitting = [model for model in models.values() if _has(model, adapter)]
    if len(fitting) != 1:
        raise AdapterError(
            f"it is for one model by itself, and of the pipeline's parts {listed(models)} "
            f"{len(fitting) or 'none'} {'have' if fitting else 'has'} its layers {collapsed(adapter.tensors, 3)}: "
            "say which part it is for (`veneer convert IN OUT --to diffusers --part unet`)"
        )
    files.attach(fitting[0], adapter, name)


def _has(model: nn.Module, adapter: Adapter) -> bool:
    known = {name for name, _ in model.named_modules()}
    return all(path in known for path in adapter.tensors if path)


def _weights(place: Path) -> list[Path]:
    return sorted(place.glob("*/*.safetensors"))


def _has_plain(place: Path) -> bool:
    """Whether any weights are not of a variant (`model.fp16.safetensors`)."""
    return any(path.name.count(".") == 1 for path in _weights(place))
