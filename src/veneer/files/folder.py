"""An adapter's own folder, which is PEFT's: `adapter_config.json` beside `adapter_model.safetensors`."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.methods.beside import Copy, Tokens
from veneer.core.methods.dora import Dora
from veneer.files.config import config_of, judged, values_of
from veneer.safe.ordered import save_ordered
from veneer.safe.stored import existing, is_finite, parsed, read_bytes, read_header, read_tensors
from veneer.safe.whole import Write, write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ON_EMBEDDINGS = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}  # PEFT's names there
_MODEL = "base_model"
_BASE = ".base_layer.weight"
# what weights say about themselves, to PEFT and to veneer
_FORMAT, _OWN, _REPLACED = "format", "adapter_config", "replaces"


def save(adapter: Adapter, folder: Path) -> Path:
    """What `Adapter.save` says."""
    if adapter.parts:
        raise AdapterError(f"an adapter of the parts {listed(adapter.parts)} is several: save each in its own folder")
    put(content(adapter, folder), folder)
    return folder


def put(files: Mapping[Path, Write], place: Path) -> None:
    """Write an adapter's files, all whole or none. Raises `AdapterError` when `place` cannot be written."""
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(files)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot write the adapter to {place}: {error}") from error


def content(adapter: Adapter, folder: Path) -> dict[Path, Write]:
    """What `save` writes there, the weights first. Raises `AdapterError`."""
    flat = dict[str, Tensor]()
    every = sorted(map(file_names, adapter.config.by_method()), key=len)
    for path, tensors in adapter.tensors.items():
        names = next((names for names in every if tensors.keys() <= names.keys()), None)
        if names is None:
            raise AdapterError(f"{path}: {listed(tensors)} are no tensors of {adapter.config.peft_type}")
        flat |= {_key(adapter, path, names[name]): tensor for name, tensor in tensors.items()}
    text = json.dumps(dict(sorted(values_of(adapter.config).items())), indent=2) + "\n"
    about = {**adapter.metadata, _FORMAT: "pt", **_succession(folder, text)}
    return {
        folder / WEIGHTS: lambda path: save_ordered(flat, path, about),
        folder / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
    }


def file_names(config: LoraConfig) -> dict[str, str]:
    """What an update calls its tensors → what PEFT's files call them."""
    own = config.method.file_names | (Dora.file_names if config.use_dora else {})
    return Copy.file_names | Tokens.file_names | own


def _key(adapter: Adapter, path: str, ending: str) -> str:
    """What PEFT's files call it."""
    if path in adapter.embeddings:
        ending = _ON_EMBEDDINGS.get(ending, ending)
    layer = path.removesuffix(".bias")
    if not ending and layer != path and layer in adapter.tensors:
        path = f"{layer}.base_layer.bias"
    return ".".join(filter(None, [_MODEL, "model" if path else "", path, ending]))


def load(folder: Path) -> Adapter:
    """What `Adapter.load` says."""
    adapter = examine(folder)
    adapter.faults += broken(adapter)
    return faultless(adapter)


def faultless(adapter: Adapter) -> Adapter:
    """The adapter. Raises `AdapterError` that says its faults, where it has some."""
    if adapter.faults:
        raise AdapterError("\n".join(adapter.faults))
    return adapter


def broken(adapter: Adapter) -> list[str]:
    """What is wrong with the tensors' values, which are read for it."""
    every = {(path, name): tensor for path, own in adapter.tensors.items() for name, tensor in own.items()}
    found = [".".join(filter(None, key)) for key, tensor in every.items() if not is_finite(tensor)]
    return [f"NaN or infinity in: {collapsed(found)}"] if found else []


def examine(folder: Path) -> Adapter:
    """What the folder holds, with its `faults`, for more of them to be found before they are told.

    The tensors' values are not read yet: let their shapes be compared first. Raises `AdapterError` when there is no
    config or no tensors to go on with.
    """
    faults: list[str] = []
    about: dict[str, str] = {}
    config = flat = None
    try:
        header, about = read_header(existing(folder, WEIGHTS))
        flat, wrong = read_tensors(folder / WEIGHTS, header)
        faults += [f"{folder / WEIGHTS}: {'; '.join(wrong)}"] if wrong else []
    except AdapterError as error:
        faults.append(str(error))
    try:
        config, wrong = judged(*_current(folder, about))
        faults += [f"{folder / CONFIG}: {'; '.join(wrong)}"] if wrong else []
    except AdapterError as error:
        faults.insert(0, str(error))
    if config is None or flat is None:
        raise AdapterError("\n".join(dict.fromkeys(faults)))
    adapter, strangers = by_layer(flat, config, about)
    strangers += [name for name in header if name not in flat]
    adapter.faults = faults + [f"{folder / WEIGHTS}: unexpected tensors: {collapsed(strangers)}"] * bool(strangers)
    return adapter


def read_config(folder: Path) -> LoraConfig:
    """The config that stands there. Raises `AdapterError`."""
    about = read_header(folder / WEIGHTS)[1] if (folder / WEIGHTS).is_file() else {}
    return config_of(*_current(folder, about))


def by_layer(flat: Mapping[str, Tensor], config: LoraConfig, about: Mapping[str, str]) -> tuple[Adapter, list[str]]:
    """A PEFT file's tensors by layer and by the method's own names, and the names that are none of a method's."""
    every = config.by_method()
    endings = {ending: name for own in every for name, ending in file_names(own).items() if ending}
    lookups = {_ON_EMBEDDINGS[ending]: name for ending, name in endings.items() if ending in _ON_EMBEDDINGS}
    endings |= lookups
    if any(own.use_dora for own in every):
        endings["lora_magnitude_vector.weight"] = "magnitude"  # as PEFT's readers take it too
    tensors: dict[str, dict[str, Tensor]] = {}
    strangers, embeddings, bases = [], set(), {}
    pattern = re.compile(rf"{_MODEL}(?:\.model\.(.+))?\.({'|'.join(map(re.escape, endings))})")
    for key, tensor in flat.items():
        if config.bias == "all" and key.endswith((".original_module.bias", ".modules_to_save.bias")):
            continue  # PEFT repeats saved modules' so
        match = pattern.fullmatch(key)
        path = (match[1] or "") if match else _trained_path(key, config)
        if path and path.endswith(_BASE):
            bases[path.removesuffix(_BASE)] = tensor
        elif path is None or (name := endings[match[2]] if match else "value") in tensors.setdefault(path, {}):
            strangers.append(key)  # of two that mean the same, readers take different ones
        else:
            tensors[path][name] = tensor
            if match and match[2] in lookups:
                embeddings.add(path)
    own = {_FORMAT, _OWN, _REPLACED}
    metadata = {key: text for key, text in about.items() if key not in own and isinstance(text, str)}
    return Adapter(config, tensors, frozenset(embeddings), bases, metadata), strangers


def _trained_path(key: str, config: LoraConfig) -> str | None:
    """The path of the parameter whose value a tensor may be, of those that the config trains whole, or the base's."""
    path = key.removeprefix(f"{_MODEL}.model.")
    if path != key and config.bias != "none" and path.endswith(".bias"):
        return path.removesuffix(".base_layer.bias") + ".bias" if path.endswith(".base_layer.bias") else path
    return path if path != key and (config.modules_to_save or path.endswith(_BASE)) else None


def _succession(folder: Path, text: str) -> dict[str, str]:
    """What weights say about themselves: the config that comes with them, if it takes the place of another one.

    The two files are put in place one after the other. Whoever is killed in between leaves the old config beside the
    new weights, which name it by its hash and so are known for what they are. A config that was edited by hand is not
    the old one, and is read.
    """
    try:
        old = read_bytes(folder / CONFIG)
    except AdapterError:
        return {}
    return {} if old == text.encode() else {_OWN: text, _REPLACED: hashlib.sha256(old).hexdigest()}


def _current(folder: Path, about: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The values of the config that belongs to the weights that say `about`, and where they stand."""
    path = existing(folder, CONFIG)
    text = read_bytes(path)
    if isinstance(about.get(_OWN), str) and hashlib.sha256(text).hexdigest() == about.get(_REPLACED):
        where = f"{folder / WEIGHTS}, its own config"
        warnings.warn(f"saving to {folder} was cut short: the weights' own config is read; save it again", stacklevel=5)
        return parsed(about[_OWN].encode("utf-8", "replace"), where), where
    return parsed(text, str(path)), str(path)
