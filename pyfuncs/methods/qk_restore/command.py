"""``burnish qk-restore PRE POST OUT``."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from ...paths import Checkpoint
from ..options import assignments
from .adapters import Dropped, drop_adapters
from .options import QKRestoreOptions
from .report import Report
from .restore import restore


def run(arguments: argparse.Namespace) -> Report | Dropped:
    """Restore a checkpoint, or drop an adapter's part, as the command line says.  ValueError, OSError."""
    if arguments.out is None and not arguments.dry_run:
        raise ValueError("OUT is missing: a new directory, or --dry-run")
    out = None if arguments.dry_run else arguments.out
    options = QKRestoreOptions(
        layers=_layers(arguments.layers),
        parts=tuple(p.strip() for p in arguments.parts.split(",") if p.strip()),
        alpha=arguments.alpha,
        mode="restore" if arguments.pro is None else "pro",
        lam=arguments.pro,
        convention=arguments.convention,
        include_bias=not arguments.no_bias,
        include_qk_norm=arguments.qk_norm,
        include_swa=arguments.swa,
        kinds=assignments(arguments.kind or [], "--kind") or None,
        fused=arguments.fused,
        query_gate=arguments.query_gate,
        stack=arguments.stack,
    ).check()
    if (Path(arguments.post) / "adapter_config.json").is_file():
        return drop_adapters(arguments.pre, arguments.post, out, options)
    size = Checkpoint(arguments.post).size
    with tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None if out else True) as bar:
        return restore(arguments.pre, arguments.post, out, options, angles=arguments.angles, progress=bar.update)


def _layers(text: str) -> str | tuple[int, ...]:
    if text in ("softmax", "all"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers takes softmax, all, or indices such as 3,7,11; got {text!r}") from None
