"""Which family of base models an adapter is for: what its layers show, and what its file says."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Sizes = Mapping[str, tuple[int, ...] | None]  # a layer's path → (out, in), or None where its tensors do not say

# what image models' cross-attention reads: the width of their text encoders
_CROSS_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}
_TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x"}  # of the only text encoder
# (family, how the metadata of trainers spells it); the first that fits
_SPELT = (
    ("SDXL refiner", r"sdxl.*refiner|xl.*refiner"),
    ("SDXL", r"sdxl|stable-diffusion-xl|sd_xl|pony|illustrious"),
    ("SD 3", r"sd3|stable-diffusion-v?3"),
    ("SD 2.x", r"sd_v2|sd_2|sd2|stable-diffusion-(v?2)"),
    ("SD 1.x", r"sd_v1|sd_1|sd1|stable-diffusion-v1|stable-diffusion-1"),
    ("Flux", r"flux"),
    ("Würstchen prior", r"w(ü|ue?)rstchen|stable-cascade"),
)
# (family, what a layer's path begins with), the first that fits
_BEGINNINGS = (
    ("CLIP's text encoder", r"(text_encoder\w*\.)?(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\."),
    ("GPT-2", r"(transformer\.)?h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))"),
    ("Bloom or Falcon", r"(transformer\.)?h\.\d+\.self_attention\."),
    ("GPT-NeoX", r"gpt_neox\."),
    ("DistilBERT", r"distilbert\."),
    ("DeBERTa", r"deberta\."),
    ("RoBERTa", r"roberta\."),
    ("BERT", r"bert\.|encoder\.layer\.\d+\.attention\.(self|output)\."),
    ("T5", r"(encoder|decoder)\.block\.\d+\.layer\."),
    ("ViT", r"vit\."),
    ("OPT or BART", r"(model\.)?(decoder|encoder)\.layers\.\d+\.(fc1|fc2|self_attn)"),
    ("Llama-like", r"(model\.)?layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)"),
)
_SAYS = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "baseModel", "base_model")
_UNET = r"(down|up)_blocks|mid_block"
_ATTENDED = re.compile(r"(?:.*\.)?attn2\.to_[kv]")
_READS_STREAM = re.compile(
    r".*(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|query|query_key_value|c_attn|q_lin|fc1)"
)


@dataclass(frozen=True)
class Base:
    """The base model that an adapter is for, as far as it can be told."""

    family: str | None
    because: str  # what tells the family
    name: str | None  # what the file calls it
    said: str | None  # the family that the file claims


def base_of(sizes: Sizes, parts: Iterable[str], name: str | None, metadata: Mapping[str, str]) -> Base:
    """The family by names and shapes where they show it, else as the file claims; `name` is the config's."""
    parts = set(parts)
    claims = [str(metadata[key]) for key in _SAYS if metadata.get(key)]
    is_unet = _has(sizes, _UNET)
    names = [name] if name and (parts or is_unet) else []  # of a language model a name says less than its layers
    said = next(filter(None, map(_spelt, [*claims, *names])), None)
    claimed = (said, "as the file says") if said else None
    unet = ("a UNet", "its layers' names") if is_unet else None
    family, because = _image(sizes, parts) or claimed or _text(sizes) or unet or _language(sizes) or (None, "")
    return Base(family, because, name or next(iter(claims), None), said)


def _image(sizes: Sizes, parts: set[str]) -> tuple[str, str] | None:
    widths = {size[1] for path, size in sizes.items() if _ATTENDED.fullmatch(path) and size}
    if len(widths) == 1 and (width := widths.pop()) in _CROSS_WIDTHS and _has(sizes, _UNET):
        return _CROSS_WIDTHS[width], f"its cross-attention reads width {width}"
    if "prior" in parts or _has(sizes, r"kv_mapper|cond_mapper|blocks\.\d+\.(channelwise|mapper)"):
        return "Würstchen prior", "its layers' names"
    if _has(sizes, r"single_transformer_blocks\."):
        return "Flux", "its layers' names"
    if _has(sizes, r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)"):
        return "SD 3", "its layers' names"
    if "text_encoder_2" in parts or _has(sizes, r"attentions\.\d+\.transformer_blocks\.[2-9]\."):
        return "SDXL", "its text encoders" if "text_encoder_2" in parts else "the depth of its transformers"
    return None


def _text(sizes: Sizes) -> tuple[str, str] | None:
    """By the only text encoder; SDXL's first one is SD 1's, so that what a file says counts more."""
    text = {size[1] for path, size in sizes.items() if size and re.fullmatch(r"text_encoder\..*self_attn\.\w+", path)}
    if len(text) == 1 and (width := text.pop()) in _TEXT_WIDTHS:
        return _TEXT_WIDTHS[width], f"its text encoder has width {width}"
    return None


def _language(sizes: Sizes) -> tuple[str, str] | None:
    families = Counter(
        family for path in sizes for family, begin in _BEGINNINGS if re.match(rf"(?:\w+\.)??(?:{begin})", path)
    )
    if not families:
        return None
    family = families.most_common(1)[0][0]
    inputs = Counter(size[1] for path, size in sizes.items() if size and _READS_STREAM.fullmatch(path))
    numbers = [int(found[1]) for path in sizes if (found := re.search(r"\.(?:h|layers?|block)\.(\d+)\.", f".{path}"))]
    width = f", width {inputs.most_common(1)[0][0]}" if inputs else ""
    depth = f", {max(numbers) + 1} layers" if numbers else ""
    return f"{family}{width}{depth}", "its layers' names"


def _has(sizes: Sizes, text: str) -> bool:
    pattern = re.compile(rf"(^|\.)({text})")
    return any(map(pattern.search, sizes))


def _spelt(claim: str) -> str | None:
    return next((family for family, text in _SPELT if re.search(text, claim.lower())), None)
