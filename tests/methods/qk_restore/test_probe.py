"""Attention's gradient by distance: against autograd on the scores, and against a chain whose correlation is known."""

import math

import hybrids
import pytest
import torch

from burnish.methods.qk_restore import DistanceProbe, fit_decay, score_gradient
from burnish.methods.qk_restore import probe as module


def causal(n):
    return torch.full((n, n), float("-inf"), dtype=torch.float64).triu(1)


def test_score_gradient_is_autograds():
    """Fact 8."""
    g = torch.Generator().manual_seed(0)
    e = torch.randn(2, 3, 9, 9, generator=g, dtype=torch.float64)
    v, do = (torch.randn(2, 3, 9, 4, generator=g, dtype=torch.float64) for _ in range(2))
    e.requires_grad_()
    p = (e + causal(9)).softmax(-1)
    ((p @ v) * do).sum().backward()
    got = score_gradient(p.detach(), do @ v.transpose(-1, -2))
    assert (got - e.grad).abs().max() < 1e-12


@pytest.mark.parametrize("rows", [3, 256])
def test_attention_is_attention_and_its_tally_is_autograds(monkeypatch, rows):
    """Outputs, gradients of q, k, v, g(tau) and the mean distance of grouped heads with padding, in fp64 to 1e-12."""
    monkeypatch.setattr(module, "_ROWS", rows)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 7, 6, generator=g, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = causal(7).clamp_min(torch.finfo(torch.float64).min).expand(2, 1, 7, 7).clone()
    mask[1, :, :, :2] = torch.finfo(torch.float64).min  # two tokens of padding on the left
    do = torch.randn(2, 7, 4, 6, generator=g, dtype=torch.float64)
    do[1, :2] = 0
    probe = DistanceProbe(None)
    out, _ = probe._attend(type("M", (), {"layer_idx": 5})(), q, k, v, mask, scaling=0.3)
    (out * do).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    e = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    e.retain_grad()
    p = (e + mask).softmax(-1)
    want = (p @ v.repeat_interleave(2, 1)).transpose(1, 2)
    (want * do).sum().backward()
    real = torch.tensor([0, 1])[:, None] * 2
    keep = torch.arange(7)[None] >= real
    assert (out - want)[keep].abs().max() < 1e-12
    assert all((a - b.grad).abs().max() < 1e-12 for a, b in zip(grads, (q, k, v), strict=True))
    found = probe.profile()
    t, s = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    allowed = (t >= s)[None] & (s[None] >= real[:, :, None]) & (t[None] >= 0)
    for tau in range(7):
        at = allowed & (t - s == tau)[None]
        values = e.grad.permute(0, 2, 3, 1)[at]  # (pairs, heads)
        assert found.counts[tau] == values.numel()
        assert float(found.absolute[tau]) == pytest.approx(float(values.abs().mean()), abs=1e-12)
        assert float(found.expected[tau]) == pytest.approx(float(values.mean(0).abs().mean()), abs=1e-12)
    distance = (p * (t - s).clamp_min(0)).sum(-1).permute(0, 2, 1)[keep]
    assert found.mean_distance == {5: pytest.approx(float(distance.mean()), abs=1e-12)}


@pytest.mark.parametrize("name", ["qwen3_next", "granitemoehybrid", "minimax", "lfm2", "nemotron_h"])
def test_real_models_compute_the_same(name):
    """The probe changes neither loss nor gradients, tallies the softmax layers, and is gone afterwards."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = hybrids.model(name)
    before = model.config._attn_implementation
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    known = set(ALL_ATTENTION_FUNCTIONS.keys())
    with DistanceProbe(model) as probe:
        again = model(input_ids=ids, labels=ids).loss
        again.backward()
    assert torch.allclose(loss, again, atol=1e-6)
    for n, p in model.named_parameters():
        assert p.grad is None or torch.allclose(p.grad, grads[n], atol=1e-5), n
    found = probe.profile()
    assert len(found.mean_distance) == len(hybrids.HYBRIDS[name][2])
    assert len(found.absolute) == 10 and found.counts[0] == 2 * 10 * 4 * len(found.mean_distance)
    assert model.config._attn_implementation == before and set(ALL_ATTENTION_FUNCTIONS.keys()) == known
    model(input_ids=ids)


def test_only_some_layers_and_errors():
    model = hybrids.model("minimax")
    ids = torch.randint(3, 60, (1, 6))
    with DistanceProbe(model, layers=[2]) as probe:
        model(input_ids=ids)
    found = probe.profile()
    assert list(found.mean_distance) == [2] and len(found.absolute) == 0  # no backward: distances only
    with pytest.raises(ValueError, match="nothing was tallied"), DistanceProbe(model) as probe:
        probe.profile()
    with DistanceProbe(model) as probe, pytest.raises(ValueError, match="softcap is not plain"):
        probe._attend(model, ids, ids, ids, None, softcap=3.0)


def chain(rho, batch, length, states, generator):
    """A chain that stays with probability rho and else jumps anywhere: second eigenvalue rho."""
    x = torch.randint(states, (batch,), generator=generator)
    out = [x]
    for _ in range(length - 1):
        jump = torch.rand(batch, generator=generator) >= rho
        x = torch.where(jump, torch.randint(states, (batch,), generator=generator), x)
        out.append(x)
    return torch.stack(out, 1)


def test_the_fitted_window_is_the_chains(monkeypatch):
    """Fact 8: one head of uniform attention predicts the next state; the gradient that is left in the mean decays as
    rho^tau.  The loss is on late tokens, where the row's mean, which the softmax's gradient subtracts, is small."""
    monkeypatch.setattr(module, "_ROWS", 64)
    states, length = 4, 256
    windows = {}
    for rho in (0.5, 0.7, 0.85):
        generator = torch.Generator().manual_seed(0)
        x = chain(rho, 192, length + 1, states, generator)
        v = torch.eye(states, dtype=torch.float64)[x[:, :-1]][:, None]
        zero = torch.zeros_like(v).requires_grad_()
        probe = DistanceProbe(None)
        out, _ = probe._attend(torch.nn.Module(), zero, zero, v, None)
        late = slice(length // 2, None)
        logits, target = out[:, late, 0].flatten(0, 1), x[:, 1:][:, late].flatten()
        torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
        windows[rho], r2 = probe.profile().window("expected", start=0, stop=round(-2 / math.log(rho)) + 2)
        assert r2 > 0.95
    assert windows[0.5] < windows[0.7] < windows[0.85]
    for rho, w in windows.items():
        assert w == pytest.approx(-1 / math.log(rho), rel=0.2), rho


def test_fit():
    tau = torch.arange(50, dtype=torch.float64)
    w, r2 = fit_decay(3 * torch.exp(-tau / 7))
    assert w == pytest.approx(7) and r2 == pytest.approx(1)
    assert fit_decay(torch.exp(tau / 7))[0] == math.inf
    assert fit_decay(torch.ones(5))[0] == math.inf
    # where there were no pairs there is nothing to fit
    g = torch.exp(-tau / 7)
    g[20:] = 1.0
    counts = torch.ones(50)
    counts[20:] = 0
    assert fit_decay(g, counts)[0] == pytest.approx(7)
    assert fit_decay(g, start=2, stop=20)[0] == pytest.approx(7)
    with pytest.raises(ValueError, match="needs three"):
        fit_decay(torch.zeros(9))
