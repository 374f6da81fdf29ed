"""The arithmetic of a path: fp32 (fp64 for fp64), a block at a time, rounded once, written in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .selectors import Selection

#: Elements of a block: three in fp32 are what arithmetic adds to the tensors themselves.  Small enough for a core's
#: cache: eight times as many take three times as long.
BLOCK = 1 << 18


def parts(x: torch.Tensor, selection: Selection) -> Iterator[torch.Tensor]:
    """Views of what is selected of ``x``, in order."""
    if selection.ranges is None:
        yield x
        return
    for start, end in selection.ranges:
        yield x.narrow(selection.axis, start, end - start)


def blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of at most about ``BLOCK`` elements of tensors of one shape, the same of each."""
    first = tensors[0]
    if first.dim() == 0 or first.numel() <= BLOCK:
        yield tensors
        return
    if first.is_contiguous() and all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)
        return
    rows = max(1, BLOCK * first.shape[0] // first.numel())
    yield from zip(*(t.split(rows) for t in tensors), strict=True)


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on a tensor is done in.  ValueError for one that is no number to interpolate."""
    if dtype == torch.float64:
        return dtype
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.float32
    raise ValueError(f"a tensor of {dtype} cannot be interpolated")


def blend_(post: torch.Tensor, pre: torch.Tensor, t: float, selection: Selection) -> torch.Tensor:
    """Write pre + t (post - pre) over the selected part of ``post``; at t = 0 pre's values, bit for bit where dtypes
    agree."""
    if t == 1:
        return post
    for b, a in zip(parts(post, selection), parts(pre, selection), strict=True):
        if t == 0:
            b.copy_(a)
            continue
        if not b.is_floating_point() and torch.equal(a, b):
            continue
        dtype = working(post.dtype)
        for y, x in blocks(b, a):
            _blend_block(y, x, t, dtype)
    return post


def _blend_block(y: torch.Tensor, x: torch.Tensor, t: float, dtype: torch.dtype) -> None:
    start, end = x.to(dtype), y.to(dtype)
    # from the nearer end: where the sum is small beside the step, the step's rounding is what is seen
    near, share = (start, t) if t < 0.5 else (end, t - 1)
    step = end - start
    y.copy_(torch.add(near, step, alpha=share, out=step))
