"""``burnish sft``: from options to a trained model.

Everything that can be wrong with the input is found before the output directory exists; what is cheap to check
comes before what loads a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .chunked import check_arguments
from .data import FileData, TaskData, load_data, load_task
from .models import check_model_name, load_model
from .processes import speaks, world_size
from .rules import check_objective, resolve_objective
from .sft_options import OWN_FIELDS, did_you_mean

RECORD = "burnish_sft.json"
#: What a resumed run may change: the rest would make it another run.
_MAY_CHANGE = ("resume", "overwrite", "output", "max_steps", "epochs", "save_steps", "logging_steps", "eval_size")
#: Problems to evaluate on are drawn with a seed that no training set of ordinary seeds has.
_EVALUATION_SEED = 1_000_003


def prepare(options: dict[str, Any]):
    """(trainer, data, checkpoint to resume from, broken ones) for merged options.

    ValueError, in one line, for anything wrong with the input; then nothing has been written.
    """
    objective = resolve_objective(options["objective"], options["objective_args"])
    teacher = None if options["teacher"] == "none" else options["teacher"]
    check_objective(objective, teacher)
    chunkft = None
    if options["optimizer"] == "chunkft":
        chunkft = {"num_chunks": options["chunks"], **options["optimizer_args"]}
        check_arguments(chunkft, "--optimizer-args")
    data = load_data(options["data"], options["data_args"])
    if options["eval_size"] and not isinstance(data, TaskData):
        raise ValueError("--eval-size needs reasoning-gym data, which can verify an answer")
    check_model_name(options["model"])
    if teacher not in (None, "self"):
        check_model_name(teacher)
    output = Path(options["output"])
    options["processes"] = world_size()  # as much a part of the global batch as batch_size
    checkpoint, broken = _check_output(output, options)
    existed = output.exists()
    quiet_bars()
    arguments = _arguments(options)
    model, tokenizer = load_model(options["model"])
    chat = bool(tokenizer.chat_template)
    if isinstance(data, FileData) and not chat and _is_conversation(data.records[0]):
        raise ValueError(f"data file {data.path}: rows are messages, but the model's tokenizer has no chat template")
    from datasets import Dataset

    from .progress import show_loss
    from .target_sft import TargetSFTTrainer

    try:
        trainer = TargetSFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(data.rows(chat)), processing_class=tokenizer,
            objective=objective, teacher_model=teacher, chunkft=chunkft,
        )  # fmt: skip
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # not empty, or not there, or another process was first
                output.rmdir()
        raise
    if checkpoint and checkpoints.sharded(checkpoint) != trainer.is_fsdp_enabled:
        raise ValueError(
            f"--resume: {checkpoint} was saved {'under' if checkpoints.sharded(checkpoint) else 'without'} FSDP, "
            f"and this run is {'under' if trainer.is_fsdp_enabled else 'without'} it"
        )
    show_loss(trainer)
    return trainer, data, checkpoint, broken


def train(trainer, data, checkpoint: Path | None, broken: list, options: dict[str, Any]) -> None:
    """Train, save and, where asked, evaluate; a summary goes to stdout."""
    output = Path(options["output"])
    first = trainer.is_world_process_zero()
    if first:
        if isinstance(data, FileData) and data.ignored:
            note(f"columns that training does not read: {', '.join(data.ignored)}")
        for folder, problem in broken:
            note(f"{folder.name} is not whole ({problem}): set aside as {checkpoints.set_aside(folder).name}")
        if options["resume"]:
            note(f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint to resume from: starting anew")
        if options["overwrite"]:
            for folder in [*output.glob("checkpoint-*"), *output.glob("incomplete-checkpoint-*")]:
                shutil.rmtree(folder)
        _write(output / RECORD, options)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_fsdp_enabled:  # by default FSDP saves shards alone, which no from_pretrained reads
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output))
    trainer.save_state()
    summary = f"{output}: {trainer.state.global_step} steps, mean training loss {result.training_loss:.6g}"
    # a sharded model answers only where every process asks
    if options["eval_size"] and (first or trainer.is_fsdp_enabled):
        summary += f", {_evaluate(trainer, data, options, output)}"
    if first:
        print(summary)


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


def _check_output(output: Path, options) -> tuple[Path | None, list]:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output}: is not a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return None, []
    if not options["resume"]:
        if options["overwrite"]:
            return None, []
        raise ValueError(f"output {output}: is not empty; give --resume to go on or --overwrite to start again")
    try:
        before = json.loads((output / RECORD).read_text())
    except (OSError, ValueError):
        before = {}
    for name, value in before.items():
        if name in options and name not in _MAY_CHANGE and options[name] != value:
            raise ValueError(f"--resume: {name} is {options[name]!r}, but the run in {output} began with {value!r}")
    return checkpoints.newest(output, options["processes"])


def _arguments(options: dict[str, Any]):
    from trl import SFTConfig

    known = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
    for name in options["set"]:
        if name in OWN_FIELDS:
            raise ValueError(f"--set {name}: use {OWN_FIELDS[name]}")
        if name not in known:
            raise ValueError(f"--set {name}: SFTConfig has no such field{did_you_mean(name, known)}")
    gpu = torch.cuda.is_available()
    fields = {
        "output_dir": options["output"], "learning_rate": options["learning_rate"],
        "per_device_train_batch_size": options["batch_size"], "gradient_accumulation_steps": options["accumulation"],
        "max_length": options["max_length"], "seed": options["seed"], "save_steps": options["save_steps"],
        "logging_steps": options["logging_steps"], "report_to": "none",
        # without it several processes on CPUs would each train a model of their own
        "use_cpu": not torch.accelerator.is_available(),
        # TRL's own defaults are True for both: on a CPU they cost more than they save
        "dataloader_pin_memory": gpu, "bf16": gpu and torch.cuda.is_bf16_supported(), "gradient_checkpointing": gpu,
    }  # fmt: skip
    if options["max_steps"] is not None:
        fields["max_steps"] = options["max_steps"]
    else:
        fields["num_train_epochs"] = 1.0 if options["epochs"] is None else options["epochs"]
    try:
        return SFTConfig(**{**fields, **options["set"]})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(f"--set: SFTConfig refuses these values: {error}") from error


def _is_conversation(record: dict) -> bool:
    return any(isinstance(record.get(c), list) for c in ("messages", "prompt"))


def _evaluate(trainer, data: TaskData, options, output: Path) -> str:
    from .evaluate import accuracy

    arguments = {**options["data_args"], "size": options["eval_size"], "seed": _EVALUATION_SEED}
    fresh = load_task(data.name, **arguments)
    model = trainer.accelerator.unwrap_model(trainer.model)
    first = trainer.is_world_process_zero()
    result = accuracy(model, trainer.processing_class, fresh.task, entries=fresh.entries, progress=first)
    content = {
        "task": data.name, "arguments": arguments, "mean": result.mean, "solved": result.solved,
        "scores": result.scores, "answers": result.answers,
    }  # fmt: skip
    if first:
        _write(output / "evaluation.json", content)
    return f"{result.solved:.1%} of {options['eval_size']} new problems solved (mean score {result.mean:.3f})"


def _write(path: Path, content: dict) -> None:
    # whole or not at all
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
