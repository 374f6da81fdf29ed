"""``accelerate``: an alternating-attention model whose global layers see selected keys, until ``restore``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import report as reports
from .engine import Engine, Layer
from .families import Family, find
from .grid import check_count, check_grid
from .lists import Choice, Strategy, check_choice
from .patch import Patch, patches_of
from .rule import AdaptiveRule, LayerRule

#: Numbers of global layers for which the published rule's constants were chosen: pi3's and VGGT's.
PUBLISHED = (18, 24)


class Handle:
    """An accelerated model's other end; a context manager that restores.

    ``family``: "vggt", "pi3", "uniception" or "da3"; ``trunk``: the module that holds the global layers.
    """

    def __init__(self, family: Family, engine: Engine, layers: list[Layer], patches: list[Patch]):
        self.family, self.trunk = family.name, family.trunk
        self._engine, self._layers, self._patches = engine, layers, patches

    @property
    def active(self) -> bool:
        """Whether the model is still accelerated."""
        return bool(self._patches)

    def restore(self) -> None:
        """The model as it was: outputs to the bit, attributes the same.  A second call does nothing.

        RuntimeError, and nothing undone, where something else has replaced the same methods since.
        """
        for patch in self._patches:
            patch.check()
        for patch in self._patches:
            patch.undo()
        self._patches = []

    def report(self) -> reports.Report:
        """What each global layer did in the latest forward pass.  ValueError before the first."""
        if self._engine.last is None:
            raise ValueError("report() needs a forward pass of the accelerated model first")
        return reports.make(self._engine.last, [layer.name for layer in self._layers])

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def accelerate(
    model: nn.Module, frames: int = 25, stride: int = 3, *, rule: LayerRule | AdaptiveRule | None = None,
    strategy: str | Strategy = "diversity", own_frame: bool = False,
    descriptors: Tensor | Callable[[Any], Tensor] | None = None, start: int = 0, edge: str = "ceil",
    phase: tuple[int, int] = (0, 0), specials: bool = True, tail: str = "dense", backend: str = "auto",
) -> Handle:  # fmt: skip
    """Let the global layers of a visual geometry transformer attend to selected keys alone.

    All queries stay; no weight changes, nothing is trained.  The defaults are the published method: one set of
    ``frames`` frames for the whole scene by farthest point sampling, local attention in the first layers, a strided
    grid of those frames' tokens in the next, all of their tokens in the rest.  Each scene of a batch has its own set,
    chosen on exactly the frames that are given.  A scene of one frame, and a layer that would keep every key, run the
    model's own code.  Gradients flow; a recomputed layer (checkpointing) does what it did.

    Args:
        model: VGGT, pi3, UniCeption's alternating transformer (MapAnything) or Depth-Anything-3, or what holds one;
            known by the names of its attributes.
        frames: K, of the set; all of them where the scene has no more.
        stride: sigma of the grid in STRIDE layers, 2 or 3 in the paper.
        rule: ``LayerRule(local, sample)``, by default the published (2, 9), or ``AdaptiveRule(tau1, tau2)``.
        strategy: "diversity": one set.  "heads": one set, and in STRIDE layers a grid of its own phase for each head,
            so that stride^2 heads see every patch.  "diverse_self", "nearest": a set for each query frame.  A function:
            given a ``SelectionContext``, it returns kv_indices, or (kv_indices, kv_counts), as ``selected_attention``
            takes them, rows being tokens of the scene; then ``frames``, ``stride``, ``edge``, ``phase`` and
            ``specials`` are not read.
        own_frame: with "diversity": a query also sees its own frame's tokens (the published command does not).
        descriptors: (N, D), or (B, N, D), in the order of the frames given; or a function of what the model was
            called with (images (B, N, 3, H, W); for UniCeption the list of features); None: mean-pooled, L2-normalised
            patch tokens of the model's own encoder, which is not the paper's MegaLoc and not measured against it.
        start: the frame that seeds the set, a place in the sequence the trunk sees; 0 is VGGT's reference.  (The
            paper draws it; its code has 0.)
        edge: "ceil", as the code, or "floor": see ``grid_tokens``.
        phase: of the grid, for all heads.
        specials: keep camera, register and other extra tokens of the selected frames in STRIDE layers.
        tail: queries of the scene's own tokens (MapAnything's scale token) attend to every token ("dense", for which
            K and V of all rows are projected), or to the selected rows ("selected").  As keys they are always kept.
        backend: of ``selected_attention`` where queries have lists of their own.

    Returns: a ``Handle``.
    Raises: ValueError or TypeError naming the argument: no such model, one accelerated already, or an argument out of
    range.  In the forward pass: tokens that are not laid out as the model's kind says.
    Source: arXiv 2605.23892 (sections 3.2 and 3.3, algorithm A, appendix B.3); strategies "heads" and pooled
    descriptors are not in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_count("frames", frames, 1)
    check_count("start", start, 0)
    check_grid(stride, phase, edge)
    if rule is not None and not isinstance(rule, (LayerRule, AdaptiveRule)):
        raise TypeError(f"rule must be a LayerRule or an AdaptiveRule; got {type(rule).__name__}")
    if descriptors is not None and not isinstance(descriptors, Tensor) and not callable(descriptors):
        raise TypeError(f"descriptors must be a tensor or a function; got {type(descriptors).__name__}")
    choice = Choice(frames, stride, strategy, own_frame, start, edge, (phase[0], phase[1]), specials, tail)
    check_choice(choice)
    kind, trunk = find(model)
    if next(patches_of(trunk), None) is not None:
        raise ValueError("model is accelerated already: restore() it first")
    blocks = kind.blocks(trunk)
    if rule is None:
        rule = LayerRule()
        if len(blocks) not in PUBLISHED:
            warnings.warn(
                f"the published rule (local=2, sample=9) is for 18 or 24 global layers; this model has {len(blocks)}: "
                "give rule=LayerRule(local, sample), chosen from the entropies that LayerRule(probe=Probe()) reports, "
                "or rule=AdaptiveRule()",
                stacklevel=2,
            )
    engine = Engine(kind.form, choice, rule, descriptors, backend)
    family = kind(trunk, engine)
    layers = [Layer(engine, i, name, _attention(name, block)) for i, (name, block) in enumerate(blocks)]
    patches = family.entries()
    for layer, (_, block) in zip(layers, blocks, strict=True):
        patches += [Patch(block.norm1, "forward", layer.enter), Patch(layer.attn, "forward", layer.attend)]
    for patch in patches:
        patch.apply()
    return Handle(family, engine, layers, patches)


def restore(model: nn.Module) -> None:
    """Undo ``accelerate`` where the handle is not at hand, as for a copy of an accelerated model."""
    patches = list(patches_of(model))
    for patch in patches:
        patch.check()
    for patch in patches:
        patch.undo()


def _attention(name: str, block: nn.Module) -> nn.Module:
    """A block's attention module.  ValueError where it lacks what is needed."""
    attn = getattr(block, "attn", None)
    lacking = [x for x in ("qkv", "proj", "num_heads") if not hasattr(attn, x)]
    if attn is None or not hasattr(block, "norm1"):
        raise ValueError(f"model must have norm1 and attn in {name}; got {type(block).__name__}")
    if lacking:
        raise ValueError(f"model must have {', '.join(lacking)} in {name}.attn; got {type(attn).__name__}")
    return attn
