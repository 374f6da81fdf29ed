r"""Weight gradients of a row range alone: the maths under ``burnish.chunkft``.

    linear      y = x W^T         dW[a:b] = G[:, a:b]^T x            x (M, in), G = dL/dy (M, out), W (out, in)
    transposed  y = x W           dW[a:b] = x[:, a:b]^T G            GPT-2's Conv1D: W (in, out)
    embedding   y = W[tokens]     dW[r] = sum_{m: tokens_m = r} G_m  for a <= r < b
    any other use of W            dW[a:b] = (dL/dW)[a:b]             the dense gradient lives for a moment

The layer's own forward computes y from the frozen W, as it would without us; ``attach_*`` then returns y with one more
edge, to the slice.  So y and dL/dx are those of the plain layer to the bit, autocast is torch's own, and x is saved
only for a layer that has active rows.  A slice's gradient is accumulated in fp32 (fp64 for fp64) and given to it in
its ``grad_dtype``.

``room(shape, dtype, device)`` lends the memory that a gradient is written to, uninitialised: ``torch.empty``, or a
view into a flat buffer.  Source: ChunkFT, arXiv 2605.21177, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels import dispatch
from ..kernels.launch import accumulator
from .core import refuse_second_derivative
from .gemm import product

#: (shape, dtype, device) -> an uninitialised tensor
Room = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


#: Rows by which the CPU's products are cut: within such blocks the vendor's library treats a row alike whatever rows
#: stand beside it, so that a slice's gradient is the dense one to the bit; at other cuts one in three is not.  16 do
#: with AVX2; with AVX-512 a long sum over tokens into few columns needs whole blocks of 32 and of 48.
PRODUCT_ROWS = 96


def _rows_product(a: Tensor, start: int, stop: int, b: Tensor, room: Room) -> Tensor:
    """a[:, start:stop]^T b of a (M, p) and b (M, q), accumulated in fp32 whatever their dtype."""
    dtype = accumulator(b.dtype)
    out = room((stop - start, b.shape[1]), dtype, b.device)
    if b.device.type == "cuda":
        product(a[:, start:stop].t(), b, out)
        return out
    step, end = PRODUCT_ROWS, a.shape[1]
    base = start // step * step
    a, b = a[:, base : min(-(-stop // step) * step, end)].to(dtype), b.to(dtype)
    # whole blocks in one product, which may end where the dense one ends; a ragged edge in a block of its own
    first = min(-(-start // step) * step, stop)
    last = stop if stop == end else max(first, stop // step * step)
    for lo, hi in ((start, first), (first, last), (last, stop)):
        if lo == hi:
            continue
        aligned = lo == start or b.shape[1] % 4 == 0  # the library looks at the addresses it writes to as well
        if (lo, hi) == (first, last) and aligned:
            product(a[:, lo - base : hi - base].t(), b, out[lo - start : hi - start])
        else:
            block = lo // step * step
            rows = torch.mm(a[:, block - base : -(-hi // step) * step - base].t(), b)
            out[lo - start : hi - start] = rows[lo - block : hi - block]
    return out


def _alias(y: Tensor) -> Tensor:
    """y's memory as a tensor that autograd takes for a new one: what follows may write to it in place, as to y."""
    return torch.ops.aten._unsafe_view(y, y.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, leaf: Tensor, start: int, stop: int, transposed: bool, room: Room):
        ctx.save_for_backward(x)
        ctx.start, ctx.stop, ctx.transposed, ctx.room = start, stop, transposed, room
        return _alias(y)

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[2]:
            rows, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            if ctx.transposed:
                grad = _rows_product(x, ctx.start, ctx.stop, rows, ctx.room)
            else:
                grad = _rows_product(rows, ctx.start, ctx.stop, x, ctx.room)
        return g if ctx.needs_input_grad[0] else None, None, grad, None, None, None, None


def attach_linear(
    y: Tensor, x: Tensor, leaf: Tensor, start: int, *, transposed: bool = False, room: Room = empty
) -> Tensor:  # fmt: skip
    """y = layer(x), (..., out), such that ``leaf``, rows [start, start + len(leaf)) of its weight, gets its gradient.

    x (..., in), any number of dimensions; saved in y's dtype, in which autocast multiplied it.
    """
    x = x.detach().to(y.dtype)
    return _Linear.apply(y, x, leaf, start, start + leaf.shape[0], transposed, room)


def _segment_sum(rows: Tensor, tokens: Tensor, start: int, stop: int, padding_idx: int | None, out: Tensor) -> Tensor:
    kernels = dispatch.segment_sum(dispatch.resolve("auto", rows.device))
    kernels.segment_sum(rows, tokens, start, stop, padding_idx, out)
    return out


@torch.library.custom_op("burnish::segment_sum", mutates_args=())
def _segment_sum_op(rows: Tensor, tokens: Tensor, start: int, stop: int, padding_idx: int | None) -> Tensor:
    out = empty((stop - start, rows.shape[1]), accumulator(rows.dtype), rows.device)
    return _segment_sum(rows, tokens, start, stop, padding_idx, out)


@_segment_sum_op.register_fake
def _(rows, tokens, start, stop, padding_idx):
    return rows.new_empty((stop - start, rows.shape[1]), dtype=accumulator(rows.dtype))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, tokens: Tensor, leaf: Tensor, start: int, stop: int, padding_idx, room: Room):
        ctx.save_for_backward(tokens)
        ctx.start, ctx.stop, ctx.padding_idx, ctx.room = start, stop, padding_idx, room
        return _alias(y)

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, g):
        (tokens,) = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[2]:
            rows, tokens = g.reshape(-1, g.shape[-1]), tokens.reshape(-1).to(torch.int64)
            rows = rows if rows.stride(1) == 1 else rows.contiguous()  # an expanded gradient
            if torch.compiler.is_compiling() or isinstance(g, FakeTensor):
                grad = _segment_sum_op(rows, tokens, ctx.start, ctx.stop, ctx.padding_idx)
            else:
                out = ctx.room((ctx.stop - ctx.start, rows.shape[1]), accumulator(g.dtype), g.device)
                grad = _segment_sum(rows, tokens, ctx.start, ctx.stop, ctx.padding_idx, out)
        return g if ctx.needs_input_grad[0] else None, None, grad, None, None, None, None


def attach_embedding(
    y: Tensor, tokens: Tensor, leaf: Tensor, start: int, *, padding_idx: int | None = None, room: Room = empty
) -> Tensor:  # fmt: skip
    """y = W[tokens], (..., D), such that ``leaf`` = W[start:start + len(leaf)] gets its gradient.

    Summed in the order of the tokens, without atomics; the row ``padding_idx`` of W gets none.
    """
    return _Embedding.apply(y, tokens, leaf, start, start + leaf.shape[0], padding_idx, room)


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf: Tensor, weight: Tensor, start: int):
        ctx.start, ctx.stop = start, start + leaf.shape[0]
        return weight.detach()

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, g):
        # a copy where rows are left out: a view would keep the dense gradient alive
        whole = ctx.stop - ctx.start == g.shape[0]
        return g if whole else g[ctx.start : ctx.stop].clone(), None, None


def assemble(leaf: Tensor, weight: Tensor, start: int) -> Tensor:
    """The weight, whose rows [start, start + len(leaf)) are ``leaf``'s memory, as a function of ``leaf``.

    For any use of a weight: its dense gradient is formed, and let go of once ``leaf`` has its rows.
    """
    return _Assemble.apply(leaf, weight, start)
