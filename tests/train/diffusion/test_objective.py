"""Losses are their formulas, in float64; what is drawn for a row is its own."""

import pytest
import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler
from hypothesis import given
from hypothesis import strategies as st

from train.diffusion.objectives import SHAPE, STABLE, T, batch, objective
from veneer.train.diffusion.draws import Moment


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
    draw, was = own.draw(SHAPE, 1, Moment(3)), plain.draw(SHAPE, 1, Moment(3))
    offset = draw.noise - was.noise
    assert torch.allclose(offset, offset.mean((1, 2), keepdim=True).expand(SHAPE), atol=1e-6)
    assert len(set(offset.mean((1, 2)).tolist())) == SHAPE[0]
    assert draw.mixed is draw.noise
    assert torch.equal(draw.t, was.t)
    tall = (256, 1, 1)
    pairs = [(own.draw(tall, row, Moment(0)), plain.draw(tall, row, Moment(0))) for row in (0, 1)]
    many = torch.stack([offset.noise - noise.noise for offset, noise in pairs])
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
    whole = {row: own.draw((2, 3), row, Moment(step)) for row in rows}
    for rank in range(processes):
        for row in rows[rank::processes]:
            again = own.draw((2, 3), row, Moment(step))
            assert again.t == whole[row].t
            assert torch.equal(again.noise, whole[row].noise)
            assert torch.equal(again.mixed, whole[row].mixed)


def test_draws_differ_by_seed_step_row_and_time():
    own = objective()
    draws = [
        own.draw(SHAPE, 0, Moment(0)),
        own.draw(SHAPE, 0, Moment(1)),
        own.draw(SHAPE, 1, Moment(0)),
        own.draw(SHAPE, 0, Moment(0, 1)),
        objective(seed=1).draw(SHAPE, 0, Moment(0)),
    ]
    assert len({tuple(draw.noise.flatten().tolist()) for draw in draws}) == len(draws)
    assert len({draw.t.item() for draw in draws}) > 1


def test_the_timesteps_of_a_step_lie_in_a_stratum_each_and_the_noise_does_not_care():
    own = objective(timesteps=(200, 1000))
    draws = [own.draw(SHAPE, row, Moment(3, 0, (row, 8))) for row in range(8)]
    assert [(draw.t.item() - 200) // 100 for draw in draws] == list(range(8))
    assert all(torch.equal(draw.noise, own.draw(SHAPE, row, Moment(3)).noise) for row, draw in enumerate(draws))


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
