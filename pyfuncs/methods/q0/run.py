"""``burnish q0``: trajectories, each of snapshots; then the weights of all snapshots.

    OUTPUT/burnish_q0.json                       the options the run began with
    OUTPUT/trajectory-0/cycle-000, cycle-001 ... snapshots, each a model's directory
    OUTPUT/trajectory-0/checkpoint-N
    OUTPUT/trajectory-0/trajectory.json          written last: the trajectory is done
    OUTPUT/trajectory-1/...
    OUTPUT/fitness.safetensors                   logp (M, N) of the fitness tokens, a row a snapshot
    OUTPUT/weights.json                          the members and their weights
    OUTPUT/report.json                           what snapshots and mixtures reach

A trajectory is a function of the options and its number, so a run that is killed and resumed, or spread over processes,
has the bits of one that is not.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints
from ..models import check_model_name, load_model, load_tokenizer
from ..processes import alone, meeting, process_index, world_size
from ..progress import show_loss
from ..run_directory import RunDirectory, note, quiet_bars, set_aside, train_and_save, trainer_arguments, write_json
from . import snapshots
from .config import HyperEpochConfig, check
from .documents import as_documents, split_front
from .options import FIELDS, OWN_FIELDS
from .report import population
from .text import is_own, make_tokenizer, read_texts, tokenized
from .trainer import HyperEpochTrainer

RECORD = "burnish_q0.json"
DONE = "trajectory.json"
_MAY_CHANGE = ("resume", "overwrite", "output", "save_steps", "logging_steps", "prior", "members", "spread")
#: Between the seeds of trajectories.
_STRIDE = 10_007


@dataclass
class Run:
    """A checked run; documents are token ids."""

    options: dict[str, Any]
    directory: RunDirectory
    tokenizer: Any
    documents: dict[str, Any]


def prepare(options: dict[str, Any]) -> Run:
    """A run of merged options.  ValueError, in one line, for anything wrong with the input; nothing is written."""
    check(options)
    # the ranks that share a trajectory are as much a part of its batch as batch_size
    options["processes"] = world_size() if options["spread"] == "data" else 1
    if options["model"] is not None:
        check_model_name(options["model"])
    texts = read_texts(options["data"], options["pattern"])
    held_out = read_texts(options["eval_data"], options["pattern"], "eval_data") if options["eval_data"] else None
    fitness, rest = split_front(texts, options["fitness_share"], "fitness_share")
    directory = RunDirectory(options, RECORD, _MAY_CHANGE)
    quiet_bars()
    tokenizer = _tokenizer(options, rest)
    documents = {"train": tokenized(rest, tokenizer), "fitness": tokenized(fitness, tokenizer)}
    if held_out is not None:
        documents["eval"] = as_documents(tokenized(held_out, tokenizer, "eval_data"), "eval_data")
    if options["architecture"]:
        _configuration(options, tokenizer)
    run = Run(options, directory, tokenizer, documents)
    with _company(run):
        _arguments(options, directory.path, 0)
    return run


def train(run: Run) -> None:
    """All trajectories that are not done, then the prior; a summary goes to stdout."""
    options, directory = run.options, run.directory
    first = process_index() == 0
    with meeting() if world_size() > 1 else contextlib.nullcontext(lambda: None) as wait:
        wait()  # until all have looked at what is there
        directory.path.mkdir(parents=True, exist_ok=True)
        if first:
            if options["overwrite"]:
                for folder in directory.path.glob("trajectory-*"):
                    shutil.rmtree(folder)
            write_json(directory.path / RECORD, options)
        wait()
    every = range(options["trajectories"])
    own = every if options["spread"] == "data" else every[process_index() :: world_size()]
    with _company(run):
        for number in own:
            folder = directory.path / f"trajectory-{number}"
            if (folder / DONE).is_file():
                note(f"trajectory {number} is done")
            else:
                _trajectory(run, number, folder)
    if not first:
        return
    folders = [directory.path / f"trajectory-{number}" for number in every]
    while not all((folder / DONE).is_file() for folder in folders):
        time.sleep(0.2)  # the launcher ends this process where another fails
    members = [snapshots.folder_of(folder, c) for folder in folders for c in range(options["cycles"])]
    print(population(directory.path, members, options["prior"], options["members"]))


def _trajectory(run: Run, number: int, folder: Path) -> None:
    options = run.options
    arguments = _arguments(options, folder, number)
    torch.manual_seed(arguments.seed)
    if options["architecture"]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(_configuration(options, run.tokenizer), dtype=torch.float32)
    else:
        model, _ = load_model(options["model"])
    trainer = HyperEpochTrainer(
        model, arguments, train_dataset=run.documents["train"], fitness_dataset=run.documents["fitness"],
        eval_dataset=run.documents.get("eval"), processing_class=run.tokenizer,
    )  # fmt: skip
    show_loss(trainer)
    folder.mkdir(exist_ok=True)
    checkpoint, broken = checkpoints.newest(folder, options["processes"])
    trainer.accelerator.wait_for_everyone()  # until all have looked
    if trainer.is_world_process_zero():
        set_aside(broken)
        if checkpoint:
            note(f"trajectory {number}: resuming from {checkpoint.name}")
    result = train_and_save(trainer, folder, checkpoint)
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        write_json(folder / DONE, {"seed": arguments.seed, "steps": steps, "training_loss": result.training_loss})
        print(f"{folder}: {steps} steps, mean training loss {result.training_loss:.6g}")


def _company(run: Run):
    """Where processes have a trajectory each, none knows of the others."""
    return contextlib.nullcontext() if run.options["spread"] == "data" else alone()


def _arguments(options: dict[str, Any], folder: Path, number: int) -> HyperEpochConfig:
    options = {
        **options, "output": str(folder), "seed": options["seed"] + _STRIDE * number, "max_steps": None, "epochs": None,
        "set": {"save_total_limit": 2, **options["set"]},
    }  # fmt: skip
    fields = {name: options[name] for name in FIELDS}
    return trainer_arguments(
        HyperEpochConfig, options, OWN_FIELDS, num_train_epochs=3.0, gradient_checkpointing=False, **fields
    )


def _tokenizer(options: dict[str, Any], texts):
    name = options["tokenizer"]
    if name is None:
        return load_tokenizer(options["model"])
    if not is_own(name):
        return load_tokenizer(name)
    if name != "bytes" and not isinstance(texts[0], str):
        raise ValueError(f"--tokenizer {name} is made of text; the data has token ids")
    return make_tokenizer(name, texts)


def _configuration(options: dict[str, Any], tokenizer):
    """The fresh model's config; ValueError for a model_type or a field that transformers refuses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, **options["architecture"],
    }  # fmt: skip
    with _refusals():
        config = AutoConfig.for_model(**fields)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(
            f"--architecture: vocab_size is {config.get_text_config().vocab_size}, the tokenizer has {len(tokenizer)}"
        )
    with _refusals(), torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    return config


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Each architecture has its own way to refuse a config: one line of it."""
    try:
        yield
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"--architecture: {first}") from error
