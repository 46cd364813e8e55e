"""What glibc's heap does with memory that a step frees on a CPU: the next step would get it again page by page."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
USUAL = {TRIM_THRESHOLD: 1 << 26, MMAP_THRESHOLD: 1 << 25, MMAP_MAX: 1 << 16}  # what its own rules come to
KEEPING = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
# where layers run again, the heap would keep what is freed between their kept inputs: 2.4 GB where 1.4 are live
SPARING = {MMAP_THRESHOLD: 1 << 20}


@contextmanager
def step_heap(keeps: bool) -> Iterator[None]:
    """Inside, the main thread's heap keeps all that is freed; or else, memory of 1 MB and more is no part of it.
    Afterwards what is free is given back. Not to be nested; a heap that the user's environment rules is left alone.
    """
    ruled = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if ruled or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    try:
        if not keeps:
            libc.malloc_trim(ctypes.c_size_t(0))  # else what was freed before would be taken first
        for option, value in (KEEPING if keeps else SPARING).items():
            libc.mallopt(option, value)
        yield
    finally:
        for option, value in USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(ctypes.c_size_t(0))
