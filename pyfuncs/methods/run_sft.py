"""``burnish sft``: from options to a trained model.

Everything that can be wrong with the input is found before the output directory exists; what is cheap to check
comes before what loads a model.
"""

from __future__ import annotations

from typing import Any

from . import checkpoints
from .chunked import check_arguments
from .data import EVALUATION_SEED, FileData, TaskData, load_data, load_task
from .models import check_model_name, load_model
from .processes import world_size
from .rules import check_objective, resolve_objective
from .run_directory import RunDirectory, note, quiet_bars, train_and_save, trainer_arguments, write_json
from .sft_options import OWN_FIELDS

RECORD = "burnish_sft.json"


def prepare(options: dict[str, Any]):
    """(trainer, data, output directory) for merged options.

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
    options["processes"] = world_size()  # as much a part of the global batch as batch_size
    directory = RunDirectory(options, RECORD)
    quiet_bars()
    from trl import SFTConfig

    arguments = trainer_arguments(SFTConfig, options, OWN_FIELDS, max_length=options["max_length"])
    model, tokenizer = load_model(options["model"])
    chat = bool(tokenizer.chat_template)
    if isinstance(data, FileData) and not chat and _is_conversation(data.records[0]):
        raise ValueError(f"data file {data.path}: rows are messages, but the model's tokenizer has no chat template")
    from datasets import Dataset

    from .progress import show_loss
    from .target_sft import TargetSFTTrainer

    with directory.preparing():
        trainer = TargetSFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(data.rows(chat)), processing_class=tokenizer,
            objective=objective, teacher_model=teacher, chunkft=chunkft,
        )  # fmt: skip
    checkpoint = directory.checkpoint
    if checkpoint and checkpoints.sharded(checkpoint) != trainer.is_fsdp_enabled:
        raise ValueError(
            f"--resume: {checkpoint} was saved {'under' if checkpoints.sharded(checkpoint) else 'without'} FSDP, "
            f"and this run is {'under' if trainer.is_fsdp_enabled else 'without'} it"
        )
    show_loss(trainer)
    return trainer, data, directory


def train(trainer, data, directory: RunDirectory) -> None:
    """Train, save and, where asked, evaluate; a summary goes to stdout."""
    output, options = directory.path, directory.options
    first = trainer.is_world_process_zero()
    if first:
        if isinstance(data, FileData) and data.ignored:
            note(f"columns that training does not read: {', '.join(data.ignored)}")
        directory.begin()
    result = train_and_save(trainer, output, directory.checkpoint)
    summary = f"{output}: {trainer.state.global_step} steps, mean training loss {result.training_loss:.6g}"
    # a sharded model answers only where every process asks
    if options["eval_size"] and (first or trainer.is_fsdp_enabled):
        summary += f", {_evaluate(trainer, data, options, output)}"
    if first:
        print(summary)


def _is_conversation(record: dict) -> bool:
    return any(isinstance(record.get(c), list) for c in ("messages", "prompt"))


def _evaluate(trainer, data: TaskData, options, output) -> str:
    from .evaluate import accuracy

    arguments = {**options["data_args"], "size": options["eval_size"], "seed": EVALUATION_SEED}
    fresh = load_task(data.name, **arguments)
    model = trainer.accelerator.unwrap_model(trainer.model)
    first = trainer.is_world_process_zero()
    result = accuracy(model, trainer.processing_class, fresh.task, entries=fresh.entries, progress=first)
    content = {
        "task": data.name, "arguments": arguments, "mean": result.mean, "solved": result.solved,
        "scores": result.scores, "answers": result.answers,
    }  # fmt: skip
    if first:
        write_json(output / "evaluation.json", content)
    return f"{result.solved:.1%} of {options['eval_size']} new problems solved (mean score {result.mean:.3f})"
