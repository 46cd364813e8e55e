"""The LoRA between two models: a merged adapter comes back, and all that it leaves out is told."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.apart.changes import changes
from veneer.combine import extract

TOKENS = torch.arange(5, 17)[None]


def merged(base: nn.Module, **fields) -> nn.Module:
    """A model tuned by an adapter of rank 3."""
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **{"target_modules": "all-linear", **fields})
    model = get_peft_model(deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter, std=0.3)
    return model.merge_and_unload()


def acts_as(base: nn.Module, adapter, tuned: nn.Module, folder) -> None:
    model = PeftModel.from_pretrained(deepcopy(base), adapter.save(folder))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, tuned(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_merged_adapter_comes_back(tiny, tmp_path, family):
    base = tiny(family)
    tuned = merged(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    found = extract(tmp_path / "tuned", tmp_path / "base", rank=3, base_name="base")
    assert found.errors.total < 1e-5
    assert (found.left, found.strange) == ([], [])
    assert {change.config.r for change in changes(found.adapter).values()} == {3}
    assert found.adapter.config.base_model_name_or_path == "base"
    acts_as(base, found.adapter, tuned, tmp_path / "adapter")


def test_the_error_is_the_tail_of_the_difference(tiny):
    base = tiny("llama").double()
    tuned = merged(base)
    found, by_energy = extract(tuned, base, rank=2), extract(tuned, base, energy=0.5)
    for path, error in found.errors.layers.items():
        S = torch.linalg.svdvals((tuned.get_submodule(path).weight - base.get_submodule(path).weight).detach())
        assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-3)
        wanted = int((S.square().cumsum(0) < 0.5 * S.square().sum()).sum()) + 1
        assert changes(by_energy.adapter)[path].config.r == wanted


def test_layers_without_a_difference_are_left_out(tiny):
    base = tiny("llama")
    found = extract(merged(base, target_modules=["q_proj"]), base, rank=3)
    assert {path.rpartition(".")[2] for path in changes(found.adapter)} == {"q_proj"}
    assert "model.layers.0.self_attn.k_proj.weight" in found.same
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(base, base, rank=3)


def test_the_rounding_of_a_file_is_no_difference(tiny):
    base = tiny("llama")
    tuned = merged(base, target_modules=["q_proj"])
    found = extract(tuned.half(), base, rank=3)
    assert {path.rpartition(".")[2] for path in changes(found.adapter)} == {"q_proj"}


def test_what_else_differs_is_told_or_kept_whole(tiny, tmp_path):
    base = tiny("opt")
    tuned = merged(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(("q_proj.bias", "layer_norm.weight", "layer_norm.bias", "embed_positions.weight")):
                parameter.add_(torch.randn_like(parameter))
    found = extract(tuned, base, rank=3)
    ends = {name.rpartition("layers.")[2].partition(".")[2] or name for name in found.left}
    assert "self_attn.q_proj.bias" in ends
    assert "model.decoder.embed_positions.weight" in found.left
    whole = extract(tuned, base, rank=3, everything=True)
    assert whole.left == []
    acts_as(base, whole.adapter, tuned, tmp_path / "adapter")


def test_convolutions_have_ranks_of_their_own(unet):
    tuned = deepcopy(unet)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = extract(tuned, unet, rank=4, conv_rank=2)
    ranks = {path: change.config.r for path, change in changes(found.adapter).items()}
    assert ranks["down_blocks.0.resnets.0.conv1"] == 2
    assert ranks["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == 4
    assert found.adapter.tensors["conv_in"]["A"].shape == (2, 4, 3, 3)


def test_a_pipelines_parts(tiny, tmp_path):
    base, clip = tiny("llama"), tiny("llama")
    for name, models in (("base", (base, clip)), ("tuned", (merged(base), merged(clip, target_modules=["v_proj"])))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
        for part, model in zip(("unet", "text_encoder"), models, strict=True):
            model.save_pretrained(tmp_path / name / part)
    found = extract(tmp_path / "tuned", tmp_path / "base", rank=3)
    assert found.adapter.parts == ("unet", "text_encoder")
    assert "text_encoder.model.layers.0.self_attn.v_proj" in found.adapter.tensors
    assert "text_encoder.model.layers.0.self_attn.q_proj" not in found.adapter.tensors


def test_names_that_are_in_one_model_alone_are_told(tiny, tmp_path):
    base, tuned = ({"a.weight": torch.zeros(4, 5), "b.weight": torch.zeros(4, 4)} for _ in "12")
    tuned["a.weight"] = torch.ones(4, 5)
    tuned["b.weight"], tuned["c.weight"] = torch.ones(5, 4), torch.ones(2, 2)
    found = extract(tuned, base, rank=1)
    assert found.strange == ["b.weight", "c.weight"]
    assert found.adapter.tensors.keys() == {"a"}


def test_faulty_models_are_refused(tmp_path):
    values = {"a.weight": torch.ones(4, 5)}
    save_file(values, tmp_path / "a.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterError, match="say which rank"):
        extract(values, values)
    with pytest.raises(AdapterError, match="is a pickle, which could run code"):
        extract(tmp_path / "model.ckpt", values, rank=1)
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin are pickles"):
        extract(tmp_path / "only", values, rank=1)
    with pytest.raises(AdapterError, match="does not exist"):
        extract(tmp_path / "none", values, rank=1)
    with pytest.raises(AdapterError, match=r"no parameter of one shape in common: 'b\.weight' and 'a\.weight'"):
        extract({"b.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors", rank=1)
    with pytest.raises(AdapterError, match=r"a\.weight: NaN or infinity"):
        extract({"a.weight": torch.full((4, 5), torch.nan)}, values, rank=1)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(AdapterError, match="expected names of files beside it"):
        extract(tmp_path, values, rank=1)


@pytest.mark.parametrize("labels", [3, 32])
def test_linear_layers_beside_transposed_ones_are_not_turned(tiny, labels):
    from transformers import GPT2ForSequenceClassification

    base = GPT2ForSequenceClassification(type(tiny("gpt2").config)(**tiny("gpt2").config.to_dict() | {
        "num_labels": labels, "n_embd": 32, "pad_token_id": 0}))  # fmt: skip
    tuned = deepcopy(base)
    for layer in (tuned.score, tuned.transformer.h[0].attn.c_proj):
        nn.init.normal_(layer.weight)
    found = changes(extract(tuned, base, rank=32).adapter)
    for path, sign in (("score", lambda D: D), ("transformer.h.0.attn.c_proj", lambda D: D.t())):
        D = (tuned.get_submodule(path).weight - base.get_submodule(path).weight).detach()
        delta = found[path].update().delta(torch.empty(0, device="meta"))
        torch.testing.assert_close(delta, sign(D), rtol=1e-4, atol=1e-5)


def test_whole_numbers_that_differ_are_told():
    old = {"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(4, 3, dtype=torch.int32)}
    new = {name: tensor + 1 for name, tensor in old.items()}
    found = extract(new, old, rank=1)
    assert (found.left, found.same) == (["b.weight"], [])


def test_a_table_that_a_head_may_share_is_warned_of_and_a_head_alone_is_named(tiny):
    base = tiny("llama")
    weights = {name: tensor.detach() for name, tensor in base.named_parameters()}
    tied = {name: own for name, own in weights.items() if name != "lm_head.weight"}
    tuned = {name: own + torch.randn_like(own) for name, own in tied.items()}
    with pytest.warns(UserWarning, match="shares the weight of model.embed_tokens .a tied head., it is not changed"):
        extract(tuned, tied, rank=1, everything=True)
    head = {"lm_head.weight": torch.randn_like(tied["model.embed_tokens.weight"])}
    with pytest.raises(AdapterError, match=r"nothing to extract; in one of them alone are lm_head.weight"):
        extract(tied | head, tied, rank=1)
    own = {name: tensor + torch.randn_like(tensor) for name, tensor in (tied | head).items()}
    assert extract(own, tied | head, rank=1, everything=True).left == []
