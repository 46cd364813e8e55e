"""Weights by layer: by pattern, and by the WebUI's blocks."""

import pytest
import torch

from veneer import AdapterError
from veneer.combine import blocks, combine
from veneer.combine.blocks import COUNTED, PRESETS, block_of
from veneer.combine.shares import shares

PATHS = ["unet.down_blocks.1.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in", "text_encoder.fc1"]


def test_patterns_weigh_layers_and_the_first_one_counts(make, deltas):
    one, other = make(q="LORA", v="LORA", k="LORA"), make(q="LORA")
    found = deltas(combine([one, other], [{"q|k": 0.5, "q": 9.0, "": -1.0}, 2.0]))
    torch.testing.assert_close(found["q"], 0.5 * deltas(one)["q"] + 2 * deltas(other)["q"])
    torch.testing.assert_close(found["k"], 0.5 * deltas(one)["k"])
    torch.testing.assert_close(found["v"], -deltas(one)["v"])


def test_patterns_are_of_whole_ends():
    assert shares({r"unet\.down_blocks\..*": 0.2, "": 1}, PATHS, "a") == dict(zip(PATHS, (0.2, 1, 1), strict=True))


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"fc2": 1, "": 0}, "a: weights: 'fc2' matches no layer"),
        ({"fc1": 1}, "a: no pattern gives a weight to unet.*proj_in.* say"),
        ({"(": 1}, "not a regular expression"),
        ({"fc1": "x", "": 1}, "a: 'fc1': a weight should be a finite number, found 'x'"),
    ],
)
def test_patterns_that_say_nothing_are_refused(weight, said):
    with pytest.raises(AdapterError, match=said):
        shares(weight, PATHS, "a")


def original(path: str) -> str:
    """The block by the numbers of the original code: after the first convolution two layers and what halves the size
    a level; three layers a level on the way up, with what doubles it in the third.
    """
    way, level, kind, layer = path.split(".")[:4]
    if way == "down_blocks":
        numbers = {("resnets", "0"): 1, ("resnets", "1"): 2, ("downsamplers", "0"): 3}
        return f"IN{3 * int(level) + numbers['resnets' if kind == 'attentions' else kind, layer]:02}"
    return f"OUT{3 * int(level) + (2 if kind == 'upsamplers' else int(layer)):02}"


def test_every_layer_of_a_unet_has_its_block():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    paths = [path for path, module in unet.named_modules() if list(module.parameters(recurse=False))]
    found = {path: block_of(f"unet.{path}") for path in paths}
    for path, block in found.items():
        if path.startswith(("down_blocks", "up_blocks")):
            assert block == original(path)
        elif path.startswith("mid_block"):
            assert block == "M00"
        else:
            assert block == ("IN00" if path == "conv_in" else "")
    assert set(found.values()) - {""} == set(COUNTED[26][1]) - {"BASE"}
    attending = {block for path, block in found.items() if ".attentions." in path}
    assert attending == set(COUNTED[17][1]) - {"BASE"}


def test_weights_of_seventeen_blocks():
    numbers = [i / 100 for i in range(17)]
    found = blocks(",".join(map(str, numbers)), 2.0).shares(PATHS, "a")
    assert found == {
        PATHS[0]: 0.06,
        PATHS[1]: 0.14,
        PATHS[2]: 0.0,
    }  # IN04 is the fourth, M00 the eighth, BASE the first
    down = "unet.down_blocks.0.downsamplers.0.conv"
    assert blocks("ALL").shares([down], "a") == {down: 1.0}
    assert blocks("INALL").shares([down], "a") == {down: 0.0}  # not among the seventeen
    assert blocks("INALL").shares(["unet.conv_out"], "a") == {"unet.conv_out": 1.0}


def test_presets_are_the_extensions():
    """As its file of presets has them, by the first and the last block of a run of ones."""
    runs = {
        "INS": ("IN01", "IN04"),
        "IND": ("IN05", "IN08"),
        "INALL": ("IN01", "IN08"),
        "MIDD": ("IN05", "OUT06"),
        "OUTD": ("OUT03", "OUT06"),
        "OUTS": ("OUT07", "OUT11"),
        "OUTALL": ("OUT03", "OUT11"),
    }
    names = COUNTED[17][1]
    for preset, (first, last) in runs.items():
        ones = {"BASE", *names[names.index(first) : names.index(last) + 1]}
        assert {name for name, number in blocks(preset).weights.items() if number} == ones
    assert PRESETS.keys() - runs.keys() == {"NONE", "ALL", "ALL0.5"}


def test_blocks_by_name():
    found = blocks("IN04=0.5,OUT03-OUT05=0", 2.0)
    assert found.shares(PATHS[:2], "a") == {PATHS[0]: 1.0, PATHS[1]: 2.0}
    assert (found.weights["OUT04"], found.weights["OUT06"]) == (0, 1)


SDXL = ["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "text_encoder_2.text_model.fc1"]


def test_sdxl_has_blocks_of_its_own():
    numbers = ",".join(str(i) for i in range(12))
    assert blocks(numbers).shares(SDXL, "a") == dict(zip(SDXL, (1.0, 0.0), strict=True))
    assert blocks("ALL0.5").shares(SDXL, "a") == dict.fromkeys(SDXL, 0.5)
    with pytest.raises(AdapterError, match="a is for SDXL, whose block weights are 12 or 20 numbers"):
        blocks("OUTD").shares(SDXL, "a")
    with pytest.raises(AdapterError, match="a is for SD1 or SD2"):
        blocks(numbers).shares(PATHS, "a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("OUTDD", "no preset 'OUTDD'.*did you mean 'OUTD'"),
        ("1,2,3", "expected 17 or 26 .* found 3"),
        (",".join("x" * 17), "expected numbers, found 'x'"),
        ("IN4=1", "'IN4'; did you mean 'IN04'"),
        ("IN04=", "expected numbers, found ''"),
    ],
)
def test_blocks_that_are_none(text, said):
    with pytest.raises(AdapterError, match=said):
        blocks(text)


def test_blocks_are_for_stable_diffusion_alone(make):
    with pytest.raises(AdapterError, match="in none of their blocks: q"):
        combine([make(q="LORA")], [blocks("OUTD")])
