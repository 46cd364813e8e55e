"""Objectives of recipes' keys, and a batch for them."""

import torch
from diffusers import DDPMScheduler

from veneer.train.diffusion.draws import Moment, stacked
from veneer.train.diffusion.objective import Objective
from veneer.train.diffusion.objective_settings import ObjectiveSettings
from veneer.train.diffusion.schedule import schedule_of
from veneer.train.settings import checked

SHAPE, T = (4, 6, 5), 1000
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def said(**keys):
    return checked(ObjectiveSettings, keys, "train")


def objective(scheduler=None, **keys):
    settings = said(**keys)
    scheduler = DDPMScheduler(**STABLE) if scheduler is None else scheduler  # Würstchen's has no truth
    return Objective(schedule_of(scheduler, settings), settings)


def batch(own, rows=4, dtype=torch.float64):
    """Latents, what is drawn for them, and a denoiser's answer."""
    source = torch.Generator().manual_seed(7)
    x, answer = torch.randn(2, rows, *SHAPE, generator=source, dtype=dtype)
    return x, stacked([own.draw(SHAPE, row, Moment(3)) for row in range(rows)]), answer
