"""What is wrong with a file in kohya's or LyCORIS's way: each fault with its layer, and all of them at once."""

import pytest
import torch
from torch import Tensor

from veneer import AdapterError
from veneer.files import kohya
from veneer.files.kohya_layers import LYCORIS_ONLY

PROJ = "unet.mid_block.attentions.0.proj_in"

FAULTS = {
    "a": ({"lora_up.weight": (6, 4)}, "lora_up.weight without lora_down.weight"),
    "b": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 3)}, "one rank, found lora_down 4, lora_up 3"),
    "c": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 4), "alpha": (2,)}, "alpha should be one finite number"),
    "d": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 4), "alpha": "nan"}, "finite number, found nan"),
    "e": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 4), "alpha": "zero"}, "alpha 0"),
    "f": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 4), "extra": (1,)}, "extra beside LORA"),
    "g": ({"alpha": "nan"}, "only alpha"),
    "h": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 4), "dora_scale": (5, 1)}, r"dora_scale of \(5, 1\)"),
    "i": ({"lora_down.weight": (4,), "lora_up.weight": (6, 4)}, "should have at least 2 dimensions"),
    "j": ({"oft_blocks": (2, 4, 4)}, "OFT or BOFT is no method of veneer"),
    "k": ({"a1.weight": (2, 4), "a2.weight": (2, 4)}, "GLoRA is no method"),
    "l": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 8)}, "without hada_w2_a, hada_w2_b"),
    "m": ({"hada_w1_a": (6, 2), "lokr_w1": (2, 2)}, "tensors of LOHA and LOKR at one layer"),
    "n": ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 1)}, "expected lokr_w2, or lokr_w2_a with lokr_w2_b"),
    "o": ({"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 4)}, "LoKr's products"),
    "p": ({"lora_down.weight": (4, 8, 3, 3), "lora_up.weight": (6, 4, 3, 3)}, "kernel of more than one point"),
    "q": (
        {"lora_down.weight": (4, 8, 1, 1), "lora_up.weight": (6, 4, 1, 1), "lora_mid.weight": (5, 4, 3, 3)},
        "lora_mid 5",
    ),
    "r": ({"diff": (6, 8), "diff_b": (5,)}, "changes of 6 outputs and of 5 biases"),
    "t": ({"weight": (6,), "on_input": "nan"}, "on_input should be 0 or 1"),
    "u": ({"weight": (6, 2), "on_input": "zero"}, "is no vector"),
    "v": ({"weight": (6,)}, "weight without on_input"),
    "x": ({"lora_down.weight": (4, 8), "lora_up.weight": (6, 4), "lora_A.weight": (4, 8)}, "under another name too"),
    "y": ({"diff": ()}, "should have at least 1 dimensions"),
    "z": ({"lora_down.weight": (0, 8), "lora_up.weight": (6, 0)}, "none of them 0"),
    "w": ({"diff": (6, 8), "dora_scale": (6, 1)}, "dora_scale beside FULL"),
    "s": ({"bias_indices": (1,), "bias_values": (1,), "bias_size": (2,)}, "a sparse rest"),
}


def made(own: dict) -> dict[str, Tensor]:
    said = {"nan": torch.tensor(float("nan")), "zero": torch.tensor(0.0)}
    return {name: said[shape] if isinstance(shape, str) else torch.ones(shape) for name, shape in own.items()}


@pytest.mark.parametrize("which", FAULTS)
def test_a_fault_is_told_with_its_layer(which):
    own, told = FAULTS[which]
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{name}": tensor for name, tensor in made(own).items()}
    with pytest.raises(AdapterError, match=told) as error:
        kohya.read(tensors, {}, "the/file")
    assert PROJ in str(error.value)
    assert str(error.value).startswith("the/file:")


def test_all_faults_are_told_at_once():
    tensors = {
        f"lora_unet_layer_{which}.{name}": tensor
        for which, (own, _) in FAULTS.items()
        for name, tensor in made(own).items()
    }
    tensors |= {"stranger": torch.ones(1), "lycoris_a.diff": torch.ones(2, 2)}
    two = ("lora_unet_input_blocks_1_1_proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in")
    tensors |= {f"{name}.diff": torch.ones(2, 2) for name in two}
    with pytest.raises(AdapterError) as error:
        kohya.read(tensors, {}, "")
    told = str(error.value)
    for which in FAULTS:
        assert f"unet.layer_{which}" in told
    for said in ("stranger", "beside names of one model", "under two names"):
        assert said in told


def test_whatever_a_stranger_wrote_is_read_or_told():
    torch.manual_seed(0)
    endings = sorted(LYCORIS_ONLY | {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"})
    shapes = [(), (1,), (2,), (2, 2), (1, 2), (2, 1), (2, 2, 1, 1), (2, 2, 3, 3), (1, 2, 1, 1), (0, 2), (2, 1, 2)]
    read = 0
    for _ in range(2000):
        family = endings[int(torch.randint(len(endings), ()))][:4]
        likely = [ending for ending in endings if ending[:4] == family or ending in ("alpha", "dora_scale")]
        own = {ending: torch.ones(shapes[int(torch.randint(len(shapes), ()))]) for ending in likely}
        kept = {ending: tensor for ending, tensor in own.items() if torch.rand(()) < 0.7}
        try:
            kohya.read({f"lora_unet_a.{ending}": tensor for ending, tensor in kept.items()}, {}, "")
            read += 1
        except AdapterError:
            pass
    assert read > 10  # of which some are well-formed
