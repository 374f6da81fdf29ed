"""From a tile of logits to losses and gradient coefficients: what every loss op shares."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import dispatch, rows_torch
from ..kernels.contract import (
    DIFFERENTIABLE,
    RowSpec,
    coefficients,
    finalize,
    new_state,
    scale_coefficients,
    supported,
)
from ..objectives.base import LIVE, STATISTICS, Objective, RowStats
from .teacher import fill_topk

#: Per-row diagnostics an op can return beside the loss, and the statistics they need.
METRICS = {
    "nll": ("logp",), "logp": ("logp",), "entropy": ("lse", "mean"), "hit": ("hit",), "lse": ("lse",),
    "square": ("square",), "top_entropy": ("top_entropy",),
}  # fmt: skip
_ALWAYS = frozenset({"lse", "label", "logp"})


@dataclass
class Rows:
    """What is known of each row, (N,) unless said.  ``factor`` is the token weight, 0 where ignored."""

    target: Tensor
    valid: Tensor
    factor: Tensor
    inv_temp: Tensor
    teacher_inv_temp: Tensor
    plain_inv_temp: Tensor  # without the objective's own temperature
    ids: Tensor | None = None  # (N, K)
    sequence: Tensor | None = None
    inputs: Tensor | None = None  # (N, I), the objective's own
    names: tuple[str, ...] = ()  # of the columns of ``inputs``
    weight: Tensor | None = None  # what Objective.couple returned

    def at(self, index: slice | Tensor) -> Rows:
        """The rows of a slice or an index."""
        tensors: dict[str, Any] = {k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass
class Transforms:
    """raw -> scale -> softcap (0: none) -> temperature, of the student and of the teacher."""

    scale: float = 1.0
    softcap: float = 0.0
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0
    teacher_temperature: float = 1.0


def row_spec(
    stats, alpha: float, eta: float, beta: float, top_k: int, transforms: Transforms, *, temperature: bool,
    teacher_temperature: bool,
) -> RowSpec:  # fmt: skip
    """What the kernels compute for these statistics; the label and the log-sum-exp always."""
    return RowSpec(
        stats=frozenset(stats) | _ALWAYS, alpha=alpha, eta=eta, beta=beta, top_k=top_k or 20,
        scale=transforms.scale, softcap=transforms.softcap, teacher_scale=transforms.teacher_scale,
        teacher_softcap=transforms.teacher_softcap, temperature=temperature, teacher_temperature=teacher_temperature,
    )  # fmt: skip


@dataclass
class Task:
    """An objective bound to transforms, kernels, a teacher form and an accumulator dtype."""

    objective: Objective
    spec: RowSpec
    kernels: ModuleType
    dtype: torch.dtype
    metrics: tuple[str, ...]
    teacher: str  # "", "hidden", "logits" or "topk"
    tail: str
    backend: str  # resolved

    @classmethod
    def bind(cls, key: str, transforms: Transforms, *, metrics: str, backend: str, device: torch.device,
             dtype: torch.dtype, teacher: str, tail: str, temperature: bool) -> Task:  # fmt: skip
        """``temperature``: whether the op's own temperature may differ from 1."""
        o = LIVE[key]
        spec = row_spec(
            o.stats, o.alpha, o.eta, o.beta, o.top_k, transforms, temperature=temperature or o.temperature != 1.0,
            teacher_temperature=transforms.teacher_temperature * o.teacher_temperature * o.temperature != 1.0,
        )  # fmt: skip
        names = tuple(n for n in metrics.split(",") if n)
        backend = dispatch.resolve(backend, device)
        return cls(o, spec, dispatch.rows(backend), dtype, names, teacher, tail, backend)

    def with_stats(self, names) -> RowSpec:
        return replace(self.spec, stats=_ALWAYS | frozenset(names))

    @property
    def fold_spec(self) -> RowSpec:
        """The objective's statistics and those of the metrics."""
        return self.with_stats(self.spec.stats | {s for n in self.metrics for s in METRICS[n]})


def fold(task: Task, spec: RowSpec, tile: Tensor, teacher: Tensor | None, rows: Rows) -> dict:
    """Statistics of whole rows, each (n,): tile and teacher (n, V) are raw logits."""
    temps = {"inv_temp": rows.inv_temp, "teacher_inv_temp": rows.teacher_inv_temp}
    state = new_state(tile.shape[0], task.dtype, tile.device)
    task.kernels.fold(tile, teacher, state, rows.target, spec, **temps)
    if spec.has("jsd"):
        task.kernels.fold_jsd(tile, teacher, state, spec, **temps)
    stats = finalize(state, spec)
    if (some := supported(state, spec)) is not None:
        stats["supported"] = some
    if task.teacher == "topk" and spec.has("teacher_logp"):
        # given log-probabilities are true ones: not to be renormalised over the K that were kept
        stats["teacher_logp"] = stats["teacher_logp"] + stats["teacher_lse"]
    if spec.has("top_entropy"):
        # the transforms are increasing: the top of the raw logits is the top of z
        stats["top_entropy"] = top_entropy(tile.topk(min(spec.top_k, tile.shape[1]), 1).values, spec, rows.inv_temp)
    if spec.has("ids"):
        stats["ids"] = rows_torch.gather_ids(tile, rows.ids, spec, inv_temp=rows.inv_temp, dtype=task.dtype)
    return stats


def top_entropy(raw: Tensor, spec: RowSpec, inv_temp: Tensor) -> Tensor:
    """Entropy (n,) in nats of the softmax over raw logits (n, k) alone."""
    z, _ = rows_torch.transform(raw, inv_temp.dtype, spec.scale, spec.softcap, inv_temp)
    logq = z.log_softmax(1)
    return -(logq.exp() * torch.where(logq == -torch.inf, 0.0, logq)).sum(1)


def couple(objective: Objective, stats: dict, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Objective.couple over the rows that count; 0 for the others.  stats are of all rows."""
    assert objective.couple is not None
    weight = objective.couple(view(objective, stats, rows))
    if not isinstance(weight, Tensor):
        raise TypeError(f"objective {objective.name!r}: couple must return a tensor; got {type(weight).__name__}")
    if weight.shape != rows.target.shape:
        raise ValueError(
            f"objective {objective.name!r}: couple must return shape {tuple(rows.target.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    return weight.to(dtype)


def view(objective: Objective, stats: dict, rows: Rows) -> RowStats:
    """What an objective sees of the rows."""
    shown = {k: v for k, v in stats.items() if k in STATISTICS} | dict.fromkeys(objective.optional)
    if rows.inputs is not None:
        shown |= dict(zip(rows.names, rows.inputs.unbind(1), strict=True))
    live = rows.factor != 0
    if objective.joint:  # a NaN of a row that does not count must reach no other
        shown = {k: None if v is None else _where_rows(live, v) for k, v in shown.items()}
    return RowStats(
        valid=live, sequence=rows.sequence, weight=rows.weight,
        normalizer=(stats["z_max"], stats["z_log"]), **shown,
    )  # fmt: skip


def _where_rows(live: Tensor, values: Tensor) -> Tensor:
    return torch.where(live if values.ndim == 1 else live[:, None], values, 0.0)


def evaluate(task: Task, tile, teacher, rows: Rows, *, gradients: bool):
    """Losses (n,) with token weights applied, metrics (M, n), and the coefficients of ``grad``.

    Returns (loss, metrics, coef, ids_grad); the last two are None without ``gradients``.  The objective's
    own few lines are differentiated by torch; coefficients are those of sum_i loss_i.
    """
    o = task.objective
    stats = fold(task, task.fold_spec, tile, teacher, rows)
    # before the objective sees the statistics: its lines may write in place
    table = torch.stack([metric(n, stats) for n in task.metrics]) if task.metrics else None
    visible = {k: v for k, v in stats.items() if k in o.stats or k in ("lse", "z_max", "z_log")}
    factor = rows.factor
    if "supported" in stats:
        factor = torch.where(stats["supported"], factor, 0.0)
    live = factor != 0
    coef = ids_grad = None
    # a row's own gradient is scaled by its factor after it is formed; where rows interact the losses are, before
    after = live.to(factor.dtype) if o.joint else factor
    if gradients:
        with torch.enable_grad():
            leaves = {k: visible[k].detach().requires_grad_() for k in DIFFERENTIABLE if k in visible}
            loss = o(view(o, {**visible, **leaves}, rows))
            total = torch.where(live, loss * factor, 0.0).sum() if o.joint else loss.sum()
            given: tuple = (None,) * len(leaves)
            if loss.requires_grad:  # an objective may be constant
                given = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        loss = loss.detach()
        upstream = {k: g for k, g in zip(leaves, given, strict=True) if g is not None}
        ids_grad = upstream.pop("ids", None)
        coef = scale_coefficients(coefficients(stats, upstream, task.spec), after)
        if ids_grad is not None and rows.ids is not None:
            ids_grad = torch.where(live[:, None] & (rows.ids >= 0), ids_grad * after[:, None], 0.0)
    else:
        loss = o(view(o, visible, rows))
    loss = torch.where(live, loss * factor, 0.0)
    table = loss.new_empty(0, loss.shape[0]) if table is None else torch.where(rows.factor != 0, table, 0.0)
    return loss, table, coef, ids_grad


def metric(name: str, stats: dict) -> Tensor:
    """A diagnostic of ``METRICS`` from its statistics."""
    if name == "nll":
        return -stats["logp"]
    if name == "entropy":
        return stats["lse"] - stats["mean"]
    return stats[name]


def write_grad(task: Task, tile, teacher, out, coef, ids_grad, rows: Rows) -> None:
    """d loss / d raw logits into ``out``, which may be ``tile``."""
    task.kernels.grad(
        tile, teacher, out, coef, rows.target, task.spec, inv_temp=rows.inv_temp,
        teacher_inv_temp=rows.teacher_inv_temp, ids=rows.ids if ids_grad is not None else None, ids_grad=ids_grad,
    )  # fmt: skip


def dense_teacher(task: Task, out, tile, ids, logp, rows: Rows) -> Tensor:
    """A top-K teacher's log-probabilities (n, V) written into ``out``; see ``Teacher``."""
    if task.tail != "student":
        fill_topk(out, ids, logp, task.tail)
        return out
    spec = replace(task.with_stats(()), teacher_temperature=False)
    plain = replace(rows, inv_temp=rows.plain_inv_temp, ids=ids)
    state = new_state(tile.shape[0], task.dtype, tile.device)
    task.kernels.fold(tile, None, state, rows.target, spec, inv_temp=plain.inv_temp)
    lse = finalize(state, spec)["lse"]
    z_ids = rows_torch.gather_ids(tile, ids, spec, inv_temp=plain.inv_temp, dtype=task.dtype)

    def student(into):
        for block in rows_torch.row_blocks(into):
            into[block], _ = rows_torch.transform(
                tile[block], task.dtype, spec.scale, spec.softcap, plain.inv_temp[block]
            )  # fmt: skip

    fill_topk(out, ids, logp, task.tail, student, lse, z_ids)
    return out


def make_rows(
    dtype: torch.dtype, tau: float, target, token_weight, ignore_index: int, temperature: Tensor | None,
    flat_temperature: float, teacher_temperature: float, ids, sequence, inputs: Tensor | None = None, names: str = "",
) -> Rows:  # fmt: skip
    """Per-row inputs on the target's device, in the accumulator's dtype.

    ``tau`` is the objective's temperature; ``teacher_temperature`` the teacher's own times the objective's for it.
    """
    n, device = target.shape[0], target.device
    valid = target != ignore_index
    factor = valid.to(dtype)
    if token_weight is not None:
        factor = torch.where(valid, token_weight.to(dtype), 0.0)
    if temperature is None:
        plain = torch.full((n,), 1.0 / flat_temperature, dtype=dtype, device=device)
    else:
        plain = temperature.to(dtype).reciprocal().expand(n).contiguous()
    teacher = torch.full((n,), 1.0 / (teacher_temperature * tau), dtype=dtype, device=device)
    # a label that is ignored may be any number: never a column
    safe = torch.where(valid, target, -1).contiguous()
    return Rows(
        target=safe, valid=valid, factor=factor, inv_temp=plain / tau, teacher_inv_temp=teacher, plain_inv_temp=plain,
        ids=None if ids is None else ids.contiguous(), sequence=sequence,
        inputs=None if inputs is None else inputs.to(dtype), names=tuple(n for n in names.split(",") if n),
    )  # fmt: skip


def _autograd_keys() -> torch._C.DispatchKeySet:
    names = ("AutogradOther", "AutogradCPU", "AutogradCUDA", "AutogradXPU", "ADInplaceOrView")
    keys = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, n)) for n in names]
    return functools.reduce(operator.or_, keys)


@contextlib.contextmanager
def autograd_inside_op():
    """Inside a torch.library op autograd is excluded from dispatch; objectives need it back.

    Only autograd: what else is excluded there (autocast, for one) must stay so.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set() - _autograd_keys()
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


#: Objectives that a compiled graph names by key: its backward may run when nobody else holds them.  They
#: stay for good, but a new objective recompiles the graph, so there are few.
_PINNED: dict[str, Objective] = {}


def registered(name: str, forward):
    """``forward`` as a torch.library op with the same signature, for torch.compile.

    Autograd works inside it, for the objective's own lines, and the objective it names stays alive.  (The
    signature's annotations are strings, looked up here: what they name must be known to this module.)
    """
    place = list(inspect.signature(forward).parameters).index("objective")

    @functools.wraps(forward)
    def op(*args):
        _PINNED[args[place]] = LIVE[args[place]]
        with autograd_inside_op():
            return forward(*args)

    return torch.library.custom_op(name, op, mutates_args=())


def refuse_second_derivative(backward):
    """``once_differentiable`` that also refuses where the upstream gradient is a constant.

    torch's own lets a second derivative of such a loss be dropped without a word.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def inner(ctx, *upstream):
        if torch.is_grad_enabled():
            upstream = tuple(None if u is None else u.detach().requires_grad_() for u in upstream)
        return once(ctx, *upstream)

    return inner


def without_autocast(function):
    """The op has chosen its dtypes already: autocast must not round what it does inside."""

    @functools.wraps(function)
    def inner(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda", "xpu"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return inner


def check_labels(target: Tensor, vocabulary: int, ignore_index: int, ids: Tensor | None = None) -> None:
    """A label or id outside the vocabulary is an error where it can be seen without a device sync."""
    if ids is not None and ids.device.type == "cpu" and bool((ids >= vocabulary).any()):
        raise ValueError(f"ids must lie below the vocabulary's {vocabulary}, -1 for none; got {int(ids.max())}")
    if target.device.type != "cpu":
        return
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"target must be in [0, {vocabulary}) or ignore_index={ignore_index}; got {int(target[row])} at row {row}"
        )
