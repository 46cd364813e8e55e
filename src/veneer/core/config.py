"""`LoraConfig`: which layers, which method, which numbers. Field names and defaults are PEFT's."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.core.errors import AdapterError, listed, named, nearest, shown
from veneer.core.ranges import methods, problems

if TYPE_CHECKING:
    from veneer.core.update import Update

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
    `lora_alpha`; `method_pattern` gives such layers another method, `{"conv": {"peft_type": "LOKR", "options": {…}},
    "q_proj": {"use_dora": True, "use_rslora": True}}`, which PEFT's files cannot say. `options` are those that the
    method `peft_type` declares for itself; in a file they stand beside the rest, under PEFT's names. `unknown` are the
    keys of a file that nobody here knows, which say nothing and are written out as they were.

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
    method_pattern: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"
    options: dict[str, Any] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    unknown: dict[str, Any] = field(default_factory=dict)

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
        return methods()[self.peft_type]

    def with_method(self, entry: Mapping[str, Any]) -> "LoraConfig":
        """The config of the layers that have this entry of `method_pattern`. Raises `AdapterError`."""
        options = self.options if entry.get("peft_type", self.peft_type) == self.peft_type else {}
        return replace(self, **{**entry, "options": {**options, **entry.get("options", {})}, "method_pattern": {}})

    def by_method(self) -> "list[LoraConfig]":
        """Itself, and the configs of the other methods that `method_pattern` gives to layers, each once."""
        entries = {repr(entry): entry for entry in self.method_pattern.values()}
        return [self, *map(self.with_method, entries.values())]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "LoraConfig") -> "LoraConfig":
        """The config that a PEFT `adapter_config.json` describes.

        Keys that would change the outputs in a way that is not built are refused; keys that nobody here knows
        are kept, and named in a warning. Raises `AdapterError` with all that is wrong.
        """
        config, faults = judged(values, where)
        if config is None or faults:
            raise AdapterError(f"{where}: " + "; ".join(faults))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `adapter_config.json`, under the names that PEFT gives them for this method.

        What PEFT's config of the method has not is written only where it is not the default.
        """
        names = {"method_pattern": None, **self.method.peft_names}
        usual = _flat(LoraConfig(peft_type=self.peft_type))
        own = {key: (names.get(key, key), value) for key, value in _flat(self).items()}
        said = {name or key: value for key, (name, value) in own.items() if name or value != usual[key]}
        return self.unknown | said


def _flat(config: LoraConfig) -> dict[str, Any]:
    """The fields that are known, with the method's options among them."""
    values = {**_FOR_PEFT, **asdict(config)}
    options, _ = values.pop("options"), values.pop("unknown")
    return values | options


def judged(values: Mapping[str, Any], where: str) -> tuple[LoraConfig | None, list[str]]:
    """The config that `from_dict` gives, where there is one, and all that is wrong with the values."""
    from veneer.core.update import Update  # asked late: the class of configs needs no torch

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
