r"""A head with a low-rank adapter: logits and gradients without the base's gradient, which is never formed.

    LoRA (arXiv 2106.09685)   z = x W^T + s (x A^T) B^T
    DoRA (arXiv 2402.09353)   z = g * (x W^T + s (x A^T) B^T),  g_k = m_k / ||W_k + s B_k A||

With u = s x A^T these are two products with the same dz: dX gets dz W, du = dz B is (N, r), dB = dz^T u is (V, r).
DoRA's norm is a constant in backward (section 4.3 of its paper), so dm_k = (sum_n dz_nk raw_nk) / ||.||.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.launch import accumulator
from . import geometry
from .core import without_autocast
from .gemm import SLAB_BYTES
from .inputs import check_float


@dataclass(frozen=True, eq=False)
class LoRAHead:
    """An LM head W + scaling B A, given to ``linear_loss`` or ``linear_stats`` in the place of ``weight``.

    Args:
        weight: (V, H), the base; frozen, as a rule: its gradient is then never formed.
        a: (r, H).  b: (V, r).
        scaling: s, usually lora_alpha / r.
        magnitude: (V,), DoRA's m, or None.
        dropout: probability with which the adapter's input is dropped (not with a magnitude).

    Each tensor gets a gradient where it requires one; that of a frozen W, V H numbers, is never formed.
    Raises ValueError or TypeError that names the argument and what it got.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scaling: float = 1.0
    magnitude: Tensor | None = None
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("weight", "a", "b"):
            check_float(f"LoRAHead: {name}", getattr(self, name))
        if self.weight.ndim != 2 or self.a.ndim != 2:
            raise ValueError(
                f"LoRAHead: weight must be (V, H) and a (r, H); got {tuple(self.weight.shape)}, {tuple(self.a.shape)}"
            )
        (v, h), r = self.weight.shape, self.a.shape[0]
        if tuple(self.a.shape) != (r, h) or tuple(self.b.shape) != (v, r):
            raise ValueError(
                f"LoRAHead: a must be (r, {h}) and b ({v}, r); got {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )
        for name in ("a", "b", "magnitude"):
            value = getattr(self, name)
            if value is not None and value.device != self.weight.device:
                raise ValueError(f"LoRAHead: {name} must be on {self.weight.device}, as weight is; got {value.device}")
        if self.magnitude is not None:
            check_float("LoRAHead: magnitude", self.magnitude)
            if self.magnitude.shape != (v,):
                raise ValueError(f"LoRAHead: magnitude must be ({v},); got {tuple(self.magnitude.shape)}")
        if not 0.0 <= self.dropout < 1.0 or (self.dropout and self.magnitude is not None):
            raise ValueError(f"LoRAHead: dropout must lie in [0, 1), and be 0 with a magnitude; got {self.dropout}")

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @without_autocast
    def low_rank(self, hidden: Tensor) -> Tensor:
        """u = s x A^T (N, r), in the accumulator's dtype; differentiable in hidden and A.

        In products of one size: a row's u does not depend on the other rows.
        """
        dtype, n = accumulator(hidden.dtype), hidden.shape[0]
        x = torch.nn.functional.dropout(hidden, self.dropout) if self.dropout else hidden
        size = geometry.PRODUCT_ROWS.get(hidden.device.type, geometry.PRODUCT_ROWS_GPU)
        padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, -n % size))
        a = self.a.to(dtype).t()
        return torch.cat([part @ a for part in padded.split(size)])[:n] * self.scaling

    @without_autocast
    def column_scale(self) -> Tensor | None:
        """g = m / ||W + s B A|| (V,), differentiable in m alone; row blocks, so that W + s B A is never whole.

        Its scratch, three blocks of ``SLAB_BYTES``, is gone before the op's own begins; 2 V H r FLOPs.
        """
        if self.magnitude is None:
            return None
        dtype = accumulator(self.weight.dtype)
        with torch.no_grad():
            a = self.a.to(dtype) * self.scaling
            step = max(1, SLAB_BYTES // (dtype.itemsize * max(1, self.weight.shape[1])))
            norms = [
                (w.to(dtype) + b.to(dtype) @ a).norm(dim=1)
                for w, b in zip(self.weight.split(step), self.b.split(step), strict=True)
            ]
        return self.magnitude.to(dtype) / torch.cat(norms)
