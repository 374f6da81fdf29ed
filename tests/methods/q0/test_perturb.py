"""The noise at a cycle's end: its size, its seed, and what it leaves alone."""

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

from burnish.methods.q0 import perturb, perturbation_scale


def test_scale_goes_from_first_to_last_as_half_a_cosine():
    found = [perturbation_scale(c, 96) for c in range(96)]
    assert found[0] == 0.25 and found[95] == pytest.approx(0.05) and found == sorted(found, reverse=True)
    assert perturbation_scale(1, 3) == pytest.approx(0.15) and perturbation_scale(0, 1) == 0.25
    with pytest.raises(ValueError, match="cycle must be one of 3"):
        perturbation_scale(3, 3)


@pytest.mark.parametrize("scale", [0.25, 0.05])
def test_the_noise_has_the_scale_of_each_tensor(scale):
    torch.manual_seed(0)
    model = nn.ModuleDict({"wide": nn.Linear(200, 200, bias=False), "small": nn.Linear(200, 100, bias=False)})
    model["small"].weight.data.mul_(1e-3)
    before = copy.deepcopy(model)
    perturb(model, scale, seed=3)
    for name in ("wide", "small"):
        old, noise = before[name].weight, model[name].weight - before[name].weight
        sampling = 4 / (2 * noise.numel()) ** 0.5  # four standard errors of a standard deviation
        assert float(noise.std() / old.std()) == pytest.approx(scale, rel=sampling)
        assert abs(float(noise.mean())) < 4 * scale * float(old.std()) / noise.numel() ** 0.5


def test_same_seed_same_noise():
    models = [tiny.llama(1, tied=True) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed * 100)  # the global state has no part in it
        state = torch.random.get_rng_state()
        perturb(model, 0.1, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (list(m.parameters()) for m in models)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(not torch.equal(x, y) for x, y in zip(a, c, strict=True) if x.std() > 0)


def test_what_is_left_alone():
    model = nn.ParameterDict({
        "one": nn.Parameter(torch.tensor([2.0])), "scalar": nn.Parameter(torch.tensor(3.0)),
        "frozen": nn.Parameter(torch.randn(9), requires_grad=False), "constant": nn.Parameter(torch.ones(9)),
        "low": nn.Parameter(torch.randn(9).bfloat16()),
    })  # fmt: skip
    before = copy.deepcopy(model)
    perturb(model, 0.25, seed=0)
    for name in ("one", "scalar", "frozen", "constant"):
        assert torch.equal(model[name], before[name]), name
    assert model["low"].dtype == torch.bfloat16 and not torch.equal(model["low"], before["low"])
    perturb(model, 0.0, seed=0)
    with pytest.raises(ValueError, match="scale must be at least 0; got -1"):
        perturb(model, -1, seed=0)
