"""``row_loss``: any objective on logits that already exist, and ``implied_target``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.contract import COEF, scale_coefficients
from ..kernels.launch import accumulator
from ..kernels.rows_torch import transform
from ..objectives.base import LIVE
from .core import (
    Rows,
    Task,
    Transforms,
    check_labels,
    couple,
    dense_teacher,
    evaluate,
    fold,
    make_rows,
    refuse_second_derivative,
    registered,
    without_autocast,
    write_grad,
)
from .gemm import teacher_head
from .inputs import check_float, prepare, unpack
from .teacher import Teacher, cut


def row_loss(
    logits: Tensor, target: Tensor, objective, *, token_weight: Tensor | None = None, teacher: Teacher | None = None,
    ids: Tensor | None = None, sequences: Tensor | None = None, inputs: Mapping[str, Tensor] | None = None,
    reduction: str = "mean", num_items=None, ignore_index: int = -100, scale: float = 1.0,
    softcap: float | None = None, temperature=1.0, metrics: tuple[str, ...] = (), backend: str = "auto",
):  # fmt: skip
    """A token objective on existing logits.

    One pass reads the logits for the loss, one more in backward writes their gradient; beside that
    gradient only O(N) numbers are kept.  Exact for any upstream gradient, any number of times.

    Args:
        logits: (N, V) or (B, T, V), not shifted; fp32, bf16, fp16 or fp64.  Never written.
        others: as in ``linear_loss``.  An objective whose rows interact takes reduction "mean" or "sum".

    Returns: as ``linear_loss``.
    """
    check_float("logits", logits)
    if logits.ndim < 2:
        raise ValueError(f"logits must be (N, V) or (B, T, V); got {tuple(logits.shape)}")
    c = prepare(
        objective, logits.shape[:-1], logits.shape[-1], logits.device, target, ids=ids, sequences=sequences,
        token_weight=token_weight, teacher=teacher, reduction=reduction, num_items=num_items, scale=scale,
        softcap=softcap, temperature=temperature, metrics=metrics, ignore_index=ignore_index, inputs=inputs,
        dtype=accumulator(logits.dtype),
    )  # fmt: skip
    if objective.joint and reduction == "none":
        raise ValueError(
            f"reduction must be 'mean' or 'sum' where rows interact, as those of {objective.name!r} do; got 'none', "
            "which linear_loss has"
        )
    t = c.transforms
    op = _RowLoss.apply
    if torch.compiler.is_compiling():
        op = _row_loss
    loss, table, *_ = op(
        logits.reshape(-1, logits.shape[-1]), c.target, c.token_weight, c.temperature, c.denominator, c.ids, c.sequence,
        c.teacher, objective.key, c.teacher_kind, c.tail, t.scale, t.softcap, t.teacher_scale, t.teacher_softcap,
        t.teacher_temperature, c.flat_temperature, ignore_index, reduction, c.metrics, backend, c.inputs, c.names,
    )  # fmt: skip
    return unpack(loss, table, target.shape, reduction, c.metrics)


def _setup(
    logits, target, token_weight, temperature, ids, sequence, objective, teacher_kind, tail, scale, softcap,
    teacher_scale, teacher_softcap, teacher_temperature, flat_temperature, ignore_index, metrics, backend, inputs=None,
    names="",
) -> tuple[Task, Rows, Tensor]:  # fmt: skip
    transforms = Transforms(scale, softcap, teacher_scale, teacher_softcap, teacher_temperature)
    task = Task.bind(
        objective, transforms, metrics=metrics, backend=backend, device=logits.device, dtype=accumulator(logits.dtype),
        teacher=teacher_kind, tail=tail, temperature=temperature is not None or flat_temperature != 1.0,
    )  # fmt: skip
    check_labels(target, logits.shape[1], ignore_index, ids)
    device = logits.device
    rows = make_rows(
        task.dtype, task.objective.temperature, target.to(device),
        None if token_weight is None else token_weight.to(device), ignore_index,
        None if temperature is None else temperature.to(device), flat_temperature,
        teacher_temperature * task.objective.teacher_temperature, ids,
        None if sequence is None else sequence.to(device), inputs, names,
    )  # fmt: skip
    return task, rows, logits if logits.stride(1) == 1 else logits.contiguous()


def _teacher_tile(task: Task, tile: Tensor, teacher: list[Tensor], rows: Rows) -> Tensor | None:
    if not teacher:
        return None
    teacher = cut(teacher, task.teacher, tile.shape[1])
    if task.teacher == "logits":
        t = teacher[0]
        return t if t.stride(1) == 1 else t.contiguous()
    out = torch.empty(tile.shape, dtype=task.dtype, device=tile.device)
    if task.teacher == "topk":
        return dense_teacher(task, out, tile, teacher[0], teacher[1], rows)
    head = teacher_head(teacher, task.dtype, task.backend)
    return head.project(teacher[0].to(head.operand), out)


@without_autocast
def _forward(
    logits: Tensor, target: Tensor, token_weight: Tensor | None, temperature: Tensor | None,
    denominator: Tensor | None, ids: Tensor | None, sequence: Tensor | None, teacher: list[Tensor], objective: str,
    teacher_kind: str, tail: str, scale: float, softcap: float, teacher_scale: float, teacher_softcap: float,
    teacher_temperature: float, flat_temperature: float, ignore_index: int, reduction: str, metrics: str, backend: str,
    inputs: Tensor | None, names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, metrics (M, N), coefficients, ids_grad."""
    task, rows, tile = _setup(
        logits, target, token_weight, temperature, ids, sequence, objective, teacher_kind, tail, scale, softcap,
        teacher_scale, teacher_softcap, teacher_temperature, flat_temperature, ignore_index, metrics, backend, inputs,
        names,
    )  # fmt: skip
    t = _teacher_tile(task, tile, teacher, rows)
    if task.objective.couple is not None:
        rows.weight = couple_rows(task, [(tile, t, rows)], rows)
    losses, table, coef, ids_grad = evaluate(task, tile, t, rows, gradients=True)
    loss, inverse = reduce(losses, rows, reduction, denominator)
    if inverse is not None:
        coef = scale_coefficients(coef, inverse)
        ids_grad = None if ids_grad is None else ids_grad * inverse
    empty = losses.new_empty(0, losses.shape[0])
    if ids_grad is None:
        ids_grad = empty
    # the coupling's result is needed again in backward only through the coefficients: nothing else is kept
    return loss, table, coef, ids_grad.clone() if ids_grad is empty else ids_grad


_row_loss = registered("burnish::row_loss", _forward)


@_row_loss.register_fake
def _(logits, target, token_weight, temperature, denominator, ids, sequence, teacher, objective, teacher_kind, tail,
      scale, softcap, teacher_scale, teacher_softcap, teacher_temperature, flat_temperature, ignore_index, reduction,
      metrics, backend, inputs, names):  # fmt: skip
    n, dtype = logits.shape[0], accumulator(logits.dtype)
    count = len([m for m in metrics.split(",") if m])
    loss = logits.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    ids_grad = logits.new_empty((0, n) if not reads_ids(objective) else tuple(ids.shape), dtype=dtype)
    return loss, logits.new_empty((count, n), dtype=dtype), logits.new_empty((len(COEF), n), dtype=dtype), ids_grad


def reads_ids(objective: str) -> bool:
    return "ids" in LIVE[objective].stats


def couple_rows(task: Task, tiles, rows: Rows) -> Tensor:
    """The coupled weights (n,) of all rows, from one fold over every tile."""
    spec = task.with_stats(task.objective.couple_stats)
    parts = [fold(task, spec, tile, t, part) for tile, t, part in tiles]
    if not parts:  # no row counts
        return torch.zeros_like(rows.factor)
    stats = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return couple(task.objective, stats, rows, task.dtype)


def reduce(losses: Tensor, rows: Rows, reduction: str, denominator: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The loss as the caller asked for it, and 1 / denominator where it is a mean."""
    if reduction == "none":
        return losses.clone(), None
    if reduction == "sum":
        return losses.sum(), None
    # nothing that counts: 0 / 1, not 0 / 0, so that an all-masked micro-batch adds nothing
    count = (rows.valid.sum() if denominator is None else denominator).to(losses.dtype)
    inverse = torch.where(count == 0, 1.0, count).reciprocal()
    return losses.sum() * inverse, inverse


def _gradient(
    upstream: Tensor, coef: Tensor, ids_grad: Tensor, logits: Tensor, target: Tensor, token_weight: Tensor | None,
    temperature: Tensor | None, ids: Tensor | None, teacher: list[Tensor], objective: str, teacher_kind: str,
    tail: str, scale: float, softcap: float, teacher_scale: float, teacher_softcap: float, teacher_temperature: float,
    flat_temperature: float, ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    task, rows, tile = _setup(
        logits, target, token_weight, temperature, ids, None, objective, teacher_kind, tail, scale, softcap,
        teacher_scale, teacher_softcap, teacher_temperature, flat_temperature, ignore_index, "", backend,
    )  # fmt: skip
    t = _teacher_tile(task, tile, teacher, rows)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    factor = upstream.expand(tile.shape[0])
    g = ids_grad * factor[:, None] if ids_grad.shape[0] == tile.shape[0] and ids is not None else None
    write_grad(task, tile, t, out, scale_coefficients(coef, factor), g, rows)
    return out


_row_loss_backward = torch.library.custom_op("burnish::row_loss_backward", _gradient, mutates_args=())


@_row_loss_backward.register_fake
def _(upstream, coef, ids_grad, logits, *args):
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs, output):
    (logits, target, token_weight, temperature, _, ids, _, teacher, *options, _, _) = inputs
    _, table, coef, ids_grad = output
    ctx.save_for_backward(logits, target, token_weight, temperature, ids, coef, ids_grad, *teacher)
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.objective = LIVE.get(options[0])  # backward finds it by key: keep it alive
    ctx.mark_non_differentiable(table, coef, ids_grad)
    ctx.inputs = len(inputs)


def _backward(ctx, upstream, *_, eager: bool = False):
    if upstream is None:
        return (None,) * ctx.inputs
    logits, target, token_weight, temperature, ids, coef, ids_grad, *teacher = ctx.saved_tensors
    (objective, kind, tail, scale, softcap, t_scale, t_softcap, t_temp, flat, ignore_index, _, _, backend) = ctx.options
    grad = (_gradient if eager else _row_loss_backward)(
        upstream, coef, ids_grad, logits, target, token_weight, temperature, ids, teacher, objective, kind, tail, scale,
        softcap, t_scale, t_softcap, t_temp, flat, ignore_index, backend,
    )  # fmt: skip
    return grad, *(None,) * 6, [None] * len(teacher), *(None,) * (ctx.inputs - 8)


_row_loss.register_autograd(_backward, setup_context=_keep)


class _RowLoss(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_keep)

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, *upstream):
        grads = without_autocast(_backward)(ctx, *upstream, eager=True)
        return *grads[:7], None, *grads[8:]  # a list of tensors is no input that autograd knows


def implied_target(logits: Tensor, target: Tensor, objective, **arguments) -> Tensor:
    """Q = p - dL/dz (N, V): what the objective pulls p towards, in the unit gauge (arXiv 2606.11189, 1.2).

    Sums to 1 a row; entries may be negative (GEM, confidence penalty, focal).  For inspection: it holds
    whole rows.  ``arguments`` are those of ``row_loss`` except reduction; logits (N, V).
    """
    if "metrics" in arguments or "reduction" in arguments:
        raise ValueError("implied_target takes neither metrics nor reduction")
    scale, softcap = arguments.pop("scale", 1.0), arguments.pop("softcap", None)
    temperature = torch.as_tensor(arguments.pop("temperature", 1.0), device=logits.device)
    inverse = temperature.to(accumulator(logits.dtype)).reciprocal().expand(logits.shape[:-1]).reshape(-1)
    flat = logits.detach().reshape(-1, logits.shape[-1])
    # p and g are those of z, the logits after every transform
    z = transform(flat, inverse.dtype, scale, softcap or 0.0, inverse)[0].reshape(logits.shape)
    with torch.inference_mode(False), torch.enable_grad():
        z = z.clone().requires_grad_()
        loss = row_loss(z, target, objective, reduction="sum", **arguments)
        (g,) = torch.autograd.grad(loss, z)
    return z.detach().softmax(-1) - g
