"""Adapters that are not alike: other layers, other shapes, changes that ask for the base, what is trained whole."""

import pytest
import torch
from torch import nn

from veneer import Adapter, AdapterError, LoraConfig, get_peft_model
from veneer.apart.changes import changes
from veneer.combine import combine, lora_of, measured, negate, resize, subtract


def test_layers_of_one_adapter_alone(make, deltas):
    found = deltas(combine([make(q="LORA"), make(v="LORA")], [0.5, 2]))
    assert found.keys() == {"q", "v"}


def test_layers_of_other_sizes_are_all_named(make):
    one, other = make(q="LORA", v="LORA", k="LORA"), make(q="LORA", v="LORA")
    for path in ("q", "v"):
        other.tensors[path]["A"] = torch.randn(2, 7)
    with pytest.raises(AdapterError, match=r"(?s)q: .*other sizes: \(12, 10\), \(12, 7\).*v: .*other sizes"):
        combine([one, other], [1, 1])


def test_other_bases_are_warned_of(make):
    one, other = make(q="LORA"), make(q="LORA")
    one.config.base_model_name_or_path, other.config.base_model_name_or_path = "a", "b"
    with pytest.warns(UserWarning, match="made for different bases: adapter 1 for a, adapter 2 for b"):
        assert combine([one, other], [1, 1]).config.base_model_name_or_path == "a"


def test_a_pipelines_adapter_is_not_combined_with_a_models(make):
    one, other = make(q="LORA"), make(q="LORA")
    one.parts = ("unet",)
    with pytest.raises(AdapterError, match="adapter 1 of unet, adapter 2 of one model"):
        combine([one, other], [1, 1])


def test_parts_and_what_all_say_are_kept(make):
    one, other = make(q="LORA"), make(q="LORA")
    one.parts, other.parts = ("unet",), ("unet", "text_encoder")
    one.metadata, other.metadata = {"base": "SD1", "words": "a"}, {"base": "SD1", "words": "b"}
    found = combine([one, other], [1, 1])
    assert (found.parts, found.metadata) == (("unet", "text_encoder"), {"base": "SD1"})


def test_the_precision_of_the_tensors(make):
    half = make(q="LORA")
    half.tensors["q"] = {name: tensor.half() for name, tensor in half.tensors["q"].items()}
    assert combine([half], [1]).tensors["q"]["A"].dtype == torch.float32  # an exact sum is not rounded so far
    assert combine([half], [1], dtype=torch.bfloat16).tensors["q"]["A"].dtype == torch.bfloat16
    assert resize(half, 1)[0].tensors["q"]["A"].dtype == torch.float16
    assert negate(half).tensors["q"]["B"].dtype == torch.float16


@pytest.mark.parametrize("row", [(5, 3, 2), (5, 1, 1), (5, 5)])
def test_convolutions_keep_their_kernels(row):
    def conv(r: int) -> Adapter:
        point = [1 for _ in row[1:]]
        tensors = {"A": torch.randn(r, *row), "B": torch.randn(6, r, *point)}
        return Adapter(LoraConfig(r=r, lora_alpha=r, target_modules=["c"]), {"c": tensors})

    one, other = conv(2), conv(3)
    found = combine([one, other], [1, -1]).tensors["c"]
    assert (found["A"].shape, found["B"].shape) == ((5, *row), (6, 5, *(1 for _ in row[1:])))
    wanted = [own.tensors["c"]["B"].flatten(1) @ own.tensors["c"]["A"].flatten(1) for own in (one, other)]
    torch.testing.assert_close(found["B"].flatten(1) @ found["A"].flatten(1), wanted[0] - wanted[1])
    full = combine([one, other], [1, -1], "ties", density=0.5).tensors["c"]["D"]
    assert full.shape == (6, *row)


def test_biases_of_the_method_are_summed(make):
    one = make(q=("LORA", 2, {"options": {"lora_bias": True}}))
    other = make(q=("LORA", 3))
    found = changes(combine([one, other], [-0.5, 1]))["q"]
    scale = 3 / 2
    torch.testing.assert_close(found.update().shift(torch.zeros(12)).detach(), -0.5 * scale * one.tensors["q"]["b"])


def test_changes_of_a_bias_alone():
    one, other = (
        Adapter(LoraConfig(peft_type="FULL", target_modules=["q"]), {"q": {"b": torch.randn(12), **more}})
        for more in ({}, {"D": torch.randn(12, 10)})
    )
    both = combine([one, other], [2, -1]).tensors["q"]
    torch.testing.assert_close(both["b"], 2 * one.tensors["q"]["b"] - other.tensors["q"]["b"])
    torch.testing.assert_close(both["D"], -other.tensors["q"]["D"])
    assert combine([one], [3]).tensors["q"].keys() == resize(one, 2)[0].tensors["q"].keys() == {"b"}


def test_dora_asks_for_the_base(make, deltas, weights):
    dora, plain = make(q=("LORA", 2, {"use_dora": True}), v="LORA"), make(q="LORA")
    with pytest.raises(AdapterError, match="q: the change that DoRA makes depends on the base's weights"):
        combine([dora, plain], [0.5, 0.5])
    wanted = 0.5 * deltas(dora, weights)["q"] - 2 * deltas(plain)["q"]
    torch.testing.assert_close(deltas(combine([dora, plain], [0.5, -2], base=weights))["q"], wanted)
    found, errors = lora_of(dora, 4, base=weights)
    assert not found.config.use_dora
    S = torch.linalg.svdvals(deltas(dora, weights)["q"])
    assert errors.layers["q"] == pytest.approx(float(S[4:].norm() / S.norm()))
    assert errors.layers["v"] == 0
    whole, none = lora_of(dora, base=weights)
    torch.testing.assert_close(deltas(whole)["q"], deltas(dora, weights)["q"])
    assert none.total < 1e-9


def test_rescaling_is_combined_without_a_base_and_is_right_with_it(make, weights):
    one, other = make(q="IA3", v="IA3"), make(q="IA3")
    found = combine([one, other], [0.5, 2.0])
    wanted = 0.5 * (one.tensors["q"]["l"] - 1) + 2 * (other.tensors["q"]["l"] - 1) + 1
    torch.testing.assert_close(found.tensors["q"]["l"], wanted)
    lora = make(q="LORA")
    columns = make(q=("IA3", 2, {"options": {"feedforward_modules": ["q"]}}))
    for unlike in (lora, columns):
        with pytest.raises(AdapterError, match="q: the change that IA3 makes depends"):
            combine([one, unlike], [1, 1])
    both = combine([one, columns], [1, 1], base=weights).tensors["q"]["D"]
    torch.testing.assert_close(both, weights["q.weight"] * (one.tensors["q"]["l"] + columns.tensors["q"]["l"] - 2))
    mixed = combine([one, lora], [1, 1], base=weights).tensors["q"]["D"]
    A, B = lora.tensors["q"]["A"], lora.tensors["q"]["B"]
    torch.testing.assert_close(mixed, (one.tensors["q"]["l"] - 1) * weights["q.weight"] + 1.5 * B @ A)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.q(self.table(x)))


def trained(model: Small, **fields) -> Adapter:
    from copy import deepcopy

    own = get_peft_model(deepcopy(model), LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, **fields))
    for name, parameter in own.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter)
    adapter = own.get_adapter()
    return Adapter(adapter.config, {p: {n: t.clone() for n, t in own.items()} for p, own in adapter.tensors.items()})


WHOLE = {"modules_to_save": ["head"], "trainable_token_indices": {"table": [1, 4]}, "bias": "lora_only"}
CHANGED = ("head.weight", "head.bias", "q.bias")


def test_what_is_trained_whole_where_the_weights_sum_to_one():
    model = Small()
    one, other = trained(model, **WHOLE), trained(model, **WHOLE)
    found = combine([one, other], [0.3, 0.7])
    for path in CHANGED:
        wanted = 0.3 * one.tensors[path]["value"] + 0.7 * other.tensors[path]["value"]
        torch.testing.assert_close(found.tensors[path]["value"], wanted)
    rows = 0.3 * one.tensors["table"]["rows"] + 0.7 * other.tensors["table"]["rows"]
    torch.testing.assert_close(found.tensors["table"]["rows"], rows)
    assert found.config.modules_to_save == ["head"]
    assert found.config.trainable_token_indices == {"table": [1, 4]}


@pytest.mark.parametrize("weights", [(0.3, 0.4), (1.0, -1.0)])
def test_what_is_trained_whole_with_the_base(weights):
    model = Small()
    one = trained(model, **WHOLE)
    other = trained(model, **WHOLE | {"trainable_token_indices": {"table": [4, 0]}, "modules_to_save": None})
    with pytest.raises(AdapterError, match=r"trained whole, .* needs the base's values.*: q\.bias"):
        combine([one, other], weights)
    found = combine([one, other], weights, base=model)
    W = model.q.bias.detach()
    wanted = W + sum(w * (own.tensors["q.bias"]["value"] - W) for w, own in zip(weights, (one, other), strict=True))
    torch.testing.assert_close(found.tensors["q.bias"]["value"], wanted)
    head = model.head.weight.detach()
    torch.testing.assert_close(
        found.tensors["head.weight"]["value"], head + weights[0] * (one.tensors["head.weight"]["value"] - head)
    )
    assert found.config.trainable_token_indices == {"table": [0, 1, 4]}
    both = model.table.weight[4] + sum(
        w * (own.tensors["table"]["rows"][place] - model.table.weight[4])
        for w, own, place in ((weights[0], one, 1), (weights[1], other, 0))
    )
    torch.testing.assert_close(found.tensors["table"]["rows"][2], both.detach())


def test_biases_of_some_layers_alone_ask_for_the_base():
    one = trained(Small(), bias="lora_only")
    other = Adapter(
        LoraConfig(r=2, target_modules=["table"]), {"table": {"A": torch.ones(2, 7), "B": torch.ones(5, 2)}}
    )
    with pytest.raises(AdapterError, match="biases are trained in some layers alone"):
        combine([one, other], [1, 1])


def test_the_same_in_all_is_kept():
    one = trained(Small(), **WHOLE)
    found = combine([one, one], [0.5, 0.7])
    for path in CHANGED:
        assert torch.equal(found.tensors[path]["value"], one.tensors[path]["value"])


def test_one_way_is_chosen_for_a_layer():
    one = trained(Small())
    other = Adapter(LoraConfig(modules_to_save=["q"], target_modules=[]), {"q.weight": {"value": torch.ones(5, 5)}})
    with pytest.raises(AdapterError, match=r"changed by one adapter and trained whole by another: q\.weight"):
        combine([one, other], [0, 1])


def test_resizing_keeps_what_is_trained_whole():
    one = trained(Small(), **WHOLE)
    found, errors = resize(one, 1)
    assert found.tensors.keys() == one.tensors.keys()
    assert found.tensors["q"]["A"].shape[0] == 1
    assert errors.layers.keys() == {"q"}


def test_everything_that_is_wrong_is_told_at_once(make):
    one = make(q=("LORA", 2, {"use_dora": True}), v=("LORA", 2, {"use_dora": True}))
    other = make(v="LORA")
    other.tensors["v"]["A"] = torch.randn(2, 7)
    with pytest.raises(AdapterError, match=r"(?s)^q: .*DoRA.*\nv: "):
        measured([one, other], [1, 1])


def test_what_would_not_be_finite_is_refused(make):
    one, other = make(q="LORA", v="FULL"), make(q="LORA", v="FULL")
    one.tensors["q"]["A"][0, 0] = torch.nan
    other.tensors["v"]["D"].mul_(1e6)
    with pytest.raises(AdapterError, match=r"(?s)q: .*NaN or infinity.*v: the result would hold NaN or infinity"):
        combine([one, other], [1, 1], dtype=torch.float16)


def test_parameters_adapted_by_their_names_are_refused():
    config = LoraConfig(r=2, target_parameters=["experts.up"])
    one = Adapter(config, {"experts": {"A": torch.randn(6, 5), "B": torch.randn(4, 6)}})
    with pytest.raises(AdapterError, match=r"target_parameters.* are not combined: experts"):
        combine([one, one], [1, 1])


@pytest.mark.parametrize("fields", [{"use_dora": True}, {}])
def test_what_depends_on_the_base_is_turned_around_with_it(make, deltas, weights, fields):
    own = make(q=("LORA" if fields else "IA3", 2, fields))
    turned = negate(own, base=weights)
    torch.testing.assert_close(deltas(turned, weights)["q"], -deltas(own, weights)["q"])
    nothing = deltas(subtract(own, own, base=weights), weights)["q"]
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))
