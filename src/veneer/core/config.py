"""`LoraConfig`: which layers, which method, which numbers. Field names and defaults are PEFT's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.core.errors import AdapterError
from veneer.core.ranges import methods, problems

if TYPE_CHECKING:
    from veneer.core.update import Update


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
        from veneer.files.config import config_of

        return config_of(values, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `adapter_config.json`, under the names that PEFT gives them for this method.

        What PEFT's config of the method has not is written only where it is not the default.
        """
        from veneer.files.config import values_of

        return values_of(self)


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """α / r, or α / √r with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
