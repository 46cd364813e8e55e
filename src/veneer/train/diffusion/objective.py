"""What a denoiser learns: to say of √ᾱ x + √(1-ᾱ) ε what ε, v or x is. No model is known here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.train.diffusion.draws import Draw, Moment, generator
from veneer.train.diffusion.objective_settings import HUBER_C, ObjectiveSettings
from veneer.train.diffusion.schedule import Schedule
from veneer.train.diffusion.timesteps import Timesteps


class Objective:
    """w(t) · mean over a picture's elements of loss(answer - target).

    | prediction | target | weight of min-SNR-γ |
    |---|---|---|
    | epsilon | ε | min(SNR, γ) / SNR |
    | v_prediction | √ᾱ ε - √(1-ᾱ) x | min(SNR, γ) / (SNR + 1) |
    | sample | x | min(SNR, γ) |

    The three weights are one, min(SNR, γ) of ‖x - x̂‖² (Hang et al. 2023, arXiv:2303.09556), as ε̂ and v̂ are off by
    √SNR and √(SNR + 1) times what x̂ is off. Each picture has its own: also class pictures, whose weight comes on top.
    """

    def __init__(self, schedule: Schedule, settings: ObjectiveSettings) -> None:
        """Raises `AdapterError` for timesteps that the schedule does not have."""
        self.schedule, self.settings = schedule, settings
        self.timesteps = Timesteps(schedule, settings)

    def measured(self) -> "Objective":
        """What held-out pictures are measured by, the same whatever else a recipe says and whatever its seed: the mean
        square of what the denoiser is off, over the timesteps that are learned, all alike.
        """
        return Objective(self.schedule, ObjectiveSettings(timesteps=self.settings.timesteps))

    def draw(self, shape: Sequence[int], row: int, moment: Moment) -> Draw:
        """What is drawn for a row, whose latents are of `shape`.

        The timestep is one of the row's stratum: those of a step are spread evenly, which makes its loss and gradient
        less random, and each row's own is as often here as there (Kingma et al. 2021, arXiv:2107.00630, I.1). Learned
        is ε ~ N(0, 1) + offset · one N(0, 1) a channel, mixed in ε + perturbation · N(0, 1) (Ning et al. 2023,
        arXiv:2301.11706). Each has a source of its own: one option changes nothing of what others draw.
        """
        own, where, (place, places) = self.settings, (moment.step, row, moment.turn), moment.stratum
        within = torch.rand((), generator=generator(own.seed, "timestep", *where)).item()
        t = self.timesteps.at((place + within) / places)
        noise = torch.randn(*shape, generator=generator(own.seed, "noise", *where))
        if own.offset_noise:
            offset = torch.randn(shape[0], generator=generator(own.seed, "offset", *where))
            noise += own.offset_noise * _beside(offset, noise)
        mixed = noise
        if own.input_perturbation:
            more = torch.randn(*shape, generator=generator(own.seed, "perturbation", *where))
            mixed = noise + own.input_perturbation * more
        return Draw(t, noise, mixed)

    def held_out(self, shape: Sequence[int], row: int, rows: int, times: int) -> list[Draw]:
        """What a held-out picture, number `row` of `rows`, is measured at: the same in every measurement.

        Of the `rows · times` timesteps each is the middle of a stratum of its own, and each picture has one in each
        `times`-th part of them.
        """
        found = []
        for part in range(times):
            noise = torch.randn(*shape, generator=generator(self.settings.seed, "held out", row, part))
            found.append(Draw(self.timesteps.at((part + (row + 0.5) / rows) / times), noise, noise))
        return found

    def noisy(self, x: Tensor, draw: Draw) -> Tensor:
        """√ᾱ x + √(1-ᾱ) (ε + perturbation), for latents x `(n, …)`, in fp32 or wider."""
        x = _wide(x)
        kept, added = self._shares(x, draw.t)
        return kept * x + added * draw.mixed.to(x)

    def target(self, x: Tensor, draw: Draw) -> Tensor:
        """What the denoiser should say: ε, √ᾱ ε - √(1-ᾱ) x (Salimans & Ho 2022, arXiv:2202.00512), or x."""
        x = _wide(x)
        noise = draw.noise.to(x)
        kept, added = self._shares(x, draw.t)
        return {"epsilon": noise, "sample": x}.get(self.schedule.prediction, kept * noise - added * x)

    def weights(self, t: Tensor) -> Tensor:
        """min-SNR-γ's weights `(n,)`; 1 without it. Written in ᾱ, they are finite also where SNR is 0 or ∞: at SNR 0, 1
        for epsilon (their limit), 0 for v and sample.
        """
        left = self.schedule.alpha_bar(t)
        gamma = self.settings.min_snr_gamma
        if gamma is None:
            return torch.ones_like(left)
        if self.schedule.prediction == "epsilon":
            return (gamma * (1 - left) / left).clamp(max=1)
        if self.schedule.prediction == "sample":
            return (left / (1 - left)).clamp(max=gamma)
        return torch.minimum(left, gamma * (1 - left))

    def loss(self, answer: Tensor, x: Tensor, draw: Draw) -> Tensor:
        """Of each picture `(n,)`, in fp32 or wider: of `(n, …)` elements off by d, the mean of d²; of
        2c (√(d² + c²) - c) for huber; of 2 (√(d² + c²) - c) for smooth_l1, which is 2 d² / (√(d² + c²) + c).
        """
        off = _wide(answer) - self.target(x, draw)
        squares = off.square()
        if self.settings.loss != "mse":
            c = _beside(self.turn(draw.t).to(off), off)
            squares = 2 * squares / ((squares + c**2).sqrt() + c) * (c if self.settings.loss == "huber" else 1)
        means: Tensor = squares.flatten(1).mean(1)
        return means * self.weights(draw.t).to(means)

    def turn(self, t: Tensor) -> Tensor:
        """Where squares turn to lines, c `(n,)`: constant; exponential, c^(t / length); or snr, (1-c) / (1+σ)² + c with
        σ² = 1 / SNR.
        """
        c, left = self.settings.huber_c or HUBER_C, self.schedule.alpha_bar(t)
        if self.settings.huber_schedule == "constant":
            return torch.full_like(left, c)
        if self.settings.huber_schedule == "exponential":
            return c ** (t.to(left) / self.schedule.length)
        return (1 - c) / (1 + ((1 - left) / left).sqrt()) ** 2 + c

    def _shares(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1-ᾱ), to multiply x `(n, …)` by."""
        left = self.schedule.alpha_bar(t)
        return _beside(left.sqrt(), x).to(x), _beside((1 - left).sqrt(), x).to(x)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """Values `(n,)`, of the first dimension of x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
