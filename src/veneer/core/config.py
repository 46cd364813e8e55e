"""`LoraConfig`: which layers, which method, which numbers. Field names and defaults are PEFT's."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.core.errors import AdapterError, listed, named, nearest, shown
from veneer.safe.expression import faulty

if TYPE_CHECKING:
    from veneer.core.update import Update

_LARGEST_RANK = 2**20  # beyond every layer's width; what is larger overflows where sizes are multiplied
_LARGEST = 3.4e38  # of float32
# What PEFT's configs may also say, and the values at which it changes nothing.
_NEUTRAL: dict[str, object] = {
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication", "use_bdlora")),
    **dict.fromkeys(("module_dropout", "rank_dropout"), 0.0),
    **dict.fromkeys(("use_effective_conv2d", "use_qalora"), False),
}
# What says nothing about the numbers in a finished adapter: where it came from, how it started, how it ran.
_SILENT = {
    "arrow_config", "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out",
    "kasa_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_version", "qalora_group_size", "rank_dropout_scale", "runtime_config", "velora_config",
}  # fmt: skip

# What PEFT's readers of the file need to be told.
_FOR_PEFT = {"fan_in_fan_out": False}

_NUMBERS = {"r", "lora_alpha", "lora_dropout"}
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starting values that change the base's weights


@dataclass
class LoraConfig:
    """Which layers of a base model are adapted, by which method, with which numbers.

    `target_modules`: a list of exact module paths or of last parts of them (`["q_proj", "v_proj"]`), a regular
    expression for the whole path, a role in a transformer, or None for the usual choice of the architecture. The
    roles are `"all-linear"`, `"attention"`, `"feed-forward"` and `"norm"`, and leave the output head out.
    `target_parameters`: parameters that are changed by their names (`["experts.down_proj"]`), whatever they
    belong to; a stack of matrices, matrix by matrix. `modules_to_save`: modules that are trained whole, as copies that
    belong to the adapter; a fresh adapter adds the head that `task_type` SEQ_CLS, TOKEN_CLS or QUESTION_ANS means.
    `trainable_token_indices`: rows of the input embedding, or `{table: rows}`, that are trained by themselves, in all
    layers that share the table's weight. `ensure_weight_tying`: whatever changes a weight that layers share does so in
    all of them. `bias`: "lora_only" trains the biases of the adapted linear layers and convolutions too, "all" every
    bias; they belong to the adapter like the rest.
    `rank_pattern` and `alpha_pattern` give layers whose path ends with a key (a regular expression) another `r` or
    `lora_alpha`. `options` are those that the method `peft_type` declares for itself; in a file they stand beside the
    rest, under PEFT's names.

    Raises `AdapterError` that lists every value that is out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
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
        self.modules_to_save = self.modules_to_save or None  # PEFT may say []
        for name in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        if self.target_parameters and self.target_modules == []:
            self.target_modules = None  # PEFT's way to say: the parameters alone
        if found := problems(self):
            raise AdapterError("LoraConfig: " + "; ".join(found))
        self.options = {name: option.default for name, option in self.method.options.items()} | self.options

    @property
    def method(self) -> "type[Update]":
        """What `peft_type` names."""
        return _methods()[self.peft_type]

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
        """Plain values for `adapter_config.json`, under the names that PEFT gives them for this method.

        What PEFT's config of the method has not is written only where it is not the default.
        """
        names, usual = self.method.peft_names, _flat(LoraConfig(peft_type=self.peft_type))
        own = {key: (names.get(key, key), value) for key, value in _flat(self).items()}
        return {name or key: value for key, (name, value) in own.items() if name or value != usual[key]}


def _flat(config: LoraConfig) -> dict[str, Any]:
    """The fields, with the method's options among them."""
    values = {**_FOR_PEFT, **asdict(config)}
    options = values.pop("options")
    return values | options


def judged(values: Mapping[str, Any], where: str) -> tuple[LoraConfig | None, list[str]]:
    """The config that `from_dict` gives, where there is one, and all that is wrong with the values."""
    from veneer.core.update import Update  # asked late: the class of configs needs no torch

    made_by = _methods().get(str(values.get("peft_type", LoraConfig.peft_type)), Update)
    options = made_by.options
    own_names = {theirs: own for own, theirs in made_by.peft_names.items() if theirs}
    known = {f.name for f in fields(LoraConfig)} | set(options)
    faults = [f"{key} and {own} are the same: give one" for key, own in own_names.items() if {key, own} <= set(values)]
    strangers = []
    values = {own_names.get(key, key): value for key, value in values.items()}
    for key, value in values.items():
        if key == "init_lora_weights" and isinstance(value, str) and value.lower().startswith(_MOVE_THE_BASE):
            faults.append(f"{key}={shown(value)} is an adapter for a base that was changed; save it as a plain LoRA")
        elif key in _NEUTRAL and value != _NEUTRAL[key]:
            faults.append(f"{key}={shown(value)} is not supported (expected {_NEUTRAL[key]!r})")
        elif key not in known and key not in _SILENT and key not in _NEUTRAL and value not in (None, False, [], {}, ""):
            strangers.append(key)
    config = None
    try:
        config = LoraConfig(**_given(values, known, options))
    except AdapterError as error:
        faults.append(str(error))
    if strangers:
        told = listed(strangers, 20, lambda key: f"{named(key)}={shown(values[key])}{nearest(key, known)}")
        said = f"unknown keys are ignored: {told}"
        if faults:
            faults.append(said)
        else:
            warnings.warn(f"{where}: {said}", stacklevel=3)
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


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """α / r, or α / √r with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def start_of(config: LoraConfig) -> bool | str:
    """`init_lora_weights` without its number: "pissa_niter_4" is "pissa_niter_N"."""
    how = config.init_lora_weights
    return re.sub(r"(?<=^pissa_niter_)\d{1,3}$", "N", how) if isinstance(how, str) else how


def is_finite(value: object) -> bool:
    """A number that is one in float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_names(value: object) -> bool:
    return value is None or _is_name(value) or (value != [] and _is_all(_is_name, value))


def _is_list(value: object) -> bool:
    return not isinstance(value, str) and is_names(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_all(holds: Callable[[Any], bool], value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(holds, value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_rank(value: object) -> bool:
    return _is_whole(value) and 1 <= value <= _LARGEST_RANK  # type: ignore[operator]


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and _is_all(_is_whole, value) and 0 < len(set(value)) == len(value)


def _is_tables(value: object) -> bool:
    tables = value if isinstance(value, dict) else {"": value}
    return value is None or all(isinstance(name, str) and _is_tokens(rows) for name, rows in tables.items())


def _is_patterns(holds: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values())) and _is_expressions(list(value))


def _is_layers(value: Any) -> bool:
    return _is_whole(value) or _is_all(_is_whole, value)


def _is_expressions(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value or []
    return _is_all(lambda text: isinstance(text, str), texts) and not faulty(texts)


# (fields, what holds for their values, which is to say)
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("peft_type", lambda value: isinstance(value, str), "the name of a method"),
    ("use_rslora use_dora inference_mode ensure_weight_tying", lambda value: isinstance(value, bool), "true or false"),
    ("task_type base_model_name_or_path revision", lambda value: isinstance(value, str | None), "a string"),
    ("r", _is_rank, f"a whole number from 1 to {_LARGEST_RANK}"),
    ("lora_alpha", is_finite, "a finite number"),
    ("lora_dropout", lambda value: is_finite(value) and 0 <= value < 1, "in [0, 1)"),
    ("target_modules", lambda value: value == [] or is_names(value), "a non-empty string or list of such strings"),
    ("exclude_modules layers_pattern", is_names, "a non-empty string or list of such strings"),
    ("target_parameters modules_to_save", _is_list, "a list of names"),
    ("bias", lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    ("trainable_token_indices", _is_tables, "token ids, each once"),
    ("rank_pattern", lambda value: _is_patterns(_is_rank, value), "{regular expression: whole number ≥ 1}"),
    ("alpha_pattern", lambda value: _is_patterns(is_finite, value), "{regular expression: number}"),
    ("layers_pattern", _is_expressions, "made of valid regular expressions"),
    ("layers_to_transform", lambda value: value is None or _is_layers(value), "layer numbers, counted from 0"),
    ("options", lambda value: isinstance(value, dict), "{name: value}"),
    ("init_lora_weights", lambda value: isinstance(value, bool | str), "true, false or a word"),
)


def problems(config: LoraConfig) -> list[str]:
    """What is out of range, a sentence each."""
    layers = config.layers_to_transform
    more = config.modules_to_save or config.trainable_token_indices or config.bias == "all"
    found = [(name, told) for names, holds, told in _RANGES for name in names.split() if not holds(vars(config)[name])]
    if config.target_modules == [] and not more:
        found.append(("target_modules", "names, where nothing else is trained"))
    if config.target_parameters and layers is not None:
        found.append(("layers_to_transform", "not given with target_parameters: name the parameters' paths"))
    if config.layers_pattern is not None and layers is None:
        found.append(("layers_pattern", "given with layers_to_transform"))
    said = [f"{name} should be {told}, found {shown(vars(config)[name])}" for name, told in found]
    return said + _method_problems(config)


def _method_problems(config: LoraConfig) -> list[str]:
    """What the method has to say."""
    if not isinstance(config.peft_type, str):
        return []
    methods = _methods()
    if config.peft_type not in methods:
        said = f"peft_type {shown(config.peft_type)} is not a method of veneer: it has {listed(methods)}"
        return [said + nearest(config.peft_type, methods)]
    found = []
    how, made_by, known = config.init_lora_weights, config.method, config.method.options
    if isinstance(how, bool | str) and start_of(config) not in made_by.starts:
        found.append(f"init_lora_weights should be one of {listed(made_by.starts)}, found {shown(how)}")
    for name, value in config.options.items() if isinstance(config.options, dict) else ():
        if name not in known:
            found.append(f"options: {config.peft_type} has {listed(known)}, not {shown(name)}{nearest(name, known)}")
        elif not known[name].holds(value):
            found.append(f"{name} should be {known[name].expected}, found {shown(value)}")
    return found


def _methods() -> "dict[str, type[Update]]":
    from veneer.core.methods import METHODS  # asked late: a method is made from a config, and knows it

    return METHODS
