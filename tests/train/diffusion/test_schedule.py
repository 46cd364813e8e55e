"""Noise is added as diffusers' own schedulers add it; timesteps come as often as recipes say; nonsense is refused."""

import math
from collections import Counter

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from train.diffusion.objectives import STABLE, T, batch, objective, said
from veneer import AdapterError
from veneer.train.diffusion.schedule import Cosine, schedule_of
from veneer.train.diffusion.timesteps import Timesteps

SCHEDULERS = {
    "stable": lambda **keys: DDPMScheduler(**STABLE, **keys),
    "linear": lambda **keys: DDPMScheduler(**keys),
    "cosine": lambda **keys: DDPMScheduler(beta_schedule="squaredcos_cap_v2", **keys),
    "sigmoid": lambda **keys: DDPMScheduler(beta_schedule="sigmoid", **keys),
    "short": lambda **keys: DDPMScheduler(num_train_timesteps=50, **keys),
    "trained": lambda **keys: DDPMScheduler(trained_betas=[0.01 * k for k in range(1, 41)], **keys),
    "rescaled": lambda **keys: DDIMScheduler(**STABLE, rescale_betas_zero_snr=True, **keys),
    "pndm": lambda **keys: PNDMScheduler(**STABLE, skip_prk_steps=True, **keys),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_added_as_the_bases_scheduler_adds_it_to_the_bit(name, prediction):
    scheduler = SCHEDULERS[name](prediction_type=prediction)
    own = objective(scheduler)
    x, draw, _ = batch(own, 8, torch.float32)
    assert own.schedule.prediction == prediction
    assert torch.equal(own.noisy(x, draw), scheduler.add_noise(x, draw.noise, draw.t))
    if prediction == "epsilon":
        assert torch.equal(own.target(x, draw), draw.noise)
    elif hasattr(scheduler, "get_velocity"):
        assert torch.equal(own.target(x, draw), scheduler.get_velocity(x, draw.noise, draw.t))


def test_latents_in_half_precision_are_made_noisy_in_float32():
    own = objective()
    x, draw, _ = batch(own, 8, torch.bfloat16)
    assert torch.equal(own.noisy(x, draw), own.noisy(x.float(), draw))
    assert own.target(x, draw).dtype == torch.float32


def test_a_sampler_that_lifts_the_last_alpha_learns_from_zero():
    lifted = EulerDiscreteScheduler(**STABLE, rescale_betas_zero_snr=True)
    assert lifted.alphas_cumprod[-1] > 0
    assert schedule_of(lifted, said()).table[-1] == 0


@pytest.mark.parametrize("scaler", [0.5, 1.0, 2.0])
def test_wuerstchens_noise_is_added_as_its_scheduler_adds_it(scaler):
    scheduler = DDPMWuerstchenScheduler(scaler=scaler)
    own = objective(scheduler)
    x, draw, _ = batch(own, 16, torch.float32)
    assert draw.t.dtype == torch.float32
    assert torch.allclose(own.noisy(x, draw), scheduler.add_noise(x, draw.noise, draw.t), atol=1e-6)
    ends = own.schedule.alpha_bar(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.9999, 0.0001])
    t = torch.rand(5, dtype=torch.float64)
    plain = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(Cosine().alpha_bar(t), plain.clamp(1e-4, 1 - 1e-4), rtol=1e-12)


def test_zero_terminal_snr_is_lins_formula_and_changes_nothing_twice():
    scheduler = DDPMScheduler(**STABLE)
    own = schedule_of(scheduler, said(zero_terminal_snr=True, prediction="v_prediction"))
    root = torch.cumprod(1 - scheduler.betas.double(), 0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert own.table[-1] == 0
    assert torch.allclose(own.table.double(), expected, atol=1e-5)
    rescaled = DDPMScheduler(**STABLE, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert torch.allclose(own.table, rescaled.alphas_cumprod, atol=1e-5)
    assert torch.equal(schedule_of(rescaled, said(zero_terminal_snr=True)).table, rescaled.alphas_cumprod)
    again = DDIMScheduler.from_config(scheduler.config, **own.sampling())
    assert torch.allclose(own.table, again.alphas_cumprod, atol=1e-5)
    assert again.config.timestep_spacing == "trailing"


def probabilities(own, length):
    """Of each timestep, by how much of [0, 1) leads to it."""
    fine = 40 * length
    found = Counter(own.at((k + 0.5) / fine).item() for k in range(fine))
    return torch.tensor([found[t] / fine for t in range(length)])


BIASES = {
    "none": ({}, lambda t: 1.0),
    "earlier": ({"strategy": "earlier", "multiplier": 3}, lambda t: 3.0 if t < 5 else 1.0),
    "later": ({"strategy": "later", "multiplier": 0.5, "portion": 0.4}, lambda t: 0.5 if t >= 12 else 1.0),
    "range": ({"strategy": "range", "multiplier": 4, "range": [6, 9]}, lambda t: 4.0 if 6 <= t < 9 else 1.0),
}


@pytest.mark.parametrize("ends", [None, (2, 16)], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_timesteps_are_drawn_as_often_as_their_weights_say(name, ends):
    keys, weight = BIASES[name]
    settings = said(timestep_bias=keys, **({"timesteps": ends} if ends else {}))
    own = Timesteps(schedule_of(DDPMScheduler(num_train_timesteps=20), settings), settings)
    low, high = ends or (0, 20)
    weights = torch.tensor([weight(t) if low <= t < high else 0.0 for t in range(20)])
    assert torch.allclose(probabilities(own, 20), weights / weights.sum(), atol=2e-3)


def test_timesteps_of_continuous_time_stay_in_their_range():
    settings = said(timesteps=(0.25, 0.75), timestep_bias={"strategy": "later", "multiplier": 3, "portion": 0.5})
    own = Timesteps(Cosine(), settings)
    found = torch.stack([own.at((k + 0.5) / 1000) for k in range(1000)])
    assert found.min() >= 0.25
    assert found.max() < 0.75
    assert (found >= 0.5).float().mean().item() == pytest.approx(0.75, abs=2e-3)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, T - 1), st.integers(1, T))
def test_every_number_leads_to_a_timestep_of_the_range(u, low, length):
    settings = said(timesteps=(low, min(low + length, T)))
    t = Timesteps(schedule_of(DDPMScheduler(), settings), settings).at(u)
    assert low <= t < min(low + length, T)


CONTRADICTIONS = {
    "epsilon at SNR 0": ({"zero_terminal_snr": True, "prediction": "epsilon"}, "nothing to learn"),
    "the base's epsilon at SNR 0": ({"zero_terminal_snr": True}, "nothing to learn"),
    "a c of squares": ({"huber_c": 0.1}, "huber_c does nothing with loss=mse"),
    "a schedule of squares": ({"huber_schedule": "snr"}, "huber_schedule does nothing with loss=mse"),
    "falling timesteps": ({"timesteps": [5, 5]}, "timesteps should rise"),
    "too many timesteps": ({"timesteps": [0, 1001]}, "timesteps should be within 0 to 1000, whole numbers"),
    "half timesteps": ({"timesteps": [0, 0.5]}, "timesteps should be within 0 to 1000, whole numbers"),
    "a bias without a multiplier": ({"timestep_bias": {"strategy": "later"}}, "needs timestep_bias.multiplier"),
    "a multiplier without a bias": ({"timestep_bias": {"multiplier": 2}}, "does nothing without"),
    "a range for later": (
        {"timestep_bias": {"strategy": "later", "multiplier": 2, "range": [0, 5]}},
        "is for the strategy range, not later",
    ),
    "a range without ends": ({"timestep_bias": {"strategy": "range", "multiplier": 2}}, "needs timestep_bias.range"),
    "a bias to what is not learned": (
        {"timestep_bias": {"strategy": "earlier", "multiplier": 2}, "timesteps": [500, 1000]},
        "prefers none of the timesteps",
    ),
    "a bias to all": (
        {"timestep_bias": {"strategy": "later", "multiplier": 2}, "timesteps": [800, 1000]},
        "prefers all of the timesteps",
    ),
    "a range that is not there": (
        {"timestep_bias": {"strategy": "range", "multiplier": 2, "range": [900, 1100]}},
        "timestep_bias.range should be within 0 to 1000",
    ),
    "no such multiplier": ({"timestep_bias": {"strategy": "later", "multiplier": 0}}, "multiplier"),
}


@pytest.mark.parametrize(("keys", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_does_not_go_together_is_refused(keys, words):
    with pytest.raises(AdapterError, match=words):
        objective(**keys)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(AdapterError) as error:
        objective(huber_c=0.1, timesteps=[7, 3], timestep_bias={"strategy": "range"})
    assert str(error.value).count("train.") == 4


@pytest.mark.parametrize(
    ("scheduler", "keys", "words"),
    [
        (FlowMatchEulerDiscreteScheduler, {}, "no betas"),
        (DDPMWuerstchenScheduler, {"prediction": "v_prediction"}, "knows epsilon alone"),
        (DDPMWuerstchenScheduler, {"prediction": "v_prediction", "zero_terminal_snr": True}, "no table to rescale"),
        (lambda: DDPMScheduler(prediction_type="flow"), {}, "predicts 'flow'"),
    ],
    ids=["flow", "wuerstchen-v", "wuerstchen-snr", "unknown"],
)
def test_schedulers_that_do_not_fit_are_refused(scheduler, keys, words):
    with pytest.raises(AdapterError, match=words):
        objective(scheduler(), **keys)


def test_settings_said_in_full_are_read_again():
    own = said(min_snr_gamma=5, timestep_bias={"strategy": "later", "multiplier": 2})
    assert said(**own.model_dump(mode="json")) == own
    assert said(**said().model_dump(mode="json")) == said()
