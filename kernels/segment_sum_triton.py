r"""Triton segmented row sum: one program a row of the range and block of columns.

The contract is in ``segment_sum``.  Tokens are sorted on the device first, stably, so that a row's occurrences lie
together and in order; a program adds them one by one:

    GRAD        (M, D)      any floating dtype, any row stride, unit column stride
    POSITIONS   (M,)        int64, sorted by token and then by position
    OFFSETS     (R + 1,)    int64, where the occurrences of each of the R rows begin
    OUT         (R, D)      fp32 or fp64, any row stride

No atomics, no partial sums: a row's bits depend on its own occurrences alone.  A row without any is written as 0.
The time of a launch is at least that of the most frequent token's occurrences in sequence.
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import current
from .segment_sum import by_token, check

BLOCK = 1024  # columns a program holds
THREADS = 128
WARPS = THREADS // (64 if torch.version.hip else 32)


@triton.jit(do_not_specialize=["padding"])
def segment_sum_kernel(
    GRAD, grad_stride, POSITIONS, OFFSETS, OUT, out_stride, columns, padding, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum one row's occurrences over one block of columns; ``padding`` is the row of padding_idx, or -1."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = cols < columns
    first = tl.load(OFFSETS + row)
    last = tl.load(OFFSETS + row + (row != padding))  # none of the padding's
    total = tl.zeros([BLOCK], ACC)
    for i in tl.range(first, last):
        position = tl.load(POSITIONS + i)
        total += tl.load(GRAD + position * grad_stride + cols, mask=inside, other=0.0).to(ACC)
    tl.store(OUT + row * out_stride + cols, total, mask=inside)


def segment_sum(grad, tokens, start: int, stop: int, padding_idx: int | None, out) -> None:
    """Write into ``out`` the sum of the rows of ``grad`` at each token of [start, stop)."""
    check(grad, tokens, start, stop, padding_idx, out)
    if out.numel() == 0:
        return
    positions, offsets = by_token(tokens, start, stop)
    inside = padding_idx is not None and start <= padding_idx < stop
    with current(grad.device):
        segment_sum_kernel[(stop - start, triton.cdiv(grad.shape[1], BLOCK))](
            grad, grad.stride(0), positions, offsets, out, out.stride(0), grad.shape[1],
            padding_idx - start if inside else -1, ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
