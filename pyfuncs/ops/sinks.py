"""Where a finished slab of dW goes, while the next one is computed.

In vocabulary-outer order each slab of dW is written once and final.  A sink lends the op the memory that a slab is
written to, and is told when it is done:

    slab = sink.slab(rows, width, dtype, device)      # (rows.stop - rows.start, width), contents undefined
    sink.put(rows, slab)                              # slab holds dW[rows], in the accumulator's dtype
    sink.close()                                      # every slab of this backward was put
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .streams import COMPUTE, COPY, HOST, RecordedStreams, Streams


class Sink(Protocol):
    """What ``sink=`` takes; a tensor and a callable are made into one."""

    def slab(self, rows: slice, width: int, dtype: torch.dtype, device: torch.device) -> Tensor: ...
    def put(self, rows: slice, slab: Tensor) -> None: ...
    def close(self) -> None: ...


class TensorSink:
    """Slabs into the rows of a tensor (V, H), rounded once to its dtype; in place where that is the slab's own."""

    def __init__(self, out: Tensor):
        self.out = out
        self._scratch: Tensor | None = None

    def slab(self, rows: slice, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        place = self.out[rows]
        if place.dtype == dtype and place.device == device and place.is_contiguous():
            return place
        self._scratch = _reuse(self._scratch, rows.stop - rows.start, width, dtype, device)
        return self._scratch[: rows.stop - rows.start]

    def on_cpu(self) -> bool:
        """Whether a kernel of the CPU may write the rows itself."""
        return self.out.device.type == "cpu" and (self.out.stride(1) == 1 or self.out.shape[1] == 1)

    def put(self, rows: slice, slab: Tensor) -> None:
        place = self.out[rows]
        if place.data_ptr() != slab.data_ptr() or place.dtype != slab.dtype:
            place.copy_(slab)

    def close(self) -> None:
        self._scratch = None


class CallbackSink:
    """Calls ``function(rows, slab)``; the slab's memory is used again after the call: copy what is to stay."""

    def __init__(self, function: Callable[[slice, Tensor], None]):
        self.function = function
        self._scratch: Tensor | None = None

    def slab(self, rows: slice, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._scratch = _reuse(self._scratch, rows.stop - rows.start, width, dtype, device)
        return self._scratch[: rows.stop - rows.start]

    def put(self, rows: slice, slab: Tensor) -> None:
        self.function(rows, slab)

    def close(self) -> None:
        self._scratch = None


class HostSink:
    """Slabs into pinned host memory on a side stream: dW never exists whole on the device.

    ``out`` (V, H) on the CPU, pinned for the copies to overlap; each slab is rounded to its dtype on the device.  A
    ring of ``slots`` device buffers lies between: the product of slab i + 1 runs while slab i is copied, and a buffer
    is written again only after its copy's event.  ``wait()`` returns when ``out`` is complete; read it after that.
    """

    def __init__(self, out: Tensor, *, slots: int = 2, streams: Streams | RecordedStreams | None = None):
        if not isinstance(out, Tensor) or out.device.type != "cpu" or out.ndim != 2:
            raise ValueError("HostSink: out must be a (V, H) tensor on the CPU, pinned")
        if slots < 1:
            raise ValueError(f"HostSink: slots must be at least 1; got {slots}")
        self.out, self._streams = out, streams
        self._ring: list[Tensor | None] = [None] * slots
        self._low: list[Tensor | None] = [None] * slots
        self._copied: list = [None] * slots
        self._next = 0

    def _on(self, device: torch.device) -> Streams | RecordedStreams:
        if self._streams is None:
            if device.type != "cuda":
                raise ValueError(f"HostSink needs a head on a CUDA device; got {device}: give the tensor itself")
            self._streams = Streams(device)
        return self._streams

    def slab(self, rows: slice, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        streams, i, n = self._on(device), self._next, rows.stop - rows.start
        if self._copied[i] is not None:
            streams.wait(COMPUTE, self._copied[i])
        ring = self._ring[i] = _reuse(self._ring[i], n, width, dtype, device)
        if self.out.dtype != dtype:
            self._low[i] = _reuse(self._low[i], n, width, self.out.dtype, device)
        streams.run(COMPUTE, lambda: None, writes=[ring[:n]])  # the op's products write it next
        return ring[:n]

    def put(self, rows: slice, slab: Tensor) -> None:
        streams, i, n = self._on(slab.device), self._next, rows.stop - rows.start
        low = self._low[i]
        source = slab
        if low is not None:
            source = low[:n]
            streams.run(COMPUTE, lambda: source.copy_(slab), reads=[slab], writes=[source])
        target = self.out[rows]
        streams.wait(COPY, streams.record(COMPUTE))
        streams.run(COPY, lambda: target.copy_(source, non_blocking=True), reads=[source], writes=[target])
        self._copied[i] = streams.record(COPY)
        self._next = (i + 1) % len(self._ring)

    def close(self) -> None:
        pass  # the copies may still run: the next forward, or an optimizer on the host, need not wait here

    def wait(self) -> Tensor:
        """Block until every copy is done; returns ``out``."""
        for event in self._copied:
            if event is not None and self._streams is not None:
                self._streams.wait(HOST, event)
        return self.out


def _reuse(buffer: Tensor | None, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if buffer is not None and buffer.shape[0] >= rows and buffer.shape[1:] == (width,) and buffer.dtype == dtype:
        return buffer
    return torch.empty(rows, width, dtype=dtype, device=device)


def as_sink(sink, shape: tuple[int, int]) -> Sink | None:
    """``sink=`` as it was given: a sink, a tensor (V, H) = ``shape``, a callable or None."""
    out = sink if isinstance(sink, Tensor) else getattr(sink, "out", None)
    if isinstance(out, Tensor) and (tuple(out.shape) != shape or not out.is_floating_point()):
        raise ValueError(f"sink: the tensor must be {shape} of a floating dtype; got {tuple(out.shape)} {out.dtype}")
    if sink is None or all(hasattr(sink, name) for name in ("slab", "put", "close")):
        return sink
    if isinstance(sink, Tensor):
        return TensorSink(sink)
    if callable(sink):
        return CallbackSink(sink)
    raise TypeError(f"sink must be a tensor, a callable or a sink; got {type(sink).__name__}")
