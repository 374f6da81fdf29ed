"""What ``burnish qk-restore`` can be told, apart from the work itself so that a command line lists it cheaply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_PARTS = ("q", "k", "v", "o", "latent")


@dataclass(frozen=True)
class QKRestoreOptions:
    """How to restore; the defaults are the paper's algorithm (arXiv 2606.11052, Algorithm 1).

    layers: "softmax" (by the config's layer types), "all", or indices.
    parts: of "q", "k", "v", "o", "latent"; the paper's ablations are {"q"}, {"k"}, {"v"}.
    alpha: 1 restores (the paper); less goes that share of the way from the fine-tuned weights to those before.
    mode: "restore", or "pro" for QK-Pro (its appendix N): K from before, Q solved for.
    lam: QK-Pro's ridge; it must be given with "pro", since the paper's value is not known here.
    convention: of QK-Pro's matrices. "A": W is d x d_h, so that W_Q W_K^T is the routing form (what the paper's text
        means); "B": W as nn.Linear stores it, which does not preserve that form.
    include_bias: biases of q and k are part of the affine map.  The paper does not say.
    include_qk_norm: q_norm and k_norm too.  The paper does not say.
    include_swa: sliding-window layers too.  The paper does not say.
    kinds: layer types that are not known, and what they are: {"indexed_attention": "softmax"}.
    fused, query_gate, stack: see ``burnish.paths.attention``; needed only where the config's model_type is not known.
    """

    layers: str | tuple[int, ...] = "softmax"
    parts: tuple[str, ...] = ("q", "k")
    alpha: float = 1.0
    mode: str = "restore"
    lam: float | None = None
    convention: str = "A"
    include_bias: bool = True
    include_qk_norm: bool = False
    include_swa: bool = False
    kinds: Mapping[str, str] | None = None
    fused: str | None = None
    query_gate: str | None = None
    stack: str | None = None

    def check(self) -> QKRestoreOptions:
        """Itself; ValueError for values that cannot be, or do not go together."""
        unknown = [p for p in self.parts if p not in _PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts: {unknown[0] if unknown else 'nothing'!r} is none of {', '.join(_PARTS)}")
        if not (isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha must lie in [0, 1]; got {self.alpha}")
        if self.mode not in ("restore", "pro"):
            raise ValueError(f"mode must be 'restore' or 'pro'; got {self.mode!r}")
        if self.convention not in ("A", "B"):
            raise ValueError(f"convention must be 'A' or 'B'; got {self.convention!r}")
        if self.mode == "pro":
            if self.lam is None or not math.isfinite(self.lam) or self.lam < 0:
                raise ValueError(f"lam must be given for QK-Pro, >= 0; got {self.lam}")
            if set(self.parts) != {"q", "k"}:
                raise ValueError(f"QK-Pro is of the parts q and k; got {', '.join(self.parts)}")
            if self.include_qk_norm:
                raise ValueError("include_qk_norm does not go with QK-Pro: its form has no norm in it")
        elif self.lam is not None:
            raise ValueError("lam goes with mode='pro'")
        return self
