"""``attention_entropy``: what the attention of a few sampled queries looks like over all keys, streamed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels import probe as contract
from .core import without_autocast
from .inputs import check_float

#: Keys to a split where nothing else decides: enough programs to fill a device, and few numbers to merge.
SPLIT = 4096


class AttentionProbe(NamedTuple):
    """Statistics of each query's softmax over all keys, fp32 (fp64 for fp64).

    lse (B, H, Q), natural logarithm; entropy (B, H, Q) in nats, in [0, log Lk]; top1 (B, H, Q), the largest weight;
    frame_mass (B, H, Q, frames), the weight of each frame's keys, or None.
    """

    lse: Tensor
    entropy: Tensor
    top1: Tensor
    frame_mass: Tensor | None


@torch.no_grad()
def attention_entropy(
    q: Tensor, k: Tensor, *, scale: float | None = None, frames: int | None = None, backend: str = "auto"
) -> AttentionProbe:
    r"""Entropy, log-sum-exp, largest weight and mass a frame of softmax(scale q k^T), for queries that were sampled.

    Keys are read once, in splits that run side by side and are merged on the device; no Q x Lk matrix is kept and
    nothing waits for the device.  Not differentiable: ``selected_attention(return_entropy=True)`` is.

    Args:
        q: (B, H, Q, D) sampled queries, of sampled heads if so wished; D at most 128.
        k: (B, Hkv, Lk, D), of the same heads; Hkv divides H.  Sliced heads, k[:, ::5], cost no copy.
        scale: D^-1/2 by default.
        frames: cut the keys evenly into this many consecutive frames, and give each one's mass.
        backend: "triton", "torch" or "auto".

    Raises: TypeError or ValueError naming the argument.
    Source: arXiv 2605.23892, equation 3 and appendix B.3; normalised there by log Lk.
    """
    for name, x in (("q", q), ("k", k)):
        check_float(name, x)
    keys = k.shape[2] if k.ndim == 4 else 0
    if frames is not None and (frames < 1 or keys % frames):
        raise ValueError(f"frames must divide k's {keys} keys; got {frames}")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    contract.check(q, k, 1)
    if frames is None:
        split, each = min(SPLIT, keys), 1
    else:
        length = keys // frames
        # a frame is cut further only into equal parts: its splits stand together
        each = next((n for n in range(-(-length // SPLIT), length + 1) if length % n == 0), 1)
        split = length // each
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    parts = contract.Partial(*_probe(q, k, scale, split, backend))
    mass = None
    if frames is not None:
        parts, _ = contract.merge(parts, each)
        whole, mass = contract.merge(parts, frames)
        mass = mass[..., 0, :]
    else:
        whole, _ = contract.merge(parts, parts.top.shape[-1])
    top, total, spread = (x[..., 0] for x in whole)
    log_total = total.log()
    return AttentionProbe(top + log_total, (log_total - spread / total).clamp(min=0), total.reciprocal(), mass)


@torch.library.custom_op("burnish::attention_probe", mutates_args=())
@without_autocast
def _probe(q: Tensor, k: Tensor, scale: float, split: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    top, total, spread = dispatch.without_host("probe", backend, q.device).probe(q, k, scale, split)
    return top, total, spread


@_probe.register_fake
def _(q, k, scale, split, backend):
    top, total, spread = contract.new_partial(q, -(-k.shape[2] // split))
    return top, total, spread
