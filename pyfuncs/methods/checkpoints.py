"""Which of a Trainer's checkpoints can be resumed from.

A Trainer writes a checkpoint's files one after another in place, so a process that is killed leaves a
directory with files missing or cut short.  Everything here reads only what tells a whole file from a cut one.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path


def sharded(folder: Path) -> bool:
    """Whether FSDP saved a checkpoint: only FSDP resumes from it."""
    return any(folder.glob("pytorch_model_fsdp*"))


def incomplete(folder: Path, processes: int = 1) -> str | None:
    """Why a checkpoint cannot be resumed from by so many processes, or None where it is whole.

    Whole means: weights (safetensors, sharded or not, a PEFT adapter, or FSDP's own), optimizer, scheduler,
    each process's random state, and ``trainer_state.json``, each readable to its end.
    """
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        if state["global_step"] != int(folder.name.rsplit("-", 1)[1]):
            return f"trainer_state.json is of step {state['global_step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or cut short"
    random = sorted(folder.glob("rng_state*.pth"))
    archives = [folder / "scheduler.pt", *random]
    if sharded(folder):
        for name in ("pytorch_model_fsdp", "optimizer"):
            shards = folder / f"{name}_0"
            if not shards.is_dir():
                archives.append(folder / f"{name}.bin")  # FULL_STATE_DICT
            elif not (shards / ".metadata").is_file():  # written last, when every process's shards are
                return f"{shards.name} is cut short"
    else:
        problem = _weights(folder)
        if problem:
            return problem
        archives.append(folder / "optimizer.pt")
    if len(random) < processes:
        return "the random state is missing"
    for path in archives:
        # a torch archive is a zip: its directory is written last
        if not path.is_file() or not zipfile.is_zipfile(path):
            return f"{path.name} is missing or cut short"
    return None


def newest(output: Path, processes: int = 1) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(newest whole checkpoint or None, newer ones that are not whole with the reason)."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    broken: list[tuple[Path, str]] = []
    for folder in sorted(found, key=lambda p: -int(p.name.rsplit("-", 1)[1])):
        problem = incomplete(folder, processes)
        if problem is None:
            return folder, broken
        broken.append((folder, problem))
    return None, broken


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint, so that neither resume nor rotation counts it; returns its new path."""
    target = folder.with_name(f"incomplete-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"incomplete-{folder.name}.{number}")
    return folder.rename(target)


def _weights(folder: Path) -> str | None:
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            return None if _whole_safetensors(folder / name) else f"{name} is cut short"
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError):
        return "the weights are missing or cut short"
    bad = [s for s in shards if not _whole_safetensors(folder / s)]
    return f"{bad[0]} is missing or cut short" if bad else None


def _whole_safetensors(path: Path) -> bool:
    """8 bytes of header length, a JSON header with each tensor's end offset, then exactly that many bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > size:
                return False
            header = json.loads(file.read(length))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False
    return size == 8 + length + end
