"""Checks and defaults that every loss op shares; no device sync, nothing written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..objectives.aggregate import row_weights
from ..objectives.base import Objective
from .core import METRICS, Transforms
from .teacher import Teacher

REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Common:
    """Arguments of a loss op after the checks, flattened to N rows."""

    target: torch.Tensor
    token_weight: torch.Tensor | None
    temperature: torch.Tensor | None
    flat_temperature: float
    denominator: torch.Tensor | None
    ids: torch.Tensor | None
    sequence: torch.Tensor | None
    teacher: list[torch.Tensor]
    teacher_kind: str
    tail: str
    transforms: Transforms
    metrics: str
    inputs: torch.Tensor | None  # (N, I)
    names: str


class Asked(NamedTuple):
    """What ``prepare`` reads of an objective."""

    name: str
    stats: tuple[str, ...]
    needs: frozenset[str]
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    aggregate: str = "token_mean"


def check_float(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")


def check_operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int | None = None
) -> torch.dtype:
    """Shapes, devices and dtypes of hidden, head and bias; returns the dtype that the products' operands take.

    ``rows`` of the head where ``weight`` is one of its blocks.
    """
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., H) and weight (V, H) must agree on H; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device}, as hidden is; got {weight.device}")
    if bias is not None:
        check_float("bias", bias)
        rows = weight.shape[0] if rows is None else rows
        if bias.shape != (rows,) or bias.device != weight.device:
            raise ValueError(f"bias must be ({rows},) on {weight.device}; got {tuple(bias.shape)} on {bias.device}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden and weight must have one dtype outside autocast; got {hidden.dtype} and {weight.dtype}"
        )
    return hidden.dtype


def check_budget(budget: int | None) -> None:
    if budget is not None and (type(budget) is not int or budget < 0):
        raise ValueError(f"budget must be a whole number of bytes; got {budget!r}")


def _rows(
    name: str, value: torch.Tensor, target: torch.Tensor, *, any_device: bool = False, by_sequence: bool = False
) -> torch.Tensor:
    if by_sequence and target.ndim == 2 and value.shape in (target.shape[:1], (target.shape[0], 1)):
        value = value.reshape(-1, 1).expand(target.shape)
    if value.shape != target.shape:
        raise ValueError(f"{name} must have target's shape {tuple(target.shape)}; got {tuple(value.shape)}")
    if value.device != target.device and not any_device:
        raise ValueError(f"{name} must be on {target.device}, as target is; got {value.device}")
    return value.reshape(-1)


def _own_inputs(objective, given, target: torch.Tensor, device: torch.device) -> tuple[torch.Tensor | None, str]:
    """The objective's own inputs as columns (N, I) on ``device``, and their names."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"inputs must be a mapping of names to tensors; got {type(given).__name__}")
    given = {k: v for k, v in (given or {}).items() if v is not None}
    known = (*objective.inputs, *objective.optional)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            reads = ", ".join(known) or "none"
            raise ValueError(f"inputs: objective {objective.name!r} reads {reads}; got {name!r}{hint}")
    missing = [name for name in objective.inputs if name not in given]
    if missing:
        raise ValueError(
            f"objective {objective.name!r} needs inputs={{{', '.join(f'{n!r}: ...' for n in missing)}}}, "
            "numbers that come with the data, one a row"
        )
    if not given:
        return None, ""
    columns = []
    for name, value in given.items():
        check_float(f"inputs[{name!r}]", value)
        columns.append(_rows(f"inputs[{name!r}]", value.detach(), target, any_device=True, by_sequence=True))
    wide = torch.float64 if any(x.dtype == torch.float64 for x in columns) else torch.float32
    return torch.stack([x.to(device, wide, non_blocking=True) for x in columns], 1), ",".join(given)


def prepare(
    objective, rows_shape: torch.Size, vocabulary: int, device: torch.device, target, *, ids, sequences, token_weight,
    teacher, reduction, num_items, scale, softcap, temperature, metrics, ignore_index, dtype: torch.dtype,
    inputs=None,
) -> Common:  # fmt: skip
    """Validate and flatten; raises ValueError or TypeError that names the argument and what it got.

    ``objective`` is one, or an ``Asked`` of what a call without one reads.  ``dtype``: the accumulator's.
    """
    if not isinstance(objective, (Objective, Asked)):
        raise TypeError(
            f"objective must be a burnish.Objective (burnish.objectives.nll(), ...); got {type(objective).__name__}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor; got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != rows_shape:
        raise ValueError(f"target must have shape {tuple(rows_shape)}, one label a row; got {tuple(target.shape)}")
    if target.device != device and target.device.type != "cpu":
        raise ValueError(f"target must be on {device} or on the CPU; got {target.device}")
    missing = objective.needs - {
        name for name, value in (("teacher", teacher), ("ids", ids), ("token_weight", token_weight))
        if value is not None
    } - {"sequences"}  # fmt: skip
    if missing:
        hints = {
            "teacher": "teacher=burnish.Teacher(...), a teacher, reference or frozen base model",
            "ids": "ids=, the (N, K) token ids it reads",
            "token_weight": "token_weight=, the weights that come with the data",
        }
        raise ValueError(f"objective {objective.name!r} needs {' and '.join(hints[m] for m in sorted(missing))}")
    n = target.numel()
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int; got {ignore_index!r}")
    sequence = None
    if "sequences" in objective.needs:
        if sequences is not None:
            if not isinstance(sequences, torch.Tensor) or sequences.dtype != torch.int64:
                got = getattr(sequences, "dtype", type(sequences).__name__)
                raise TypeError(f"sequences must be an int64 tensor; got {got}")
            sequence = _rows("sequences", sequences, target)
        elif target.ndim == 2:
            sequence = torch.arange(target.shape[0], device=target.device)[:, None].expand(target.shape).reshape(-1)
        else:
            raise ValueError(
                f"objective {objective.name!r} couples the tokens of a sequence: give sequences= (int64, a row's "
                "sequence) or a target of shape (B, T)"
            )
    if token_weight is not None:
        check_float("token_weight", token_weight)
        token_weight = _rows("token_weight", token_weight, target, any_device=True, by_sequence=True).detach()
    if ids is not None:
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"ids must be a tensor; got {type(ids).__name__}")
        if ids.dtype != torch.int64 or ids.shape[:-1] != target.shape:
            raise ValueError(f"ids must be int64 of shape {(*target.shape, 'K')}; got {ids.dtype} {tuple(ids.shape)}")
        if ids.device != device:
            raise ValueError(f"ids must be on {device}; got {ids.device}")
        ids = ids.reshape(n, ids.shape[-1])
    rows_temperature, flat = None, 1.0
    if isinstance(temperature, torch.Tensor):
        rows_temperature = temperature.detach()
        if temperature.ndim:
            rows_temperature = _rows("temperature", temperature, target, any_device=True).detach()
    else:
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"temperature must be a number or a tensor; got {temperature!r}")
        flat = float(temperature)
        if not flat > 0:
            raise ValueError(f"temperature must be > 0; got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None; got {softcap}")
    if not scale > 0:
        raise ValueError(f"scale must be > 0; got {scale}")
    denominator = None
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f"num_items goes with reduction='mean'; got reduction={reduction!r}")
        if isinstance(num_items, torch.Tensor):
            denominator = num_items.detach().to(device, torch.float32, non_blocking=True)
        elif isinstance(num_items, (int, float)) and num_items >= 0:
            # filled on the device: a copy from the host would wait for it
            denominator = torch.full((), float(num_items), dtype=torch.float32, device=device)
        else:
            raise ValueError(f"num_items must be a number >= 0 or a 0-dim tensor; got {num_items!r}")
        if denominator.ndim:
            raise ValueError(f"num_items must be a number or a 0-dim tensor; got shape {tuple(denominator.shape)}")
    if reduction == "mean":
        share, items = row_weights(objective.aggregate, target.reshape(-1) != ignore_index, sequence, dtype)
        if share is not None:
            if token_weight is not None:
                share = token_weight.to(dtype) * share.to(token_weight.device, non_blocking=True)
            token_weight = share
        if items is not None and denominator is None:
            denominator = items.to(device, torch.float32, non_blocking=True)
    columns, names = _own_inputs(objective, inputs, target, device)
    metrics = tuple(metrics)
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}; got {name!r}")
    tensors: list[torch.Tensor] = []
    kind = tail = ""
    transforms = Transforms(scale=float(scale), softcap=float(softcap or 0.0))
    if teacher is not None:
        if not isinstance(teacher, Teacher):
            raise TypeError(f"teacher must be a burnish.Teacher; got {type(teacher).__name__}")
        if "teacher" in objective.needs:  # otherwise nothing of it is read
            tensors = teacher.tensors(n, vocabulary, device)
            kind, tail = teacher.kind, teacher.tail or ""
            transforms.teacher_scale = float(teacher.scale)
            transforms.teacher_softcap = float(teacher.softcap or 0.0)
            transforms.teacher_temperature = float(teacher.temperature)
            if tail == "zero" and "other" in objective.stats:
                raise ValueError(f"objective {objective.name!r} is infinite where a top-K teacher has tail='zero'")
    return Common(
        target.reshape(-1), token_weight, rows_temperature, flat, denominator, ids, sequence, tensors, kind, tail,
        transforms, ",".join(metrics), columns, names,
    )  # fmt: skip


def unpack(loss, table, shape: torch.Size, reduction: str, metrics: str):
    """What the caller sees: loss, or (loss, {metric: tensor}) where metrics were asked for."""
    if reduction == "none":
        loss = loss.reshape(shape)
    if not metrics:
        return loss
    names = metrics.split(",")
    return loss, {name: table[i].reshape(shape) for i, name in enumerate(names)}
