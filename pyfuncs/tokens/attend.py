r"""Attention of one global layer under a plan.  No loop over frames anywhere.

LOCAL:  (B, N P, C) -> (B N, P, C), one dense attention for all frames; tail tokens are further keys of each.
shared: K and V of the selected rows, one dense attention, which nothing beats there (specs 5.2).
lists:  ``selected_attention``.
own:    dense over S and dense over the own frame, merged by log-sum-exp (specs 5.4); a frame in S skips the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.selected_attention import AttentionOutput, merge_attention, selected_attention
from .grid import Layout
from .lists import Plan
from .project import Projection, side_by_side, take_rows
from .rule import LOCAL


def attend(
    plan: Plan, projection: Projection, u: Tensor, positions: Tensor | None, layout: Layout, backend: str = "auto"
) -> Tensor:
    """The module's output (B, L, C) for normed tokens u (B, L, C); positions (B, L, 2) or None."""
    if plan.kind == LOCAL:
        return projection.output(_local(projection, u, positions, layout))
    if projection.dropout and (plan.lists is not None or plan.own is not None):
        raise ValueError(
            f"attn_drop must be 0 where queries have lists of their own; got {projection.dropout}: "
            "strategy='diversity' without own_frame drops attention weights as the dense model does"
        )
    if plan.project is None:
        q, k, v = projection.all(u, positions)
    else:
        q = projection.queries(u, positions)
        some = None if positions is None else take_rows(positions, plan.project)
        k, v = projection.keys_values(take_rows(u, plan.project), some)
    end = layout.frames * layout.tokens
    if plan.own is not None:
        out = _own(plan, q[:, :, :end], k, v, projection, layout, backend)
    elif plan.lists is not None:
        out = selected_attention(q[:, :, :end], k, v, plan.lists, plan.counts, scale=projection.scale, backend=backend)
    elif plan.shared is None:  # the tail's queries too
        return projection.output(side_by_side(_dense(projection, q, k, v)))
    else:
        out = _dense(projection, q[:, :, :end], _pick(k, plan.shared), _pick(v, plan.shared))
    if layout.tail:
        out = torch.cat([out, _dense(projection, q[:, :, end:], k, v)], 2)
    return projection.output(side_by_side(out))


def _dense(projection: Projection, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=projection.dropout, scale=projection.scale)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B', M) of x (B, heads, R, D)."""
    return take_rows(x.transpose(1, 2), rows).transpose(1, 2)


def _local(projection: Projection, u: Tensor, positions: Tensor | None, layout: Layout) -> Tensor:
    b, n, p, end = len(u), layout.frames, layout.tokens, layout.frames * layout.tokens

    def frames_of(x: Tensor) -> Tensor:
        return x[:, :end].reshape(b * n, p, x.shape[-1])

    at = None if positions is None else frames_of(positions)
    q, k, v = projection.all(frames_of(u), at)  # [B N, heads, P, D]
    if not layout.tail:
        return side_by_side(_dense(projection, q, k, v)).reshape(b, end, -1)
    at = None if positions is None else positions[:, end:]
    q_tail, k_tail, v_tail = projection.all(u[:, end:], at)  # [B, heads, tail, D]

    def joined(frames: Tensor, tail: Tensor) -> Tensor:
        return torch.cat([frames, tail.repeat_interleave(n, 0)], 2)  # [B N, heads, P + tail, D]

    def scene(frames: Tensor, tail: Tensor) -> Tensor:
        flat = frames.unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)
        return torch.cat([flat, tail], 2)  # [B, heads, L, D]

    out = side_by_side(_dense(projection, q, joined(k, k_tail), joined(v, v_tail))).reshape(b, end, -1)
    last = side_by_side(_dense(projection, q_tail, scene(k, k_tail), scene(v, v_tail)))
    return torch.cat([out, last], 1)


def _own(plan: Plan, q: Tensor, k: Tensor, v: Tensor, projection: Projection, layout: Layout, backend: str) -> Tensor:
    b, heads, _, d = q.shape
    n, p, own, shared, members = layout.frames, layout.tokens, plan.own, plan.shared, plan.members
    assert own is not None and shared is not None and members is not None
    common = selected_attention(
        q, k, v, shared[:, None, None].int(), shared.shape[-1], scale=projection.scale, return_lse=True,
        backend=backend,
    )  # fmt: skip

    def frames_of(x: Tensor, rows: int) -> Tensor:  # [B, heads, N rows, D] -> [B N, heads, rows, D]
        return x.unflatten(2, (n, rows)).transpose(1, 2).flatten(0, 1)

    def own_keys(x: Tensor) -> Tensor:
        x = frames_of(x[:, :, : n * plan.pitch], plan.pitch)
        return x if len(own) == plan.pitch else x.index_select(2, own)

    every = torch.arange(len(own), dtype=torch.int32, device=q.device)
    alone = selected_attention(
        frames_of(q, p), own_keys(k), own_keys(v), every, len(own), scale=projection.scale, return_lse=True,
        backend=backend,
    )  # fmt: skip
    out = alone.out.unflatten(0, (b, n)).transpose(1, 2).reshape(b, heads, n * p, d)
    lse = alone.lse.unflatten(0, (b, n)).transpose(1, 2)  # [B, heads, N, P]
    # the keys of a frame in S are among the common ones: they must not count twice
    lse = lse.masked_fill(members[:, None, :, None], -torch.inf).flatten(2)
    return merge_attention([common, AttentionOutput(out, lse)]).out
