r"""The contract of gathered-key attention: each group of queries attends to the keys of its own list.

    q        (B, Hq, L, D)        L = F P: frame f has the queries [f P, (f + 1) P)
    k, v     (B, Hkv, Lk, D)      Hq = Hkv R: query head h reads key head h // R
    lists    (B', F, H', M)       int32 rows of k and v; B' is 1 or B, H' is 1, Hkv or Hq
    counts   (B', F, H')          int32: only the first counts[...] entries of a list are read
    bias     (B, Hkv, Lk)         added to the scores of a key, or None

Over the entries j of a query's list (an entry that is -1 does not count, one that comes twice counts twice):

    s_j = scale q . k_j + bias_j         lse = log sum_j e^{s_j}          p_j = e^{s_j - lse}
    out = sum_j p_j v_j                  entropy = - sum_j p_j log p_j    (nats)

Without an entry, or with scores of -inf alone, out = 0, lse = -inf and entropy = 0.  An entry beyond Lk, which the host
cannot see without waiting for the device, makes the rows that list it NaN and is never followed.

Forward keeps m = max s, l = sum e^{s - m} and t = sum e^{s - m} (s - m); with the maximum m' of one more block,

    a = e^{m - m'};   t <- a (t + (m - m') l) + sum_j e^{s_j - m'} (s_j - m');   l <- a l + sum_j e^{s_j - m'}

so that lse = m + log l and entropy = log l - t / l, without a difference of large numbers.  Backward, with g = dL/dlse,
e = dL/dentropy and delta = dout . out - g:

    ds_j = p_j (dout . v_j - delta - e (s_j - lse + entropy))
    dq = scale sum_j ds_j k_j     dk_j = scale sum ds_j q     dv_j = sum p_j dout     dbias_j = sum ds_j

the last three over the queries that list j.  Those are found through the inverse of the lists (``Inverse``), a row of k
at a time and in order: no atomics, the bits of one run are those of the next.  Sums are in fp32, fp64 for fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Keys to a tile of the inverse: what one program of the backward pass holds.
TILE = 64
HEAD_DIM = 128  # the widest head


class Output(NamedTuple):
    """out as q; lse and entropy (B, Hq, L) in the accumulator's dtype, entropy None where it was not asked for."""

    out: Tensor
    lse: Tensor
    entropy: Tensor | None


class Saved(NamedTuple):
    """What backward is given beside the operands: forward's outputs and their gradients, None where there is none."""

    out: Tensor
    lse: Tensor
    entropy: Tensor | None
    d_out: Tensor
    d_lse: Tensor | None
    d_entropy: Tensor | None


class Inverse(NamedTuple):
    """For each key head, the listed rows, cut into tiles, and for each tile who lists its rows.

    X is B' times the key heads that lists tell apart (Hkv or 1), E the entries of such a head.  All sizes are known
    without looking at the lists, so that nothing waits for the device: U = min(Lk, E) rows and E runs at most, the
    unused ones empty.
    """

    rows: Tensor  # (X, U) int32: the rows that are listed, ascending, then -1
    tiles: Tensor  # (X, T + 1) int32: where a tile's runs begin; T = ceil(U / TILE)
    groups: Tensor  # (X, E) int32: a run's frame f and list r of the key head's, as f R' + r
    runs: Tensor  # (X, E + 1) int32: where a run's entries begin
    slots: Tensor  # (X, E) int32: an entry's place in ``rows``


def check(q, k, v, lists, counts, bias) -> None:
    """What must hold for a launch to stay within its operands.  ValueError or TypeError naming the operand."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k and v must be (B, heads, L, D), k as v; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    b, hq, length, d = q.shape
    hkv = k.shape[1]
    if k.shape[0] != b or k.shape[3] != d or hkv == 0 or hq % hkv:
        raise ValueError(f"k must be ({b}, heads that divide {hq}, Lk, {d}); got {tuple(k.shape)}")
    if not 1 <= d <= HEAD_DIM:
        raise ValueError(f"the head dimension must be in [1, {HEAD_DIM}]; got {d}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k and v must have one floating dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if lists.ndim != 4 or lists.shape[0] not in (1, b) or lists.shape[2] not in (1, hkv, hq):
        raise ValueError(f"lists must be (1 or {b}, F, 1, {hkv} or {hq}, M); got {tuple(lists.shape)}")
    if lists.shape[1] == 0 or length % lists.shape[1]:
        raise ValueError(f"{length} queries cannot be split evenly into {lists.shape[1]} frames")
    if counts.shape != lists.shape[:3]:
        raise ValueError(f"counts must be {tuple(lists.shape[:3])}; got {tuple(counts.shape)}")
    if lists.dtype != torch.int32 or counts.dtype != torch.int32:
        raise TypeError(f"lists and counts must be int32; got {lists.dtype} and {counts.dtype}")
    if bias is not None and tuple(bias.shape) != tuple(k.shape[:3]):
        raise ValueError(f"bias must be {tuple(k.shape[:3])}; got {tuple(bias.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("lists", lists)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must have unit stride along its last dimension; got strides {x.stride()}")
    for x in (k, v, lists, counts, bias):
        if x is not None and x.device != q.device:
            raise ValueError(f"operands must be on one device; got {q.device} and {x.device}")


def invert(lists: Tensor, counts: Tensor, keys: int, heads: int, tile: int = TILE) -> Inverse:
    """The inverse of lists (B', F, H', M) over ``keys`` rows of ``heads`` key heads.  Sorted on the device, no sync."""
    b, frames, h, m = lists.shape
    key_heads = h if h < heads else heads
    each = h // key_heads  # lists to a key head
    device = lists.device
    inside = torch.arange(m, device=device) < counts[..., None]
    inside &= (lists >= 0) & (lists < keys)
    # (X, F R' M): the entries of a key head, those that do not count with a row past the last
    row = torch.where(inside, lists, keys).view(b, frames, key_heads, each, m).permute(0, 2, 1, 3, 4)
    row = row.reshape(b * key_heads, -1).long()
    x, entries = row.shape
    most = min(keys, entries)
    tiles = -(-most // tile)
    used = torch.zeros(x, keys + 1, dtype=torch.int64, device=device).scatter_(1, row, 1)
    used[:, keys] = 0
    place = used.cumsum(1) - 1  # of a used row among the used
    at = torch.where(used > 0, place, most)  # one column past the last takes what is not used
    rows = torch.full((x, most + 1), -1, dtype=torch.int32, device=device)
    rows.scatter_(1, at, torch.arange(keys + 1, dtype=torch.int32, device=device).expand(x, -1))
    slot = torch.where(row < keys, place.gather(1, row), tiles * tile)
    group = torch.arange(frames * each, device=device).repeat_interleave(m).expand(x, -1)
    # by tile, then by group; stable, so that the order within a run is that of the list
    order = (slot // tile * (frames * each) + group).sort(stable=True, dim=1)
    key, slot = order.values, slot.gather(1, order.indices)
    first = torch.ones_like(key, dtype=torch.bool)
    first[:, 1:] = key[:, 1:] != key[:, :-1]
    run = first.cumsum(1) - 1
    begins = torch.full((x, entries + 2), entries, dtype=torch.int64, device=device)
    position = torch.arange(entries, device=device).expand(x, -1)
    begins.scatter_(1, torch.where(first, run, entries + 1), position)
    groups = torch.zeros(x, entries + 1, dtype=torch.int64, device=device)
    groups.scatter_(1, torch.where(first, run, entries), key % (frames * each))
    tile_of_run = torch.full((x, entries + 1), tiles, dtype=torch.int64, device=device)
    tile_of_run.scatter_(1, torch.where(first, run, entries), key // (frames * each))
    tile_of_run[:, entries] = tiles
    wanted = torch.arange(tiles + 1, device=device).repeat(x, 1)
    starts = torch.searchsorted(tile_of_run[:, :entries].contiguous(), wanted)
    as_int = torch.int32
    return Inverse(
        rows[:, :most].contiguous(), starts.to(as_int), groups[:, :entries].to(as_int).contiguous(),
        begins[:, : entries + 1].to(as_int).contiguous(), slot.to(as_int),
    )  # fmt: skip
