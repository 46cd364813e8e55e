"""Files are told apart by what they hold, read within limits, and written whole or not at all."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from veneer import AdapterError, files
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.config import LoraConfig

PAIR = {"A": (2, 4), "B": (3, 2)}
NAMES = {
    "cloneofsimo": ["unet:0:down", "unet:0:up"],
    "diffusers": [
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "unet.mid_block.attentions.0.proj_in.lora_B.weight",
    ],
    "kohya": [f"lora_unet_mid_block_attentions_0_proj_in.lora_{end}.weight" for end in ("down", "up")],
    "loralib": ["fc.lora_A", "fc.lora_B"],
    "lycoris": [f"lora_unet_mid_block_attentions_0_proj_in.hada_w{end}" for end in ("1_a", "1_b", "2_a", "2_b")],
}


def _flat(names):
    return {name: torch.randn(2, 2) for name in names}


@pytest.fixture
def adapter():
    tensors = {name: torch.randn(*shape) for name, shape in PAIR.items()}
    return adapter_of({"fc": Change(LoraConfig(r=2, lora_alpha=2), tensors)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["x.safetensors", "adapter_model.bin", "lora.pt"])
def test_the_content_says_the_format_and_the_name_nothing(tmp_path, name, file):
    save_file(_flat(NAMES[name]), tmp_path / file)
    assert files.detect(tmp_path / file) == name


def test_a_folder_of_peft_is_known_by_its_config(tmp_path, adapter):
    assert files.write(adapter, tmp_path / "own", "peft") == tmp_path / "own"
    for place in ("own", "own/adapter_model.safetensors"):
        assert files.detect(tmp_path / place) == "peft"
        assert files.read(tmp_path / place).tensors.keys() == {"fc"}
    with pytest.raises(AdapterError, match="not read as kohya"):
        files.read(tmp_path / "own", "kohya")


def test_a_runs_folder_and_one_with_one_file_are_gone_into(tmp_path, adapter):
    files.write(adapter, tmp_path / "run" / "adapter", "peft")
    files.write(adapter, tmp_path / "one" / "any.safetensors", "loralib")
    (tmp_path / "one" / "README.md").write_text("a picture")
    assert files.read(tmp_path / "run").tensors.keys() == files.read(tmp_path / "one").tensors.keys()
    save_file(_flat("a"), tmp_path / "one" / "other.safetensors")
    with pytest.raises(AdapterError, match=r"several files, name one: any\.safetensors, other\.safetensors"):
        files.read(tmp_path / "one")


def test_unknown_and_unclear_content_is_one_error_that_shows_it(tmp_path):
    save_file(_flat(["model.weight", "model.bias"]), tmp_path / "a")
    with pytest.raises(AdapterError) as told:
        files.read(tmp_path / "a")
    assert "It holds model.bias, model.weight; tried: cloneofsimo, diffusers, kohya" in str(told.value)
    save_file(_flat([*NAMES["loralib"], *NAMES["diffusers"]]), tmp_path / "a")
    with pytest.raises(AdapterError, match="may be of diffusers, loralib: say which"):
        files.detect(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"kohia is no format.*did you mean 'kohya'"):
        files.read(tmp_path / "a", "kohia")


def test_places_without_an_adapter_say_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for place, what in (
        ("nowhere", "does not exist"),
        ("", "holds no adapter.*notes.txt"),
        ("notes.txt", "not a whole"),
    ):
        with pytest.raises(AdapterError, match=what):
            files.read(tmp_path / place)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("/nonexistent/never",)


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "before torch 1.6"])
def test_a_pickle_is_opened_for_tensors_alone(tmp_path, legacy):
    def save(value):
        torch.save(value, tmp_path / "lora.pt", _use_new_zipfile_serialization=not legacy)

    save({"state_dict": _flat(NAMES["loralib"])})
    assert files.read(tmp_path / "lora.pt", alpha=2).tensors.keys() == {"fc"}
    save({**_flat(NAMES["loralib"]), "fc.bomb": _Bomb()})
    with pytest.raises(AdapterError, match="cannot be opened safely"):
        files.read(tmp_path / "lora.pt", alpha=2)
    save({**_flat(NAMES["loralib"]), "epoch": 3, "odd.bias": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(AdapterError, match=r"no tensors: epoch\n.*of floats: odd.bias"):
        files.read(tmp_path / "lora.pt", alpha=2)
    save(3)
    with pytest.raises(AdapterError, match="expected tensors by name or in a list"):
        files.read(tmp_path / "lora.pt", alpha=2)
    (tmp_path / "lora.pt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    with pytest.raises(AdapterError, match="cannot be opened safely"):
        files.read(tmp_path / "lora.pt")


def test_a_header_as_long_as_a_pickle_begins_is_one(tmp_path):
    for padding in range(0, 1024, 8):
        save_file(_flat(NAMES["loralib"]), tmp_path / "a", metadata={"x": "x" * padding})
        start = (tmp_path / "a").read_bytes()[:2]
        if start[0] == 0x80:
            assert files.detect(tmp_path / "a") == "loralib"
            break
    else:
        pytest.fail("no header of such a length")


def test_an_alpha_may_be_a_whole_number(tmp_path):
    save_file(
        {**_flat(NAMES["diffusers"]), "unet.mid_block.attentions.0.proj_in.alpha": torch.tensor(6)}, tmp_path / "a"
    )
    adapter = files.read(tmp_path / "a")
    assert (adapter.config.r, adapter.config.lora_alpha) == (2, 6)
    save_file({name: tensor.int() for name, tensor in _flat(NAMES["diffusers"]).items()}, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"expected tensors of BF16.*'I32'"):
        files.read(tmp_path / "a")


def test_values_are_not_read(tmp_path, adapter):
    files.write(adapter, tmp_path / "a", "loralib")
    start = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(start[: len(start) - 8] + b"\xff" * 8)  # NaN
    broken = files.read(tmp_path / "a")
    with pytest.raises(AdapterError, match="NaN"):
        files.attach(torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 3)}), broken)


@pytest.mark.parametrize("format", ["peft", "loralib", "lycoris"])
def test_what_is_no_number_is_not_written(tmp_path, adapter, format):
    adapter.tensors["fc"]["B"][1, 1] = float("nan")
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    with pytest.raises(AdapterError, match=r"NaN or infinity in: fc\.B; nothing was written"):
        files.write(adapter, out, format)
    assert not out.exists()


def test_what_is_there_is_replaced_with_force_alone(tmp_path, adapter):
    for name, place in (("loralib", tmp_path / "file"), ("peft", tmp_path / "folder")):
        files.write(adapter, place, name)
        with pytest.raises(AdapterError, match="exists already; nothing was written"):
            files.write(adapter, place, name)
        assert files.write(adapter, place, name, force=True) == place
    with pytest.raises(AdapterError, match="is a folder: loralib is one file"):
        files.write(adapter, tmp_path / "folder", "loralib", force=True)
    with pytest.raises(AdapterError, match="'beta' cannot be given for loralib"):
        files.write(adapter, tmp_path / "new", "loralib", beta=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_names_that_only_their_model_can_resolve_are_not_written_as_paths(tmp_path, format):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = files.read(tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match=r"whose dots only the model knows .*unet.double_blocks_0_img_attn_qkv"):
        files.write(adapter, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    files.write(adapter, tmp_path / "out", "kohya")


@pytest.mark.parametrize(
    ("tensors", "fields", "said"),
    [
        ({"A": (4, 6), "B": (5, 4)}, {"r": 8}, r"q: a LORA of rank 8 for a weight \(5, 6\) has A \(8, 6\)"),
        ({"B": (5, 4)}, {"r": 4}, "q: B alone are no LORA"),
        ({"A": (4, 6), "B": (5, 4)}, {"r": 4, "use_dora": True}, r"has .* magnitude \(5,\), found A"),
    ],
)
@pytest.mark.parametrize("format", ["kohya", "loralib", "lycoris", "peft"])
def test_tensors_that_are_not_the_configs_are_not_written(tmp_path, format, tensors, fields, said):
    own = {name: torch.ones(shape) for name, shape in tensors.items()}
    adapter = adapter_of({"q": Change(LoraConfig(lora_alpha=8, **fields), own)})
    with pytest.raises(AdapterError, match=said):
        files.write(adapter, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["diffusers", "kohya", "loralib", "lycoris", "peft"])
def test_tensors_that_overlap_in_memory_are_written(tmp_path, format):
    memory = torch.randn(8, 4)
    own = {"A": memory[:2], "B": memory[1:].t()[:3, :2]}
    adapter = adapter_of({"unet.mid_block.attentions.0.proj_in": Change(LoraConfig(r=2, lora_alpha=2), own)})
    adapter.parts = () if format == "loralib" else ("unet",)
    read = files.read(files.write(adapter, tmp_path / "out", format))
    ((_, found),) = read.tensors.items()
    torch.testing.assert_close(found, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["diffusers", "kohya", "loralib"])
def test_no_format_writes_infinity_for_what_was_finite(tmp_path, format, dtype):
    every = {
        f"unet.mid_block.attentions.{place}.proj_in": Change(
            LoraConfig(r=2, lora_alpha=alpha),
            {"A": (1e-4 * torch.randn(2, 4)).to(dtype), "B": (1e3 * torch.randn(3, 2)).to(dtype)},
        )
        for place, alpha in enumerate((2.0, 2e37))
    }
    adapter = adapter_of(every, parts=("unet",))
    if format == "kohya" or dtype == torch.float16:
        with pytest.raises(AdapterError, match=r"a scale of 1e\+37"):
            files.write(adapter, tmp_path / "out", format)
        assert not (tmp_path / "out").exists()
        return
    found = changes(files.read(files.write(adapter, tmp_path / "out", format)))
    for path, change in every.items():
        one, other = (own.update().double().delta(torch.empty(3, 4)) for own in (found[path], change))
        torch.testing.assert_close(one, other, rtol=0.02, atol=0)
