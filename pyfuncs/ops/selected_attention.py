"""``selected_attention``: each group of queries attends to the keys of its own list; merging and bounding results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention as contract
from ..kernels import dispatch
from ..kernels.launch import accumulator
from .core import without_autocast
from .inputs import check_float


class AttentionOutput(NamedTuple):
    """Attention over a set of keys.

    out (B, Hq, L, D) as q; lse (B, Hq, L), natural logarithm; entropy (B, Hq, L) in nats, None where it was not asked
    for.  lse and entropy are fp32, fp64 for fp64 queries.
    """

    out: Tensor
    lse: Tensor
    entropy: Tensor | None = None


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, kv_counts: Tensor | int | None = None, *,
    scale: float | None = None, key_bias: Tensor | None = None, return_lse: bool = False, return_entropy: bool = False,
    backend: str = "auto",
):  # fmt: skip
    r"""Attention of each group of queries over the keys that its list names, not causal.

    For a query with list J, s_j = scale q . k_j + key_bias_j and p = softmax over J of s:

        out = \sum_j p_j v_j        lse = log \sum_j e^{s_j}        entropy = -\sum_j p_j log p_j

    each differentiable in q, k, v and key_bias.  Nothing of size L x Lk is formed; gradients of k and v are summed in
    a fixed order, and are exactly 0 for rows that no list names.  An empty list gives out 0, lse -inf, entropy 0.

    One list for all queries is gathered once and given to torch's own dense attention, which nothing beats there, if
    only ``out`` is asked for, there is no bias, and the length is known to the host: ``kv_counts`` an int, or
    ``kv_indices`` on the CPU.

    Args:
        q: (B, Hq, L, D), D at most 128; fp32, bf16, fp16 or fp64.
        k, v: (B, Hkv, Lk, D) of q's dtype; Hkv divides Hq (query head h reads key head h Hkv // Hq).
        kv_indices: rows of k and v, int32 or int64.  (M,): one list; (F, M): one a frame, the L queries being split
            evenly into F consecutive frames; (F, heads, M) with F or heads 1 where shared, heads else Hkv or Hq;
            (B, F, heads, M) where the lists differ in the batch.  Valid entries first, then -1.  A row listed twice
            counts twice.
        kv_counts: valid entries of each list, of kv_indices' shape without M; an int where every list has that many
            and none is -1, which saves asking; None: told by the -1s.
        scale: D^-1/2 by default.
        key_bias: added to a key's scores, broadcastable to (B, Hkv, Lk): log m makes a key count m times.
        return_lse, return_entropy: return ``AttentionOutput`` instead of out.
        backend: "triton", "torch" or "auto".

    Raises: TypeError or ValueError naming the argument.  An index beyond Lk is an error where it can be seen without
    waiting for the device, and elsewhere NaN in the rows that list it.

    Source: arXiv 2605.23892 (sections 3.2 and 3.3) for the lists; arXiv 2205.14135 for the blockwise softmax.
    """
    _check(q, k, v, key_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lists, counts, known = _normal_form(kv_indices, kv_counts, q, k)
    plain = not return_lse and not return_entropy and key_bias is None and backend == "auto"
    if plain and known and lists.shape[1:3] == (1, 1) and lists.shape[3]:
        return _shared(q, k, v, lists[:, 0, 0], scale)
    bias = None if key_bias is None else key_bias.expand(k.shape[:3])
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    out, lse, entropy = _attention(q, k, v, lists, counts, bias, scale, return_entropy, backend)
    if not (return_lse or return_entropy):
        return out
    return AttentionOutput(out, lse, entropy if return_entropy else None)


def _check(q, k, v, key_bias) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be (B, heads, length, D); got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {x.device}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    b, heads, _, d = q.shape
    if k.shape[0] != b or k.shape[3] != d or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k must be ({b}, heads that divide {heads}, Lk, {d}); got {tuple(k.shape)}")
    if not 1 <= d <= contract.HEAD_DIM:
        raise ValueError(f"q must have a head dimension in [1, {contract.HEAD_DIM}]; got {d}")
    if key_bias is None:
        return
    check_float("key_bias", key_bias)
    try:
        shape = torch.broadcast_shapes(key_bias.shape, k.shape[:3])
    except RuntimeError:
        shape = None
    if shape != k.shape[:3] or key_bias.device != q.device:
        raise ValueError(
            f"key_bias must be broadcastable to {tuple(k.shape[:3])} on {q.device}; "
            f"got {tuple(key_bias.shape)} on {key_bias.device}"
        )


def _normal_form(kv_indices, kv_counts, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, bool]:
    """lists (B', F, H', M) and counts (B', F, H'), int32, and whether the host knows that every entry is valid."""
    if not isinstance(kv_indices, Tensor) or kv_indices.dtype not in (torch.int32, torch.int64):
        got = kv_indices.dtype if isinstance(kv_indices, Tensor) else type(kv_indices).__name__
        raise TypeError(f"kv_indices must be an int32 or int64 tensor; got {got}")
    if not 1 <= kv_indices.ndim <= 4:
        raise ValueError(
            f"kv_indices must be (M,), (F, M), (F, heads, M) or (B, F, heads, M); got {tuple(kv_indices.shape)}"
        )
    if kv_indices.device != q.device:
        raise ValueError(f"kv_indices must be on q's device {q.device}; got {kv_indices.device}")
    given = kv_indices.shape
    lists = kv_indices[:, None] if kv_indices.ndim == 2 else kv_indices  # (M,), (F, 1, M), (F, heads, M), (B, ...)
    lists = lists.view(*(1,) * (4 - lists.ndim), *lists.shape)
    b, heads, length, _ = q.shape
    frames, own = lists.shape[1:3]
    if lists.shape[0] not in (1, b):
        raise ValueError(f"kv_indices must have 1 or B = {b} along its first dimension; got {tuple(given)}")
    if frames == 0 or length % frames:
        raise ValueError(f"kv_indices must have frames that split q's {length} queries evenly; got {tuple(given)}")
    if own not in (1, k.shape[1], heads):
        raise ValueError(f"kv_indices must have 1, {k.shape[1]} or {heads} heads; got {tuple(given)}")
    m = lists.shape[3]
    known = False
    if isinstance(kv_counts, int):
        if not 0 <= kv_counts <= m:
            raise ValueError(f"kv_counts must be in [0, {m}]; got {kv_counts}")
        lists, known = lists[..., :kv_counts], True
        counts = torch.full(lists.shape[:3], kv_counts, dtype=torch.int32, device=q.device)
    elif kv_counts is None:
        places = torch.arange(1, m + 1, dtype=torch.int32, device=q.device)
        counts = torch.where(lists >= 0, places, 0).amax(-1) if m else lists.new_zeros(lists.shape[:3])
    elif not isinstance(kv_counts, Tensor) or kv_counts.dtype not in (torch.int32, torch.int64):
        got = kv_counts.dtype if isinstance(kv_counts, Tensor) else type(kv_counts).__name__
        raise TypeError(f"kv_counts must be an int, or an int32 or int64 tensor; got {got}")
    else:
        if kv_counts.shape != given[:-1] or kv_counts.device != q.device:
            raise ValueError(
                f"kv_counts must be {tuple(given[:-1])} on {q.device}; "
                f"got {tuple(kv_counts.shape)} on {kv_counts.device}"
            )
        counts = kv_counts.view(lists.shape[:3])
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        lists, known = _look(lists, counts, k.shape[2])
    # int32 reaches every row: a k of 2^31 rows of one element would be 4 GiB a head
    return lists.to(torch.int32).contiguous(), counts.to(torch.int32).contiguous(), known


def _look(lists: Tensor, counts: Tensor, keys: int) -> tuple[Tensor, bool]:
    """Checks that need the values: free on the CPU.  Lists cut to the longest; whether every entry is valid."""
    m = lists.shape[3]
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= m:
        raise ValueError(f"kv_counts must be in [0, {m}]; got {int(counts.min())} to {int(counts.max())}")
    if lists.numel() and (int(lists.max()) >= keys or int(lists.min()) < -1):
        worst = int(lists.max()) if int(lists.max()) >= keys else int(lists.min())
        raise ValueError(f"kv_indices must be in [0, {keys}), or -1 for none; got {worst}")
    longest = int(counts.max()) if counts.numel() else 0
    lists = lists[..., :longest]
    return lists, bool((counts == longest).all()) and bool((lists >= 0).all())


class _Rows(torch.autograd.Function):
    """Rows of x (B, H, Lk, D) that every head shares, index (B' , M); backward adds in the order of the index."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        if len(index) == 1:
            return x.index_select(2, index[0])
        batch = torch.arange(len(index), device=x.device)[:, None]
        return x.transpose(1, 2)[batch, index].transpose(1, 2)  # (B, M, H, D), whole rows

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        b, h, keys, d = ctx.shape
        out = g.new_zeros(b, keys, h, d)
        if len(index) == 1 and g.device.type == "cpu":
            return out.index_add_(1, index[0], g.transpose(1, 2)).transpose(1, 2), None
        # not index_add: on a GPU it adds in any order where a row is listed twice
        batch = torch.arange(b, device=g.device)[:, None]
        out.index_put_((batch, index.expand(b, -1)), g.transpose(1, 2), accumulate=True)
        return out.transpose(1, 2), None


def _shared(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """One list: gather once, and torch's best dense attention."""
    index = index.long()
    k, v = _Rows.apply(k, index), _Rows.apply(v, index)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@torch.library.custom_op("burnish::selected_attention", mutates_args=())
@without_autocast
def _attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, bias: Tensor | None, scale: float, entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = dispatch.without_host("attention", backend, q.device)
    out, lse, spread = kernels.forward(q, k, v, lists, counts, bias, scale, entropy=entropy)
    return out, lse, lse.new_empty(0) if spread is None else spread


@_attention.register_fake
def _(q, k, v, lists, counts, bias, scale, entropy, backend):
    lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse, torch.empty_like(lse) if entropy else lse.new_empty(0)


@torch.library.custom_op("burnish::selected_attention_backward", mutates_args=())
@without_autocast
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    entropy: Tensor, d_out: Tensor, d_lse: Tensor | None, d_entropy: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kernels = dispatch.without_host("attention", backend, q.device)
    saved = contract.Saved(out, lse, entropy if d_entropy is not None else None, d_out, d_lse, d_entropy)
    dq, dk, dv, d_bias = kernels.backward(q, k, v, lists, counts, bias, scale, saved)
    return dq, dk, dv, lse.new_empty(0) if d_bias is None else d_bias


@_attention_backward.register_fake
def _(q, k, v, lists, counts, bias, out, lse, entropy, d_out, d_lse, d_entropy, scale, backend):
    d_bias = lse.new_empty(0 if bias is None else bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


def _keep(ctx, inputs, output):
    q, k, v, lists, counts, bias, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, lists, counts, bias, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse, d_entropy):
    none = (None,) * 9
    if d_out is None and d_lse is None and d_entropy is None:
        return none
    q, k, v, lists, counts, bias, out, lse, entropy = ctx.saved_tensors
    if entropy.shape != lse.shape:  # what stands for an entropy that was not asked for
        d_entropy = None
    d_out = torch.zeros_like(out) if d_out is None else d_out
    dq, dk, dv, d_bias = _attention_backward(
        q, k, v, lists, counts, bias, out, lse, entropy, d_out, d_lse, d_entropy, ctx.scale, ctx.backend
    )  # fmt: skip
    return dq, dk, dv, None, None, None if bias is None else d_bias.to(bias.dtype), None, None, None


_attention.register_autograd(_gradients, setup_context=_keep)


def merge_attention(parts: Sequence[AttentionOutput]) -> AttentionOutput:
    r"""Attention over the union of disjoint key sets, from that over each.

    With L = log \sum_i e^{lse_i} and w_i = e^{lse_i - L}:

        out = \sum_i w_i out_i        entropy = \sum_i w_i entropy_i - \sum_i w_i log w_i

    Exact, associative and differentiable.  A key in two of the sets counts twice.  The entropy is None unless every
    part has one.  Source: arXiv 2205.14135, appendix B, for out; the entropy by the chain rule of entropies.
    """
    if not parts:
        raise ValueError("parts must hold at least one AttentionOutput; got none")
    lse = torch.stack([p.lse for p in parts])
    top = lse.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    total = (lse - top).exp().sum(0)
    some = total > 0
    whole = torch.where(some, torch.where(some, total, 1).log() + top, -torch.inf)
    # log w, with 0 where w is 0: 0 log 0 is 0
    there = (lse != -torch.inf) & some
    log_w = torch.where(there, lse - torch.where(some, whole, 0), 0)
    w = torch.where(there, log_w.exp(), 0)
    out = sum(w[i][..., None] * p.out.to(w.dtype) for i, p in enumerate(parts))
    entropy = None
    if all(p.entropy is not None for p in parts):
        entropy = (w * (torch.stack([p.entropy for p in parts]) - log_w)).sum(0)  # type: ignore[misc]
    return AttentionOutput(out.to(parts[0].out.dtype), whole, entropy)  # type: ignore[union-attr]


def attention_certificate(lse_selected: Tensor, lse_all: Tensor, v: Tensor) -> Tensor:
    r"""A bound on what dropping keys did to each row of attention: |out_S - out| <= 2 (1 - mu) max_j |v_j|.

    mu = e^{lse_S - lse} is the mass that the selected keys S hold of the whole softmax; out_S - out is
    (1 - mu) (out_S - out_rest), and neither term is longer than the longest value.

    Args:
        lse_selected, lse_all: (B, Hq, L) log-sum-exp over the selected and over all keys.
        v: (B, Hkv, Lk, D) all values.

    Returns: (B, Hq, L), in the Euclidean norm of a row of out.
    """
    if lse_selected.shape != lse_all.shape or lse_all.ndim != 3:
        raise ValueError(
            f"lse_selected and lse_all must be (B, Hq, L), of one shape; "
            f"got {tuple(lse_selected.shape)} and {tuple(lse_all.shape)}"
        )
    heads = lse_all.shape[1]
    if v.ndim != 4 or v.shape[1] == 0 or heads % v.shape[1]:
        raise ValueError(f"v must be (B, heads that divide {heads}, Lk, D); got {tuple(v.shape)}")
    longest = v.to(lse_all.dtype).norm(dim=-1).amax(-1).repeat_interleave(heads // v.shape[1], 1)
    return -2 * torch.expm1((lse_selected - lse_all).clamp(max=0)) * longest[..., None]
