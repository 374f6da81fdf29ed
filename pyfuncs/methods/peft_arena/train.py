"""One training of an arena: TRL's loop with the head fused, from its newest whole checkpoint on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..chunked import find
from ..run_directory import RunDirectory, trainer_arguments
from ..sft_options import OWN_FIELDS
from ..target_sft import TargetSFTTrainer
from .config import Config
from .plan import Run
from .techniques import apply

RECORD = "burnish_peft_arena_run.json"
#: What of the file a run's bits depend on, beside the run's own settings.
DECIDES = ("data", "data_args", "batch_size", "accumulation", "max_length", "training")


@dataclass(frozen=True)
class Trained:
    """A finished training: the model as trained (adapters beside the base weights), and how it went."""

    model: Any
    seconds: float
    loss: list[float]


def train(config: Config, run: Run, model, tokenizer, rows: list[dict], folder: Path) -> Trained:
    """Train a model of its own, from ``folder``'s newest whole checkpoint on where there is one.

    The last step is saved too: a process that is killed while its run is being scored trains nothing again.
    ValueError where the folder is of a run with other settings.
    """
    from datasets import Dataset

    settings = {**run.settings(), **{k: config[k] for k in DECIDES}}
    del settings["control"]  # a name: a control that becomes a rate of the grid goes on from its checkpoint
    begun = folder.is_dir() and any(folder.iterdir())
    directory = RunDirectory({"output": str(folder), "resume": begun, "overwrite": False, **settings}, RECORD)
    options = {
        "output": str(folder), "learning_rate": run.rate, "batch_size": config["batch_size"],
        "accumulation": config["accumulation"], "seed": run.seed, "save_steps": config["save_steps"],
        "logging_steps": config["logging_steps"], "max_steps": run.steps, "epochs": None, "set": config["training"],
    }  # fmt: skip
    from trl import SFTConfig

    arguments = trainer_arguments(
        SFTConfig, options, OWN_FIELDS, max_length=config["max_length"], save_total_limit=1, disable_tqdm=True,
        log_level="error",
    )  # fmt: skip
    set_seed(run.seed)
    student = apply(model, run.technique, run.steps, **run.arguments)
    chunkft = None
    if run.technique == "chunkft":
        chunks = run.arguments["chunks"]
        # two cycles over the chunks unless the file says otherwise
        turn = run.arguments["steps_per_chunk"] or max(1, run.steps // (2 * chunks))
        chunkft = {"num_chunks": chunks, "steps_per_chunk": turn}
    trainer = TargetSFTTrainer(
        student, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, objective="nll",
        chunkft=chunkft, callbacks=[AllocateRanks(folder)] if run.technique == "adalora" else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    directory.begin()
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(directory.checkpoint) if directory.checkpoint else None)
    trainer.fused_head.restore()
    chunked = find(trainer.optimizer)
    if chunked is not None:
        chunked.detach()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return Trained(trainer.accelerator.unwrap_model(trainer.model), time.perf_counter() - started, losses)


class AllocateRanks(TrainerCallback):
    """AdaLoRA's turn in each step, which no Trainer gives it, and its importance scores in every checkpoint.

    Between steps the ranks are kept from the config: with them HF PEFT would save factors cut to those ranks, which do
    not load into the model that goes on.
    """

    FILE = "adalora.pt"
    _STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, folder: Path):
        self.folder = folder
        self.ranks: dict | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        saved = self.folder / f"checkpoint-{state.global_step}" / self.FILE
        if saved.is_file():
            found = torch.load(saved, weights_only=True)
            for name in self._STATE:
                setattr(model.base_model.rankallocator, name, found[name])
            self.ranks = found["ranks"]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        config = model.peft_config["default"]
        config.rank_pattern = self.ranks
        model.base_model.update_and_allocate(state.global_step + 1)
        self.ranks, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        allocator: Any = model.base_model.rankallocator
        content = {name: getattr(allocator, name) for name in self._STATE}
        content["ranks"] = self.ranks
        torch.save(content, self.folder / f"checkpoint-{state.global_step}" / self.FILE)
