r"""Which layers see which keys: the published rule and the adaptive one (arXiv 2605.23892, section 3.3, appendix B.3).

    LOCAL    every frame attends to itself alone, with the global block's own weights
    STRIDE   all queries; keys: the strided grid of the selected frames
    FRAMES   all queries; keys: every token of the selected frames

A layer index l counts global layers from 0.  The rules go one way: LOCAL, then STRIDE, then FRAMES.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.attention_entropy import AttentionProbe
from .grid import Layout, check_count

DENSE, LOCAL, STRIDE, FRAMES = "dense", "local", "stride", "frames"
#: Where a probe's queries come from: the middle frame (published code), or all tokens of the scene.
WHERE = ("middle", "all")


@dataclass(frozen=True)
class Probe:
    """Which queries tell a layer's entropy.

    ``heads``: this many, evenly spaced from the first to the last; ``queries``: this many tokens, evenly spaced over
    ``where``: "middle", frame N // 2, or "all", every frame.  The published on-line probe is the default; the paper's
    figure 4 has 50 queries.  Keys are always all tokens of all frames.  Source: eq. 3, and the code.
    """

    heads: int = 4
    queries: int = 32
    where: str = "middle"

    def __post_init__(self) -> None:
        check_count("heads", self.heads, 1)
        check_count("queries", self.queries, 1)
        if self.where not in WHERE:
            raise ValueError(f"where must be one of {', '.join(WHERE)}; got {self.where!r}")

    def head_rows(self, heads: int) -> list[int]:
        """Which of a layer's ``heads`` heads."""
        return _evenly(heads, self.heads)

    def token_rows(self, layout: Layout, device: torch.device | None = None) -> Tensor:
        """Which tokens of the scene, int64 (Q,), ascending."""
        count, first = layout.tokens, (layout.frames // 2) * layout.tokens
        if self.where == "all":
            count, first = layout.frames * layout.tokens, 0
        most = min(self.queries, count)
        # the same places as _evenly, made on the device
        return first + torch.arange(most, device=device) * (count - 1) // max(most - 1, 1)


def _evenly(count: int, wanted: int) -> list[int]:
    """min(wanted, count) of range(count), evenly spaced from the first to the last, none twice."""
    most = min(wanted, count)
    return [i * (count - 1) // max(most - 1, 1) for i in range(most)]


def normalised_entropy(probe: AttentionProbe, keys: int) -> Tensor:
    """H_norm (eq. 3), 0-dim, in [0, 1]: mean entropy over batch, heads and queries, over log of the number of keys."""
    return probe.entropy.mean() / math.log(max(keys, 2))


@dataclass(frozen=True)
class LayerRule:
    """The published rule: LOCAL for l < ``local``, STRIDE for l < ``sample``, FRAMES from there on.

    2 and 9 are the paper's, for VGGT (24 global layers) and pi3 (18); for other models choose them from the entropies,
    which ``probe`` measures for ``report()`` without changing what is computed (no sync).  ValueError: a negative one,
    or ``sample`` below ``local``.
    """

    local: int = 2
    sample: int = 9
    probe: Probe | None = None

    def __post_init__(self) -> None:
        check_count("local", self.local, 0)
        check_count("sample", self.sample, 0)
        if self.sample < self.local:
            raise ValueError(f"sample must be at least local = {self.local}; got {self.sample}")

    def begin(self) -> LayerState:
        """What decides the layers of one scene."""
        return LayerState(self)


@dataclass(frozen=True)
class AdaptiveRule:
    """The adaptive rule: LOCAL while H_norm >= ``tau1``, then STRIDE while H_norm >= ``tau2``, then FRAMES for good.

    H_norm is the entropy of the layer's dense attention at the queries of ``probe``, on the tokens as they come out of
    the layers already decided, averaged over the batch.  One value a layer crosses to the host, until FRAMES is
    reached.  0.95 with 0.88 to 0.92 is the best in the paper's tables E and F, which gave it up for the 7 s that its
    own probe took; thresholds were fitted on VGGT.  ValueError: a threshold outside [0, 1], or ``tau2`` above ``tau1``.
    """

    tau1: float = 0.95
    tau2: float = 0.90
    probe: Probe = field(default_factory=Probe)

    def __post_init__(self) -> None:
        for name, value in (("tau1", self.tau1), ("tau2", self.tau2)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {value}")
        if self.tau2 > self.tau1:
            raise ValueError(f"tau2 must be at most tau1 = {self.tau1}; got {self.tau2}")

    def begin(self) -> AdaptiveState:
        """What decides the layers of one scene."""
        return AdaptiveState(self)


class LayerState:
    """Of ``LayerRule``, in one scene."""

    def __init__(self, rule: LayerRule):
        self.rule = rule

    @property
    def probe(self) -> Probe | None:
        """How the next layer is to be probed, or None."""
        return self.rule.probe

    def decide(self, layer: int, entropy: Tensor | None) -> str:
        """What layer ``layer`` does; its entropy is not looked at."""
        if layer < self.rule.local:
            return LOCAL
        return STRIDE if layer < self.rule.sample else FRAMES


class AdaptiveState:
    """Of ``AdaptiveRule``, in one scene: a state that only goes on."""

    def __init__(self, rule: AdaptiveRule):
        self.rule = rule
        self.kind = LOCAL

    @property
    def probe(self) -> Probe | None:
        """How the next layer is to be probed: not at all once FRAMES is reached."""
        return None if self.kind == FRAMES else self.rule.probe

    def decide(self, layer: int, entropy: Tensor | None) -> str:
        """What the next layer does, given its H_norm: the one wait for the device."""
        if self.kind != FRAMES and entropy is not None:
            value = float(entropy)
            if self.kind == LOCAL and value < self.rule.tau1:
                self.kind = STRIDE
            if self.kind == STRIDE and value < self.rule.tau2:
                self.kind = FRAMES
        return self.kind
