"""QK-Restore (arXiv 2606.11052): the queries and keys of the softmax layers as they were before fine-tuning.

Fine-tuning a hybrid model on chain of thought moves the routing of its few softmax layers, and long-range recall goes
with it; values, outputs and MLPs hold what was learned.  Putting W_Q and W_K of those layers back repairs recall
without data or training.  It costs a little of what was learned, and does nothing for pure softmax models: see
docs/qk_restore.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...paths import (
    Additive,
    Checkpoint,
    Selection,
    as_config,
    as_tensors,
    attention,
    attention_sizes,
    layer_kinds,
    save,
)
from .drift import Drift, drift
from .options import QKRestoreOptions
from .pro import ProPath
from .report import Report

REPORT = "qk_restore.json"


def select(tensors, config, options: QKRestoreOptions, parts: tuple[str, ...] | None = None) -> dict[str, Selection]:
    """What the options select of a checkpoint; see ``burnish.paths.attention``."""
    o = options
    return attention(
        as_tensors(tensors), config, parts=parts or o.parts, layers=o.layers, bias=o.include_bias,
        qk_norm=o.include_qk_norm, sliding=o.include_swa, kinds=o.kinds, fused=o.fused, query_gate=o.query_gate,
        stack=o.stack,
    )  # fmt: skip


def restore_path(pre, post, config=None, options: QKRestoreOptions | None = None) -> Additive:
    """The path from restored (t = 0) to fine-tuned (t = 1); QK-Restore with ``alpha`` is its point t = 1 - alpha.

    Args:
        pre, post: the model before and after: directories, modules or state dicts.
        config: the model's, a dict or transformers' object; by default ``post``'s own.
        options: see ``QKRestoreOptions``.

    ``dict(restore_path(pre, post).at(0))`` is the restored state dict; ``.load_into(model, 0)`` writes it into a model.
    """
    options = (options or QKRestoreOptions()).check()
    before, after = as_tensors(pre), as_tensors(post)
    config = _config(post, after) if config is None else config
    selector = select(after, config, options)
    if options.mode == "restore":
        return Additive(before, after, selector)
    queries, keys = (select(after, config, options, (p,)) for p in "qk")
    return ProPath(before, after, queries, keys, float(options.lam or 0), options.convention)


def restore(
    pre: str | os.PathLike, post: str | os.PathLike, out: str | os.PathLike | None = None,
    options: QKRestoreOptions | None = None, *, angles: bool = False, progress: Callable[[int], object] | None = None,
    **changes: Any,
) -> Report:  # fmt: skip
    """Restore a checkpoint on disk and write it to a new directory.

    Args:
        pre, post: directories with a config.json and safetensors weights, sharded or not.
        out: the new directory: post's shards, config and tokenizer, and ``qk_restore.json``.  None is a dry run.
        options: see ``QKRestoreOptions``; ``changes`` are single ones: ``restore(pre, post, out, alpha=0.5)``.
        angles: report principal angles too.
        progress: called with the bytes written since the last call.

    Neither model is ever whole in memory.  ``out`` appears whole or not at all.

    ValueError where the models do not match, a shard is missing, or the config does not say which layers are softmax.
    """
    options = replace(options or QKRestoreOptions(), **changes).check()
    before, after = Checkpoint(pre), Checkpoint(post)
    config = after.config()
    notes = _compare(before, after, config, options)
    path = restore_path(before, after, config, options)
    rows = drift(before, after, path.selector, angles)
    t = 1.0 - options.alpha
    if options.alpha < 1 or options.mode == "pro":
        rows = [_changed(path, t, row, after) for row in rows]
    layers = sorted({s.layer for s in path.selector.values() if s.layer is not None})
    by = layer_kinds(config, options.kinds).field if options.layers == "softmax" else "the option layers"
    notes += _notes(after, path, options)
    report = Report(options, str(as_config(config).get("model_type", "")), layers, by, rows, notes)
    if out is not None:
        report.bytes, report.out = after.size, str(out)
        save(path, t, out, files={REPORT: report.json()}, progress=progress)
    return report


def _config(post, tensors) -> Any:
    if isinstance(tensors, Checkpoint):
        return tensors.config()
    config = getattr(post, "config", None)
    if config is None:
        raise ValueError("config: give the model's config; a state dict does not say which layers are softmax")
    return config


def _compare(before: Checkpoint, after: Checkpoint, config: Mapping[str, Any], options: QKRestoreOptions) -> list[str]:
    """Notes on how the two models differ; ValueError where they are not of one architecture."""
    if not (before.folder / "config.json").is_file():
        return [f"{before.folder} has no config.json: its architecture was not compared"]
    old = before.config()
    a, b = as_config(old), as_config(config)
    if a.get("model_type") != b.get("model_type"):
        raise ValueError(f"model_type {a.get('model_type')!r} before training, {b.get('model_type')!r} after")
    if options.layers == "softmax":
        kinds = [layer_kinds(c, options.kinds).kinds for c in (old, config)]
        if kinds[0] != kinds[1]:
            raise ValueError("the two configs differ in their layers' types")
    sizes = [attention_sizes(c) for c in (old, config)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"attention before training {sizes[0]}, after {sizes[1]}")
    notes = []
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "position_embedding_type"):
        if a.get(name) != b.get(name):
            notes.append(f"{name} differs: what is restored was trained with that of the model before")
    return notes


def _notes(after: Checkpoint, path: Additive, options: QKRestoreOptions) -> list[str]:
    notes = []
    kinds = {(path.pre.dtype(n), after.dtype(n)) for n in path.selector}
    for a, b in sorted(kinds, key=str):
        if a != b:
            notes.append(f"weights before training are {a}, after {b}: restored ones are rounded to {b}")
    other = [n for n in after if n not in path.selector and (n not in path.pre or path.pre.shape(n) != after.shape(n))]
    if other:
        notes.append(f"kept, and missing or of another shape before training: {len(other)} tensors, {other[0]} first")
    if any("kv_a_proj" in n for n in path.selector) and "latent" not in options.parts:
        notes.append("latent attention: the rows that keys share with values are kept (part 'latent' restores them)")
    if not any(s.part in ("q", "k", "qk") for s in path.selector.values()) and {"q", "k"} & set(options.parts):
        notes.append("nothing was selected of q and k")
    return notes


def _changed(path: Additive, t: float, row: Drift, after: Checkpoint) -> Drift:
    """The drift's row with what this point changes, where that is not all of the way back."""
    new, old = path.tensor(row.name, t), after.tensor(row.name)
    changed = int((new != old).sum())
    return replace(row, changed=changed, bytes_changed=changed * old.element_size())
