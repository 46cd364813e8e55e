"""Names of layers in kohya's and LyCORIS's files: flat (`lora_unet_mid_block_attentions_0_proj_in`) ⇄ dotted paths.

A flat name is a prefix that says the part of the pipeline, and the module's path with `_` for each dot. Which `_` were
dots is found from the words that module names of the part are made of. A name that these words do not make stays flat;
a model's own paths, made `flat`, find it.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from veneer.files.names_sgm import from_sgm, to_sgm
from veneer.files.parts import is_text, levelled

_UNET = """
down_blocks up_blocks mid_block resnets attentions downsamplers upsamplers transformer_blocks attn1 attn2 ff net
to_q to_k to_v to_out proj proj_in proj_out norm norm1 norm2 norm3 conv conv1 conv2 conv_in conv_out conv_shortcut
conv_norm_out time_emb_proj time_embedding add_embedding class_embedding linear_1 linear_2
"""
_CLIP = """
text_model encoder layers embeddings token_embedding position_embedding self_attn q_proj k_proj v_proj out_proj mlp fc1
fc2 layer_norm1 layer_norm2 final_layer_norm text_projection
"""
_PRIOR = """
down_blocks up_blocks blocks down_downscalers up_upscalers attention to_q to_k to_v to_out channelwise depthwise
kv_mapper mapper mapper_crp mapper_sca norm embedding clf clip_norm clip_txt_pooled_mapper clip_txt_mapper
clip_img_mapper projection cond_mapper out
"""
_GRAMMARS = {
    "unet": _UNET,
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "prior": _PRIOR,
}
_PARTS = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "transformer": "transformer",
    "prior_unet": "prior",
    "prior_te": "text_encoder",
}
# Stable Cascade's own names, where they are not diffusers'
_OF_CASCADE = (("attention_attn_to_", "attention_to_"), ("attention_attn_out_proj", "attention_to_out_0"))

FLAT = re.compile(rf"(?:lora_({'|'.join(_PARTS)})|(lycoris))_([^.]+)")  # the whole name of a layer in such a file
GENERIC = ""  # the part of names with LyCORIS's own prefix, which are those of a model and no pipeline's


def flat(path: str) -> str:
    """The path of a module with `_` for each dot; `lora_unet_` and this is the layer's name in kohya's files."""
    return path.replace(".", "_")


def split(name: str) -> tuple[str, str] | None:
    """The part and the dotted path that a layer's name in a file means; the path stays flat where no grammar knows it.

    None where the name is not of this kind. Names that begin with `lycoris_` have the part "".
    """
    match = FLAT.fullmatch(name)
    if match is None:
        return None
    if match[2]:
        return GENERIC, _as("unet", match[3]) or _as("text_encoder", match[3]) or match[3]
    part = _PARTS[match[1]]
    path = _as(part, match[3]) or match[3]
    return part, levelled(path) if is_text(part) else path


def _as(part: str, name: str) -> str | None:
    """The dotted path, where words of the part's modules make the name."""
    if part == "unet":
        name = from_sgm(name)
    elif part == "prior":
        for theirs, ours in _OF_CASCADE:
            name = name.replace(theirs, ours)
    found = _WORD[part].findall(name) if part in _WORD else []
    return ".".join(found) if name and "_".join(found) == name else None


_WORD = {  # the longer words first: `proj_in` before `proj`
    part: re.compile(rf"({'|'.join(sorted(grammar.split(), key=len, reverse=True))}|\d+)(?:_|$)")
    for part, grammar in _GRAMMARS.items()
}


def joined(part: str, path: str, family: str | None, *, sgm: bool = False) -> str | None:
    """The layer's name in a file, or None where there is none.

    `family` says how text encoders are called ("SDXL" has `te1`, Cascade `prior_te`); with `sgm` a U-Net's modules are
    called as in the original checkpoints.
    """
    prefix = {
        "unet": "lora_unet_",
        "transformer": "lora_transformer_",
        "prior": "lora_prior_unet_",
        "text_encoder": {"SDXL": "lora_te1_", "Cascade": "lora_prior_te_"}.get(family or "", "lora_te_"),
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
        GENERIC: "lycoris_",
    }.get(part)
    if prefix is None:
        return None
    if is_text(part):
        path = levelled(path)
    if part == "unet" and sgm:
        path = to_sgm(path)
    if part == "prior":
        path = re.sub(r"\battention\.to_(?=[qkv]\b)", "attention.attn.to_", path)
        path = re.sub(r"\battention\.to_out\.0\b", "attention.attn.out_proj", path)
    return prefix + flat(path)


_BEGIN = {  # at least one path of the part begins so: other models have some of the same words
    "unet": ("down_blocks.", "mid_block.", "up_blocks."),
    "text_encoder": ("text_model.",),
    "prior": ("down_blocks.", "up_blocks.", "blocks."),
}


def part_of(paths: Collection[str]) -> str | None:
    """The part of a pipeline that all these modules' paths belong to, where their words say so."""
    for part, begin in _BEGIN.items():
        if any(path.startswith(begin) for path in paths) and all(_as(part, flat(path)) for path in paths):
            return part
    return None


def is_unbiased(path: str) -> bool:
    """Whether the layer is one of a U-Net that has no bias."""
    return re.fullmatch(r"(?:.+\.)?attn[12]\.to_[qkv]", path) is not None


_WIDTHS = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # of the text that a U-Net's cross-attention sees
_ONLY_IN = {
    "SDXL": re.compile(r"transformer_blocks\.[1-9]|\badd_embedding\b"),
    "SD1 or SD2": re.compile(r"\b(?:down|up)_blocks\.3\."),
}


def family(shapes: Mapping[str, tuple[int, int] | None], parts: Iterable[str] = ()) -> str | None:
    """The family of base models, "SD1", "SD2", "SDXL" or "Cascade", or None where neither names nor shapes say it.

    `shapes` are those of the changes `(out, in · kernel)` by path, of a U-Net and text encoders, each with its part
    first; `parts` are parts that are known otherwise. What a U-Net's cross-attention sees is told by its inputs' width.
    """
    parts = {*parts, *(path.partition(".")[0] for path in shapes)}
    if "prior" in parts:
        return "Cascade"
    unet = {path: shape for path, shape in shapes.items() if path.startswith("unet.")}
    for path, shape in unet.items():
        if shape and path.endswith(("attn2.to_k", "attn2.to_v")) and shape[1] in _WIDTHS:
            return _WIDTHS[shape[1]]
    if "text_encoder_2" in parts or any(_ONLY_IN["SDXL"].search(path) for path in unet):
        return "SDXL"
    told = {
        {768: "SD1", 1024: "SD2"}.get(shape[1])
        for path, shape in shapes.items()
        if shape and path.startswith("text_encoder.") and path.endswith(("self_attn.q_proj", "mlp.fc1"))
    }
    return next(iter(told)) if len(told) == 1 and (not unet or _said(unet)) else None


def _said(unet: Iterable[str]) -> bool:
    """Whether paths of a U-Net are such as SDXL's has not."""
    return any(_ONLY_IN["SD1 or SD2"].search(path) for path in unet)
