"""triton-viz's sanitizer over the kernels: for each name, "clean" or a report and "caught".

    python tests/kernels/sanitize.py fold jsd grad adamw segment_sum
    python tests/kernels/sanitize.py broken-load broken-store broken-fold       # the harness at work
    python tests/kernels/sanitize.py attention probe farthest maxsim rotation
    python tests/kernels/sanitize.py broken-adamw broken-segment_sum broken-attention broken-maxsim broken-rotation

A process of its own: triton-viz rewrites the interpreter, and reads its settings on import.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("ENABLE_SANITIZER", "1")
sys.path.insert(0, str(Path(__file__).parent))

import attention_problems
import maxsim_problems
import numpy as np
import rotation_problems
import torch
import triton
import triton.language as tl
import triton_viz
from rowcheck import problem, spec_of
from triton.runtime import interpreter
from triton_viz.clients import Sanitizer
from triton_viz.core.trace import launches

from burnish.kernels import (
    adamw_triton,
    attention_triton,
    farthest_triton,
    maxsim_triton,
    probe_triton,
    rotation_triton,
    rows_triton,
    segment_sum_triton,
)
from burnish.kernels.adamw import QUANT_BLOCK, TILE, AdamWSpec, TileTable, Update
from burnish.kernels.contract import COEF, STATISTICS, new_state


@triton.jit
def broken_load(X, OUT, columns, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + cols, tl.load(X + cols), mask=cols < columns)  # the last block reads past the end


@triton.jit
def broken_store(X, OUT, columns, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + cols, tl.load(X + cols, mask=cols < columns), mask=cols <= columns)  # one too many


def watched(kernel):
    return triton_viz.trace(Sanitizer(abort_on_error=True))(kernel)


@contextlib.contextmanager
def bounded(*tensors):
    """The interpreter stops at an access outside the tensors; a list of them may grow.

    For kernels whose addresses come from memory: the symbolic sanitizer does not follow those, so this looks at each
    address of the launches that are made, and at no other.
    """
    lists = [x for x in tensors if isinstance(x, list)]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]

    def look(pointers, mask):
        known = [*tensors, *(x for some in lists for x in some)]
        spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in known]
        for at in np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel().tolist():
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            if not any(begin <= at and at + size <= end for begin, end in spans):
                raise SystemExit(f"an access at {at:#x} is in none of {len(spans)} tensors")

    builder = interpreter.InterpreterBuilder
    real_load, real_store = builder.create_masked_load, builder.create_masked_store

    def load(self, pointers, mask, *rest):
        look(pointers, mask)
        return real_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        look(pointers, mask)
        return real_store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield


class OneColumnTooMany:
    """A fold kernel that is told of a column that the tile does not have."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **flags: self.kernel[grid](*args[:-1], args[-1] + 1, **flags)


def run(what: str) -> None:
    rows_triton.BLOCK = 16
    if what in ("broken-load", "broken-store"):
        kernel = watched({"broken-load": broken_load, "broken-store": broken_store}[what])
        kernel[(3,)](torch.zeros(37), torch.zeros(37), 37, BLOCK=16)
        return
    broken, what = what.startswith("broken-"), what.removeprefix("broken-")
    others = {
        "adamw": run_adamw, "segment_sum": run_segment_sum, "attention": run_attention, "probe": run_probe,
        "farthest": run_farthest, "maxsim": run_maxsim, "rotation": run_rotation,
    }  # fmt: skip
    if what in others:
        return others[what](broken)
    name = f"{what}_kernel"
    kernel = watched(getattr(rows_triton, name))
    setattr(rows_triton, name, OneColumnTooMany(kernel) if broken else kernel)
    all_flags = {
        "scale": 0.5, "softcap": 5.0, "temperature": True, "teacher_scale": 0.5, "teacher_softcap": 5.0,
        "teacher_temperature": True,
    }  # fmt: skip
    for spec in (spec_of(), spec_of(*STATISTICS, **all_flags)):
        for v, start in ((37, 0), (1, 0), (16, 5), (17, 30)):
            p = problem(3, v, dtype=torch.float32)
            p.target[:] = torch.tensor([start + v - 1, start + v, -100])  # last column, one beyond, ignored
            p.ids[0] += start
            temps = {"inv_temp": p.inv_temp.float(), "teacher_inv_temp": p.teacher_inv_temp.float()}
            state = new_state(3, torch.float32, p.tile.device)
            if what == "fold":
                rows_triton.fold(p.tile, p.teacher, state, p.target, spec, start=start, **temps)
            elif what == "jsd":
                rows_triton.fold_jsd(p.tile, p.teacher, state, spec, **temps)
            else:
                rows_triton.grad(
                    p.tile, p.teacher, torch.zeros_like(p.tile), torch.zeros(len(COEF), 3), p.target, spec, start=start,
                    ids=p.ids if spec.has("ids") else None, ids_grad=p.upstream["ids"].float(), **temps,
                )  # fmt: skip


def run_adamw(broken: bool) -> None:
    """Every kind of launch over whole and ragged tiles; or a table that has an element too many."""
    for dtype, spec in (
        (torch.float32, AdamWSpec()), (torch.float32, AdamWSpec("8bit")), (torch.bfloat16, AdamWSpec(master=True)),
        (torch.float16, AdamWSpec("8bit", "stochastic")),
    ):  # fmt: skip
        weights = [torch.zeros(n, dtype=dtype) for n in (TILE + 37, 1, 256, TILE - 1)]
        table = TileTable.build([(w, 0) for w in weights])
        n, blocks = len(table) * TILE, len(table) * TILE // QUANT_BLOCK
        moment = torch.uint8 if spec.quantized else torch.float32
        m_scale, v_scale = (torch.zeros(blocks) if spec.quantized else None for _ in range(2))
        master = torch.zeros(n) if spec.master else None
        grad, scale, found_inf = torch.zeros(n), torch.ones(1), torch.zeros(1)
        m, v = torch.zeros(n, dtype=moment), torch.zeros(n, dtype=moment)
        table.table[1, 1] += broken
        with bounded(*weights, table.table, grad, master, m, v, m_scale, v_scale, scale, found_inf):
            adamw_triton.adamw(
                table, grad, master, m, v, m_scale, v_scale, dtype, spec, Update(lr=0.1), scale, found_inf
            )
        launches.append("adamw")


def run_segment_sum(broken: bool) -> None:
    """Ragged columns, no row, no token; tokens beyond the range and -1; or a position beyond the last row."""
    segment_sum_triton.BLOCK = 16
    if broken:
        real = segment_sum_triton.by_token
        segment_sum_triton.by_token = lambda *a: tuple(x + one for x, one in zip(real(*a), (1, 0), strict=True))
    for m, d in ((7, 37), (3, 16), (0, 5), (5, 1)):
        tokens, grad, out = torch.arange(m) % 5 - 1, torch.zeros(m, d), torch.zeros(2, d)
        tokens[m - 1 :] = 2  # the last row counts
        # sorting makes tensors of its own: what it hands to the kernel is allowed, and nothing beside it
        positions, offsets = segment_sum_triton.by_token(tokens, 1, 3)
        with (
            mock.patch.object(segment_sum_triton, "by_token", lambda *_, p=positions, o=offsets: (p, o)),
            bounded(grad, positions, offsets, out),
        ):
            segment_sum_triton.segment_sum(grad, tokens, 1, 3, None, out)
        launches.append("segment_sum")


@contextlib.contextmanager
def allocated():
    """The tensors that torch.empty, empty_like and zeros make meanwhile."""
    made: list[torch.Tensor] = []

    def kept(function):
        return lambda *args, **kwargs: made.append(function(*args, **kwargs)) or made[-1]

    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "zeros"):
            stack.enter_context(mock.patch.object(torch, name, kept(getattr(torch, name))))
        yield made


def run_attention(broken: bool) -> None:
    """Ragged blocks, lists by head and by batch, empty ones and holes; or a count beyond the end of the last list."""
    attention_triton.TILE = 16
    blocks = mock.patch.object(attention_triton.Shape, "__init__", small_blocks)
    for shape in attention_problems.SHAPES[:7]:
        p = attention_problems.problem(shape, bias=True).to(torch.float32)
        inverse = attention_triton.invert(p.lists, p.counts, shape.keys, shape.key_heads, 16)
        p.counts.view(-1)[-1] += broken
        with blocks, allocated() as made, bounded(made, *vars(p).values(), *p.upstream, *inverse):
            out = attention_triton.forward(*p.operands, entropy=True)
            saved = attention_triton.Saved(*out, *p.upstream)
            attention_triton.backward(*p.operands, saved, inverse)
        launches.append("attention")


def small_blocks(self, dtype, d):
    self.bd = max(16, triton.next_power_of_2(d))
    self.forward = self.dq = self.dkv = {"BM": 16, "BN": 16}
    self.options = self.dkv_options = {"num_warps": 4}


def run_probe(broken: bool) -> None:
    for keys, queries in ((1, 1), (37, 5), (64, 40)):
        q, k = torch.zeros(2, 4, queries, 12), torch.zeros(2, 2, keys, 12)
        with allocated() as made, bounded(made, q, k):
            probe_triton.probe(q, k, 1.0, 16)
        launches.append("probe")


def run_farthest(broken: bool) -> None:
    for n in (1, 5, 37):
        distances = torch.rand(2, n, n)
        with allocated() as made, bounded(made, distances):
            farthest_triton.farthest(distances, n, n - 1)
        launches.append("farthest")


def run_maxsim(broken: bool) -> None:
    """Ragged blocks, padding and holes, rows of any stride; or a place beyond the last token of the last document."""
    cut = mock.patch.object(maxsim_triton, "blocks", lambda *_: {"BM": 16, "BN": 16, "BK": 16})
    for shape in (*maxsim_problems.SHAPES, *maxsim_problems.EDGES):
        p = maxsim_problems.problem(shape).to(torch.float32)
        # the kernels read bytes of masks, and ends that the launcher makes: kept as they are made
        ends, real = [], maxsim_triton._ends
        kept = mock.patch.object(maxsim_triton, "_ends", lambda m, e=ends, r=real: e.append(r(m)) or e[-1])
        full = mock.patch.object(torch, "full", lambda *a, e=ends, r=torch.full, **k: e.append(r(*a, **k)) or e[-1])
        with cut, kept, full, allocated() as made, bounded(made, ends, *vars(p).values()):
            _, arg = maxsim_triton.forward(*p.operands, keep=True)
            if broken and arg.numel():
                arg.view(-1)[-1] = shape[3] * shape[2] + 1
            maxsim_triton.backward(p.queries, p.documents, arg, p.upstream, wanted=(True, True))
        launches.append("maxsim")


def run_rotation(broken: bool) -> None:
    """Ragged tiles and shares, one generator for all, rows of any stride; or a row too many."""
    small = mock.patch.object(rotation_triton, "tiles", lambda *_: (16, 16, 4))
    for shape in (*rotation_problems.SHAPES, *rotation_problems.EDGES):
        for shared in (False, True):
            p = rotation_problems.problem(shape, shared=shared).to(torch.float32)
            wide = torch.zeros(len(p.x), p.x.shape[1] + 3)
            x, delta = wide[:, 3:], p.delta()
            if broken:
                rotation_triton.rotate_kernel = OneRowTooMany(rotation_triton.rotate_kernel)
            with small, allocated() as made, bounded(made, x, wide, delta, p.dy):
                rotation_triton.forward(x, delta)
                rotation_triton.backward(x, delta, p.dy, wanted=(True, True))
            launches.append("rotation")


class OneRowTooMany:
    """A rotation that is told of a row that x does not have."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, rows, **given: self.kernel[grid](*args, rows=rows + 1, **given)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        before = len(launches)
        try:
            run(case)
        except SystemExit:  # how the sanitizer ends a run, after its report
            print(f"{case}: caught")
        else:
            print(f"{case}: clean, {len(launches) - before} launches")
