"""What launches of every kind of kernel share: the dtype of sums, the precision of products, strides, the device."""

from __future__ import annotations

import contextlib
import math

import torch

LOG2E = 1 / math.log(2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 operands, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """Of products in fp32: TF32 where torch's own may use it."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors': within this it is."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def strides(x: torch.Tensor, dims: str, prefix: str) -> dict[str, int]:
    """Strides of an operand by name; 0 along a dimension of one element, which may stand for many."""
    return {f"{prefix}_{n}": x.stride(i) if x.shape[i] > 1 else 0 for i, n in enumerate(dims)}
