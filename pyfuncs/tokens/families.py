"""The models, by the names of their attributes; none of their packages is imported.

vggt        Aggregator: frame_blocks, global_blocks, patch_start_idx, patch_embed         (facebookresearch/vggt)
pi3         decoder (odd blocks global), decode(hidden, N, H, W), register_token          (yyfz/Pi3)
uniception  MultiViewAlternatingAttentionTransformer: even blocks global, extras after    (uniception, MapAnything)
            the patches of a view, a scale token after all views
da3         DINOv2 trunk: from alt_start on odd blocks global, process_attention          (depth-anything-3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Engine
from .frames import pooled
from .grid import Layout
from .patch import Patch
from .project import Form


class Family:
    """A kind of model.  ``trunk``: the module that holds the global blocks; ``engine``: what its layers share."""

    name = ""
    form: Form

    def __init__(self, trunk: Any, engine: Engine):
        self.trunk, self.engine = trunk, engine

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is such a trunk."""
        raise NotImplementedError

    @classmethod
    def blocks(cls, trunk: Any) -> list[tuple[str, nn.Module]]:
        """Names, within the trunk, and modules of the global blocks, in order."""
        raise NotImplementedError

    def entries(self) -> list[Patch]:
        """Patches that open a scene around a forward pass and see what describes its frames."""
        raise NotImplementedError

    @property
    def pooling(self) -> bool:
        """Whether descriptors come from the model's own encoder."""
        return self.engine.descriptors is None


def _modules(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.ModuleList) for name in names)


def _argument(args: tuple, kwargs: dict, name: str) -> Any:
    """The first argument of a call, which its function calls ``name``."""
    if not args and name not in kwargs:
        raise TypeError(f"the model must be called with {name}")
    return args[0] if args else kwargs[name]


def _patch_size(module: Any) -> int:
    size = module.patch_size
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def _images(images: Tensor, size: int, special: int) -> Layout:
    """Of images (B, N, 3, H, W)."""
    if not isinstance(images, Tensor) or images.ndim != 5:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be (B, N, 3, H, W); got {got}")
    _, n, _, height, width = images.shape
    return Layout(n, height // size, width // size, special)


class VGGT(Family):
    """VGGT's Aggregator and its forks: [frame, global] x 24, special tokens first, frame 0 the reference."""

    name = "vggt"
    form = Form(("pos",), "pos")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _modules(module, "frame_blocks", "global_blocks") and hasattr(module, "patch_start_idx")

    @classmethod
    def blocks(cls, trunk: Any) -> list[tuple[str, nn.Module]]:
        return [(f"global_blocks.{i}", block) for i, block in enumerate(trunk.global_blocks)]

    def entries(self) -> list[Patch]:
        out = [Patch(self.trunk, "forward", self.run)]
        if self.pooling:
            out.append(Patch(self.trunk.patch_embed, "forward", self.embed))
        return out

    def run(self, original: Callable, *args, **kwargs):
        images = _argument(args, kwargs, "images")
        layout = _images(images, _patch_size(self.trunk), self.trunk.patch_start_idx)
        with self.engine.scene(layout, images.shape[0], images, images.device, self.trunk.training):
            return original(*args, **kwargs)

    def embed(self, original: Callable, *args, **kwargs):
        out = original(*args, **kwargs)
        if self.engine.active is not None:
            self.engine.active.see(pooled(out["x_norm_patchtokens"] if isinstance(out, dict) else out))
        return out


class Pi3(Family):
    """pi3 and pi3X: 36 decoder blocks, odd ones global, five registers first, no reference frame."""

    name = "pi3"
    form = Form(("attn_bias", "xpos"), "xpos", cast_first=True)

    def __init__(self, trunk: Any, engine: Engine):
        super().__init__(trunk, engine)
        self.images: Any = None

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            _modules(module, "decoder") and callable(getattr(module, "decode", None))
            and hasattr(module, "patch_start_idx") and hasattr(module, "register_token")
        )  # fmt: skip

    @classmethod
    def blocks(cls, trunk: Any) -> list[tuple[str, nn.Module]]:
        return [(f"decoder.{i}", block) for i, block in enumerate(trunk.decoder) if i % 2]

    def entries(self) -> list[Patch]:
        out = [Patch(self.trunk, "decode", self.decode)]
        if callable(self.engine.descriptors):  # which is given the images
            out.append(Patch(self.trunk, "forward", self.run))
        return out

    def run(self, original: Callable, *args, **kwargs):
        self.images = _argument(args, kwargs, "imgs")
        try:
            return original(*args, **kwargs)
        finally:
            self.images = None

    def decode(self, original: Callable, hidden: Tensor, N: int, H: int, W: int, *args, **kwargs):
        size = _patch_size(self.trunk)
        layout = Layout(N, H // size, W // size, self.trunk.patch_start_idx)
        batch = hidden.numel() // (N * layout.patches * hidden.shape[-1])
        with self.engine.scene(layout, batch, self.images, hidden.device, self.trunk.training) as scene:
            if self.pooling:
                scene.see(pooled(hidden.reshape(batch * N, -1, hidden.shape[-1])))
            return original(hidden, N, H, W, *args, **kwargs)


class UniCeption(Family):
    """UniCeption's alternating transformer, as in MapAnything: global first, extras of a view after its patches, tokens
    of the scene after the last view in global layers; no reference but an encoding added to view 0."""

    name = "uniception"
    form = Form(("xpos",), "xpos", rope="custom_positional_encoding")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        # its global-attention sibling has the same attributes: the name tells them apart
        return _modules(module, "self_attention_blocks") and any(
            kind.__name__ == "MultiViewAlternatingAttentionTransformer" for kind in type(module).__mro__
        )

    @classmethod
    def blocks(cls, trunk: Any) -> list[tuple[str, nn.Module]]:
        blocks = enumerate(trunk.self_attention_blocks)
        return [(f"self_attention_blocks.{i}", block) for i, block in blocks if i % 2 == 0]

    def entries(self) -> list[Patch]:
        return [Patch(self.trunk, "forward", self.run)]

    def run(self, original: Callable, *args, **kwargs):
        given = _argument(args, kwargs, "model_input")
        features = given.features
        batch, _, height, width = features[0].shape
        extras, tail = given.additional_input_tokens_per_view, given.additional_input_tokens
        layout = Layout(
            len(features), height, width, trailing=0 if extras is None else extras[0].shape[2],
            tail=0 if tail is None else tail.shape[2],
        )  # fmt: skip
        with self.engine.scene(layout, batch, features, features[0].device, self.trunk.training) as scene:
            if self.pooling:
                scene.see(torch.stack([pooled(x.flatten(2).mT) for x in features], 1).flatten(0, 1))
            return original(*args, **kwargs)


class DepthAnything3(Family):
    """Depth-Anything-3's trunk: from alt_start on odd blocks global; a class token turned camera token first; with
    three views and more the trunk moves a reference view to the front before the first of them."""

    name = "da3"
    form = Form(("pos", "attn_mask"), "pos")

    def __init__(self, trunk: Any, engine: Engine):
        super().__init__(trunk, engine)
        # after the reordering: the frames as the global layers see them
        engine.first_tokens = self.pooling
        self.before: Tensor | None = None

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            _modules(module, "blocks") and getattr(module, "alt_start", -1) != -1
            and callable(getattr(module, "process_attention", None))
        )  # fmt: skip

    @classmethod
    def blocks(cls, trunk: Any) -> list[tuple[str, nn.Module]]:
        blocks = enumerate(trunk.blocks)
        return [(f"blocks.{i}", block) for i, block in blocks if i >= trunk.alt_start and i % 2]

    def entries(self) -> list[Patch]:
        return [
            Patch(self.trunk, "get_intermediate_layers", self.run),
            Patch(self.trunk, "process_attention", self.process),
        ]

    def run(self, original: Callable, *args, **kwargs):
        images = _argument(args, kwargs, "x")
        layout = _images(images, _patch_size(self.trunk), 1 + self.trunk.num_register_tokens)
        with self.engine.scene(layout, images.shape[0], images, images.device, self.trunk.training):
            try:
                return original(*args, **kwargs)
            finally:
                self.before = None

    def process(self, original: Callable, x: Tensor, block: nn.Module, *args, **kwargs) -> Tensor:
        scene, blocks, at = self.engine.active, self.trunk.blocks, self.trunk.alt_start
        if scene is None or at < 2:
            return original(x, block, *args, **kwargs)
        if block is blocks[at - 1] and self.before is not None:
            scene.order = _order(self.before, x[:, :, 0].detach())
        out = original(x, block, *args, **kwargs)
        if block is blocks[at - 2]:
            self.before = out[:, :, 0].detach()
        return out


def _order(before: Tensor, after: Tensor) -> Tensor:
    """int64 (B, N): which frame of ``before`` (B, N, C) stands at each place of ``after``.

    One frame of each scene was moved to the front.  Frames with equal tokens may be taken for one another.
    """
    b, n = before.shape[:2]
    shifted = (after[:, 1:] == before[:, :-1]).all(-1)
    moved = shifted.long().cumprod(1).sum(1, keepdim=True)  # frames that went back by one place: which was moved
    places = torch.arange(n, device=before.device).expand(b, n)
    return torch.where(places == 0, moved, torch.where(places <= moved, places - 1, places))


FAMILIES: tuple[type[Family], ...] = (VGGT, Pi3, UniCeption, DepthAnything3)


def find(model: nn.Module) -> tuple[type[Family], nn.Module]:
    """The one trunk in a model, and its family.  ValueError where there is none, or more than one."""
    found = [(kind, module) for module in model.modules() for kind in FAMILIES if kind.matches(module)]
    if not found:
        kinds = ", ".join(kind.name for kind in FAMILIES)
        raise ValueError(f"model must hold the trunk of one of {kinds}; got {type(model).__name__}, which holds none")
    if len(found) > 1:
        names = ", ".join(f"{type(module).__name__} ({kind.name})" for kind, module in found)
        raise ValueError(f"model must hold one trunk; got {names}: give the one that is meant")
    return found[0]
