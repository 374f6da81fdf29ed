"""``TargetSFTTrainer``: TRL's SFTTrainer with any token objective in the place of its loss."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn
from trl import SFTTrainer

from ..objectives.base import Objective
from .chunked import check_arguments, find, trainer_optimizer
from .frozen import freeze
from .fused_head import fuse_lm_head
from .last_step import NoStepBeyondTheLast
from .models import PACKAGED, load_model, load_tokenizer
from .output_head import base_model, vocabulary_size
from .processes import allow_sharding_on_cpu, fill_from_first
from .rules import check_labels, check_objective, check_tokenizers, resolve_objective


class TargetSFTTrainer(NoStepBeyondTheLast, SFTTrainer):
    """SFT by an objective of ``burnish.objectives``, logits never whole.

    Only the loss differs from ``trl.SFTTrainer``: data formats, packing, completion masks, PEFT, gradient
    accumulation, evaluation, checkpoints and resume are TRL's, and so are all its arguments.  A batch's loss is
    the sum of the objective over the labels that count, divided by their number in the whole accumulated
    batch over all processes; so 4 micro-batches of 1 give the gradient of 1 batch of 4 for every objective whose
    weights do not couple sequences (rho1 and talr rank and take medians within a micro-batch).

    Args:
        model, args, ...: as ``trl.SFTTrainer``, by keyword after ``args``, an ``SFTConfig`` with loss_type
            "nll"; ``model`` may also be "smollm2".
        objective: an ``Objective`` or a name of ``burnish.objectives.names()``.
        objective_args: the named objective's arguments; ``target_sft`` needs ``eta``.
        teacher_model: the objective's teacher, reference, base model or old policy: a transformers model,
            a path or hub name (its tokenizer must have the student's ids), "self" (a frozen copy of the
            starting model), or "base" (a PEFT student with its adapters off).  It is moved to the model's device,
            keeps its dtype, and is neither trained nor saved.
        budget, backend: as in ``burnish.linear_loss``.
        chunkft: arguments of ``burnish.ChunkAdamW``, which then is the optimizer: all parameters are trained, a chunk
            at a time.  Rate, decay, clipping and the rest come from ``args``.

    Raises ValueError for an unknown objective or argument, a missing teacher, mismatched tokenizers, a
    label outside the vocabulary, data with no label left, and TRL options that would replace the loss.
    """

    _tag_names = ["trl", "sft", "burnish"]  # noqa: RUF012  (TRL's own form)
    #: What a subclass's collator gives the forward beside the labels.
    _carries: tuple[str, ...] = ()

    def __init__(
        self, model, args=None, *, objective: str | Objective = "target_sft", objective_args: dict | None = None,
        teacher_model: nn.Module | str | None = None, budget: int | None = None, backend: str = "auto",
        chunkft: dict[str, Any] | None = None, **options,
    ):  # fmt: skip
        self.objective: Objective = resolve_objective(objective, objective_args)
        check_objective(self.objective, teacher_model, self._carries)
        _check_options(args, options)
        self._chunkft = chunkft
        if chunkft is not None:
            check_arguments(chunkft)
        if teacher_model is not None and "teacher" not in self.objective.needs:
            warnings.warn(f"objective {self.objective!r} reads no teacher: teacher_model is not used", stacklevel=2)
            teacher_model = None
        if model == PACKAGED:
            model, tokenizer = load_model(model)
            options.setdefault("processing_class", tokenizer)
        self._vocabulary = None if isinstance(model, str) else vocabulary_size(model)
        teacher = self._load_teacher(teacher_model, model, options.get("processing_class"))
        super().__init__(model, args, **options)
        if teacher_model == "self":
            teacher = self._starting_model(options.get("peft_config"))
        if isinstance(teacher, nn.Module):
            teacher = fill_from_first(freeze(teacher).to(self.accelerator.device))
        # in a tuple, lest anything take it for a part of the model
        self._teacher = (teacher,)
        student: Any = self.model
        self.fused_head = fuse_lm_head(student, self.objective, teacher_model=teacher, budget=budget, backend=backend)

    def _load_teacher(self, teacher, model, tokenizer) -> nn.Module | str | None:
        """A separate teacher, loaded and checked against the student; "base" and None as they are."""
        if teacher is None or teacher in ("self", "base"):
            return teacher
        if isinstance(teacher, str):
            teacher, theirs = load_model(teacher, dtype="auto")
            name = model if isinstance(model, str) else model.config._name_or_path
            check_tokenizers(load_tokenizer(name) if tokenizer is None else tokenizer, theirs)
        size = vocabulary_size(teacher)
        if self._vocabulary is not None and size < self._vocabulary:
            raise ValueError(
                f"mismatched tokenizers: the teacher's vocabulary has {size} entries, the student's {self._vocabulary}"
            )
        return teacher

    def _starting_model(self, peft_config) -> nn.Module | str:
        # a new LoRA begins as the identity, so its base model is the starting model; PiSSA and its
        # like rewrite the base, and other adapters need not begin as the identity
        if type(peft_config).__name__ == "LoraConfig" and peft_config.init_lora_weights in (True, "gaussian"):
            return "base"
        teacher: Any = copy.deepcopy(self.model)
        base_model(teacher).__dict__.pop("forward", None)  # TRL's patch
        return teacher

    def create_accelerator_and_postprocess(self) -> None:
        allow_sharding_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    def create_optimizer(self, model=None):
        if self._chunkft is not None and self.optimizer is None:
            self.optimizer = trainer_optimizer(self, self.model if model is None else model, self._chunkft)
        return super().create_optimizer(model)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        chunked = find(self.optimizer)
        if chunked is not None:
            chunked.observe(loss)
        return loss

    def _prepare_dataset(self, dataset, *args, **kwargs):
        dataset = super()._prepare_dataset(dataset, *args, **kwargs)
        if self._vocabulary is not None and hasattr(dataset, "__len__"):
            check_labels(dataset, self._vocabulary)
        return dataset


def _check_options(args, options: dict) -> None:
    if getattr(args, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise ValueError(f"loss_type={args.loss_type!r} would replace the objective: leave it at 'nll'")
    if getattr(args, "label_smoothing_factor", None):
        raise ValueError("label_smoothing_factor would replace the objective: use objective='label_smoothing'")
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would replace the objective: write it as a burnish.objective")
