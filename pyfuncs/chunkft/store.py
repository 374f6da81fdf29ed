"""A chunk's optimizer state at rest, and how it passes by the device: never resident as a whole.

    slab    one allocation a chunk, exactly as long as its state: [master | m | v], or with 8-bit moments their codes
            and scales.  On the host where weights are on a GPU, pinned at its exact size; else where the weights are.
    ring    ``slots`` buffers on the device, each for one bucket of a slab.  AdamW is element-wise, so a bucket is
            fetched, updated and sent back while its neighbours are fetched and sent: two copy streams that live as
            long as the optimizer, and events, never a synchronisation of the device.

Nothing is allocated once every chunk has been seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernels.adamw import QUANT_BLOCK, TILE
from ..ops.streams import COMPUTE, COPY, FETCH, HOST, RecordedStreams, Streams


def layout(tiles: int, *, master: bool, moments: str) -> dict[str, tuple[int, torch.dtype]]:
    """{part: (elements, dtype)} of the state of so many tiles."""
    n = tiles * TILE
    out: dict[str, tuple[int, torch.dtype]] = {"master": (n, torch.float32)} if master else {}
    if moments == "fp32":
        return {**out, "m": (n, torch.float32), "v": (n, torch.float32)}
    scales = (n // QUANT_BLOCK, torch.float32)
    return {**out, "m_scale": scales, "v_scale": scales, "m": (n, torch.uint8), "v": (n, torch.uint8)}


def state_bytes(tiles: int, *, master: bool, moments: str) -> int:
    """Bytes of a slab of so many tiles."""
    return sum(n * dtype.itemsize for n, dtype in layout(tiles, master=master, moments=moments).values())


class Slab:
    """The state of one chunk.  ``fresh`` names the parts that no update has written yet: zeros, or the weights."""

    def __init__(self, tiles: int, *, master: bool, moments: str, device: torch.device, pinned: bool):
        self.tiles, self.moments = tiles, moments
        size = state_bytes(tiles, master=master, moments=moments)
        self.memory = _pinned(size) if pinned else torch.empty(size, dtype=torch.uint8, device=device)
        self.parts = _split(self.memory, layout(tiles, master=master, moments=moments))
        self.fresh = set(self.parts)

    def views(self, first: int, last: int) -> dict[str, Tensor]:
        """Each part's elements of the tiles [first, last)."""
        return {name: x[part_range(name, first, last)] for name, x in self.parts.items()}


def part_range(part: str, first: int, last: int) -> slice:
    """A part's elements of the tiles [first, last)."""
    each = TILE // QUANT_BLOCK if part.endswith("scale") else TILE
    return slice(first * each, last * each)


def _split(memory: Tensor, parts: dict[str, tuple[int, torch.dtype]]) -> dict[str, Tensor]:
    out, at = {}, 0
    for name, (n, dtype) in parts.items():  # fp32 parts first: each begins at a multiple of its size
        out[name] = memory[at : at + n * dtype.itemsize].view(dtype)
        at += n * dtype.itemsize
    return out


def _pinned(size: int) -> Tensor:
    """Page-locked bytes, exactly ``size``: the caching pinned allocator of torch rounds up to a power of two."""
    memory = torch.empty(size, dtype=torch.uint8)
    if size:
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(int(cudart.cudaHostRegister(memory.data_ptr(), size, 0)))
        weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, memory.data_ptr())
    return memory


class Ring:
    """Buckets of ``tiles`` tiles on ``device``; ``stream`` runs a slab through them."""

    def __init__(
        self, tiles: int, *, slots: int, master: bool, moments: str, device: torch.device,
        streams: Streams | RecordedStreams | None = None,
    ):  # fmt: skip
        self.tiles = tiles
        self.streams = streams or Streams(device)
        size = state_bytes(tiles, master=master, moments=moments)
        kinds = layout(tiles, master=master, moments=moments)
        self.slots = [_split(torch.empty(size, dtype=torch.uint8, device=device), kinds) for _ in range(slots)]
        self._sent: list = [None] * slots  # the event after which a slot may be written again
        self._next = 0

    def stream(self, slab: Slab, ranges: Iterable[tuple[int, int]], update: Callable[[int, int, dict], object]) -> None:
        """``update(first, last, parts)`` for each range of at most ``tiles`` tiles, in place on the device.

        Parts that are fresh are not fetched: ``update`` finds them undefined.
        """
        streams = self.streams
        for event in self._sent:  # what is fetched may be what the last call sent
            if event is not None:
                streams.wait(FETCH, event)
        for first, last in ranges:
            i = self._next
            self._next = (i + 1) % len(self.slots)
            rest = slab.views(first, last)
            here = {name: self.slots[i][name][part_range(name, 0, last - first)] for name in rest}
            if self._sent[i] is not None:
                streams.wait(FETCH, self._sent[i])
            fetched = [name for name in here if name not in slab.fresh]
            pairs = [(here[name], rest[name]) for name in fetched]
            streams.run(FETCH, partial(_copy, pairs), reads=[b for _, b in pairs], writes=[a for a, _ in pairs])
            streams.wait(COMPUTE, streams.record(FETCH))  # where nothing is fetched, for what the fetch waited for
            streams.run(COMPUTE, partial(update, first, last, here), writes=list(here.values()))
            streams.wait(COPY, streams.record(COMPUTE))
            back = [(rest[name], here[name]) for name in here]
            streams.run(COPY, partial(_copy, back), reads=[b for _, b in back], writes=[a for a, _ in back])
            self._sent[i] = streams.record(COPY)

    def wait(self) -> None:
        """Block until every slab at rest is whole."""
        for event in self._sent:
            if event is not None:
                self.streams.wait(HOST, event)


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for to, source in pairs:
        to.copy_(source, non_blocking=True)


def buckets(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """[first, last) in ranges of at most ``size``."""
    for start in range(first, last, size):
        yield start, min(start + size, last)
