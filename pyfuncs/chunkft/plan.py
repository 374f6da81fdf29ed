"""The plan of ChunkFT: which rows of which parameter are trained together (arXiv 2605.21177).

The trainable parameters, in the order of ``named_parameters()``, are laid end to end, each element as long as the
bytes it costs while it is trained, and cut into N chunks of equal length:

    c_p  = numel_p * element_bytes(dtype_p)         o_p = sum of c_q, q before p         C = sum of all c_p
    B_j  = j C / N                                  where cut j should fall, 0 < j < N
    b_pj = round(clip(B_j - o_p, 0, c_p) / u_p)     in rows of axis 0, u_p = c_p / rows_p;  b_p0 = 0, b_pN = rows_p

Chunk j owns rows [b_pj, b_p,j+1) of every p: mostly none or all of them.  This is the cut of the authors' published
code, with axis 0 everywhere, so that a segment is a contiguous view, and with cuts moved to whole tiles (``align``).
All in integers: the same model has the same plan in every process.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .memory import MemoryEstimate

_LOW = (torch.bfloat16, torch.float16)
#: Steps of a cut by the parameter's dimensions: rows that a tile of a product spans; for 1-D elements, 32 or 64 bytes.
#: A row of an expert tensor (3-D) is a product of its own.
_TILES = {1: (16,), 2: (128, 64, 32, 16)}
#: A step is at most 1/200 of the mean chunk: cuts move by half a step, so chunks differ by 1 % at most.
_STEP_SHARE = 200


def element_bytes(dtype: torch.dtype) -> int:
    """Bytes of an element while it is trained: itself, fp32 gradient, two fp32 moments, an fp32 master if it is low."""
    return dtype.itemsize + 4 + 8 + (4 if dtype in _LOW else 0)


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of axis 0 of one parameter; a 0-D tensor has one row.

    ``name``: its first in ``named_parameters()``; ``numel``, ``shape``: of these rows; ``offset``: index of their
    first element when all planned parameters, the always trained ones too, lie end to end; ``whole``: all the rows.
    """

    name: str
    start: int
    stop: int
    numel: int
    shape: tuple[int, ...]
    offset: int
    whole: bool
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Bytes while it is trained."""
        return self.numel * element_bytes(self.dtype)

    def cut(self, start: int, stop: int) -> Segment:
        """Rows [start, stop) of this segment, counted from its own first."""
        row = self.numel // self.rows
        return replace(
            self, start=self.start + start, stop=self.start + stop, numel=row * (stop - start),
            shape=(stop - start, *self.shape[1:]) if self.shape else (), offset=self.offset + row * start,
            whole=self.whole and stop - start == self.rows,
        )  # fmt: skip

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class ChunkPlan:
    """What each chunk trains.

    ``chunks``: of each its segments, in order, one a parameter; ``always``: trained in every chunk beside them;
    ``parameters``: every planned parameter, whole, in order; ``small`` and ``align``: as given to ``plan``.
    """

    chunks: tuple[tuple[Segment, ...], ...]
    always: tuple[Segment, ...]
    parameters: tuple[Segment, ...]
    small: str
    align: bool | int

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    @property
    def spread(self) -> float:
        """(largest - smallest) / mean of the chunks' bytes, without what is always trained."""
        sizes = [sum(s.cost for s in chunk) for chunk in self.chunks]
        return (max(sizes) - min(sizes)) * len(sizes) / sum(sizes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256, hex, of names, shapes, dtypes and ranges: equal where saved moments fit, whatever was asked for."""
        parts = [[[s.name, s.start, s.stop] for s in group] for group in (*self.chunks, self.always)]
        cut = [[[p.name, list(p.shape), str(p.dtype)] for p in self.parameters], parts]
        return hashlib.sha256(json.dumps(cut).encode()).hexdigest()

    def predict_memory(self, model: torch.nn.Module, *, batch: int, seq: int, **options) -> MemoryEstimate:
        """Bytes on the device and on the host for a micro-batch of ``batch`` rows of ``seq`` tokens.

        ``options`` as in ``burnish.chunkft.memory.predict_memory``: dtype, device, moments, checkpointing, and more.
        """
        from .memory import predict_memory

        return predict_memory(model, self, batch=batch, seq=seq, **options)

    def table(self) -> list[dict]:
        """A row for each chunk, one for ``always`` and one for all: chunk (its index, "always", "total"), tensors,
        rows, elements, bytes (while trained), share of all bytes, first and last (segments as text, or None)."""
        groups = [*enumerate(self.chunks), ("always", self.always), ("total", self.parameters)]
        total = sum(s.cost for s in self.parameters)
        return [
            {
                "chunk": key, "tensors": len(group), "rows": sum(s.rows for s in group),
                "elements": sum(s.numel for s in group), "bytes": sum(s.cost for s in group),
                "share": sum(s.cost for s in group) / total,
                "first": str(group[0]) if group else None, "last": str(group[-1]) if group else None,
            }
            for key, group in groups
        ]  # fmt: skip

    def __str__(self) -> str:
        head = ("chunk", "tensors", "rows", "elements", "MiB", "share", "parameters, first .. last")
        lines = [head]
        for r in self.table():
            numbers = (f"{r['rows']:,}", f"{r['elements']:,}", f"{r['bytes'] / 2**20:,.1f}", f"{r['share']:.2%}")
            lines.append((str(r["chunk"]), str(r["tensors"]), *numbers, _span(r["first"], r["last"])))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        text = ["  ".join([*(c.rjust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
        spread = f"spread {self.spread:.3%}: (largest - smallest) / mean of the chunks' bytes"
        note = "MiB while trained: the parameters, fp32 gradients and moments, an fp32 master of low precision"
        return "\n".join([*(line.rstrip() for line in text), spread, note])


def plan(
    model: torch.nn.Module, num_chunks: int, *, small: str = "always", align: bool | int = True,
    whole: Iterable[str] = (),
) -> ChunkPlan:  # fmt: skip
    """Cut a model's trainable parameters into chunks that cost the same bytes.

    Args:
        model: its parameters that require a gradient now, tied ones once, all on one device; "meta" will do.  Only
            shapes and dtypes are read.  Parameters without elements are left out.
        num_chunks: N, at least 1, and few enough that no chunk is empty.
        small: what becomes of 0-D and 1-D parameters: "always" trains them in every chunk, "chunk" cuts them by
            element.
        align: where a matrix may be cut.  True: at multiples of the largest of 128, 64, 32 and 16 rows that cost at
            most 0.5 % of the mean chunk, or else at any row; 1-D tensors of 16 elements likewise, tensors of 3-D and
            higher (experts, filters) at any row.  False: at any row.  An int: at multiples of it, whatever that does
            to the balance.
        whole: names or ``fnmatch`` patterns of parameters that are not cut; each goes to the chunk that its middle
            falls in.  Any name of a tied parameter will do.

    Returns a ``ChunkPlan``.  Source: arXiv 2605.21177 and its published code; see the top of this file.
    ValueError: an argument out of range, nothing to train or to cut, parameters on two devices, a chunk that would
    be empty, a pattern that matches nothing.  TypeError: a parameter that is not dense fp32, bf16 or fp16.
    """
    if isinstance(num_chunks, bool) or not isinstance(num_chunks, int) or num_chunks < 1:
        raise ValueError(f"num_chunks must be a whole number, at least 1; got {num_chunks!r}")
    if small not in ("always", "chunk"):
        raise ValueError(f"small must be 'always' or 'chunk'; got {small!r}")
    if not isinstance(align, int) or (align < 1 and align is not False):
        raise ValueError(f"align must be True, False or a number of rows, at least 1; got {align!r}")
    parameters = _trainable(model)
    uncut = _matching(model, parameters, [whole] if isinstance(whole, str) else list(whole))
    cut = [p for p in parameters if small == "chunk" or len(p.shape) > 1]
    if not cut:
        raise ValueError("small must be 'chunk' for this model; got 'always': every trainable parameter is 0-D or 1-D")
    total, before = sum(p.cost for p in cut), 0
    steps = [p.rows if p.name in uncut else _step(p, align, total, num_chunks) for p in cut]
    if num_chunks > sum(map(_pieces, cut, steps)):
        raise _too_many(num_chunks, cut, steps)
    chunks: list[list[Segment]] = [[] for _ in range(num_chunks)]
    for p, step in zip(cut, steps, strict=True):
        # everything times N, which keeps B_j - o_p whole; only cuts strictly inside p are looked at
        first, last = num_chunks * before // total, (num_chunks * (before + p.cost) - 1) // total
        inside = (j * total - num_chunks * before for j in range(first + 1, last + 1))
        edges = (0, *(_nearest(at, num_chunks * (p.cost // p.rows), p.rows, step) for at in inside), p.rows)
        for j, (start, stop) in enumerate(pairwise(edges), first):
            if start < stop:
                chunks[j].append(p.cut(start, stop))
        before += p.cost
    if not all(chunks):
        raise _too_many(num_chunks, cut, steps)
    always = [p for p in parameters if small == "always" and len(p.shape) < 2]
    return ChunkPlan(tuple(map(tuple, chunks)), tuple(always), tuple(parameters), small, align)


def _trainable(model: torch.nn.Module) -> list[Segment]:
    out: list[Segment] = []
    offset, device, owner = 0, None, ""
    for name, p in model.named_parameters():
        if not p.requires_grad or not p.numel():
            continue
        if p.layout != torch.strided or p.dtype not in (torch.float32, *_LOW):
            got = p.dtype if p.layout == torch.strided else p.layout
            say = "; no float64: cast the model with .float()" if got == torch.float64 else ""
            raise TypeError(f"parameter {name} must be dense float32, bfloat16 or float16; got {got}{say}")
        if device is None:
            device, owner = p.device, name
        if p.device != device:
            raise ValueError(f"model must lie on one device; got {owner} on {device} and {name} on {p.device}")
        rows = p.shape[0] if p.dim() else 1
        out.append(Segment(name, 0, rows, p.numel(), tuple(p.shape), offset, True, p.dtype))
        offset += p.numel()
    if not out:
        raise ValueError("model must have a parameter that requires a gradient; got none")
    return out


def _matching(model: torch.nn.Module, parameters: list[Segment], patterns: list[str]) -> set[str]:
    """First names of the planned parameters that the patterns name, by any of their names."""
    planned = {p.name for p in parameters}
    first = {id(p): name for name, p in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    names = {name: one for name, one in names.items() if one in planned}
    out: set[str] = set()
    for pattern in patterns:
        found = {one for name, one in names.items() if name == pattern or fnmatchcase(name, pattern)}
        if not found:
            close = difflib.get_close_matches(pattern, names, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"whole must match trainable parameters; got {pattern!r}, which matches none{hint}")
        out |= found
    return out


def _step(p: Segment, align: bool | int, total: int, count: int) -> int:
    """Rows between places where ``p`` may be cut."""
    tiles = _TILES.get(len(p.shape), ())
    if align is True:
        return next((t for t in tiles if t * (p.cost // p.rows) * _STEP_SHARE * count <= total), 1)
    return align if align and tiles else 1


def _nearest(at: int, row: int, rows: int, step: int) -> int:
    """The multiple of ``step``, or the end, nearest to at / row; of two the lower."""
    low = at // row // step * step
    high = min(low + step, rows)
    return low if 2 * at <= (low + high) * row else high


def _too_many(count: int, cut: list[Segment], steps: list[int]) -> ValueError:
    # pieces no longer than the mean chunk leave none empty: two cuts that far apart are rounded to two places
    pieces, total = sum(map(_pieces, cut, steps)), sum(p.cost for p in cut)
    size, name = max((p.cost // p.rows * min(step, p.rows), p.name) for p, step in zip(cut, steps, strict=True))
    kind = "rows" if all(step == 1 for step in steps) else "pieces (rows, tiles of align, parameters in whole)"
    return ValueError(
        f"num_chunks must be at most {total // size} for no chunk to be empty; got {count}: there are {pieces} {kind}, "
        f"the largest, in {name}, of {size} of {total} bytes"
    )


def _pieces(p: Segment, step: int) -> int:
    return -(-p.rows // step)


def _span(first: str | None, last: str | None) -> str:
    """Two segments as ``what.they.share.{first .. last}``."""
    if first is None or last is None or first == last:
        return first or "none"
    a, b = first.split("."), last.split(".")
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    shared = "".join(f"{x}." for x in a[:same])
    text = f"{'.'.join(a[same:])} .. {'.'.join(b[same:])}"
    return f"{shared}{{{text}}}" if shared else text
