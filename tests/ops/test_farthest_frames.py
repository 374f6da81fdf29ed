"""Greedy K-center: the definition, ties, nesting, and how far it is from the best."""

from __future__ import annotations

import itertools

import pytest
import torch

from burnish.kernels import farthest_triton
from burnish.ops.farthest_frames import cosine_distances, coverage_radius, farthest_frames


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def descriptors(n=17, d=5, b=(), seed=0, device="cpu"):
    return torch.randn(*b, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def by_definition(distances, count, start):
    chosen = [start]
    while len(chosen) < count:
        best, at = -1.0, -1
        for n in range(len(distances)):
            if n not in chosen and (d := min(float(distances[c, n]) for c in chosen)) > best:
                best, at = d, n
        chosen.append(at)
    return sorted(chosen)


@pytest.mark.parametrize("start", [0, 1, 16])
@pytest.mark.parametrize("count", [1, 2, 7, 17])
def test_it_is_the_greedy_rule(backend, start, count, device):
    x = descriptors(device=device)
    got = farthest_frames(x, count, start=start, backend=backend)
    assert got.dtype == torch.int64 and got.tolist() == by_definition(cosine_distances(x), count, start)


def test_scenes_of_a_batch_are_apart(backend, device):
    x = descriptors(b=(3,), device=device)
    got = farthest_frames(x, 5, backend=backend)
    assert got.tolist() == [farthest_frames(one, 5, backend=backend).tolist() for one in x]


def test_ties_go_to_the_lowest(backend, device):
    x = torch.eye(6, dtype=torch.float64, device=device)  # all equally far
    assert farthest_frames(x, 4, start=3, backend=backend).tolist() == [0, 1, 2, 3]
    d = torch.tensor([[0, 1, 5, 5], [1, 0, 2, 2], [5, 2, 0, 3], [5, 2, 3, 0]], dtype=torch.float32, device=device)
    assert farthest_frames(None, 2, distances=d, backend=backend).tolist() == [0, 2]


def test_copies_of_a_frame_come_last(backend, device):
    x = descriptors(8, device=device)
    twice = torch.cat([x, x])
    assert len({i % 8 for i in farthest_frames(twice, 8, backend=backend).tolist()}) == 8
    assert farthest_frames(twice, 16, backend=backend).tolist() == list(range(16))
    assert farthest_frames(x[:1].expand(5, -1), 3, backend=backend).tolist() == [0, 1, 2]


def test_fewer_frames_are_among_more_and_cover_less(backend, device):
    x = descriptors(40, 9, device=device)
    radius, last = float("inf"), set()
    for count in range(1, 41):
        frames = farthest_frames(x, count, backend=backend)
        assert last < set(frames.tolist())
        last, now = set(frames.tolist()), float(coverage_radius(x, frames))
        assert now <= radius
        radius = now
    assert radius == 0
    assert farthest_frames(x, 99, backend=backend).tolist() == list(range(40))


def test_only_the_order_of_distances_counts(device):
    """1 - C, max C - C, the chord and its square choose the same; the chord is a metric, so within twice the best."""
    x = descriptors(12, 3, device=device)
    d = cosine_distances(x)
    c = 1 - d
    chord = (2 * d).sqrt()
    same = [farthest_frames(None, 4, distances=each).tolist() for each in (d, c.max() - c, chord, chord**2)]
    assert all(s == same[0] for s in same)
    for count in (2, 3, 4):
        radius = coverage_radius(None, farthest_frames(x, count), distances=chord)
        sets = torch.tensor(list(itertools.combinations(range(12), count)), device=device)
        best = min(float(coverage_radius(None, s, distances=chord)) for s in sets)
        assert float(radius) <= 2 * best


def test_moving_the_frames_moves_the_choice(backend, device):
    x = descriptors(20, device=device)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).to(device)
    start = int((order == 0).nonzero())
    moved = farthest_frames(x[order], 6, start=start, backend=backend)
    assert sorted(order[moved].tolist()) == farthest_frames(x, 6, backend=backend).tolist()


def test_more_frames_than_registers_hold(monkeypatch, device):
    x = descriptors(40, device=device)
    want = farthest_frames(x, 6, backend="triton")
    monkeypatch.setattr(farthest_triton, "MOST", 16)
    assert torch.equal(farthest_frames(x, 6, backend="triton"), want)


def test_distances_that_are_not_numbers_choose_a_frame_all_the_same(backend, device):
    got = farthest_frames(None, 3, distances=torch.full((5, 5), float("nan"), device=device), backend=backend)
    assert ((got >= 0) & (got < 5)).all()


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "exactly one", lambda x: farthest_frames(x, 2, distances=x @ x.T)),
        (ValueError, "exactly one", lambda x: farthest_frames(None, 2)),
        (ValueError, "descriptors must be", lambda x: farthest_frames(x[0], 2)),
        (ValueError, "descriptors must be", lambda x: farthest_frames(x[:0], 2)),
        (ValueError, "distances must be", lambda x: farthest_frames(None, 2, distances=x)),
        (ValueError, "count must be", lambda x: farthest_frames(x, 0)),
        (ValueError, "start must be", lambda x: farthest_frames(x, 2, start=17)),
        (TypeError, "descriptors must be", lambda x: farthest_frames([1], 2)),
        (ValueError, "frames must hold", lambda x: coverage_radius(x, torch.zeros(0))),
    ],
)
def test_bad_arguments_are_named(error, match, call):
    with pytest.raises(error, match=match):
        call(descriptors())
