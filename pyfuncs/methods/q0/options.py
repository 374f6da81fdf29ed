"""Train far beyond the epochs that one model can use of a fixed text: cycles with snapshots, each snapshot teaching the
next cycle, and weights over all of them learned on text that was kept back (q0, arXiv 2606.03938)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import options
from ..options import Option, count, mapping, natural, nonnegative, number, one_of, output_options, text

_share = number(float, 0.0, "a number, at least 0")

#: Fields of HyperEpochConfig that are options of the same name.
FIELDS = (
    "cycles", "epochs_per_cycle", "seq_length", "lr_floor", "wd_floor", "cycle_warmup", "cycle_warmdown", "lr_schedule",
    "batch_floor", "distill_share", "distill_temperature", "distill_after_cycles", "perturb_first", "perturb_last",
    "fitness_share", "snapshot_dtype", "optimizer", "softcap", "weight_decay",
)  # fmt: skip
#: What --set may not name, because an option of our own does.
OWN_FIELDS = {name: f"--{name.replace('_', '-')}" for name in FIELDS}

OPTIONS: dict[str, Option] = {
    "model": Option(text, None, "where all trajectories start: directory, hub name, or smollm2"),
    "architecture": Option(
        mapping, {}, "instead of --model, a fresh one: model_type and its config's fields"
    ),
    "tokenizer": Option(text, None, "with --architecture: bytes, bpe:SIZE (made of the data), directory or hub name"),
    "data": Option(text, None, "documents: FILE.jsonl (text or input_ids), a text file, or a folder"),
    "pattern": Option(text, "*.py", "of a folder, the files that are documents"),
    "eval_data": Option(text, None, "documents that nothing is chosen by, as --data; for the report"),
    "fitness_share": Option(_share, 0.02, "share of the data, whole documents from the front, for the prior alone"),
    "seq_length": Option(count, 1024, "labels a row"),
    "trajectories": Option(count, 1, "independent runs, each with a seed of its own"),
    "spread": Option(
        one_of("trajectories", "data"), "trajectories", "over several processes: a trajectory each, or DDP for each"
    ),
    "cycles": Option(count, 8, "of a trajectory; a snapshot at the end of each"),
    "epochs_per_cycle": Option(count, 2, "passes over the data a cycle"),
    "optimizer": Option(one_of("adamw", "muon"), "adamw", "adamw (or --set optim=...), or muon with adamw beside it"),
    "learning_rate": Option(nonnegative, 1e-3, "peak learning rate"),
    "weight_decay": Option(nonnegative, 0.1, "peak weight decay"),
    "lr_schedule": Option(one_of("cycles", "once"), "cycles", "or one fall over the whole run, the control"),
    "lr_floor": Option(_share, 0.08, "of the learning rate within a cycle"),
    "wd_floor": Option(_share, 0.7, "of the weight decay within a cycle; 1 keeps it flat"),
    "cycle_warmup": Option(_share, 0.0, "share of a cycle over which the rate rises"),
    "cycle_warmdown": Option(_share, 0.0, "share of a cycle over which the rate goes from its floor to 0"),
    "batch_floor": Option(_share, 1.0, "share of --batch-size in the first and last quarter of the cycles"),
    "distill_share": Option(_share, 0.45, "of the divergence from the snapshot before; 0 for none"),
    "distill_temperature": Option(_share, 1.2, "of that divergence"),
    "distill_after_cycles": Option(count, 8, "cycles without a teacher"),
    "softcap": Option(_share, None, "of the logits; without it the model's own"),
    "perturb_first": Option(_share, 0.25, "noise on the weights after the first cycle, in standard deviations"),
    "perturb_last": Option(_share, 0.05, "the same after the last"),
    "snapshot_dtype": Option(one_of("bfloat16", "float16", "float32"), "bfloat16", "of the stored weights"),
    "prior": Option(one_of("em", "adamw", "uniform"), "em", "how the weights of the snapshots are found"),
    "members": Option(count, None, "snapshots to keep, those of the largest weights; without it all"),
    "batch_size": Option(count, 8, "rows a micro-batch and process"),
    "accumulation": Option(count, 1, "micro-batches an optimizer step"),
    "seed": Option(natural, 42, "of the first trajectory: initialisation, documents' order, noise"),
    **output_options(),
    "set": Option(mapping, {}, "mapping of any other HyperEpochConfig field"),
}
REQUIRED = ("data", "output")


def merge(flags: Mapping[str, Any], config: str | None) -> dict[str, Any]:
    """Every option's value, checked against the others.  ValueError."""
    out = options.merge(OPTIONS, REQUIRED, flags, config)
    if (out["model"] is None) == (not out["architecture"]):
        raise ValueError("--model or --architecture is required, and not both")
    if out["architecture"] and "model_type" not in out["architecture"]:
        raise ValueError(f"--architecture needs model_type; got {', '.join(out['architecture'])}")
    if out["architecture"] and out["tokenizer"] is None:
        raise ValueError("--architecture needs --tokenizer")
    if out["model"] is not None and out["tokenizer"] is not None:
        raise ValueError("--tokenizer goes with --architecture: a model has its own")
    snapshots = out["trajectories"] * out["cycles"]
    if out["members"] is not None and out["members"] > snapshots:
        raise ValueError(f"--members must be at most the {snapshots} snapshots; got {out['members']}")
    return out
