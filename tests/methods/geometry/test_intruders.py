"""Intruder dimensions against HF PEFT's own count."""

import copy
import re

import peft
import pytest
import tiny_models
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension

from burnish.methods.geometry import intruder_dimensions


def lora(base, targets, size):
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "targets"),
    [(tiny_models.llama, ["q_proj", "k_proj", "down_proj", "up_proj", "embed_tokens"]), (tiny_models.gpt2, ["c_attn"])],
)
def test_peft_counts_the_same(make, targets, dtype):
    base = make().to(dtype)
    total = []
    for size in (0.05, 0.3, 1.0):
        model = lora(base, targets, size)
        # PEFT looks at W + dW before a merge rounds it
        after = {
            f"{n.removeprefix('base_model.model.')}.weight":
                (m.get_base_layer().weight + m.get_delta_weight("default")).detach()
            for n, m in model.named_modules() if isinstance(m, LoraLayer)
        }  # fmt: skip
        lines = []
        reduce_intruder_dimension(model, logging_sink=lines.append)
        want = {}
        for line in lines:
            found = re.match(r"base_model\.model\.(.*): (?:Intruders: (\d+)|No intruders)$", line)
            if found:
                want[f"{found[1]}.weight"] = int(found[2] or 0)
        got = intruder_dimensions(base, after, names=list(want))
        assert len(want) >= 2 and {n: m.count for n, m in got.items()} == want
        total.append(sum(want.values()))
    assert total[0] < total[-1]


def test_against_svd():
    g = torch.Generator().manual_seed(0)
    for shape in ((50, 20), (20, 50)):
        w0 = torch.randn(shape, generator=g)
        w1 = w0 + 3 * torch.randn(shape[0], 2, generator=g) @ torch.randn(2, shape[1], generator=g)
        u0, u1 = (torch.linalg.svd(w.double(), full_matrices=False).U for w in (w0, w1))
        cosines = (u0.T @ u1).abs().max(0).values
        got = intruder_dimensions({"w": w0}, {"w": w1}, top=7, eps=0.6)["w"]
        assert torch.allclose(torch.tensor(got.cosines).double(), cosines[:7], atol=1e-9)
        assert got.indices == tuple(i for i in range(7) if cosines[i] < 0.6) and got.count > 0
        assert intruder_dimensions({"w": w0}, {"w": w1}, top=99)["w"].cosines[6] == got.cosines[6]
        assert len(intruder_dimensions({"w": w0}, {"w": w1}, top=99)["w"].cosines) == 20


def test_a_cluster_hides_no_intruder_and_makes_none():
    """Another basis of nine equal singular values: every vector looks new, none is."""
    g = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(30, 30, generator=g).double()).Q for _ in range(2))
    s = torch.cat([torch.full((25,), 5.0), torch.ones(5)]).double()
    w0 = u @ torch.diag(s * (1 + 1e-9 * torch.arange(30))) @ v.T
    w1 = w0 + 1e-6 * torch.randn(30, 30, generator=g).double()
    assert intruder_dimensions({"w": w0}, {"w": w1}, eps=0.7)["w"].count > 0
    assert intruder_dimensions({"w": w0}, {"w": w1}, eps=0.7, gap=1e-3)["w"].count == 0
    new = torch.linalg.qr(torch.randn(30, 30, generator=g).double()).Q[:, :1]
    w0 = w0 - u[:, :1] @ (u[:, :1].T @ w0)  # an output that was silent
    assert intruder_dimensions({"w": w0}, {"w": w0 + 50 * u[:, :1] @ new.T}, gap=1e-3)["w"].indices == (0,)


def test_errors():
    w = {"w": torch.eye(3)}
    with pytest.raises(ValueError, match="eps must lie"):
        intruder_dimensions(w, w, eps=1.5)
    with pytest.raises(ValueError, match="top must be"):
        intruder_dimensions(w, w, top=0)
    with pytest.raises(ValueError, match="w has values that are not finite"):
        intruder_dimensions(w, {"w": torch.eye(3) * float("nan")})
    assert intruder_dimensions({"w": torch.zeros(3, 3)}, w)["w"].count == 3
