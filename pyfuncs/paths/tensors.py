"""Where tensors come from: a safetensors checkpoint read one tensor at a time, or a state dict.

A tensor of a checkpoint is read into memory of its own and never mapped, so what is resident is what the caller holds.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

#: safetensors' names of the dtypes that can be read; a tensor of another one is copied as bytes, never opened.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Tensors(Protocol):
    """Named tensors, read one at a time."""

    def __iter__(self) -> Iterator[str]:
        """The names."""

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, in memory that the caller may write."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: ``start`` and ``end`` are offsets in the file, in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """A directory of safetensors shards and a ``config.json``, as transformers and PEFT write them.

    Args:
        folder: the directory.
        stem: of the weights: ``model`` (``model.safetensors`` or ``model.safetensors.index.json``), or
            ``adapter_model``.

    Attributes:
        entries: name -> ``Entry``.
        files: shard -> its tensors' names in the order of their bytes.
        size: bytes of all shards.

    Only headers are read here.  ValueError where there is no such directory, a shard is missing or cut short, or a
    tensor that the index lists is in no shard.
    """

    def __init__(self, folder: str | os.PathLike, stem: str = "model"):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: no such directory")
        self.entries: dict[str, Entry] = {}
        self.files: dict[str, list[str]] = {}
        self.size = 0
        whole, index = self.folder / f"{stem}.safetensors", self.folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            listed = _json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise ValueError(f"{index}: no weight_map")
            shards = sorted(set(listed.values()))
            missing = [s for s in shards if not (self.folder / s).is_file()]
            if missing:
                raise ValueError(f"{folder}: missing {len(missing)} of {len(shards)} shards: {', '.join(missing)}")
        elif whole.is_file():
            listed, shards = None, [whole.name]
        else:
            others = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            hint = f"; {others[0]} must be converted to safetensors first" if others else ""
            raise ValueError(f"{folder}: neither {whole.name} nor {index.name}{hint}")
        for shard in shards:
            self._read_header(shard)
        absent = sorted(set(listed or ()) - self.entries.keys())
        if absent:
            raise ValueError(f"{index}: {absent[0]} and {len(absent) - 1} more are in no shard")

    def _read_header(self, shard: str) -> None:
        path = self.folder / shard
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise ValueError(f"{path}: cut short: {size} bytes")
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                found = {
                    name: Entry(shard, t["dtype"], tuple(t["shape"]), *(8 + length + o for o in t["data_offsets"]))
                    for name, t in header.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: not a safetensors file: {error}") from error
        end = max((e.end for e in found.values()), default=8 + length)
        if end != size:
            raise ValueError(f"{path}: cut short: {size} bytes where its header says {end}")
        twice = self.entries.keys() & found
        if twice:
            raise ValueError(f"{path}: {min(twice)} is in {self.entries[min(twice)].file} too")
        self.entries |= found
        self.files[shard] = sorted(found, key=lambda n: (found[n].start, found[n].end))
        self.size += size

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.folder / entry.file}: {name} has dtype {entry.dtype}, which cannot be read")
        return DTYPES[entry.dtype]

    def tensor(self, name: str) -> torch.Tensor:
        entry, dtype = self.entries[name], self.dtype(name)
        size = entry.end - entry.start
        (raw,) = self._read(name, size) if size else [torch.empty(0, dtype=torch.uint8)]
        return raw.view(dtype).reshape(entry.shape)

    def chunks(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        """The tensor's elements in order, at most so many at a time."""
        dtype = self.dtype(name)
        for raw in self._read(name, elements * dtype.itemsize):
            yield raw.view(dtype)

    def _read(self, name: str, step: int) -> Iterator[torch.Tensor]:
        entry = self.entries[name]
        with (self.folder / entry.file).open("rb", buffering=0) as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.end, step):
                raw = torch.empty(min(step, entry.end - start), dtype=torch.uint8)
                view, done = raw.numpy().data, 0
                while done < len(view):
                    got = file.readinto(view[done:])
                    if not got:
                        raise OSError(f"{self.folder / entry.file}: ended inside {name}")
                    done += got
                yield raw

    def prefetch(self, name: str) -> None:
        """Tell the system that a tensor will be read soon; returns at once."""
        entry = self.entries.get(name)
        if entry is not None and hasattr(os, "posix_fadvise"):
            with (self.folder / entry.file).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), entry.start, entry.end - entry.start, os.POSIX_FADV_WILLNEED)

    def config(self) -> dict[str, Any]:
        """``config.json``.  ValueError where there is none."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no config.json")
        return _json(path)


class StateDict:
    """Tensors in memory; ``tensor`` gives a copy on the CPU."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = {name: x.detach() for name, x in tensors.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].to("cpu", copy=True)


def as_tensors(source) -> Tensors:
    """A directory, a module, a state dict, or what is one of ``Tensors`` already (a path's point is).  TypeError for
    anything else."""
    if isinstance(source, (str, os.PathLike)):
        return Checkpoint(source)
    if isinstance(source, torch.nn.Module):
        return StateDict(source.state_dict())
    if hasattr(source, "tensor") and hasattr(source, "shape"):
        return source
    if isinstance(source, Mapping):
        return StateDict(source)
    raise TypeError(f"a directory, a module or a state dict is needed; got {type(source).__name__}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed")
    return value
