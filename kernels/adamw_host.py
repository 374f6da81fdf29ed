"""AdamW over tiles for the CPU in C++: ``host/adamw.cpp``; the maths and the operands are in ``adamw``.

Called through ctypes: ``Launch`` mirrors ``struct AdamW``.  ``host_build`` has how the library comes to be.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from .adamw import QUANT_BLOCK, TILE, AdamWSpec, TileTable, Update, check, keys
from .host_build import TYPES, library


class Launch(ctypes.Structure):
    """Operands of one call, as ``struct AdamW`` of adamw.cpp has them."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("table", "grad", "master", "m", "v", "m_scale", "v_scale")]
        + [(n, ctypes.c_void_p) for n in ("scale", "found_inf")]
        + [("tiles", ctypes.c_int64)]
        + [(n, ctypes.c_float) for n in ("decay", "weight", "beta2", "rest", "root", "eps", "step")]
        + [(n, ctypes.c_uint32) for n in ("key", "m_key", "v_key", "weight_key")]
        + [(n, ctypes.c_int32) for n in ("small", "type", "stochastic", "exact")]
    )  # fmt: skip


def bind(lib: ctypes.CDLL) -> bool:
    """Declare AdamW of a library; False if its layout is not this version's."""
    lib.burnish_adamw.argtypes, lib.burnish_adamw.restype = [ctypes.POINTER(Launch)], None
    words = [ctypes.c_int64] * 2 + [ctypes.c_uint32] * 2 + [ctypes.c_void_p]
    lib.burnish_random_bits.argtypes, lib.burnish_random_bits.restype = words, None
    lib.burnish_adamw_layout.restype = ctypes.c_int64
    return lib.burnish_adamw_layout() == (ctypes.sizeof(Launch) * 10000 + TILE) * 1000 + QUANT_BLOCK


def check_against_twin() -> None:
    """One small problem on a library that was just built; RuntimeError if the torch twin finds otherwise."""
    from . import adamw_torch

    g = torch.Generator().manual_seed(0)
    start, grad = torch.randn(1100, generator=g).bfloat16(), torch.randn(2 * TILE, generator=g)
    spec, found = AdamWSpec(moments="8bit", rounding="stochastic"), []
    for kernels in (adamw_torch, sys.modules[__name__]):
        weight, m, v = start.clone(), *torch.zeros(2, 2 * TILE, dtype=torch.uint8)
        m_scale, v_scale = torch.zeros(2, 2 * TILE // QUANT_BLOCK)
        for step in (1, 2, 3):
            update = Update(lr=0.1, weight_decay=0.1, step_m=step, step_v=step, step=step)
            table = TileTable.build([(weight, 2**32 - 5)])
            kernels.adamw(table, grad, None, m, v, m_scale, v_scale, weight.dtype, spec, update)
        found.append([x.float() for x in (weight, m_scale, v_scale, m, v)])
    # a code or a weight whose chance is within a rounding of its threshold may fall to the other side
    if any((got - want).abs().mean() > 1e-3 * want.abs().mean() for want, got in zip(*found, strict=True)):
        raise RuntimeError("adamw as this compiler built it disagrees with the torch twin")


def adamw(
    table: TileTable, grad, master, m, v, m_scale, v_scale, weights_dtype, spec: AdamWSpec, update: Update,
    scale=None, found_inf=None,
):  # fmt: skip
    """One step of AdamW on the table's tiles: weights, master, moments and their scales are written in place."""
    check(table, grad, master, m, v, m_scale, v_scale, weights_dtype, spec, scale, found_inf)
    if table.table.device.type != "cpu":
        raise ValueError(f"the table must be on the CPU; got {table.table.device}")
    key, scalars = keys(update.seed, update.step), update.scalars()._asdict()
    rows = table.table.contiguous()
    operands = {
        "table": rows, "grad": grad, "master": master, "m": m, "v": v, "m_scale": m_scale, "v_scale": v_scale,
        "scale": scale, "found_inf": found_inf,
    }  # fmt: skip
    launch = Launch(
        **{name: x.data_ptr() for name, x in operands.items() if x is not None}, **scalars, tiles=len(table),
        key=key["index"], m_key=key["m"], v_key=key["v"], weight_key=key["weight"], type=TYPES[weights_dtype],
        stochastic=spec.stochastic(weights_dtype), exact=spec.exact,
    )  # fmt: skip
    library().burnish_adamw(launch)
