"""The output directory of a run that trains: what it began with, where it goes on, and what is written how."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .options import did_you_mean
from .processes import speaks

#: Fields that ``trainer_arguments`` makes of options, and so not of --set, with the flags that have them.
_OWN_FIELDS = {
    "output_dir": "--output", "learning_rate": "--learning-rate", "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulation", "max_steps": "--max-steps", "num_train_epochs": "--epochs",
    "seed": "--seed", "save_steps": "--save-steps", "logging_steps": "--logging-steps",
    "resume_from_checkpoint": "--resume",
}  # fmt: skip
#: What a resumed run may change: the rest would make it another run.
MAY_CHANGE = ("resume", "overwrite", "output", "max_steps", "epochs", "save_steps", "logging_steps", "eval_size")


class RunDirectory:
    """``--output`` of a command with the options of ``options.output_options``.

    Made, it has read what there is and written nothing; ``begin`` writes.

    Args:
        options: the merged options, with "processes" where the run has several.
        record: name of the file that keeps the options the run began with.
        may_change: options that a resumed run may have otherwise.

    ``checkpoint`` is the newest whole one or None, ``broken`` lists newer ones that are not whole.  ValueError for an
    output that is no directory, is not empty without --resume or --overwrite, or is of a run with other options.
    """

    def __init__(self, options: Mapping[str, Any], record: str, may_change: Collection[str] = MAY_CHANGE):
        self.path, self.options, self.record = Path(options["output"]), options, record
        self.checkpoint: Path | None = None
        self.broken: list[tuple[Path, str]] = []
        self.existed = self.path.exists()
        if self.existed and not self.path.is_dir():
            raise ValueError(f"output {self.path}: is not a directory")
        if not self.existed or not any(self.path.iterdir()):
            return
        if not options["resume"]:
            if options["overwrite"]:
                return
            raise ValueError(f"output {self.path}: is not empty; give --resume to go on or --overwrite to start again")
        try:
            before = json.loads((self.path / record).read_text())
        except (OSError, ValueError):
            before = {}
        for name, value in before.items():
            if name in options and name not in may_change and options[name] != value:
                raise ValueError(
                    f"--resume: {name} is {options[name]!r}, but the run in {self.path} began with {value!r}"
                )
        self.checkpoint, self.broken = checkpoints.newest(self.path, options.get("processes", 1))

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Where what is made within fails, an output directory that was not there goes again."""
        try:
            yield
        except BaseException:
            if not self.existed:
                with contextlib.suppress(OSError):  # not empty, or not there, or another process was first
                    self.path.rmdir()
            raise

    def begin(self) -> None:
        """Set broken checkpoints aside or remove old ones, say where the run goes on, and keep its options."""
        set_aside(self.broken)
        if self.options["resume"]:
            where = self.checkpoint
            note(f"resuming from {where.name}" if where else "no checkpoint to resume from: starting anew")
        if self.options["overwrite"]:
            for folder in [*self.path.glob("checkpoint-*"), *self.path.glob("incomplete-checkpoint-*")]:
                shutil.rmtree(folder)
        write_json(self.path / self.record, dict(self.options))


def set_aside(broken: Iterable[tuple[Path, str]]) -> None:
    """Rename the broken checkpoints that ``checkpoints.newest`` found, and say so."""
    for folder, problem in broken:
        note(f"{folder.name} is not whole ({problem}): set aside as {checkpoints.set_aside(folder).name}")


def train_and_save(trainer, folder: Path, checkpoint: Path | None):
    """Train, from ``checkpoint`` on where there is one, and save model and state; what ``Trainer.train`` returns."""
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_fsdp_enabled:  # by default FSDP saves shards alone, which no from_pretrained reads
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.save_state()
    return result


def trainer_arguments(kind: type, options: Mapping[str, Any], own: Mapping[str, str], **fields):
    """``kind`` (SFTConfig, GRPOConfig, ...) of the options every training command has, ``fields`` and ``--set``.

    ``own``: further fields that --set may not name, with the flag that has them.  ValueError for an unknown field, or a
    value that ``kind`` refuses.
    """
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    own = {**_OWN_FIELDS, **own}
    for name in options["set"]:
        if name in own:
            raise ValueError(f"--set {name}: use {own[name]}")
        if name not in known:
            raise ValueError(f"--set {name}: {kind.__name__} has no such field{did_you_mean(name, known)}")
    gpu = torch.cuda.is_available()
    common = {
        "output_dir": options["output"], "learning_rate": options["learning_rate"],
        "per_device_train_batch_size": options["batch_size"], "gradient_accumulation_steps": options["accumulation"],
        "seed": options["seed"], "save_steps": options["save_steps"], "logging_steps": options["logging_steps"],
        "report_to": "none",
        # without it several processes on CPUs would each train a model of their own
        "use_cpu": not torch.accelerator.is_available(),
        # TRL's own defaults are True for both: on a CPU they cost more than they save
        "dataloader_pin_memory": gpu, "bf16": gpu and torch.cuda.is_bf16_supported(), "gradient_checkpointing": gpu,
    }  # fmt: skip
    if options["max_steps"] is not None:
        common["max_steps"] = options["max_steps"]
    else:
        common["num_train_epochs"] = 1.0 if options["epochs"] is None else options["epochs"]
    try:
        return kind(**{**common, **fields, **options["set"]})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(f"--set: {kind.__name__} refuses these values: {error}") from error


def note(text: str) -> None:
    """A line for the user that is no error."""
    print(f"burnish: {text}", file=sys.stderr)


def quiet_bars() -> None:
    """Loading and tokenising draw bars on a terminal only, and once a machine; the training bar is always drawn."""
    if sys.stderr.isatty() and speaks():
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No bar for each of many small models that are read and written."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
