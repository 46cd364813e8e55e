"""An adapter onto a pipeline: all parts or none, under whatever names the model has."""

import copy

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, files, get_peft_model
from veneer.apart.changes import Change, adapter_of, changes
from veneer.files.parts import by_part


def _same(bits, pipeline, before):
    now = {part: bits(getattr(pipeline, part)) for part in before}
    assert now == before


@pytest.fixture
def before(bits, pipeline):
    return {part: bits(getattr(pipeline, part)) for part in ("unet", "text_encoder")}


def test_a_pipeline_carries_it_until_it_is_taken_off(pipeline, adapter, bits, before):
    attached = files.attach(pipeline, adapter, "mine")
    assert sorted(attached) == ["text_encoder", "unet"]
    assert all(isinstance(model, PeftModel) and list(model.peft_config) == ["mine"] for model in attached.values())
    assert not any(own.requires_grad for model in attached.values() for own in model.parameters())
    files.attach({"unet": pipeline.unet}, adapter, "second", is_trainable=True, parts=["unet"])
    assert list(pipeline.unet.peft_config) == ["mine", "second"]
    assert all(own.requires_grad == (".second." in name) for name, own in pipeline.unet.named_parameters())
    files.detach(pipeline, "mine")
    assert not isinstance(pipeline.text_encoder, PeftModel)
    files.detach(pipeline)
    _same(bits, pipeline, before)
    with pytest.raises(AdapterError, match="no adapter is on it"):
        files.detach(pipeline)


def test_what_a_pipeline_carries_is_one_adapter_for_a_file(pipeline, adapter, wanted, weights, expect_change, tmp_path):
    with pytest.raises(AdapterError, match="no adapter is on it"):
        files.adapter_on(pipeline)
    files.attach(pipeline, adapter, "mine")
    own = files.adapter_on(pipeline, "mine")
    assert own.tensors.keys() == adapter.tensors.keys()
    assert files.adapter_on(pipeline.unet).parts == ()
    path = files.write(own, tmp_path / "own.safetensors", "diffusers")
    files.detach(pipeline)
    before = weights(pipeline)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    expect_change(before, weights(pipeline), wanted)


def test_one_part_that_does_not_fit_leaves_all_as_they_were(pipeline, adapter, bits, before):
    every = changes(adapter)
    every["unet.conv_in"].tensors["A"] = torch.randn(1, 9, 3, 3)
    wrong = adapter_of({**every, "text_encoder.no_such": every["unet.conv_in"]}, parts=adapter.parts)
    classes = type(pipeline.unet), type(pipeline.text_encoder)
    flags = [own.requires_grad for own in pipeline.unet.parameters()]
    with pytest.raises(AdapterError) as told:
        files.attach(pipeline, wrong)
    assert "unet: the adapter does not fit" in str(told.value)
    assert "conv_in.A expected (1, 4, 3, 3) found (1, 9, 3, 3)" in str(told.value)
    assert "text_encoder: " in str(told.value)
    assert "no_such" in str(told.value)
    only_text = adapter_of({**changes(adapter), "text_encoder.no_such": every["unet.conv_in"]}, parts=adapter.parts)
    with pytest.raises(AdapterError, match=r"text_encoder: .*no_such"):
        files.attach(pipeline, only_text)
    assert (type(pipeline.unet), type(pipeline.text_encoder)) == classes
    assert [own.requires_grad for own in pipeline.unet.parameters()] == flags
    _same(bits, pipeline, before)


def test_what_a_model_carried_before_stays(pipeline, adapter):
    get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]), "first")
    wrong = adapter_of(
        {**changes(adapter), "text_encoder.no_such": changes(adapter)["unet.conv_in"]}, parts=adapter.parts
    )
    with pytest.raises(AdapterError, match="no_such"):
        files.attach(pipeline, wrong)
    assert list(pipeline.unet.peft_config) == ["first"]
    assert pipeline.unet.active_adapters == ["first"]
    assert all(own.requires_grad == (".first." in name) for name, own in pipeline.unet.named_parameters())


def test_parts_are_wanted_or_missing(pipeline, adapter):
    with pytest.raises(AdapterError, match=r"'text_encoder' too.*parts=\['unet'\]"):
        files.attach({"unet": pipeline.unet}, adapter)
    with pytest.raises(AdapterError, match="has no part 'prior'"):
        files.attach(pipeline, adapter, parts=["prior"])
    with pytest.raises(AdapterError, match="give the pipeline"):
        files.attach(pipeline.unet, adapter)
    with pytest.raises(AdapterError, match="of one model"):
        files.attach(pipeline, by_part(adapter)["unet"])
    with pytest.raises(AdapterError, match="found int"):
        files.attach(3, adapter)
    assert files.attach(pipeline.unet, adapter, parts="unet") is pipeline.unet


class _Older(nn.Module):
    """A CLIP text encoder with the level that it had before transformers 5."""

    def __init__(self, model):
        super().__init__()
        self.text_model = model


@pytest.mark.parametrize("level", [True, False], ids=["older", "now"])
@pytest.mark.parametrize("spelt", ["text_model.{}", "{}", "flat text_model_{}", "flat {}"])
def test_text_encoders_are_met_with_their_level_or_without(pipeline, factors, product, level, spelt):
    path = "encoder.layers.1.mlp.fc1"
    A, B = factors[f"text_encoder.text_model.{path}"]
    name = spelt.removeprefix("flat ").format(path.replace(".", "_") if spelt.startswith("flat") else path)
    config = LoraConfig(r=len(A), lora_alpha=len(A))
    adapter = adapter_of({f"text_encoder.{name}": Change(config, {"A": A, "B": B})}, parts=["text_encoder"])
    encoder = pipeline.text_encoder
    layer = encoder.get_submodule(path)
    was = layer.weight.detach().double()
    files.attach({"text_encoder": _Older(encoder) if level else encoder}, adapter)["text_encoder"].merge_and_unload()
    torch.testing.assert_close(layer.weight.detach().double() - was, product(A, B), rtol=1e-4, atol=1e-5)


def test_a_flat_name_that_may_be_two_layers_is_refused():
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(2, 2)}), "a": nn.ModuleDict({"b_c": nn.Linear(2, 2)})})
    pair = {"A": torch.randn(1, 2), "B": torch.randn(2, 1)}
    change = Change(LoraConfig(r=1, lora_alpha=1), pair)
    with pytest.raises(AdapterError, match=r"a_b_c is a_b\.c or a\.b_c"):
        files.attach(model, adapter_of({"a_b_c": change}))
    with pytest.raises(AdapterError, match="two names for one layer"):
        files.attach(copy.deepcopy(model.a), adapter_of({"b_c": change, "text_model.b_c": change}))
