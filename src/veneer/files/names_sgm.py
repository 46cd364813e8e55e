"""The two spellings of a Stable Diffusion U-Net's modules: diffusers', and that of the original checkpoints (sgm, ldm).

The original numbers blocks through: `input_blocks` are the convolution at the entrance, then for each resolution two
residual blocks, each perhaps with a transformer, and the convolution that halves the size; `output_blocks` are three
for each resolution, the last with the convolution that doubles the size behind what it has. All bases of this kind
(SD1, SD2, SDXL and its refiner) have two residual blocks on the way down and three on the way up.
"""

import re

_DOWN = _UP = 3  # blocks a resolution: two and what halves the size; three
_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_RESIDUAL = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OURS = {ours: theirs for theirs, ours in (_ENDS | _RESIDUAL).items()}
_THEIR_BLOCK = re.compile(r"(?:(input|output)_blocks_(\d{1,3})|middle_block)_(\d{1,3})_(.+)")
_OUR_BLOCK = re.compile(
    r"(?:(down|up)_blocks_(\d{1,3})|mid_block)_(resnets|attentions|downsamplers|upsamplers)_(\d{1,3})_(.+)"
)


def from_sgm(name: str) -> str:
    """The same module's flat name in diffusers' spelling; any other name as it is."""
    match = _THEIR_BLOCK.fullmatch(name)
    if name in _ENDS or match is None:
        return _ENDS.get(name, name)
    way, number, place, inner = match[1], int(match[2] or 0), int(match[3]), match[4]
    if inner in _RESIDUAL:
        inner = _RESIDUAL[inner]
        kind = "resnets" if place == 0 or (way is None and place == 2) else None
    else:
        kind = "attentions" if place == 1 else None
    if way is None:
        return f"mid_block_{kind}_{place // 2}_{inner}" if kind and place < 3 else name
    block, layer = divmod(number - 1, _DOWN) if way == "input" else divmod(number, _UP)
    if (way, place, inner, layer) == ("input", 0, "op", _DOWN - 1):
        return f"down_blocks_{block}_downsamplers_0_conv"
    if way == "output" and place and inner == "conv" and layer == _UP - 1:
        return f"up_blocks_{block}_upsamplers_0_conv"
    fits = kind and number >= (way == "input") and (way == "output" or layer < _DOWN - 1)
    return f"{'down' if way == 'input' else 'up'}_blocks_{block}_{kind}_{layer}_{inner}" if fits else name


def to_sgm(path: str) -> str:
    """The module's flat name in the original spelling, for its dotted path in SDXL's U-Net; any other path made flat.

    What doubles the size stands behind a transformer in all blocks that have it. (The first of SD1's and SD2's has
    none, and is called otherwise.)
    """
    name = path.replace(".", "_")
    match = _OUR_BLOCK.fullmatch(name)
    if match is None:
        return _OURS.get(name, name)
    way, block, kind, layer, inner = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks_{_DOWN * block + _DOWN}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{_UP * block + _UP - 1}_2_conv"
    inner = _OURS.get(inner, inner) if kind == "resnets" else inner
    place = int(kind == "attentions")
    if way is None:
        return f"middle_block_{1 if place else 2 * layer}_{inner}"
    number = _DOWN * block + layer + 1 if way == "down" else _UP * block + layer
    return f"{'input' if way == 'down' else 'output'}_blocks_{number}_{place}_{inner}"
