"""kohya's files: one alpha for all that is written, names for each base, what a file says of itself, and all faults."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from veneer import AdapterError, LoraConfig, files
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.adapter import Adapter
from veneer.files import kohya, lycoris

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
Q, K, PROJ = f"{UNET}.attn1.to_q", f"{UNET}.attn2.to_k", "unet.mid_block.attentions.0.proj_in"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
WIDTH = {"SD1": 768, "SD2": 1024, "SDXL": 2048}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def change(r: int, alpha: float, dtype=torch.float32, columns: int = 8, **more) -> Change:
    A, B = torch.randn(r, columns, dtype=dtype), torch.randn(6, r, dtype=dtype)
    return Change(LoraConfig(r, alpha, **more), {"A": A, "B": B})


def adapter(parts=("unet",), metadata=None, **every: Change) -> Adapter:
    paths = {"q": Q, "k": K, "proj": PROJ, "encoder": ENCODER, "second": ENCODER.replace("encoder.", "encoder_2.", 1)}
    return adapter_of({paths[name]: own for name, own in every.items()}, parts=parts, metadata=metadata)


def written(adapter: Adapter, tmp_path, format=kohya, **more) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = tmp_path / "adapter.safetensors"
    format.write(adapter, path, **more)
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    found = {}
    for path, own in changes(adapter).items():
        A, B, scale = own.update().double().factors()
        found[path] = scale * (B @ A)
    return found


def alphas(tensors: dict[str, Tensor]) -> list[float]:
    return [tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")]


MIXED = [  # rank and alpha of each layer, and whether powers of two make them one
    ([(4, 4.0), (8, 8.0), (16, 1.0)], 1.0),
    ([(4, 4.0), (4, 4.0), (16, 16.0)], 4.0),
    ([(3, 3.0), (4, 12.0), (5, 6.0)], 3.0),
    ([(4, 4.0), (4, -8.0), (4, 0.0)], 4.0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("numbers", "alpha"), MIXED)
def test_what_is_written_has_one_alpha_and_no_number_is_rounded(tmp_path, numbers, alpha, dtype):
    given = adapter(**{name: change(*own, dtype) for name, own in zip(("q", "k", "proj"), numbers, strict=True)})
    tensors, about = written(given, tmp_path)
    assert set(alphas(tensors)) == {alpha}
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name.split(".", 1)[1]} == {dtype}
    again = deltas(kohya.read(tensors, about, ""))
    for path, expected in deltas(given).items():
        assert torch.equal(again[path], expected)


def test_other_alphas_are_folded_in_fp32_and_rounded_once(tmp_path):
    given = adapter(
        q=change(4, 4.0, torch.float16), k=change(4, 4.0, torch.float16), proj=change(4, 5.0, torch.float16)
    )
    tensors, _ = written(given, tmp_path)
    assert set(alphas(tensors)) == {4.0}
    up = tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
    assert torch.equal(up, (given.tensors[PROJ]["B"].double() * 1.25).half())


def test_what_fp16_cannot_hold_is_held_in_fp32(tmp_path):
    small, large = change(4, 1.0, torch.float16), change(4, 1024.0, torch.float16)
    large.tensors["B"].fill_(1000)
    tensors, about = written(given := adapter(q=small, proj=large), tmp_path)
    up = tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
    assert up.dtype == torch.float32
    assert torch.equal(deltas(kohya.read(tensors, about, ""))[PROJ], deltas(given)[PROJ])


def test_what_fp16_would_lose_below_is_held_in_fp32(tmp_path):
    given = adapter(q=change(4, 8.0, torch.float16), k=change(4, 3e-6, torch.float16))
    written(given, tmp_path)
    found = deltas(files.read(tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(found, deltas(given), rtol=1e-5, atol=0)


def test_an_alpha_of_zero_is_zeros_as_others_take_it_for_the_rank(tmp_path):
    given = adapter(q=change(4, 8.0), k=change(4, 0.0))
    for format in (kohya, lycoris):
        tensors, _ = written(given, tmp_path, format)
        assert 0 not in alphas(tensors)
        torch.testing.assert_close(deltas(files.read(tmp_path / "adapter.safetensors")), deltas(given))


def test_rslora_is_folded(tmp_path):
    given = adapter(q=change(4, 4.0, use_rslora=True), proj=change(16, 4.0, use_rslora=True))
    tensors, about = written(given, tmp_path)
    assert alphas(tensors) == [8.0, 8.0]  # 4 · √4, and 4 · √16 folded by 2
    again = deltas(kohya.read(tensors, about, ""))
    assert all(torch.equal(again[path], expected) for path, expected in deltas(given).items())


def test_an_alpha_that_fp32_rounds_is_written_exactly(tmp_path):
    given = adapter(q=change(2, 1.1), proj=change(2, 1.1))
    tensors, about = written(given, tmp_path)
    assert alphas(tensors) == [1.1, 1.1]
    assert changes(kohya.read(tensors, about, ""))[Q].config.lora_alpha == 1.1


@pytest.mark.parametrize("family", WIDTH)
def test_layers_are_called_as_the_base_has_it(tmp_path, family):
    parts = {"SDXL": ("unet", "text_encoder", "text_encoder_2")}.get(family, ("unet", "text_encoder"))
    second = {"second": change(4, 4.0)} if family == "SDXL" else {}
    given = adapter(parts, k=change(4, 4.0, columns=WIDTH[family]), encoder=change(4, 4.0), **second)
    tensors, about = written(given, tmp_path)
    layers = {name.split(".")[0] for name in tensors}
    own = "transformer_blocks_0_attn2_to_k"
    encoder = "text_model_encoder_layers_0_self_attn_q_proj"
    assert (
        layers
        == {
            "SD1": {f"lora_unet_down_blocks_0_attentions_0_{own}", f"lora_te_{encoder}"},
            "SD2": {f"lora_unet_down_blocks_0_attentions_0_{own}", f"lora_te_{encoder}"},
            "SDXL": {f"lora_unet_input_blocks_1_1_{own}", f"lora_te1_{encoder}", f"lora_te2_{encoder}"},
        }[family]
    )
    again = kohya.read(tensors, about, "")
    assert again.parts == parts
    assert again.tensors.keys() == given.tensors.keys()
    assert about["ss_base_model_version"] == {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0"}[family]
    assert about["ss_v2"] == str(family == "SD2")
    tensors, _ = written(given, tmp_path, sgm=False)
    assert f"lora_unet_down_blocks_0_attentions_0_{own}.alpha" in tensors


def test_an_adapter_of_one_model_is_written_where_its_paths_say_which(tmp_path):
    own = {path.removeprefix("unet."): change(4, 4.0) for path in (Q, PROJ)}
    tensors, about = written(adapter_of(own), tmp_path)
    assert kohya.read(tensors, about, "").parts == ("unet",)
    with pytest.raises(AdapterError, match="say of which part"):
        kohya.write(adapter_of({"model.layers.0": change(4, 4.0)}), tmp_path / "no")
    tensors, about = written(adapter_of({"model.layers.0": change(4, 4.0)}), tmp_path, lycoris)
    again = lycoris.read(tensors, about, "")
    assert (again.parts, list(again.tensors)) == ((), ["model_layers_0"])  # a model's own paths find it


def test_what_a_file_says_of_itself_is_kept_and_what_is_no_longer_true_is_not(tmp_path):
    said = {
        "ss_tag_frequency": json.dumps({"10_style": {"mystyle": 12}}),
        "modelspec.trigger_phrase": "mystyle",
        "modelspec.title": "My style",
        "modelspec.hash_sha256": "0xabc",
        "sshs_model_hash": "abc",
        "ss_network_dim": "128",
        "ss_network_alpha": "64",
        "ss_output_name": "my-style",
        "ss_base_model_version": "sd_v1_custom",
    }
    given = adapter(metadata=said, q=change(4, 2.0), k=change(4, 2.0, columns=768))
    tensors, about = written(given, tmp_path)
    kept = {
        "ss_tag_frequency",
        "modelspec.trigger_phrase",
        "modelspec.title",
        "ss_output_name",
        "ss_base_model_version",
    }
    assert {key: about[key] for key in kept} == {key: said[key] for key in kept}
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", "2.0")
    assert about["ss_network_module"] == "networks.lora"
    assert about["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & about.keys()
    again = kohya.read(tensors, about, "").metadata
    assert again == {key: value for key, value in about.items() if key != "format"}


def test_the_family_may_be_known_from_what_the_adapter_says_of_itself(tmp_path):
    for version, prefix in (("sdxl_base_v1-0", "lora_te1_"), ("sd_v2", "lora_te_"), ("", "lora_te_")):
        given = adapter(("text_encoder",), {"ss_base_model_version": version}, encoder=change(4, 4.0))
        tensors, _ = written(given, tmp_path)
        assert all(name.startswith(prefix) for name in tensors)


def test_layers_without_an_alpha_have_their_rank(tmp_path):
    own = change(4, 4.0).tensors
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": own["A"], f"{name}.lora_up.weight": own["B"]}
    read = kohya.read(tensors, {}, "")
    assert torch.equal(deltas(read)[PROJ], own["B"].double() @ own["A"].double())


def test_values_are_not_read():
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.empty(4, 8, device="meta"),
        f"{name}.lora_up.weight": torch.empty(6, 4, device="meta"),
        f"{name}.alpha": torch.tensor(2.0),
    }
    assert kohya.read(tensors, {}, "").config.lora_alpha == 2


def test_what_no_such_file_holds_is_refused_with_all_reasons(tmp_path):
    loha = Change(
        LoraConfig(2, 2, peft_type="LOHA"),
        {name: torch.ones(6, 2) if name[0] == "B" else torch.ones(2, 8) for name in ("A1", "A2", "B1", "B2")},
    )
    with pytest.raises(AdapterError, match=r"(?s)LOHA.*--to lycoris.*proj_in"):
        kohya.write(adapter(proj=loha), tmp_path / "no")
    biased = change(4, 4.0, options={"lora_bias": True})
    biased.tensors["b"] = torch.ones(6)
    given = adapter(("unet", "vae"), q=biased)
    given.tensors["unet.conv_in"] = {"value": torch.ones(2)}
    given.config.modules_to_save = ["conv_in"]
    for format in (kohya, lycoris):
        with pytest.raises(AdapterError, match=r"(?s)LORA with b, which.*trained whole.*conv_in"):
            format.write(given, tmp_path / "no")
    vae = adapter_of({"vae.encoder.conv_in": change(4, 4.0)}, parts=("vae",))
    with pytest.raises(AdapterError, match="a part called vae, which has no name there"):
        lycoris.write(vae, tmp_path / "no")
    twins = adapter_of({"unet.a.b_c": change(4, 4.0), "unet.a_b.c": change(4, 4.0)}, parts=("unet",))
    with pytest.raises(AdapterError, match="two layers of one name"):
        kohya.write(twins, tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"], kohya),
        (["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.dora_scale"], kohya),
        (["lora_prior_unet_x.lora_up.weight", "stranger"], kohya),
        (["lora_unet_conv_in.hada_w1_a"], lycoris),
        (["lora_unet_conv_in.lora_up.weight", "lora_unet_conv_norm_out.w_norm"], lycoris),
        (["lycoris_conv_in.lora_up.weight"], lycoris),
        (["lora_unet_conv_in.oft_blocks"], lycoris),  # read with a refusal that names it
        (["unet.conv_in.lora_A.weight"], None),
        (["lora_unet_conv_in"], None),
        (["base_model.model.conv_in.lora_A.weight"], None),
        ([], None),
    ],
)
def test_formats_are_told_apart_by_their_names(names, format):
    assert [own for own in (kohya, lycoris) if own.detects(names, {})] == ([format] if format else [])
