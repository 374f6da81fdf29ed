"""Writing a point of a path as a checkpoint, shard by shard, tensor by tensor."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from .output import atomic_directory, flush
from .path import Point, WeightPath
from .tensors import Checkpoint

_CHUNK = 1 << 22
#: What of a directory belongs to the model beside its weights; a Trainer's own state does not.
_SIDE = {".json", ".txt", ".model", ".py", ".jinja", ".md", ".tiktoken"}
_NOT = {"trainer_state.json"}


@dataclass(frozen=True)
class Saved:
    """What ``save`` wrote: bytes of weights in all, bytes and number of the tensors that were computed, not copied."""

    bytes: int
    computed_bytes: int
    computed: int


def save(
    path: WeightPath, t: Point, out: str | os.PathLike, *, files: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Saved:  # fmt: skip
    """Write theta(t) to a new directory: the template's shards with the bytes of moved tensors replaced, its config and
    tokenizer beside them.

    Args:
        path: its template must be a ``Checkpoint``.
        t: the point.
        out: must not exist, or be an empty directory; it appears whole, at the end (``atomic_directory``).
        files: more files, name -> text.
        progress: called with the bytes done since the last call.

    Tensors that the point leaves as they are go from file to file inside the kernel.  Of the others one is held at a
    time, beside what the path needs to make it; of one that ``Additive`` moves whole, blocks only.  Headers, order and
    metadata are the template's.
    """
    template = path.template
    if not isinstance(template, Checkpoint):
        raise TypeError("save needs a path between checkpoints on disk; this one's tensors are in memory")
    side = [p for p in sorted(template.folder.rglob("*")) if _belongs(p, template)]
    need = template.size + sum(p.stat().st_size for p in side) + sum(len(x) for x in (files or {}).values())
    counts = [0, 0]
    with atomic_directory(out, need) as folder:
        for source in side:
            target = folder / source.relative_to(template.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        # a shard goes to the disk while the next is made
        with ThreadPoolExecutor(1) as flushing:
            flushed = []
            for shard in template.files:
                _shard(path, t, template, shard, folder / shard, counts, progress)
                flushed.append(flushing.submit(flush, folder / shard))
            for future in flushed:
                future.result()
    return Saved(template.size, *counts)


def copy_side_files(source: Path, folder: Path, skip: set[str]) -> None:
    """Copy a directory's small files (configs, tokenizer) but those named in ``skip``."""
    for path in sorted(source.glob("*")):
        if path.is_file() and path.suffix in _SIDE and path.name not in _NOT | skip:
            shutil.copyfile(path, folder / path.name)


def _belongs(path: Path, template: Checkpoint) -> bool:
    if not path.is_file() or path.suffix not in _SIDE or path.name in _NOT:
        return False
    parts = path.relative_to(template.folder).parts
    if len(parts) > 1 and (parts[0].startswith(("checkpoint-", ".", "runs")) or len(parts) > 2):
        return False
    # another model, kept in a directory of this one
    if len(parts) > 1 and any(path.parent.glob("*.safetensors")):
        return False
    # an index of other weights (pytorch_model.bin.index.json) would name files that are not there
    return not path.name.endswith(".index.json") or set(_weights(path)) <= set(template.files)


def _weights(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def _shard(path: WeightPath, t: Point, template: Checkpoint, shard: str, target: Path, counts, progress) -> None:
    source = template.folder / shard
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        done = 0
        moved = [name for name in template.files[shard] if not path.kept(name, t)]
        ahead = [s for s in path.sources() if isinstance(s, Checkpoint)]
        for name, following in zip_longest(moved, moved[1:]):
            for origin in ahead if following is not None else ():
                origin.prefetch(following)
            entry = template.entries[name]
            _copy(reader, writer, done, entry.start, progress)
            size = 0
            for value in path.chunks(name, t):
                _write(writer, value)
                size += value.nbytes
                if progress is not None:
                    progress(value.nbytes)
            if size != entry.end - entry.start:
                raise ValueError(f"{name}: {size} bytes on the path, {entry.end - entry.start} in {source}")
            counts[0] += size
            counts[1] += 1
            done = entry.end
        _copy(reader, writer, done, source.stat().st_size, progress)


def _write(writer, value: torch.Tensor) -> None:
    view = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        done += writer.write(view[done:])


def _copy(reader, writer, start: int, end: int, progress) -> None:
    """Bytes [start, end) of one file to the end of another, inside the kernel where it can."""
    inside = hasattr(os, "copy_file_range")
    while start < end:
        count = min(end - start, 1 << 26 if inside else _CHUNK)
        if inside:
            try:
                done = os.copy_file_range(reader.fileno(), writer.fileno(), count, start)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                inside = False
                continue
        else:
            done = _through_memory(reader, writer, start, count)
        if not done:
            raise OSError(f"{reader.name}: ended at {start} of {end}")
        start += done
        if progress is not None:
            progress(done)


def _through_memory(reader, writer, start: int, count: int) -> int:
    reader.seek(start)
    view = memoryview(reader.read(min(count, _CHUNK)))
    size = len(view)
    while view:
        view = view[writer.write(view) :]
    return size
