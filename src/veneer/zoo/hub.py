"""A model of the Hugging Face hub → its folder in the hub's own cache."""

import os
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError
from veneer.zoo.needed import needed

TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
# the same weights once more, for other programs or in another precision
DUPLICATES = ["original/*", "consolidated*", "*.fp16.*", "*.non_ema.*", "onnx/*", "openvino/*"]
WEIGHTS = ("*.safetensors", "*.bin")


def snapshot(name: str, *, download: bool) -> Path:
    """The folder of a hub model: from the hub, or from its cache when offline or when `download` is off.

    Pickled weights are fetched only from a model that has no safetensors. An error says why there is none, and
    leaves it to the caller to say of what.
    """
    library = needed("huggingface_hub")
    offline = next((key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(key)), None)
    if offline or not download:
        return _cached(library, name, f"{offline} is set" if offline else "nothing is to be downloaded")
    try:
        files = [file.rfilename for file in library.HfApi().model_info(name, timeout=15).siblings or []]
        patterns = {"allow_patterns": _wanted(files), "ignore_patterns": DUPLICATES}
        return Path(library.snapshot_download(name, **patterns))
    except Exception as error:  # the hub's, the network's and the disk's errors have no common ancestor
        return _cached(library, name, f"the hub did not give it ({_first_line(error)})", error)


def _wanted(files: list[str]) -> list[str]:
    """The patterns of the files that a model needs, out of those that it has."""
    if "model_index.json" in files:  # a pipeline: weights beside the index are the parts once more, in one file
        return [*TEXTS, "*/*.safetensors" if _any_safetensors(files, "/") else "*/*.bin"]
    return [*TEXTS, "*.safetensors" if _any_safetensors(files) else "*.bin"]


def _any_safetensors(files: list[str], part: str = "") -> bool:
    """Whether any file whose path contains `part` is a safetensors file."""
    return any(file.endswith(".safetensors") and part in file for file in files)


def _cached(library: Any, name: str, why: str, cause: Exception | None = None) -> Path:
    """The folder in the hub's cache when a whole model is there, else an error that begins with `why`."""
    try:
        folder = Path(library.snapshot_download(name, local_files_only=True))
    except Exception:  # whatever it is, the model cannot be had from the cache
        folder = None
    if folder and any((folder / file).is_file() for file in ("config.json", "model_index.json")):
        if any(next(folder.rglob(pattern), None) for pattern in WEIGHTS):
            return folder
        why += "; the cache has its config but no weights"
    cache = library.constants.HF_HUB_CACHE
    raise AdapterError(f"{why}, and it is not in the cache: {cache}") from cause


def _is_set(variable: str) -> bool:
    """Whether a variable of the environment is switched on, by the hub's own rule."""
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
