"""The published trunks, with random weights.  Skipped, with the reason, where their packages are not installed."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

HOW = "pip install --no-deps uniception==0.1.7 depth-anything-3==0.1.1; pip install einops jaxtyping"


def uniception(cls="MultiViewAlternatingAttentionTransformer", **options):
    """UniCeption's transformer as MapAnything has it, 16-wide heads; and its input's class."""
    name = "uniception.models.info_sharing.alternating_attention_transformer"
    module = pytest.importorskip(name, reason=f"needs uniception: {HOW}")
    base = importlib.import_module("uniception.models.info_sharing.base")
    options = {"input_embed_dim": 32, "depth": 6, "dim": 64, "num_heads": 4, "init_values": 0.5, **options}
    return getattr(module, cls)(name="t", **options).eval(), base.MultiViewTransformerInput


def views(make, batch=1, frames=5, height=4, width=6, extras=2, tail=1):
    """Random input of ``frames`` views."""
    features = [torch.randn(batch, 32, height, width) for _ in range(frames)]
    per_view = [torch.randn(batch, 32, extras) for _ in range(frames)] if extras else None
    return make(features, torch.randn(batch, 32, tail) if tail else None, per_view)


def tokens(output):
    """Everything an output holds, flattened: (B, n)."""
    parts = [*output.features, *(output.additional_token_features_per_view or [])]
    if output.additional_token_features is not None:
        parts.append(output.additional_token_features)
    return torch.cat([x.flatten(1) for x in parts], 1)


def da3(**options):
    """Depth-Anything-3's trunk.  Its package's own __init__ imports what it needs to render: stood in for here."""
    found = importlib.util.find_spec("depth_anything_3")
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip(f"needs depth-anything-3 and einops: {HOW}")
    if "depth_anything_3.model" not in sys.modules:
        stand_in = types.ModuleType("depth_anything_3.model")
        stand_in.__path__ = [str(Path(next(iter(found.submodule_search_locations))) / "model")]
        sys.modules[stand_in.__name__] = stand_in
    importlib.import_module("depth_anything_3.utils.logger").logger.level = -1  # it prints
    module = importlib.import_module("depth_anything_3.model.dinov2.vision_transformer")
    shape = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 8, "num_heads": 4, "init_values": 0.5}
    starts = {"alt_start": 2, "rope_start": 2, "qknorm_start": 2, "cat_token": True}
    return module.DinoVisionTransformer(**{**shape, **starts, **options}).eval()


def da3_tokens(model, images, layers=(5, 7), **options):
    """All that its heads would read."""
    out, _ = model.get_intermediate_layers(images, list(layers), **options)
    return torch.cat([torch.cat([patches.flatten(2), camera.flatten(2)], 2) for patches, camera in out], 2)
