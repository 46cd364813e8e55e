"""An adapter apart from any model: its changes are those of the live layers, and make the same adapter again."""

import pytest
import torch
from torch import nn

from veneer import Adapter, AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.apart.changes import Change, adapter_of, beside, changes
from veneer.core.inject import carrying


class Model(nn.Module):
    """Layers of several kinds, one name the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.inner = nn.Linear(6, 4), nn.ModuleDict({"proj": nn.Linear(6, 4), "out": nn.Linear(4, 6)})
        self.table, self.conv, self.point = nn.Embedding(7, 6), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1)
        self.attention, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)


LAYERS = ["proj", "out", "table", "conv", "point", "attention", "norm"]
PATTERNS = {"rank_pattern": {"^proj": 1, "conv": 3}, "alpha_pattern": {"^proj": 7, "out": 0.5}}
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=LAYERS, **PATTERNS),
    "rslora": LoraConfig(r=2, use_rslora=True, target_modules=LAYERS, **PATTERNS),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=LAYERS, **PATTERNS),
    "with a bias": LoraConfig(target_modules=["proj", "out", "conv"], options={"lora_bias": True}),
    "loha": LoraConfig(r=2, peft_type="LOHA", target_modules=LAYERS, **PATTERNS),
    "lokr": LoraConfig(r=1, peft_type="LOKR", target_modules=LAYERS, options={"decompose_both": True}),
    "ia3": LoraConfig(peft_type="IA3", target_modules=LAYERS[:2], options={"feedforward_modules": ["out"]}),
    "vera": LoraConfig(peft_type="VERA", target_modules=["proj", "out"]),
    "mixed": LoraConfig(
        r=2,
        target_modules=LAYERS,
        method_pattern={
            "attention": {"use_dora": True},
            "proj": {"peft_type": "LOHA", "use_rslora": True},
            "out": {"peft_type": "IA3", "options": {"feedforward_modules": ["out"]}},
            "conv|point": {"peft_type": "LOKR", "options": {"decompose_factor": 2}},
        },
        **PATTERNS,
    ),
    "pissa": LoraConfig(r=1, init_lora_weights="pissa", target_modules=["proj", "out"]),
    "much beside": LoraConfig(
        target_modules=["out"], modules_to_save=["norm"], bias="lora_only", trainable_token_indices={"table": [1, 3]}
    ),
}


def _adapted(config: LoraConfig) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Model().double(), config)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_change_says_what_the_live_layer_does(config):
    model = _adapted(config)
    adapter, carriers = model.get_adapter(), carrying(model, "default")
    found = changes(adapter)
    for path, change in found.items():
        kind, layer, update = carriers[path.partition(".base_layer")[0]]
        place = path.removeprefix(path.partition(".base_layer")[0])
        (part,) = (part for part, own in kind.places(update).items() if own == place)
        weight = kind.matrices(layer)[part]
        assert change.shape in (None, tuple(weight.shape))
        own = change.update(weight)
        torch.testing.assert_close(own.delta(weight), update.parts()[part].delta(weight), rtol=1e-12, atol=1e-12)
        if not change.reads_weight and change.shape:
            delta = change.update().delta(weight.to("meta"))
            torch.testing.assert_close(delta, update.parts()[part].delta(weight), rtol=1e-12, atol=1e-12)
    assert {*found, *beside(adapter)} == {path for path in adapter.tensors if path}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("alone", [False, True])
def test_the_adapter_of_its_changes_says_the_same(config, alone):
    adapter = _adapted(config).get_adapter()
    adapter.metadata = {"trigger": "a cat"}
    if alone and beside(adapter):
        pytest.skip("what is trained beside is no change")
    more = {"embeddings": adapter.embeddings, "metadata": adapter.metadata} if alone else {"like": adapter}
    again = adapter_of(changes(adapter), **more)
    assert (again.embeddings, again.metadata) == (adapter.embeddings, adapter.metadata)
    assert again.tensors.keys() == adapter.tensors.keys()
    for path, own in adapter.tensors.items():
        assert all(again.tensors[path][name] is tensor for name, tensor in own.items())
    assert alone or again.config == adapter.config
    assert {path: own.config for path, own in changes(again).items()} == {
        path: own.config for path, own in changes(adapter).items()
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_made_adapter_goes_on_a_model(config, tmp_path):
    model = _adapted(config)
    adapter = model.get_adapter()
    adapter_of(changes(adapter), like=adapter, embeddings=adapter.embeddings).save(tmp_path)
    other = PeftModel.from_pretrained(Model().double(), tmp_path)
    torch.testing.assert_close(other.get_adapter().tensors, adapter.tensors, rtol=0, atol=0)


def test_numbers_of_its_own_for_each_layer():
    layers = {"proj": (2, 3.0), "inner.proj": (1, 2.0), "inner.out": (2, 3.0), "point": (2, 5.0)}
    made = {
        path: Change(LoraConfig(r=r, lora_alpha=alpha), {"A": torch.randn(r, 4), "B": torch.randn(6, r)})
        for path, (r, alpha) in layers.items()
    }
    config = adapter_of(made).config
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 3.0, [*layers])
    assert config.rank_pattern == {r"^inner\.proj": 1}
    assert config.alpha_pattern == {r"^inner\.proj": 2.0, "^point": 5.0}


def test_the_options_of_one_layer_may_be_the_usual_ones_again():
    biased = Change(LoraConfig(options={"lora_bias": True}), {"A": torch.zeros(8, 4), "B": torch.zeros(6, 8)})
    biased.tensors["b"] = torch.ones(6)
    plain = Change(LoraConfig(), {"A": torch.zeros(8, 4), "B": torch.zeros(6, 8)})
    adapter = adapter_of({"a": biased, "b": biased, "c": plain})
    assert adapter.config.options["lora_bias"]
    assert {path: own.config for path, own in changes(adapter).items()} == {
        "a": biased.config, "b": biased.config, "c": plain.config,
    }  # fmt: skip


def test_tensors_that_differ_in_trailing_ones_fit():
    adapter = _adapted(CONFIGS["lora"]).get_adapter()
    own = adapter.tensors
    own["point"] = {name: tensor.flatten(1) for name, tensor in own["point"].items()}
    own["proj"] = {name: tensor[..., None, None] for name, tensor in own["proj"].items()}
    from veneer.core.model import _first_adapter

    found = _first_adapter(Model().double(), "default", adapter, False).get_adapter().tensors
    for path in ("point", "proj"):
        for name, tensor in own[path].items():
            assert torch.equal(found[path][name].flatten(), tensor.flatten())
    own["conv"]["A"] = own["conv"]["A"].flatten(1)
    with pytest.raises(AdapterError, match=r"conv.A expected \(3, 2, 3, 3\) found \(3, 18\)"):
        _first_adapter(Model().double(), "default", adapter, False)


def test_metadata_goes_to_the_file_and_comes_back(tmp_path):
    adapter = _adapted(CONFIGS["lora"]).get_adapter()
    adapter.metadata = {"ss_network_dim": "8", "format": "xx"}
    adapter.save(tmp_path)
    assert Adapter.load(tmp_path).metadata == {"ss_network_dim": "8"}


_ONE = {"unet.proj": Change(LoraConfig(r=1), {"A": torch.zeros(1, 2), "B": torch.zeros(2, 1)})}
FAULTS = {
    "tensors of another method": (
        lambda: adapter_of({"a": Change(LoraConfig(), {"D": torch.zeros(1, 1)})}).save("nowhere"),
        "a: 'D' are no tensors of LORA",
    ),
    "several parts": (lambda: adapter_of(_ONE, parts=("unet",)).save("nowhere"), "save each in its own folder"),
    "no layer": (lambda: adapter_of({}), "at least one layer"),
    "a size that is not said": (
        lambda: changes(_adapted(CONFIGS["ia3"]).get_adapter())["proj"].update(),
        "IA3 do not say the layer's size: give its weight",
    ),
    "another rank": (
        lambda: Change(LoraConfig(r=3), {"A": torch.zeros(2, 4), "B": torch.zeros(6, 2)}).update(),
        r"a LORA of rank 3 for a weight \(6, 4\) has A \(3, 4\), B \(6, 3\), found A \(2, 4\), B \(6, 2\)",
    ),
    "projections not there": (
        lambda: Change(LoraConfig(peft_type="VERA"), {"b": torch.zeros(4), "d": torch.zeros(8)}).update(
            torch.zeros(4, 6)
        ),
        "put the adapter on its model",
    ),
}


@pytest.mark.parametrize(("make", "said"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(AdapterError, match=said):
        make()
