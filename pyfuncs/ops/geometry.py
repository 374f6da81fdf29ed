"""How many tokens a chunk holds: a pure function of shapes, dtypes, device type and a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.contract import COEF, STATE
from ..kernels.launch import accumulator
from ..kernels.rows_torch import scratch_bytes
from . import gemm

#: Tokens a chunk has when the caller gives no budget.  dW is read and written once a chunk, 8 bytes for 2 C FLOPs of
#: its product: at C = 256 that is 64 FLOPs a byte, at 1024 on a GPU 256.
DEFAULT_ROWS = {"cpu": 256}
DEFAULT_ROWS_GPU = 1024
#: On a CPU a low-precision weight is cast up or packed twice a chunk: there chunks grow with the rows, as far as this.
MOST_LOW_ROWS = 1024

#: Packed operands and parts of results that the host's products hold for a moment: two MiB a thread, of eight threads.
PACKED_BYTES = 16 << 20
#: And for each number of a hidden state: two packed parts of a head, of 512 rows, and eight threads' 128 rows of dW.
PACKED_WIDTH = 2 * 512 * 2 + 8 * 128 * 4


@dataclass(frozen=True)
class Geometry:
    """``rows`` tokens a chunk; ``budget`` bytes of scratch = ``fixed`` + rows * ``per_row``."""

    rows: int
    per_row: int
    fixed: int
    budget: int


def whole_columns(vocabulary: int) -> int:
    """Columns of a tile for this vocabulary: the next multiple of 16."""
    return -(-vocabulary // 16) * 16


def default_rows(rows: int, mode: str, device: str, *, teacher: bool = False) -> int:
    """Tokens a chunk without a budget; ``mode`` is ``gemm.mode``'s, ``teacher``: whether its logits have a tile too."""
    default = DEFAULT_ROWS.get(device, DEFAULT_ROWS_GPU)
    if mode == "native" or (mode == "mixed" and device != "cpu"):
        return default
    # a part of the logits that exist otherwise: tiles are fp32, and products of bf16 alone fast enough to feel a chunk
    part = 2 if mode == "mixed" and not teacher else 4
    return max(default, min(rows // part, MOST_LOW_ROWS))


def chunks(
    *, rows: int, vocabulary: int, hidden: int, teacher_hidden: int = 0, weight_dtype: torch.dtype,
    compute_dtype: torch.dtype, device: torch.device, teacher: str = "", weight_grad: bool = True,
    bias_grad: bool = False, hidden_grad: bool = True, ids: int = 0, inputs: int = 0, backend: str = "torch",
    budget: int | None = None, teacher_itemsize: int = 4,
) -> Geometry:  # fmt: skip
    """Chunk geometry of ``linear_loss``.  ValueError if the budget does not hold one row.

    Scratch, beside inputs, outputs and gradients: a chunk holds its logits (V, accumulator dtype), the
    gradient in the operands' dtype where that differs, the teacher's logits, and copies of its rows of hidden;
    fixed are the fp32 accumulators of dW and dX where weight and hidden are narrower, a cast slab or copy of the
    weight, the torch twin's blocks (the host's lie on its threads' stacks), and a few numbers a row.  ``ids``: K of
    a top-K teacher and of the op's ids; ``inputs``: how many the objective has of its own.
    """
    acc = accumulator(compute_dtype)
    size, low = acc.itemsize, compute_dtype.itemsize
    mode = gemm.mode(weight_dtype, compute_dtype, device, acc, backend)
    width = vocabulary if teacher == "logits" else whole_columns(vocabulary)
    per_row = width * size
    if mode == "mixed" and backend != "host":
        per_row += width * low
    if teacher in ("hidden", "topk"):
        per_row += width * size
    elif teacher == "logits":
        per_row += vocabulary * teacher_itemsize
    # hidden: gathered, cast, and its gradient; statistics: state, coefficients, leaves and their gradients
    per_row += 3 * (hidden + teacher_hidden) * size + (2 * len(STATE) + 3 * len(COEF) + 64) * 8
    per_row += 96 * ids
    fixed = (64 + 3 * size * inputs) * rows + (1 << 20)
    if hidden_grad and compute_dtype != acc:
        fixed += rows * hidden * size
    if mode == "mixed" and backend == "host":
        fixed += PACKED_BYTES
    if mode == "upcast":
        fixed += 2 * gemm.SLAB_BYTES
    if mode == "mixed" and weight_dtype != compute_dtype:
        fixed += vocabulary * hidden * low
    if weight_grad and weight_dtype != acc:
        fixed += vocabulary * hidden * size
    if bias_grad:
        fixed += 2 * vocabulary * size
    # a top-K teacher is made dense with the twin's blocks on the host too
    if backend == "torch" or (backend == "host" and teacher == "topk"):
        fixed += scratch_bytes(vocabulary, size)
    if budget is None:
        budget = fixed + per_row * min(
            default_rows(rows, mode, device.type, teacher=teacher in ("hidden", "topk")), max(rows, 1)
        )
    count = (budget - fixed) // per_row
    if count < 1:
        raise ValueError(f"budget must be at least {fixed + per_row} bytes for these shapes; got {budget}")
    return Geometry(rows=min(count, max(rows, 1)), per_row=per_row, fixed=fixed, budget=budget)


#: Vocabulary-outer order.  Rows of a product: fixed, so that a row's logits do not depend on how many rows there are
#: (a vendor's library may choose another kernel, and another order of summation, for another size).
PRODUCT_ROWS, PRODUCT_ROWS_GPU = {"cpu": 256}, 1024
#: Rows of a tile, and vocabulary entries of a slab, without a budget: the logits of a slab stay in a CPU's cache;
#: on a GPU they fill it, and dX, read and written once a slab, costs little beside the slab's products.
TILE_ROWS, TILE_ROWS_GPU = {"cpu": 1024}, 8192
SLAB, SLAB_GPU = {"cpu": 2048}, 8192


@dataclass(frozen=True)
class SlabGeometry:
    """``columns`` vocabulary entries a slab, ``rows`` rows a tile, ``product`` rows a product; bytes of scratch."""

    columns: int
    rows: int
    product: int
    budget: int


def slabs(
    *, rows: int, vocabulary: int, hidden: int, teacher_hidden: int = 0, weight_dtype: torch.dtype,
    compute_dtype: torch.dtype, device: torch.device, teacher: str = "", ids: int = 0, backend: str = "torch",
    budget: int | None = None, extra_tiles: int = 0,
) -> SlabGeometry:  # fmt: skip
    """Geometry of the vocabulary-outer order.  ValueError if the budget does not hold one row and one entry.

    Without a budget slabs, tiles and products are the same for any number of rows: a row's statistics are then
    bit-equal whatever other rows there are.  Scratch, beside inputs, outputs and gradients: a tile of logits (and of
    the teacher's, and of dz in the operands' dtype where that differs, and ``extra_tiles``), the slab of the heads
    cast, the slab of dW in the accumulator's dtype, the torch twin's blocks, and of each row its statistics,
    coefficients, and copies of its hidden state and of its gradient.
    """
    acc = accumulator(compute_dtype)
    size = acc.itemsize
    mode = gemm.mode(weight_dtype, compute_dtype, device, acc, backend)
    tiles = size * (1 + (teacher in ("hidden", "topk")) + extra_tiles)
    if mode == "mixed":
        tiles += compute_dtype.itemsize
    fixed = 1 << 20
    if mode == "mixed" and backend == "host":
        fixed = PACKED_BYTES + PACKED_WIDTH * (hidden + teacher_hidden)
    fixed += rows * (3 * hidden * size + (3 * len(STATE) + 4 * len(COEF) + 64) * 8 + 96 * ids)
    twin = backend == "torch" or (backend == "host" and teacher == "topk")

    def cost(r: int, v: int) -> int:
        per_row = v * tiles + 2 * (hidden + teacher_hidden) * size
        return fixed + r * per_row + v * 3 * (hidden + teacher_hidden) * size + (scratch_bytes(v, size) if twin else 0)

    product = PRODUCT_ROWS.get(device.type, PRODUCT_ROWS_GPU)
    r = min(TILE_ROWS.get(device.type, TILE_ROWS_GPU), -(-max(rows, 1) // product) * product)
    v = min(SLAB.get(device.type, SLAB_GPU), max(vocabulary, 1))
    if budget is None:
        return SlabGeometry(v, r, product, cost(r, v))
    while cost(r, v) > budget:
        if r > product:  # whole products
            r = -(-r // 2 // product) * product
        elif r > 64 or (v == 1 and r > 1):
            r = product = (r + 1) // 2
        elif v > 1:
            v = (v + 1) // 2
        else:
            raise ValueError(f"budget must be at least {cost(1, 1)} bytes for these shapes; got {budget}")
    return SlabGeometry(v, r, product, budget)
