"""`LoraConfig`: which layers, which method, which numbers. Field names and defaults are PEFT's."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from veneer.core.errors import AdapterError, listed, named, nearest, shown
from veneer.core.expression import faulty

# What PEFT's configs may also say, and the values at which it changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "bias": ("none",),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "use_dora": (False,),
    "use_qalora": (False,),
}
# What says nothing about the numbers in a finished adapter: where it came from, how it started, how it ran.
_SILENT = {
    "arrow_config", "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "kasa_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_version", "qalora_group_size", "runtime_config", "velora_config",
}  # fmt: skip

_NUMBERS = {"r", "lora_alpha", "lora_dropout"}
_LARGEST_RANK = 2**20  # beyond every layer's width; what is larger overflows where sizes are multiplied
_LARGEST = 3.4e38  # of float32
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starting values that change the base's weights


@dataclass
class LoraConfig:
    """Which layers of a base model are adapted, by which method, with which numbers.

    `target_modules`: a list of exact module paths or of last parts of them (`["q_proj", "v_proj"]`), a regular
    expression for the whole path, `"all-linear"` (every linear layer but the output head), or None for the
    usual choice of the model's architecture. `rank_pattern` and `alpha_pattern` give layers whose path ends
    with a key (a regular expression) another `r` or `lora_alpha`.

    Raises `AdapterError` that lists every value that is out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        if problems := list(_problems(self)):
            raise AdapterError("LoraConfig: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "LoraConfig") -> "LoraConfig":
        """The config that a PEFT `adapter_config.json` describes.

        Keys that would change the outputs in a way that is not built are refused; keys that nobody here knows
        are named in a warning. Raises `AdapterError` with all that is wrong.
        """
        config, faults = judged(values, where)
        if config is None or faults:
            raise AdapterError(f"{where}: " + "; ".join(faults))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `adapter_config.json`; `use_dora` and `bias` are written for readers that need them."""
        return {**asdict(self), "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}


def judged(values: Mapping[str, Any], where: str) -> tuple[LoraConfig | None, list[str]]:
    """The config that `from_dict` gives, where there is one, and all that is wrong with the values."""
    known = {f.name for f in fields(LoraConfig)}
    faults, strangers = [], []
    for key, value in values.items():
        if key == "init_lora_weights" and isinstance(value, str) and value.lower().startswith(_MOVE_THE_BASE):
            faults.append(f"{key}={shown(value)} is an adapter for a base that was changed; save it as a plain LoRA")
        elif key in _NEUTRAL and value not in _NEUTRAL[key]:
            faults.append(f"{key}={shown(value)} is not supported (expected {_NEUTRAL[key][0]!r})")
        elif key not in known and key not in _SILENT and key not in _NEUTRAL and value not in (None, False, [], {}, ""):
            strangers.append(key)
    config = None
    # null says nothing, but where a number must be
    given = {k: v for k, v in values.items() if k in known and (v is not None or k in _NUMBERS)}
    given.pop("init_lora_weights", None)  # how a finished adapter once started says nothing about it now
    try:
        config = LoraConfig(**given)
    except AdapterError as error:
        faults.append(str(error))
    if strangers:
        named_keys = [f"{named(key)}={shown(values[key])}{nearest(key, known)}" for key in strangers[:20]]
        named_keys += [f"{len(strangers) - 20} more"] if len(strangers) > 20 else []
        said = f"unknown keys are ignored: {', '.join(named_keys)}"
        if faults:
            faults.append(said)
        else:
            warnings.warn(f"{where}: {said}", stacklevel=3)
    return config, faults


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """α / r, or α / √r with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def _problems(config: LoraConfig) -> list[str]:
    """What is out of range, a sentence each."""
    found = []

    def expect(holds: bool, name: str, expected: str) -> None:
        if not holds:
            found.append(f"{name} should be {expected}, found {shown(getattr(config, name))}")

    expect(isinstance(config.peft_type, str), "peft_type", "the name of a method")
    for name in ("use_rslora", "inference_mode"):
        expect(isinstance(getattr(config, name), bool), name, "true or false")
    for name in ("task_type", "base_model_name_or_path", "revision"):
        expect(isinstance(getattr(config, name), (str, type(None))), name, "a string")
    expect(_is_rank(config.r), "r", f"a whole number from 1 to {_LARGEST_RANK}")
    expect(_is_finite(config.lora_alpha), "lora_alpha", "a finite number")
    expect(_is_finite(config.lora_dropout) and 0 <= config.lora_dropout < 1, "lora_dropout", "in [0, 1)")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        expect(_is_names(getattr(config, name)), name, "a non-empty string or list of non-empty strings")
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    expect(isinstance(ranks, dict) and all(map(_is_rank, ranks.values())), "rank_pattern", "{name: whole number ≥ 1}")
    expect(isinstance(alphas, dict) and all(map(_is_finite, alphas.values())), "alpha_pattern", "{name: number}")
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        expect(_is_expressions(getattr(config, name)), name, "made of valid regular expressions")
    layers = config.layers_to_transform
    expect(_is_layers(layers), "layers_to_transform", "layer numbers counted from 0")
    expect(layers is not None or config.layers_pattern is None, "layers_pattern", "given with layers_to_transform")
    starts = (True, False, "gaussian")
    expect(config.init_lora_weights in starts, "init_lora_weights", f"one of {listed(starts)}")
    return found


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: object) -> bool:
    return _is_whole(value, 1) and value <= _LARGEST_RANK  # type: ignore[operator]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_layers(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_whole(number, 0) for number in value)
    return value is None or _is_whole(value, 0)


def _is_names(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) and name for name in value)
    return value is None or (isinstance(value, str) and bool(value))


def _is_expressions(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value or []
    return isinstance(texts, (list, dict)) and all(isinstance(text, str) for text in texts) and not faulty(texts)
