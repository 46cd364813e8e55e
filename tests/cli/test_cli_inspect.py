"""`veneer inspect`: what a file is, what is suspicious, and exit code 2 where it is unfit for use."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from veneer import Adapter, LoraConfig

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SAID = {
    "ss_network_dim": "4",
    "ss_base_model_version": "sd_v1",
    "ss_tag_frequency": json.dumps({"10_mine": {"mystyle": 9, "cat": 2}}),
    "modelspec.title": "My\x1b[31m Style",
    "ss_steps": "1200",
}


@pytest.fixture
def kohya(tmp_path):
    """A file of Stable Diffusion 1's shape, of two layers."""

    def write(name="my-style.safetensors", metadata=SAID, **changed):
        tensors = {}
        for layer, rows, columns in ((QUERY, 320, 768), (TEXT, 3072, 768)):
            tensors[f"{layer}.lora_down.weight"] = torch.randn(4, columns).half()
            tensors[f"{layer}.lora_up.weight"] = torch.randn(rows, 4).half()
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
        save_file(tensors | changed, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder for a language model."""
    tensors = {f"model.layers.{i}.self_attn.q_proj": {"A": torch.randn(8, 64), "B": torch.randn(64, 8)} for i in (0, 1)}
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], base_model_name_or_path="some/base")
    return Adapter(config, tensors).save(tmp_path / "folder")


def lines(said) -> dict[str, str]:
    """Label → text, of the first lines."""
    assert said.code == 0, said.err
    rows = said.out.split("\n\n")[0].splitlines()[1:]
    return dict(row.split("  ", 1) for row in rows if not row.startswith(" "))


def test_a_kohya_file(veneer, kohya):
    said = veneer("inspect", kohya())
    told = {label: text.strip() for label, text in lines(said).items()}
    assert told["format"] == "kohya"
    assert told["base"] == "SD 1.x (its cross-attention reads width 768) · sd_v1"
    assert told["method"] == "LoRA"
    assert told["rank"] == "4"
    assert told["alpha"] == "2"
    assert told["scale"] == "0.5"
    assert told["layers"] in ("2 (unet 1, text_encoder 1)", "2 (text_encoder 1, unet 1)")
    assert told["trigger words"] == "mystyle (9), cat (2)"
    assert "cross-attention k" in said.out
    assert "My [31m Style" in said.out  # what a terminal would obey is not passed on
    assert "suspicious" not in said.out


def test_a_peft_folder_and_a_name_of_the_library(veneer, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    assert "Llama-like, width 64, 2 layers" in veneer("inspect", folder).out
    assert veneer("library", "add", folder, "--name", "mine").code == 0
    said = veneer("inspect", "mine", "--json")
    assert json.loads(said.out)["base"]["name"] == "some/base"


def test_json_says_the_same_with_every_layer(veneer, kohya):
    told = json.loads(veneer("inspect", kohya(), "--json").out)
    assert told["format"] == "kohya"
    assert told["ranks"] == {"4": 2}
    assert told["metadata"]["ss_steps"] == "1200"
    assert len(told["layers"]) == 2
    assert told["values"]["norm"] == pytest.approx(sum(one["norm"] ** 2 for one in told["layers"].values()) ** 0.5)
    told = json.loads(veneer("inspect", kohya(), "--json", "--no-values").out)
    assert told["values"] is None


def test_layers_and_metadata_are_listed_when_asked_for(veneer, kohya):
    path = kohya()
    assert "attn2.to_k" not in veneer("inspect", path, "--no-values").out
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in veneer("inspect", path, "--layers").out
    assert "ss_tag_frequency" in veneer("inspect", path, "--metadata").out


def test_names_of_strangers_are_shown_without_what_a_terminal_obeys(veneer, tmp_path):
    path = "model.layers.0.\x1b]0;mine\x07q_proj"
    config = LoraConfig(r=2, target_modules=[".*q_proj"])
    folder = Adapter(config, {path: {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}}).save(tmp_path / "folder")
    said = veneer("inspect", folder, "--layers", "--metadata")
    assert said.code == 0, said.err
    assert "q_proj" in said.out
    assert "\x1b" not in said.out
    assert "\x07" not in said.out


def test_values_of_large_files_are_read_when_asked_for(veneer, kohya, monkeypatch):
    monkeypatch.setattr("veneer.cli.inspect.READ_UP_TO", 0)
    said = veneer("inspect", kohya())
    assert "--values reads them" in said.out
    assert "‖ΔW‖" not in said.out
    assert "‖ΔW‖" in veneer("inspect", kohya(), "--values").out


def test_what_is_suspicious_is_said_and_is_no_error(veneer, kohya):
    said = veneer(
        "inspect", kohya(metadata={"ss_network_dim": "32"}, **{f"{TEXT}.lora_up.weight": torch.zeros(3072, 4)})
    )
    assert said.code == 0
    assert "suspicious: layers that change nothing, as if never trained: text_encoder" in said.out
    assert "suspicious: the metadata says ss_network_dim='32', and the tensors have rank 4" in said.out
    assert "suspicious: tensors of several types" in said.out


def test_a_file_unfit_for_use_is_shown_with_exit_code_2(veneer, kohya, folder, tmp_path):
    broken = torch.full((320, 4), torch.nan)
    for more in ((), ("--json",)):
        said = veneer("inspect", kohya(**{f"{QUERY}.lora_up.weight": broken}), *more)
        assert said.code == 2
        assert "SD 1.x" in said.out
        assert "NaN or infinity in: unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.B" in said.err
    path = kohya()
    path.write_bytes(path.read_bytes()[:-10])
    said = veneer("inspect", path)
    assert (said.code, said.out) == (2, "")
    assert f"not a whole safetensors file: it has {path.stat().st_size} bytes of {path.stat().st_size + 10}" in said.err
    for text, words in ((b"", "it is empty"), (b"a page of an error", "begins with b'a page of an err'")):
        path.write_bytes(text)
        assert words in veneer("inspect", path).err
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "eight"}')
    said = veneer("inspect", folder)
    assert said.code == 2
    assert "r should be a whole number" in said.err
    save_file({"something": torch.zeros(2)}, tmp_path / "strange.safetensors")
    said = veneer("inspect", tmp_path / "strange.safetensors")
    assert said.code == 2
    assert "no adapter file that veneer knows" in said.err


def test_nothing_heavy_is_loaded(folder):
    program = f"import sys; sys.argv[1:] = ['inspect', {str(folder)!r}]\nfrom veneer.cli import main\nmain()"
    after = "\nprint({'transformers', 'diffusers', 'peft', 'datasets'} & {*sys.modules})"
    program = f"import atexit, sys\natexit.register(lambda: exec({after!r}))\n{program}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"
