"""`LoraConfig` ⇄ what `adapter_config.json` says, under PEFT's names."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, named, nearest, shown
from veneer.core.ranges import methods
from veneer.core.update import Update

# What PEFT's configs may also say, and the values at which it changes nothing.
_NEUTRAL: dict[str, object] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "use_bdlora")),
    **dict.fromkeys(("module_dropout", "rank_dropout"), 0.0),
    **dict.fromkeys(("use_effective_conv2d", "use_qalora"), False),
}
# What says nothing about the numbers in a finished adapter: where it came from, how it started, how it ran.
_SILENT = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "monteclora_config", "peft_version", "qalora_group_size",
    "rank_dropout_scale", "runtime_config", "velora_config",
}  # fmt: skip

# Fields of which PEFT's configs of other methods have some or none: there they are written where they say something.
_LORAS_OWN: dict[str, str | None] = dict.fromkeys((
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_dora", "use_rslora",
))  # fmt: skip
# What PEFT's readers of the file need to be told.
_FOR_PEFT = {"fan_in_fan_out": False}

_NUMBERS = {"r", "lora_alpha", "lora_dropout"}
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starting values that change the base's weights


def config_of(values: Mapping[str, Any], where: str) -> LoraConfig:
    """What `LoraConfig.from_dict` says."""
    config, faults = judged(values, where)
    if config is None or faults:
        raise AdapterError(f"{where}: " + "; ".join(faults))
    return config


def judged(values: Mapping[str, Any], where: str) -> tuple[LoraConfig | None, list[str]]:
    """The config that `from_dict` gives, where there is one, and all that is wrong with the values."""
    made_by = methods().get(str(values.get("peft_type", LoraConfig.peft_type)), Update)
    options = made_by.options
    own_names = {theirs: own for own, theirs in made_by.peft_names.items() if theirs}
    known = {f.name for f in fields(LoraConfig) if f.name != "unknown"} | set(options)
    faults = [f"{key} and {own} are the same: give one" for key, own in own_names.items() if {key, own} <= set(values)]
    strangers = {}
    values = {own_names.get(key, key): value for key, value in values.items()}
    for key, value in values.items():
        if key == "init_lora_weights" and isinstance(value, str) and value.lower().startswith(_MOVE_THE_BASE):
            faults.append(f"{key}={shown(value)} is an adapter for a base that was changed; save it as a plain LoRA")
        elif key in _NEUTRAL and value != _NEUTRAL[key]:
            faults.append(f"{key}={shown(value)} is not supported (expected {_NEUTRAL[key]!r})")
        elif key not in known and key not in _SILENT and key not in _NEUTRAL:
            strangers[key] = value
    config = None
    try:
        config = LoraConfig(**_given(values, known, options), unknown=strangers)
    except AdapterError as error:
        faults.append(str(error))
    if saying := [key for key, value in strangers.items() if value not in (None, False, [], {}, "")]:
        told = listed(saying, 20, lambda key: f"{named(key)}={shown(values[key])}{nearest(key, known)}")
        said = f"unknown keys are kept, and say nothing here: {told}"
        if faults:
            faults.append(said)
        else:
            warnings.warn(f"{where}: {said}", stacklevel=4)
    return config, faults


def _given(values: Mapping[str, Any], known: set[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a file gives; null says nothing, but where a number must be."""
    given = {key: value for key, value in values.items() if key in known and (value is not None or key in _NUMBERS)}
    if given.get("target_parameters") == []:
        del given["target_parameters"]  # an empty list says nothing
    given.pop("init_lora_weights", None)  # how a finished adapter once started says nothing about it now
    chosen = {key: given.pop(key) for key in options if key in given}
    if chosen and isinstance(given.setdefault("options", {}), dict):
        given["options"] = {**given["options"], **chosen}
    return given


def values_of(config: LoraConfig) -> dict[str, Any]:
    """What `LoraConfig.to_dict` says."""
    others = _LORAS_OWN if config.peft_type != "LORA" else {}
    names = {"method_pattern": None, **others, **config.method.peft_names}
    usual = _flat(LoraConfig(peft_type=config.peft_type))
    own = {key: (names.get(key, key), value) for key, value in _flat(config).items()}
    said = {name or key: value for key, (name, value) in own.items() if name or value != usual[key]}
    return config.unknown | said


def _flat(config: LoraConfig) -> dict[str, Any]:
    """The fields that are known, with the method's options among them."""
    values = {**_FOR_PEFT, **asdict(config)}
    options, _ = values.pop("options"), values.pop("unknown")
    return values | options
