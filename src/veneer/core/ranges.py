"""What the values of a config may be."""

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from veneer.core.errors import AdapterError, listed, nearest, shown
from veneer.safe.expression import faulty

if TYPE_CHECKING:
    from veneer.core.config import LoraConfig
    from veneer.core.update import Update

_LARGEST_RANK = 2**20  # beyond every layer's width; what is larger overflows where sizes are multiplied
_LARGEST = 3.4e38  # of float32
_MOST_METHODS = 4_000  # of layers, in one adapter; to check one takes a ten-thousandth of a second
OF_A_METHOD = {"peft_type", "use_dora", "use_rslora", "options"}  # what an entry of method_pattern may say


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


def _is_method(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= OF_A_METHOD and isinstance(value.get("options", {}), dict)


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
    (
        "method_pattern",
        lambda value: _is_patterns(_is_method, value),
        f"{{regular expression: {{any of {listed(sorted(OF_A_METHOD))}: …}}}}",
    ),
    ("layers_pattern", _is_expressions, "made of valid regular expressions"),
    ("layers_to_transform", lambda value: value is None or _is_layers(value), "layer numbers, counted from 0"),
    ("options unknown", lambda value: isinstance(value, dict), "{name: value}"),
    ("init_lora_weights", lambda value: isinstance(value, bool | str), "true, false or a word"),
)


def problems(config: "LoraConfig") -> list[str]:
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
    return (said + _method_problems(config)) or _pattern_problems(config)


def _method_problems(config: "LoraConfig") -> list[str]:
    """What the method has to say."""
    if not isinstance(config.peft_type, str):
        return []
    if config.peft_type not in (known_methods := methods()):
        said = f"peft_type {shown(config.peft_type)} is not a method of veneer: it has {listed(known_methods)}"
        return [said + nearest(config.peft_type, known_methods)]
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


def _pattern_problems(config: "LoraConfig") -> list[str]:
    """What is wrong with the methods of `method_pattern`."""
    found, every = [], [config]
    entries = {repr(entry): (key, entry) for key, entry in config.method_pattern.items()}
    if len(entries) > _MOST_METHODS:
        return [f"method_pattern has {len(entries)} different entries, and {_MOST_METHODS} are the most"]
    for key, entry in entries.values():
        try:
            every.append(config.with_method(entry))
        except AdapterError as error:
            found.append(f"method_pattern {shown(key)}: {error}")
    if len(every) > 1 and (stuck := [own for own in every if own.method.share or own.options.get("fused")]):
        how = "shares projections among all layers" if stuck[0].method.share else "has fused parts"
        found.append(f"method_pattern is not for an adapter of {stuck[0].peft_type} that {how}: use one method")
    return found


@cache
def methods() -> "dict[str, type[Update]]":
    """All methods, by their `peft_type`."""
    from veneer.core.methods import METHODS  # asked late: a method is made from a config, and knows it

    return METHODS


def start_of(config: "LoraConfig") -> bool | str:
    """`init_lora_weights` without its number: "pissa_niter_4" is "pissa_niter_N"."""
    how = config.init_lora_weights
    return re.sub(r"(?<=^pissa_niter_)\d{1,3}$", "N", how) if isinstance(how, str) else how
