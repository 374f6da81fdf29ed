"""bfloat16 in the Triton interpreter, as a GPU computes it.

The interpreter keeps bf16 as uint16: arithmetic on it is integer arithmetic, its dot is garbage, and its
fp32 -> bf16 cast truncates where hardware rounds to nearest, ties to even.  ``install`` wraps four methods of
its builder: bf16 operands become fp32, the operation runs, and a bf16 result is rounded.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> the same numbers in fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Numbers -> bf16 bits (uint16), round to nearest even; NaN stays NaN, overflow is inf."""
    x = np.asarray(x).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # half of the dropped part, less one if the rest is even
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Wrap ``InterpreterBuilder``; a second call changes nothing."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "_burnish_bf16"):
        return
    builder._burnish_bf16 = True
    real = {n: getattr(builder, n) for n in ("cast_impl", "create_fp_to_fp", "binary_op", "create_dot")}

    def bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def up(x):
        return handle(to_fp32(x.data), tl.float32) if bf16(x) else x

    def cast(self, src, dst_type, *rest, name):
        to = dst_type.scalar
        if not bf16(src) and to != tl.bfloat16:
            return real[name](self, src, dst_type, *rest)
        # `rest` holds the rounding mode: towards zero keeps the interpreter's truncation
        if rest and rest[0] is not None and "RTZ" in str(rest[0]):
            return real[name](self, src, dst_type, *rest)
        data = up(src).data
        return handle(to_bf16(data), to) if to == tl.bfloat16 else real["cast_impl"](self, handle(data, tl.float32), to)

    def binary_op(self, lhs, rhs, op):
        bitwise = op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
        if bitwise or not (bf16(lhs) and bf16(rhs)):
            return real["binary_op"](self, lhs, rhs, op)
        out = op(to_fp32(lhs.data), to_fp32(rhs.data))
        return handle(out, tl.int1) if out.dtype == bool else handle(to_bf16(out), tl.bfloat16)

    def create_dot(self, a, b, d, *rest):
        return real["create_dot"](self, up(a), up(b), d, *rest)

    builder.cast_impl = lambda self, src, to: cast(self, src, to, name="cast_impl")
    builder.create_fp_to_fp = lambda self, src, to, mode: cast(self, src, to, mode, name="create_fp_to_fp")
    builder.binary_op = binary_op
    builder.create_dot = create_dot
    if not hasattr(builder, "get_bf16"):  # a bf16 constant
        builder.get_bf16 = lambda self, value: handle(to_bf16(np.array([value])), tl.bfloat16)
