"""Which implementation of the kernels serves a tensor.

``auto`` follows the device: Triton on CUDA, ROCm and XPU, C++ on the CPU (built at first use), the torch
twin elsewhere.  A backend that is asked for by name never falls back; ``auto`` falls back with one warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "triton", "host", "torch")
GPU_DEVICES = ("cuda", "xpu")

_warned: set[str] = set()


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def resolve(backend: str, device: torch.device, *, build: bool = True) -> str:
    """The name of the backend that will run: "triton", "host" or "torch".

    Without ``build`` nothing is compiled or warned of: the answer is then what may be expected.
    Raises ValueError for an unknown name, and RuntimeError where a named backend cannot run.
    """
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
    if backend == "host":
        if device.type != "cpu":
            raise RuntimeError(f"backend='host' needs tensors on the CPU; got device {device}")
        if build:
            _host().library()
        return backend
    if device.type in GPU_DEVICES:
        if triton_installed():
            return "triton"
        if build:
            _warn_once("triton is not installed: burnish runs its torch twin on this GPU")
    elif device.type == "cpu":
        if not build:
            return "torch" if _host().obstacle() else "host"
        try:
            _host().library()
        except RuntimeError as error:
            _warn_once(f"burnish runs its torch twin, slower and as exact: {error}")
        else:
            return "host"
    return "torch"


def _host() -> ModuleType:
    return importlib.import_module(".host_build", __package__)


def module(kind: str, backend: str) -> ModuleType:
    """The module that implements a kind of kernel ("rows", "adamw", ...) for a resolved backend."""
    return importlib.import_module(f".{kind}_{backend}", __package__)


def rows(backend: str) -> ModuleType:
    """The module with ``fold``, ``fold_jsd`` and ``grad`` for a resolved backend."""
    return module("rows", backend)


def adamw(backend: str) -> ModuleType:
    """The module with ``adamw`` for a resolved backend."""
    return module("adamw", backend)


def segment_sum(backend: str) -> ModuleType:
    """The module with ``segment_sum`` for a resolved backend; on the CPU it is the torch twin."""
    return module("segment_sum", "torch" if backend == "host" else backend)


def without_host(kind: str, backend: str, device: torch.device) -> ModuleType:
    """The module of a kind of kernel that has no C++ form ("attention", "probe", "farthest"): the twin for the CPU.

    Raises as ``resolve`` does, and ValueError for "host".  Nothing is built.
    """
    if backend == "host":
        raise ValueError(f"backend must be auto, triton or torch for {kind}, which has no C++ form; got 'host'")
    found = resolve(backend, device, build=device.type != "cpu")
    return module(kind, "torch" if found == "host" else found)
