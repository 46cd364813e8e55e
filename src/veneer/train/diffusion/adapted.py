"""A pipeline with adapters from their files, to be asked for pictures."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import files
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.files.attach import models_of
from veneer.files.carriers import Carriers, Weights
from veneer.files.parts import is_text
from veneer.files.pipeline import load_pipeline
from veneer.train.bases.loading import choose_device, choose_dtype, quiet
from veneer.train.diffusion.painter import Sampling, rescheduled, said
from veneer.train.diffusion.prompts import Tag
from veneer.train.trained import usage_of

_PRIOR, _DECODER = "WuerstchenPriorPipeline", "WuerstchenDecoderPipeline"


@dataclass
class AdaptedPipeline:
    """A pipeline whose parts carry adapters, and how those who made base and adapters draw with them."""

    pipeline: Any
    sampling: Sampling
    carriers: Carriers
    names: dict[str, str]  # what an adapter is called here → on the models, which take fewer names

    @classmethod
    def load(
        cls,
        place: Path,
        adapters: Mapping[str, Path],
        dtype: str = "auto",
        device: str = "auto",
        decoder: Path | None = None,
    ) -> "AdaptedPipeline":
        """The pipeline in `place`, and on it the adapters of any format, by names; none acts until it is asked for.

        Its scheduler is as the first adapter needs it. Raises one `AdapterError` with all that does not fit.
        """
        held = {name: files.read(path) for name, path in adapters.items()}
        names = {name: f"adapter {number}" for number, name in enumerate(adapters, 1)}
        chosen = choose_device(device)
        pipeline = ready(place, choose_dtype(dtype, chosen), chosen, decoder)
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
        usages = [usage_of(path if path.is_dir() else path.parent) for path in (*adapters.values(), place)]
        sampling = Sampling()
        for usage in usages:
            sampling = sampling.over(sampling_of(usage))
        every = [own for usage in usages if isinstance(own := usage.get("scheduler"), dict)]
        if any(own != every[0] for own in every):
            warnings.warn(f"trained for other schedules, of which the first is used: {listed(every)}", stacklevel=2)
        changes, own = every[0] if every else {}, pipeline.scheduler.config.get("prediction_type")
        if own != (learned := changes.get("prediction_type", own)):
            told = f"drawn by {learned}, as was trained, and not by {own}, as the base says: strength 0 is not the base"
            warnings.warn(told, stacklevel=2)
        pipeline.scheduler = rescheduled(pipeline.scheduler, changes)
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


def ready(place: Path, dtype: str, device: torch.device, decoder: Path | None = None) -> Any:
    """The pipeline in a folder, of `dtype` and on the device; of Würstchen's prior, with the decoder's folder.

    Raises `AdapterError` that says what cannot be read, or what a prior needs.
    """
    with _silent():
        pipeline = load_pipeline(place, dtype)
        prior = type(pipeline).__name__ == _PRIOR
        if prior and decoder is None:
            raise AdapterError(
                f"base {place} is a prior, which draws no pictures: --decoder names the {_DECODER} beside it"
            )
        if decoder is not None:
            pipeline = _joined(pipeline, load_pipeline(decoder, dtype))
    return pipeline.to(device)


def _joined(prior: Any, decoder: Any) -> Any:
    """Both in one pipeline."""
    kinds = type(prior).__name__, type(decoder).__name__
    if kinds != (_PRIOR, _DECODER):
        raise AdapterError(f"--decoder is for a {_PRIOR} and a {_DECODER}, found {listed(kinds, say=str)}")
    held = {f"prior_{part}": own for part, own in prior.components.items()}
    return import_module("diffusers").WuerstchenCombinedPipeline(**decoder.components, **held)


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, diffusers and transformers say nothing of what they load."""
    try:
        voice = import_module("diffusers").utils.logging
    except ImportError as error:
        raise AdapterError(f"pictures need: pip install 'veneer[diffusion]' ({error})") from None
    level = voice.get_verbosity()
    voice.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        voice.set_verbosity(level)


def sampling_of(usage: Mapping[str, Any]) -> Sampling:
    """How pictures are drawn, as the `veneer.json` of an adapter or a base says."""
    own, data = usage.get("sample"), usage.get("data")
    known = {key for key, _ in said(Sampling())}
    found = {key: value for key, value in own.items() if key in known} if isinstance(own, dict) else {}
    size = data.get("resolution") if isinstance(data, dict) else None
    if isinstance(size, list) and len(size) == 2:
        found |= {key: found.get(key) or own for key, own in zip(("width", "height"), size, strict=True)}
    return Sampling(**found)


def _attached(pipeline: Any, adapter: Adapter, name: str) -> None:
    """Put it on; one for a model by itself goes on the only part that has all its layers."""
    if adapter.parts:
        files.attach(pipeline, adapter, name)
        return
    models = models_of(pipeline)
    fitting = [model for model in models.values() if _has(model, adapter)]
    if len(fitting) != 1:
        found = f"{len(fitting) or 'none'} have"
        raise AdapterError(
            f"it is for one model alone, and of the pipeline's parts ({listed(models, say=str)}) {found} its layers "
            f"{collapsed(adapter.tensors, 3)}; say which it is for (`veneer convert IN OUT --to diffusers --part unet`)"
        )
    files.attach(fitting[0], adapter, name)


def _has(model: nn.Module, adapter: Adapter) -> bool:
    known = {name for name, _ in model.named_modules()}
    return all(path in known for path in adapter.tensors if path)
