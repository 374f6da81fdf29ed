"""Checkpoints written by hand, and the one thread that models this small want."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))  # for `test_kinds`
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def small_models_use_one_thread(one_thread):
    """Every test of this folder runs models small enough for it."""


@pytest.fixture
def write(tmp_path):
    """write(name, tensors, shards=1, config=None) -> a directory with the tensors dealt over shards."""

    def make(name, tensors, shards=1, config=None):
        folder = tmp_path / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names = sorted(tensors)
        place = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
        for file in sorted(set(place.values())):
            save_file({n: tensors[n] for n in names if place[n] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
        return folder

    return make


@pytest.fixture
def state():
    """state(seed, dtype) -> a small model's tensors: two layers, an embedding, a counter."""

    def make(seed, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        shapes = {f"model.layers.{i}.{n}.weight": (6, 4) for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")}
        shapes |= {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,)}
        out = {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
        out["model.steps"] = torch.tensor(3)
        return out

    return make
