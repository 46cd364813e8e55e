"""An adapter of other ranks: the error is the tail of its singular values, and what it says of itself stays."""

import pytest
import torch

from veneer import AdapterError
from veneer.apart.changes import changes
from veneer.combine import lora_of, resize

LAYERS = {"q": ("LORA", 6), "v": ("LOHA", 2), "k": ("LOKR", 2)}


@pytest.mark.parametrize(
    ("told", "keep"),
    [
        ({"rank": 3}, lambda S: 3),
        ({"ratio": 0.3}, lambda S: int((0.3 * S[0] <= S).sum())),
        ({"energy": 0.8}, lambda S: int((S.square().cumsum(0) < 0.8 * S.square().sum()).sum()) + 1),
        ({"frobenius": 0.9}, lambda S: int((S.square().cumsum(0) < 0.81 * S.square().sum()).sum()) + 1),
        ({"cumulative": 0.7}, lambda S: int((S.cumsum(0) < 0.7 * S.sum()).sum()) + 1),
        ({"rank": 2, "energy": 0.999}, lambda S: 2),
    ],
    ids=lambda told: "+".join(told) if isinstance(told, dict) else "",
)
def test_ranks_are_chosen_layer_by_layer(make, deltas, told, keep):
    adapter = make(**LAYERS)
    found, errors = resize(adapter, **told)
    lost = square = 0.0
    for path, delta in deltas(adapter).items():
        S = torch.linalg.svdvals(delta)
        k = keep(S)
        own = changes(found)[path]
        assert (own.config.peft_type, own.config.r, own.config.lora_alpha) == ("LORA", k, k)
        assert errors.layers[path] == pytest.approx(float(S[k:].norm() / S.norm()), abs=1e-9)
        assert float((deltas(found)[path] - delta).norm() / delta.norm()) == pytest.approx(
            errors.layers[path], abs=1e-9
        )
        lost, square = lost + float(S[k:].square().sum()), square + float(S.square().sum())
    assert errors.total == pytest.approx((lost / square) ** 0.5)


def test_any_adapter_is_a_lora_of_its_rank(make, deltas):
    adapter = make(**LAYERS, o=("FULL", 1))
    found, errors = lora_of(adapter)
    ranks = {path: int(torch.linalg.matrix_rank(delta)) for path, delta in deltas(adapter).items()}
    assert {path: own.config.r for path, own in changes(found).items()} == ranks
    torch.testing.assert_close(deltas(found), deltas(adapter))
    assert errors.total < 1e-9


def test_what_the_file_says_of_itself_is_kept(make):
    adapter = make(q=("LORA", 4))
    adapter.metadata, adapter.parts = {"ss_tag": "x", "ss_network_dim": "4"}, ("unet",)
    adapter.config.base_model_name_or_path = "base"
    found, _ = resize(adapter, 2)
    assert (found.metadata, found.parts) == ({"ss_tag": "x"}, ("unet",))
    assert found.config.base_model_name_or_path == "base"


def test_a_change_of_nothing_keeps_its_layer(make):
    adapter = make(q=("LORA", 4), v=("LORA", 4))
    adapter.tensors["q"]["B"].zero_()
    found, errors = resize(adapter, ratio=0.5)
    assert found.tensors["q"]["A"].shape == (1, 10)
    assert errors.layers["q"] == 0


def test_it_saves_and_loads(make, deltas, tmp_path):
    found, _ = resize(make(**LAYERS), energy=0.9)
    loaded = type(found).load(found.save(tmp_path / "resized"))
    torch.testing.assert_close(deltas(loaded), deltas(found))


def test_dora_is_refused_without_its_base(make):
    with pytest.raises(
        AdapterError, match="q: the change that DoRA makes depends on the base's weights: give the base"
    ):
        lora_of(make(q=("LORA", 2, {"use_dora": True})), 2)
