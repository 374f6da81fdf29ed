"""How far a path's points have gone: the published distances, by layer, on rows, in memory."""

import math

import pytest
import torch

from burnish.ops.live_bytes import LiveBytes
from burnish.paths import Adapter, Additive, OFTGenerator, Selection, StateDict, as_tensors, distance


def turned(theta, power, blocks=8):
    """A path of plane rotations: eigenvalues of the generator +-i theta."""
    name = "model.layers.0.self_attn.q_proj"
    g = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(6, 2 * blocks, generator=g, dtype=torch.float64)}
    config = {"peft_type": "OFT", "use_cayley_neumann": False}
    skew = {f"base_model.model.{name}.oft_R.weight": torch.full((blocks, 1), theta, dtype=torch.float64)}
    return OFTGenerator(base, Adapter(config, StateDict(skew)), power=power)


@pytest.mark.parametrize(
    ("theta", "power", "published"), [(1.25, 0.5, 0.72), (1e-4, 0.5, 0.548), (1.3, 1.0, 0.46), (1e-4, 1.0, 0.30)]
)
def test_published_distances_at_three_tenths(theta, power, published):
    """2.4, fact 4: sqrt-generator .72 for large and .548 for small rotations, linear generator .46 and .30."""
    path = turned(theta, power)
    got = distance(path, 0.3)
    assert got.total == pytest.approx(published, abs=0.005)
    a = 0.3**power
    assert got.total == pytest.approx(a * math.sqrt((1 + theta**2) / (1 + (a * theta) ** 2)), rel=1e-9)
    dense = Additive(dict(path.at(0)), dict(path.at(1)))
    assert distance(dense, 0.3).total == pytest.approx(0.3, rel=1e-12)
    assert distance(dense, 1).length == pytest.approx(got.length, rel=1e-12)
    assert distance(path, 0).total == 0 and distance(path, 1).total == 1


def test_layers(state, write):
    before, after = state(0), state(1)
    for n in before:
        if "layers.1.self" in n:
            after[n] = before[n]
    path = Additive(write("a", before, 2), write("b", after))
    got = distance(path, {0: 0.5, 1: 0.25, None: 1.0})
    assert set(got.layers) == {0, 1, None}
    assert got.layers[0] == pytest.approx(0.5, rel=1e-6) and got.layers[1] == pytest.approx(0.25, rel=1e-6)
    assert got.layers[None] == 1
    square = {k: 0.0 for k in got.layers}
    for n, x in before.items():
        if x.is_floating_point():
            layer = int(n.split(".")[2]) if "layers" in n else None
            square[layer] += float((after[n].double() - x.double()).square().sum())
    assert got.length == pytest.approx(sum(square.values()) ** 0.5, rel=1e-6)
    want = sum(square[k] * got.layers[k] ** 2 for k in square) / sum(square.values())
    assert got.total == pytest.approx(want**0.5, rel=1e-6)
    only = {n: Selection() for n in before if "layers.1" in n}
    assert set(distance(Additive(before, after, only), 0.5).layers) == {1}
    rows = distance(Additive(before, after, {"model.embed_tokens.weight": Selection(((2, 5),))}), 0.5)
    moved = (after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"])[2:5]
    assert rows.total == pytest.approx(0.5, rel=1e-6) and rows.length == pytest.approx(float(moved.norm()), rel=1e-6)


def test_errors(state):
    before, after = state(0), state(1)
    with pytest.raises(ValueError, match="nothing moves"):
        distance(Additive(before, before), 0.5)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        distance(Additive(before, after), 1.5)
    with pytest.raises(ValueError, match="t: nothing for layer 1"):
        distance(Additive(before, after), {0: 0.5, None: 1})


def test_two_tensors_are_held():
    a, b = ({f"{i}": torch.full((512, 2048), float(i + s)) for i in range(3)} for s in (1, 2))
    path = Additive(a, b)
    with LiveBytes() as live:
        distance(path, 0.5)
    assert live.peak <= 3 * a["0"].nbytes + 6 * (1 << 20)


def test_a_point_is_read_tensor_by_tensor(state):
    path = Additive(state(0), state(1))
    point = path.at(0.5)
    assert as_tensors(point) is point and list(point) == list(path.template)
    name = "model.norm.weight"
    assert torch.equal(point.tensor(name), path.tensor(name, 0.5)) and name in point and "x" not in point
    assert point.shape(name) == (4,) and point.dtype(name) == torch.float32
