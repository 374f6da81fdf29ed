"""Which implementation of the row kernels serves a tensor.

``auto`` follows the device: Triton on CUDA, ROCm and XPU, the torch twin elsewhere.  A backend that
is asked for by name never falls back; ``auto`` falls back with one warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "torch")
GPU_DEVICES = ("cuda", "xpu")

_warned = False


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that will run: "triton" or "torch".

    Raises ValueError for an unknown name, and RuntimeError where a named backend cannot run.
    """
    global _warned
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "torch":
        return backend
    if backend == "triton":
        if not triton_installed():
            raise RuntimeError("backend='triton' was asked for, but triton is not installed")
        if device.type not in GPU_DEVICES and not _interpreted():
            raise RuntimeError(f"backend='triton' needs tensors on a GPU; got device {device}")
        return backend
    if device.type in GPU_DEVICES:
        if triton_installed():
            return "triton"
        if not _warned:
            _warned = True
            warnings.warn("triton is not installed: burnish runs its torch twin on this GPU", stacklevel=3)
    return "torch"


def rows(backend: str) -> ModuleType:
    """The module with ``fold``, ``fold_jsd`` and ``grad`` for a resolved backend."""
    return importlib.import_module(f".rows_{backend}", __package__)
