"""A whole pipeline that carries adapters: asked as one model is."""

import copy

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, attach, carriers, detach, files, get_peft_model
from veneer.apart.changes import adapter_of, changes
from veneer.files.attach import matched
from veneer.files.parts import by_part

INPUT = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 3, 10)}


def answer(pipeline):
    """Of both parts, in one tensor."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in INPUT.items()}
    with torch.no_grad():
        seen = pipeline.unet(timestep=torch.tensor(5), **tensors).sample
        read = pipeline.text_encoder(torch.tensor([[1, 5, 2]])).last_hidden_state
    return torch.cat([seen.flatten(), read.flatten()])


def merged_by_hand(pipeline, adapters):
    """A copy with W + Σ weight · ΔW, as `weights[part]` has them."""
    other = type(pipeline)(
        **{**pipeline.components, "requires_safety_checker": False}
        | {part: copy.deepcopy(getattr(pipeline, part)) for part in ("unet", "text_encoder")}
    )
    for adapter, weights in adapters:
        for part, own in by_part(adapter).items():
            fitting = matched(getattr(other, part), own)
            for path, change in changes(fitting).items():
                layer = getattr(other, part).get_submodule(path)
                A, B = (change.tensors[name].double() for name in "AB")
                product = (B.flatten(1) @ A.flatten(1)).view(layer.weight.shape)
                layer.weight.data += (weights[part] * change.config.lora_alpha / len(A) * product).float()
    return other


@pytest.fixture
def gentle(adapter):
    """The adapter of all layers, of changes that a forward bears; and one of the U-Net alone."""
    every = changes(adapter)
    for change in every.values():
        change.tensors["B"] = change.tensors["B"] / 50
    alone = {path: change for path, change in every.items() if path.startswith("unet.down")}
    return adapter_of(every, parts=adapter.parts), adapter_of(alone, parts=("unet",))


def test_weights_of_a_pipeline_are_those_of_its_parts(pipeline, gentle):
    both, alone = gentle
    base = answer(pipeline)
    expected = {
        "all": answer(merged_by_hand(pipeline, [(both, {"unet": 0.5, "text_encoder": 0.5})])),
        "parts": answer(merged_by_hand(pipeline, [(both, {"unet": 0.5, "text_encoder": -0.25})])),
        "blend": answer(merged_by_hand(pipeline, [(both, {"unet": 1, "text_encoder": 1}), (alone, {"unet": 0.5})])),
    }
    attach(pipeline, both, "both")
    on = attach(pipeline, alone, "down")
    assert sorted(on) == ["text_encoder", "unet"]
    asked = {"all": {"both": 0.5}, "parts": {"both": {"unet": 0.5, "text_encoder": -0.25}}}
    for name, weights in (asked | {"blend": {"both": 1, "down": 0.5}}).items():
        on.set_adapter(weights)
        torch.testing.assert_close(answer(pipeline), expected[name], rtol=1e-4, atol=1e-5)
        on.merge_adapter()
        torch.testing.assert_close(answer(pipeline), expected[name], rtol=1e-4, atol=1e-5)
        with pytest.raises(AdapterError, match="merged"):
            on.set_adapter("both")
        on.unmerge_adapter()
    on.set_adapter({"both": 0})
    assert torch.equal(answer(pipeline), base)
    with on.disable_adapter():
        assert on.active_adapters == []
    assert carriers(pipeline).peft_config.keys() == {"both", "down"}
    detach(pipeline)
    assert carriers(pipeline) == {}
    assert torch.equal(answer(pipeline), base)


def test_what_acted_before_acts_after_also_on_an_error(pipeline, gentle):
    on = attach(pipeline, gentle[0], "both")
    on.set_adapter({"both": 0.3})
    seen = []
    with pytest.raises(ZeroDivisionError), on.using("both"):
        seen.append(1 / 0)
    with on.using({"both": {"unet": 0.0, "text_encoder": 1.0}}):
        seen += [on["unet"].active_adapters, on["text_encoder"].active_adapters]
    assert seen == [[], ["both"]]
    assert [term.weight for model in on.values() for term in model.adapter_plan.terms] == [0.3, 0.3]


def test_what_cannot_be_done_to_one_part_is_done_to_none(pipeline, gentle, bits):
    on = attach(pipeline, gentle[0], "both")
    before = {part: bits(model) for part, model in on.items()}
    for wrong, said in (
        ("bth", "did you mean 'both'"),
        ({"both": {"unet": 1.0}}, "a weight for each"),
        ({"both": {"unet": 1.0, "text_encoder": float("nan")}}, "finite number"),
        ({"both": float("inf")}, "finite number"),
    ):
        with pytest.raises(AdapterError, match=said):
            on.set_adapter(wrong)
        assert on.active_adapters == ["both"]
    broken = list(on.values())[-1]
    update = next(layer.adapters["both"] for layer in broken.modules() if hasattr(layer, "adapters"))
    update.A.data[0] = torch.inf
    with pytest.raises(AdapterError):
        on.merge_adapter()
    update.A.data[0] = 0
    assert [model.adapter_plan.merged for model in on.values()] == [(), ()]
    after = {part: bits(model) for part, model in on.items()}
    assert {key for part in after for key in after[part] if after[part][key] != before[part][key]} <= {
        f"{path}.adapters.both.A" for path, layer in broken.named_modules() if hasattr(layer, "adapters")
    }
    with pytest.raises(AdapterError, match="nothing is merged"):
        on.unmerge_adapter()


def test_a_path_is_read_and_a_part_is_adapted_as_any_model(pipeline, gentle, tmp_path):
    path = files.write(gentle[0], tmp_path / "style.safetensors", "kohya")
    on = attach(pipeline, path, "style")
    with_file = answer(pipeline)
    detach(pipeline)
    attach(pipeline, gentle[0])
    torch.testing.assert_close(answer(pipeline), with_file)
    on["unet"].save_pretrained(tmp_path / "unet")
    unet_alone = copy.deepcopy(pipeline.unet).unload()
    detach(pipeline)
    model = PeftModel.from_pretrained(pipeline.unet, tmp_path / "unet")
    assert model is pipeline.unet
    assert list(carriers(pipeline)) == ["unet"]
    pipeline.unet.unload()
    assert type(pipeline.unet) is type(unet_alone)
    model = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    assert isinstance(model, nn.Module)
    assert pipeline.components["unet"] is model


def test_a_pipeline_is_moved_and_offloaded_with_its_adapters(pipeline, gentle):
    accelerate = pytest.importorskip("accelerate")
    attach(pipeline, gentle[0], "both")
    expected = answer(pipeline)
    pipeline.to(torch.float64)
    assert {own.dtype for own in pipeline.unet.parameters()} == {torch.float64}
    pipeline.to(torch.float32)
    torch.testing.assert_close(answer(pipeline), expected)
    hooks = [accelerate.cpu_offload_with_hook(getattr(pipeline, part), "cpu")[1] for part in ("unet", "text_encoder")]
    assert torch.equal(answer(pipeline), answer(pipeline))
    torch.testing.assert_close(answer(pipeline), expected)
    with carriers(pipeline).disable_adapter():
        assert (answer(pipeline) - expected).abs().max() > 1e-3
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(answer(pipeline), expected)


def test_adapters_that_are_offloaded_layer_by_layer_are_refused_or_merged_before(pipeline, gentle):
    accelerate = pytest.importorskip("accelerate")
    on = attach(pipeline, gentle[0], "both")
    expected = answer(pipeline)
    on.merge_adapter()
    accelerate.cpu_offload(pipeline.unet, "cpu", offload_buffers=True)
    torch.testing.assert_close(answer(pipeline), expected, rtol=1e-4, atol=1e-5)
    accelerate.hooks.remove_hook_from_module(pipeline.unet, recurse=True)
    on.unmerge_adapter()
    torch.testing.assert_close(answer(pipeline), expected)
    accelerate.cpu_offload(pipeline.unet, "cpu", offload_buffers=True)
    with pytest.raises(AdapterError, match="offloaded layer by layer"):
        answer(pipeline)
