"""Sets of frames: the shared one, those of each query frame, and descriptors."""

import pytest
import torch

from burnish.ops.farthest_frames import farthest_frames
from burnish.tokens import nearest_sets, pooled, seeded_sets, shared_set
from burnish.tokens.frames import check_descriptors


def slow_set(x, count, start):
    """Greedy farthest point sampling (specs/tokens.md 1.2), a comparison at a time."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    chosen = [start]
    while len(chosen) < min(count, len(x)):
        best, far = None, -1.0
        for i in range(len(x)):
            d = min(float(1 - unit[i] @ unit[j]) for j in chosen)
            if i not in chosen and d > far:
                best, far = i, d
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 3, 6, 11, 40])
def test_sets_are_those_of_the_definition(count):
    x = torch.randn(2, 11, 5)
    shared, own = shared_set(x, count, start=4), seeded_sets(x, count)
    assert shared.shape == (2, min(count, 11)) and own.shape == (2, 11, min(count, 11))
    for b in range(2):
        assert shared[b].tolist() == slow_set(x[b], count, 4)
        for f in range(11):
            assert own[b, f].tolist() == slow_set(x[b], count, f)
            assert own[b, f].tolist() == farthest_frames(x[b], count, start=f).tolist()


def test_nearest_sets_hold_the_frame_itself_and_its_likes():
    x = torch.randn(3, 9, 4)
    x[0, 5] = x[0, 2]  # a duplicate does not push a frame out of its own set
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    near = nearest_sets(x, 4)
    for b in range(3):
        for f in range(9):
            likeness = unit[b] @ unit[b, f]
            likeness[f] = 2
            assert set(near[b, f].tolist()) == set(likeness.topk(4).indices.tolist())
    assert (near.diff() > 0).all() and nearest_sets(x, 1)[..., 0].tolist() == [list(range(9))] * 3


def test_ties_go_to_the_lowest_index():
    x = torch.eye(5)[None].expand(2, 5, 5)  # all at distance 1 of one another
    assert seeded_sets(x, 3)[0].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert nearest_sets(x, 2)[0].tolist() == [[0, 1], [0, 1], [0, 2], [0, 3], [0, 4]]


def test_selection_moves_with_the_frames_and_the_seed():
    """Fact 3: equivariant if and only if the start frame moves along."""
    x, order = torch.randn(1, 12, 6), torch.randperm(12)
    moved, places = x[:, order], order.argsort()
    for start in range(12):
        want = sorted(places[i].item() for i in shared_set(x, 5, start)[0].tolist())
        assert shared_set(moved, 5, places[start].item())[0].tolist() == want
    fixed = [shared_set(moved, 5, 0)[0].tolist(), sorted(places[i].item() for i in shared_set(x, 5, 0)[0].tolist())]
    assert fixed[0] != fixed[1]


def test_pooled_descriptors():
    tokens = torch.randn(3, 4, 10, 7, requires_grad=True)
    got = pooled(tokens.bfloat16())
    want = tokens.detach().bfloat16().float().mean(2)
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, want / want.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5), (1, 3, 5), (3,), (2, 3, 5, 1)])
def test_descriptors_of_other_frames_are_refused(shape):
    if shape == (3, 5):
        assert check_descriptors(torch.randn(shape), 2, 3, torch.device("cpu")).shape == (2, 3, 5)
        return
    with pytest.raises(ValueError, match=r"descriptors must be \(3, D\) or \(2, 3, D\), one a frame given"):
        check_descriptors(torch.randn(shape), 2, 3, torch.device("cpu"))


def test_descriptors_must_be_numbers_with_a_point():
    with pytest.raises(TypeError, match=r"descriptors must be a floating-point tensor; got torch\.int64"):
        check_descriptors(torch.ones(3, 2, dtype=torch.int64), 1, 3, torch.device("cpu"))
    with pytest.raises(TypeError, match="got list"):
        check_descriptors([[1.0]], 1, 1, torch.device("cpu"))
