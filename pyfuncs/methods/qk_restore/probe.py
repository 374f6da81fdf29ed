"""Where attention's gradient goes, by distance: g(tau) of arXiv 2606.11052 (Theorem 4.6), and how far attention looks.

With scores e_ts = q_t k_s scale + mask and P = softmax(e), the backward of attention has

    dL/de_ts = P_ts (dP_ts - sum_u P_tu dP_tu),   dP = dO V^T

The probe puts an attention function of its own into a transformers model, which computes this in its backward and
sums it by the distance t - s; nothing of size length x length is kept.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

_NAME = "burnish_distance_probe"
_COUNTER = itertools.count()
#: Queries a block: the block's scores are (batch, heads, _ROWS, keys).
_ROWS = 256


@dataclass(frozen=True)
class DistanceProfile:
    """Of the layers probed, by distance tau = t - s in tokens.

    absolute: (T,) mean over batch, heads, layers and t of |dL/de_{t,t-tau}|.
    expected: (T,) mean over heads and layers of |mean over batch and t of dL/de_{t,t-tau}|: the gradient that is left
        when the data's noise has averaged out, which is what decays with the data's own correlation.
    counts: (T,) pairs that each is the mean of.
    mean_distance: layer -> mean over t and heads of sum_s P_ts (t - s).
    """

    absolute: torch.Tensor
    expected: torch.Tensor
    counts: torch.Tensor
    mean_distance: dict[int, float]

    def window(self, kind: str = "absolute", start: int = 1, stop: int | None = None) -> tuple[float, float]:
        """(W, r^2) of g(tau) ~ exp(-tau / W); see ``fit_decay``."""
        return fit_decay(getattr(self, kind), self.counts, start, stop)


def fit_decay(
    g: torch.Tensor, counts: torch.Tensor | None = None, start: int = 1, stop: int | None = None
) -> tuple[float, float]:
    """(W, r^2) of the line log g = c - tau / W over start <= tau < stop, by least squares weighted with ``counts``.

    W is in tokens, inf where g does not fall.  The paper's estimator (its bins and layers) is not known.
    ValueError with fewer than three distances where g > 0.
    """
    tau = torch.arange(len(g), dtype=torch.float64)
    use = (g > 0) & (tau >= start) & (tau < (len(g) if stop is None else stop))
    if counts is not None:
        use &= counts > 0
    if int(use.sum()) < 3:
        raise ValueError(
            f"fit_decay: g > 0 at {int(use.sum())} distances from {start} to {stop or len(g)}; needs three"
        )
    x, y = tau[use], g[use].double().log()
    w = torch.ones_like(x) if counts is None else counts[use].double()
    w = w / w.sum()
    x, y = x - (w * x).sum(), y - (w * y).sum()
    slope = float((w * x * y).sum() / (w * x * x).sum())
    spread = float((w * y * y).sum())
    r2 = 1.0 if spread == 0 else 1 - float((w * (y - slope * x) ** 2).sum()) / spread
    return (math.inf if slope >= 0 else -1 / slope), r2


class _Tally:
    """Sums of one layer."""

    def __init__(self):
        self.signed = self.absolute = self.counts = None
        self.distance = self.queries = 0.0

    def add(self, score_grad: torch.Tensor, distance: torch.Tensor, allowed: torch.Tensor) -> None:
        """score_grad (B, H, rows, keys); distance (rows, keys), negative in the future; allowed (B or 1, 1, rows,
        keys)."""
        length, size = int(distance.max()) + 1, score_grad.shape[1]
        if self.counts is None or len(self.counts) < length:
            self._grow(length, size, score_grad.device)
        index = distance.clamp_min(0).flatten()
        inside = (distance >= 0).to(score_grad)
        pairs = (allowed & (distance >= 0)).sum(0)[0] * (score_grad.shape[0] // allowed.shape[0]) * size
        self.signed.index_add_(1, index, (score_grad.sum(0) * inside).flatten(1).double())
        self.absolute.index_add_(0, index, (score_grad.abs().sum((0, 1)) * inside).flatten().double())
        self.counts.index_add_(0, index, pairs.flatten().double())

    def _grow(self, length: int, heads: int, device) -> None:
        old = self.signed, self.absolute, self.counts
        self.signed = torch.zeros(heads, length, dtype=torch.float64, device=device)
        self.absolute, self.counts = (torch.zeros(length, dtype=torch.float64, device=device) for _ in range(2))
        if old[2] is not None:
            known = len(old[2])
            self.signed[:, :known], self.absolute[:known], self.counts[:known] = old


def _probabilities(q, k, mask, scale, rows: slice) -> torch.Tensor:
    """P of some queries: q (B, KV, G, L, D), k (B, KV, S, D) -> (B, KV, G, rows, S), in fp32 or fp64."""
    scores = torch.einsum("bkgtd,bksd->bkgts", q[:, :, :, rows], k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores + mask[:, :, rows].unsqueeze(2).to(scores.dtype)
    return scores.softmax(-1)


def _geometry(length: int, keys: int, rows: slice, device) -> torch.Tensor:
    t = torch.arange(length, device=device)[rows] + keys - length
    return t[:, None] - torch.arange(keys, device=device)[None]


class _Attend(torch.autograd.Function):
    """Attention in blocks of queries; the backward tallies dL/de."""

    @staticmethod
    def forward(ctx, q, k, v, mask, allowed, scale, tally):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for start in range(0, q.shape[3], _ROWS):
            rows = slice(start, start + _ROWS)
            p = _probabilities(q, k, mask, scale, rows)
            distance = _geometry(q.shape[3], k.shape[2], rows, q.device)
            seen = (p * distance.clamp_min(0).to(p)).sum(-1)
            # a query that is padding sees nothing
            real = allowed[:, :, rows].any(-1).unsqueeze(2).expand(seen.shape)
            tally.distance += float(seen[real].double().sum())
            tally.queries += int(real.sum())
            out[:, :, :, rows] = torch.einsum("bkgts,bksd->bkgtd", p.to(v.dtype), v)
        ctx.save_for_backward(q, k, v, mask, allowed)
        ctx.scale, ctx.tally = scale, tally
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, allowed = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, q.shape[3], _ROWS):
            rows = slice(start, start + _ROWS)
            p, do = _probabilities(q, k, mask, ctx.scale, rows), grad[:, :, :, rows]
            ds = score_gradient(p, torch.einsum("bkgtd,bksd->bkgts", do, v).to(p.dtype))
            distance = _geometry(q.shape[3], k.shape[2], rows, q.device)
            ctx.tally.add(ds.flatten(1, 2), distance, allowed[:, :, rows])
            scaled = (ds * ctx.scale).to(q.dtype)
            dq[:, :, :, rows] = torch.einsum("bkgts,bksd->bkgtd", scaled, k)
            dk += torch.einsum("bkgts,bkgtd->bksd", scaled, q[:, :, :, rows])
            dv += torch.einsum("bkgts,bkgtd->bksd", p.to(v.dtype), do)
        return dq, dk, dv, None, None, None, None


def score_gradient(p: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    """dL/de of softmax rows: p, dp (..., keys), dp the gradient of the probabilities."""
    return p * (dp - (p * dp).sum(-1, keepdim=True))


class DistanceProbe:
    """Within the block, a transformers model's softmax layers tally attention and its gradient by distance.

        with DistanceProbe(model) as probe:
            model(input_ids=ids, labels=ids).loss.backward()
        g = probe.profile()

    Several forward and backward passes add up.  The model computes what it computed before, up to rounding, and has
    its own attention back after the block.

    Args:
        model: one whose attention goes through transformers' attention interface.
        layers: indices of the layers to tally; by default all that come through it.

    ValueError for a model that does not let its attention be set.  At the first forward, ValueError for what is not
    plain
    softmax attention: dropout, softcaps, sinks.
    """

    def __init__(self, model, layers=None):
        self.model, self.layers = model, None if layers is None else set(layers)
        self.tallies: dict[int, _Tally] = {}
        self._before: str | None = None
        # one name each: two models may be probed at once
        self._name = f"{_NAME}_{next(_COUNTER)}"

    def __enter__(self) -> DistanceProbe:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._before = self.model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(self._name, self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        try:
            self.model.set_attn_implementation(self._name)
            if self.model.config._attn_implementation != self._name:
                raise ValueError(f"{type(self.model).__name__} does not let its attention be set: it cannot be probed")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.model.config._attn_implementation != self._before:
            self.model.set_attn_implementation(self._before)
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            table._global_mapping.pop(self._name, None)

    def _attend(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **extra):
        odd = [n for n in ("softcap", "s_aux", "position_bias") if extra.get(n) is not None]
        if dropout:
            odd.append("dropout")
        if odd:
            raise ValueError(f"{type(module).__name__}: attention with {', '.join(odd)} is not plain softmax attention")
        layer = getattr(module, "layer_idx", None)
        layer = -1 if layer is None else int(layer)
        tally = _Tally() if self.layers is not None and layer not in self.layers else None
        if tally is None:
            tally = self.tallies.setdefault(layer, _Tally())
        b, h, length, d = query.shape
        keys, kv = key.shape[2], key.shape[1]
        scale = d**-0.5 if scaling is None else scaling
        mask = attention_mask
        if mask is None:
            causal = _geometry(length, keys, slice(None), query.device) >= 0
            mask = causal[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        mask = mask[..., :keys]
        allowed = mask > torch.finfo(mask.dtype).min / 2
        grouped = query.reshape(b, kv, h // kv, length, d)
        out = _Attend.apply(grouped, key, value, mask, allowed, scale, tally)
        return out.reshape(b, h, length, -1).transpose(1, 2).contiguous(), None

    def profile(self) -> DistanceProfile:
        """What was tallied.  ValueError where nothing was: no forward, or attention that does not come through here."""
        if not self.tallies:
            raise ValueError("nothing was tallied: no forward within the block, or the model's attention is its own")
        distances = {i: t.distance / t.queries for i, t in sorted(self.tallies.items()) if t.queries}
        done = [t for t in self.tallies.values() if t.counts is not None]
        length = max((len(t.counts) for t in done), default=0)
        absolute, expected, counts = (torch.zeros(length, dtype=torch.float64) for _ in range(3))
        for t in done:
            n = len(t.counts)
            absolute[:n] += t.absolute.cpu()
            counts[:n] += t.counts.cpu()
            # each head's own mean first: heads that pull in different directions must not cancel
            expected[:n] += t.signed.abs().sum(0).cpu()
        seen = counts.clamp_min(1)
        return DistanceProfile(absolute / seen, expected / seen, counts, distances)
