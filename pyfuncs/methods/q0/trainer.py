"""``HyperEpochTrainer``: transformers' Trainer over cycles, with snapshots, chain distillation and perturbation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_utils import IntervalStrategy

from ... import objectives
from ..frozen import separate_teacher
from ..fused_head import fuse_lm_head
from . import snapshots
from .config import HyperEpochConfig
from .documents import EpochRows, HeldOutRows, Plan, StepBatches, as_documents, split_front
from .optimizers import MuonAdamW
from .perturbation import perturb
from .schedule import CycleScheduler, batch_sizes, place


class HyperEpochTrainer(Trainer):
    """q0's training of one trajectory (arXiv 2606.03938): cycles over fixed documents, a snapshot at the end of each.

    Within a cycle the learning rate falls and the weight decay rises (``CycleScheduler``, on whichever optimizer); the
    optimizer's state goes on from cycle to cycle.  At a cycle's end, in this order: the model is stored
    (``OUTPUT/cycle-NNN``, a directory like any model's, in ``snapshot_dtype``); the *stored* weights are read back and
    give the fitness tokens' log-probabilities, kept beside them; they become the next cycle's teacher, once
    ``distill_after_cycles`` have passed; the model's own weights are perturbed, save at the end of the run.

    The loss is made in the model's forward, fused with the head (``fuse_lm_head``): cross-entropy, or with a teacher
    ``objectives.chain_distillation``; the teacher is its hidden states and its head, logits are never whole.  A step's
    loss is the mean over its labels, over micro-batches and ranks.

    Accelerate, DDP, callbacks, logging, evaluation and checkpoints are the Trainer's.  What it takes for one epoch is
    the whole run; ``state.epoch`` counts passes over the documents, and "epoch" for saving and evaluation means these.
    A resumed run, from any of its checkpoints, has the bits of one that nobody stopped; snapshots that it had written
    beyond the checkpoint are written again.

    Args:
        model: a transformers causal LM, all of it trained.
        args: a ``HyperEpochConfig``.
        train_dataset: documents: rows with ``input_ids``, of any length, each with whatever token ends it.
        fitness_dataset: more documents, not trained on; by default ``args.fitness_share`` of the tokens, whole
            documents from the front, are taken out of the training documents.
        eval_dataset: documents that nothing is chosen by; each snapshot keeps their log-probabilities too.
        optimizers, callbacks, processing_class, ...: as ``transformers.Trainer``; the tokenizer is stored with each
            snapshot.

    ValueError naming what is wrong: PEFT models, FSDP and DeepSpeed, several GPUs in one process, a data collator or
    loss of your own, fitness documents without a token, a cycle without a whole step.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    eval_dataset: Any

    def __init__(
        self, model: Any, args: HyperEpochConfig, *, train_dataset, fitness_dataset=None, eval_dataset=None,
        **options,
    ):  # fmt: skip
        if not isinstance(args, HyperEpochConfig):
            raise TypeError(f"args must be a HyperEpochConfig; got {type(args).__name__}")
        _check(model, args, options)
        self.distillation = objectives.chain_distillation(args.distill_share, args.distill_temperature)
        documents = as_documents(train_dataset, "train_dataset")
        if fitness_dataset is None:
            fitness, documents = split_front(documents, args.fitness_share, "fitness_share")
        else:
            fitness = as_documents(fitness_dataset, "fitness_dataset")
        self.fitness = HeldOutRows(fitness, args.seq_length, "fitness documents")
        epochs = args.cycles * args.epochs_per_cycle
        self.rows = EpochRows(documents, args.seq_length, args.seed, epochs)
        sizes = batch_sizes(args.cycles, args.per_device_train_batch_size, args.batch_floor)
        self.plan = Plan(
            self.rows.rows, args.cycles, args.epochs_per_cycle, sizes, args.gradient_accumulation_steps, args.world_size
        )
        args = copy.copy(args)  # the caller's may serve another run
        args.max_steps, args.prediction_loss_only = self.plan.ends[-1], True
        if eval_dataset is not None:
            documents = as_documents(eval_dataset, "eval_dataset")
            eval_dataset = HeldOutRows(documents, args.seq_length, "eval_dataset")
        if args.softcap is not None:
            config: Any = model.config
            config.get_text_config().final_logit_softcapping = args.softcap
        super().__init__(
            model, args, train_dataset=self.rows, eval_dataset=eval_dataset, data_collator=default_data_collator,
            **options,
        )  # fmt: skip
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("HyperEpochTrainer stores and perturbs whole weights: use one process or DDP")
        self.fused_head = fuse_lm_head(self.model, objectives.nll(), metrics=())
        self.add_callback(_AtCycleEnds(self))

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir)

    def snapshot_folders(self) -> list[Path]:
        """The snapshots of the cycles that are done, in order."""
        done = sum(end <= self.state.global_step for end in self.plan.ends)
        return [snapshots.folder_of(self.output, c) for c in range(done)]

    # ---- what the Trainer asks for ----

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.rows, batch_sampler=StepBatches(self.plan, self.args.process_index), collate_fn=self.data_collator,
            num_workers=workers, pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )  # fmt: skip

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.optimizer == "muon":
            of = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(of))
            self.optimizer = MuonAdamW(
                of, lr=self.args.learning_rate, weight_decay=self.args.weight_decay,
                no_decay=[name for name, _ in of.named_parameters() if name not in decayed],
                betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon,
            )  # fmt: skip
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            args = self.args
            of: Any = self.optimizer if optimizer is None else optimizer
            schedule: Any = CycleScheduler(
                of, self.plan.lengths if args.lr_schedule == "cycles" else [self.plan.ends[-1]],
                lr_floor=args.lr_floor, wd_floor=args.wd_floor, warmup=args.cycle_warmup, warmdown=args.cycle_warmdown,
            )  # fmt: skip
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # evaluation is the likelihood, whatever is trained on
        head = self.fused_head
        kept = head.objective, head.teacher
        head.objective, head.teacher = objectives.nll(), None
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            head.objective, head.teacher = kept

    def log(self, logs: dict[str, float], *rest, **named) -> None:
        if "loss" in logs:
            cycle, _ = place(self.plan.ends, self.state.global_step - 1)
            logs = {**logs, "cycle": cycle + 1, "distilled": float(self.fused_head.teacher is not None)}
        super().log(logs, *rest, **named)

    # ---- the cycles' ends ----

    def end_cycle(self, cycle: int) -> None:
        """Store, measure, and unless this is the last: teach and perturb."""
        folder = snapshots.folder_of(self.output, cycle)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save:
            snapshots.write_weights(model, folder, getattr(torch, self.args.snapshot_dtype), self.processing_class)
        self.accelerator.wait_for_everyone()
        stored = snapshots.load_frozen(type(model), folder, self.accelerator.device)
        step = self.state.global_step
        record: dict[str, Any] = {"cycle": cycle, "step": step, "epochs": self.plan.epoch_at(step)}
        held_out: Any = (("fitness", self.fitness), ("eval", self.eval_dataset))
        for name, rows in held_out:
            if rows is not None:
                log_probs = self._log_probs(stored, rows)
                record |= {f"{name}_nll": -float(log_probs.double().mean()), f"{name}_tokens": len(log_probs)}
                if self.args.should_save:
                    snapshots.write_log_probs(folder, name, log_probs)
        if self.args.should_save:
            snapshots.finish(folder, record)
        self.accelerator.wait_for_everyone()
        due = self.control.should_log
        self.log({k: v for k, v in record.items() if k.endswith("_nll")})
        self.control.should_log = due  # logging has answered for the step's loss too
        if cycle + 1 < self.args.cycles:
            self._teach(stored, cycle + 1)
            perturb(model, self.args.perturbation(cycle), self.args.seed * 1_000_003 + cycle)

    def take_up(self) -> None:
        """At the beginning of training: the teacher of the cycle that the run is in.  ValueError for lost snapshots."""
        self.fused_head.objective, self.fused_head.teacher = objectives.nll(), None
        folders = self.snapshot_folders()
        for folder in folders:
            if not snapshots.whole(folder):
                raise ValueError(f"resume_from_checkpoint: the snapshot {folder} is missing or not whole")
        if folders and self._distils(len(folders)):
            kind = type(self.accelerator.unwrap_model(self.model))
            self._teach(snapshots.load_frozen(kind, folders[-1], self.accelerator.device), len(folders))

    def _distils(self, cycle: int) -> bool:
        return self.args.distill_share > 0 and self.args.distill_after_cycles <= cycle < self.args.cycles

    def _teach(self, teacher: nn.Module, cycle: int) -> None:
        if self._distils(cycle):
            self.fused_head.objective, self.fused_head.teacher = self.distillation, separate_teacher(teacher)

    def _log_probs(self, model: nn.Module, rows: HeldOutRows) -> torch.Tensor:
        accelerator = self.accelerator
        with accelerator.autocast():
            own = snapshots.token_log_probs(
                model, rows, batch_size=self.args.per_device_eval_batch_size, rank=accelerator.process_index,
                world=accelerator.num_processes,
            )  # fmt: skip
        return accelerator.reduce(own.to(accelerator.device), "sum").cpu()


class _AtCycleEnds(TrainerCallback):
    """Counts epochs of documents, and calls ``end_cycle`` before the Trainer saves the step's checkpoint."""

    def __init__(self, trainer: HyperEpochTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.take_up()

    def on_step_end(self, args, state, control, **kwargs):
        plan = self.trainer.plan
        before, state.epoch = plan.epoch_at(state.global_step - 1), plan.epoch_at(state.global_step)
        if int(state.epoch) > int(before):
            control.should_save |= args.save_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
        if state.global_step in plan.ends:
            self.trainer.end_cycle(plan.ends.index(state.global_step))
        return control


def _check(model: nn.Module, args: HyperEpochConfig, options: dict) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError("HyperEpochTrainer trains and perturbs all weights: give the model without PEFT")
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start one process a GPU, with torchrun")
    for name in ("data_collator", "compute_loss_func", "compute_metrics", "model_init"):
        if options.get(name) is not None:
            raise ValueError(f"HyperEpochTrainer does not support {name}")
