r"""The contract of the segmented row sum: the gradient of a range of an embedding's rows.

    grad     (M, D)               gradient of the looked-up rows, any floating dtype, any row stride, unit column stride
    tokens   (M,)                 int64, any value; those outside [start, stop) are ignored
    out      (stop - start, D)    fp32, or fp64 for grad in fp64

    out[r - start] = sum over m with tokens[m] = r of grad[m]

in out's dtype, from 0 upwards in m: the bits of one run are those of the next, and on the CPU in fp32 those of the
dense gradient of torch.nn.functional.embedding.  The row of ``padding_idx`` is 0.  Every element of out is written.
Nothing waits for the device: which tokens are in the range is never known to the host.
"""

from __future__ import annotations

import torch


def check(grad, tokens, start: int, stop: int, padding_idx: int | None, out) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    if not 0 <= start <= stop:
        raise ValueError(f"start and stop must be a range of rows; got [{start}, {stop})")
    if padding_idx is not None and padding_idx < 0:
        raise ValueError(f"padding_idx must be None or a row; got {padding_idx}")
    if grad.ndim != 2 or tuple(tokens.shape) != grad.shape[:1]:
        raise ValueError(f"grad and tokens must be (M, D) and (M,); got {tuple(grad.shape)} and {tuple(tokens.shape)}")
    if tuple(out.shape) != (stop - start, grad.shape[1]):
        raise ValueError(f"out must be {(stop - start, grad.shape[1])}; got {tuple(out.shape)}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64; got {tokens.dtype}")
    wanted = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if out.dtype != wanted or not grad.is_floating_point():
        raise TypeError(f"out must be {wanted} for grad in {grad.dtype}; got {out.dtype}")
    for name, x in (("grad", grad), ("out", out)):
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"{name} must have unit stride along its last dimension; got strides {x.stride()}")
    if not grad.device == tokens.device == out.device:
        raise ValueError(f"operands must be on one device; got {grad.device}, {tokens.device} and {out.device}")


def by_token(tokens, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (M,) sorted by token and then by position, and where each row's begin and end (stop - start + 1,)."""
    ordered, positions = tokens.sort(stable=True)
    rows = torch.arange(start, stop + 1, device=tokens.device)
    return positions, torch.searchsorted(ordered, rows)
