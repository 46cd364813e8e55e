"""Large pages for what passes allocate on a CPU under Linux: a processor finds the places of 2 MB at once."""

import ctypes
import mmap
import platform

PIECE = 2**25 - 2**16  # bytes: the most that glibc takes from its heap, and not as a mapping of its own
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_NEVER = -1  # the largest there is; 2 GB would be less than the heap that is to be kept


def use_large_pages(size: int) -> None:
    """From now on the heap's next `size` bytes come in large pages, and are kept when they are freed. Elsewhere than
    under glibc, and where addresses are limited (`ulimit -v`), nothing happens.
    """
    if platform.libc_ver()[0] != "glibc" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    import resource  # which Windows has not

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(_MMAP_THRESHOLD, 2**25)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    pieces = [piece for piece in (libc.malloc(PIECE) for _ in range(size // PIECE)) if piece]
    begin, end = min(pieces, default=0), max(pieces, default=0) + PIECE
    if end - begin < 2 * size:  # they lie side by side; nothing was written there: they take no memory yet
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
    for piece in pieces:
        libc.free(piece)
