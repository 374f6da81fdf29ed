"""Sources and compiler flags of the CPU kernels, for the build at first use and for setup.py, which runs this alone."""

from __future__ import annotations

import platform
import sys

SOURCES = ("rows.cpp", "adamw.cpp", "gemm.cpp", "head.cpp", "rotation.cpp")

_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


def compiler_flags(capability: str) -> list[str]:
    """Flags for one of torch's CPU capabilities, by which at::vec chooses its vectors."""
    # no -march=native: a cached library must run wherever torch reports the capability it is named by
    name = capability if capability in _INSTRUCTIONS else "DEFAULT"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there
    return ["-O3", *openmp, *_INSTRUCTIONS.get(name, []), f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]


def ahead_of_time_capability() -> str:
    """What a library is built for that may run on another machine than this one."""
    return "AVX2" if platform.machine().lower() in ("x86_64", "amd64") else "DEFAULT"
