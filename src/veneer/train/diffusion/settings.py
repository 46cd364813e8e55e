"""What a recipe of text-to-image says."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.diffusion.objective_settings import ObjectiveSettings
from veneer.train.settings import EvalSettings, Recipe, Settings


class EncoderSettings(Settings):
    """The `text_encoder` part of a recipe."""

    r: int = Field(0, ge=0, description="The rank in the text encoders; 0: they do not learn.")
    lora_alpha: float | None = Field(None, gt=0, description="Theirs; the same as their rank, if not said.")
    lr: float | None = Field(
        None, gt=0, le=10, description="The highest learning rate of the text encoders; train.lr, if not said."
    )
    target_modules: str | list[str] = Field(
        "attention", description="Which of their layers: attention, kohya (attention and MLP), all, or names."
    )

    @model_validator(mode="after")
    def _learns(self) -> "EncoderSettings":
        idle = [name for name in ("lora_alpha", "lr") if getattr(self, name) is not None]
        if idle and not self.r:
            told = ", ".join(f"text_encoder.{name}" for name in idle)
            raise AdapterError(f"{told} does nothing while the text encoders do not learn: set text_encoder.r")
        return self


class SampleSettings(Settings):
    """The `sample` part for text-to-image: pictures before, during and after the training, from fixed seeds."""

    prompts: list[str] = Field(
        default_factory=list, description="What is drawn; without any, captions that are learned from."
    )
    negative_prompt: str = Field("", description="What the pictures are led away from.")
    count: int = Field(4, ge=0, description="How many captions are drawn where no prompts are said; 0 draws nothing.")
    seeds: list[int] = Field(
        default_factory=lambda: [0], min_length=1, description="A picture of each prompt for each."
    )
    steps: int = Field(25, ge=1, description="Steps of the sampler.")
    guidance: float = Field(7.5, ge=0, description="How much further than the prompt itself leads (classifier-free).")
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="Bring the guided picture back to the contrast of the unguided one, so much."
    )
    width: int | None = Field(None, ge=8, description="Of the pictures; data.resolution, if not said.")
    height: int | None = Field(None, ge=8, description="In the same way.")
    strengths: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=list,
        description="The sheet also shows the adapter at these, a row each, between the base and the adapter as it is.",
    )
    every_steps: int | None = Field(None, ge=1, description="Also draw during the training, every so many steps.")


class HeldOutSettings(EvalSettings):
    """The `eval` part for text-to-image: the held-out loss at fixed timesteps and noises."""

    rows: int | None = Field(100, ge=1, description="Held-out pictures that are measured; null for all.")
    timesteps: int = Field(8, ge=1, description="Each picture is measured at so many timesteps, evenly spread.")
    looks: bool = Field(
        False,
        description="Also measure how the drawn pictures look, before and after: saturation, ink, distance to the "
        "style's own (those held out, or else those that are learned), and what stays of the base's shapes.",
    )


class TextToImageRecipe(Recipe):
    """A recipe of the task text-to-image."""

    adapter: LoraConfig = Field(
        default_factory=lambda: LoraConfig(r=16, lora_alpha=16, target_modules="attention"),
        description="LoraConfig's own fields, for the denoiser; target_modules also says attention, kohya, "
        "kohya+conv or all.",
    )
    text_encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    data: CaptionedData
    train: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    eval: HeldOutSettings = Field(default_factory=HeldOutSettings)
    sample: SampleSettings = Field(default_factory=SampleSettings)

    @field_validator("quantization")
    @classmethod
    def _whole(cls, quantization: str) -> str:
        if quantization != "none":
            raise AdapterError("quantization: the parts of a pipeline are not quantised; leave it out")
        return quantization

    @model_validator(mode="after")
    def _targets(self) -> "TextToImageRecipe":
        if self.adapter.target_modules is None and not self.adapter.target_parameters:
            self.adapter.target_modules = "attention"
        return self
