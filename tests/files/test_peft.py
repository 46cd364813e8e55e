"""PEFT's folder: what it holds is read, whatever stands around it, and what is written PEFT reads."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer.files
from veneer import Adapter, AdapterError, LoraConfig, get_peft_model
from veneer.apart.changes import Change, adapter_of, changes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 12)
        self.conv, self.table = nn.Conv2d(8, 4, 3), nn.Embedding(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = self.v(self.q(h) * self.k(h)) + h  # (2, 3, 12)
        return self.conv(self.q(h).reshape(-1, 8, 1, 1).expand(-1, 8, 3, 3)).flatten(1)


X = torch.tensor([[1, 2, 3], [4, 5, 6]])
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["q", "k", "v", "conv"]}
CONFIGS = {
    "patterns": {**LORA, "rank_pattern": {"q": 3}, "alpha_pattern": {"k": 5}},
    "rslora": {**LORA, "use_rslora": True},
    "dora": {**LORA, "use_dora": True},
    "a bias of B": {**LORA, "lora_bias": True},
    "modules_to_save and biases": {**LORA, "target_modules": ["q"], "modules_to_save": ["conv"], "bias": "lora_only"},
    "a table": {**LORA, "target_modules": ["table", "q"]},
    "tokens": {**LORA, "trainable_token_indices": {"table": [2, 5]}},
}


def _peft(config: object) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(Model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning", "ignore:.*have invalid shape.*")
def test_there_and_back_through_peft(config, tmp_path):
    theirs = _peft(peft.LoraConfig(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = veneer.files.read(tmp_path / "theirs")
    assert veneer.files.detect(tmp_path / "theirs" / WEIGHTS) == "peft"
    wanted = theirs(X)
    torch.testing.assert_close(veneer.files.attach(Model(), adapter)(X), wanted, rtol=1e-5, atol=1e-5)
    adapter.bases = {}
    veneer.files.write(adapter, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours")
    torch.testing.assert_close(again(X), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(veneer.files.read(tmp_path / "ours").tensors, adapter.tensors, rtol=0, atol=0)


OTHERS = {
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["q", "v", "conv"], rank_pattern={"v": 3}),
    "lokr": peft.LoKrConfig(r=1, alpha=3, target_modules=["q", "v", "conv"], decompose_both=True),
    "lokr, whole": peft.LoKrConfig(r=8, alpha=3, target_modules=["q", "conv"], decompose_factor=2),
    "vera": peft.VeraConfig(r=2, target_modules=["q", "v"]),
    "ia3": peft.IA3Config(target_modules=["q", "k", "conv"], feedforward_modules=["k"]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_methods_of_peft_are_read_and_written_again(config, tmp_path):
    theirs = _peft(config)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = veneer.files.read(tmp_path / "theirs")
    wanted = theirs(X)
    torch.testing.assert_close(veneer.files.attach(Model(), adapter)(X), wanted, rtol=1e-5, atol=1e-5)
    veneer.files.write(adapter, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours")
    torch.testing.assert_close(again(X), wanted, rtol=1e-5, atol=1e-5)


def test_a_pickle_is_read_when_it_is_named(tmp_path):
    _peft(peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    wanted = Adapter.load(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    found = veneer.files.read(tmp_path / "adapter_model.bin")
    torch.testing.assert_close(found.tensors, wanted.tensors, rtol=0, atol=0)
    assert found.config == wanted.config
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        veneer.files.read(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"says neither method nor alpha: its adapter_config.json should stand"):
        veneer.files.read(tmp_path / "adapter_model.bin")


def test_of_several_adapters_one_is_named(tmp_path):
    model = _peft(peft.LoraConfig(**LORA))
    for name, r in (("french", 4), ("german", 5)):
        model.add_adapter(name, peft.LoraConfig(**{**LORA, "r": r}))
    model.save_pretrained(tmp_path, selected_adapters=["french", "german"])
    with pytest.raises(AdapterError, match=r"holds several adapters, name one: 'french', 'german'"):
        veneer.files.read(tmp_path)
    assert veneer.files.read(tmp_path, adapter="german").config.r == 5
    with pytest.raises(AdapterError, match=r"no adapter frensh: it has 'french', 'german'; did you mean 'french'"):
        veneer.files.read(tmp_path, adapter="frensh")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert veneer.files.read(tmp_path).config.r == 2


def test_a_folder_for_each_part(tmp_path):
    own = {
        f"{part}.{name}": Change(LoraConfig(r=r), {"A": torch.randn(r, 12), "B": torch.randn(8, r)})
        for part, r in (("unet", 2), ("text_encoder", 3))
        for name in ("q", "k")
    }
    adapter = adapter_of(own, parts=("unet", "text_encoder"), metadata={"trigger": "sks"})
    veneer.files.write(adapter, tmp_path / "both", "peft")
    assert peft.LoraConfig.from_pretrained(tmp_path / "both" / "text_encoder").r == 3
    again = veneer.files.read(tmp_path / "both")
    assert set(again.parts) == set(adapter.parts)
    assert again.metadata == adapter.metadata
    torch.testing.assert_close(again.tensors, dict(sorted(adapter.tensors.items(), key=lambda own: own[0][0])))
    assert {path: change.config for path, change in changes(again).items()} == {
        path: change.config for path, change in own.items()
    }


METHODS = {
    "loha": LoraConfig(peft_type="LOHA", r=2, target_modules=["q", "v"], rank_pattern={"v": 3}),
    "loha with rsLoRA": LoraConfig(peft_type="LOHA", r=2, target_modules=["q", "v"], use_rslora=True),
    "lokr": LoraConfig(peft_type="LOKR", r=1, target_modules=["q", "v"], options={"decompose_both": True}),
    "lokr by a factor": LoraConfig(peft_type="LOKR", r=1, target_modules=["q", "v"], options={"decompose_factor": 2}),
    "vera": LoraConfig(peft_type="VERA", r=2, target_modules=["q", "v"]),
    "ia3": LoraConfig(peft_type="IA3", target_modules=["q", "v"], options={"feedforward_modules": ["v"]}),
    "a bias here and rsLoRA there": LoraConfig(
        r=2,
        target_modules=["q", "v", "k"],
        method_pattern={"q": {"options": {"lora_bias": True}}, "v": {"use_rslora": True}},
    ),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_other_methods_are_written_for_peft(config, tmp_path):
    torch.manual_seed(2)
    model = get_peft_model(Model(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    adapter = model.get_adapter()
    if config.peft_type == "LOKR":  # what a file of LyCORIS does not say
        for change in (made := changes(adapter)).values():
            change.config.options.clear()
            change.config.options.update(decompose_factor=-1, decompose_both=False)
        adapter = adapter_of(made)
    veneer.files.write(adapter, tmp_path, "peft")
    found = peft.PeftModel.from_pretrained(Model(), tmp_path)(X)
    torch.testing.assert_close(found, model(X), rtol=1e-5, atol=1e-5)


def _made(**tensors: Tensor) -> dict[str, Tensor]:
    return {"A": torch.zeros(2, 12), "B": torch.zeros(8, 2), **tensors}


REFUSED = {
    "several methods": (
        {
            "q": Change(LoraConfig(r=2), _made()),
            "k": Change(LoraConfig(r=2, use_dora=True), _made(magnitude=torch.ones(8))),
        },
        r"several methods, where PEFT has one for all layers \(LORA, LORA with DoRA\): q, k",
    ),
    "full": ({"q": Change(LoraConfig(peft_type="FULL"), {"D": torch.zeros(8, 12)})}, "changes of full size: q"),
    "columns": (
        {"q": Change(LoraConfig(r=2, use_dora=True), _made(magnitude=torch.ones(1, 12)))},
        "DoRA on columns, where PEFT has it on rows: q",
    ),
    "lokr": (
        {"q": Change(LoraConfig(peft_type="LOKR", r=2), {"C": torch.zeros(8, 12), "D": torch.zeros(1, 1)})},
        "a LoKr that is not divided as PEFT divides",
    ),
}


@pytest.mark.parametrize(("own", "said"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_hold_is_refused_with_the_reason(own, said, tmp_path):
    adapter = adapter_of(own)
    with pytest.raises(AdapterError, match=said):
        veneer.files.write(adapter, tmp_path / "new", "peft")
    assert not (tmp_path / "new").exists()
    adapter.save(tmp_path / "own")
    torch.testing.assert_close(Adapter.load(tmp_path / "own").tensors, adapter.tensors, rtol=0, atol=0)


def test_all_faults_of_a_folder_are_told(tmp_path):
    _peft(peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "base_model.model.q.lora_C.weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"unexpected tensors: base_model.model.q.lora_C.weight"):
        veneer.files.read(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "use_qalora": True}))
    with pytest.raises(AdapterError, match=r"use_qalora=True(.|\n)*unexpected tensors"):
        veneer.files.read(tmp_path)
