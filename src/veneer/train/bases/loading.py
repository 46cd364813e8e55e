"""A base from a folder: its tokenizer and its weights, ready to be adapted."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.fused import is_quick

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # a base brings no programs
LARGE = 2**30  # bytes of a base in float32
DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises `AdapterError` when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"base {folder}: its tokenizer cannot be loaded: {first_line(error)}") from error


def load_language_model(folder: Path, dtype: str | None, device: torch.device, quantization: str = "none") -> Any:
    """The language model in `folder`, every weight from its files; in `dtype` (None: as stored), on `device`: one of an
    encoder and a decoder where its config says so (T5, BART), else a decoder.

    With `quantization` the linear layers but the head hold 8 or 4 bits a weight, and compute in `dtype`.
    Raises `AdapterError` when the folder holds another kind of model, or not all of its weights.
    """
    more = quantising(quantization, dtype, device)
    what = "a causal language model"
    try:
        with quiet():  # what it would say of missing weights is an error here
            config = AutoConfig.from_pretrained(folder, **LOCAL)
            two = config.is_encoder_decoder
            what = "a text-to-text model" if two else what
            model, found = (AutoModelForSeq2SeqLM if two else AutoModelForCausalLM).from_pretrained(
                folder, config=config, dtype=dtype or "auto", output_loading_info=True, **LOCAL, **more
            )
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"base {folder} cannot be loaded as {what}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise AdapterError(
            f"base {folder} is a {config.model_type} without the weights of {what}: "
            f"{collapsed(missing)} are missing; choose another base"
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else nf4 is packed anew, as other numbers, to be measured
            module.support_avx512bf16_for_cpu = False
    return model if more else model.to(device)


def quantising(quantization: str, dtype: str | None, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told: LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339), or NF4 of QLoRA (Dettmers et
    al. 2023, arXiv:2305.14314).
    """
    if quantization == "none":
        return {}
    if missing := [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]:
        raise AdapterError(
            f"quantization={quantization} needs: pip install 'veneer[quantised]' ({listed(missing)} is missing)"
        )
    from transformers import BitsAndBytesConfig

    getLogger("bitsandbytes").setLevel(ERROR)  # which of its own kernels it does without
    given: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype or "float32"}
    return {"quantization_config": BitsAndBytesConfig(**given), "device_map": {"": device}}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints no progress and no warnings."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The device of that name; for `auto` the best there is. Raises `AdapterError` when it is not there."""
    if name == "auto":
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # `meta` has no values
    except (RuntimeError, AssertionError) as error:
        raise AdapterError(f"device {name!r} is not to be had here: {first_line(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device, folder: Path | None = None) -> str:
    """For `auto`, bfloat16 where the device multiplies it faster than float32: on a CPU with AMX or AVX-512
    instructions for it, or on a GPU.

    Elsewhere float32, unless the base in `folder` would be large in it: what is trained over bfloat16 is multiplied in
    float32 there, for a tenth more time and half the memory.
    """
    if name not in DTYPES:
        raise AdapterError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if name != "auto":
        return name
    if device.type == "cpu":
        fast = is_quick(torch.bfloat16)
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast or (folder is not None and 4 * _parameters(folder) > LARGE) else "float32"


def _parameters(folder: Path) -> int:
    """How many numbers the folder's safetensors files hold."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
