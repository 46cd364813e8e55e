"""Weights by the blocks of Stable Diffusion's UNet, as the WebUI's block weights (LBW) name and count them.

    BASE   the text encoders
    IN00 … the way down, M00 the middle, OUT00 … the way up, as the original code numbers them

SD1 and SD2 have twelve blocks a way, SDXL nine. A list of 17 (12 for SDXL) numbers is for the blocks that have
attention, one of 26 (20) for all. Blocks that a list does not count have 0, as in the WebUI; what stands in no
block (time embeddings, the first norm of the way out) has 1.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from veneer.core.errors import AdapterError, collapsed, listed, nearest, shown


def _way(name: str, numbers: range | tuple[int, ...]) -> list[str]:
    return [f"{name}{number:02}" for number in numbers]


# the number of weights → (whether it is SDXL's, the blocks in their order)
COUNTED = {
    17: (False, ["BASE", *_way("IN", (1, 2, 4, 5, 7, 8)), "M00", *_way("OUT", range(3, 12))]),
    26: (False, ["BASE", *_way("IN", range(12)), "M00", *_way("OUT", range(12))]),
    12: (True, ["BASE", *_way("IN", (4, 5, 7, 8)), "M00", *_way("OUT", range(6))]),
    20: (True, ["BASE", *_way("IN", range(9)), "M00", *_way("OUT", range(9))]),
}
# the presets that the extension comes with: the runs of ones among its 17
_PRESETS: Mapping[str, str] = {
    "NONE": "00000000000000000",
    "ALL": "11111111111111111",
    "INS": "11110000000000000",
    "IND": "10001110000000000",
    "INALL": "11111110000000000",
    "MIDD": "10001111111100000",
    "OUTD": "10000000111100000",
    "OUTS": "10000000000011111",
    "OUTALL": "10000000111111111",
}
PRESETS: dict[str, list[float]] = {name: [float(one) for one in ones] for name, ones in _PRESETS.items()}
PRESETS["ALL0.5"] = [0.5] * 17

_UNET = re.compile(r"(?:unet\.)?(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
_MIDDLE, _FIRST = re.compile(r"(?:unet\.)?mid_block\."), re.compile(r"(?:unet\.)?conv_in$")
_TEXT = re.compile(r"text_encoder(_\d+)?\.|text_model\.")
# what only SDXL has: more than one transformer block in a row, two text encoders, sizes as inputs
_SDXL = re.compile(r"transformer_blocks\.[1-9]|^text_encoder_2\.|add_embedding")
_OTHERS = re.compile(r"(?:unet\.)?(time_embedding|add_embedding|class_embedding|conv_norm_out|conv_out)(\.|$)")


@dataclass(frozen=True)
class Blocks:
    """`scale` · the weight of the block that a layer stands in; `weights` by the blocks' names.

    `is_sdxl` says whose blocks they are; None, either's.
    """

    weights: Mapping[str, float]
    is_sdxl: bool | None = None
    scale: float = 1.0

    def shares(self, paths: Iterable[str], whose: str) -> dict[str, float]:
        """The weight of each layer, by its path in diffusers. Raises `AdapterError` for what is no such UNet's."""
        found = {path: block_of(path) for path in paths}
        if strange := [path for path, block in found.items() if block is None]:
            raise AdapterError(
                f"{whose}: block weights are for the UNet of Stable Diffusion and its text encoders; in none of their "
                f"blocks: {collapsed(strange)}"
            )
        is_sdxl = any(_SDXL.search(path) for path in found)
        if self.is_sdxl is not None and is_sdxl != self.is_sdxl:
            counts = {True: "12 or 20", False: "17 or 26, which the presets have"}
            kinds = {True: "SDXL", False: "SD1 or SD2"}
            raise AdapterError(
                f"{whose} is for {kinds[is_sdxl]}, whose block weights are {counts[is_sdxl]} numbers; these are for "
                f"{kinds[self.is_sdxl]}"
            )
        return {path: self.scale * (self.weights.get(block, 0.0) if block else 1.0) for path, block in found.items()}


def blocks(text: str, scale: float = 1.0, is_sdxl: bool = False) -> Blocks:
    """Block weights as people write them: a preset's name, `1,0,0.5,…` (17 or 26 numbers, SDXL: 12 or 20), or
    `IN04=0.5,OUT03-OUT05=0,M00=1`, where blocks that are not named have 1; `is_sdxl` is for these alone.

    Raises `AdapterError`.
    """
    text = text.strip()
    if "=" in text:
        return Blocks(_by_name(text, is_sdxl), is_sdxl, scale)
    if text in PRESETS:
        numbers = PRESETS[text]
        if len(set(numbers)) == 1:
            return Blocks(dict.fromkeys(COUNTED[26][1], numbers[0]), None, scale)
    else:
        words = [word.strip() for word in text.split(",")]
        if len(words) == 1:
            raise AdapterError(
                f"blocks: no preset {shown(text)}; there are {listed(PRESETS, 20)}{nearest(text, PRESETS)}"
            )
        numbers = [_number(word) for word in words]
    if len(numbers) not in COUNTED:
        counts = "17 or 26 (SD1, SD2), or 12 or 20 (SDXL)"
        raise AdapterError(f"blocks: expected {counts} numbers, found {len(numbers)}")
    is_sdxl, names = COUNTED[len(numbers)]
    return Blocks(dict(zip(names, numbers, strict=True)), is_sdxl, scale)


def block_of(path: str) -> str | None:
    """The block of a layer; "" for those that stand in none; None for what is no layer of such a model."""
    if _TEXT.match(path):
        return "BASE"
    if _FIRST.match(path):
        return "IN00"
    if _MIDDLE.match(path):
        return "M00"
    if match := _UNET.match(f"{path}."):
        way, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if way == "down_blocks":  # two layers a level, then the one that halves
            return f"IN{3 * level + (3 if kind == 'downsamplers' else 1 + layer):02}"
        return f"OUT{3 * level + (2 if kind == 'upsamplers' else layer):02}"  # what doubles stands with the third
    return "" if _OTHERS.match(path) else None


def _by_name(text: str, is_sdxl: bool) -> dict[str, float]:
    names = COUNTED[20 if is_sdxl else 26][1]
    weights, wrong = dict.fromkeys(names, 1.0), []
    for entry in text.split(","):
        span, _, number = entry.partition("=")
        first, _, last = span.strip().partition("-")
        ends = [first, last or first]
        if strangers := [end for end in ends if end not in names]:
            wrong.append(f"{shown(strangers[0])}{nearest(strangers[0], names)}")
            continue
        for name in names[names.index(ends[0]) : names.index(ends[1]) + 1]:
            weights[name] = _number(number)
    if wrong:
        raise AdapterError(f"blocks: there are {listed(names, 30)}, not {', '.join(wrong)}")
    return weights


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise AdapterError(f"blocks: expected numbers, found {shown(word.strip())}") from None
