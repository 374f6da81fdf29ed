r"""Triton block rotation: x is read once, y written once, backward reads x and dy once.  See ``rotation``.

    rotate      x [BM, BT] -> y [BM, BT] = x + x delta [BT, BT], a program for a tile of columns and a share of the rows
    backward    g [BM, BT] -> dx = g + g delta^T, and dr [BT, BT] += x^T g, which stays in registers over the share

A tile of columns is as many whole blocks as fit into a line of memory: delta is then a diagonal of blocks, zero beside
them, whose extra products hide behind the memory.  A block wider than a tile (b > 128; b > 64 in fp32 and on AMD) takes
several tiles; dx then has a launch of its own and x and g are read once a tile.  Shares are a function of the shapes
and are added in order: no atomics.

Operands of two bytes go through the matrix units as they are, with delta in two halves of their dtype, delta = hi + lo:
x is exact, and R good to 16 bits (bf16) or 22 (fp16) of its distance from I.
"""

# mypy: ignore-errors
# Triton's language is not Python to a type checker

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import accumulator, current, precision
from .rotation import check, check_backward

MAKER = "amd" if torch.version.hip else "nvidia" if torch.version.cuda else "other"
#: Programs of a launch of 32 columns where there are rows enough: some waves of any device.
PROGRAMS = 512


@triton.jit
def _delta(DELTA, first, k, c, delta_r, blocks, B: tl.constexpr, PER: tl.constexpr, BACK: tl.constexpr):
    """[BT, BT] of delta, or of its transpose, over PER blocks on a diagonal."""
    block = first + k // B
    same = (k // B)[:, None] == (c // B)[None, :]
    same = same & ((k < PER * B) & (block < blocks))[:, None]
    if BACK:
        inner = (k % B)[:, None] + (c % B)[None, :] * B
    else:
        inner = (k % B)[:, None] * B + (c % B)[None, :]
    return tl.load(DELTA + (block * delta_r)[:, None] + inner, mask=same, other=0.0)


@triton.jit
def _turn(x, delta, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + x delta."""
    if SPLIT:
        hi = delta.to(x.dtype)
        lo = (delta - hi.to(ACC)).to(x.dtype)
        acc = tl.dot(x, hi, acc=acc, out_dtype=ACC)
        acc = tl.dot(x, lo, acc=acc, out_dtype=ACC)
    else:
        acc = tl.dot(x, delta, acc=acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _tile(X, row, col, there, inside, step, EVEN: tl.constexpr):
    """Rows and columns of an operand [BM, BT], 0 outside."""
    at = X + row[:, None] * step + col[None, :]
    if EVEN:
        x = tl.load(at, mask=there[:, None], other=0.0)
    else:
        x = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    return x


@triton.jit
def rotate_kernel(
    X, DELTA, OUT, x_n, rows, width, share, delta_r,
    B: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr, BACK: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of columns of y, or of dx where BACK, for a share of the rows."""
    program = tl.program_id(0)
    first = program // TILES * PER
    lanes = tl.arange(0, BT)
    c = program % TILES * BT + lanes
    col = first * B + c
    inside = (c < PER * B) & (col < width)
    begin = tl.program_id(1).to(tl.int64) * share
    delta = tl.zeros([BT, BT], ACC)
    if TILES == 1:
        delta = _delta(DELTA, first, c, c, delta_r, width // B, B, PER, BACK)
    for start in tl.range(0, tl.minimum(share, rows - begin), BM):
        row = begin + start + tl.arange(0, BM)
        there = row < rows
        x = _tile(X, row, col, there, inside, x_n, EVEN)
        acc = x.to(ACC)
        if TILES == 1:
            acc = _turn(x, delta, acc, SPLIT, PRECISION, ACC)
        else:
            for t in tl.range(0, TILES):
                k = t * BT + lanes
                part = _tile(X, row, first * B + k, there, k < B, x_n, EVEN)
                delta = _delta(DELTA, first, k, c, delta_r, width // B, B, PER, BACK)
                acc = _turn(part, delta, acc, SPLIT, PRECISION, ACC)
        at = OUT + row[:, None] * width + col[None, :]
        if EVEN:
            tl.store(at, acc.to(OUT.dtype.element_ty), mask=there[:, None])
        else:
            tl.store(at, acc.to(OUT.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def backward_kernel(
    X, DY, DELTA, DX, PARTS, x_n, dy_n, rows, width, share, delta_r,
    B: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr, OF_X: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of dR over a share of the rows, and with OF_X (one tile a block) dx of its rows and columns."""
    program = tl.program_id(0)
    first = program // (TILES * TILES) * PER
    lanes = tl.arange(0, BT)
    k = program // TILES % TILES * BT + lanes
    c = program % TILES * BT + lanes
    blocks = width // B
    k_inside = (k < PER * B) & (first * B + k < width)
    c_inside = (c < PER * B) & (first * B + c < width)
    begin = tl.program_id(1).to(tl.int64) * share
    dr = tl.zeros([BT, BT], ACC)
    if OF_X:
        delta = _delta(DELTA, first, c, c, delta_r, blocks, B, PER, True)
    for start in tl.range(0, tl.minimum(share, rows - begin), BM):
        row = begin + start + tl.arange(0, BM)
        there = row < rows
        x = _tile(X, row, first * B + k, there, k_inside, x_n, EVEN)
        g = _tile(DY, row, first * B + c, there, c_inside, dy_n, EVEN)
        dr = tl.dot(tl.trans(x), g, acc=dr, input_precision=PRECISION, out_dtype=ACC)
        if OF_X:
            acc = _turn(g, delta, g.to(ACC), SPLIT, PRECISION, ACC)
            at = DX + row[:, None] * width + (first * B + c)[None, :]
            if EVEN:
                tl.store(at, acc.to(DX.dtype.element_ty), mask=there[:, None])
            else:
                tl.store(at, acc.to(DX.dtype.element_ty), mask=there[:, None] & c_inside[None, :])
    block = tl.program_id(1).to(tl.int64) * blocks + first + k // B
    at = PARTS + (block * B * B + (k % B) * B)[:, None] + (c % B)[None, :]
    same = (k // B)[:, None] == (c // B)[None, :]
    tl.store(at, dr, mask=same & k_inside[:, None] & c_inside[None, :])


@dataclass(frozen=True)
class Shape:
    """Tiles of a launch, by dtype, b and maker alone: what compiles without a spill."""

    BM: int
    BT: int
    warps: int
    PER: int
    TILES: int

    @classmethod
    def of(cls, dtype: torch.dtype, b: int, *, backward: bool = False, maker: str = MAKER) -> Shape:
        bm, bt, warps = tiles(dtype, b, backward, maker)
        return cls(bm, bt, warps, max(1, bt // b), triton.cdiv(b, bt))

    def constants(self, dtype: torch.dtype, b: int, width: int) -> dict:
        """Compile-time arguments that both kernels take."""
        even = self.PER * b == self.BT * self.TILES and width % (self.PER * b) == 0
        acc = tl.float64 if accumulator(dtype) == torch.float64 else tl.float32
        return {
            "B": b, "PER": self.PER, "TILES": self.TILES, "EVEN": even, "BM": self.BM, "BT": self.BT,
            "SPLIT": dtype.itemsize == 2, "PRECISION": precision(dtype), "ACC": acc,
        }  # fmt: skip

    def grid(self, rows: int, blocks: int, squared: bool = False) -> tuple[tuple[int, int], int]:
        """(programs, shares), and the rows of a share."""
        programs = triton.cdiv(blocks, self.PER) * self.TILES ** (2 if squared else 1)
        shares = max(1, min(triton.cdiv(rows, 4 * self.BM), triton.cdiv(PROGRAMS * 32 // self.BT, programs)))
        share = triton.cdiv(triton.cdiv(rows, shares), self.BM) * self.BM
        return (programs, triton.cdiv(rows, share)), share


def tiles(dtype: torch.dtype, b: int, backward: bool, maker: str) -> tuple[int, int, int]:
    """BM, BT and warps."""
    if dtype.itemsize <= 2:
        if b <= 64 or maker == "amd":
            return 64, 64, 4
        return (32 if backward else 64), 128, 8
    if dtype.itemsize == 4:
        return (32 if backward else 64, 32, 4) if b <= 32 else (32, 64, 8)
    return 32, 32, 4


def options(shape: Shape, maker: str = MAKER) -> dict[str, int]:
    """Of a launch; without the bound ptxas spills a little to make room for blocks that do not come."""
    found = {"num_warps": shape.warps} | ({"maxnreg": 255} if maker == "nvidia" else {})
    # delta's halves are 64 KiB of shared memory there: a third stage of x would not fit beside them on every device
    return found | ({"num_stages": 2} if shape.BT == 128 else {})


def _step(delta: torch.Tensor) -> int:
    return delta.stride(0) if len(delta) > 1 else 0


def forward(x, delta):
    """y (N, d) in x's dtype; see the contract."""
    check(x, delta)
    return _rotate(x, delta, back=False)


def _rotate(x, delta, *, back: bool):
    (n, d), b = x.shape, delta.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        shape = Shape.of(x.dtype, b)
        grid, share = shape.grid(n, d // b)
        with current(x.device):
            rotate_kernel[grid](
                x, delta, out, x_n=x.stride(0), rows=n, width=d, share=share, delta_r=_step(delta), BACK=back,
                **shape.constants(x.dtype, b, d), **options(shape),
            )  # fmt: skip
    return out


def backward(x, delta, dy, *, wanted: tuple[bool, bool]):
    """dx in x's dtype and dR in delta's, None where not wanted; see the contract."""
    check_backward(x, delta, dy)
    (n, d), b = x.shape, delta.shape[1]
    shape = Shape.of(x.dtype, b, backward=True)
    fused = wanted[0] and wanted[1] and shape.TILES == 1
    dx = _rotate(dy, delta, back=True) if wanted[0] and not fused else None
    if not wanted[1]:
        return dx, None
    if fused:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros_like(delta)
    blocks = d // b
    grid, share = shape.grid(n, blocks, squared=True)
    parts = torch.empty(grid[1], blocks, b, b, dtype=delta.dtype, device=x.device)
    with current(x.device):
        backward_kernel[grid](
            x, dy, delta, dx if fused else parts, parts, x_n=x.stride(0), dy_n=dy.stride(0), rows=n, width=d,
            share=share, delta_r=_step(delta), OF_X=fused, **shape.constants(x.dtype, b, d), **options(shape),
        )  # fmt: skip
    return dx, parts.sum(0) if len(delta) == blocks else parts.sum((0, 1))[None]
