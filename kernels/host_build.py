"""How the CPU kernels, C++ in ``host/``, come to be built; the ``*_host`` modules call them.

    library()   1. ``burnish.kernels._host``, if ``python setup.py build_ext`` built it ahead;
                2. else what an earlier process left in torch's extension cache;
                3. else torch.utils.cpp_extension.load with ninja, about ten seconds, once a machine.

What is cached is named by sources, flags and torch's version, and by the instruction set: a home directory may
serve machines that differ.  The compiler runs in a process of its own, in a directory of its own, and its result
is held to the torch twins once and moved into place: a process that is killed leaves no lock and no half of a file.

The library has a plain C interface, called through ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import _appdirs

from .host.flags import SOURCES, ahead_of_time_capability, compiler_flags

FOLDER = Path(__file__).parent / "host"
#: Type of convert.h
TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
BUILD_SECONDS = 300  # after which a compiler is given up

_log = logging.getLogger(__name__)
_lock = threading.RLock()  # the check of a new library calls it
_library: ctypes.CDLL | None = None
_reason: str | None = None  # why there is no library


def obstacle() -> str | None:
    """Why the library cannot be had here, or None; compiles nothing."""
    if _library is not None or _prebuilt() is not None or _cached().exists():
        return None
    if _reason is not None:
        return _reason
    if _compiler() is None:
        return "no C++ compiler was found"
    if _ninja_folder() is None:
        return "ninja was not found (pip install ninja)"
    return None


def library() -> ctypes.CDLL:
    """The loaded library, built if need be.  RuntimeError, the same for the life of the process, if it cannot be."""
    global _library, _reason
    with _lock:
        if _library is None and _reason is None:
            try:
                _library = _find_or_build()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                _reason = str(error)
        if _library is None:
            raise RuntimeError(f"backend 'host' cannot be built: {_reason}")
        return _library


def _find_or_build() -> ctypes.CDLL:
    ahead = _prebuilt()
    if ahead is not None:
        try:
            return _open(ahead)
        except (OSError, RuntimeError) as error:  # built for another torch, or from another source
            _log.info("%s is not used: %s", ahead, error)
    path = _cached()
    if not path.exists():
        problem = obstacle()
        if problem is not None:
            raise RuntimeError(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.with_suffix(".lock")):
            if not path.exists():  # another process may have been first
                _build(path)
    return _open(path)


def _callers() -> list[ModuleType]:
    names = ("rows_host", "adamw_host", "gemm_host", "head_host", "rotation_host")
    return [importlib.import_module(f".{name}", __package__) for name in names]


def _open(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    with contextlib.suppress(AttributeError):  # a function that it lacks
        if all(caller.bind(lib) for caller in _callers()):
            return lib
    raise RuntimeError(f"{path} has another layout than this version's")


def _check_against_twins(lib: ctypes.CDLL) -> None:
    """A library that was just built, on small problems: the tests may never have seen this instruction set."""
    global _library
    _library = lib
    try:
        for caller in _callers():
            caller.check_against_twin()
    finally:
        _library = None


def _prebuilt() -> Path | None:
    spec = importlib.util.find_spec(f"{__package__}._host")
    if spec is None or spec.origin is None:
        return None
    if ahead_of_time_capability() == "AVX2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    return Path(spec.origin)


def _cached() -> Path:
    capability = torch.backends.cpu.get_cpu_capability()
    key = hashlib.sha256()
    for source in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        key.update(source.read_bytes())
    key.update("|".join([torch.__version__, platform.machine(), *compiler_flags(capability)]).encode())
    # where torch itself keeps what it builds
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or _appdirs.user_cache_dir(appname="torch_extensions")
    name = f"burnish_host_{capability.lower().replace(' ', '_')}_{key.hexdigest()[:12]}"
    return Path(root) / name / "burnish_host.so"


def _compiler() -> str | None:
    # cpp_extension asks CXX first
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def _ninja_folder() -> str | None:
    """The folder of ninja: on PATH, or beside the interpreter of an environment that is not activated."""
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return str(Path(found).parent) if found else None


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """An advisory lock on a file, which the system lets go when its holder dies."""
    try:
        import fcntl
    except ImportError:  # two processes then build, and the last to finish moves its library into place
        yield
        return
    with open(lock, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: as above
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_CHILD = """
import json, sys
from torch.utils.cpp_extension import load
load(is_python_module=False, **json.loads(sys.argv[1]))
"""


def _build(path: Path) -> None:
    """Compile SOURCES in a process of its own, check the library and move it to ``path``."""
    capability, begun = torch.backends.cpu.get_cpu_capability(), time.monotonic()
    flags = compiler_flags(capability)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        arguments = {
            "name": path.stem, "sources": [str(FOLDER / name) for name in SOURCES], "build_directory": folder,
            "extra_cflags": flags, "extra_ldflags": [f for f in flags if f == "-fopenmp"],
        }  # fmt: skip
        ninja = _ninja_folder() or ""
        environment = {
            **os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), ninja]),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),  # torch is found as it was here
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(arguments)], env=environment, cwd=folder, capture_output=True,
            text=True, timeout=BUILD_SECONDS, check=False,
        )  # fmt: skip
        built = Path(folder) / f"{path.stem}.so"
        if done.returncode != 0 or not built.exists():
            raise RuntimeError(f"the compiler failed: {_first_error(done.stdout + done.stderr)}")
        _check_against_twins(_open(built))
        os.replace(built, path)
    _log.info("built the CPU kernels for %s in %.1f s: %s", capability, time.monotonic() - begun, path)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[0][:400]
