"""`LoraConfig`: which layers, which method, which numbers. Field names and defaults are PEFT's."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.core.errors import AdapterError, listed, nearest

if TYPE_CHECKING:
    from veneer.core.update import Update

# What PEFT's configs may also say, and the values at which it changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "bias": ("none",),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "module_dropout": (0.0,),
    "modules_to_save": (None, []),
    "rank_dropout": (0.0,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "use_effective_conv2d": (False,),
    "use_qalora": (False,),
}
# What says nothing about the numbers in a finished adapter: where it came from, how it started, how it ran.
_SILENT = {
    "arrow_config", "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "kasa_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_version", "qalora_group_size", "rank_dropout_scale", "runtime_config", "velora_config",
}  # fmt: skip

# What PEFT's readers of the file need to be told.
_FOR_PEFT = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}

_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starting values that change the base's weights


@dataclass
class LoraConfig:
    """Which layers of a base model are adapted, by which method, with which numbers.

    `target_modules`: a list of exact module paths or of last parts of them (`["q_proj", "v_proj"]`), a regular
    expression for the whole path, a role in a transformer, or None for the usual choice of the architecture. The
    roles are `"all-linear"`, `"attention"`, `"feed-forward"` and `"norm"`, and leave the output head out.
    `target_parameters`: parameters that are changed by their names (`["experts.down_proj"]`), whatever they
    belong to; a stack of matrices, matrix by matrix. `rank_pattern` and `alpha_pattern` give layers whose path
    ends with a key (a regular expression) another `r` or `lora_alpha`. `options` are those that the method
    `peft_type` declares for itself; in a file they stand beside the rest, under PEFT's names.

    Raises `AdapterError` that lists every value that is out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"
    options: dict[str, Any] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        if self.target_parameters and self.target_modules == []:
            self.target_modules = None  # PEFT's way to say: the parameters alone
        if problems := list(_problems(self)):
            raise AdapterError("LoraConfig: " + "; ".join(problems))
        if made_by := _method(self.peft_type):
            self.options = {name: option.default for name, option in made_by.options.items()} | self.options

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "LoraConfig") -> "LoraConfig":
        """The config that a PEFT `adapter_config.json` describes.

        Keys that would change the outputs in a way that is not built are refused; keys that nobody here knows
        are named in a warning. Raises `AdapterError` with all that is wrong.
        """
        made_by = _method(values.get("peft_type", cls.peft_type))
        options = made_by.options if made_by else {}
        own_names = {theirs: own for own, theirs in made_by.peft_names.items() if theirs} if made_by else {}
        known = {f.name for f in fields(cls)} | set(options)
        problems, strangers = [], []
        given = {own_names.get(key, key): value for key, value in values.items()}
        for key, value in given.items():
            if key == "init_lora_weights" and str(value).lower().startswith(_MOVE_THE_BASE):
                problems.append(f"{key}={value!r} is an adapter for a base that was changed; save it as a plain LoRA")
            if key in known or key in _SILENT:
                continue
            if key in _NEUTRAL:
                if value not in _NEUTRAL[key]:
                    problems.append(f"{key}={value!r} is not supported (expected {_NEUTRAL[key][0]!r})")
            elif value not in (None, False, [], {}, ""):
                strangers.append(f"{key}={value!r}{nearest(key, known)}")
        if problems:
            raise AdapterError(f"{where}: " + "; ".join(problems))
        if strangers:
            warnings.warn(f"{where}: unknown keys are ignored: {', '.join(strangers)}", stacklevel=3)
        given = {key: value for key, value in given.items() if key in known and value is not None}
        if not given.get("target_parameters", True):
            del given["target_parameters"]  # an empty list says nothing
        given.pop("init_lora_weights", None)  # how a finished adapter once started says nothing about it now
        chosen = {key: given.pop(key) for key in options if key in given}
        if chosen:
            given["options"] = {**given.get("options", {}), **chosen}
        try:
            return cls(**given)
        except AdapterError as error:
            raise AdapterError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `adapter_config.json`, under the names that PEFT gives them for this method.

        What PEFT's config of the method has not is written only where it is not the default.
        """
        made_by = _method(self.peft_type)
        names = made_by.peft_names if made_by else {}
        values = {**_FOR_PEFT, **asdict(self), **self.options}
        del values["options"]
        options = {name: option.default for name, option in made_by.options.items()} if made_by else {}
        usual = {**_FOR_PEFT, **asdict(LoraConfig()), **options}
        named = {key: names.get(key, key) for key in values}
        return {named[key] or key: value for key, value in values.items() if named[key] or value != usual[key]}


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """α / r, or α / √r with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def start_of(config: LoraConfig) -> bool | str:
    """`init_lora_weights` without its number: "pissa_niter_4" is "pissa_niter_N"."""
    how = config.init_lora_weights
    return re.sub(r"(?<=^pissa_niter_)\d{1,3}$", "N", how) if isinstance(how, str) else how


def _problems(config: LoraConfig) -> list[str]:
    """What is out of range, a sentence each."""
    found = []

    def expect(holds: bool, name: str, expected: str) -> None:
        if not holds:
            found.append(f"{name} should be {expected}, found {getattr(config, name)!r}")

    expect(isinstance(config.peft_type, str), "peft_type", "the name of a method")
    expect(isinstance(config.use_rslora, bool), "use_rslora", "true or false")
    expect(isinstance(config.use_dora, bool), "use_dora", "true or false")
    expect(_is_rank(config.r), "r", "a whole number of at least 1")
    expect(is_finite(config.lora_alpha), "lora_alpha", "a finite number")
    expect(is_finite(config.lora_dropout) and 0 <= config.lora_dropout < 1, "lora_dropout", "in [0, 1)")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        expect(_is_names(getattr(config, name)), name, "a non-empty string or list of non-empty strings")
    names = config.target_parameters
    expect(names is None or (isinstance(names, list) and _is_names(names)), "target_parameters", "a list of names")
    both = bool(names) and config.layers_to_transform is not None
    expect(not both, "layers_to_transform", "not given with target_parameters: name the parameters' paths")
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    expect(isinstance(ranks, dict) and all(map(_is_rank, ranks.values())), "rank_pattern", "{name: whole number ≥ 1}")
    expect(isinstance(alphas, dict) and all(map(is_finite, alphas.values())), "alpha_pattern", "{name: number}")
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        expect(_is_expressions(getattr(config, name)), name, "made of valid regular expressions")
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers
    good = layers is None or (isinstance(layers, (list, tuple)) and all(isinstance(i, int) and i >= 0 for i in layers))
    expect(good, "layers_to_transform", "layer numbers counted from 0")
    expect(layers is not None or config.layers_pattern is None, "layers_pattern", "given with layers_to_transform")
    expect(isinstance(config.options, dict), "options", "{name: value}")
    expect(isinstance(config.init_lora_weights, (bool, str)), "init_lora_weights", "true, false or a word")
    if not found and (made_by := _method(config.peft_type)):
        starts = made_by.starts
        expect(start_of(config) in starts, "init_lora_weights", f"one of {listed(starts)}")
        found += _option_problems(config, made_by)
    return found


def _option_problems(config: LoraConfig, made_by: "type[Update]") -> Iterator[str]:
    known = made_by.options
    for name, value in config.options.items():
        if name not in known:
            yield f"options: {config.peft_type} has {listed(known)}, not {name!r}{nearest(name, known)}"
        elif not known[name].holds(value):
            yield f"{name} should be {known[name].expected}, found {value!r}"


def _method(peft_type: object) -> "type[Update] | None":
    from veneer.core.methods import method  # asked late: a method is made from a config, and knows it

    return method(peft_type) if isinstance(peft_type, str) else None


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_finite(value: object) -> bool:
    """A number that is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) and name for name in value)
    return value is None or (isinstance(value, str) and bool(value))


def _is_expressions(value: object) -> bool:
    try:
        for text in [value] if isinstance(value, str) else value or ():  # type: ignore[attr-defined]
            re.compile(text)
    except (re.error, TypeError):
        return False
    return True


# What each field means, for whoever lists them.
MEANINGS = {
    "r": "The rank: how many columns A and B share.",
    "lora_alpha": "The change is scaled by lora_alpha / r (lora_alpha / √r with use_rslora).",
    "target_modules": "Which layers: names or last parts of names, a regular expression for whole names, all-linear.",
    "exclude_modules": "Layers that are left out, named in the same way.",
    "lora_dropout": "The share of the change's inputs that is dropped in training.",
    "use_rslora": "Scale by lora_alpha / √r, which keeps large ranks learning.",
    "rank_pattern": "Other ranks for layers whose names end with a key: {q_proj: 8}.",
    "alpha_pattern": "Other values of lora_alpha, in the same way.",
    "layers_to_transform": "Only in these layers, counted from 0.",
    "layers_pattern": "What the list of layers is called, where it is not plain.",
    "init_lora_weights": "How A and B start.",
    "peft_type": "The method: LORA, LOHA, LOKR or VERA.",
    "use_dora": "Learn the length of each row of W + ΔW apart from its direction (DoRA), over any method.",
    "options": "What only one method knows.",
    "task_type": "What PEFT should load the base as; found by itself.",
    "base_model_name_or_path": "The base that the adapter is for; found by itself.",
    "revision": "The revision of the base on the hub.",
    "inference_mode": "Kept for PEFT; says nothing here.",
    "target_parameters": "Parameters that are adapted by name, stacked experts included.",
}
