"""How a CPU's products are made: those of fp32 by oneDNN on AMD's, where MKL takes twice its time; and what is kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PROGRAMS = 128  # that oneDNN keeps; a pass through a language model needs about 60
EXACT = 2e-6  # of the products' size: fp32's own rounding makes 4e-7 of sums of 512, bf16's 3e-3


def keep_few_programs() -> None:
    """Let oneDNN keep no more than the last programs that it made, each for products of one size and 0.6 MB large.

    Steps differ in their number of tokens, so most are never called again, and 1,024 are kept. It reads the setting
    before its first product: a process that has made one is left as it is, and so is a setting of the user's.
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # its name before
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PROGRAMS))


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, products of fp32 are oneDNN's where that is AMD's better kernel, and as exact.

    oneDNN is reached by letting it round to bf16, which it does on CPUs with matrix units alone: so it is looked at.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not _is_amd():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        if not _is_exact():
            matmul.fp32_precision = before
        yield
    finally:
        matmul.fp32_precision = before


def _is_amd() -> bool:
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(told.get("cpu_name", "")).startswith("AMD")


def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(512, 512, generator=generator) for _ in range(2))
    wide = x.double() @ weight.double()
    return bool((x @ weight - wide).norm() <= EXACT * wide.norm())
