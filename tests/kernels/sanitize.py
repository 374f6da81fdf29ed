"""triton-viz's sanitizer over the row kernels: for each name, "clean" or a report and "caught".

    python tests/kernels/sanitize.py fold jsd grad
    python tests/kernels/sanitize.py broken-load broken-store broken-fold       # the harness at work

A process of its own: triton-viz rewrites the interpreter, and reads its settings on import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("ENABLE_SANITIZER", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
import triton.language as tl
import triton_viz
from rowcheck import problem, spec_of
from triton_viz.clients import Sanitizer
from triton_viz.core.trace import launches

from burnish.kernels import rows_triton
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


if __name__ == "__main__":
    for case in sys.argv[1:]:
        before = len(launches)
        try:
            run(case)
        except SystemExit:  # how the sanitizer ends a run, after its report
            print(f"{case}: caught")
        else:
            print(f"{case}: clean, {len(launches) - before} launches")
