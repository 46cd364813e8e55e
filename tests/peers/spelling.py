"""How the community's files name the layers that diffusers and transformers name by paths."""

import re

_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_SGM_INNER = {  # of a residual block
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_SGM_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_PER_BLOCK = 2  # layers of a block of every Stable Diffusion; a block that goes up has one more


def split(name: str) -> tuple[str, str]:
    """The part and the path in the checkpoints' own words, in which a text encoder's begins with `text_model`.

    transformers 5 leaves that word out for one of its two classes.
    """
    part, path = name.split(".", 1)
    if part.startswith("text_") and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    return part, path


def kohya(name: str, sgm: bool = False, numbered: bool = False, short: bool = False) -> str:
    """`lora_unet_…` as kohya's trainers write it. `numbered`: `lora_te1_`, as for models of two text encoders.

    `sgm`: the UNet's layers as the original checkpoints call them; `short`: without `text_model_`.
    """
    part, path = split(name)
    if part == "unet" and sgm:
        path = to_sgm(path)
    if short:
        path = path.removeprefix("text_model.")
    prefix = "lora_te1" if numbered and part == "text_encoder" else _KOHYA[part]
    return f"{prefix}_{path.replace('.', '_')}"


def to_sgm(path: str) -> str:
    """The path in the checkpoints of Stability AI: blocks are counted through, conv_in being the first that goes in."""
    if path in _SGM_OUTER:
        return _SGM_OUTER[path]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        kind, layer, inner = found.groups()
        place = 1 if kind == "attentions" else 2 * int(layer)
        return f"middle_block.{place}.{_inner(kind, inner)}"
    way, block, kind, layer, inner = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", path).groups()
    if kind == "downsamplers":
        return f"input_blocks.{(_PER_BLOCK + 1) * (int(block) + 1)}.0.op"
    if kind == "upsamplers":  # after the last layer's residual block and attention; SDXL's all have both
        return f"output_blocks.{(_PER_BLOCK + 1) * int(block) + _PER_BLOCK}.2.{inner}"
    place = (_PER_BLOCK + 1) * int(block) + int(layer) + (way == "down")
    row = "input_blocks" if way == "down" else "output_blocks"
    return f"{row}.{place}.{int(kind == 'attentions')}.{_inner(kind, inner)}"


def _inner(kind: str, inner: str) -> str:
    return _SGM_INNER[inner] if kind == "resnets" else inner


def diffusers(name: str) -> str:
    """`unet.….to_q`, `text_encoder.text_model.….q_proj`: what stands before `.lora_A.weight` in today's files."""
    return ".".join(split(name))


def with_processors(name: str) -> str:
    """As diffusers wrote an attention's layers until 0.17: `….attn1.processor.to_q_lora`."""
    part, path = split(name)
    if part == "unet":
        path = re.sub(r"\.(attn[12])\.to_(q|k|v|out)(?:\.0)?$", r".\1.processor.to_\2_lora", path)
    else:
        path = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1_lora", path)
    return f"{part}.{path}"


def with_linear_layers(name: str) -> str:
    """As diffusers wrote them until 0.26: `….to_q.lora`, and `….q_proj.lora_linear_layer` in a text encoder."""
    part, path = split(name)
    return f"{part}.{path}.{'lora' if part == 'unet' else 'lora_linear_layer'}"
