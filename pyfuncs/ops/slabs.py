"""One walk over a head in vocabulary-outer order: slabs of its rows outside, tiles of tokens inside."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch, rows_torch
from ..kernels.contract import RowSpec, finalize, new_state
from ..kernels.launch import accumulator
from . import gemm, geometry, shards
from .core import Transforms, row_spec
from .gemm import product, teacher_head
from .shards import Shard
from .teacher import cut, fill_topk

if TYPE_CHECKING:
    from ..kernels import head_host

#: In the place of an ignored label, which may be the number of a column.  Not -1: a label of -1 is an error to be seen.
NO_LABEL = -(1 << 40)


class Options(NamedTuple):
    """What is not a tensor, in the order of the registered op's arguments."""

    stats: str
    alpha: float
    eta: float
    beta: float
    top_k: int
    scale: float
    softcap: float
    teacher_scale: float
    teacher_softcap: float
    temperature: bool
    teacher_temperature: bool
    teacher: str
    tail: str
    ignore_index: int
    budget: int
    compute: torch.dtype
    backend: str
    group: str
    start: int
    total: int

    @property
    def spec(self) -> RowSpec:
        transforms = Transforms(self.scale, self.softcap, self.teacher_scale, self.teacher_softcap)
        return row_spec(
            self.stats.split(","), self.alpha, self.eta, self.beta, self.top_k, transforms,
            temperature=self.temperature, teacher_temperature=self.teacher_temperature,
        )  # fmt: skip

    @property
    def shard(self) -> Shard:
        return Shard(self.group, self.start, self.total)


@dataclass
class Head:
    """z = column * (x W^T + low factor^T) + bias; W in row blocks, the other parts or None."""

    blocks: list[Tensor]  # (V_i, H)
    factor: Tensor | None = None  # (V, r)
    column: Tensor | None = None  # (V,)
    bias: Tensor | None = None  # (V,)

    @property
    def rows(self) -> int:
        return sum(block.shape[0] for block in self.blocks)


@dataclass
class Slab:
    """Rows of one block, their operands in the products' dtype; ``local`` counts over this rank's blocks."""

    block: int
    rows: slice
    local: slice
    start: int  # in the whole vocabulary
    weight: Tensor
    factor: Tensor | None
    column: Tensor | None
    bias: Tensor | None
    teacher: tuple[Tensor, Tensor | None] | None


class Walk:
    """Slabs and tiles of one call, in buffers that each uses again."""

    def __init__(
        self, hidden: Tensor, low: Tensor | None, head: Head, target: Tensor, inv_temp: Tensor,
        teacher_inv_temp: Tensor, plain_inv_temp: Tensor, teacher: list[Tensor], ids: Tensor | None, o: Options, *,
        keep_raw: bool = False, tail: tuple[Tensor, Tensor] | None = None,
    ):  # fmt: skip
        """``keep_raw``: the products before ``column`` are kept for its gradient; ``tail``: an earlier walk's."""
        device = hidden.device
        self.hidden, self.low, self.head, self.o = hidden, low, head, o
        self.spec, self.dtype = o.spec, accumulator(o.compute)
        self.target = torch.where(target == o.ignore_index, NO_LABEL, target)
        self.inv, self.teacher_inv, self.plain_inv, self.ids = inv_temp, teacher_inv_temp, plain_inv_temp, ids
        backend = dispatch.resolve(o.backend, device)
        self.kernels = dispatch.rows(backend)
        self.teacher = teacher = cut(teacher, o.teacher, head.rows)
        weight_dtype = head.blocks[0].dtype
        self.mode = gemm.mode(weight_dtype, o.compute, device, self.dtype, backend)
        self.operand = o.compute if self.mode == "mixed" else self.dtype
        listed = teacher[0].shape[1] if o.teacher == "topk" else 0
        self.geometry = geometry.slabs(
            rows=hidden.shape[0], vocabulary=head.rows, hidden=hidden.shape[1],
            teacher_hidden=teacher[0].shape[1] if o.teacher == "hidden" else 0, weight_dtype=weight_dtype,
            compute_dtype=o.compute, device=device, teacher=o.teacher, backend=backend, extra_tiles=int(keep_raw),
            ids=listed + (0 if ids is None else ids.shape[1]), budget=None if o.budget < 0 else o.budget,
        )  # fmt: skip
        self.raw = torch.empty_like(self.buffer) if keep_raw else None
        self.teacher_operand = self.dtype
        if o.teacher == "hidden":
            self.teacher_operand = teacher_head(teacher, self.dtype, backend).operand
        # a slab's logits stay in a core's cache where they are made and used by one kernel
        plain = head.factor is None and head.column is None
        served = o.teacher in ("", "logits") or (o.teacher == "hidden" and self.teacher_operand == self.operand)
        self.fused = backend == "host" and self.mode == "mixed" and plain and served
        self.tiles: dict[int, head_host.Tile] = {}
        self.work: Tensor | None = None
        self.tail = tail
        if o.tail == "student" and tail is None:
            self.tail = self._student_tail()

    @functools.cached_property  # the fused kernel has no need of it
    def buffer(self) -> Tensor:
        size = self.geometry.rows * min(self.geometry.columns, max(self.head.rows, 1))
        return torch.empty(size, dtype=self.dtype, device=self.hidden.device)

    @functools.cached_property
    def teacher_buffer(self) -> Tensor:
        return torch.empty_like(self.buffer) if self.o.teacher in ("hidden", "topk") else self.buffer

    def slabs(self, *, whole: bool = False) -> Iterator[Slab]:
        """``whole``: a block at a time, for the fused kernel where nothing outside it has a slab's size."""
        base, step = 0, self.geometry.columns
        whole = whole and all(x.stride(-1) == 1 for x in (*self.head.blocks, *self.teacher[:2]))  # no copy of all
        for i, block in enumerate(self.head.blocks):
            step = max(block.shape[0], 1) if whole else step
            for first in range(0, block.shape[0], step):
                rows = slice(first, min(first + step, block.shape[0]))
                local = slice(base + rows.start, base + rows.stop)
                yield self._open(i, rows, local)
            base += block.shape[0]

    def _open(self, i: int, rows: slice, local: slice) -> Slab:
        head, dtype = self.head, self.dtype
        teacher = None
        if self.o.teacher == "hidden":
            bias = self.teacher[2][local].to(dtype) if len(self.teacher) > 2 else None
            teacher = (self._rows(self.teacher[1][local], self.teacher_operand), bias)
        return Slab(
            i, rows, local, self.o.start + local.start, self._rows(head.blocks[i][rows], self.operand),
            None if head.factor is None else head.factor[local].to(self.operand),
            None if head.column is None else head.column[local].to(dtype),
            None if head.bias is None else head.bias[local].to(dtype), teacher,
        )  # fmt: skip

    def _rows(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight.to(dtype)
        return weight.contiguous() if self.fused else weight  # that kernel reads rows as they lie

    def parts(self) -> list[slice]:
        n, step = self.hidden.shape[0], self.geometry.rows
        return [slice(r, min(r + step, n)) for r in range(0, n, step)]

    def _view(self, buffer: Tensor, rows: int, slab: Slab) -> Tensor:
        columns = slab.rows.stop - slab.rows.start
        return buffer[: rows * columns].view(rows, columns)

    def _project(self, x: Tensor, weight: Tensor, buffer: Tensor, slab: Slab, add: bool = False) -> Tensor:
        """x W^T (n, v) in products of one size, the last one padded: see ``geometry.PRODUCT_ROWS``."""
        n, size = x.shape[0], self.geometry.product
        out = self._view(buffer, -(-n // size) * size, slab)
        for r in range(0, n, size):
            part = x[r : r + size]
            if part.shape[0] < size:
                part = torch.nn.functional.pad(part, (0, 0, 0, size - part.shape[0]))
            product(part, weight.t(), out[r : r + size], add=add)
        return out[:n]

    def logits(self, part: slice, slab: Slab, *, teacher: bool = True):
        """(x, low, raw logits (n, v), teacher's raw logits or None) of a tile; raw: before scale, cap, temperature."""
        x = self.hidden[part].to(self.operand)
        u = None if self.low is None else self.low[part].to(self.operand)
        z = self._project(x, slab.weight, self.buffer, slab)
        if u is not None and slab.factor is not None:
            self._project(u, slab.factor, self.buffer, slab, add=True)
        if slab.column is not None:
            if self.raw is not None:
                self._view(self.raw, z.shape[0], slab).copy_(z)
            z.mul_(slab.column)
        if slab.bias is not None:
            z.add_(slab.bias)
        return x, u, z, self._teacher_logits(part, slab, z) if teacher and self.teacher else None

    def raw_logits(self, part: slice, slab: Slab) -> Tensor:
        """The products of the last tile before ``column``; the caller may use them up."""
        assert self.raw is not None
        return self._view(self.raw, part.stop - part.start, slab)

    def tile(self, part: slice) -> head_host.Tile:
        """The rows of a part as the fused kernel takes them, packed once."""
        from ..kernels import head_host

        if part.start not in self.tiles:
            teacher = self.teacher[0][part].to(self.operand) if self.o.teacher == "hidden" else None
            if self.work is None:
                self.work = head_host.workspace(
                    part.stop - part.start, self.hidden.shape[1], 0 if teacher is None else teacher.shape[1]
                )
            self.tiles[part.start] = head_host.Tile(self.hidden[part].to(self.operand), self.work, teacher)
        return self.tiles[part.start]

    def heads(self, part: slice, slab: Slab):
        """(weight, bias) of a slab, and the teacher's or a tile of its logits, as the fused kernel takes them."""
        teacher = self._given_logits(part, slab) if self.o.teacher == "logits" else slab.teacher
        return (slab.weight, slab.bias), teacher

    def _given_logits(self, part: slice, slab: Slab) -> Tensor:
        t = self.teacher[0][part, slab.local]
        return t if t.stride(1) == 1 else t.contiguous()

    def _teacher_logits(self, part: slice, slab: Slab, z: Tensor) -> Tensor:
        if self.o.teacher == "logits":
            return self._given_logits(part, slab)
        if slab.teacher is not None:
            weight, bias = slab.teacher
            t = self._project(self.teacher[0][part].to(weight.dtype), weight, self.teacher_buffer, slab)
            return t if bias is None else t.add_(bias)
        t = self._view(self.teacher_buffer, z.shape[0], slab)
        lse, z_ids = (None, None) if self.tail is None else (self.tail[0][part], self.tail[1][part])

        def student(into: Tensor) -> None:
            for block in rows_torch.row_blocks(into):
                inv = self.plain_inv[part][block]
                into[block], _ = rows_torch.transform(z[block], self.dtype, self.spec.scale, self.spec.softcap, inv)

        ids, logp = self.teacher[0][part], self.teacher[1][part]
        fill_topk(t, ids, logp, self.o.tail, student, lse, z_ids, start=slab.start, vocabulary=self.o.total)
        return t

    def temperatures(self, part: slice) -> dict[str, Tensor]:
        return {"inv_temp": self.inv[part], "teacher_inv_temp": self.teacher_inv[part]}

    def _student_tail(self) -> tuple[Tensor, Tensor]:
        """The student's plain log-sum-exp (N,) and its logits at the teacher's ids (N, K), of the whole vocabulary."""
        spec = replace(self.spec, stats=frozenset({"lse", "label", "logp"}), teacher_temperature=False)
        parts = self.parts()
        states = [new_state(p.stop - p.start, self.dtype, self.hidden.device) for p in parts]
        z_ids = torch.full(self.teacher[0].shape, torch.nan, dtype=self.dtype, device=self.hidden.device)
        for slab in self.slabs():
            for part, state in zip(parts, states, strict=True):
                _, _, z, _ = self.logits(part, slab, teacher=False)
                inv = self.plain_inv[part]
                self.kernels.fold(z, None, state, self.target[part], spec, start=slab.start, inv_temp=inv)
                keep_picked(z_ids[part], z, self.teacher[0][part], spec, slab.start, inv)
        state = shards.merge_state(join(states, self.hidden), self.o.shard, hit=False)
        return finalize(state, spec)["lse"], shards.merge_picked(z_ids, self.o.shard)


def keep_picked(into: Tensor, z: Tensor, ids: Tensor, spec: RowSpec, start: int, inv_temp: Tensor) -> None:
    """Transformed logits at the ids (n, K) that lie in this slab, written into ``into``."""
    found = rows_torch.gather_ids(z, ids, spec, start=start, inv_temp=inv_temp, dtype=into.dtype)
    into.copy_(torch.where(found.isnan(), into, found))


def join(states: list[Tensor], like: Tensor) -> Tensor:
    """The states of all tiles side by side."""
    if not states:
        return new_state(0, accumulator(like.dtype), like.device)
    return states[0] if len(states) == 1 else torch.cat(states, 1)
