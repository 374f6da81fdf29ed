"""One chunk over several processes: replicas that average its gradient, or weights that FSDP2 shards.

    replicas   every rank holds all weights; the flat gradient of the active rows, no more, is all-reduced in step()
    shards     weights are DTensors with Shard(0), as ``fully_shard`` makes them; every rank forms the gradient of all
               active rows for its own tokens; it is reduce-scattered in step() to the ranks whose rows they are, and
               each keeps the state of its own rows alone

Both leave the mean over processes.  All collectives are torch.distributed's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.shards import is_dtensor
from .plan import Segment


def local_tensor(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _ranges(rows: int, ranks: int) -> list[tuple[int, int]]:
    """Rows [first, last) of each rank, as Shard(0) deals them: ceil(rows / ranks) each, while there are some."""
    each = -(-rows // ranks)
    return [(min(r * each, rows), min((r + 1) * each, rows)) for r in range(ranks)]


def first_row(p: Tensor) -> int:
    """The first row of a parameter that this rank holds."""
    if not is_dtensor(p):
        return 0
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return _ranges(p.shape[0], mesh.size())[mesh.get_local_rank()][0]


def local_rows(p: Tensor, segment: Segment) -> tuple[int, int]:
    """Which of a segment's rows, [first, last) counted from its own first, this rank holds."""
    if not is_dtensor(p):
        return 0, segment.rows
    first = first_row(p) - segment.start
    last = first + local_tensor(p).shape[0]
    start = min(max(first, 0), segment.rows)
    return start, min(max(last, start), segment.rows)


class Replicas:
    """The processes that train one model; falsy where there is one alone."""

    def __init__(self, parameters: Sequence[Tensor], group):
        sharded = [p for p in parameters if is_dtensor(p)]
        self.sharded = bool(sharded)
        if sharded:
            meshes = {p.device_mesh for p in sharded}  # type: ignore[attr-defined]
            if len(sharded) < len(parameters):
                raise ValueError("model: some parameters are DTensors and some are not: shard all of them")
            if len(meshes) > 1 or next(iter(meshes)).ndim != 1:
                raise ValueError("model: its DTensors must lie on one mesh of one dimension")
            for p in sharded:
                (placement,) = p.placements  # type: ignore[attr-defined]
                if not placement.is_shard(0):
                    raise ValueError(f"model: its DTensors must be Shard(0); got {placement}")
            if group is not None:
                raise ValueError("group: the weights' mesh is the group; leave it out")
            group = next(iter(meshes)).get_group()
        if group is None and not (dist.is_available() and dist.is_initialized()):
            self.group, self.size, self.rank = None, 1, 0
            return
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if not sharded and self.size > 1:  # as DDP does, which may not be what wraps this model
            source = 0 if group is None else dist.get_global_rank(group, 0)
            with torch.no_grad():
                for p in parameters:
                    dist.broadcast(p.detach(), source, group=group)

    def __bool__(self) -> bool:
        return self.size > 1

    @property
    def shard(self) -> list[int]:
        """[rank, ranks] of sharded state, [0, 1] of state that every replica has alike."""
        return [self.rank, self.size] if self.sharded else [0, 1]

    def mean_(self, flat: Tensor) -> None:
        """The mean over replicas, in place, the same bits on each."""
        if self and flat.numel():
            dist.all_reduce(flat, group=self.group)
            flat.div_(self.size)

    def any(self, flag: Tensor) -> Tensor:
        """1 where any process has a number that is not 0."""
        if not self:
            return flag
        flag = flag.clone()
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return flag

    def mean_number(self, value: Tensor | float) -> float:
        """The mean of a number over processes, read on the host."""
        x = torch.as_tensor(value).detach().double().reshape(1)
        x = x if not self or dist.get_backend(self.group) != "gloo" else x.cpu()
        self.mean_(x)
        return float(x)

    def norm(self, views: list[Tensor], device: torch.device) -> Tensor:
        """The 2-norm of all gradients, 0-dim; over the shards of all ranks where they are sharded."""
        norm = torch.nn.utils.get_total_norm(views) if views else torch.zeros((), device=device)
        if not (self and self.sharded):
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def scatter(
        self, parameters: Mapping[str, Tensor], spans: Sequence[tuple[Segment, Tensor]], into: Sequence[Tensor]
    ) -> None:  # fmt: skip
        """Mean over ranks of each span, (rows, ...) of a segment, written to its rank's ``into`` (flat)."""
        cuts = [_ranges(parameters[s.name].shape[0], self.size) for s, _ in spans]
        owned: list[list[Tensor]] = [[] for _ in range(self.size)]
        for (s, grad), ranges in zip(spans, cuts, strict=True):
            for own, (first, last) in zip(owned, ranges, strict=True):
                own.append(grad[max(first - s.start, 0) : max(last - s.start, 0)].reshape(-1))
        width = max(sum(x.numel() for x in own) for own in owned)
        dtype, device = spans[0][1].dtype, spans[0][1].device
        send = torch.zeros(self.size, width, dtype=dtype, device=device)
        for row, own in zip(send, owned, strict=True):
            at = 0
            for x in own:
                row[at : at + x.numel()] = x
                at += x.numel()
        mine = torch.empty(width, dtype=dtype, device=device)
        dist.reduce_scatter_tensor(mine, send.view(-1), group=self.group)
        mine.div_(self.size)
        at = 0
        for x in into:
            x.copy_(mine[at : at + x.numel()])
            at += x.numel()
