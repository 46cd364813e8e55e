"""A base with a head for a task: which of its weights start at random is found from what its files have."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from veneer.core.errors import AdapterError, collapsed
from veneer.core.trained import TASK_HEADS
from veneer.train.bases.loading import LOCAL, first_line, quantising, quiet

POOLERS = ("pooler",)  # between body and head; bases that were trained on tokens alone come without it


def load_config(folder: Path) -> Any:
    """The base's config."""
    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, **LOCAL)
        except (OSError, ValueError, KeyError) as error:
            raise AdapterError(f"base {folder}: its config cannot be loaded: {first_line(error)}") from error


def load_with_head(
    folder: Path, kind: str, dtype: str | None, device: torch.device, quantization: str = "none", **config: Any
) -> tuple[Any, list[str]]:
    """The model that transformers' class `kind` makes of `folder`, and the paths of its modules that start at random;
    `config` is set in its config.

    Raises `AdapterError` when anything but a head, or a pooler before it, has no weights in the folder.
    """
    more = quantising(quantization, dtype, device)
    if more:  # a head that starts at random is trained, and so not quantised
        heads = {name for names in TASK_HEADS.values() for name in names}
        more["quantization_config"].llm_int8_skip_modules = [*sorted(heads), "pre_classifier", *POOLERS]
    own = load_config(folder)
    for key, value in config.items():
        setattr(own, key, value)
    try:
        with quiet():
            model, found = getattr(transformers, kind).from_pretrained(
                folder,
                config=own,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **LOCAL,
                **more,
            )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(f"base {folder} cannot be loaded as {kind}: {first_line(error)}") from error
    other = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    random = sorted({*found["missing_keys"], *other})
    body = f"{model.base_model_prefix}."
    lacking = [key for key in random if key.startswith(body) and not set(POOLERS) & set(key.split("."))]
    if lacking:
        raise AdapterError(
            f"base {folder} is not a whole {own.model_type}: besides a head, the weights {collapsed(lacking)} are "
            "missing or have other shapes; choose another base"
        )
    return (model if more else model.to(device)), random_modules(model, random)


def random_modules(model: nn.Module, keys: list[str]) -> list[str]:
    """The outermost modules, sorted, all of whose parameters are among `keys`."""
    random, found = set(keys), list[str]()
    for path, module in model.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if path and own and random.issuperset(own) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return sorted(found)


def most_positions(model: Any, tokenizer: Any) -> int:
    """The most tokens that model and tokenizer say they take; RoBERTa's positions begin behind its padding's."""
    config = model.config.get_text_config()
    most = [getattr(config, "max_position_embeddings", None) or 2**31, tokenizer.model_max_length]
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings") and module.padding_idx is not None:
            most.append(module.num_embeddings - module.padding_idx - 1)
    return int(min(most))
