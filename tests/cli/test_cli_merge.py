"""`veneer merge`: adapters of any format into their base, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from veneer import Adapter, LoraConfig


@pytest.fixture
def adapters(tiny_base, tmp_path):
    """Two PEFT folders for the tiny base, with layers in common."""
    paths = []
    for name, r, alpha, layers in (("one", 2, 6, (0, 1)), ("two", 3, 1, (1,))):
        tensors = {
            f"model.layers.{i}.mlp.up_proj": {"A": torch.randn(r, 32), "B": 0.1 * torch.randn(64, r)} for i in layers
        }
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["up_proj"], base_model_name_or_path=str(tiny_base))
        config.target_modules = [*tensors]
        paths.append(Adapter(config, tensors).save(tmp_path / name))
    return paths


def weights(folder) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_several_adapters_are_merged_with_their_weights(veneer, adapters, tiny_base, tmp_path):
    one, two = adapters
    said = veneer("merge", f"{one}:0.7", f"{two}:-2", "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    before, after = weights(tiny_base), weights(tmp_path / "merged")
    for name, old in before.items():
        expected = old.clone()
        for folder, weight in ((one, 0.7), (two, -2.0)):
            held = Adapter.load(folder)
            if own := held.tensors.get(name.removesuffix(".weight")):
                expected += weight * held.config.lora_alpha / held.config.r * own["B"] @ own["A"]
        torch.testing.assert_close(after[name], expected)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_name_of_the_library_is_merged_and_asked(veneer, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    assert veneer("library", "add", adapters[0], "--name", "mine").code == 0
    assert veneer("merge", "mine:0.5", "--out", tmp_path / "merged").code == 0
    said = veneer("generate", "mine", "--prompt", "x", "--max-new-tokens", "2")
    assert said.code == 0, said.err


def test_a_pipeline(veneer, tmp_path):
    """A kohya file into a folder of diffusers."""
    import diffusers

    base = tmp_path / "base"
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    unet.save_pretrained(base / "unet")
    (base / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    flat, down, up = f"lora_unet_{path.replace('.', '_')}", torch.randn(2, 12), torch.randn(8, 2)
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "style.safetensors")
    out = tmp_path / "merged"
    said = veneer("merge", f"{tmp_path / 'style.safetensors'}:0.5", "--base", base, "--out", out)
    assert (said.code, said.out.strip()) == (0, str(out)), said.err
    after = diffusers.UNet2DConditionModel.from_pretrained(out / "unet").get_submodule(path).weight
    torch.testing.assert_close(after, unet.get_submodule(path).weight + 0.5 * 0.5 * up @ down)
    said = veneer("merge", tmp_path / "style.safetensors", "--out", tmp_path / "other")
    assert said.code == 2
    assert "give --base" in said.err


def test_what_is_refused_leaves_nothing(veneer, adapters, tiny_base, tmp_path):
    one, two = adapters
    out = tmp_path / "merged"
    for arguments, words in (
        ((f"{one}:much",), "expected ADAPTER or ADAPTER:WEIGHT"),
        ((f"{one}:nan",), "a finite number"),
        ((one, tmp_path / "none"), "there is no such file or folder"),
        ((one, "--dtype", "int8"), "dtype 'int8' is not one of"),
        ((one, "--base", tmp_path / "one"), "is a folder with an adapter"),
    ):
        said = veneer("merge", *arguments, "--out", out)
        assert said.code == 2, said
        assert words in said.err
    broken = Adapter.load(two)
    broken.tensors["model.layers.1.mlp.up_proj"]["B"][0, 0] = torch.nan
    said = veneer("merge", one, broken.save(tmp_path / "broken"), "--out", out)
    assert said.code == 2
    assert "adapter 2: NaN or infinity in: model.layers.1.mlp.up_proj.B" in said.err
    other = Adapter.load(two)
    other.config.base_model_name_or_path = "another/base"
    other.save(two)
    said = veneer("merge", one, two, "--out", out)
    assert said.code == 2
    assert "'another/base'" in said.err
    assert "give --base" in said.err
    assert veneer("merge", one, two, "--base", tiny_base, "--out", out).code == 0
    assert veneer("merge", one, "--out", out).code == 2
    assert sorted(path.name for path in tmp_path.iterdir() if "merged" in path.name) == ["merged"]
