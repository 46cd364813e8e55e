"""What the values of a config may be."""

import re
from typing import TYPE_CHECKING

from veneer.core.errors import AdapterError, listed, nearest, shown
from veneer.core.expression import faulty

if TYPE_CHECKING:
    from veneer.core.config import LoraConfig
    from veneer.core.update import Update

_LARGEST_RANK = 2**20  # beyond every layer's width; what is larger overflows where sizes are multiplied
_LARGEST = 3.4e38  # of float32


def start_of(config: "LoraConfig") -> bool | str:
    """`init_lora_weights` without its number: "pissa_niter_4" is "pissa_niter_N"."""
    how = config.init_lora_weights
    return re.sub(r"(?<=^pissa_niter_)\d{1,3}$", "N", how) if isinstance(how, str) else how


def problems(config: "LoraConfig") -> list[str]:
    """What is out of range, a sentence each."""
    found = []

    def expect(holds: bool, name: str, expected: str) -> None:
        if not holds:
            found.append(f"{name} should be {expected}, found {shown(getattr(config, name))}")

    expect(isinstance(config.peft_type, str), "peft_type", "the name of a method")
    for name in ("use_rslora", "use_dora", "inference_mode", "ensure_weight_tying"):
        expect(isinstance(getattr(config, name), bool), name, "true or false")
    for name in ("task_type", "base_model_name_or_path", "revision"):
        expect(isinstance(getattr(config, name), (str, type(None))), name, "a string")
    expect(_is_rank(config.r), "r", f"a whole number from 1 to {_LARGEST_RANK}")
    expect(is_finite(config.lora_alpha), "lora_alpha", "a finite number")
    expect(is_finite(config.lora_dropout) and 0 <= config.lora_dropout < 1, "lora_dropout", "in [0, 1)")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if name == "target_modules" and config.target_modules == [] and _trains_more(config):
            continue
        expect(is_names(getattr(config, name)), name, "a non-empty string or list of non-empty strings")
    for name in ("target_parameters", "modules_to_save"):
        names = getattr(config, name)
        expect(names is None or (isinstance(names, list) and is_names(names)), name, "a list of names")
    expect(config.bias in ("none", "all", "lora_only"), "bias", '"none", "all" or "lora_only"')
    rows = config.trainable_token_indices
    tables = rows if isinstance(rows, dict) else {"": rows}
    holds = all(isinstance(table, str) and _is_tokens(own) for table, own in tables.items())
    expect(rows is None or holds, "trainable_token_indices", "token ids, each once")
    both = bool(config.target_parameters) and config.layers_to_transform is not None
    expect(not both, "layers_to_transform", "not given with target_parameters: name the parameters' paths")
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    expect(isinstance(ranks, dict) and all(map(_is_rank, ranks.values())), "rank_pattern", "{name: whole number ≥ 1}")
    expect(isinstance(alphas, dict) and all(map(is_finite, alphas.values())), "alpha_pattern", "{name: number}")
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        expect(_is_expressions(getattr(config, name)), name, "made of valid regular expressions")
    layers = config.layers_to_transform
    expect(_is_layers(layers), "layers_to_transform", "layer numbers counted from 0")
    expect(layers is not None or config.layers_pattern is None, "layers_pattern", "given with layers_to_transform")
    expect(isinstance(config.options, dict), "options", "{name: value}")
    expect(isinstance(config.init_lora_weights, (bool, str)), "init_lora_weights", "true, false or a word")
    return found + _method_problems(config)


def _method_problems(config: "LoraConfig") -> list[str]:
    """What the method has to say, where there is one."""
    from veneer.core.methods import method  # asked late: a method is made from a config, and knows it

    if not isinstance(config.peft_type, str):
        return []
    try:
        made_by = method(config.peft_type)
    except AdapterError as error:
        return [str(error)]
    found = []
    how, known = config.init_lora_weights, made_by.options
    if isinstance(how, (bool, str)) and start_of(config) not in made_by.starts:
        found.append(f"init_lora_weights should be one of {listed(made_by.starts)}, found {shown(how)}")
    for name, value in config.options.items() if isinstance(config.options, dict) else ():
        if name not in known:
            found.append(f"options: {config.peft_type} has {listed(known)}, not {shown(name)}{nearest(name, known)}")
        elif not known[name].holds(value):
            found.append(f"{name} should be {known[name].expected}, found {shown(value)}")
    return found


def method_of(peft_type: object) -> "type[Update] | None":
    """The method of that name, if there is one."""
    from veneer.core.methods import METHODS

    return METHODS.get(peft_type) if isinstance(peft_type, str) else None


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: object) -> bool:
    return _is_whole(value, 1) and value <= _LARGEST_RANK  # type: ignore[operator]


def is_finite(value: object) -> bool:
    """A number that is one in float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_layers(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_whole(number, 0) for number in value)
    return value is None or _is_whole(value, 0)


def _is_tokens(value: object) -> bool:
    whole = isinstance(value, list) and all(_is_whole(number, 0) for number in value)
    return whole and 0 < len(set(value)) == len(value)  # type: ignore[call-overload,arg-type]


def _trains_more(config: "LoraConfig") -> bool:
    """Whether there is something to train beside a method's layers."""
    return bool(config.modules_to_save or config.trainable_token_indices or config.bias == "all")


def is_names(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) and name for name in value)
    return value is None or (isinstance(value, str) and bool(value))


def _is_expressions(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value or []
    return isinstance(texts, (list, dict)) and all(isinstance(text, str) for text in texts) and not faulty(texts)
