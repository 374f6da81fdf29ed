r"""The row kernels for CPU tiles in C++: ``host/rows.cpp``, where the maths is.

Called through ctypes: ``Launch`` mirrors the struct of that name.  ``host_build`` has how the library comes to be.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from . import pages
from .contract import COEF, STATE, STATISTICS, RowSpec, coefficients, finalize, new_state
from .host_build import TYPES, library, obstacle

__all__ = [
    "Launch", "bind", "check_against_twin", "fold", "fold_jsd", "grad", "launch", "library", "obstacle", "scaled",
]  # fmt: skip

BLOCK = 1024  # columns a thread holds at once; BLOCK of rows.cpp is the most, and 16 the least

_FLAGS = (
    "TEACHER", "MEAN", "SQUARE", "UNIFORM", "OTHER", "MIX", "FOLD_T", "CROSS", "T_ENTROPY", "T_LABEL", "HIT", "JSD",
    "TEMP", "T_TEMP", "MIX_MEAN",
)  # fmt: skip
_FLAG = {name: 1 << i for i, name in enumerate(_FLAGS)}


class Launch(ctypes.Structure):
    """Operands of one call, as ``struct Launch`` of rows.cpp has them."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("z", "t", "out", "vectors", "y", "inv_temp", "t_inv_temp", "ids", "ids_grad")]
        + [(n, ctypes.c_int64) for n in ("rows", "columns", "start", "count", "block")]
        + [(n, ctypes.c_int64) for n in ("z_stride", "t_stride", "out_stride", "vectors_stride")]
        + [(n, ctypes.c_double) for n in ("alpha", "eta", "beta", "scale", "cap", "t_scale", "t_cap")]
        + [(n, ctypes.c_int32) for n in ("flags", "z_type", "t_type", "out_type")]
    )  # fmt: skip


def bind(lib: ctypes.CDLL) -> bool:
    """Declare the row kernels of a library; False if its layout is not this version's."""
    lib.burnish_layout.restype = ctypes.c_char_p
    lib.burnish_launch_bytes.restype = ctypes.c_int64
    for name in ("fold", "fold_jsd", "grad"):
        function = getattr(lib, f"burnish_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(Launch), ctypes.c_int32], None
    lib.burnish_scaled.argtypes = [
        ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64,
    ]  # fmt: skip
    lib.burnish_scaled.restype = None
    rows = ";".join("".join(f"{n}," for n in names) for names in (STATE, COEF))
    return lib.burnish_layout().decode().startswith(rows + ";") and lib.burnish_launch_bytes() == ctypes.sizeof(Launch)


def check_against_twin() -> None:
    """One small problem on a library that was just built; RuntimeError if the torch twin finds otherwise."""
    from . import rows_torch

    g = torch.Generator().manual_seed(0)
    tile, teacher = (torch.randn(2, 131, generator=g) for _ in range(2))
    target, spec = torch.tensor([3, 130]), RowSpec(frozenset(STATISTICS), alpha=0.7, eta=0.3, softcap=4.0)
    found: dict[str, list] = {"fold": [], "grad": []}
    one = torch.ones(2)
    for kernels in (rows_torch, sys.modules[__name__]):
        state, out = new_state(2, torch.float32, tile.device), torch.empty_like(tile)
        kernels.fold(tile, teacher, state, target, spec)
        kernels.fold_jsd(tile, teacher, state, spec)
        stats = finalize(state, spec)
        names = ("logp", "mean", "square", "other", "mix", "mix_lse", "cross", "uniform", "jsd")
        kernels.grad(tile, teacher, out, coefficients(stats, dict.fromkeys(names, one), spec), target, spec)
        found["fold"].append(state)
        found["grad"].append(out)
    for name, (want, got) in found.items():
        if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{name} as this compiler built it disagrees with the torch twin")


# Calling


def _check(name: str, x: torch.Tensor | None, shape: tuple[int, ...], dtypes=TYPES) -> torch.Tensor:
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
        "OTHER": spec.has("other"), "MIX": spec.folds_mix, "FOLD_T": spec.folds_teacher, "CROSS": spec.has("cross"),
        "T_ENTROPY": spec.has("teacher_entropy"), "T_LABEL": spec.has("teacher_logp"), "HIT": spec.has("hit"),
        "JSD": spec.has("jsd"), "TEMP": spec.temperature, "T_TEMP": spec.teacher_temperature,
        "MIX_MEAN": spec.has("mix"),
    }  # fmt: skip
    return sum(_FLAG[name] for name, on in wanted.items() if on)


def launch(
    name: str, shape, tile, teacher, vectors, target, spec: RowSpec, start, inv_temp, teacher_inv_temp, *,
    reads_teacher, out=None, ids=None, ids_grad=None,
) -> tuple[Launch, list]:  # fmt: skip
    """A ``Launch`` of ``name`` on tiles of ``shape``, and what must live as long as it is used.

    ``tile`` is None, and ``teacher`` may be, where the kernel makes them itself.
    """
    rows, columns = shape
    kind, names = ("coef", COEF) if name == "grad" else ("state", STATE)
    _check(kind, vectors, (len(names), rows), (torch.float32, torch.float64))
    acc = vectors.dtype
    made = Launch(
        rows=rows, columns=columns, start=start, count=0 if ids is None else ids.shape[1], block=BLOCK,
        alpha=spec.alpha, eta=spec.eta, beta=spec.beta, scale=spec.scale, cap=spec.softcap,
        t_scale=spec.teacher_scale, t_cap=spec.teacher_softcap, flags=_flags(spec, reads_teacher),
        vectors=vectors.data_ptr(), vectors_stride=vectors.stride(0),
    )  # fmt: skip
    matrices = [
        ("z", "tile", tile, tile is not None),
        ("t", "teacher", teacher, reads_teacher and (tile is not None or teacher is not None)),
        ("out", "out", out, name == "grad" and tile is not None),
    ]  # fmt: skip
    for field, label, x, used in matrices:
        if used:
            _check(label, x, (rows, columns))
            setattr(made, field, x.data_ptr())
            setattr(made, f"{field}_stride", x.stride(0))
            setattr(made, f"{field}_type", TYPES[x.dtype])
    vector = [
        ("y", "target", target, (rows,), torch.int64, name != "fold_jsd"),
        ("inv_temp", "inv_temp", inv_temp, (rows,), acc, spec.temperature),
        ("t_inv_temp", "teacher_inv_temp", teacher_inv_temp, (rows,), acc, spec.teacher_temperature and reads_teacher),
        ("ids", "ids", ids, (rows, made.count), torch.int64, ids is not None),
        ("ids_grad", "ids_grad", ids_grad, (rows, made.count), acc, ids is not None),
    ]
    held = [tile, teacher, out]
    for field, label, x, shape, dtype, used in vector:
        if used:
            x = _check(label, x.to(dtype).contiguous() if x is not None else x, shape, (dtype,))
            held.append(x)
            setattr(made, field, x.data_ptr())
    return made, held


def _call(name: str, tile, teacher, vectors, *args, **kwargs) -> None:
    """Fill a ``Launch`` and call ``burnish_<name>``."""
    if tile.numel() == 0:
        return
    made, held = launch(name, tile.shape, tile, teacher, vectors, *args, **kwargs)
    getattr(library(), f"burnish_{name}")(made, vectors.dtype == torch.float64)
    del held  # lived as long as the call


def grad_reads_teacher(spec: RowSpec) -> bool:
    return spec.mix_teacher or spec.has("cross", "other", "jsd")


def fold(tile, teacher, state, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None):
    """Merge a tile's columns [start, start + V) into ``state`` (STATE_ROWS, N), in place."""
    _call(
        "fold", tile, teacher, state, target, spec, start, inv_temp, teacher_inv_temp, reads_teacher=spec.uses_teacher
    )


def fold_jsd(tile, teacher, state, spec: RowSpec, *, inv_temp=None, teacher_inv_temp=None):
    """Second pass for the Jensen-Shannon sums, which need both log-sum-exps first."""
    _call("fold_jsd", tile, teacher, state, None, spec, 0, inv_temp, teacher_inv_temp, reads_teacher=True)


def grad(
    tile, teacher, out, coef, target, spec: RowSpec, *, start=0, inv_temp=None, teacher_inv_temp=None,
    ids=None, ids_grad=None,
):  # fmt: skip
    """Write d loss / d raw logits of the tile into ``out`` (N, V), which may be ``tile`` itself."""
    _call(
        "grad", tile, teacher, coef, target, spec, start, inv_temp, teacher_inv_temp, out=out, ids=ids,
        ids_grad=ids_grad, reads_teacher=grad_reads_teacher(spec),
    )  # fmt: skip


def scaled(x: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """factor x in ``dtype``, of a contiguous fp32 tensor: one pass, one rounding after the product's own in fp32."""
    out = pages.empty(*x.shape, dtype=dtype)
    library().burnish_scaled(x.data_ptr(), factor, out.data_ptr(), TYPES[dtype], x.numel())
    return out
