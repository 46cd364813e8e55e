"""What the parts of a diffusers pipeline are called, and the layers of their text encoders."""

import re

PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "transformer", "transformer_2")
LEVEL = "text_model."  # of CLIP's layers before transformers 5; files go by it
_CLIP = re.compile(r"(\^?)(encoder\\?\.layers\b|embeddings\\?\.(?:token|position)_embedding|final_layer_norm)")


def part_of(path: str) -> str:
    """The part that the first word of a path names, or ""."""
    first = path.partition(".")[0]
    return first if first in PARTS else ""


def is_text(part: str) -> bool:
    """Whether the part is a text encoder."""
    return part.startswith("text_encoder")


def levelled(name: str) -> str:
    """A path inside of a text encoder, or a pattern for such paths, with CLIP's level where it may have lacked it."""
    return _CLIP.sub(lambda match: f"{match[1]}{LEVEL}{match[2]}", name, count=1) if _CLIP.match(name) else name


def canonical(path: str) -> str:
    """A path in a pipeline, as files have it."""
    part, _, rest = path.partition(".")
    return f"{part}.{levelled(rest)}" if is_text(part) and rest else path
