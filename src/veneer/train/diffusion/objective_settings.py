"""What recipes say about the objective of a denoiser."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from veneer.core.errors import AdapterError
from veneer.train.settings import Settings, TrainSettings

Timestep = Annotated[float, Field(ge=0)]
PORTION, HUBER_C = 0.25, 0.1  # where a recipe does not say them


class TimestepBias(Settings):
    """Some timesteps are drawn more often, or more seldom, than the others."""

    strategy: Literal["none", "earlier", "later", "range"] = Field(
        "none", description="Which: the first ones, where little noise is added, the last ones, or those of `range`."
    )
    multiplier: float | None = Field(
        None, gt=0, description="How many times as often as the others each of them is drawn."
    )
    portion: float | None = Field(
        None, gt=0, lt=1, description=f"The share of all that are the first or last ones; {PORTION}, if not said."
    )
    range: tuple[Timestep, Timestep] | None = Field(None, description="From the one to below the other.")

    def problems(self) -> list[str]:
        """What does not go together."""
        found = []
        if self.strategy == "none":
            idle = [name for name in ("multiplier", "portion", "range") if getattr(self, name) is not None]
            found += [f"timestep_bias.{name} does nothing without timestep_bias.strategy" for name in idle]
        elif self.multiplier is None:
            found.append(f"timestep_bias.strategy={self.strategy} needs timestep_bias.multiplier")
        if self.strategy == "range" and self.range is None:
            found.append("timestep_bias.strategy=range needs timestep_bias.range")
        if self.strategy == "range" and self.portion is not None:
            found.append("timestep_bias.portion is for earlier and later; a range says its own ends")
        if self.strategy in ("earlier", "later") and self.range is not None:
            found.append(f"timestep_bias.range is for the strategy range, not {self.strategy}")
        return found


class ObjectiveSettings(TrainSettings):
    """The `train` part for text-to-image."""

    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        "auto", description="What the denoiser says of a noisy picture; auto: what the base's scheduler says."
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Weigh each timestep as min(SNR, γ) of the picture's own error (min-SNR-γ); 5 is usual."
    )
    offset_noise: float = Field(
        0.0, ge=0, le=1, description="Add so much of one random number a channel to the noise, which moves brightness."
    )
    input_perturbation: float = Field(
        0.0, ge=0, le=1, description="Mix in noise that is off by so much from the noise that is learned."
    )
    zero_terminal_snr: bool = Field(
        False, description="Rescale the schedule so that nothing is left of the picture at the last timestep."
    )
    timesteps: tuple[Timestep, Timestep] | None = Field(
        None,
        description="Learn timesteps from the one to below the other only; of 1000, mostly, and in [0, 1] for "
        "Würstchen.",
    )
    timestep_bias: TimestepBias = Field(default_factory=TimestepBias)
    loss: Literal["mse", "huber", "smooth_l1"] = Field(
        "mse", description="Of an element; the smooth ones weigh large errors less."
    )
    huber_c: float | None = Field(
        None, gt=0, le=1, description=f"Where huber and smooth_l1 turn from squares to lines; {HUBER_C}, if not said."
    )
    huber_schedule: Literal["snr", "exponential", "constant"] | None = Field(
        None, description="How huber_c depends on the timestep; snr, if not said: squares where there is little noise."
    )

    @model_validator(mode="after")
    def _together(self) -> "ObjectiveSettings":
        found = self.timestep_bias.problems()
        if self.loss == "mse":
            idle = [name for name in ("huber_c", "huber_schedule") if getattr(self, name) is not None]
            found += [f"{name} does nothing with loss=mse: set loss to huber or smooth_l1" for name in idle]
        if self.zero_terminal_snr and self.prediction == "epsilon":
            found.append(ZERO_SNR)
        for name, ends in (("timesteps", self.timesteps), ("timestep_bias.range", self.timestep_bias.range)):
            if ends and ends[0] >= ends[1]:
                found.append(f"{name} should rise, found {list(ends)}")
        if found:
            raise AdapterError("; ".join(f"train.{problem}" for problem in found))
        return self


ZERO_SNR = (
    "zero_terminal_snr with prediction=epsilon has nothing to learn where nothing is left of the picture, for the "
    "noise is all that the denoiser sees: set prediction to v_prediction or sample"
)
