"""Each fact of a summary, against an adapter made for it."""

import json

import torch

from veneer import Adapter, LoraConfig, get_peft_model
from veneer.analyse.summary import summary


def adapter(metadata=None, parts=(), **config):
    """Two layers, of ranks 4 and 2."""
    first = "unet." if parts else ""
    tensors = {
        f"{first}layers.0.to_q": {"A": torch.ones(4, 5), "B": torch.ones(6, 4)},
        f"{'text_encoder.' if parts else ''}layers.1.fc1": {"A": torch.ones(2, 5), "B": torch.ones(7, 2)},
    }
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"fc1": 2}, "target_modules": ["to_q", "fc1"], **config}
    return Adapter(LoraConfig(**config), tensors, metadata=metadata or {}, parts=parts)


def test_methods_ranks_alphas_scales_and_sizes():
    found = summary(adapter(), "peft")
    assert found.format == "peft"
    assert found.counts("method") == {"LoRA": 2}
    assert found.counts("rank") == {4: 1, 2: 1}
    assert found.counts("alpha") == {8: 2}
    assert found.counts("scale") == {2.0: 1, 4.0: 1}
    assert found.parameters == 4 * (5 + 6) + 2 * (5 + 7)
    assert found.bytes == 4 * found.parameters
    assert found.dtypes == {"float32": found.parameters}
    assert {path: layer.shape for path, layer in found.layers.items()} == {
        "layers.0.to_q": (6, 5),
        "layers.1.fc1": (7, 5),
    }
    assert found.counts("role") == {"attention q": 1, "feed-forward": 1}


def test_a_pipelines_parts_are_counted_and_are_not_in_the_way_of_roles():
    found = summary(adapter(parts=("unet", "text_encoder")))
    assert found.counts("part") == {"unet": 1, "text_encoder": 1}
    assert found.counts("role") == {"attention q": 1, "feed-forward": 1}


def test_methods_have_the_names_that_people_use(tiny):
    for settings, name in (
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA", "use_dora": True}, "DoRA over LoHa"),
        ({"peft_type": "LOKR"}, "LoKr"),
        ({"peft_type": "IA3"}, "(IA)³"),
    ):
        model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], **settings))
        found = summary(model.get_adapter())
        assert found.counts("method") == {name: 2}
        assert found.counts("rank") == ({} if "IA" in name else {2: 2} if name != "LoKr" else found.counts("rank"))


def test_what_is_trained_whole_biases_and_rows_are_told(tiny):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 3], bias="none"
    )
    found = summary(get_peft_model(tiny("llama"), config).get_adapter())
    assert found.saved("saved whole") == ["lm_head.weight"]
    assert found.saved("token rows") == ["model.embed_tokens"]
    found = summary(
        get_peft_model(tiny("opt"), LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only")).get_adapter()
    )
    assert len(found.saved("bias")) == 2


def test_a_dictionary_for_json_without_values_and_with():
    for values in (False, True):
        told = summary(adapter({"ss_tag_frequency": '{"a": {"b": 1}}'}), "kohya", values).to_dict()
        assert json.loads(json.dumps(told, allow_nan=False)) == told
        assert (told["values"] is None) == (not values)
        assert told["ranks"] == {"4": 1, "2": 1}
        assert told["trigger_words"] == {"b": 1}
        assert ("norm" in told["layers"]["layers.0.to_q"]) == values


def test_without_values_none_is_read():
    """A tensor on "meta" has none."""
    held = adapter()
    held.tensors = {path: {name: own.to("meta") for name, own in one.items()} for path, one in held.tensors.items()}
    assert summary(held, values=False).parameters == 68


def test_suspicious_numbers():
    def doubts(metadata=None, **config):
        return "\n".join(summary(adapter(metadata, **config), values=False).doubts)

    assert doubts() == ""
    assert "alpha is 0" in doubts(lora_alpha=0)
    assert "scale (alpha / rank) of 250, 500" in doubts(lora_alpha=1000)
    assert "ss_network_dim='32', and the tensors have rank 4, 2" in doubts({"ss_network_dim": "32"})
    assert "ss_network_alpha='1', and the tensors have alpha 8" in doubts({"ss_network_alpha": "1"})
    assert doubts({"ss_network_dim": "2", "ss_network_alpha": "8.0"}) == ""
    assert doubts({"ss_network_dim": "Dynamic"}) == ""
    mixed = adapter()
    mixed.tensors["layers.0.to_q"]["A"] = torch.ones(4, 5, dtype=torch.float16)
    assert "several types: float32 (48), float16 (20)" in "\n".join(summary(mixed).doubts)
    wide = adapter()
    wide.tensors["layers.1.fc1"] = {"A": torch.ones(2, 1), "B": torch.ones(7, 2)}
    assert "a rank larger than the layer, which is of no use: layers.1.fc1" in "\n".join(summary(wide).doubts)


def test_tensors_that_are_not_what_the_config_says():
    held = adapter(rank_pattern={})
    for values in (False, True):
        found = summary(held, values=values)
        assert found.counts("rank") == {4: 1, 2: 1}
        assert found.faults[0] == "the config says r=4, and the tensors have rank 2: layers.1.fc1"
        assert len(found.faults) == 1 + values
    torn = adapter()
    torn.tensors["layers.1.fc1"]["B"] = torch.ones(7, 3)
    assert "found A (2, 5), B (7, 3)" in "\n".join(summary(torn).faults)


def test_a_file_that_says_another_base_than_its_shapes():
    paths = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {paths: {"A": torch.ones(4, 2048), "B": torch.ones(6, 4)}}
    config = LoraConfig(r=4, target_modules=["to_k"])
    found = summary(Adapter(config, tensors, metadata={"ss_base_model_version": "sd_v1"}, parts=("unet",)))
    assert found.base.family == "SDXL"
    assert "the file says SD 1.x, and its cross-attention reads width 2048, which is SDXL" in "\n".join(found.doubts)
