"""The three matrix products of a head, with accumulation in fp32 whatever the operands' dtype.

Large products belong to the vendor's library.  What differs by device is how its accumulator is
reached: fp32 and fp64 operands have it anyway; CUDA writes fp32 from low-precision operands
(``out_dtype``), and so do this library's own products on CPUs with tile registers (AMX), where torch has none;
elsewhere a slab of the weight is cast up, which costs V H reads and is exact, since a product of two bf16
numbers fits in fp32.
"""

from __future__ import annotations

import torch

from ..kernels import gemm_host

#: Bytes of the copy of a weight slab in the accumulator's dtype, on devices without a mixed-precision product.
SLAB_BYTES = 4 << 20


def mode(
    weight_dtype: torch.dtype, compute_dtype: torch.dtype, device: torch.device, dtype: torch.dtype, backend: str
) -> str:  # fmt: skip
    """How logits of ``dtype`` are made; ``backend`` is resolved.

    "native": the operands have that dtype; "mixed": fp32 out of low-precision products; "upcast": slabs cast up.
    """
    if weight_dtype == compute_dtype == dtype:
        return "native"
    low = compute_dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    if backend == "host" and low and weight_dtype == compute_dtype == torch.bfloat16 and gemm_host.supported():
        return "mixed"
    return "mixed" if device.type == "cuda" and low else "upcast"


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """out = a b, or += with ``add``; in out's dtype; where the operands' is another, what ``mode`` calls mixed."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cpu" and gemm_host.supported():
        gemm_host.product(a, b, out, add=add)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def teacher_head(teacher: list[torch.Tensor], dtype: torch.dtype, backend: str) -> Head:
    """The head of a teacher given by hidden states, for logits of ``dtype``; its own precision is kept."""
    own = teacher[1].dtype
    bias = teacher[2] if len(teacher) > 2 else None
    return Head(teacher[1], bias, own if own.itemsize < 4 else dtype, dtype, backend)


class Head:
    """z = x W^T + b and its two transposes.  weight (V, H), bias (V,) or None."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, compute_dtype: torch.dtype, dtype: torch.dtype,
        backend: str,
    ):  # fmt: skip
        """``dtype`` of logits and accumulators; ``compute_dtype`` of the operands where products of it make that."""
        self.dtype = dtype
        self.mode = mode(weight.dtype, compute_dtype, weight.device, dtype, backend)
        self.weight = weight.to(compute_dtype) if self.mode == "mixed" else weight
        self.bias = bias
        self.operand = compute_dtype if self.mode == "mixed" else self.dtype
        v, h = weight.shape
        rows = max(v, 1)
        if self.mode == "upcast":
            rows = max(64, SLAB_BYTES // max(1, dtype.itemsize * h))
            self._cast = torch.empty(min(rows, v), h, dtype=dtype, device=weight.device)
        self.slabs = [slice(r, min(r + rows, v)) for r in range(0, v, rows)]

    def _rows(self, slab: slice) -> torch.Tensor:
        """The head's rows of a slab in ``operand`` dtype; what an earlier call returned may be written over."""
        if self.mode != "upcast":
            return self.weight[slab]
        return self._cast[: slab.stop - slab.start].copy_(self.weight[slab])

    def project(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits into out (n, V) of the accumulator's dtype; x (n, H) in ``operand`` dtype."""
        for slab in self.slabs:
            product(x, self._rows(slab).t(), out[:, slab])
        return out if self.bias is None else out.add_(self.bias.to(self.dtype))

    def input_grad(self, dz: torch.Tensor) -> torch.Tensor:
        """dz W, (n, H) in the accumulator's dtype."""
        make = torch.empty if self.slabs else torch.zeros
        out = make(dz.shape[0], self.weight.shape[1], dtype=self.dtype, device=dz.device)
        for i, slab in enumerate(self.slabs):
            product(dz[:, slab], self._rows(slab), out, add=i > 0)
        return out

    def weight_grad(self, dz: torch.Tensor, x: torch.Tensor, into: torch.Tensor, *, first: bool) -> None:
        """into (V, H) += dz^T x, or = on the first call."""
        product(dz.t(), x, into, add=not first)
