"""PEFT on layers that are not linear: the same folder gives the same outputs and gradients there and here."""

import copy

import pytest
import torch
from torch import nn

import veneer

peft = pytest.importorskip("peft")


def scaled_table() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(7, 6, 0, embed_scale=2.5)


def tokens() -> torch.Tensor:
    return torch.randint(1, 7, (2, 5))


LAYERS = {
    "table": (lambda: nn.Embedding(7, 6), tokens),
    "table with padding": (lambda: nn.Embedding(7, 6, padding_idx=0), tokens),
    "scaled table": (scaled_table, tokens),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), lambda: torch.randn(2, 4, 7, 6)),
    "point": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), lambda: torch.randn(2, 2, 4, 5, 6)),
}
SETTINGS = {"plain": {}, "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 5}}


@pytest.fixture(params=LAYERS)
def base(request) -> nn.Module:
    return nn.Sequential(LAYERS[request.param][0]()).requires_grad_(False)


@pytest.fixture
def x(request, base) -> torch.Tensor:
    return LAYERS[request.node.callspec.params["base"]][1]()


@pytest.fixture(params=SETTINGS)
def settings(request) -> dict[str, object]:
    return {"init_lora_weights": False, "target_modules": ["0"], **SETTINGS[request.param]}


def _agree(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    outputs, gradients = [], []
    for model in (ours, theirs):
        outputs.append(y := model(x))
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients.append([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) == 2
    for found, wanted in zip(*gradients, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_what_veneer_saves_peft_reads(base, x, settings, tmp_path):
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**settings))
    ours.save_pretrained(tmp_path)
    _agree(ours, peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True), x)


def test_what_peft_saves_veneer_reads(base, x, settings, tmp_path):
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(ours, tmp_path, is_trainable=True)
    _agree(ours, theirs, x)
    ours.save_pretrained(tmp_path / "again")
    adapter = veneer.Adapter.load(tmp_path / "again")
    adapter.save(tmp_path / "twice")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "twice" / weights).read_bytes()


def test_merging_gives_the_weights_that_peft_gives(base, settings, tmp_path):
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**settings))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    torch.testing.assert_close(ours.merge_and_unload().state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_table_starts_as_it_does_there():
    base = nn.Sequential(nn.Embedding(500, 64))
    update = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["0"]))[0].adapters["default"]
    assert not update.A.any()
    assert 0.9 < update.B.std() < 1.1
