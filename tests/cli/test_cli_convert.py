"""`veneer convert`, through the real entry point."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import files
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.config import LoraConfig

PATHS = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in ("q", "k")]


@pytest.fixture
def source(tmp_path):
    """Two layers of a U-Net, of other ranks and alphas."""
    every = {}
    for place, path in enumerate(PATHS):
        tensors = {"A": torch.randn(2 + place, 8), "B": torch.randn(8, 2 + place)}
        every[path] = Change(LoraConfig(r=2 + place, lora_alpha=5), tensors)
    adapter = adapter_of(every, parts=["unet"], metadata={"ss_comment": "mine"})
    return files.write(adapter, tmp_path / "in.safetensors", "kohya")


def _deltas(path, **asked):
    found = changes(files.read(path, **asked))
    return {
        name.removeprefix("unet."): change.update().delta(torch.empty(8, 8, device="meta"))
        for name, change in found.items()
    }


def test_it_says_what_it_read_wrote_and_folded(veneer, source, tmp_path):
    said = veneer("convert", source, tmp_path / "out.safetensors", "--to", "diffusers")
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0] == f"read {source} (kohya): LoRA, 2 layers (unet 2), ranks 2 to 3"
    assert lines[1] == f"wrote {tmp_path / 'out.safetensors'} (diffusers): LoRA, 2 layers (unet 2), ranks 2 to 3"
    assert lines[2] == "  layers whose scale is inside the factors now: 2"
    assert lines[3] == "  layers filled up with zeros, to rank 3: 1"
    torch.testing.assert_close(_deltas(tmp_path / "out.safetensors"), _deltas(source))


def test_a_round_trip_keeps_every_change(veneer, source, tmp_path):
    steps = [(source, "a.safetensors", "diffusers"), ("a.safetensors", "b.safetensors", "kohya")]
    steps += [("b.safetensors", "c", "peft"), ("c", "d.safetensors", "loralib")]
    for start, end, name in steps:
        said = veneer("convert", tmp_path / start, tmp_path / end, "--to", name)
        assert (said.code, said.err) == (0, "")
        torch.testing.assert_close(_deltas(tmp_path / end), _deltas(source))
    assert (tmp_path / "c" / "unet" / "adapter_config.json").is_file()
    for start, end, name in (("c", "alone", "peft"), ("alone", "e.safetensors", "diffusers")):
        said = veneer("convert", tmp_path / start, tmp_path / end, "--to", name, "--part", "unet")
        assert (said.code, said.err) == (0, "")
    assert files.read(tmp_path / "alone").parts == ()
    assert files.read(tmp_path / "e.safetensors").parts == ("unet",)
    torch.testing.assert_close(_deltas(tmp_path / "e.safetensors"), _deltas(source))


def test_nothing_is_overwritten_without_force(veneer, source, tmp_path):
    before = source.read_bytes()
    said = veneer("convert", source, source, "--to", "diffusers")
    assert said.code != 0
    assert "exists already" in said.err
    assert source.read_bytes() == before
    assert veneer("convert", source, source, "--to", "diffusers", "--force").code == 0
    assert files.detect(source) == "diffusers"


def test_alpha_precision_and_parts_are_told(veneer, source, tmp_path):
    save_file({"fc.lora_A": torch.randn(2, 8) * 1e5, "fc.lora_B": torch.randn(8, 2)}, tmp_path / "raw")
    one = ["convert", tmp_path / "raw", tmp_path / "out", "--to", "peft"]
    said = veneer(*one)
    assert said.code != 0
    assert "--alpha" in said.err
    assert "too large for float16: fc.A" in veneer(*one, "--alpha", "4", "--dtype", "float16").err
    assert not (tmp_path / "out").exists()
    assert veneer(*one, "--alpha", "4", "--dtype", "bfloat16").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert "'unet'" in veneer("convert", source, tmp_path / "x.safetensors", "--to", "kohya", "--part", "prior").err
    said = veneer("convert", tmp_path / "raw", tmp_path / "x.safetensors", "--to", "diffusers", "--alpha", "4")
    assert "--part unet" in said.err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_pipelines_adapter_is_not_for_a_language_model(veneer, source, tiny_base, tmp_path):
    for command in (("merge", source, "--out", tmp_path / "merged"), ("generate", source, "--prompt", "x")):
        said = veneer(*command, "--base", tiny_base)
        assert said.code == 2
        assert "a pipeline's unet" in said.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "format", "words"),
    [
        ("out", "kohya", "is a folder's name, and kohya is a file"),
        ("out.pt", "kohya", "is a pickle's name, and none is written"),
        ("out.safetensors", "peft", "is a file's name, and peft is a folder"),
    ],
)
def test_a_name_that_says_something_else_is_refused(veneer, source, tmp_path, name, format, words):
    said = veneer("convert", source, tmp_path / name, "--to", format)
    assert said.code == 2
    assert words in said.err
    assert not (tmp_path / name).exists()


def test_what_the_precision_cannot_hold_is_refused(veneer, source, tmp_path):
    adapter = files.read(source)
    adapter.tensors[PATHS[0]] = {name: 1e-9 * own for name, own in adapter.tensors[PATHS[0]].items()}
    files.write(adapter, tmp_path / "small.safetensors", "kohya")
    out = tmp_path / "out.safetensors"
    said = veneer("convert", tmp_path / "small.safetensors", out, "--to", "kohya", "--dtype", "float16")
    assert said.code == 2
    assert "too small for float16: unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.A" in said.err
    assert not out.exists()
