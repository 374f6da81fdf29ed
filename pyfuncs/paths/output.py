"""A directory that is there whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".partial"


@contextmanager
def atomic_directory(out: str | os.PathLike, need: int = 0) -> Iterator[Path]:
    """A temporary directory beside ``out`` that becomes ``out`` at the end of the block.

    Every file is flushed to the disk before the rename, and the rename before this returns.  An exception, a full disk
    included, removes the temporary directory.  A killed process leaves it, hidden, beside ``out``; it is removed by the
    next one that writes the same ``out`` (a lock tells it from one in use).

    Args:
        out: must not exist, or be an empty directory.
        need: bytes that will be written.

    ValueError where ``out`` holds something; OSError, before anything is written, where the disk has less than
    ``need``.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty directory")
    parent = out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}."
    for stale in parent.glob(f"{glob.escape(prefix)}*{_SUFFIX}"):
        handle = lock(stale)
        if handle is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(handle)
    free = shutil.disk_usage(parent).free
    if need > free:
        raise OSError(f"{out}: {need / 1e9:.2f} GB are needed, the disk has {free / 1e9:.2f} GB")
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))
    held = lock(folder)
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's is for the owner alone
        for path in [*folder.rglob("*"), folder]:
            flush(path)
        folder.rename(out.resolve())
        flush(parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def lock(folder: Path, *, wait: bool = False) -> int | None:
    """A handle that keeps others from the folder until it is closed or its process ends.

    None where another process holds it and this one is not to ``wait``, or where there is no such folder.
    """
    import fcntl  # not on Windows, where burnish must still import

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def flush(path: Path) -> None:
    """fsync of a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
