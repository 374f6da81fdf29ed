"""One forward pass of an accelerated model: what is known of the scene, and what each layer decided.

Layers recomputed in backward (activation checkpointing) must do what they did in forward, also with two scenes in
flight.  A recomputed block is given the tensor it was given in forward, or one on the same memory, so each block's
input is remembered, weakly, with its scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from . import frames as sets
from .grid import Layout
from .lists import Choice, Plan, build

if TYPE_CHECKING:
    from .rule import AdaptiveState, LayerState


@dataclass
class Step:
    """What one layer did: its plan and, where it was probed, entropy (H_norm) and top1 (mean largest weight).

    ``keys`` that a frame's query sees and that are ``computed`` for it, an int or (where lists differ) a 0-dim tensor;
    ``rows`` projected to K and V.
    """

    plan: Plan
    heads: int
    width: int  # of the module's input, C
    inner: int  # heads times head dimension
    plain: bool  # whether K and V alone could be projected
    keys: int | Tensor = 0
    computed: int | Tensor = 0
    rows: int = 0
    sampled: tuple[int, int] = (0, 0)  # heads and queries of the probe
    entropy: Tensor | None = None
    top1: Tensor | None = None


class Scene:
    """``layout``; ``batch`` (B); ``inputs``: what the model was called with; ``state``: of the layer rule.

    ``order``: int64 (B, N), the frame as given that stands at each place of the sequence, where the model reorders
    them; ``steps``: by layer; ``keep``: layers may be recomputed after the forward pass.
    """

    def __init__(
        self, layout: Layout, batch: int, inputs: Any, state: LayerState | AdaptiveState, device: torch.device,
        keep: bool,
    ):  # fmt: skip
        self.layout, self.batch, self.inputs, self.state, self.device = layout, batch, inputs, state, device
        self.keep = keep
        self.order: Tensor | None = None
        self.steps: dict[int, Step] = {}
        self.chosen: Tensor | None = None
        self._pooled: list[Tensor] = []
        self._descriptors: Tensor | None = None
        self._plans: dict[str, Plan] = {}

    def see(self, descriptors: Tensor) -> None:
        """Descriptors (n, D) of the next n frames, or of all, from the model's encoder."""
        self._pooled.append(descriptors)

    @torch.no_grad()
    def describe(self, given: Any) -> Tensor:
        """Descriptors fp32 (B, N, D), in the order of the sequence.

        ``given``: a tensor, a function of the model's inputs, or None for pooled tokens.  ValueError where there are
        none.
        """
        if self._descriptors is None:
            n = self.layout.frames
            if given is None:
                if sum(len(x) for x in self._pooled) != self.batch * n:
                    raise ValueError(
                        f"descriptors must be given: the encoder showed {sum(len(x) for x in self._pooled)} frames, "
                        f"the scene has {self.batch} x {n}"
                    )
                self._descriptors = torch.cat(self._pooled).view(self.batch, n, -1)
            else:
                found = given if isinstance(given, Tensor) else given(self.inputs)
                self._descriptors = sets.check_descriptors(found, self.batch, n, self.device)
                if self.order is not None:
                    at = self.order[..., None].expand(-1, -1, self._descriptors.shape[-1])
                    self._descriptors = self._descriptors.gather(1, at)
            self._pooled = []
        return self._descriptors

    def plan(self, choice: Choice, kind: str, heads: int, given: Any) -> Plan:
        """Of a STRIDE or FRAMES layer under a strategy of ours; one for all layers of a kind."""
        if self.chosen is None:
            self.chosen = self._choose(choice, given)
        if kind not in self._plans:
            self._plans[kind] = build(choice, kind, self.layout, self.chosen, heads)
        return self._plans[kind]

    def _choose(self, choice: Choice, given: Any) -> Tensor:
        n = self.layout.frames
        if choice.frames >= n:
            every = torch.arange(n, device=self.device).expand(self.batch, n)
            return every[:, None].expand(-1, n, -1) if choice.per_frame else every
        descriptors = self.describe(given)
        if choice.strategy == "diverse_self":
            return sets.seeded_sets(descriptors, choice.frames)
        if choice.strategy == "nearest":
            return sets.nearest_sets(descriptors, choice.frames)
        if choice.start >= n:
            raise ValueError(f"start must be one of the scene's {n} frames; got {choice.start}")
        return sets.shared_set(descriptors, choice.frames, choice.start)

    def close(self) -> None:
        """The forward pass is over."""
        self.inputs = None
        self._pooled = []
        if not self.keep:
            self._plans = {}
            for step in self.steps.values():
                plan = step.plan
                step.plan = plan._replace(project=None, shared=None, lists=None, own=None, members=None)


class Recall:
    """Which scene a layer belongs to that is run again outside a forward pass."""

    def __init__(self) -> None:
        self.entries: list[tuple[TensorWeakRef, Scene]] = []
        self.open = 0  # scenes that may be recomputed, since the last one that was
        self.latest: Scene | None = None

    def begin(self, scene: Scene) -> None:
        self._prune()
        self.open, self.latest = self.open + 1, scene

    def note(self, x: Tensor, scene: Scene) -> None:
        """A block of ``scene`` was given x."""
        self.entries.append((TensorWeakRef(x), scene))

    def find(self, x: Tensor) -> Scene | None:
        """Whose block was given x, or the same memory; None where that cannot be told."""
        self._prune()
        scene = self._match(x) or self._only()
        if scene is not None:
            self.open = 0
        return scene

    def _match(self, x: Tensor) -> Scene | None:
        spot = _spot(x)
        for ref, scene in reversed(self.entries):
            other = ref()
            if other is not None and (other is x or _spot(other) == spot):
                return scene
        return None

    def _only(self) -> Scene | None:
        """The one scene there is, if it is one: inputs that were moved to the host and back tell nothing."""
        candidates = {id(scene): scene for _, scene in self.entries}
        if not candidates:
            return self.latest if self.open <= 1 else None
        return next(iter(candidates.values())) if len(candidates) == 1 else None

    def _prune(self) -> None:
        self.entries = [entry for entry in self.entries if entry[0]() is not None]


def _spot(x: Tensor) -> tuple:
    return x.untyped_storage().data_ptr(), x.storage_offset(), tuple(x.shape)
