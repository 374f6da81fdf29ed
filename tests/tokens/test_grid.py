"""T_sigma and layouts: fact 10 of specs/tokens.md 6."""

import itertools

import pytest
import torch
from oracle import grid

from burnish.tokens import Layout, frame_rows, grid_size, grid_tokens, head_phases


@pytest.mark.parametrize(
    "size, stride, count", [((28, 37), 2, 271), ((28, 37), 3, 135), ((37, 37), 2, 366), ((37, 37), 3, 174)]
)
def test_published_sizes(size, stride, count):
    layout = Layout(3, *size, special=5)
    assert grid_size(layout, stride) == len(grid_tokens(layout, stride)) == count
    assert layout.tokens == 5 + size[0] * size[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (4, 6), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("special, trailing", [(0, 0), (3, 0), (0, 2), (1, 1)])
def test_the_grid_is_that_of_the_definition(size, stride, special, trailing):
    layout = Layout(2, *size, special=special, trailing=trailing)
    tokens = grid_tokens(layout, stride)
    assert tokens.tolist() == grid(layout, stride)
    assert tokens.dtype == torch.int64 and (tokens.diff() > 0).all() and tokens[-1] < layout.tokens
    assert tokens[:special].tolist() == list(range(special))


@pytest.mark.parametrize("phase", itertools.product(range(3), range(3)))
@pytest.mark.parametrize("size", [(4, 5), (3, 9), (2, 2)])
def test_phases_and_edges(phase, size):
    h, w = size
    layout = Layout(2, h, w, special=2, trailing=1)
    for edge, specials in itertools.product(("ceil", "floor"), (True, False)):
        got = grid_tokens(layout, 3, phase=phase, edge=edge, specials=specials)
        assert grid_size(layout, 3, phase=phase, edge=edge, specials=specials) == len(got)
        rows = range(phase[0], h, 3) if edge == "ceil" else [phase[0] + 3 * i for i in range(h // 3)]
        columns = range(phase[1], w, 3) if edge == "ceil" else [phase[1] + 3 * i for i in range(w // 3)]
        patches = [2 + y * w + x for y in rows for x in columns]
        last = [2 + h * w]
        assert got.tolist() == ([0, 1, *patches, *last] if specials else patches)
        assert all(t < layout.tokens for t in got.tolist())


def test_phases_of_all_heads_cover_the_grid_once():
    for size, stride in (((5, 7), 2), ((4, 4), 3), ((2, 7), 3), ((1, 3), 4)):
        layout = Layout(2, *size, special=2)
        distinct = min(stride, size[0]) * min(stride, size[1])
        phases = head_phases(16, stride, layout)
        assert len(phases) == 16 and len(set(phases[:distinct])) == distinct
        assert phases[distinct : 2 * distinct] == phases[: len(phases[distinct : 2 * distinct])]
        seen = torch.cat([grid_tokens(layout, stride, phase=p, specials=False) for p in phases[:distinct]])
        assert sorted(seen.tolist()) == list(range(2, layout.tokens))


def test_rows_of_the_scene():
    frames, tokens = torch.tensor([[0, 3], [1, 2]]), torch.tensor([0, 2, 5])
    assert frame_rows(frames, tokens, 7).tolist() == [[0, 2, 5, 21, 23, 26], [7, 9, 12, 14, 16, 19]]
    assert (frame_rows(frames, tokens, 7).diff() > 0).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Layout(0, 2, 2), "frames must be at least 1; got 0"),
        (lambda: Layout(1, 2, 2, tail=-1), "tail must be at least 0; got -1"),
        (lambda: grid_tokens(Layout(1, 2, 2), 0), "stride must be at least 1; got 0"),
        (lambda: grid_tokens(Layout(1, 2, 2), 2, phase=(0, 2)), r"phase must be below stride = 2; got \(0, 2\)"),
        (lambda: grid_tokens(Layout(1, 2, 2), 2, edge="round"), "edge must be one of ceil, floor; got 'round'"),
    ],
)
def test_errors_name_the_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_types():
    with pytest.raises(TypeError, match=r"frames must be a whole number; got 2\.5"):
        Layout(2.5, 2, 2)
    with pytest.raises(TypeError, match="phase must be a pair"):
        grid_tokens(Layout(1, 2, 2), 2, phase=1)
