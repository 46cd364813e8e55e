"""diffusers' files: every spelling is read as its formula, and what is written loads right there."""

import copy
import json

import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import load_file, save_file

from veneer import AdapterError, files
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.config import LoraConfig

ABOUT = "lora_adapter_metadata"


def _merged(pipeline, adapter):
    for model in files.attach(pipeline, adapter).values():
        model.merge_and_unload()


@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata", "without"])
def test_what_is_written_is_right_in_diffusers(pipeline, adapter, wanted, weights, expect_change, tmp_path, metadata):
    path = files.write(adapter, tmp_path / "own.safetensors", "diffusers")
    if not metadata:
        save_file(load_file(path), path)
    before = weights(pipeline)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    expect_change(before, weights(pipeline), wanted)


def test_what_is_written_has_one_rank_in_each_part_and_says_its_scale(adapter, tmp_path):
    path = files.write(adapter, tmp_path / "own.safetensors", "diffusers")
    ends = ("lora_A.weight", "lora_linear_layer.down.weight")
    assert {tensor.shape[0] for name, tensor in load_file(path).items() if name.endswith(ends)} == {4}
    said = json.loads(files.stored.mapped(path).about[ABOUT])
    assert [said[f"{part}.{key}"] for part in ("unet", "text_encoder") for key in ("r", "lora_alpha")] == [4] * 4


def test_what_is_written_is_read_back(pipeline, adapter, wanted, weights, expect_change, tmp_path):
    path = files.write(adapter, tmp_path / "own.safetensors", "diffusers")
    assert files.detect(path) == "diffusers"
    again = files.read(path)
    assert (again.parts, again.metadata) == (("unet", "text_encoder"), {"ss_comment": "mine"})
    before = weights(pipeline)
    _merged(pipeline, again)
    expect_change(before, weights(pipeline), wanted)


def _now(path):
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _before(path):
    kind = "lora_linear_layer" if path.startswith("text") else "lora"
    return f"{path}.{kind}.down.weight", f"{path}.{kind}.up.weight"


def _at_first(path):
    """As the attention processors held them."""
    holder, _, name = path.removesuffix(".0").rpartition(".")
    name = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(name, name)
    processor = "" if path.startswith("text") else ".processor"
    return f"{holder}{processor}.{name}_lora.down.weight", f"{holder}{processor}.{name}_lora.up.weight"


def _flat_clip(path):
    """As diffusers writes them on transformers 5."""
    return _now(path.replace("text_model.", ""))


@pytest.mark.parametrize("spelt", [_now, _before, _at_first, _flat_clip], ids=lambda spelt: spelt.__name__)
def test_every_spelling_is_b_a(pipeline, factors, weights, expect_change, tmp_path, spelt, product):
    own = {path: pair for path, pair in factors.items() if ".attn" in path or "self_attn" in path}
    flat = {}
    for path, (A, B) in own.items():
        flat |= dict(zip(spelt(path), (A, B), strict=True))
    save_file(flat, tmp_path / "any-name.bin")
    assert files.detect(tmp_path / "any-name.bin") == "diffusers"
    before = weights(pipeline)
    _merged(pipeline, files.read(tmp_path / "any-name.bin"))
    expect_change(before, weights(pipeline), {path: product(A, B) for path, (A, B) in own.items()})


def test_a_file_without_prefixes_is_the_unets(factors, tmp_path):
    own = [path for path in factors if path.startswith("unet") and ".attn" in path]
    flat = {}
    for path in own:
        flat |= dict(zip((name.removeprefix("unet.") for name in _at_first(path)), factors[path], strict=True))
    save_file(flat, tmp_path / "pytorch_lora_weights.safetensors")
    adapter = files.read(tmp_path)
    assert adapter.parts == ("unet",)
    assert sorted(adapter.tensors) == sorted(own)


def test_an_alpha_beside_the_factors_is_divided_by_the_rank(factors, tmp_path):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    A, B = factors[path]
    save_file({**dict(zip(_now(path), (A, B), strict=True)), f"{path}.alpha": torch.tensor(6.0)}, tmp_path / "one")
    change = changes(files.read(tmp_path / "one"))[path]
    torch.testing.assert_close(change.update().delta(torch.empty(12, 12, device="meta")), 6.0 / len(A) * B @ A)


def test_metadata_says_alphas_for_layers_of_their_own(factors, tmp_path):
    q, k = (f"text_encoder.encoder.layers.{n}.self_attn.q_proj" for n in (0, 1))
    flat = {
        name: torch.randn(*shape) for own in (q, k) for name, shape in zip(_now(own), [(2, 10), (10, 2)], strict=True)
    }
    said = {
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 4,
        "text_encoder.alpha_pattern": {"^encoder.layers.1.self_attn.q_proj": 1},
        "text_encoder.use_rslora": True,
        "text_encoder.target_modules": ["q_proj"],
    }
    save_file(flat, tmp_path / "one", metadata={ABOUT: json.dumps(said)})
    adapter = files.read(tmp_path / "one")
    scales = [change.update().factors().scale for change in changes(adapter).values()]
    assert scales == pytest.approx([4 / 2**0.5, 1 / 2**0.5])
    assert all(path.startswith("text_encoder.text_model.encoder.layers.") for path in adapter.tensors)


@pytest.mark.parametrize("letter", ["b", "magnitude"])
@pytest.mark.parametrize(
    "path",
    ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "unet.conv_out"]
    + [f"text_encoder.text_model.encoder.layers.1.{name}" for name in ("self_attn.out_proj", "mlp.fc1")],
)
def test_biases_and_magnitudes_are_right_in_diffusers(pipeline, factors, tmp_path, letter, path, product):
    (A, B), scale = factors[path], 3 / len(factors[path][0])
    rows = len(B)
    config = LoraConfig(r=len(A), lora_alpha=3, use_dora=letter == "magnitude", options={"lora_bias": letter == "b"})
    own = torch.rand(rows) + 1
    shape = (1, rows, 1, 1) if letter == "magnitude" and A.ndim == 4 else (rows,)
    change = Change(config, {"A": A, "B": B, letter: own.view(shape)})
    file = files.write(adapter_of({path: change}, parts=[path.partition(".")[0]]), tmp_path / "a", "diffusers")

    part, _, inner = path.replace("text_model.", "").partition(".")
    model = getattr(pipeline, part)
    layer = model.get_submodule(inner)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    changed = (weight + scale * product(A, B)).flatten(1)
    if letter == "magnitude":
        changed = own[:, None] * changed / changed.norm(dim=1, keepdim=True)
    else:
        bias = bias + scale * own
    ours = files.attach(copy.deepcopy(model), files.read(file)).merge_and_unload().get_submodule(inner)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for found in (ours, model.get_submodule(inner)):
        torch.testing.assert_close(found.weight.detach().double().flatten(1), changed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias.detach().double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["pipeline", "pipeline without metadata", "unet alone"])
def test_what_diffusers_writes_is_what_it_computes(pipeline, weights, expect_change, tmp_path, how):
    fresh, before, told = copy.deepcopy(pipeline), weights(pipeline), how == "pipeline"
    own = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"attn2.to_k": 7}, "use_rslora": True} if told else {}
    targets = ["to_q", "to_k", "to_out.0", "conv1", "proj_in"]
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=5 if told else 2, target_modules=targets, **own))
    if how != "unet alone":
        pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["fc1", "q_proj"]))
    for model in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
    if how == "unet alone":
        pipeline.unet.save_lora_adapter(tmp_path, adapter_name="default")
    else:
        parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        states = {f"{part}_lora_layers": peft.get_peft_model_state_dict(model) for part, model in parts.items()}
        metadata = _collate_lora_metadata(parts) if told else {}
        pipeline.save_lora_weights(tmp_path, **states, **metadata)
    adapter = files.read(tmp_path)
    for model in (pipeline.unet, pipeline.text_encoder):
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
    pipeline.unload_lora_weights()
    after = weights(pipeline)
    _merged(fresh, adapter)
    expect_change(before, weights(fresh), {path: after[path] - before[path] for path in before})


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    flat = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3),
        "unet.conv_out.lora_A.weight": torch.randn(2, 4),
        "unet.conv_out.lora_B.weight": torch.randn(4, 3),
        "unet.conv_out.lora.up.weight": torch.randn(4, 3),
        "unet.strange.weight": torch.randn(1),
    }
    save_file(flat, tmp_path / "one")
    with pytest.raises(AdapterError) as told:
        files.read(tmp_path / "one")
    for what in ("unexpected tensors: unet.strange.weight", "another spelling", "missing: unet.conv_in.B"):
        assert what in str(told.value)
    assert "unet.conv_out A (2, 4) and B (4, 3)" in str(told.value)


def test_metadata_that_contradicts_the_tensors_is_refused(tmp_path):
    flat = dict(zip(_now("unet.conv_in"), (torch.randn(2, 4), torch.randn(4, 2)), strict=True))
    for said, what in (
        ({"unet.r": 4, "unet.target_modules": ["conv_in"]}, "of another rank"),
        ({"text_encoder.r": 4}, "says nothing of unet"),
        ({"unet.r": 2, "unet.use_dora": True, "unet.target_modules": ["conv_in"]}, "no lora_magnitude_vector, as"),
        ({"unet.r": 2, "unet.alpha_pattern": {"conv_out": 3}, "unet.target_modules": ["conv_in"]}, "conv_out"),
    ):
        save_file(flat, tmp_path / "one", metadata={ABOUT: json.dumps(said)})
        with pytest.raises(AdapterError, match=what):
            files.read(tmp_path / "one")


def test_what_diffusers_files_cannot_hold_is_refused_with_every_reason(tmp_path):
    one = adapter_of({"fc": Change(LoraConfig(r=2), {"A": torch.randn(2, 4), "B": torch.randn(4, 2)})})
    with pytest.raises(AdapterError, match="--part unet"):
        files.write(one, tmp_path / "one.safetensors", "diffusers")
    loha = {f"{name}{i}": torch.randn(*shape) for i in (1, 2) for name, shape in (("A", (2, 4)), ("B", (4, 2)))}
    adapter = adapter_of({"unet.conv_in": Change(LoraConfig(r=2, peft_type="LOHA"), loha)}, parts=["unet"])
    with pytest.raises(AdapterError, match=r"LOHA .*unet.conv_in"):
        files.write(adapter, tmp_path / "one.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())


def test_values_that_no_scale_fits_are_named(tmp_path):
    tensors = {"A": torch.randn(2, 4).half(), "B": torch.full((4, 2), torch.nan).half()}
    change = Change(LoraConfig(r=2, lora_alpha=1), tensors)
    with pytest.raises(AdapterError, match=r"NaN or infinity.*: unet\.fc"):
        files.write(adapter_of({"unet.fc": change}, parts=["unet"]), tmp_path / "one.safetensors", "diffusers")


def test_a_small_scale_loses_nothing_in_fp16(tmp_path):
    A, B = torch.randn(4, 64).half() * 0.1, torch.randn(32, 4).half() * 1e-4
    change = Change(LoraConfig(r=4, lora_alpha=1 / 64), {"A": A, "B": B})
    files.write(adapter_of({"unet.fc": change}, parts=["unet"]), tmp_path / "one.safetensors", "diffusers")
    own = changes(files.read(tmp_path / "one.safetensors"))["unet.fc"]
    exact = 1 / 256 * B.double() @ A.double()
    found = own.tensors["B"].double() @ own.tensors["A"].double()
    assert ((found - exact).norm() / exact.norm()) < 2e-3
