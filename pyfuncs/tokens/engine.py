"""What a patched global layer does: find its scene, decide once, attend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention_entropy import attention_entropy
from .attend import attend
from .frames import pooled
from .grid import Layout
from .lists import Choice, Plan, SelectionContext, from_user
from .project import Form, Projection
from .rule import DENSE, LOCAL, AdaptiveRule, LayerRule, Probe, normalised_entropy
from .scene import Recall, Scene, Step


class Engine:
    """Shared by the layers of one accelerated model.

    ``choice``, ``rule``, ``descriptors``, ``backend``: as ``accelerate`` was given them; ``form``: of the model's
    attention modules.  ``active``: the scene whose forward pass is under way; ``last``: the latest one, for reports.
    """

    def __init__(
        self, form: Form, choice: Choice, rule: LayerRule | AdaptiveRule, descriptors: Any, backend: str = "auto"
    ):
        self.form, self.choice, self.rule, self.descriptors, self.backend = form, choice, rule, descriptors, backend
        self._forget()

    def _forget(self) -> None:
        self.active: Scene | None = None
        self.last: Scene | None = None
        self.recalled: Scene | None = None
        self.recall = Recall()
        self.first_tokens = False  # descriptors from the first global layer's tokens

    def __getstate__(self) -> dict:
        return {
            name: getattr(self, name) for name in ("form", "choice", "rule", "descriptors", "backend", "first_tokens")
        }

    def __setstate__(self, state: dict) -> None:
        self._forget()
        vars(self).update(state)

    @contextlib.contextmanager
    def scene(self, layout: Layout, batch: int, inputs: Any, device: torch.device, training: bool) -> Iterator[Scene]:
        """Around the forward pass of the model's trunk."""
        scene = Scene(layout, batch, inputs, self.rule.begin(), device, training or torch.is_grad_enabled())
        if scene.keep:
            self.recall.begin(scene)
        before, self.active = self.active, scene
        self.recalled = None
        try:
            yield scene
        finally:
            self.active = before
            scene.close()
        self.last = scene

    def note(self, x: Tensor) -> None:
        """A block begins with x: remember whose it is, or find out."""
        if self.active is None:
            self.recalled = self.recall.find(x)
        elif self.active.keep:
            self.recall.note(x, self.active)

    def _scene(self, u: Tensor) -> Scene:
        if self.active is not None:
            self.note(u)  # where the attention module alone is checkpointed
            return self.active
        scene, self.recalled = self.recalled, None
        scene = scene or self.recall.find(u)
        if scene is None:
            raise RuntimeError(
                "a global layer of an accelerated model ran outside the model's forward pass, and what it was given "
                "does not tell for which scene: call the model, not its layers"
            )
        return scene

    def attend(self, layer: int, attn: nn.Module, original: Callable, u: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """In the place of ``attn.forward``: u (B, L, C), the block's normed tokens."""
        scene = self._scene(u)
        layout = scene.layout
        if u.ndim != 3 or tuple(u.shape[:2]) != (scene.batch, layout.length):
            raise ValueError(
                f"tokens must be ({scene.batch}, {layout.length}, C): {layout.frames} frames of {layout.special} + "
                f"{layout.height} x {layout.width} + {layout.trailing} tokens and {layout.tail} more; "
                f"got {tuple(u.shape)} in global layer {layer} (stochastic depth leaves out scenes of a batch: set it "
                "to 0, or give one scene at a time)"
            )
        positions = self.form.positions_of(args, kwargs)
        if positions is not None and len(positions) == 1:
            positions = positions.expand(scene.batch, -1, -1)
        projection = Projection(attn, self.form, layout.length)
        step = scene.steps.get(layer)
        if step is None:
            step = scene.steps[layer] = self._decide(scene, layer, projection, u, positions)
        if step.plan.kind == DENSE:
            return original(u, *args, **kwargs)
        return attend(step.plan, projection, u, positions, layout, self.backend)

    @torch.no_grad()
    def _decide(self, scene: Scene, layer: int, projection: Projection, u: Tensor, positions: Tensor | None) -> Step:
        layout = scene.layout
        inner = getattr(projection.attn.proj, "in_features", u.shape[-1])
        step = Step(Plan(DENSE), projection.heads, u.shape[-1], inner, projection.plain)
        if self.first_tokens and layer == 0:
            frames = u[:, : layout.frames * layout.tokens].unflatten(1, (layout.frames, layout.tokens))
            scene.see(pooled(frames[:, :, layout.special : layout.special + layout.patches]).flatten(0, 1))
        if layout.frames > 1:  # else there is nothing to leave out
            probe = scene.state.probe
            if probe is not None:
                self._probe(step, probe, layout, projection, u, positions)
            kind = scene.state.decide(layer, step.entropy)
            step.plan = self._plan(scene, layer, kind, projection.heads)
        plan = step.plan
        step.keys, step.computed, step.rows = plan.visible(layout), plan.computed(layout), plan.projected(layout)
        return step

    def _plan(self, scene: Scene, layer: int, kind: str, heads: int) -> Plan:
        if kind == LOCAL:
            return Plan(LOCAL)
        if not callable(self.choice.strategy):
            return scene.plan(self.choice, kind, heads, self.descriptors)
        descriptors = scene.describe(self.descriptors)
        context = SelectionContext(layer, kind, scene.layout, scene.batch, heads, descriptors, scene.device)
        return from_user(context, self.choice.strategy(context))

    @staticmethod
    def _probe(
        step: Step, probe: Probe, layout: Layout, projection: Projection, u: Tensor, positions: Tensor | None
    ) -> None:
        """Entropy of the layer's dense attention: K of the sampled heads alone is projected, for all tokens."""
        heads = probe.head_rows(projection.heads)
        rows = probe.token_rows(layout, u.device)
        some = None if positions is None else positions[:, rows]
        q = projection.queries(u[:, rows], some, heads)
        k = projection.keys_of(u, positions, heads)
        found = attention_entropy(q, k, scale=projection.scale)
        step.sampled = len(heads), len(rows)
        step.entropy, step.top1 = normalised_entropy(found, layout.length), found.top1.mean()


class Layer:
    """One global block: what its ``attn.forward`` and ``norm1.forward`` are replaced by."""

    def __init__(self, engine: Engine, index: int, name: str, attn: nn.Module):
        self.engine, self.index, self.name, self.attn = engine, index, name, attn

    def attend(self, original: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        return self.engine.attend(self.index, self.attn, original, x, args, kwargs)

    def enter(self, original: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        self.engine.note(x)
        return original(x, *args, **kwargs)
