"""The block rotation for the CPU in C++: ``host/rotation.cpp``; the maths and the operands are in ``rotation``.

Called through ctypes: ``Launch`` mirrors ``struct Rotation``.  ``host_build`` has how the library comes to be.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from .host_build import TYPES, library
from .rotation import check, check_backward, make_delta

PAD = 16  # of rotation.cpp
GROUP_COLUMNS = 1024  # of the blocks a thread works on: their panels and sums stay in its cache
TASKS = 16  # of backward at least, where there are rows enough
SHARE = 256  # rows of a task at least


class Launch(ctypes.Structure):
    """Operands of one call, as ``struct Rotation`` of rotation.cpp has them."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("x", "dy", "delta", "out", "dr")]
        + [(n, ctypes.c_int64) for n in ("rows", "blocks", "size", "padded", "delta_stride", "x_stride", "dy_stride")]
        + [(n, ctypes.c_int64) for n in ("group", "splits")]
        + [("type", ctypes.c_int32)]
    )  # fmt: skip


def bind(lib: ctypes.CDLL) -> bool:
    """Declare the rotation of a library; False if its layout is not this version's."""
    for name in ("burnish_rotate", "burnish_rotation_backward"):
        function = getattr(lib, name)
        function.argtypes, function.restype = [ctypes.POINTER(Launch), ctypes.c_int32], None
    lib.burnish_rotation_layout.restype = ctypes.c_int64
    return lib.burnish_rotation_layout() == ctypes.sizeof(Launch) * 1000 + PAD


def check_against_twin() -> None:
    """One small problem on a library that was just built; RuntimeError if the torch twin finds otherwise."""
    from . import rotation_torch

    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(67, 60, generator=g) for _ in range(2))
    delta, found = make_delta(torch.randn(3, 190, generator=g) / 10, 5, False, torch.float32), []
    for kernels in (rotation_torch, sys.modules[__name__]):
        found.append([kernels.forward(x, delta), *kernels.backward(x, delta, dy, wanted=(True, True))])
    if not all(torch.allclose(got, want, rtol=1e-4, atol=1e-4) for want, got in zip(*found, strict=True)):
        raise RuntimeError("the block rotation as this compiler built it disagrees with the torch twin")


def _launch(x: Tensor, delta: Tensor, **more) -> Launch:
    """``delta`` is padded and lives with the launch."""
    if x.device.type != "cpu":
        raise ValueError(f"x must be on the CPU; got {x.device}")
    if x.dtype not in TYPES:
        raise TypeError(f"x must be {' or '.join(str(d) for d in TYPES)}; got {x.dtype}")
    b = delta.shape[1]
    blocks, padded = x.shape[1] // b, -(-b // PAD) * PAD
    delta = torch.nn.functional.pad(delta, (0, padded - b)).contiguous()
    launch = Launch(
        x=x.data_ptr(), delta=delta.data_ptr(), rows=x.shape[0], blocks=blocks, size=b, padded=padded,
        delta_stride=b * padded if len(delta) > 1 else 0, x_stride=x.stride(0), type=TYPES[x.dtype],
        group=min(blocks, max(1, GROUP_COLUMNS // b)), **more,
    )  # fmt: skip
    launch.kept = delta
    return launch


def forward(x: Tensor, delta: Tensor) -> Tensor:
    """y (N, d) in x's dtype; see the contract."""
    check(x, delta)
    return _rotate(x, delta)


def _rotate(x: Tensor, delta: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        library().burnish_rotate(_launch(x, delta, out=out.data_ptr()), x.dtype == torch.float64)
    return out


def backward(x: Tensor, delta: Tensor, dy: Tensor, *, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """dx in x's dtype and dR in delta's, None where not wanted; see the contract."""
    check_backward(x, delta, dy)
    if not wanted[1]:
        return _rotate(dy, delta.mT) if wanted[0] else None, None
    dx = torch.empty(x.shape, dtype=x.dtype) if wanted[0] else None
    if not x.numel():
        return dx, torch.zeros_like(delta)
    b = delta.shape[1]
    blocks = x.shape[1] // b
    splits = shares(len(x), blocks, b)
    dr = torch.empty(splits, blocks, b, b, dtype=delta.dtype)
    launch = _launch(
        x, delta.mT, dy=dy.data_ptr(), dy_stride=dy.stride(0), out=None if dx is None else dx.data_ptr(),
        dr=dr.data_ptr(), splits=splits,
    )  # fmt: skip
    library().burnish_rotation_backward(launch, x.dtype == torch.float64)
    return dx, dr.sum(0) if len(delta) > 1 or blocks == 1 else dr.sum((0, 1))[None]


def shares(rows: int, blocks: int, b: int) -> int:
    """How many shares the rows are cut into in backward, by the shapes alone."""
    groups = -(-blocks // min(blocks, max(1, GROUP_COLUMNS // b)))
    return max(1, min(-(-rows // SHARE), -(-TASKS // groups)))
