"""``linear_loss``: any token objective fused with the LM head, logits never whole.

Token-outer order (``plan="tokens"``): for a chunk of tokens, logits -> fold -> objective -> gradient in place -> dX of
the chunk, dW += .  Three GEMMs, gradients made in forward, exact for one upstream scalar (``mean``, ``sum``).
Vocabulary-outer order (``plan="vocab"``): the objective's lines on ``linear_stats``, four GEMMs, exact for any upstream
gradient; for ``reduction="none"`` and for heads in parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import dispatch, pages
from ..kernels.launch import accumulator
from . import gemm, geometry, shards
from .core import (
    METRICS,
    Rows,
    Task,
    Transforms,
    check_labels,
    couple,
    dense_teacher,
    evaluate,
    make_rows,
    metric,
    refuse_second_derivative,
    registered,
    view,
    without_autocast,
    write_grad,
)
from .gemm import Head, teacher_head
from .inputs import Common, check_budget, check_operands, prepare, unpack
from .linear_stats import Given, Weight, differentiable_stats, resolve, rows_of
from .row_loss import couple_rows, reduce
from .teacher import Teacher, cut

PLANS = ("auto", "tokens", "vocab")
HIDDEN_GRAD, WEIGHT_GRAD, BIAS_GRAD = 1, 2, 4
#: Bytes of a gradient that are scaled and rounded at once.
_CAST_BYTES = 4 << 20
#: ``num_valid`` codes for "not given" and "read it from the device".
_UNKNOWN, _SYNC = -1, -2
#: Devices on which the rows that count are not read back, so that ``num_valid`` bounds them.
_BOUNDED_ON = dispatch.GPU_DEVICES


def linear_loss(
    hidden: Tensor, weight: Weight, target: Tensor, objective, *, bias: Tensor | None = None,
    token_weight: Tensor | None = None, teacher: Teacher | None = None, ids: Tensor | None = None,
    sequences: Tensor | None = None, inputs: Mapping[str, Tensor] | None = None, reduction: str = "mean",
    num_items=None, num_valid: int | str | None = None, ignore_index: int = -100, scale: float = 1.0,
    softcap: float | None = None, temperature=1.0, metrics: tuple[str, ...] = (), plan: str = "auto",
    budget: int | None = None, backend: str = "auto", sink=None, group=None,
):  # fmt: skip
    r"""A token objective on softmax(hidden W^T + bias), fused with the projection.

    Args:
        hidden: (N, H) or (B, T, H), not shifted: row i is scored against target i.
        weight: (V, H), the LM head; the tied embedding itself may be given.  Or row blocks, a ``LoRAHead``, rows
            sharded over ``group``, a DTensor: the forms of ``linear_stats``.
        target: (N,) or (B, T) int64; ``ignore_index`` rows count nowhere.  A label outside the
            vocabulary is a ValueError on the CPU and a NaN loss elsewhere.  May lie on the CPU while hidden
            is on a GPU: the rows that count are then known without a device sync.
        objective: ``burnish.objectives.*`` or your own (``burnish.objective``).
        bias: (V,).
        token_weight: target's shape, or (B,) for a (B, T) target; multiplies each loss.  Rows with 0 count in the
            mean's denominator but are not projected.  Not differentiated.
        teacher: ``burnish.Teacher``, where the objective needs one.
        ids: target's shape + (K,) int64, -1 for none, for objectives that read ``ids``.
        sequences: target's shape, int64; for objectives that couple or count a sequence's tokens.  A (B, T)
            target has its rows as sequences by default.
        inputs: {name: target's shape, or (B,) or (B, 1) for a (B, T) target}, floats, for objectives with inputs of
            their own (``advantages``, ``old_logp``, ...); on hidden's device or target's.  Not differentiated.
        reduction: "mean" (over labels that are not ignored, whatever their weight; 0 if there is none; some objectives
            take it over sequences, ``Objective.aggregate``), "sum" or "none".
        num_items: denominator of the mean instead: a number or 0-dim tensor, for gradient accumulation
            (``objectives.count_items``); 0 counts as 1.
        num_valid: upper bound on the rows that count, so that a GPU can drop the others before
            projecting without a sync; "sync" reads the number from the device.  Not needed on the CPU.
        scale, softcap, temperature: z = softcap tanh(scale z / softcap) / temperature; temperature is a
            number, a 0-dim tensor, or one a token.
        metrics: per-token diagnostics to return: nll, logp, entropy, hit, lse, square, top_entropy.
        plan: "tokens" (three GEMMs; a mean or a sum over a head that is one tensor, rows that do not interact) or
            "vocab" (four; everything, and the gradients of any upstream); "auto" takes "tokens" where it can be,
            but on a CPU with tile registers, where "vocab" keeps a bf16 head's logits in the cores' caches (without a
            budget, outside a compiled graph).
        budget: bytes of scratch beside inputs, outputs and gradients; fixes the chunk size.  Default:
            what 256 tokens need on a CPU, 1024 elsewhere; in the vocabulary-outer order, a slab's tile.
        backend: "auto" (the tensors' device), "triton", "host" (C++ on the CPU) or "torch".
        sink, group: as in ``linear_stats``; they ask for the vocabulary-outer order.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), 0-dim or of target's shape; with ``metrics`` a pair
        (loss, {name: tensor of target's shape}), constants, 0 on rows that do not count.

    Gradients of hidden, weight and bias, each skipped where it is not required.  Inputs may be bf16 or
    fp16: logits, losses and the accumulators of dW and dX are fp32 all the same, and each gradient is rounded
    once, after the upstream gradient has multiplied it.  Under autocast products on a GPU take its dtype (elsewhere
    they stay exact), and dW keeps the weight's.  A second derivative is refused.

    Memory beside inputs, outputs and gradients: at most ``budget``.  FLOPs: 6 N V H (+ 2 N V H_t); 8 N V H
    (+ 4 N V H_t) in the vocabulary-outer order.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}; got {plan!r}")
    check_budget(budget)
    if num_valid is None:
        valid = _UNKNOWN
    elif num_valid == "sync":
        valid = _SYNC
    elif isinstance(num_valid, int) and num_valid >= 0:
        valid = min(num_valid, target.numel())
    else:
        raise ValueError(f"num_valid must be a number of rows, 'sync' or None; got {num_valid!r}")
    options = {
        "ids": ids, "sequences": sequences, "token_weight": token_weight, "reduction": reduction,
        "num_items": num_items, "scale": scale, "softcap": softcap, "temperature": temperature, "metrics": metrics,
        "ignore_index": ignore_index, "inputs": inputs,
    }  # fmt: skip
    parts = not isinstance(weight, Tensor) or shards.is_dtensor(weight) or sink is not None or group is not None
    joint = getattr(objective, "joint", False)
    vocab = plan == "vocab" or parts or joint or reduction == "none"
    if plan == "auto" and budget is None and not vocab:
        vocab = _stays_in_cache(hidden, weight, bias, objective, teacher, metrics, backend)
    if vocab:
        if plan == "tokens":
            raise ValueError(
                "plan='tokens' makes its gradients in forward: it takes a head that is one tensor and reduction "
                "'mean' or 'sum', no sink, no group, and no objective whose rows interact; got "
                + (f"objective {objective.name!r}" if joint else f"reduction={reduction!r}")
            )
        given = resolve(hidden, weight, bias, teacher, group, sink)
        c = prepare(
            objective, hidden.shape[:-1], given.head.rows, hidden.device, target, teacher=given.teacher,
            dtype=accumulator(given.compute), **options,
        )  # fmt: skip
        loss, table = _vocabulary_outer(given, c, objective, reduction, ignore_index, valid, budget, backend)
        return unpack(loss, table, target.shape, reduction, c.metrics)
    assert isinstance(weight, Tensor)
    compute = check_operands(hidden, weight, bias)
    c = prepare(
        objective, hidden.shape[:-1], weight.shape[0], hidden.device, target, teacher=teacher,
        dtype=accumulator(compute), **options,
    )  # fmt: skip
    needs = 0
    if torch.is_grad_enabled():
        needs |= HIDDEN_GRAD if hidden.requires_grad else 0
        needs |= WEIGHT_GRAD if weight.requires_grad else 0
        needs |= BIAS_GRAD if bias is not None and bias.requires_grad else 0
    t = c.transforms
    op = _LinearLoss.apply
    if torch.compiler.is_compiling():
        # a registered op; eager mode runs the same function where profilers, memory counters and
        # dispatch modes can see inside
        op = _linear_loss
    loss, table, *_ = op(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, c.target, c.token_weight, c.temperature, c.denominator,
        c.ids, c.sequence, c.teacher, objective.key, c.teacher_kind, c.tail, t.scale, t.softcap, t.teacher_scale,
        t.teacher_softcap, t.teacher_temperature, c.flat_temperature, ignore_index, valid,
        -1 if budget is None else budget, needs, compute, reduction, c.metrics, backend, c.inputs, c.names,
    )  # fmt: skip
    return unpack(loss, table, target.shape, reduction, c.metrics)


def _stays_in_cache(hidden, weight, bias, objective, teacher, metrics, backend: str) -> bool:
    """Whether the vocabulary-outer order's one more product costs less than logits that leave the cache do."""
    kind, device = weight.dtype, weight.device
    if torch.compiler.is_compiling() or device.type != "cpu" or not kind == hidden.dtype == torch.bfloat16:
        return False  # a graph is traced without looking at the machine
    if bias is not None and bias.requires_grad:
        return False
    head = teacher is not None and teacher.logits is None  # or a list, which has no weight
    if head and (teacher.weight is None or not teacher.weight.dtype == teacher.hidden.dtype == kind):
        return False
    stats = {*getattr(objective, "stats", ()), *(s for n in metrics for s in METRICS.get(n, ()))}
    if stats & {"ids", "top_entropy", "jsd"}:
        return False
    return gemm.mode(kind, kind, device, torch.float32, dispatch.resolve(backend, device)) == "mixed"


def _vocabulary_outer(
    given: Given, c: Common, objective, reduction: str, ignore_index: int, num_valid: int, budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and metrics (M, N): the objective's own lines on differentiable statistics."""
    tau, teacher_tau = objective.temperature, objective.teacher_temperature
    every = rows = rows_of(c, given, tau, teacher_tau, ignore_index)
    device, n = given.hidden.device, given.hidden.shape[0]
    index = real = None
    if not torch.compiler.is_compiling():  # a traced graph has the shapes of all rows
        index = _kept(c.target, c.token_weight, ignore_index, num_valid, device)
    if index is not None:
        rows, real = _take_rows(every, index, c.target, num_valid)
        low = None if given.low is None else given.low.index_select(0, index)
        given = dataclasses.replace(given, hidden=given.hidden.index_select(0, index), low=low)
        teacher = [
            x if c.teacher_kind == "hidden" and i > 0 else x.index_select(0, index) for i, x in enumerate(c.teacher)
        ]
        c = dataclasses.replace(c, ids=rows.ids, teacher=teacher)
    names = [n for n in c.metrics.split(",") if n]
    stats = dict.fromkeys((*objective.stats, *objective.couple_stats, *(s for n in names for s in METRICS[n])))
    values = differentiable_stats(
        given, c, rows, tuple(stats), alpha=objective.alpha, eta=objective.eta, beta=objective.beta,
        top_k=objective.top_k, tau=tau, teacher_tau=teacher_tau, budget=budget, backend=backend,
        ignore_index=ignore_index, live=rows.factor != 0,
    )  # fmt: skip
    factor = rows.factor
    table = factor.new_empty(0, factor.shape[0])
    if names:
        shown = torch.stack([metric(name, values).detach() for name in names])
        table = torch.where(factor != 0, shown, 0.0)
    if objective.couple is not None:
        constant = {k: values[k].detach().clone() for k in (*objective.couple_stats, "lse", "z_max", "z_log")}
        rows.weight = couple(objective, constant, rows, factor.dtype)
    # copies: an objective's lines may write in place
    visible = {k: values[k].clone() for k in (*objective.stats, "lse", "z_max", "z_log")}
    if "supported" in values:
        factor = torch.where(values["supported"] > 0, factor, 0.0)
    losses = torch.where(factor != 0, objective(view(objective, visible, rows)) * factor, 0.0)
    loss, _ = reduce(losses, every, reduction, c.denominator)
    if reduction == "none":
        loss = _spread(loss, index, real, n)
    return loss, _spread(table, index, real, n)


class _Pass:
    """One walk over the chunks of the rows that count: buffers, tiles and gradient accumulators."""

    def __init__(
        self, hidden, weight, bias, target, token_weight, temperature, ids, sequence, teacher, objective, teacher_kind,
        tail, transforms: Transforms, flat_temperature, ignore_index, num_valid, budget, needs, compute_dtype, metrics,
        backend, inputs, names,
    ):  # fmt: skip
        device = hidden.device
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        self.teacher = teacher = cut(teacher, teacher_kind, weight.shape[0])
        self.task = task = Task.bind(
            objective, transforms, metrics=metrics, backend=backend, device=device, dtype=accumulator(compute_dtype),
            teacher=teacher_kind, tail=tail, temperature=temperature is not None or flat_temperature != 1.0,
        )  # fmt: skip
        check_labels(target, weight.shape[0], ignore_index, ids)
        self.index = _kept(target, token_weight, ignore_index, num_valid, device)
        moved = [
            None if x is None else x.to(device, non_blocking=True)
            for x in (target, token_weight, temperature, sequence)
        ]
        rows = make_rows(
            task.dtype, task.objective.temperature, moved[0], moved[1], ignore_index, moved[2], flat_temperature,
            transforms.teacher_temperature * task.objective.teacher_temperature, ids, moved[3], inputs, names,
        )  # fmt: skip
        self.all_rows = rows
        self.rows, self.real = _take_rows(rows, self.index, target, num_valid)
        self.count = self.rows.target.shape[0]
        self.head = Head(weight, bias, compute_dtype, task.dtype, task.backend)
        self.teacher_head = teacher_head(teacher, task.dtype, task.backend) if teacher_kind == "hidden" else None
        self.geometry = geometry.chunks(
            rows=hidden.shape[0], vocabulary=weight.shape[0], hidden=hidden.shape[1],
            teacher_hidden=teacher[0].shape[1] if teacher_kind == "hidden" else 0, weight_dtype=weight.dtype,
            compute_dtype=compute_dtype, device=device, teacher=teacher_kind, weight_grad=bool(needs & WEIGHT_GRAD),
            bias_grad=bool(needs & BIAS_GRAD), backend=task.backend,
            budget=None if budget < 0 else budget,
            hidden_grad=bool(needs & HIDDEN_GRAD),
            ids=(teacher[0].shape[1] if teacher_kind == "topk" else 0) + (0 if ids is None else ids.shape[1]),
            teacher_itemsize=teacher[0].element_size() if teacher_kind == "logits" else 4,
            inputs=0 if inputs is None else inputs.shape[1],
        )  # fmt: skip
        size = min(self.geometry.rows, self.count)
        # columns beyond the vocabulary are masked logits: rows of whole 16s are moved 16 bytes at a time.  Not under a
        # softcap, which makes -inf finite, nor beside logits that are given
        self.columns = weight.shape[0]
        plain = teacher_kind == "logits" or task.spec.softcap
        width = self.columns if plain else geometry.whole_columns(self.columns)
        if width > self.columns:  # no label or id may fall there
            self.rows.target = torch.where(self.rows.target >= self.columns, -2, self.rows.target)
            if self.rows.ids is not None:
                self.rows.ids = torch.where(self.rows.ids >= self.columns, -1, self.rows.ids)
        self.tile = self._empty(size, width)
        self.out = self.tile
        if self.head.mode == "mixed" and needs and task.backend == "host":
            # in the tile's own memory: a thread of the host's kernel reads a block of a row before it writes it
            self.out = self.tile.view(self.head.operand)[:, :width]
        elif self.head.mode == "mixed" and needs:
            self.out = torch.empty(self.tile.shape, dtype=self.head.operand, device=device)
        # with a teacher's head or list its logits need a tile of their own
        self.teacher_tile = self._empty(*(self.tile.shape if teacher_kind in ("hidden", "topk") else (0,)))

    def _empty(self, *shape: int) -> Tensor:
        """A buffer of the accumulator's dtype."""
        if self.task.backend == "host":
            return pages.empty(*shape, dtype=self.task.dtype)
        return torch.empty(shape, dtype=self.task.dtype, device=self.hidden.device)

    def chunks(self):
        for start in range(0, self.count, max(1, self.geometry.rows)):
            yield slice(start, min(start + self.geometry.rows, self.count))

    def _take(self, x: Tensor, part: slice) -> Tensor:
        return x[part] if self.index is None else x[self.index[part]]

    def project(self, part: slice):
        """x, logits and teacher logits of a chunk."""
        x = self._take(self.hidden, part).to(self.head.operand)
        tile, columns = self.tile[: x.shape[0]], slice(0, self.columns)
        self.head.project(x, tile[:, columns])
        tile[:, self.columns :] = -torch.inf
        rows = self.rows.at(part)
        if not self.teacher:
            return x, tile, None, rows
        if self.task.teacher == "logits":
            t = self._take(self.teacher[0], part)
            return x, tile, t if t.stride(1) == 1 else t.contiguous(), rows
        t = self.teacher_tile[: x.shape[0]]
        t[:, self.columns :] = 0.0
        ours, theirs = self._take(self.teacher[0], part), t[:, columns]
        if self.teacher_head is not None:
            self.teacher_head.project(ours.to(self.teacher_head.operand), theirs)
        else:
            dense_teacher(self.task, theirs, tile[:, columns], ours, self._take(self.teacher[1], part), rows)
        return x, tile, t, rows

    def start_gradients(self):
        needs, head = self.needs, self.head
        make = torch.empty if self.index is None and self.count else torch.zeros
        shape = self.hidden.shape if needs & HIDDEN_GRAD else (0,)
        self.dx = make(shape, dtype=head.dtype, device=self.hidden.device)
        # dW's first chunk overwrites; without a chunk it is zero
        self.dw = self._empty(*(self.weight.shape if needs & WEIGHT_GRAD else (0,)))
        if not self.count:
            self.dw.zero_()
        size = self.bias.shape if needs & BIAS_GRAD else (0,)
        self.db = torch.zeros(size, dtype=head.dtype, device=self.weight.device)

    def accumulate(self, part: slice, x, tile, t, rows: Rows, coef, ids_grad) -> None:
        """The chunk's gradients, in the accumulator's dtype."""
        dz = self.out[: x.shape[0]]
        write_grad(self.task, tile, t, dz, coef, ids_grad, rows)
        dz = dz[:, : self.columns]
        if self.needs & HIDDEN_GRAD:
            dx = self.head.input_grad(dz)
            if self.index is None:
                self.dx[part] = dx
            elif self.real is None:
                self.dx.index_copy_(0, self.index[part], dx)
            else:  # repeated places are exact zeros
                self.dx.index_add_(0, self.index[part], dx)
        if self.needs & WEIGHT_GRAD:
            self.head.weight_grad(dz, x, self.dw, first=part.start == 0)
        if self.needs & BIAS_GRAD:
            self.db += dz.sum(0, dtype=self.db.dtype)


def _take_rows(rows: Rows, index: Tensor | None, target: Tensor, num_valid: int) -> tuple[Rows, Tensor | None]:
    """The rows that count, and which of them are real where ``num_valid`` is a bound, not a count.

    The places it overshoots repeat row 0 with weight 0.
    """
    if index is None:
        return rows, None
    kept = rows.at(index)
    if num_valid < 0 or target.device.type not in _BOUNDED_ON:
        return kept, None
    real = torch.arange(len(index), device=index.device) < (rows.factor != 0).sum()
    kept.factor, kept.valid = kept.factor * real, kept.valid & real
    return kept, real


def _spread(values: Tensor, index: Tensor | None, real: Tensor | None, rows: int) -> Tensor:
    """(..., kept rows) -> (..., N), zeros elsewhere."""
    if index is None:
        return values
    if real is not None:
        values = torch.where(real, values, 0.0)
    return values.new_zeros(*values.shape[:-1], rows).index_add(-1, index, values)


def _kept(target, token_weight, ignore_index, num_valid, device) -> Tensor | None:
    """Indices of the rows that count, or None where all do or where finding out would sync."""
    on_host = target.device.type == "cpu"
    if not on_host and num_valid == _UNKNOWN:
        return None
    mask = target != ignore_index
    if token_weight is not None and token_weight.device == target.device:
        mask = mask & (token_weight != 0)
    if not on_host and num_valid >= 0:
        return torch.nonzero_static(mask, size=num_valid, fill_value=0)[:, 0]
    index = mask.nonzero()[:, 0]
    return None if index.shape[0] == mask.shape[0] else index.to(device, non_blocking=True)


@without_autocast
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None,
    temperature: Tensor | None, denominator: Tensor | None, ids: Tensor | None, sequence: Tensor | None,
    teacher: list[Tensor], objective: str, teacher_kind: str, tail: str, scale: float, softcap: float,
    teacher_scale: float, teacher_softcap: float, teacher_temperature: float, flat_temperature: float,
    ignore_index: int, num_valid: int, budget: int, needs: int, compute_dtype: torch.dtype, reduction: str,
    metrics: str, backend: str, inputs: Tensor | None, names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, metrics (M, N), dX, dW, db, 1 / count; what is not needed is empty.

    dX, dW and db are those of the *sum*, in the accumulator's dtype: the mean's denominator and the upstream
    gradient are applied together in backward, before the one rounding to the operands' dtype.  A gradient of
    fp16 that carried 1 / N would underflow, and one that met a loss scale after rounding would overflow.
    """
    walk = _Pass(
        hidden, weight, bias, target, token_weight, temperature, ids, sequence, teacher, objective, teacher_kind, tail,
        Transforms(scale, softcap, teacher_scale, teacher_softcap, teacher_temperature), flat_temperature,
        ignore_index, num_valid, budget, needs, compute_dtype, metrics, backend, inputs, names,
    )  # fmt: skip
    task = walk.task
    # everything the sum is divided by is known before the first chunk
    _, inverse = reduce(walk.rows.factor[:0], walk.all_rows, reduction, denominator)
    if task.objective.couple is not None:
        walk.rows.weight = couple_rows(task, (walk.project(part)[1:] for part in walk.chunks()), walk.rows)
    losses = walk.rows.factor.new_zeros(walk.count)
    table = losses.new_zeros(len(task.metrics), walk.count)
    if needs:
        walk.start_gradients()
    for part in walk.chunks():
        x, tile, t, rows = walk.project(part)
        losses[part], table[:, part], coef, ids_grad = evaluate(task, tile, t, rows, gradients=bool(needs))
        if needs:
            walk.accumulate(part, x, tile, t, rows, coef, ids_grad)
    total = losses.sum()
    loss = total if inverse is None else total * inverse
    grads = (walk.dx, walk.dw, walk.db) if needs else tuple(losses.new_empty(0) for _ in range(3))
    inverse = losses.new_ones(()) if inverse is None else inverse
    return loss, _spread(table, walk.index, walk.real, hidden.shape[0]), *grads, inverse


_linear_loss = registered("burnish::linear_loss", _forward)


@_linear_loss.register_fake
def _(hidden, weight, bias, target, token_weight, temperature, denominator, ids, sequence, teacher, objective,
      teacher_kind, tail, scale, softcap, teacher_scale, teacher_softcap, teacher_temperature, flat_temperature,
      ignore_index, num_valid, budget, needs, compute_dtype, reduction, metrics, backend, inputs, names):  # fmt: skip
    n, dtype = hidden.shape[0], accumulator(compute_dtype)
    count = len([m for m in metrics.split(",") if m])
    dx = hidden.new_empty(hidden.shape if needs & HIDDEN_GRAD else (0,), dtype=dtype)
    dw = weight.new_empty(weight.shape if needs & WEIGHT_GRAD else (0,), dtype=dtype)
    db = hidden.new_empty(bias.shape if needs & BIAS_GRAD else (0,), dtype=dtype)
    one = hidden.new_empty((), dtype=dtype)
    return one, hidden.new_empty((count, n), dtype=dtype), dx, dw, db, hidden.new_empty((), dtype=dtype)


def _scaled(g: Tensor, factor: Tensor, dtype: torch.dtype, *, own: bool, host: bool) -> Tensor:
    """factor * g, multiplied in g's dtype and rounded once to ``dtype``; in g itself where it is ours to use up."""
    factor = factor.to(g.dtype)
    if dtype == g.dtype:
        return g.mul_(factor) if own else g * factor
    if host and g.dtype == torch.float32 and g.is_contiguous():
        return dispatch.rows("host").scaled(g, factor.item(), dtype)
    if g.ndim < 2:
        return (g * factor).to(dtype)
    out = torch.empty(g.shape, dtype=dtype, device=g.device)
    step = max(1, _CAST_BYTES // (g.shape[1] * g.element_size()))
    for start in range(0, g.shape[0], step):  # never a second full-precision copy
        out[start : start + step] = g[start : start + step] * factor
    return out


def _keep(ctx, inputs, output):
    hidden, weight, bias, *_ = inputs
    _, table, dx, dw, db, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(table, dx, dw, db, inverse)
    ctx.needs = inputs[22]
    ctx.host = dispatch.resolve(inputs[-3], hidden.device, build=False) == "host"
    ctx.inputs, ctx.teachers = len(inputs), len(inputs[9])
    ctx.kinds = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.save_for_backward(dx, dw, db, inverse)


def _backward(ctx, upstream, *_, eager: bool = False):
    rest: list = [None] * (ctx.inputs - 3)
    rest[6] = [None] * ctx.teachers
    if upstream is None:
        return None, None, None, *rest
    *sums, inverse = ctx.saved_tensors
    own = eager and _owns_what_it_saved(ctx, upstream)
    factor = upstream * inverse
    host = eager and ctx.host and not _batched(upstream)
    grads = tuple(
        _scaled(g, factor, dtype, own=own, host=host) if ctx.needs & bit else None
        for g, dtype, bit in zip(sums, ctx.kinds, (HIDDEN_GRAD, WEIGHT_GRAD, BIAS_GRAD), strict=True)
    )
    return *grads, *rest


def _owns_what_it_saved(ctx, upstream: Tensor) -> bool:
    """Whether the saved gradients may be scaled where they lie, so that dW never exists twice.

    A graph that is freed after this call has them to itself.  Not so a graph that is kept, whose second backward must
    find them as they were, nor one whose saved tensors a hook holds; and a batch of upstream gradients does not fit.
    """
    return not (ctx.hooked or _batched(upstream) or torch._C._autograd._get_current_graph_task_keep_graph())


def _batched(x: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


_linear_loss.register_autograd(_backward, setup_context=_keep)


class _LinearLoss(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs, output)
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, *upstream):
        grads = without_autocast(_backward)(ctx, *upstream, eager=True)
        return *grads[:9], None, *grads[10:]  # a list of tensors is no input that autograd knows
