"""A head whose rows lie on several ranks: states merged by all-reduce, neither weight nor logits gathered.

Every rank of the group calls with the same hidden states and labels and its own rows of the head.  With
s_r = sum over rank r's columns of e^{z - m_r}, the row's sum is  sum_r s_r e^{m_r - m}, m = max_r m_r; every other sum
of the online state rescales alike (the sum of squares with the factor squared).  Two all-reduces in forward (three
where ``hit`` is asked for), one of dX in backward.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.contract import STATE_INDEX as S

#: Which maximum each sum is relative to, and the power of the factor; None: a plain sum.
_SUMS = {
    "z_sum": ("z_max", 1), "z_exp": ("z_max", 1), "p_square": ("z_max", 2), "t_exp": ("z_max", 1),
    "z_total": (None, 0), "z_count": (None, 0), "m_sum": ("m_max", 1), "m_exp": ("m_max", 1),
    "t_sum": ("t_max", 1), "t_z": ("t_max", 1), "t_t": ("t_max", 1),
}  # fmt: skip
_MAXIMA = ("z_max", "m_max", "t_max")
_LABELS = ("z_label", "t_label")
JSD = ("jsd_t", "jsd_p")


class Shard(NamedTuple):
    """This rank's place in the vocabulary: its first row and the number of rows of all ranks."""

    group: str  # the process group's name; "" for a head that is whole
    start: int
    total: int


def whole(vocabulary: int) -> Shard:
    return Shard("", 0, vocabulary)


def shard_of(rows: int, group: dist.ProcessGroup, device: torch.device) -> Shard:
    """The place of ``rows`` rows among those of the group's ranks, in rank order; one small all-gather."""
    if group is dist.group.WORLD or group is None:
        group = dist.distributed_c10d._get_default_group()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
    counts = torch.cat(sizes).tolist()
    return Shard(group.group_name, sum(counts[: dist.get_rank(group)]), sum(counts))


def is_dtensor(x) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh") and hasattr(x, "placements")


def local_rows(name: str, x, rows: int | None = None) -> tuple[Tensor, Shard]:
    """A DTensor's local rows, differentiable into a DTensor's gradient, and their place.

    It must be Shard(0) on a mesh of one dimension: over a second one (data parallel) the gradient would have to be
    reduced by whoever holds the data.  ``rows``: what there must be here.  ValueError otherwise.
    """
    from torch.distributed.tensor import Shard as Rows
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if x.device_mesh.ndim != 1 or type(x.placements[0]) is not Rows or x.placements[0].dim != 0:
        raise ValueError(f"{name}: a DTensor must be Shard(0) on a mesh of one dimension; got {list(x.placements)}")
    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    group = x.device_mesh.get_group(0)
    local = x.to_local()
    if rows is not None and local.shape[0] != rows:
        raise ValueError(f"{name} must have the head's {rows} rows on this rank; got {local.shape[0]}")
    # an empty shard's offset is not the end of the others everywhere: it owns no column at all
    start = offset[0] if local.shape[0] else 0
    return local, Shard(group.group_name, start, x.shape[0])


def replicated(name: str, x: Tensor) -> Tensor:
    """A tensor that every rank has whole; a replicated DTensor's local tensor, its gradient taken as whole."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate

    if any(type(p) is not Replicate for p in x.placements):  # type: ignore[attr-defined]
        raise ValueError(f"{name}: a DTensor must be replicated; got {list(x.placements)}")  # type: ignore[attr-defined]
    return x.to_local(grad_placements=x.placements)  # type: ignore[attr-defined]


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_reduce(x: Tensor, shard: Shard, op=None) -> Tensor:
    """In place, over the shard's group; nothing for a head that is whole."""
    if shard.group:
        dist.all_reduce(x, dist.ReduceOp.SUM if op is None else op, group=_group(shard.group))
    return x


def merge_state(state: Tensor, shard: Shard, *, hit: bool) -> Tensor:
    """Each rank's state (STATE_ROWS, N) over its own columns -> that of all columns, the same bits on every rank."""
    if not shard.group:
        return state
    out = state.clone()
    top = torch.stack([state[S[name]] for name in _MAXIMA])
    all_reduce(top, shard, dist.ReduceOp.MAX)
    factor = {}
    for name, value in zip(_MAXIMA, top, strict=True):
        out[S[name]] = value
        # where every rank saw -inf alone the factor must not be NaN
        factor[name] = (state[S[name]] - torch.where(value == -torch.inf, 0.0, value)).exp()
    sums = [
        state[S[name]] if base is None else state[S[name]] * factor[base] ** power
        for name, (base, power) in _SUMS.items()
    ]
    for name in _LABELS:  # NaN: not among my columns
        seen = ~state[S[name]].isnan()
        sums += [torch.where(seen, state[S[name]], 0.0), seen.to(state.dtype)]
    if hit:
        # the lowest column wins a tie: the rank that has the maximum and begins first (an empty one never has it)
        mine = state[S["z_max"]] == top[0]
        owner = torch.where(mine, shard.start, shard.total).to(torch.int64)
        all_reduce(owner, shard, dist.ReduceOp.MIN)
        sums.append(torch.where(mine & (owner == shard.start), state[S["argmax"]], 0.0))
    total = all_reduce(torch.stack(sums), shard)
    for i, name in enumerate(_SUMS):
        out[S[name]] = total[i]
    for i, name in enumerate(_LABELS):
        value, seen = total[len(_SUMS) + 2 * i], total[len(_SUMS) + 2 * i + 1]
        out[S[name]] = torch.where(seen > 0, value, torch.nan)
    if hit:
        out[S["argmax"]] = total[-1]
    return out


def merge_jsd(state: Tensor, shard: Shard) -> None:
    """The Jensen-Shannon sums of all columns, in place; the state is otherwise merged already."""
    if shard.group:
        rows = [S[name] for name in JSD]
        state[rows] = all_reduce(state[rows], shard)


def merge_picked(values: Tensor, shard: Shard) -> Tensor:
    """Values (N, K) at given ids, NaN where the id is not on this rank; NaN where it is on none."""
    if not shard.group:
        return values
    seen = ~values.isnan()
    both = all_reduce(torch.stack([torch.where(seen, values, 0.0), seen.to(values.dtype)]), shard)
    return torch.where(both[1] > 0, both[0], torch.nan)


def merge_top(values: Tensor, k: int, shard: Shard) -> Tensor:
    """The k largest of all ranks' largest (N, <= k)."""
    if not shard.group:
        return values
    padded = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(_group(shard.group)))]
    dist.all_gather(parts, padded.contiguous(), group=_group(shard.group))
    every = functools.reduce(lambda a, b: torch.cat([a, b], 1), parts)
    return every.topk(min(k, shard.total), 1).values
