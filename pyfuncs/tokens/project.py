r"""Queries, keys and values of an attention module, for the rows that are wanted and no others.

    q = rope(q_norm(W_q u))             every token
    k = rope(k_norm(W_k u[r]))          rows r that some query will see
    v = W_v u[r]

W = [W_q; W_k; W_v] is the module's own ``qkv`` weight, cut by rows, so that K and V cost 4 |r| C^2 FLOPs and |r| rows
of memory instead of L.  q and k end in v's dtype: under CUDA autocast LayerNorm returns fp32, which keeps attention
off the flash kernel (specs 3.4; it is why the published VGGT numbers run at half of pi3's rate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PARTS = {"q": (0, 1), "k": (1, 2), "v": (2, 3), "kv": (1, 3), "qkv": (0, 3)}


@dataclass(frozen=True)
class Form:
    """How a family writes its attention modules.

    ``arguments``: of ``attn.forward`` after x, in order; ``positions``: which of them holds the tokens' positions; the
    others must be None.  ``rope``: attribute that rotates q or k by them, or None.  ``cast_first``: q and k take v's
    dtype before they are rotated, not after.
    """

    arguments: tuple[str, ...]
    positions: str
    rope: str = "rope"
    cast_first: bool = False

    def positions_of(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The positions in a call.  TypeError for an argument that the family has not, ValueError for one in use."""
        if len(args) > len(self.arguments):
            raise TypeError(f"attention takes x and {', '.join(self.arguments)}; got {len(args)} arguments after x")
        given = dict(zip(self.arguments, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in self.arguments:
                raise TypeError(f"attention takes x and {', '.join(self.arguments)}; got {name}")
            given[name] = value
        for name, value in given.items():
            if name != self.positions and value is not None:
                raise ValueError(f"{name} must be None on an accelerated model; got {type(value).__name__}")
        positions = given.get(self.positions)
        return positions if isinstance(positions, Tensor) else None  # UniCeption's is a list of None without RoPE


class Projection:
    """The projections of one attention module.

    ``attn``: has ``qkv`` (q, k and v one after another), ``num_heads``, and maybe ``q_norm``, ``k_norm`` and ``scale``;
    ``form``: of its family; ``keys``: of the dense layer, N, which UniCeption's scalable softmax and entropy scaling
    read: pruning keys must not change the temperature.
    """

    def __init__(self, attn: Any, form: Form, keys: int):
        self.attn, self.form, self.keys = attn, form, keys
        self.heads: int = attn.num_heads
        weight = getattr(attn.qkv, "weight", None)
        # a subclass, a hook or a forward of its own computes something else than x W^T + b: that is called whole
        self.plain = (
            type(attn.qkv) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and "forward" not in vars(attn.qkv)
            and not attn.qkv._forward_hooks and not attn.qkv._forward_pre_hooks and not attn.qkv._backward_hooks
        )  # fmt: skip

    @property
    def scale(self) -> float | None:
        """What scores are multiplied by; None for D^-1/2."""
        scale = getattr(self.attn, "scale", None)
        return None if scale is None else float(scale)

    @property
    def dropout(self) -> float:
        """Of attention weights, now."""
        drop = getattr(self.attn, "attn_drop", None)
        return float(getattr(drop, "p", 0.0)) if self.attn.training else 0.0

    def raw(self, u: Tensor, part: str, heads: list[int] | None = None) -> list[Tensor]:
        """Each of q, k and v named in ``part``, before norms: u (B, n, C) -> (B, heads, n, D), strided views."""
        first, last = _PARTS[part]
        if not self.plain:
            out = self.attn.qkv(u)
            third = out.shape[-1] // 3
            out = out[..., first * third : last * third]
        else:
            weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
            third = weight.shape[0] // 3
            if heads is not None and last - first == 1:  # rows of these heads alone
                d = third // self.heads
                weight = torch.cat([weight[first * third + h * d : first * third + (h + 1) * d] for h in heads])
                if bias is not None:
                    bias = torch.cat([bias[first * third + h * d : first * third + (h + 1) * d] for h in heads])
                return [self._split(F.linear(u, weight, bias), len(heads))]
            if (first, last) != (0, 3):
                weight = weight[first * third : last * third]
                bias = None if bias is None else bias[first * third : last * third]
            out = F.linear(u, weight, bias)
        pieces = [self._split(x, self.heads) for x in out.split(third, -1)]
        return pieces if heads is None else [x[:, heads] for x in pieces]

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        b, n, width = x.shape
        return x.view(b, n, heads, width // heads).transpose(1, 2)

    def finish(self, x: Tensor, norm: str, positions: Tensor | None) -> Tensor:
        """Norm, rotation and dtype of q or k (B, heads, n, D) as ``raw`` gave it."""
        dtype = x.dtype
        layer = getattr(self.attn, norm, None)
        if layer is not None:
            x = layer(x)
        if self.form.cast_first:
            x = x.to(dtype)
        rope = getattr(self.attn, self.form.rope, None)
        if rope is not None and positions is not None:
            x = rope(x, positions)
        return x.to(dtype)

    def temper(self, q: Tensor) -> Tensor:
        """q times UniCeption's temperatures, of the dense sequence's length."""
        attn, keys = self.attn, self.keys
        if getattr(attn, "use_scalable_softmax", False):
            q = q * math.log(keys)
        if getattr(attn, "use_entropy_scaling", False):
            growth, base = attn.entropy_scaling_growth_factor, attn.base_token_count_for_entropy_scaling
            q = q * math.sqrt(growth * math.log(keys) / math.log(base))
        return q

    def queries(self, u: Tensor, positions: Tensor | None, heads: list[int] | None = None) -> Tensor:
        """q (B, heads, n, D) of tokens u (B, n, C), ready for attention."""
        (q,) = self.raw(u, "q", heads)
        return self.temper(self.finish(q, "q_norm", positions))

    def keys_of(self, u: Tensor, positions: Tensor | None, heads: list[int] | None = None) -> Tensor:
        """k alone, as the probe needs it."""
        (k,) = self.raw(u, "k", heads)
        return self.finish(k, "k_norm", positions)

    def keys_values(self, u: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """k and v (B, heads, n, D)."""
        k, v = self.raw(u, "kv")
        return self.finish(k, "k_norm", positions), v

    def all(self, u: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, by one product."""
        q, k, v = self.raw(u, "qkv")
        return self.temper(self.finish(q, "q_norm", positions)), self.finish(k, "k_norm", positions), v

    def output(self, out: Tensor) -> Tensor:
        """Heads laid side by side (B, L, heads D) -> the module's output (B, L, C)."""
        out = self.attn.proj(out)
        drop = getattr(self.attn, "proj_drop", None)
        return out if drop is None else drop(out)


def side_by_side(out: Tensor) -> Tensor:
    """(B, heads, n, D) -> (B, n, heads D)."""
    return out.transpose(1, 2).flatten(2)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B', R) of x (B, L, ...), B' being 1 or B -> (B, R, ...)."""
    if len(rows) == 1:
        return x.index_select(1, rows[0])
    b, length = x.shape[:2]
    if x.shape[0] != len(rows):
        raise ValueError(f"rows must be for 1 or {b} scenes; got {len(rows)}")
    flat = rows + length * torch.arange(b, device=rows.device)[:, None]  # scene b begins at row b L
    return x.reshape(b * length, *x.shape[2:]).index_select(0, flat.flatten()).unflatten(0, tuple(rows.shape))
