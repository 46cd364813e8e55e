"""Pictures from a pipeline as it is in memory: each depends on its prompt, seed, weights and settings, and on no other.

They are made one after the other, each with noise of its own from the CPU's generator: the same on every device, and
the same bits alone or among others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import nn

from veneer.core.errors import AdapterError, listed
from veneer.core.model import PeftModel
from veneer.files.attach import carriers
from veneer.files.carriers import Carriers, Weights

Progress = Callable[[float, int], None]  # (pictures that are done, of how many)

# what a setting is called by pipelines, the first that a pipeline knows
_WORDS = {
    "steps": ("prior_num_inference_steps", "num_inference_steps"),
    "guidance": ("prior_guidance_scale", "guidance_scale"),
    "guidance_rescale": ("guidance_rescale",),
    "negative_prompt": ("negative_prompt",),
    "width": ("width",),
    "height": ("height",),
}
STEP_OF_A_PRIOR = 128  # of widths and heights: what its latents make, the decoder halves several times
_WATCHERS = ("prior_callback_on_step_end", "callback_on_step_end")
_STAGES = ("prior_pipe", "decoder_pipe")  # the pipelines inside of one


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; what is None is as the pipeline has it."""

    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None

    def over(self, other: "Sampling") -> "Sampling":
        """These settings, and the other's where these say nothing."""
        return Sampling(**{key: theirs if (own := getattr(self, key)) is None else own for key, theirs in said(other)})


@dataclass(frozen=True)
class Wish:
    """A picture that is asked for. `weights` say which adapters act, {} none; None: those that do anyway."""

    prompt: str
    seed: int = 0
    weights: Weights | None = None


def said(sampling: Sampling) -> list[tuple[str, Any]]:
    """The settings by name."""
    return [(field.name, getattr(sampling, field.name)) for field in fields(sampling)]


def paint(
    pipeline: Any,
    wishes: Sequence[Wish],
    sampling: Sampling | None = None,
    carrier: PeftModel | Carriers | None = None,
    merged: bool = False,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """The picture of each wish. `carrier` is what carries the adapters, if not the pipeline's own parts.

    `merged`: what acts is merged into the weights and taken out again, to the bit: worth it for large models, and
    equal up to rounding. Without dropout; nothing of pipeline, adapters and random state is other than before, also
    after an error. Raises `AdapterError` for settings that the pipeline does not know or cannot take.
    """
    carrier = carriers(pipeline) if carrier is None else carrier
    known = signature(type(pipeline).__call__).parameters
    given = _arguments(sampling or Sampling(), known, type(pipeline).__name__)
    watcher = next((word for word in _WATCHERS if word in known), None)
    found: dict[int, Image.Image] = {}
    with _still(pipeline):
        for places in _alike(wishes):
            with _acting(carrier, wishes[places[0]].weights, merged):
                for place in places:
                    watching = {watcher: _watched(progress, len(found), len(wishes))} if watcher and progress else {}
                    found[place] = _painted(pipeline, wishes[place], {**given, **watching})
                    if progress:
                        progress(len(found), len(wishes))
    return [found[place] for place in range(len(wishes))]


def default_of(pipeline: Any, setting: str) -> Any:
    """What the pipeline itself has for a setting of `Sampling`; None where it does not say."""
    known = signature(type(pipeline).__call__).parameters
    word = next((word for word in _WORDS[setting] if word in known), None)
    value = known[word].default if word else None
    if value is None and setting in ("width", "height") and hasattr(pipeline, "unet"):
        size = pipeline.unet.config.sample_size
        value = pipeline.vae_scale_factor * (size if isinstance(size, int) else size[setting == "width"])
    return value


def rescheduled(scheduler: Any, changes: Mapping[str, Any]) -> Any:
    """The scheduler, as what was trained needs it; DDIM where its own kind cannot begin at SNR 0."""
    from diffusers import DDIMScheduler

    if all(scheduler.config.get(key) == value for key, value in changes.items()):
        return scheduler
    known = set(changes) <= set(signature(type(scheduler).__init__).parameters)
    return (type(scheduler) if known else DDIMScheduler).from_config(scheduler.config, **changes)


def _arguments(sampling: Sampling, known: Mapping[str, Any], kind: str) -> dict[str, Any]:
    given = {key: value for key, value in said(sampling) if value not in (None, "")}
    words = {key: next((word for word in _WORDS[key] if word in known), None) for key in given}
    # no rescaling is what a pipeline does that knows none
    if strange := [key for key, word in words.items() if word is None and given[key]]:
        raise AdapterError(f"a {kind} knows no {listed(strange, say=str)}")
    if (given.get("width") is None) != (given.get("height") is None):
        raise AdapterError("width and height are said together")
    sides = [given.get("width") or 0, given.get("height") or 0]
    if _WORDS["steps"][0] in known and any(side % STEP_OF_A_PRIOR for side in sides):
        size = "×".join(map(str, sides))
        raise AdapterError(f"a {kind} draws widths and heights that are multiples of {STEP_OF_A_PRIOR}, not {size}")
    return {word: given[key] for key, word in words.items() if word}


def _alike(wishes: Sequence[Wish]) -> list[list[int]]:
    """The places of the wishes, those of the same weights together."""
    groups: list[list[int]] = []
    for place, wish in enumerate(wishes):
        group = next((group for group in groups if wishes[group[0]].weights == wish.weights), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


@contextmanager
def _acting(carrier: PeftModel | Carriers, weights: Weights | None, merged: bool) -> Iterator[None]:
    # what weighs nothing does not act, so that the base's bits are had
    own: Any = None if weights is None else {name: weight for name, weight in weights.items() if weight != 0}
    with nullcontext() if own is None else carrier.using(own), ExitStack() as undoing:
        if merged and carrier.active_adapters:
            carrier.merge_adapter()
            undoing.callback(carrier.unmerge_adapter)
        yield


def _painted(pipeline: Any, wish: Wish, given: dict[str, Any]) -> Image.Image:
    """One picture. The generator is the CPU's, whose numbers are the same everywhere."""
    for stage in _stages(pipeline):
        stage.scheduler = type(stage.scheduler).from_config(stage.scheduler.config)  # which remembers what it did
    torch.default_generator.manual_seed(wish.seed)  # of samplers that take no other
    try:
        drawn = pipeline(wish.prompt, generator=torch.Generator().manual_seed(wish.seed), output_type="pil", **given)
    except ValueError as error:
        raise AdapterError(f"a {type(pipeline).__name__} cannot draw this: {error}") from error
    picture = getattr(drawn, "images", [None])[0]
    if not isinstance(picture, Image.Image):
        raise AdapterError(f"a {type(pipeline).__name__} makes no pictures by itself: it needs its decoder")
    return picture


def _watched(progress: Progress, done: int, every: int) -> Callable[..., dict[str, Any]]:
    """What a pipeline calls after each step."""

    def step(stage: Any, number: int, t: Any, held: dict[str, Any]) -> dict[str, Any]:
        steps = getattr(stage, "num_timesteps", 0) or number + 2
        progress(done + min(0.99, (number + 1) / steps), every)
        return {}

    return step


@contextmanager
def _still(pipeline: Any) -> Iterator[None]:
    """Inside, no dropout and no progress bars; schedulers, modes and the random state are the same after."""
    stages = _stages(pipeline)
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    training = [module for model in models for module in model.modules() if module.training]
    schedulers = [(stage, stage.scheduler) for stage in stages]
    bars = [(stage, getattr(stage, "_progress_bar_config", {})) for stage in stages]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            for stage, config in bars:
                stage.set_progress_bar_config(**{**config, "disable": True})
            for model in models:
                model.eval()
            yield
        finally:
            for module in training:
                module.training = True
            for stage, scheduler in schedulers:
                stage.scheduler = scheduler
            for stage, config in bars:
                stage.set_progress_bar_config(**config)


def _stages(pipeline: Any) -> list[Any]:
    """The pipelines that have a scheduler: those inside of one, or the pipeline itself."""
    return [getattr(pipeline, name) for name in _STAGES if hasattr(pipeline, name)] or [pipeline]
