"""`veneer export --for vllm`: the same ΔW under vLLM's rules, or every rule that fails."""

import json
import re
import sys

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer.files
from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.apart.changes import Change, adapter_of, changes
from veneer.files import vllm


def _lora(r: int, alpha: float, seed: int, **settings: object) -> Change:
    draw = torch.Generator().manual_seed(seed)
    tensors = {"A": torch.randn(r, 12, generator=draw), "B": torch.randn(8, r, generator=draw)}
    return Change(LoraConfig(r=r, lora_alpha=alpha, **settings), tensors)


def _as_vllm(folder, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """ΔW as vLLM has it: one α and r, no pattern."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = veneer.files.read(folder).tensors
    assert all(own["A"].shape[0] == own["B"].shape[1] == config["r"] for own in tensors.values())
    return {path: scale * own["B"].to(dtype) @ own["A"].to(dtype) for path, own in tensors.items()}


def _deltas(own: dict[str, Change]) -> dict[str, Tensor]:
    return {
        path: change.config.lora_alpha
        / (change.config.r**0.5 if change.config.use_rslora else change.config.r)
        * change.tensors["B"].double()
        @ change.tensors["A"].double()
        for path, change in own.items()
    }


CASES = {
    "mostly an alpha of 0": ({"q": _lora(8, 0, 0), "k": _lora(8, 0, 1), "v": _lora(8, 4, 2)}, False, 8, 8, 1),
    "one rank": ({"q": _lora(16, 32, 0), "k": _lora(16, 32, 1)}, False, 16, 16, 0),
    "rsLoRA": ({"q": _lora(8, 32, 0, use_rslora=True), "k": _lora(8, 32, 1, use_rslora=True)}, False, 8, 8, 0),
    "rank 24": ({"q": _lora(24, 16, 0)}, False, 24, 32, 0),
    "rank 24, padded": ({"q": _lora(24, 16, 0)}, True, 32, 32, 1),
    "patterns": ({"q": _lora(4, 8, 0), "k": _lora(6, 3, 1), "v": _lora(4, 8, 2)}, False, 6, 8, 2),
    "all that is possible": (
        {"q": _lora(4, 8, 0), "k": _lora(6, 3, 1, use_rslora=True), "v": _lora(1, 8, 2)}, True, 8, 8, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize(("own", "pad", "r", "most", "notes"), CASES.values(), ids=CASES)
def test_the_change_is_the_same_under_one_rank_and_scale(own, pad, r, most, notes, tmp_path):
    written = vllm.export(adapter_of(own, base="smol"), tmp_path / "out", pad_rank=pad)
    assert (written.r, written.max_lora_rank, len(written.notes)) == (r, most, notes)
    torch.testing.assert_close(_as_vllm(written.path), _deltas(own), rtol=1e-6, atol=1e-6)
    config = peft.LoraConfig.from_pretrained(written.path)
    assert config.base_model_name_or_path == "smol"
    assert not config.rank_pattern
    assert not config.alpha_pattern
    with pytest.raises(AdapterError, match="exists already"):
        vllm.export(adapter_of(own), written.path)


def test_embeddings_keep_their_names(tmp_path):
    tensors = {"A": torch.randn(3, 40), "B": torch.randn(8, 3)}
    adapter = adapter_of({"embed_tokens": Change(LoraConfig(r=3), tensors)}, embeddings={"embed_tokens"})
    written = vllm.export(adapter, tmp_path / "out", pad_rank=True)
    again = veneer.files.read(written.path)
    assert again.embeddings == {"embed_tokens"}
    assert again.tensors["embed_tokens"]["A"].shape == (8, 40)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.conv = nn.Linear(12, 8), nn.Linear(12, 8), nn.Conv2d(4, 4, 3)
        self.table, self.attention = nn.Embedding(7, 12), nn.MultiheadAttention(8, 2)
        self.experts = nn.ParameterDict({"stack": torch.randn(3, 4, 4)})


def _adapted(**config: object):
    return get_peft_model(Model(), LoraConfig(r=2, **config)).get_adapter()


REFUSED = {
    "method": ({"peft_type": "LOHA", "target_modules": ["q"]}, [r"LOHA is not LoRA: .*resize --rank R\) \(q\)"]),
    "dora": ({"use_dora": True, "target_modules": ["q"]}, [r"no DoRA: .*\(q\)"]),
    "bias of B": ({"options": {"lora_bias": True}, "target_modules": ["q"]}, [r"no lora_bias: .*\(q\)"]),
    "kinds": ({"target_modules": ["conv", "attention"]}, ["no convolutions", r"attention\.base_layer\.out_proj"]),
    "beside": (
        {
            "target_modules": ["q"],
            "modules_to_save": ["k"],
            "bias": "lora_only",
            "trainable_token_indices": {"table": [1]},
        },
        [r"no modules_to_save: .*\(k\.weight", r'bias="none" alone: .*\(.*q\.bias', r"token_indices: .*\(table\)"],
    ),
    "experts": (
        {"target_modules": ["q"], "target_parameters": ["experts.stack"]},
        [r"no target_parameters, .*\(experts\)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "said"), REFUSED.values(), ids=REFUSED)
def test_every_rule_that_fails_is_named_with_the_way_out(config, said, tmp_path):
    with pytest.raises(AdapterError) as error:
        vllm.export(_adapted(**config), tmp_path / "out")
    for pattern in said:
        assert re.search(pattern, str(error.value)), str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_rank_beyond_all_and_parts_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"a rank of at most 512: veneer resize --rank 512 \(q\)"):
        vllm.export(adapter_of({"q": _lora(513, 1, 0)}), tmp_path / "out")
    with pytest.raises(AdapterError, match=r"pipeline's parts \(unet\), and vLLM serves language models"):
        vllm.export(adapter_of({"unet.q": _lora(2, 1, 0)}, parts=("unet",)), tmp_path / "out")


def test_the_command(tmp_path, capsys, monkeypatch):
    from veneer.cli import main

    own = {"q": _lora(24, 16, 0)}
    adapter_of(own).save(tmp_path / "in")
    command = ["veneer", "export", str(tmp_path / "in"), str(tmp_path / "out"), "--for", "vllm", "--pad-rank"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr().out
    assert "ranks 24 are filled up with zeros to 32" in said
    assert "--max-lora-rank 32" in said
    assert changes(veneer.files.read(tmp_path / "out"))["q"].config.r == 32
