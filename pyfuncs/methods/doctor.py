"""``burnish doctor``: what is installed here, and which backend serves each op."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess

import torch

from ..kernels import dispatch, rows_host

PACKAGES = (
    "burnish", "torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "reasoning-gym", "gguf",
    "numpy", "pyyaml",
)  # fmt: skip
#: Each public op and the device kernels it runs on.
OPS = ("linear_loss", "linear_stats", "row_loss", "block_rotation", "ChunkAdamW")
#: Ops whose kernels have no C++ form.
WITHOUT_HOST = ("selected_attention", "attention_entropy", "farthest_frames")


def report() -> list[tuple[str, str]]:
    """(what, finding) pairs; reads versions and devices, compiles and allocates nothing."""
    rows = [("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows.append(("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        rows.append(("GPU runtime", f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"))
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}"))
        devices.append(torch.device("cuda"))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        rows.append(("GPU", torch.xpu.get_device_name(0)))
        devices.append(torch.device("xpu"))
    if len(devices) == 1:
        rows.append(("GPU", "none: everything runs on the CPU"))
    rows.append(("C++ compiler", _compiler()))
    rows.append(("ninja", shutil.which("ninja") or "not found"))
    rows.append(("weights", _weights()))
    problem = rows_host.obstacle()
    rows.append(("host backend", f"not available: {problem}" if problem else "available, or will be at first use"))
    for op in (*OPS, *WITHOUT_HOST):
        found = [(dispatch.resolve("auto", device, build=False), device.type) for device in devices]
        served = (f"{'torch' if op in WITHOUT_HOST and b == 'host' else b} on {kind}" for b, kind in found)
        rows.append((op, ", ".join(served)))
    return rows


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    for name in ("c++", "g++", "clang++", "cl"):
        path = shutil.which(name)
        if path:
            try:
                out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
            except (OSError, subprocess.SubprocessError):
                return path
            first = (out.stdout or out.stderr).splitlines()[:1]
            return f"{path}: {first[0]}" if first else path
    return "none found"


def _weights() -> str:
    from .models import packaged_weights

    try:
        folder, file = packaged_weights()
    except ValueError as error:
        return str(error)
    return f"smollm2: {folder}/{file}"
