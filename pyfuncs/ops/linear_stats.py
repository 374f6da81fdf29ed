"""``linear_stats``: statistics of softmax(hidden W^T + b) as differentiable vectors, in vocabulary-outer order.

Forward folds the vocabulary slab by slab into each row's online state; backward recomputes a slab's logits, turns
them into their gradient in place and writes that slab of dW once, final: it can be handed on while the next slab
computes.  Four GEMMs (one more in forward for ``jsd`` and for a top-K teacher with a "student" tail); any upstream
gradient of any statistic, row by row, is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import pages
from ..kernels.contract import (
    CONSTANT,
    DIFFERENTIABLE,
    coefficients,
    finalize,
    new_state,
    scale_coefficients,
    supported,
)
from ..kernels.launch import accumulator
from ..objectives.base import RowStats, asks
from . import shards
from .core import Rows, check_labels, make_rows, refuse_second_derivative, top_entropy, without_autocast
from .gemm import product
from .inputs import Asked, Common, check_budget, check_float, check_operands, prepare
from .lora import LoRAHead
from .shards import Shard
from .sinks import Sink, TensorSink, as_sink
from .slabs import Head, Options, Walk, join, keep_picked
from .teacher import Teacher

#: What ``weight`` may be beside a tensor; see ``linear_stats``.
Weight = Tensor | Sequence[Tensor] | LoRAHead
_LABEL_STATS = ("label", "logp", "hit", "teacher_logp")


def linear_stats(
    hidden: Tensor, weight: Weight, target: Tensor | None = None, *, stats: tuple[str, ...] = ("logp", "entropy"),
    bias: Tensor | None = None, teacher: Teacher | None = None, ids: Tensor | None = None, alpha: float = 1.0,
    eta: float = 0.0, beta: float = 0.5, top_k: int = 20, ignore_index: int = -100, scale: float = 1.0,
    softcap: float | None = None, temperature=1.0, budget: int | None = None, backend: str = "auto", sink=None,
    group=None,
) -> RowStats:  # fmt: skip
    """Statistics of every row of softmax(hidden W^T + bias), each differentiable for any upstream gradient.

    Args:
        hidden, bias, teacher, ids, scale, softcap, temperature, backend: as in ``linear_loss``.
        weight: the LM head (V, H), in one of these forms:

            * a tensor;
            * a list of row blocks (V_i, H), V = sum V_i, never joined: each gets its own gradient where it requires
              one, so ``[w[:a].detach(), leaf, w[b:].detach()]`` trains the rows a to b alone, and only their dW is
              formed;
            * a ``LoRAHead``: W + s B A, or DoRA's, without dW of a frozen base;
            * this rank's rows of a head sharded over ``group``, or a DTensor with ``Shard(0)`` on a mesh of one
              dimension: every rank of it calls with the *same* hidden states and labels (and its rows of the
              teacher's head or logits), gets the same statistics and the whole dX, and dW of its own rows.  Shards
              may be uneven.  The same inputs must require gradients on every rank.  (FSDP's ranks hold different
              tokens: there give the head that its hooks have made whole.)
        target: labels (N,) or (B, T); None if no statistic of the label is asked for.  On rows of ``ignore_index``
            the label's statistics are 0 without gradient; the others are as anywhere.
        stats: names of ``RowStats``; "entropy", "prob" and "ids_logp" stand for what they need.
        alpha, eta: the mix q = softmax(alpha z + eta t).  beta: of ``jsd``.  top_k: of ``top_entropy``.
        budget: bytes of scratch beside inputs, outputs and gradients; fixes slabs and tiles.
        sink: where each finished slab of dW goes in backward, in vocabulary order: a tensor (V, H), a callable
            ``f(rows: slice, slab)`` (the slab's memory is used again: copy what is to stay), or a
            ``burnish.HostSink``.  The head's tensor then gets no gradient from autograd, and each backward writes
            anew: to accumulate over micro-batches, add in a callable.  Under a group ``rows`` counts this rank's
            rows.  Not within torch.compile.
        group: process group over which the head's rows are sharded, in rank order; each call exchanges the shards'
            sizes and reads them on the host (a DTensor knows them).

    Returns a ``RowStats`` whose tensors have the rows' shape (``ids`` one dimension more), in fp32 (fp64 for fp64
    inputs).  Without a ``budget`` a row's statistics are bit-equal whatever other rows there are and in whatever
    order (fp32 and narrower; as far as the vendor's product of one size treats its rows alike).

    Memory beside inputs, outputs and gradients: at most ``budget``.  FLOPs: 8 N V H (+ 4 N V H_t).
    Raises ValueError or TypeError that names the argument and what it got; a second derivative is refused.
    """
    names, needs = asks("linear_stats", stats, eta)
    labels = set(_LABEL_STATS) & set(names)
    labelled = target is not None
    if target is None:
        if labels:
            raise ValueError(f"stats {', '.join(sorted(labels))} need target")
        check_float("hidden", hidden)
        target = torch.full(hidden.shape[:-1], ignore_index, dtype=torch.int64, device=hidden.device)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1]; got {beta}")
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k must be a whole number, at least 1; got {top_k!r}")
    if not (math.isfinite(alpha) and math.isfinite(eta)):
        raise ValueError(f"alpha and eta must be finite; got {alpha} and {eta}")
    given = resolve(hidden, weight, bias, teacher, group, sink)
    c = prepare(
        Asked("linear_stats", names, needs), hidden.shape[:-1], given.head.rows, hidden.device, target, ids=ids,
        sequences=None, token_weight=None, teacher=given.teacher, reduction="none", num_items=None, scale=scale,
        softcap=softcap, temperature=temperature, metrics=(), ignore_index=ignore_index,
        dtype=accumulator(given.compute),
    )  # fmt: skip
    check_budget(budget)
    rows = rows_of(c, given, 1.0, 1.0, ignore_index)
    values = differentiable_stats(
        given, c, rows, names, alpha=alpha, eta=eta, beta=beta, top_k=top_k, tau=1.0, teacher_tau=1.0,
        budget=budget, backend=backend, ignore_index=ignore_index,
    )  # fmt: skip
    for name in labels:
        values[name] = torch.where(rows.valid, values[name], 0.0)
    shape = target.shape
    normalizer = tuple(values[name].reshape(shape) for name in ("z_max", "z_log"))
    # copies: rows of one table are views that could not be written in place
    shown = {k: v.clone().reshape(*shape, *v.shape[1:]) for k, v in values.items() if k in names}
    return RowStats(valid=rows.valid.reshape(shape) if labelled else None, normalizer=normalizer, **shown)


@dataclasses.dataclass
class Given:
    """hidden (N, H) and a head in its parts, this rank's where it is sharded."""

    hidden: Tensor
    low: Tensor | None
    head: Head
    shard: Shard
    teacher: Teacher | None
    sink: Sink | None
    compute: torch.dtype


def resolve(hidden: Tensor, weight: Weight, bias: Tensor | None, teacher, group, sink) -> Given:
    """The forms of ``weight`` brought to one; checks shapes, devices and dtypes."""
    check_float("hidden", hidden)
    hidden = shards.replicated("hidden", hidden)
    sharded = None
    adapter = weight if isinstance(weight, LoRAHead) else None
    if adapter is not None:
        blocks = [adapter.weight]
    elif isinstance(weight, Tensor):
        blocks = [weight]
    elif isinstance(weight, (Sequence, torch.nn.ParameterList)) and len(weight):
        blocks = list(weight)
    else:
        raise TypeError(f"weight must be a tensor, a list of row blocks or a LoRAHead; got {type(weight).__name__}")
    if any(shards.is_dtensor(x) for x in blocks):
        if len(blocks) > 1 or adapter is not None or group is not None:
            raise ValueError("weight: a DTensor stands alone, without blocks, adapter or group: give local tensors")
        blocks[0], sharded = shards.local_rows("weight", blocks[0])
        if bias is not None and shards.is_dtensor(bias):
            bias, _ = shards.local_rows("bias", bias, blocks[0].shape[0])
    for block in blocks:
        check_float("weight", block)
        if block.device != hidden.device:
            raise ValueError(f"weight must be on {hidden.device}, as hidden is; got {block.device}")
        if block.ndim != 2 or block.shape[1:] != blocks[0].shape[1:] or block.dtype != blocks[0].dtype:
            shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in blocks)
            raise ValueError(f"weight: row blocks must be (V_i, H) of one dtype; got {shapes}")
    rows = sum(x.shape[0] for x in blocks)
    compute = check_operands(hidden, blocks[0], bias, rows)
    if sharded is None:
        sharded = shards.whole(rows) if group is None else shards.shard_of(rows, group, hidden.device)
    if sharded.group and teacher is not None:
        teacher = _local_teacher(teacher, rows)
    flat = hidden.flatten(0, -2)
    parts = Head(blocks, bias=bias)
    low = None
    if adapter is not None:
        low, parts.factor, parts.column = adapter.low_rank(flat), adapter.b, adapter.column_scale()
    sink = as_sink(sink, (rows, flat.shape[-1]))
    if sink is not None:
        if torch.compiler.is_compiling():
            raise ValueError("sink cannot be given within torch.compile: it is called from Python")
        if not any(x.requires_grad for x in blocks):
            raise ValueError("sink: no part of weight requires a gradient")
    return Given(flat, low, parts, sharded, teacher, sink, compute)


def _local_teacher(teacher: Teacher, rows: int) -> Teacher:
    changes: dict[str, Any] = {}
    for name in ("weight", "bias"):
        if shards.is_dtensor(getattr(teacher, name)):
            changes[name] = shards.local_rows(f"teacher.{name}", getattr(teacher, name))[0]
    if teacher.logits is not None and shards.is_dtensor(teacher.logits):
        raise ValueError("teacher.logits: give this rank's columns as a plain tensor; got a DTensor")
    if teacher.hidden is not None and shards.is_dtensor(teacher.hidden):
        changes["hidden"] = shards.replicated("teacher.hidden", teacher.hidden)
    teacher = dataclasses.replace(teacher, **changes) if changes else teacher
    for name, dim in (("weight", 0), ("logits", -1)):
        value = getattr(teacher, name)
        if value is not None and value.shape[dim] != rows:
            raise ValueError(f"teacher.{name} must have the head's {rows} rows on this rank; got {value.shape[dim]}")
    return teacher


def rows_of(c: Common, given: Given, tau: float, teacher_tau: float, ignore_index: int) -> Rows:
    """The checked arguments as rows on the head's device; an objective's ``tau`` is for both sides, ``teacher_tau`` for
    the teacher beside it."""
    device = given.hidden.device
    if c.target.device != device and not torch.compiler.is_compiling():  # the op sees them where looking would sync
        check_labels(c.target, given.shard.total, ignore_index)
    moved = [
        None if x is None else x.to(device, non_blocking=True)
        for x in (c.target, c.token_weight, c.temperature, c.sequence)
    ]
    return make_rows(
        accumulator(given.compute), tau, moved[0], moved[1], ignore_index, moved[2], c.flat_temperature,
        c.transforms.teacher_temperature * teacher_tau, c.ids, moved[3], c.inputs, c.names,
    )  # fmt: skip


def differentiable_stats(
    given: Given, c: Common, rows: Rows, stats: tuple[str, ...], *, alpha: float, eta: float, beta: float, top_k: int,
    tau: float, teacher_tau: float, budget: int | None, backend: str, ignore_index: int, live: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """{name: (N,)} of ``stats`` and of lse, label and logp; with ``supported`` where a teacher is folded.

    Rows that are not ``live`` (bool) get gradients of exact zero, whatever reaches them.
    """
    t, head = c.transforms, given.head
    target = torch.where(rows.valid, rows.target, ignore_index)
    options = Options(
        ",".join(stats), alpha, eta, beta, top_k, t.scale, t.softcap, t.teacher_scale, t.teacher_softcap,
        c.temperature is not None or c.flat_temperature != 1.0 or tau != 1.0,
        t.teacher_temperature * teacher_tau * tau != 1.0, c.teacher_kind, c.tail, ignore_index,
        -1 if budget is None else budget, given.compute, backend, *given.shard,
    )  # fmt: skip
    tensors = (
        given.hidden, given.low, head.factor, head.column, head.bias, target, live,
        rows.inv_temp, rows.teacher_inv_temp, rows.plain_inv_temp, c.ids,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        table, ids, *_ = _linear_stats(*tensors, c.teacher, head.blocks, *options)
    else:
        table, ids, *_ = _Stats.apply(*tensors, c.teacher, given.sink, options, *head.blocks)
    values = dict(zip(row_names(options), table.unbind(0), strict=True))
    constant = (*CONSTANT, "z_max", "z_log", "supported")
    values = {k: v.detach() if k in constant else v for k, v in values.items()}
    return {**values, "ids": ids} if "ids" in stats else values


def row_names(o: Options) -> tuple[str, ...]:
    """The rows of the table that forward makes."""
    spec = o.spec
    state = new_state(0, torch.float32, torch.device("cpu"))
    names = list(finalize(state, spec))
    names += ["supported"] if supported(state, spec) is not None else []
    names += ["top_entropy"] if spec.has("top_entropy") else []
    return tuple(names)


@without_autocast
def _forward(
    hidden: Tensor, low: Tensor | None, factor: Tensor | None, column: Tensor | None, bias: Tensor | None,
    target: Tensor, live: Tensor | None, inv_temp: Tensor, teacher_inv_temp: Tensor, plain_inv_temp: Tensor,
    ids: Tensor | None, teacher: list[Tensor], blocks: list[Tensor], stats: str, alpha: float, eta: float, beta: float,
    top_k: int, scale: float, softcap: float, teacher_scale: float, teacher_softcap: float, temperature: bool,
    teacher_temperature: bool, teacher_kind: str, tail: str, ignore_index: int, budget: int,
    compute_dtype: torch.dtype, backend: str, group: str, start: int, total: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The table (S, N), logits at ids (N, K), and of a "student" tail lse (N,) and logits at the list (N, K)."""
    o = Options(
        stats, alpha, eta, beta, top_k, scale, softcap, teacher_scale, teacher_softcap, temperature,
        teacher_temperature, teacher_kind, tail, ignore_index, budget, compute_dtype, backend, group, start, total,
    )  # fmt: skip
    check_labels(target, total, ignore_index, ids)
    walk = Walk(
        hidden, low, Head(blocks, factor, column, bias), target, inv_temp, teacher_inv_temp, plain_inv_temp, teacher,
        ids, o,
    )  # fmt: skip
    spec, dtype, n = walk.spec, walk.dtype, hidden.shape[0]
    parts = walk.parts()
    states = [new_state(p.stop - p.start, dtype, hidden.device) for p in parts]
    picked = inv_temp.new_full((n, ids.shape[1]) if ids is not None and spec.has("ids") else (0, 0), torch.nan)
    tops = [inv_temp.new_empty(p.stop - p.start, 0) for p in parts]  # raw logits, largest first
    fused = walk.fused and not picked.numel() and not spec.has("top_entropy")
    for slab in walk.slabs(whole=fused):
        for i, part in enumerate(parts):
            temps = walk.temperatures(part)
            if fused:
                walk.tile(part).fold(
                    *walk.heads(part, slab), states[i], walk.target[part], spec, start=slab.start, **temps
                )
                continue
            _, _, z, t = walk.logits(part, slab)
            walk.kernels.fold(z, t, states[i], walk.target[part], spec, start=slab.start, **temps)
            if picked.numel() and ids is not None:
                keep_picked(picked[part], z, ids[part], spec, slab.start, walk.inv[part])
            if spec.has("top_entropy"):
                both = torch.cat([tops[i], z.topk(min(spec.top_k, z.shape[1]), 1).values], 1)
                tops[i] = both.topk(min(spec.top_k, both.shape[1]), 1).values
    shard = o.shard
    state = shards.merge_state(join(states, inv_temp), shard, hit=spec.has("hit"))
    if spec.has("jsd"):
        states = [state[:, part].contiguous() for part in parts]
        for slab in walk.slabs():
            for part, own in zip(parts, states, strict=True):
                _, _, z, t = walk.logits(part, slab)
                walk.kernels.fold_jsd(z, t, own, spec, **walk.temperatures(part))
        state = join(states, inv_temp)
        shards.merge_jsd(state, shard)
    out = finalize(state, spec)
    if (some := supported(state, spec)) is not None:
        out["supported"] = some.to(dtype)
    if teacher_kind == "topk" and spec.has("teacher_logp"):
        out["teacher_logp"] = out["teacher_logp"] + out["teacher_lse"]  # true ones: not to be renormalised
    for name in {"label", "logp", "teacher_logp"} & set(out):  # NaN where there is no label; 0 * NaN is not 0
        out[name] = torch.where(target == ignore_index, 0.0, out[name])
    if spec.has("top_entropy"):
        top = torch.cat(tops) if parts else inv_temp.new_empty(0, 0)
        top = shards.merge_top(top, min(spec.top_k, total), shard)
        out["top_entropy"] = top_entropy(top, spec, inv_temp)
    lse, z_ids = walk.tail or (inv_temp.new_empty(0), inv_temp.new_empty(0, 0))
    return torch.stack(list(out.values())), shards.merge_picked(picked, shard), lse, z_ids


_linear_stats = torch.library.custom_op("burnish::linear_stats", _forward, mutates_args=())


@_linear_stats.register_fake
def _(hidden, low, factor, column, bias, target, live, inv_temp, teacher_inv_temp, plain_inv_temp, ids, teacher, blocks,
      *options):  # fmt: skip
    o = Options(*options)
    n, dtype = hidden.shape[0], accumulator(o.compute)
    width = ids.shape[1] if ids is not None and "ids" in o.stats.split(",") else 0
    student = o.tail == "student"
    return (
        hidden.new_empty((len(row_names(o)), n), dtype=dtype),
        hidden.new_empty((n, width) if width else (0, 0), dtype=dtype),
        hidden.new_empty((n if student else 0,), dtype=dtype),
        hidden.new_empty(tuple(teacher[0].shape) if student else (0, 0), dtype=dtype),
    )


def _gradient_like(weight: Tensor) -> Tensor:
    if weight.device.type == "cpu":
        return pages.empty(*weight.shape, dtype=weight.dtype)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _gradients(
    walk: Walk, table: Tensor, upstream: Tensor | None, picked: Tensor | None, live: Tensor | None,
    needs: tuple[bool, ...], sink: Sink | None,
) -> list[Tensor | None]:  # fmt: skip
    """dX, d low, d factor, d column, d bias, then dW of each block; None where it is not needed."""
    o, spec, dtype, head, n = walk.o, walk.spec, walk.dtype, walk.head, walk.hidden.shape[0]
    names = row_names(o)
    stats = dict(zip(names, table.unbind(0), strict=True))
    given = {} if upstream is None else dict(zip(names, upstream.unbind(0), strict=True))
    given = {k: v for k, v in given.items() if k in DIFFERENTIABLE}
    if "supported" in stats:  # a teacher without mass on the student's support: the row does not count
        live = stats["supported"] > 0 if live is None else live & (stats["supported"] > 0)
    ids = walk.ids if picked is not None and picked.numel() else None
    if ids is not None and picked is not None:
        picked = torch.where(ids >= 0, picked, 0.0)
    if live is not None:  # before their size is taken: what reaches a row that does not count may be NaN
        given = {k: torch.where(live, v, 0.0) for k, v in given.items()}
        picked = torch.where(live[:, None], picked, 0.0) if ids is not None and picked is not None else picked
    norm = None
    if walk.mode == "mixed":
        # a narrow dz must not carry the size of the upstream gradient, 1 / N or a loss scale: it is brought to 1 first
        sizes = [v.abs().amax() for v in (*given.values(), picked) if v is not None and v.numel()]
        norm = torch.stack(sizes).amax().to(dtype).clamp(min=torch.finfo(torch.float32).tiny) if sizes else None
    if norm is not None:
        given = {k: v / norm for k, v in given.items()}
        picked = None if picked is None else picked / norm
    coef = coefficients(stats, given, spec)
    if live is not None:
        coef = scale_coefficients(coef, live.to(dtype))
    parts = walk.parts()
    coefs = [coef[:, part].contiguous() for part in parts]
    device = walk.hidden.device

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype, device=device) if wanted else None

    dx = zeros(needs[0], n, walk.hidden.shape[1])
    du = zeros(needs[1], n, 0 if walk.low is None else walk.low.shape[1])
    df = zeros(needs[2], head.rows, 0 if head.factor is None else head.factor.shape[1])
    dc, db = zeros(needs[3], head.rows), zeros(needs[4], head.rows)
    needs_blocks = needs[5:]
    dw = [
        _gradient_like(w) if wanted and sink is None else None
        for w, wanted in zip(head.blocks, needs_blocks, strict=True)
    ]
    fused = walk.fused and ids is None and db is None
    low = torch.empty_like(walk.buffer, dtype=walk.operand) if walk.mode == "mixed" and not fused else None
    sinks: list[Sink | None] = [
        TensorSink(g) if g is not None else sink if wanted else None for wanted, g in zip(needs_blocks, dw, strict=True)
    ]
    # a tensor's rows are written by the fused kernel itself; those of several tiles are summed slab by slab
    direct = fused and all(p is None or (isinstance(p, TensorSink) and p.on_cpu()) for p in sinks)
    scale = float(norm) if direct and norm is not None else 1.0
    for slab in walk.slabs(whole=direct and len(parts) == 1):
        place = sinks[slab.block]
        # a sink of the caller's counts rows over all blocks; a gradient of ours over its own
        rows = slab.local if sink is not None else slab.rows
        final = place.out[rows] if direct and parts and isinstance(place, TensorSink) else None
        into = None
        if place is not None and (final is None or len(parts) > 1):
            into = place.slab(rows, walk.hidden.shape[1], dtype, device)
        weight = slab.weight if slab.column is None else slab.weight * slab.column[:, None].to(slab.weight.dtype)
        factor = slab.factor
        if factor is not None and slab.column is not None:
            factor = factor * slab.column[:, None].to(factor.dtype)
        for i, part in enumerate(parts):
            if fused:
                walk.tile(part).grad(
                    *walk.heads(part, slab), None if dx is None else dx[part], into, coefs[i], walk.target[part], spec,
                    add=i > 0, out=final if part is parts[-1] else None, factor=scale, start=slab.start,
                    **walk.temperatures(part),
                )  # fmt: skip
                continue
            x, u, z, t = walk.logits(part, slab)
            dz = z if low is None else low[: z.numel()].view(z.shape)
            walk.kernels.grad(
                z, t, dz, coefs[i], walk.target[part], spec, start=slab.start, ids=None if ids is None else ids[part],
                ids_grad=None if ids is None or picked is None else picked[part], **walk.temperatures(part),
            )  # fmt: skip
            if dx is not None:
                product(dz, weight, dx[part], add=True)
            if du is not None and factor is not None:
                product(dz, factor, du[part], add=True)
            if df is not None:
                product(dz.t(), u, df[slab.local], add=True)
            if into is not None:
                product(dz.t(), x, into, add=i > 0)
            if dc is not None:
                dc[slab.local] += walk.raw_logits(part, slab).mul_(dz).sum(0)
            if db is not None:
                db[slab.local] += dz.sum(0, dtype=dtype)
        if into is not None and place is not None and final is None:
            if not parts:
                into.zero_()
            if slab.column is not None:
                into.mul_(slab.column[:, None])
            if norm is not None:
                into.mul_(norm)
            place.put(rows, into)
    for place in sinks if sink is None else [sink]:
        if place is not None:
            place.close()
    for g in (dx, du):
        if g is not None:
            shards.all_reduce(g, o.shard)
    if df is not None and head.column is not None:
        df.mul_(head.column.to(dtype)[:, None])
    kinds = [None if x is None else x.dtype for x in (walk.hidden, walk.low, head.factor, head.column, head.bias)]
    small = [
        None if g is None or kind is None else (g if norm is None else g.mul_(norm)).to(kind)
        for g, kind in zip((dx, du, df, dc, db), kinds, strict=True)
    ]
    return [*small, *dw]


@without_autocast
def _backward(
    upstream: Tensor | None, picked: Tensor | None, table: Tensor, tail_lse: Tensor, tail_ids: Tensor,
    needs: list[bool],
    hidden: Tensor, low: Tensor | None, factor: Tensor | None, column: Tensor | None, bias: Tensor | None,
    target: Tensor, live: Tensor | None, inv_temp: Tensor, teacher_inv_temp: Tensor, plain_inv_temp: Tensor,
    ids: Tensor | None, teacher: list[Tensor], blocks: list[Tensor], stats: str, alpha: float, eta: float, beta: float,
    top_k: int, scale: float, softcap: float, teacher_scale: float, teacher_softcap: float, temperature: bool,
    teacher_temperature: bool, teacher_kind: str, tail: str, ignore_index: int, budget: int,
    compute_dtype: torch.dtype, backend: str, group: str, start: int, total: int,
) -> list[Tensor]:  # fmt: skip
    """The gradients of ``_gradients``, empty where one is not needed: a registered op returns tensors."""
    o = Options(
        stats, alpha, eta, beta, top_k, scale, softcap, teacher_scale, teacher_softcap, temperature,
        teacher_temperature, teacher_kind, tail, ignore_index, budget, compute_dtype, backend, group, start, total,
    )  # fmt: skip
    saved = (hidden, low, factor, column, bias, target, live, inv_temp, teacher_inv_temp, plain_inv_temp, ids)
    grads = _run_backward(upstream, picked, (table, tail_lse, tail_ids), saved, teacher, blocks, o, tuple(needs), None)
    return [hidden.new_empty(0) if g is None else g for g in grads]


def _run_backward(upstream, picked, outputs, saved, teacher, blocks, o: Options, needs: tuple[bool, ...], sink):
    table, tail_lse, tail_ids = outputs
    hidden, low, factor, column, bias, target, live, inv_temp, teacher_inv, plain_inv, ids = saved
    walk = Walk(
        hidden, low, Head(blocks, factor, column, bias), target, inv_temp, teacher_inv, plain_inv, teacher, ids, o,
        keep_raw=needs[3], tail=(tail_lse, tail_ids) if o.tail == "student" else None,
    )  # fmt: skip
    return _gradients(walk, table, upstream, picked, live, needs, sink)


_linear_stats_backward = torch.library.custom_op("burnish::linear_stats_backward", _backward, mutates_args=())


@_linear_stats_backward.register_fake
def _(upstream, picked, table, tail_lse, tail_ids, needs, hidden, low, factor, column, bias, target, live, inv_temp,
      teacher_inv_temp, plain_inv_temp, ids, teacher, blocks, *options):  # fmt: skip
    inputs = (hidden, low, factor, column, bias, *blocks)
    return [
        hidden.new_empty(0) if not wanted or x is None else x.new_empty(x.shape)
        for x, wanted in zip(inputs, needs, strict=True)
    ]


#: Tensor arguments before the teacher's list.
_TENSORS = 11


def _keep(ctx, inputs, output):
    tensors, (teacher, blocks, *options) = inputs[:_TENSORS], inputs[_TENSORS:]
    table, _, lse, z_ids = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, z_ids)
    ctx.options, ctx.sizes = Options(*options), (len(teacher), len(blocks))
    ctx.save_for_backward(table, lse, z_ids, *tensors, *teacher, *blocks)


def _saved(ctx):
    table, lse, z_ids, *rest = ctx.saved_tensors
    tensors, rest = rest[:_TENSORS], rest[_TENSORS:]
    return (table, lse, z_ids), tensors, rest[: ctx.sizes[0]], rest[ctx.sizes[0] :]


def _op_backward(ctx, upstream, picked, *_):
    outputs, tensors, teacher, blocks = _saved(ctx)
    flags = ctx.needs_input_grad
    needs = [*flags[:5], *flags[_TENSORS + 1]]
    given: list = [None] * (len(tensors) + 2 + len(ctx.options))
    given[_TENSORS] = [None] * len(teacher)
    given[_TENSORS + 1] = [None] * len(blocks)
    if upstream is None and picked is None:
        return tuple(given)
    grads = _linear_stats_backward(upstream, picked, *outputs, needs, *tensors, teacher, blocks, *ctx.options)
    grads = [g if wanted else None for g, wanted in zip(grads, needs, strict=True)]
    given[:5], given[_TENSORS + 1] = grads[:5], grads[5:]
    return tuple(given)


_linear_stats.register_autograd(_op_backward, setup_context=_keep)


class _Stats(torch.autograd.Function):
    """The op in eager mode, where profilers, memory counters and dispatch modes can see inside; with a sink."""

    @staticmethod
    def forward(*args):
        tensors, (teacher, _, options, *blocks) = args[:_TENSORS], args[_TENSORS:]
        return _forward(*tensors, teacher, blocks, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, (teacher, ctx.sink, options, *blocks) = inputs[:_TENSORS], inputs[_TENSORS:]
        _keep(ctx, (*tensors, teacher, blocks, *options), output)

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, upstream, picked, *_):
        flags = ctx.needs_input_grad
        others: list = [None] * (_TENSORS - 5 + 3)
        if upstream is None and picked is None:
            return (None,) * len(flags)
        needs = (*flags[:5], *flags[_TENSORS + 3 :])
        run = without_autocast(_run_backward)
        outputs, tensors, teacher, blocks = _saved(ctx)
        grads = run(upstream, picked, outputs, tensors, teacher, blocks, ctx.options, needs, ctx.sink)
        return (*grads[:5], *others, *grads[5:])
