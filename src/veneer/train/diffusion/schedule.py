"""ᾱ(t), the share of a picture's variance that is left at timestep t, and what the denoiser says of it."""

from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from veneer.core.errors import AdapterError, listed, shown
from veneer.train.diffusion.objective_settings import ZERO_SNR, ObjectiveSettings

Prediction = Literal["epsilon", "v_prediction", "sample"]


class Schedule(ABC):
    """SNR(t) = ᾱ(t) / (1 - ᾱ(t)), for t from 0 to below `length`."""

    length: float
    whole: bool  # timesteps are whole numbers
    prediction: Prediction

    @abstractmethod
    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ of timesteps of any shape, in fp32, or in fp64 where they are."""

    @abstractmethod
    def sampling(self) -> dict[str, Any]:
        """What a sampler's config must say to undo this schedule."""


class Discrete(Schedule):
    """ᾱ(t) = ∏ (1 - β), over the timesteps until t (Ho et al. 2020, arXiv:2006.11239)."""

    whole = True

    def __init__(self, betas: Tensor, prediction: Prediction, zero_terminal: bool = False) -> None:
        """With `zero_terminal`, √ᾱ is shifted and scaled so that its last is 0 and its first stays (Lin et al. 2023,
        arXiv:2305.08891); a table whose last is 0 already stays as it is.
        """
        self.table = torch.cumprod(1 - betas.float().cpu(), 0)  # (timesteps,), rounded as the samplers have it
        self.prediction, self.length, self.zero_terminal = prediction, len(betas), zero_terminal
        if zero_terminal:
            root = self.table.double().sqrt()
            self.table = (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).float()

    def alpha_bar(self, t: Tensor) -> Tensor:
        return self.table.to(t.device)[t.long()]

    def sampling(self) -> dict[str, Any]:
        """Where the recipe brings SNR 0 to the end, samplers must begin there, which only trailing timesteps do."""
        ends = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_terminal else {}
        return {"prediction_type": self.prediction, **ends}


class Cosine(Schedule):
    """ᾱ(t) = cos²((t + s) / (1 + s) · π/2) / cos²(s / (1 + s) · π/2), t in [0, 1), between 0.0001 and 0.9999
    (Pernias et al. 2023, arXiv:2306.00637). The denoiser says ε.
    """

    whole, length = False, 1.0
    prediction: Prediction = "epsilon"

    def __init__(self, s: float = 0.008, scaler: float = 1.0) -> None:
        self.s, self.scaler = s, scaler

    def alpha_bar(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        t = 1 - (1 - t) ** self.scaler if self.scaler > 1 else t**self.scaler
        first = torch.cos(torch.tensor(self.s / (1 + self.s) * torch.pi / 2, dtype=t.dtype)) ** 2
        later = torch.cos((t + self.s) / (1 + self.s) * (torch.pi / 2)) ** 2
        return (later / first.to(t.device)).clamp(1e-4, 1 - 1e-4)

    def sampling(self) -> dict[str, Any]:
        return {}


def schedule_of(scheduler: Any, settings: ObjectiveSettings) -> Schedule:
    """The schedule that a base's diffusers scheduler adds noise by, with what a recipe changes of it.

    Raises `AdapterError` for schedulers without one (flow matching, EDM), and where the recipe contradicts it.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind == "DDPMWuerstchenScheduler":
        return _continuous(config.s, config.scaler, settings)
    betas, said = getattr(scheduler, "betas", None), config.get("prediction_type", "epsilon")
    prediction = said if settings.prediction == "auto" else settings.prediction
    if not isinstance(betas, Tensor):
        raise AdapterError(f"the base's {kind} has no betas: flow matching and EDM are not trained")
    if said not in get_args(Prediction):
        known = listed(get_args(Prediction), say=str)
        raise AdapterError(f"the base's {kind} predicts {shown(said)}; what is trained: {known}")
    if settings.zero_terminal_snr and prediction == "epsilon":
        raise AdapterError(f"train.{ZERO_SNR}")
    return Discrete(betas, prediction, settings.zero_terminal_snr)


def _continuous(s: float, scaler: float, settings: ObjectiveSettings) -> Cosine:
    faults = []
    if settings.prediction not in ("auto", "epsilon"):
        faults.append(f"train.prediction={settings.prediction}: Würstchen's sampler knows epsilon alone")
    if settings.zero_terminal_snr:
        faults.append("train.zero_terminal_snr: Würstchen's schedule has no table to rescale, it ends at ᾱ = 0.0001")
    if faults:
        raise AdapterError("; ".join(faults))
    return Cosine(s, scaler)
