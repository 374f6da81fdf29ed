"""AXPOTrainer on TRL's trainer, tool loop and loss: what reaches the loss, and what does not change."""

import pytest
import axpo_tiny as toy
import torch
from trl import GRPOConfig, GRPOTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.save(tmp_path_factory.mktemp("axpo-model"))


def test_smoke(tmp_path, folder):
    t = toy.trainer(tmp_path, folder, max_steps=3, resample_budget=1.0, gradient_accumulation_steps=2)
    t.train()
    for e in t.state.log_history:
        print({k: v for k, v in e.items() if "axpo" in k or k in ("loss", "reward", "kl", "grad_norm", "num_tokens")})
