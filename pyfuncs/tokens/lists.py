r"""From frames and tokens of a frame to what a layer projects and who sees which of it.

A ``Plan`` says which rows of the scene are projected to K and V and, in terms of those, which keys each query has:

    one set S for all       project S x T               every query sees all of it: gather once, dense attention
    S and the own frame     project every frame's T     S as above; the own frame's T; merged by log-sum-exp
    a set for each frame    project every frame's T     lists (B, N, 1, K |T|)
    a grid for each head    project S x all tokens      lists (1, 1, heads, M): the heads' grids differ in phase

T is the strided grid in STRIDE layers and every token in FRAMES layers.  Tokens of the scene's tail are keys of every
query, once.  Their own queries attend to every token (``tail="dense"``), for which K and V of all rows must be
projected, or to the selected rows like everyone else ("selected").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .frames import OWN, SHARED
from .grid import Layout, frame_rows, grid_tokens, head_phases
from .rule import DENSE, LOCAL, STRIDE

TAILS = ("dense", "selected")


class SelectionContext(NamedTuple):
    """What a strategy of the user's own is given, once for each layer with pruned keys.

    layer: its index among the global layers; kind: "stride" or "frames"; layout: of the scene; batch: B; heads: of the
    layer; descriptors: fp32 (B, N, D); device: where the lists belong.
    """

    layer: int
    kind: str
    layout: Layout
    batch: int
    heads: int
    descriptors: Tensor
    device: torch.device


Strategy = Callable[[SelectionContext], "Tensor | tuple[Tensor, Tensor | int]"]


@dataclass(frozen=True)
class Choice:
    """What ``accelerate`` was asked for: see there."""

    frames: int = 25
    stride: int = 3
    strategy: str | Strategy = "diversity"
    own_frame: bool = False
    start: int = 0
    edge: str = "ceil"
    phase: tuple[int, int] = (0, 0)
    specials: bool = True
    tail: str = "dense"

    def tokens(self, kind: str, layout: Layout, device: torch.device) -> Tensor:
        """T: which tokens of a frame are keys, int64 (T,)."""
        if kind != STRIDE:
            return torch.arange(layout.tokens, device=device)
        return grid_tokens(layout, self.stride, phase=self.phase, edge=self.edge, specials=self.specials, device=device)

    @property
    def per_frame(self) -> bool:
        return self.strategy in OWN


class Plan(NamedTuple):
    """What a layer with fewer keys computes; B' is 1 where the scenes of a batch share it, else B.

    ``kind``: dense, local, stride or frames; of dense and local nothing else is read.  ``project``: int64 (B', R) rows
    of the scene whose K and V are formed, None for every one.  The rest counts in those rows: ``shared``: int64
    (B', M) keys of all queries, None for all; ``lists``: int32 (B', F, H', M) instead, with ``counts`` an int, or a
    tensor (B', F, H').  ``own``: int64 (T,), tokens of its own frame that a query sees too, frames being ``pitch``
    rows apart, unless its frame is in S: ``members``, bool (B', N).  ``keys``: how many a frame's query sees, without
    ``own``; None if only ``counts`` knows.
    """

    kind: str
    project: Tensor | None = None
    shared: Tensor | None = None
    lists: Tensor | None = None
    counts: Tensor | int | None = None
    own: Tensor | None = None
    members: Tensor | None = None
    pitch: int = 0
    keys: int | None = None

    def computed(self, layout: Layout) -> int | Tensor:
        """Keys whose scores are formed for a frame's query, in the mean; a 0-dim tensor where only the device knows."""
        if self.kind == DENSE:
            return layout.length
        if self.kind == LOCAL:
            return layout.tokens + layout.tail
        keys: int | Tensor | None = self.keys
        if keys is None:
            assert isinstance(self.counts, Tensor)
            keys = self.counts.float().mean()
        return keys + (0 if self.own is None else len(self.own))

    def visible(self, layout: Layout) -> int | Tensor:
        """Keys that a frame's query sees: a frame in S has its own tokens among those of S."""
        keys = self.computed(layout)
        if self.own is None or self.members is None:
            return keys
        return keys - len(self.own) * self.members.float().mean()

    def projected(self, layout: Layout) -> int:
        """Rows of a scene whose K and V are formed."""
        return layout.length if self.project is None else self.project.shape[-1]


def build(choice: Choice, kind: str, layout: Layout, chosen: Tensor, heads: int) -> Plan:
    """The plan of a STRIDE or FRAMES layer for a strategy of ours.

    ``chosen``: int64 (B, K) frames of S, or (B, N, K) of each query frame; ascending.
    """
    device = chosen.device
    tokens = choice.tokens(kind, layout, device)
    if chosen.shape[-1] == layout.frames and len(tokens) == layout.tokens:
        return Plan(DENSE)
    if chosen.ndim == 3 and chosen.shape[-1] == layout.frames:
        chosen = chosen[:, 0]  # every query frame has all frames: one list
    if chosen.ndim == 3:
        return _each_frame(kind, layout, chosen, tokens)
    if choice.strategy == "heads" and kind == STRIDE:
        return _each_head(choice, kind, layout, chosen, heads)
    if choice.own_frame and chosen.shape[-1] < layout.frames:
        return _with_own_frame(kind, layout, chosen, tokens)
    rows = _with_tail(frame_rows(chosen, tokens, layout.tokens), layout.frames * layout.tokens, layout.tail)
    if layout.tail and choice.tail == "dense":
        return Plan(kind, shared=rows, keys=rows.shape[-1])
    return Plan(kind, project=rows, keys=rows.shape[-1])


def _with_tail(rows: Tensor, begin: int, tail: int) -> Tensor:
    """Rows (..., M) and, after them, the ``tail`` rows from ``begin`` on."""
    if not tail:
        return rows
    last = torch.arange(begin, begin + tail, device=rows.device, dtype=rows.dtype)
    return torch.cat([rows, last.expand(*rows.shape[:-1], tail)], -1)


def _all_frames(layout: Layout, tokens: Tensor) -> tuple[Tensor | None, Tensor, int]:
    """Every frame's ``tokens``: (rows to project or None, the same tokens among those, rows a frame has there)."""
    if len(tokens) == layout.tokens or layout.tail:  # check_choice: the tail is dense where this is used
        return None, tokens, layout.tokens
    frames = torch.arange(layout.frames, device=tokens.device)
    rows = frame_rows(frames, tokens, layout.tokens)
    return rows[None], torch.arange(len(tokens), device=tokens.device), len(tokens)


def _with_own_frame(kind: str, layout: Layout, chosen: Tensor, tokens: Tensor) -> Plan:
    project, tokens, pitch = _all_frames(layout, tokens)
    shared = _with_tail(frame_rows(chosen, tokens, pitch), layout.frames * pitch, layout.tail)
    members = torch.zeros(len(chosen), layout.frames, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, True)
    return Plan(kind, project=project, shared=shared, own=tokens, members=members, pitch=pitch, keys=shared.shape[-1])


def _each_frame(kind: str, layout: Layout, chosen: Tensor, tokens: Tensor) -> Plan:
    project, tokens, pitch = _all_frames(layout, tokens)
    lists = _with_tail(frame_rows(chosen, tokens, pitch), layout.frames * pitch, layout.tail)
    size = lists.shape[-1]
    return Plan(kind, project=project, lists=lists[:, :, None].int(), counts=size, pitch=pitch, keys=size)


def _each_head(choice: Choice, kind: str, layout: Layout, chosen: Tensor, heads: int) -> Plan:
    device, count = chosen.device, chosen.shape[-1]
    project, base = None, chosen
    if not layout.tail:  # what is projected lies in the order of S: one list for every scene
        project = frame_rows(chosen, torch.arange(layout.tokens, device=device), layout.tokens)
        base = torch.arange(count, device=device)[None]
    phases = head_phases(heads, choice.stride, layout)
    rows = {}
    for phase in set(phases):
        grid = grid_tokens(layout, choice.stride, phase=phase, specials=choice.specials, device=device)
        rows[phase] = _with_tail(frame_rows(base, grid, layout.tokens), layout.frames * layout.tokens, layout.tail)
    sizes = [rows[phase].shape[-1] for phase in phases]
    lists = torch.full((len(base), 1, heads, max(sizes)), -1, dtype=torch.int32, device=device)
    for head, (phase, size) in enumerate(zip(phases, sizes, strict=True)):
        lists[:, 0, head, :size] = rows[phase].int()
    if len(set(sizes)) == 1:
        return Plan(kind, project=project, lists=lists, counts=sizes[0], pitch=layout.tokens, keys=sizes[0])
    counts = (lists >= 0).sum(-1, dtype=torch.int32)
    return Plan(kind, project=project, lists=lists, counts=counts, pitch=layout.tokens)


def from_user(context: SelectionContext, answer: Tensor | tuple[Tensor, Tensor | int]) -> Plan:
    """The plan of a layer whose lists a strategy of the user's own gave.

    ``answer``: kv_indices, or (kv_indices, kv_counts), as ``selected_attention`` takes them, over tokens [0, N P) of
    the scene.  The tail's tokens are added to every list.  ValueError, TypeError: not such lists.
    """
    indices, counts = answer if isinstance(answer, tuple) else (answer, None)
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"strategy must return an int32 or int64 tensor of rows; got {got}")
    layout, batch = context.layout, context.batch
    if not 1 <= indices.ndim <= 4:
        raise ValueError(
            f"strategy must return (M,), (N, M), (N, heads, M) or (B, N, heads, M); got {tuple(indices.shape)}"
        )
    lists = indices[:, None] if indices.ndim == 2 else indices
    lists = lists.view(*(1,) * (4 - lists.ndim), *lists.shape)
    b, f, h, m = lists.shape
    if b not in (1, batch) or f not in (1, layout.frames) or h not in (1, context.heads):
        raise ValueError(
            f"strategy must return (M,), ({layout.frames}, M), (1 or {layout.frames}, 1 or {context.heads}, M) or, "
            f"before those, 1 or {batch}; got {tuple(indices.shape)}"
        )
    if isinstance(counts, Tensor):
        if counts.shape != indices.shape[:-1]:
            raise ValueError(
                f"strategy must return kv_counts of shape {tuple(indices.shape[:-1])}; got {tuple(counts.shape)}"
            )
        counts = counts.view(b, f, h)
    elif counts is None:
        places = torch.arange(1, m + 1, device=lists.device)
        counts = torch.where(lists >= 0, places, 0).amax(-1) if m else lists.new_zeros(b, f, h)
    elif isinstance(counts, bool) or not isinstance(counts, int) or not 0 <= counts <= m:
        raise ValueError(f"strategy must return kv_counts in [0, {m}]; got {counts!r}")
    else:
        lists = lists[..., :counts]
    frames_end = layout.frames * layout.tokens
    if lists.device.type == "cpu" and lists.numel():
        low, high = int(lists.min()), int(lists.max())
        if high >= frames_end or low < (0 if isinstance(counts, int) else -1):
            worst = high if high >= frames_end else low
            raise ValueError(f"strategy must return rows in [0, {frames_end}), or -1 past the counts; got {worst}")
    lists = lists.int()
    if layout.tail:  # before the list: after it there may be padding
        tail = torch.arange(frames_end, layout.length, device=lists.device, dtype=torch.int32)
        lists = torch.cat([tail.expand(b, f, h, layout.tail), lists], -1)
        counts = counts + layout.tail
    keys = counts if isinstance(counts, int) else None
    if keys is not None and f == h == 1 and not layout.tail and keys:
        return Plan(context.kind, project=lists[:, 0, 0].long(), keys=keys)
    counts = counts if isinstance(counts, int) else counts.int()
    return Plan(context.kind, lists=lists.contiguous(), counts=counts, pitch=layout.tokens, keys=keys)


def check_choice(choice: Choice) -> None:
    """ValueError or TypeError where a ``Choice`` cannot be carried out; whatever the scene."""
    names = (*SHARED, *OWN)
    if not callable(choice.strategy) and choice.strategy not in names:
        raise ValueError(f"strategy must be one of {', '.join(names)}, or a function; got {choice.strategy!r}")
    if choice.own_frame and choice.strategy != "diversity":
        raise ValueError(f"own_frame goes with strategy='diversity'; got {choice.strategy!r}")
    if choice.tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {choice.tail!r}")
    if choice.tail == "selected" and (choice.strategy != "diversity" or choice.own_frame):
        raise ValueError("tail='selected' goes with strategy='diversity' without own_frame: a tail token has no frame")
    if choice.strategy == "heads" and (tuple(choice.phase) != (0, 0) or choice.edge != "ceil"):
        raise ValueError("strategy='heads' has a phase for each head, to the edge; phase and edge go with the others")
