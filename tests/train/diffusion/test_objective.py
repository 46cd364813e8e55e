"""Objectives are their formulas, in float64, and what diffusers' own schedulers add and say."""

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

from veneer import AdapterError
from veneer.train.diffusion.draws import stacked
from veneer.train.diffusion.objective import Objective
from veneer.train.diffusion.objective_settings import ObjectiveSettings
from veneer.train.diffusion.schedule import Cosine, schedule_of
from veneer.train.diffusion.timesteps import Timesteps
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
    return x, stacked([own.draw(SHAPE, 3, row) for row in range(rows)]), answer


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


def snr(own, t):
    left = own.schedule.alpha_bar(t).double()
    return left / (1 - left)


# of the error of the picture that the answer stands for: min(SNR, γ), by the relation of each prediction to it
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_pictures_own_error_alike_whatever_is_predicted(prediction, gamma):
    own = objective(prediction=prediction, min_snr_gamma=gamma)
    x, draw, answer = batch(own)
    kept, added = (value.sqrt().view(-1, 1, 1, 1).double() for value in _shares(own, draw.t))
    noisy = kept * x + added * draw.noise
    picture = {
        "epsilon": (noisy - added * answer) / kept,
        "v_prediction": kept * noisy - added * answer,
        "sample": answer,
    }[prediction]
    expected = torch.minimum(snr(own, draw.t), torch.tensor(gamma)) * (picture - x).square().mean((1, 2, 3))
    assert torch.allclose(own.loss(answer, x, draw), expected, rtol=1e-5)


def _shares(own, t):
    left = own.schedule.alpha_bar(t)
    return left, 1 - left


@pytest.mark.parametrize(("prediction", "at_zero"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)], ids=str)
def test_min_snr_is_finite_at_snr_0_and_near_infinity(prediction, at_zero):
    scheduler = DDPMScheduler(**STABLE, rescale_betas_zero_snr=True, prediction_type=prediction)
    own = objective(scheduler, min_snr_gamma=5)
    weights = own.weights(torch.arange(T))
    assert weights[-1] == at_zero
    assert weights.isfinite().all()
    own.schedule.table[0] = 1.0
    assert own.weights(torch.tensor([0])).isfinite().all()
    assert torch.equal(objective(scheduler).weights(torch.arange(T)), torch.ones(T))


def test_min_snr_in_wuerstchens_continuous_time():
    own = objective(DDPMWuerstchenScheduler(), min_snr_gamma=5)
    t = torch.rand(64, dtype=torch.float64)
    assert torch.allclose(own.weights(t), torch.minimum(snr(own, t), torch.tensor(5.0)) / snr(own, t))


def test_min_snr_with_prior_preservation():
    """Σᵢ wᵢ lᵢ / n + λ Σⱼ wⱼ lⱼ / n: a class picture has the weight of its own timestep, not of its partner's."""
    own, prior = objective(prediction="v_prediction", min_snr_gamma=5), 0.7
    n = 3
    x, draw, answer = batch(own, 2 * n)
    by_row = torch.tensor([1.0] * n + [prior] * n, dtype=torch.float64)
    found = (by_row * own.loss(answer, x, draw)).sum() / n
    table, expected = DDPMScheduler(**STABLE).alphas_cumprod.double(), 0.0
    for i in range(2 * n):
        left = table[draw.t[i]]
        velocity = left.sqrt() * draw.noise[i].double() - (1 - left).sqrt() * x[i]
        ratio = left / (1 - left)
        weight = min(ratio, torch.tensor(5.0)) / (ratio + 1)
        expected += (1.0 if i < n else prior) * weight * (answer[i] - velocity).square().mean() / n
    assert len(set(own.weights(draw.t).tolist())) == 2 * n
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
@pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
def test_huber_turns_at_a_c_of_each_pictures_own_timestep(loss, schedule):
    own = objective(loss=loss, huber_schedule=schedule, huber_c=0.2)
    x, draw, answer = batch(own)
    for i in range(4):
        sigma = snr(own, draw.t[i]).item() ** -0.5
        c = {"snr": 0.8 / (1 + sigma) ** 2 + 0.2, "exponential": 0.2 ** (draw.t[i].item() / T), "constant": 0.2}
        c = c[schedule]
        off = answer[i] - draw.noise[i].double()
        expected = 2 * (c if loss == "huber" else 1) * ((off**2 + c**2).sqrt() - c)
        assert own.loss(answer, x, draw)[i].item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_huber_at_snr_0_is_its_own_c():
    scheduler = DDPMScheduler(**STABLE, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    own = objective(scheduler, loss="huber")
    assert own.turn(torch.tensor([T - 1])).tolist() == pytest.approx([0.1])
    assert objective(scheduler, loss="huber", huber_schedule="exponential").turn(torch.tensor([0])).tolist() == [1.0]


def test_smooth_losses_of_small_errors_are_squares_and_keep_float32():
    own = objective(loss="huber", huber_c=1.0, huber_schedule="constant")
    x, draw, _ = batch(own)
    off = 1e-3 * torch.ones_like(x)
    assert torch.allclose(own.loss(draw.noise.double() + off, x, draw), off.square().mean((1, 2, 3)), rtol=1e-5)
    answer = (draw.noise + 0.1).bfloat16()
    assert objective().loss(answer, x.float(), draw).dtype == torch.float32


def test_offset_noise_is_learned_and_moves_whole_channels():
    own, plain = objective(offset_noise=0.1), objective()
    draw, was = own.draw(SHAPE, 3, 1), plain.draw(SHAPE, 3, 1)
    offset = draw.noise - was.noise
    assert torch.allclose(offset, offset.mean((1, 2), keepdim=True).expand(SHAPE), atol=1e-6)
    assert len(set(offset.mean((1, 2)).tolist())) == SHAPE[0]
    assert draw.mixed is draw.noise
    assert torch.equal(draw.t, was.t)
    many = torch.stack([own.draw((256, 1, 1), 0, row).noise - plain.draw((256, 1, 1), 0, row).noise for row in (0, 1)])
    assert many.std().item() == pytest.approx(0.1, rel=0.15)


def test_input_perturbation_is_mixed_in_and_not_learned():
    own, plain = objective(input_perturbation=0.1), objective()
    x, draw, _ = batch(own)
    _, was, _ = batch(plain)
    assert torch.equal(draw.noise, was.noise)
    assert torch.equal(own.target(x, draw), was.noise)
    assert (draw.mixed - draw.noise).std().item() == pytest.approx(0.1, rel=0.15)
    expected = DDPMScheduler(**STABLE).add_noise(x.float(), draw.mixed, draw.t)
    assert torch.equal(own.noisy(x.float(), draw), expected)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(0, 10**6), st.integers(1, 4))
def test_a_rows_draw_is_its_own_however_the_batch_is_split(rows, step, processes):
    own = objective(offset_noise=0.1, input_perturbation=0.1, seed=5)
    whole = {row: own.draw((2, 3), step, row) for row in rows}
    for rank in range(processes):
        for row in rows[rank::processes]:
            again = own.draw((2, 3), step, row)
            assert again.t == whole[row].t
            assert torch.equal(again.noise, whole[row].noise)
            assert torch.equal(again.mixed, whole[row].mixed)


def test_draws_differ_by_seed_step_row_and_time():
    own = objective()
    draws = [
        own.draw(SHAPE, 0, 0),
        own.draw(SHAPE, 1, 0),
        own.draw(SHAPE, 0, 1),
        own.draw(SHAPE, 0, 0, again=1),
        objective(seed=1).draw(SHAPE, 0, 0),
    ]
    assert len({tuple(draw.noise.flatten().tolist()) for draw in draws}) == len(draws)
    assert len({draw.t.item() for draw in draws}) > 1


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


def test_held_out_pictures_are_measured_at_the_middles_of_strata_the_same_whatever_is_learned():
    learns = objective(
        min_snr_gamma=5,
        offset_noise=0.1,
        loss="huber",
        timestep_bias={"strategy": "later", "multiplier": 9},
        timesteps=(200, 1000),
        seed=3,
    )
    own, other = learns.measured(), objective(timesteps=(200, 1000)).measured()
    rows, times = 5, 4
    draws = [own.held_out(SHAPE, row, rows, times) for row in range(rows)]
    assert sorted(draw.t.item() for each in draws for draw in each) == [220 + 40 * k for k in range(rows * times)]
    for each in draws:
        assert [int((draw.t.item() - 200) // 200) for draw in each] == list(range(times))
    theirs = other.held_out(SHAPE, 2, rows, times)
    assert all(torch.equal(a.noise, b.noise) and a.t == b.t for a, b in zip(draws[2], theirs, strict=True))
    x, draw, answer = batch(own)
    assert torch.allclose(own.loss(answer, x, draw), (answer - draw.noise).square().mean((1, 2, 3)))


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
