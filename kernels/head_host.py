"""A slab of a bf16 head against a tile of tokens on CPUs with tile registers (AMX): ``host/head.cpp``.

Called through ctypes.  ``host_build`` has how the library comes to be.
"""

from __future__ import annotations

import ctypes

import torch

from . import gemm_host, pages, rows_host
from .contract import RowSpec, coefficients, finalize, new_state
from .host_build import TYPES, library


class HeadLaunch(ctypes.Structure):
    """Operands of one call, as ``struct HeadLaunch`` of head.cpp has them."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("x", "x_pairs", "weight", "bias", "t_x", "t_weight", "t_bias")]
        + [(n, ctypes.c_void_p) for n in ("dx", "dw", "out", "work")]
        + [(n, ctypes.c_int64) for n in ("threads", "hidden", "weight_stride", "t_hidden", "t_weight_stride")]
        + [(n, ctypes.c_int64) for n in ("dx_stride", "dw_stride", "out_stride")]
        + [(n, ctypes.c_float) for n in ("factor",)]
        + [(n, ctypes.c_int32) for n in ("dw_add", "out_type")]
    )


def bind(lib: ctypes.CDLL) -> bool:
    """Declare the functions of a library; False if its layout is not this version's, AttributeError if it lacks one."""
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.burnish_pack.argtypes = [pointer, number, flag, flag, number, number, pointer]
    lib.burnish_pack.restype = None
    lib.burnish_packed_numbers.argtypes, lib.burnish_packed_numbers.restype = [number] * 2, number
    lib.burnish_head_bytes.argtypes, lib.burnish_head_bytes.restype = [number] * 4, number
    for name in ("burnish_head_fold", "burnish_head_grad"):
        function = getattr(lib, name)
        function.argtypes = [ctypes.POINTER(HeadLaunch), ctypes.POINTER(rows_host.Launch)]
        function.restype = None
    lib.burnish_head_launch_bytes.restype = number
    return lib.burnish_head_launch_bytes() == ctypes.sizeof(HeadLaunch)


def check_against_twin() -> None:
    """A small problem on a library that was just built; RuntimeError if torch finds otherwise."""
    if not gemm_host.supported():
        return
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 40, generator=g).bfloat16() for n in (37, 530))
    y, spec = torch.randint(0, 530, (37,), generator=g), RowSpec(frozenset({"lse", "label", "logp"}))
    tile, state = Tile(x, workspace(37, 40)), new_state(37, torch.float32, x.device)
    tile.fold((w, None), None, state, y, spec)
    coef = coefficients(finalize(state, spec), {"logp": torch.ones(37)}, spec)
    dx, dw = torch.zeros(37, 40), torch.empty(530, 40)
    tile.grad((w, None), None, dx, dw, coef, y, spec)
    z = x.double() @ w.double().t()
    dz = torch.nn.functional.one_hot(y, 530) - z.softmax(1)
    for got, want in ((finalize(state, spec)["lse"], z.logsumexp(1)), (dx, dz @ w.double()), (dw, dz.t() @ x.double())):
        if not (got - want).norm() < 2**-8 * want.norm():
            raise RuntimeError("slabs of a head as this compiler built them disagree with torch's")


def workspace(rows: int, hidden: int, teacher_hidden: int = 0) -> torch.Tensor:
    """Scratch of a ``Tile`` of so many rows on as many threads as torch has now."""
    size = library().burnish_head_bytes(rows, hidden, teacher_hidden, torch.get_num_threads())
    return pages.empty(size, dtype=torch.uint8)


class Packed:
    """A bf16 matrix (N, H) as tile registers take it: its rows, or its columns with rows as the depth of a product."""

    def __init__(self, x: torch.Tensor):
        self.rows, self.hidden = x.shape
        self._x, self._ld, self._by_columns = gemm_host.layout(x)
        self._packed: dict[bool, torch.Tensor] = {}

    def pointer(self, *, columns: bool = False) -> int:
        """Where it lies, packed at the first call."""
        if columns not in self._packed:
            lines, depth = (self.hidden, self.rows) if columns else (self.rows, self.hidden)
            out = self._packed[columns] = pages.empty(
                library().burnish_packed_numbers(lines, depth), dtype=torch.bfloat16
            )
            library().burnish_pack(
                self._x.data_ptr(), self._ld, self._by_columns != columns, columns, lines, depth, out.data_ptr()
            )
        return self._packed[columns].data_ptr()


class Tile:
    """Hidden states (N, H) of one tile, bf16, packed once for all slabs of a head: ``host/head.cpp``.

    The logits of a slab are made in a core's cache and used there: by ``fold`` for their statistics, by ``grad`` for
    their gradient, its two products included.  A head is (weight, bias): (V, H) bf16 with contiguous rows, and (V,)
    fp32 or None.  ``teacher`` of the two is the head of ``teacher_hidden``, a tensor of logits (N, V), or None.
    """

    def __init__(self, hidden: torch.Tensor, work: torch.Tensor, teacher_hidden: torch.Tensor | None = None):
        """``work``: of ``workspace`` for at least as many rows; calls that follow one another may share it."""
        gemm_host.check_supported()
        self._x, self._t = Packed(hidden), None if teacher_hidden is None else Packed(teacher_hidden)
        self.rows, self._threads = self._x.rows, torch.get_num_threads()
        widths = (self._x.hidden, 0 if self._t is None else self._t.hidden)
        self._work = work
        if work.numel() < library().burnish_head_bytes(self.rows, *widths, self._threads):
            self._work = workspace(self.rows, *widths)  # there were fewer threads, or rows

    def _call(self, name: str, head, teacher, vectors, target, spec, start, temps, reads_teacher: bool, **more) -> None:
        weight, bias = head
        shape = (self.rows, weight.shape[0])
        if 0 in shape:
            return
        given = teacher if isinstance(teacher, torch.Tensor) else None
        made, held = rows_host.launch(
            name, shape, None, given, vectors, target, spec, start, *temps, reads_teacher=reads_teacher
        )
        call = HeadLaunch(
            x=self._x.pointer(), weight=weight.data_ptr(), weight_stride=weight.stride(0), hidden=self._x.hidden,
            bias=None if bias is None else bias.data_ptr(), work=self._work.data_ptr(), threads=self._threads, **more,
        )  # fmt: skip
        if reads_teacher and given is None:
            if teacher is None or self._t is None:
                raise ValueError("teacher must be given for these statistics")
            call.t_x, call.t_hidden = self._t.pointer(), self._t.hidden
            call.t_weight, call.t_weight_stride = teacher[0].data_ptr(), teacher[0].stride(0)
            call.t_bias = None if teacher[1] is None else teacher[1].data_ptr()
        getattr(library(), f"burnish_head_{name}")(call, made)
        del held  # lived as long as the call

    def fold(self, head, teacher, state, target, spec, *, start=0, inv_temp=None, teacher_inv_temp=None):
        """Merge the columns [start, start + V) of the logits into ``state``, in place."""
        self._call("fold", head, teacher, state, target, spec, start, (inv_temp, teacher_inv_temp), spec.uses_teacher)

    def grad(
        self, head, teacher, dx, dw, coef, target, spec, *, add=False, out=None, factor=1.0, start=0,
        inv_temp=None, teacher_inv_temp=None,
    ):  # fmt: skip
        """dx (N, H) += dz W, and dw (V, H) = dz^T X, or += with ``add``; fp32, each may be None.

        ``out`` (V, H), any dtype: ``factor`` times what dw then is, rounded once, and dw is used up; without dw, of
        this tile alone.
        """
        more: dict = {"dw_add": add, "factor": factor}
        for name, x in (("dx", dx), ("dw", dw), ("out", out)):
            if x is not None:
                more |= {name: x.data_ptr(), f"{name}_stride": x.stride(0)}
        if out is not None:
            more["out_type"] = TYPES[out.dtype]
        if dw is not None or out is not None:
            more["x_pairs"] = self._x.pointer(columns=True)
        self._call(
            "grad", head, teacher, coef, target, spec, start, (inv_temp, teacher_inv_temp),
            rows_host.grad_reads_teacher(spec), **more,
        )  # fmt: skip
