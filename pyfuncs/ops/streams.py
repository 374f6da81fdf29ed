"""Orders of work, "compute", "copy" (to the host) and "fetch" (from it), and the events between them.

Code that hands a buffer from one to the other is written against ``Streams``.  On a GPU they are CUDA streams.  On
the CPU ``RecordedStreams`` runs the same code and proves its order: each access to a buffer is recorded with a vector
clock, ``check()`` names every pair of conflicting accesses that no chain of events orders, and work on "copy" and
"fetch" is put off until something waits for it, so that a missing wait shows in the numbers as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COMPUTE, COPY, FETCH, HOST = "compute", "copy", "fetch", "host"
_SIDE = (COPY, FETCH)


class Streams:
    """The current CUDA stream as "compute", streams of our own as "copy" and "fetch", and the host."""

    def __init__(self, device: torch.device):
        self._streams = {name: torch.cuda.Stream(device) for name in _SIDE}
        self._device = device

    def _stream(self, name: str):
        return self._streams.get(name) or torch.cuda.current_stream(self._device)

    def run(self, name: str, work: Callable[[], Any], *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()):
        """Enqueue ``work`` on a stream (on the host: do it now).  It touches nothing but ``reads`` and ``writes``."""
        if name == HOST:
            return work()
        with torch.cuda.stream(self._stream(name)):
            return work()

    def record(self, name: str):
        """An event that fires when all that is enqueued on the stream so far is done."""
        return self._stream(name).record_event()

    def wait(self, name: str, event) -> None:
        """What comes next on the stream (or on the host) starts after the event."""
        if name == HOST:
            event.synchronize()
        else:
            self._stream(name).wait_event(event)


@dataclass
class _Access:
    stream: str
    time: int
    clock: dict[str, int]
    first: int  # address range [first, last)
    last: int
    write: bool


@dataclass
class _Event:
    stream: str
    clock: dict[str, int]


@dataclass
class RecordedStreams:
    """``Streams`` without a GPU: the same calls, recorded, and the copies done as late as the events allow."""

    accesses: list[_Access] = field(default_factory=list)
    clocks: dict[str, dict[str, int]] = field(default_factory=lambda: {s: {} for s in (COMPUTE, *_SIDE, HOST)})
    pending: dict[str, list[tuple[int, Callable[[], Any]]]] = field(default_factory=lambda: {s: [] for s in _SIDE})

    def run(self, name: str, work: Callable[[], Any], *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()):
        clock = self.clocks[name]
        clock[name] = clock.get(name, 0) + 1
        if name != HOST:  # what the host has seen done is done for whatever it enqueues next
            self._merge(name, self.clocks[HOST])
        for tensors, write in ((reads, False), (writes, True)):
            for x in tensors:
                first = x.data_ptr()
                size = x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
                self.accesses.append(
                    _Access(name, clock[name], dict(clock), first, first + size * bool(x.numel()), write)
                )
        if name in _SIDE:
            self.pending[name].append((clock[name], work))
            return None
        return work()

    def record(self, name: str) -> _Event:
        return _Event(name, dict(self.clocks[name]))

    def wait(self, name: str, event: _Event) -> None:
        self._merge(name, event.clock)
        for side, pending in self.pending.items():
            while pending and pending[0][0] <= event.clock.get(side, 0):
                pending.pop(0)[1]()

    def _merge(self, name: str, clock: dict[str, int]) -> None:
        mine = self.clocks[name]
        for other, time in clock.items():
            if other != name:
                mine[other] = max(mine.get(other, 0), time)

    def check(self) -> list[str]:
        """Every pair of accesses to the same bytes, one of them a write, that may happen in either order."""
        races = []
        for i, a in enumerate(self.accesses):
            for b in self.accesses[i + 1 :]:
                apart = a.last <= b.first or b.last <= a.first
                if a.stream == b.stream or apart or not (a.write or b.write):
                    continue
                if b.clock.get(a.stream, 0) < a.time:  # b was not made to wait for a
                    kinds = ["write" if x.write else "read" for x in (a, b)]
                    races.append(f"{a.stream} {kinds[0]} {a.time} and {b.stream} {kinds[1]} {b.time}")
        return races
