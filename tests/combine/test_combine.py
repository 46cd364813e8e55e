"""Every way of combining, against its formula on the dense changes in fp64."""

import pytest
import torch

from veneer import AdapterError
from veneer.apart.changes import changes
from veneer.combine import combine, measured, negate, subtract
from veneer.combine.sparse import dropped, elected, pruned

METHODS = {
    "LORA": ("LORA", 3),
    "rslora": ("LORA", 3, {"use_rslora": True}),
    "LOHA": ("LOHA", 2),
    "LOHA-dense": ("LOHA", 4),
    "LOKR": ("LOKR", 2),
    "FULL": ("FULL", 1),
}
PAIRS = [("LORA", "LORA"), ("rslora", "LOHA"), *(("LORA", name) for name in METHODS), ("FULL", "LOKR")]


@pytest.fixture(params=PAIRS, ids="+".join)
def pair(request, make):
    """Two adapters, on the layer q both, on v only one."""
    first, second = (METHODS[name] for name in request.param)
    return make(q=first, v=first), make(q=second)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -2.5), (-1.0, 0.0)])
@pytest.mark.parametrize("how", ["linear", "cat"])
def test_the_sum_is_exact(pair, deltas, how, weights):
    one, other = map(deltas, pair)
    found = deltas(combine(pair, weights, how))
    torch.testing.assert_close(found["q"], weights[0] * one["q"] + weights[1] * other["q"])
    torch.testing.assert_close(found["v"], weights[0] * one["v"])
    assert found.keys() == {"q", "v"}


def test_the_sum_of_full_matrices_is_full_unless_asked(pair, deltas):
    wanted = 0.7 * deltas(pair[0])["q"] + 0.3 * deltas(pair[1])["q"]
    thin = all(change.update().factors() for adapter in pair for change in changes(adapter).values())
    assert changes(combine(pair, [0.7, 0.3]))["q"].config.peft_type == ("LORA" if thin else "FULL")
    found, errors = measured(pair, [0.7, 0.3], "svd", rank=3)
    S = torch.linalg.svdvals(wanted)
    assert changes(found)["q"].config.r == 3
    assert errors.layers["q"] == pytest.approx(float(S[3:].norm() / S.norm()))
    assert float((deltas(found)["q"] - wanted).norm() / wanted.norm()) == pytest.approx(errors.layers["q"])


def test_the_rank_is_the_numerical_one(make):
    one, other = make(q=("LORA", 3), v=("LORA", 2)), make(q=("LORA", 4))
    ranks = {path: change.config.r for path, change in changes(combine([one, other], [1, 1])).items()}
    assert ranks == {"q": 7, "v": 2}
    again = combine([one, one, other], [1, 2, -3])
    assert changes(again)["q"].config.r == 7
    assert changes(combine([one, one, other], [1, 2, -3], "cat"))["q"].config.r == 10


def test_the_order_does_not_matter(pair, deltas):
    one, other = (deltas(combine(own, w)) for own, w in ((pair, (0.7, -0.3)), (pair[::-1], (-0.3, 0.7))))
    torch.testing.assert_close(one, {path: other[path] for path in one})
    one, other = (
        deltas(combine(own, w, "ties", density=0.4))["q"] for own, w in ((pair, (0.7, -0.3)), (pair[::-1], (-0.3, 0.7)))
    )
    torch.testing.assert_close(one, other)


def test_it_is_linear_in_the_weights(pair, deltas):
    first, second, both = (deltas(combine(pair, w))["q"] for w in ((1.0, 2.0), (-0.5, 1.0), (0.5, 3.0)))
    torch.testing.assert_close(first + second, both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["LORA", "LOHA", "LOKR", "FULL"])
def test_negate_rounds_nothing(make, deltas, method, dtype):
    own = make(q=method)
    own.tensors = {path: {name: (1e-5 * t).to(dtype) for name, t in ts.items()} for path, ts in own.tensors.items()}
    assert torch.equal(deltas(negate(own))["q"], -deltas(own)["q"])
    assert negate(own).config == own.config


def test_negate_and_subtract(pair, deltas):
    one, other = map(deltas, pair)
    torch.testing.assert_close(deltas(negate(pair[0])), {path: -delta for path, delta in one.items()})
    torch.testing.assert_close(deltas(subtract(*pair))["q"], one["q"] - other["q"])
    assert float(deltas(subtract(pair[0], pair[0]))["q"].norm()) < 1e-9


def test_an_energy_is_kept(make, deltas):
    adapters = [make(q=("LORA", 5)), make(q=("LORA", 4))]
    S = torch.linalg.svdvals(sum(0.5 * deltas(adapter)["q"] for adapter in adapters))
    wanted = int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum()) + 1
    found, errors = measured(adapters, [0.5, 0.5], "svd", energy=0.9)
    assert changes(found)["q"].config.r == wanted
    assert errors.total**2 <= 0.1
    assert changes(combine(adapters, [1, 1], "svd"))["q"].config.r == 5  # the largest, if not said


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(pair, deltas, t):
    one, other = (deltas(adapter)["q"] for adapter in pair)
    angle = torch.acos((one * other).sum() / one.norm() / other.norm())
    wanted = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)
    found = deltas(combine(pair, [1 - t, t], "slerp"))
    torch.testing.assert_close(found["q"], wanted)
    torch.testing.assert_close(found["v"], (1 - t) * deltas(pair[0])["v"])


def test_an_arc_needs_two_that_are_not_opposite(make):
    one = make(q="LORA")
    with pytest.raises(AdapterError, match="whose sum is 1, found 1 and 1"):
        combine([one, make(q="LORA")], [1, 1], "slerp")
    with pytest.raises(AdapterError, match="slerp is between two adapters, found 1"):
        combine([one], [1], "slerp")
    with pytest.raises(AdapterError, match="are opposite"):
        combine([one, negate(one)], [0.5, 0.5], "slerp")


def trimmed(D, density):
    least = D.abs().flatten().sort(descending=True).values[round(density * D.numel()) - 1]
    return D * (D.abs() >= least)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_magnitude_prune(pair, deltas, density):
    one, other = (deltas(adapter)["q"] for adapter in pair)
    found = deltas(combine(pair, [0.7, -0.3], "magnitude_prune", density=density))["q"]
    torch.testing.assert_close(found, 0.7 * trimmed(one, density) - 0.3 * trimmed(other, density))


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties(make, deltas, majority):
    adapters = [make(q=METHODS[name]) for name in ("LORA", "LOKR", "FULL")]
    weights = [0.5, 1.0, -0.8]
    each = [w * trimmed(deltas(adapter)["q"], 0.6) for w, adapter in zip(weights, adapters, strict=True)]
    found = deltas(combine(adapters, weights, "ties", density=0.6, majority=majority))["q"]
    for place in [(i, j) for i in range(12) for j in range(10)]:
        entries = [float(one[place]) for one in each if one[place] != 0]
        votes = sum(entries) if majority == "total" else sum((e > 0) - (e < 0) for e in entries) or sum(entries)
        agreeing = [e for e in entries if e * votes > 0]
        wanted = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert float(found[place]) == pytest.approx(wanted)


@pytest.mark.parametrize("how", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_a_weight_may_as_well_stand_in_the_adapter(make, deltas, how):
    one, other = make(q="LORA"), make(q="LORA")
    turned = combine([negate(one), other], [0.5, 0.2], how, density=0.5)
    torch.testing.assert_close(deltas(combine([one, other], [-0.5, 0.2], how, density=0.5)), deltas(turned))


def test_dare_drops_entries_and_keeps_the_expectation(make, deltas):
    one, other = make(q="FULL"), make(q="FULL")
    D = deltas(one)["q"]
    alone = deltas(combine([one], [1], "dare_linear", density=0.25, seed=7))["q"]
    kept = alone != 0
    torch.testing.assert_close(alone[kept], 4 * D[kept])
    draws = [deltas(combine([one], [1], "dare_linear", density=0.25, seed=seed))["q"] for seed in range(300)]
    spread = D.abs() * (0.75 / 0.25 / 300) ** 0.5
    assert (((sum(draws) / 300) - D).abs() < 5 * spread).all()
    both = deltas(combine([one, other], [1, 1], "dare_linear", density=0.25, seed=7))["q"]
    second = (both - alone) != 0
    assert not torch.equal(kept, second)  # each adapter has draws of its own


def test_what_is_drawn_depends_on_the_seed_and_the_layer_alone(make, deltas):
    both = make(q="FULL", v="FULL")
    alone = type(both)(both.config, {"v": both.tensors["v"]})
    told = {"how": "dare_ties", "density": 0.5}
    found = deltas(combine([both], [1], seed=3, **told))
    torch.testing.assert_close(deltas(combine([alone], [1], seed=3, **told))["v"], found["v"], rtol=0, atol=0)
    assert not torch.equal(deltas(combine([both], [1], seed=4, **told))["v"] != 0, found["v"] != 0)
    assert not torch.equal(found["q"] != 0, found["v"] != 0)


def test_what_is_thinned_out_is_factored_where_a_rank_is_given(make, deltas):
    pair = [make(q=("LORA", 4)), make(q=("LORA", 4))]
    whole = deltas(combine(pair, [1, 1], "ties", density=0.5))["q"]
    found, errors = measured(pair, [1, 1], "ties", density=0.5, rank=5)
    S = torch.linalg.svdvals(whole)
    assert errors.layers["q"] == pytest.approx(float(S[5:].norm() / S.norm()))
    assert float((deltas(found)["q"] - whole).norm() / whole.norm()) == pytest.approx(errors.layers["q"])


def test_density_one_is_the_whole():
    D = torch.randn(5, 4)
    assert torch.equal(pruned(D, 1.0), D)
    torch.testing.assert_close(dropped(D, 1.0, torch.Generator()), D)
    assert torch.equal(elected([D], "frequency"), D)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"how": "tie"}, "found 'tie'; did you mean 'ties'"),
        ({"how": "ties"}, "density, the share .* found nothing"),
        ({"how": "dare_ties", "density": 1.5}, "found 1.5"),
        ({"how": "linear", "density": 0.5}, "linear takes no density"),
        ({"how": "linear", "rank": 4}, "the exact sum, of whatever rank"),
        ({"how": "ties", "density": 0.5, "majority": "all"}, "majority: expected one of 'total', 'frequency'"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told, said):
    with pytest.raises(AdapterError, match=said):
        combine([make(q="LORA")], [1], **told)


def test_weights_are_numbers_one_for_each(make):
    with pytest.raises(AdapterError, match="2 adapters and 1 weights"):
        combine([make(q="LORA"), make(q="LORA")], [1])
    for wrong in (float("nan"), "1", None, True):
        with pytest.raises(AdapterError, match="adapter 1: a weight should be a finite number"):
            combine([make(q="LORA")], [wrong])
    with pytest.raises(AdapterError, match="no adapters"):
        combine([], [])


@pytest.mark.parametrize(("how", "methods"), [("linear", ["LORA"]), ("cat", ["LORA"]), ("linear", ["FULL", "LOKR"])])
@pytest.mark.parametrize("weight", [0.7, 1e-5])
def test_the_error_that_is_stated_counts_the_rounding(make, deltas, how, methods, weight):
    own = [make(q=method) for method in methods]
    found, errors = measured(own, [weight] * len(own), how, dtype=torch.float16)
    total = weight * sum(deltas(one)["q"] for one in own)
    error = float((deltas(found)["q"] - total).norm() / total.norm())
    assert errors.total == pytest.approx(error, rel=0.02)
