r"""The row kernels for CPU tiles in C++ (``host/rows.cpp``, where the maths is), and how they come to be built.

    library()   1. ``burnish.kernels._host``, if ``python setup.py build_ext`` built it ahead;
                2. else what an earlier process left in torch's extension cache;
                3. else torch.utils.cpp_extension.load with ninja, about ten seconds, once a machine.

What is cached is named by source, flags and torch's version, and by the instruction set: a home directory may
serve machines that differ.  The compiler runs in a process of its own, in a directory of its own, and its result
is held to the torch twin once and moved into place: a process that is killed leaves no lock and no half of a file.

The library has a plain C interface, called through ctypes: ``Launch`` mirrors its struct.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
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

import torch
from torch import _appdirs

from .contract import COEF, STATE, STATISTICS, RowSpec, coefficients, finalize, new_state
from .host.flags import ahead_of_time_capability, compiler_flags

SOURCE = Path(__file__).parent / "host" / "rows.cpp"
BLOCK = 1024  # columns a thread holds at once; BLOCK of rows.cpp is the most, and 16 the least
BUILD_SECONDS = 300  # after which a compiler is given up

_TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FLAGS = (
    "TEACHER", "MEAN", "SQUARE", "UNIFORM", "OTHER", "MIX", "FOLD_T", "CROSS", "T_ENTROPY", "T_LABEL", "HIT", "JSD",
    "TEMP", "T_TEMP",
)  # fmt: skip
_FLAG = {name: 1 << i for i, name in enumerate(_FLAGS)}

_log = logging.getLogger(__name__)
_lock = threading.RLock()  # the check of a new library calls it
_library: ctypes.CDLL | None = None
_reason: str | None = None  # why there is no library


class Launch(ctypes.Structure):
    """Operands of one call, as ``struct Launch`` of rows.cpp has them."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("z", "t", "out", "vectors", "y", "inv_temp", "t_inv_temp", "ids", "ids_grad")]
        + [(n, ctypes.c_int64) for n in ("rows", "columns", "start", "count", "block")]
        + [(n, ctypes.c_int64) for n in ("z_stride", "t_stride", "out_stride", "vectors_stride")]
        + [(n, ctypes.c_double) for n in ("alpha", "eta", "beta", "scale", "cap", "t_scale", "t_cap")]
        + [(n, ctypes.c_int32) for n in ("flags", "z_type", "t_type", "out_type")]
    )  # fmt: skip


# Building


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


def _open(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.burnish_layout.restype = ctypes.c_char_p
    lib.burnish_launch_bytes.restype = ctypes.c_int64
    rows = ";".join("".join(f"{n}," for n in names) for names in (STATE, COEF))
    if not lib.burnish_layout().decode().startswith(rows + ";") or lib.burnish_launch_bytes() != ctypes.sizeof(Launch):
        raise RuntimeError(f"{path} has another layout than this version's")
    for name in ("fold", "fold_jsd", "grad"):
        function = getattr(lib, f"burnish_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(Launch), ctypes.c_int32], None
    return lib


def _check_against_twin(lib: ctypes.CDLL) -> None:
    """One small problem on a library that was just built: the tests may never have seen this instruction set."""
    global _library
    from . import rows_torch

    _library = lib
    g = torch.Generator().manual_seed(0)
    tile, teacher = (torch.randn(2, 131, generator=g) for _ in range(2))
    target, spec = torch.tensor([3, 130]), RowSpec(frozenset(STATISTICS), alpha=0.7, eta=0.3, softcap=4.0)
    found: dict[str, list] = {"fold": [], "grad": []}
    one = torch.ones(2)
    try:
        for kernels in (rows_torch, sys.modules[__name__]):
            state, out = new_state(2, torch.float32, tile.device), torch.empty_like(tile)
            kernels.fold(tile, teacher, state, target, spec)
            kernels.fold_jsd(tile, teacher, state, spec)
            stats = finalize(state, spec)
            names = ("logp", "mean", "square", "other", "mix", "cross", "uniform", "jsd")
            kernels.grad(tile, teacher, out, coefficients(stats, dict.fromkeys(names, one), spec), target, spec)
            found["fold"].append(state)
            found["grad"].append(out)
    finally:
        _library = None
    for name, (want, got) in found.items():
        if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{name} as this compiler built it disagrees with the torch twin")


def _prebuilt() -> Path | None:
    spec = importlib.util.find_spec(f"{__package__}._host")
    if spec is None or spec.origin is None:
        return None
    if ahead_of_time_capability() == "AVX2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    return Path(spec.origin)


def _cached() -> Path:
    capability = torch.backends.cpu.get_cpu_capability()
    key = hashlib.sha256(SOURCE.read_bytes())
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
    """Compile SOURCE in a process of its own, check the library and move it to ``path``."""
    capability, begun = torch.backends.cpu.get_cpu_capability(), time.monotonic()
    flags = compiler_flags(capability)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        arguments = {
            "name": path.stem, "sources": [str(SOURCE)], "build_directory": folder, "extra_cflags": flags,
            "extra_ldflags": [f for f in flags if f == "-fopenmp"],
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
        _check_against_twin(_open(built))
        os.replace(built, path)
    _log.info("built the CPU row kernels for %s in %.1f s: %s", capability, time.monotonic() - begun, path)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[0][:400]


# Calling


def _check(name: str, x: torch.Tensor | None, shape: tuple[int, ...], dtypes=_TYPES) -> torch.Tensor:
    """What must hold for the C++ to stay within an operand."""
    if x is None:
        raise ValueError(f"{name} must be given for these statistics")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}; got {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must have unit stride along its last dimension; got strides {x.stride()}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}; got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU; got {x.device}")
    return x


def _flags(spec: RowSpec, teacher: bool) -> int:
    wanted = {
        "TEACHER": teacher, "MEAN": spec.has("mean"), "SQUARE": spec.has("square"), "UNIFORM": spec.has("uniform"),
        "OTHER": spec.has("other"), "MIX": spec.has("mix"), "FOLD_T": spec.folds_teacher, "CROSS": spec.has("cross"),
        "T_ENTROPY": spec.has("teacher_entropy"), "T_LABEL": spec.has("teacher_logp"), "HIT": spec.has("hit"),
        "JSD": spec.has("jsd"), "TEMP": spec.temperature, "T_TEMP": spec.teacher_temperature,
    }  # fmt: skip
    return sum(_FLAG[name] for name, on in wanted.items() if on)


def _launch(
    name: str, tile, teacher, vectors, target, spec: RowSpec, start, inv_temp, teacher_inv_temp, *, reads_teacher,
    out=None, ids=None, ids_grad=None,
) -> None:  # fmt: skip
    """Fill a ``Launch`` and call ``burnish_<name>``."""
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    kind, names = ("coef", COEF) if name == "grad" else ("state", STATE)
    _check(kind, vectors, (len(names), rows), (torch.float32, torch.float64))
    acc = vectors.dtype
    launch = Launch(
        rows=rows, columns=columns, start=start, count=0 if ids is None else ids.shape[1], block=BLOCK,
        alpha=spec.alpha, eta=spec.eta, beta=spec.beta, scale=spec.scale, cap=spec.softcap,
        t_scale=spec.teacher_scale, t_cap=spec.teacher_softcap, flags=_flags(spec, reads_teacher),
        vectors=vectors.data_ptr(), vectors_stride=vectors.stride(0),
    )  # fmt: skip
    matrices = [
        ("z", "tile", tile, True), ("t", "teacher", teacher, reads_teacher), ("out", "out", out, name == "grad"),
    ]  # fmt: skip
    for field, label, x, used in matrices:
        if used:
            _check(label, x, (rows, columns))
            setattr(launch, field, x.data_ptr())
            setattr(launch, f"{field}_stride", x.stride(0))
            setattr(launch, f"{field}_type", _TYPES[x.dtype])
    vector = [
        ("y", "target", target, (rows,), torch.int64, name != "fold_jsd"),
        ("inv_temp", "inv_temp", inv_temp, (rows,), acc, spec.temperature),
        ("t_inv_temp", "teacher_inv_temp", teacher_inv_temp, (rows,), acc, spec.teacher_temperature and reads_teacher),
        ("ids", "ids", ids, (rows, launch.count), torch.int64, ids is not None),
        ("ids_grad", "ids_grad", ids_grad, (rows, launch.count), acc, ids is not None),
    ]
    held = []  # copies must live as long as the call
    for field, label, x, shape, dtype, used in vector:
        if used:
            x = _check(label, x.to(dtype).contiguous() if x is not None else x, shape, (dtype,))
            held.append(x)
            setattr(launch, field, x.data_ptr())
    getattr(library(), f"burnish_{name}")(launch, acc == torch.float64)


def fold(tile, teacher, state, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None):
    """Merge a tile's columns [start, start + V) into ``state`` (STATE_ROWS, N), in place."""
    _launch(
        "fold", tile, teacher, state, target, spec, start, inv_temp, teacher_inv_temp, reads_teacher=spec.uses_teacher
    )


def fold_jsd(tile, teacher, state, spec: RowSpec, *, inv_temp=None, teacher_inv_temp=None):
    """Second pass for the Jensen-Shannon sums, which need both log-sum-exps first."""
    _launch("fold_jsd", tile, teacher, state, None, spec, 0, inv_temp, teacher_inv_temp, reads_teacher=True)


def grad(
    tile, teacher, out, coef, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None,
    ids=None, ids_grad=None,
):  # fmt: skip
    """Write d loss / d raw logits of the tile into ``out`` (N, V), which may be ``tile`` itself."""
    _launch(
        "grad", tile, teacher, coef, target, spec, start, inv_temp, teacher_inv_temp, out=out, ids=ids,
        ids_grad=ids_grad, reads_teacher=spec.mix_teacher or spec.has("cross", "other", "jsd"),
    )  # fmt: skip
