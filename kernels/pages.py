"""Large buffers on huge pages where the system lends them on request (Linux's transparent huge pages, "madvise").

A buffer of 100 MiB that is made anew in every call costs 25,000 page faults, as long as a product with it takes, and a
walk down its columns a page's translation a row.  Asked for before the first touch, huge pages cost some 50 faults.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

#: Bytes from which it is worth a system call; smaller ones may lie in a heap that others share.
LEAST = 8 << 20
_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """torch.empty on the CPU; the whole huge pages within it are asked for.  Where that fails, plain pages serve."""
    x = torch.empty(shape, dtype=dtype)
    size = x.numel() * x.element_size()
    if size >= LEAST and sys.platform == "linux":
        start = -(-x.data_ptr() // _HUGE) * _HUGE
        _libc().madvise(start, (x.data_ptr() + size - start) // _HUGE * _HUGE, _MADV_HUGEPAGE)
    return x


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
