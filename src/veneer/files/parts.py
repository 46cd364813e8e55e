"""The parts of a diffusers pipeline: what they and their text encoders' layers are called; an adapter by part."""

import re
from collections.abc import Collection, Mapping

from veneer.apart.changes import Change, adapter_of, beside, changes
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed

PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "transformer", "transformer_2")
LEVEL = "text_model."  # of CLIP's layers before transformers 5; files go by it
STILL_FLAT = "names whose dots only the model knows (files.attach puts it there, files.adapter_on gives it back)"
_CLIP = re.compile(r"(\^?)(encoder\\?\.layers\b|embeddings\\?\.(?:token|position)_embedding|final_layer_norm)")


def part_of(path: str) -> str:
    """The part that the first word of a path names, or ""."""
    first = path.partition(".")[0]
    return first if first in PARTS else ""


def is_text(part: str) -> bool:
    """Whether the part is a text encoder."""
    return part.startswith("text_encoder")


def prior_places(names: Collection[str]) -> dict[str, str]:
    """What adapters call a prior's parts → what a pipeline of these parts does, where it is a prior and a decoder."""
    places = {"prior": "prior_prior", "text_encoder": "prior_text_encoder"}
    return places if "prior" not in names and set(places.values()) <= set(names) else {}


def levelled(name: str) -> str:
    """A path inside of a text encoder, or a pattern for such paths, with CLIP's level where it may have lacked it."""
    return _CLIP.sub(lambda match: f"{match[1]}{LEVEL}{match[2]}", name, count=1) if _CLIP.match(name) else name


def canonical(path: str) -> str:
    """A path in a pipeline, as files have it."""
    part, _, rest = path.partition(".")
    return f"{part}.{levelled(rest)}" if is_text(part) and rest else path


def unresolved(adapter: Adapter) -> list[str]:
    """The paths that a kohya or LyCORIS file had flat and no grammar knew: only the model says where their dots are."""
    within = "|".join(adapter.parts)
    found = [path for path in adapter.tensors if re.fullmatch(rf"(?:(?:{within})\.)?[^.]*_\d+_[^.]*", path)]
    return found if adapter.parts or len(found) == len(adapter.tensors) else []


def by_part(adapter: Adapter) -> dict[str, Adapter]:
    """The adapter of each of a pipeline's parts, with the paths that its own modules have.

    Raises `AdapterError` for what is trained `beside`, whose config names no part.
    """
    _refuse_beside(adapter)
    every, found = changes(adapter), {}
    for part in adapter.parts:
        length = len(part) + 1
        own = {path[length:]: change for path, change in every.items() if path.startswith(f"{part}.")}
        tables = [path[length:] for path in adapter.embeddings if path.startswith(f"{part}.")]
        base = adapter.config.base_model_name_or_path
        found[part] = adapter_of(own, metadata=adapter.metadata, embeddings=tables, base=base)
    return found


def joined(adapters: Mapping[str, Adapter]) -> Adapter:
    """The one adapter of a pipeline's parts, by their names, under `canonical` paths. Raises as `by_part` does."""
    every, metadata = dict[str, Change](), dict[str, str]()
    tables, bases = [], set()
    for part, adapter in adapters.items():
        _refuse_beside(adapter)
        every |= {canonical(f"{part}.{path}"): change for path, change in changes(adapter).items()}
        tables += [canonical(f"{part}.{path}") for path in adapter.embeddings]
        metadata |= adapter.metadata
        bases.add(adapter.config.base_model_name_or_path)
    base = bases.pop() if len(bases) == 1 else None
    return adapter_of(every, metadata=metadata, parts=adapters, embeddings=tables, base=base)


def _refuse_beside(adapter: Adapter) -> None:
    if rest := beside(adapter):
        raise AdapterError(
            "an adapter of several parts of a pipeline changes layers alone, and this one also trains others whole: "
            f"{collapsed(rest)}"
        )
