"""Thin and whole matrices: singular values, ranks and inner products, against those of the dense matrix."""

import math

import pytest
import torch

from veneer import AdapterError
from veneer.combine.matrix import Keep, Thin, factored, inner, weighted, whole

ALL = Keep()


def thin(out: int, r: int, columns: int) -> Thin:
    return Thin(torch.randn(out, r, dtype=torch.float64), torch.randn(r, columns, dtype=torch.float64))


def near(rank: int, out: int, columns: int, noise: float) -> torch.Tensor:
    return whole(thin(out, rank, columns)) + noise * torch.randn(out, columns, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(30, 4, 20), (20, 4, 30), (6, 9, 20), (20, 9, 6), (5, 5, 5)])
@pytest.mark.parametrize("is_whole", [False, True])
def test_of_everything_nothing_is_lost_and_the_rank_is_the_numerical_one(shape, is_whole):
    W = thin(*shape)
    found = factored(whole(W) if is_whole else W, ALL, torch.float64)
    assert found.A.shape[0] == torch.linalg.matrix_rank(whole(W)) == min(shape)
    torch.testing.assert_close(found.B @ found.A, whole(W))
    torch.testing.assert_close(found.B.T @ found.B, found.A @ found.A.T)  # balanced
    assert found.square == pytest.approx(float(whole(W).square().sum()))


def test_the_same_factors_twice_have_the_rank_of_one():
    W = thin(30, 4, 20)
    found = factored(weighted([(0.5, W), (-2.0, W)]), ALL, torch.float32)
    assert len(found.A) == 4
    torch.testing.assert_close((found.B @ found.A).double(), -1.5 * whole(W), rtol=1e-5, atol=1e-5)


def test_what_cancels_is_zero_of_rank_one():
    W = thin(30, 4, 20)
    zero = factored(weighted([(1.0, W), (-1.0, W)]), ALL, torch.float64)
    assert float((zero.B @ zero.A).norm()) < 1e-12
    empty = factored(Thin(torch.zeros(5, 2), torch.zeros(2, 4)), ALL, torch.float32)
    assert (empty.B.shape, empty.A.shape, empty.lost) == ((5, 1), (1, 4), 0)


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_error_of_a_rank_is_the_tail_of_the_singular_values(k, is_whole):
    W = thin(30, 8, 20)
    S = torch.linalg.svdvals(whole(W))
    found = factored(whole(W) if is_whole else W, Keep(rank=k), torch.float64)
    assert found.lost == pytest.approx(float(S[k:].square().sum()))
    assert float((whole(W) - found.B @ found.A).square().sum()) == pytest.approx(found.lost)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_search_comes_near_the_best_and_repeats_to_the_bit(shape):
    W = near(6, *shape, noise=0.05)
    best = float(torch.linalg.svdvals(W)[6:].square().sum())
    found, again = (factored(W, Keep(rank=6), torch.float64) for _ in "12")
    assert best <= found.lost * (1 + 1e-9)
    assert found.lost == pytest.approx(best, rel=2e-3)
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)


def test_a_flat_spectrum_is_found_too():
    W = torch.randn(200, 160, dtype=torch.float64)
    best = float(torch.linalg.svdvals(W)[10:].square().sum())
    assert factored(W, Keep(rank=10), torch.float64).lost == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("told", [{"energy": 0.9}, {"ratio": 0.05}, {"energy": 0.99, "rank": 30}])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_search_finds_how_many_are_kept(shape, told):
    left, right = (torch.linalg.qr(torch.randn(side, 200, dtype=torch.float64)).Q for side in shape)
    S = 0.8 ** torch.arange(200, dtype=torch.float64)
    W = (left * S) @ right.T
    found = factored(W, Keep(**told), torch.float64)
    exact = Keep(**told).count(S, float(S.square().sum()), 1e-12)
    assert len(found.A) == exact
    assert found.lost == pytest.approx(float(S[exact:].square().sum()), rel=2e-3)


@pytest.mark.parametrize("shape", [(300, 160), (160, 300)])
def test_large_matrices_are_decomposed_by_their_gram_matrix(shape):
    W = torch.randn(shape)
    S = torch.linalg.svdvals(W.double())
    found = factored(W, Keep(cumulative=0.7), torch.float32)
    wanted = int((S.cumsum(0) < 0.7 * S.sum()).sum()) + 1
    assert len(found.A) == wanted
    assert found.lost == pytest.approx(float(S[wanted:].square().sum()), rel=1e-5)
    low = whole(thin(shape[0], 5, shape[1])).float()
    assert len(factored(low, ALL, torch.float32).A) == 5


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (Keep(rank=2), 2),
        (Keep(ratio=0.5), 2),
        (Keep(ratio=0.2), 3),
        (Keep(energy=0.9), 2),  # 64 + 16 = 80 of 85 (0.94)
        (Keep(energy=0.95), 3),
        (Keep(frobenius=math.sqrt(0.95)), 3),
        (Keep(cumulative=0.8), 2),  # 12 of 15
        (Keep(cumulative=0.81), 3),
        (Keep(rank=1, energy=0.95), 1),
        (Keep(energy=0.9, cumulative=0.81), 2),
        (ALL, 4),
    ],
)
def test_how_many_are_kept(keep, wanted):
    S = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    W = Thin(torch.eye(6, dtype=torch.float64)[:, :5] * S, torch.eye(5, dtype=torch.float64))
    assert len(factored(W, keep, torch.float32).A) == wanted


def test_a_share_that_is_none_is_refused():
    with pytest.raises(AdapterError, match=r"ratio should be above 0 and at most 1, found 20: .* is 1 / 20 here"):
        Keep(ratio=20)
    with pytest.raises(AdapterError, match=r"rank should be a whole number .*; energy should be above 0"):
        Keep(rank=0, energy=0.0)


def test_inner_products():
    V, W = thin(30, 4, 20), thin(30, 3, 20)
    wanted = float((whole(V) * whole(W)).sum())
    for one, other in ((V, W), (whole(V), W), (V, whole(W)), (whole(V), whole(W))):
        assert inner(one, other) == pytest.approx(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [ALL, Keep(rank=2)])
def test_the_error_counts_the_rounding_of_what_is_stored(dtype, keep):
    W = thin(30, 4, 20)
    found = factored(W, keep, dtype)
    lost = (whole(W) - found.B.double() @ found.A.double()).square().sum()
    assert found.lost == pytest.approx(float(lost), rel=1e-2)


@pytest.mark.parametrize("share", [1e-6, 1.0, 1e6])
def test_terms_that_cancel_leave_nothing_and_others_all(share):
    W, V = thin(30, 4, 20), thin(30, 2, 20)
    V = Thin(V.B / share, V.A * share)
    nothing = factored(weighted([(0.7, W), (-0.7, W)]), ALL, torch.float32)
    assert (nothing.A.abs().sum(), nothing.B.abs().sum(), len(nothing.A)) == (0, 0, 1)
    rest = factored(weighted([(0.7, W), (1e-3, V), (-0.7, W)]), ALL, torch.float32)
    assert len(rest.A) == 2
    torch.testing.assert_close((rest.B @ rest.A).double(), 1e-3 * whole(V), rtol=1e-5, atol=1e-8)
