"""The three matrix products of a head, with accumulation in fp32 whatever the operands' dtype.

Large products belong to the vendor's library.  What differs by device is how its accumulator is
reached: fp32 and fp64 operands have it anyway; CUDA writes fp32 from low-precision operands
(``out_dtype``); elsewhere a slab of the weight is cast up, which costs V H reads and is exact, since a
product of two bf16 numbers fits in fp32.
"""

from __future__ import annotations

import torch

#: Bytes of the fp32 copy of a weight slab on devices without a mixed-precision product.
SLAB_BYTES = 16 << 20


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 operands, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mode(weight_dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> str:
    """How logits of ``dtype`` are made.

    "native": the operands have that dtype; "mixed": fp32 out of low-precision products; "upcast": slabs cast up.
    """
    if weight_dtype == compute_dtype == dtype:
        return "native"
    low = compute_dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    return "mixed" if device.type == "cuda" and low else "upcast"


def teacher_head(teacher: list[torch.Tensor], dtype: torch.dtype) -> Head:
    """The head of a teacher given by hidden states, for logits of ``dtype``; its own precision is kept."""
    own = teacher[1].dtype
    return Head(teacher[1], teacher[2] if len(teacher) > 2 else None, own if own.itemsize < 4 else dtype, dtype)


class Head:
    """z = x W^T + b and its two transposes.  weight (V, H), bias (V,) or None."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, compute_dtype: torch.dtype, dtype: torch.dtype
    ):  # fmt: skip
        """``dtype`` of logits and accumulators; ``compute_dtype`` of the operands where products of it make that."""
        self.dtype = dtype
        self.mode = mode(weight.dtype, compute_dtype, weight.device, dtype)
        self.weight = weight.to(compute_dtype) if self.mode == "mixed" else weight
        self.bias = bias
        self.operand = compute_dtype if self.mode == "mixed" else self.dtype
        rows = max(64, SLAB_BYTES // max(1, dtype.itemsize * weight.shape[1]))
        size = weight.shape[0] if self.mode != "upcast" else rows
        self.slabs = [slice(v, min(v + size, weight.shape[0])) for v in range(0, weight.shape[0], max(1, size))]

    def project(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits into out (n, V) of the accumulator's dtype; x (n, H) in ``operand`` dtype."""
        if self.mode == "mixed":
            torch.mm(x, self.weight.t(), out_dtype=self.dtype, out=out)
        else:
            for slab in self.slabs:
                torch.mm(x, self.weight[slab].to(self.dtype).t(), out=out[:, slab])
        return out if self.bias is None else out.add_(self.bias.to(self.dtype))

    def input_grad(self, dz: torch.Tensor) -> torch.Tensor:
        """dz W, (n, H) in the accumulator's dtype."""
        if self.mode == "mixed":
            return torch.mm(dz, self.weight, out_dtype=self.dtype)
        out = dz.new_zeros(dz.shape[0], self.weight.shape[1])
        for slab in self.slabs:
            torch.addmm(out, dz[:, slab], self.weight[slab].to(self.dtype), out=out)
        return out

    def weight_grad(self, dz: torch.Tensor, x: torch.Tensor, into: torch.Tensor, *, first: bool) -> None:
        """into (V, H) += dz^T x, or = on the first call."""
        if first and self.mode == "mixed":
            torch.mm(dz.t(), x, out_dtype=self.dtype, out=into)
        elif first:
            torch.mm(dz.t(), x, out=into)
        elif self.mode == "mixed":
            torch.addmm(into, dz.t(), x, out_dtype=self.dtype, out=into)
        else:
            torch.addmm(into, dz.t(), x, out=into)
