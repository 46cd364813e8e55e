"""PEFT on layers that are not linear: the same folder gives the same outputs and gradients there and here."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
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
SETTINGS = {"plain": {}, "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 5}, "dora": {"use_dora": True, "r": 4}}


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
        gradients.append(sorted((p.grad.flatten() for p in model.parameters() if p.grad is not None), key=len))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) >= 2
    for found, wanted in zip(*gradients, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_what_veneer_saves_peft_reads(base, x, settings, tmp_path):
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**settings))
    ours.save_pretrained(tmp_path)
    _agree(ours, peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True), x)


def test_a_magnitude_is_read_by_the_name_of_its_module_too(tmp_path):
    base = nn.Sequential(nn.Linear(4, 3))
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(target_modules=["0"], use_dora=True))
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.0.lora_magnitude_vector.weight"] = 2 * tensors.pop(
        "base_model.model.0.lora_magnitude_vector"
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    x = torch.randn(2, 4)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(veneer.PeftModel.from_pretrained(base, tmp_path)(x), theirs(x))


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


@pytest.mark.parametrize("inputs", [[], ["0"]], ids=["rows", "columns"])
@pytest.mark.parametrize("direction", ["veneer to peft", "peft to veneer"])
@pytest.mark.parametrize("name", ["conv2d", "point", "conv3d"])
def test_scaled_convolutions_go_both_ways(name, inputs, direction, tmp_path):
    make, x = LAYERS[name][0], LAYERS[name][1]()
    base = nn.Sequential(make()).requires_grad_(False)
    twin = copy.deepcopy(base)
    if inputs and name != "point" and direction == "veneer to peft":
        pytest.skip("a fresh one has a gain for each place of the kernel, which PEFT has not")
    if direction == "veneer to peft":
        config = veneer.LoraConfig(peft_type="IA3", target_modules=["0"], options={"feedforward_modules": inputs})
        ours = veneer.get_peft_model(twin, config)
        nn.init.normal_(ours[0].adapters["default"].l)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    else:
        config = peft.IA3Config(target_modules=["0"], feedforward_modules=inputs, init_ia3_weights=False)
        theirs = peft.get_peft_model(base, config)
        theirs.save_pretrained(tmp_path)
        ours = veneer.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    outputs, gradients = [ours(x), theirs(x)], []
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for model, y in zip((ours, theirs), outputs, strict=True):
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients.append(next(p.grad.flatten() for p in model.parameters() if p.grad is not None))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    merged = [model.merge_and_unload().state_dict() for model in (ours, theirs)]
    torch.testing.assert_close(*merged, rtol=1e-5, atol=1e-6)


def _mixture() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(
        **sizes,
        intermediate_size=12,
        num_local_experts=3,
        vocab_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


EXPERTS = [["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]]


@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
@pytest.mark.parametrize("names", EXPERTS, ids=str)
@pytest.mark.parametrize("direction", ["veneer to peft", "peft to veneer"])
def test_stacked_experts_go_both_ways(names, direction, tmp_path):
    base, tokens = _mixture(), torch.arange(3, 15).view(2, 6)
    twin = copy.deepcopy(base)
    settings = {"target_modules": [], "target_parameters": names, "init_lora_weights": False, "r": 2}
    if direction == "veneer to peft":
        ours = veneer.get_peft_model(twin, veneer.LoraConfig(**settings))
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    else:
        theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
        theirs.save_pretrained(tmp_path)
        ours = veneer.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    outputs, sums = [], []
    for model in (ours, theirs):
        outputs.append(logits := model(tokens).logits)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        sums.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*sums, rtol=1e-4, atol=0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def test_attention_goes_both_ways(tmp_path):
    base, x = Attending().requires_grad_(False), torch.randn(3, 2, 8)
    twin, third = copy.deepcopy(base), copy.deepcopy(base)
    settings = {"target_modules": ["attention"], "init_lora_weights": False, "r": 2}
    ours = veneer.get_peft_model(twin, veneer.LoraConfig(**settings))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = veneer.PeftModel.from_pretrained(third, tmp_path / "theirs")
    torch.testing.assert_close(loaded(x), ours(x))
    with torch.no_grad():  # PEFT 0.21 adds the change of the output's projection twice, live and merged
        loaded.attention.adapters["default"]["out_proj"].B.mul_(2)
    torch.testing.assert_close(theirs(x), loaded(x), rtol=1e-5, atol=1e-5)
