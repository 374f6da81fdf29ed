"""MuonAdamW is torch's two optimizers, and one where groups, states and checkpoints are concerned."""

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

from burnish.methods.q0 import MuonAdamW


def gradients(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def test_it_is_torchs_muon_and_adamw():
    ours, theirs = tiny.llama(0), tiny.llama(0)
    no_decay = [n for n, p in ours.named_parameters() if p.ndim == 1]
    one = MuonAdamW(ours, lr=0.01, weight_decay=0.5, no_decay=no_decay)
    named = dict(theirs.named_parameters())
    hidden = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    assert len(hidden) == 14
    two = [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p for n, p in named.items() if "embed" in n or "lm_head" in n], "weight_decay": 0.5},
             {"params": [p for n, p in named.items() if n in no_decay], "weight_decay": 0.0}],
            lr=0.01, betas=(0.9, 0.95),
        ),
    ]  # fmt: skip
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        one.step()
        for optimizer in two:
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_one_goes_on_and_groups_stay_shared():
    model = tiny.llama(0, tied=True)
    one = MuonAdamW(model, lr=0.01)
    gradients(model, 0)
    one.step()
    twin = copy.deepcopy(model)
    other = MuonAdamW(twin, lr=0.5)
    other.load_state_dict(copy.deepcopy(one.state_dict()))  # which are views
    assert other.param_groups[0]["lr"] == 0.01
    for optimizer, m in ((one, model), (other, twin)):
        gradients(m, 1)
        for group in optimizer.param_groups:
            group["lr"] = 0.02  # as a scheduler does it
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert len(one.state) == len(list(model.parameters()))
    one.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_a_hidden_matrix():
    with pytest.raises(ValueError, match="no matrix beside its embeddings"):
        MuonAdamW(nn.Embedding(4, 3), lr=0.1)
