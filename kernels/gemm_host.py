"""Products of bf16 matrices with fp32 results on CPUs with tile registers (AMX): ``host/gemm.cpp``.

Called through ctypes.  ``host_build`` has how the library comes to be.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .host_build import library


def bind(lib: ctypes.CDLL) -> bool:
    """Declare the products of a library; an older library lacks them: AttributeError."""
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.burnish_product.argtypes = [
        pointer, number, flag, pointer, number, flag, pointer, number, number, number, number, flag,
    ]  # fmt: skip
    lib.burnish_product.restype = None
    lib.burnish_product_supported.argtypes, lib.burnish_product_supported.restype = [], flag
    return True


@functools.cache  # asked before every product
def supported() -> bool:
    """Whether there is a library, and this CPU, its system and the compiler have tiles; it is built if need be."""
    try:
        return bool(library().burnish_product_supported())
    except RuntimeError:
        return False


def check_against_twin() -> None:
    """Small problems on a library that was just built; RuntimeError if torch finds otherwise."""
    if not supported():
        return
    g = torch.Generator().manual_seed(0)
    # each way through gemm.cpp: panels of A, panels of B, parts of K
    for m, n, k in ((70, 37, 75), (37, 70, 75), (5, 40, 3000)):
        a, b = torch.randn(m, k, generator=g).bfloat16(), torch.randn(n, k, generator=g).bfloat16()
        want = a.double() @ b.double().t()
        for x in (a, a.t().contiguous().t()):
            for y in (b.t(), b.t().contiguous()):
                out = torch.empty(m, n)
                product(x, y, out)
                product(x, y, out, add=True)
                if not (out - 2 * want).norm() < 1e-5 * want.norm():
                    raise RuntimeError("products as this compiler built them disagree with torch's")


def check_supported() -> None:
    """RuntimeError where there are no tiles."""
    if not supported():
        raise RuntimeError("this CPU has no tile registers (AMX), or there is no host backend")


def layout(x: torch.Tensor) -> tuple[torch.Tensor, int, bool]:
    """x, or a copy of it, whose rows or columns are contiguous; the step between them; whether it is columns."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x, x.stride(0), False
    if x.stride(0) == 1 or x.shape[0] == 1:
        return x, x.stride(1), True
    x = x.contiguous()
    return x, x.stride(0), False


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """out = a b, or += with ``add``: a (M, K) and b (K, N) bf16, out (M, N) fp32 with contiguous rows.

    The order of a sum over k depends on K, M and N alone, and on the number of threads where K >= 4 max(M, N).
    RuntimeError where there are no tiles.
    """
    check_supported()
    (a, lda, a_columns), (b, ldb, b_columns) = layout(a), layout(b)
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(f"out must have contiguous rows; got strides {out.stride()}")
    library().burnish_product(
        a.data_ptr(), lda, a_columns, b.data_ptr(), ldb, b_columns, out.data_ptr(), out.stride(0), *out.shape,
        a.shape[1], add,
    )  # fmt: skip
