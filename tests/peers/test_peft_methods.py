"""PEFT's other methods: the same folder gives the same logits and gradients there and here, whoever wrote it."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer.core.methods.lokr import divided
from veneer.files.folder import file_names

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")

pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")]  # vera-key
TOKENS = torch.arange(3, 15).view(2, 6)
LYCORIS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"]}
BIASED = {"bert": ["query", "output.dense"], "gpt2": ["c_attn", "c_proj"]}
LINEAR = {**LYCORIS, "gpt2": ["c_attn", "c_proj"]}

IA3 = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "bert": ["key", "value", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}


class Peer:
    """A config here, the same one there, and the layers by family."""

    def __init__(self, ours: dict[str, Any], theirs: Any, targets: Mapping[str, list[str]]) -> None:
        self.ours, self.theirs, self.targets = ours, theirs, targets


def lycoris(kind: str, r: int = 3, **options: Any) -> Peer:
    ours = {"peft_type": kind.upper(), "r": r, "lora_alpha": 7, "rank_pattern": {"0.*": 2}, "options": options}
    made_by = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[kind]
    theirs = {"r": r, "alpha": 7, "rank_pattern": {"0.*": 2}, "init_weights": False, **options}
    return Peer(ours, lambda **targets: made_by(**theirs, **targets), LYCORIS)


def lora(**settings: Any) -> Peer:
    ours = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, **settings}
    return Peer(ours, lambda **targets: peft.LoraConfig(**ours, **targets), LINEAR)


def lora_bias(**settings: Any) -> Peer:
    peer = lora(lora_bias=True, **settings)
    del peer.ours["lora_bias"]
    return Peer({**peer.ours, "options": {"lora_bias": True}}, peer.theirs, BIASED)


def vera(**options: Any) -> Peer:
    ours = {"peft_type": "VERA", "r": 6, "options": {"d_initial": 0.2, **options}}
    return Peer(ours, lambda **targets: peft.VeraConfig(r=6, d_initial=0.2, **options, **targets), LINEAR)


def ia3() -> Peer:
    inputs = {"feedforward_modules": r".*(down_proj|output\.dense|mlp\.c_proj)"}
    ours = {"peft_type": "IA3", "options": inputs}
    return Peer(ours, lambda **targets: peft.IA3Config(**inputs, **targets), IA3)


PEERS = {
    "ia3": ia3(),
    "vera": vera(),
    "vera-key": vera(save_projection=False, projection_prng_key=5),
    "dora": lora(use_dora=True),
    "dora-rslora": lora(use_dora=True, use_rslora=True),
    "lora-bias": lora_bias(),
    "lora-bias-rslora": lora_bias(use_rslora=True),
    "loha": lycoris("LOHA"),
    "loha-dense": lycoris("LOHA", r=6),
    "lokr": lycoris("LOKR", r=1),
    "lokr-both": lycoris("LOKR", r=1, decompose_both=True, decompose_factor=2),
    "lokr-whole": lycoris("LOKR", r=30),
}
CASES = [(name, family) for name, peer in PEERS.items() for family in peer.targets]


@pytest.fixture
def shaken():
    """No parameter of the adapter is what it was at the start."""

    def shake(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(len(name)))
        return model

    return shake


def _run(model: nn.Module, names: Mapping[str, str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and the gradient of each parameter by its name in a file."""
    logits = model(TOKENS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {name.removeprefix("base_model.model."): gradient for name, gradient in trained.items()}
    if not isinstance(model, veneer.PeftModel):
        gradients = {name.replace(".default", ""): gradient for name, gradient in gradients.items()}
        return logits, {name.replace("vector.weight", "vector"): gradient for name, gradient in gradients.items()}
    parts = {name: name.split(".adapters.default.") for name in gradients}
    return logits, {
        f"{parts[name][0]}.{names[parts[name][1].removeprefix('inner.')]}": gradient
        for name, gradient in gradients.items()
    }


def _agree(ours: veneer.PeftModel, theirs: nn.Module) -> None:
    names = file_names(ours.peft_config["default"])
    (logits, gradients), (their_logits, their_gradients) = _run(ours, names), _run(theirs, names)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_veneer_saves_peft_reads(tiny, shaken, name, family, tmp_path):
    peer, base = PEERS[name], tiny(family)
    config = veneer.LoraConfig(target_modules=peer.targets[family], **peer.ours)
    ours = shaken(veneer.get_peft_model(copy.deepcopy(base), config))
    ours.save_pretrained(tmp_path)
    _agree(ours, peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_peft_saves_veneer_reads(tiny, shaken, name, family, tmp_path):
    peer, base = PEERS[name], tiny(family)
    ours = copy.deepcopy(base)
    theirs = shaken(peft.get_peft_model(base, peer.theirs(target_modules=peer.targets[family])))
    theirs.save_pretrained(tmp_path)
    _agree(veneer.PeftModel.from_pretrained(ours, tmp_path, is_trainable=True), theirs)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(  # PEFT forgets that GPT-2's weights are transposed when it starts OLoRA
    ("start", "family"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama"), ("olora", "bert")]
)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")  # theirs cannot save it
def test_a_start_from_the_weight_learns_as_there_and_is_saved_for_the_untouched_base(
    tiny, family, start, rslora, tmp_path
):
    base, untouched = tiny(family), tiny(family)
    untouched.load_state_dict(base.state_dict())
    settings = {"r": 3, "lora_alpha": 7, "use_rslora": rslora, "target_modules": LINEAR[family]}
    settings["rank_pattern"] = {"0.*": 2}
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(init_lora_weights=start, **settings))
    theirs = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=start, **settings))
    _agree(ours, theirs)
    for model in (ours, theirs):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
        model.zero_grad()
    _agree(ours, theirs)
    ours.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(untouched, tmp_path)
    torch.testing.assert_close(plain(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 100])
def test_sides_are_divided_as_peft_divides_them(factor):
    from peft.tuners.lokr.layer import factorization

    for side in range(1, 200):
        assert divided(side, factor) == factorization(side, factor), side
