"""``TargetSFTTrainer``: TRL's SFTTrainer with any token objective in the place of its loss."""

from __future__ import annotations

import copy
import warnings

from torch import nn
from trl import SFTTrainer

from .. import objectives
from ..objectives.base import Objective
from .frozen import freeze
from .fused_head import check_teacher, fuse_lm_head
from .output_head import base_model, vocabulary_size

_TRAINER_OWNS = {
    "token_weight": "token_weight comes with the data, which TRL's collator does not carry",
    "ids": "ids come with the data, which TRL's collator does not carry",
}


class TargetSFTTrainer(SFTTrainer):
    """SFT by an objective of ``burnish.objectives``, logits never whole.

    Only the loss differs from ``trl.SFTTrainer``: data formats, packing, completion masks, PEFT, gradient
    accumulation, evaluation, checkpoints and resume are TRL's, and so are all its arguments.  A batch's loss is
    the sum of the objective over the labels that count, divided by their number in the whole accumulated
    batch over all processes; so 4 micro-batches of 1 give the gradient of 1 batch of 4 for every objective whose
    weights do not couple sequences (rho1 and talr rank and take medians within a micro-batch).

    Args:
        model, args, ...: as ``trl.SFTTrainer``; ``args`` an ``SFTConfig`` with loss_type "nll".
        objective: an ``Objective`` or a name of ``burnish.objectives.names()``.
        objective_args: the named objective's arguments; ``target_sft`` needs ``eta``.
        teacher_model: the objective's teacher, reference, base model or old policy: a transformers model,
            a path or hub name (its tokenizer must have the student's ids), "self" (a frozen copy of the
            starting model), or "base" (a PEFT student with its adapters off).  It is moved to the model's device,
            keeps its dtype, and is neither trained nor saved.
        budget, backend: as in ``burnish.linear_loss``.

    Raises ValueError for an unknown objective or argument, a missing teacher, mismatched tokenizers, a
    label outside the vocabulary, data with no label left, and TRL options that would replace the loss.
    """

    _tag_names = ["trl", "sft", "burnish"]  # noqa: RUF012  (TRL's own form)

    def __init__(
        self, model, args=None, *positional, objective: str | Objective = "target_sft",
        objective_args: dict | None = None, teacher_model: nn.Module | str | None = None, budget: int | None = None,
        backend: str = "auto", **options,
    ):  # fmt: skip
        self.objective = resolve_objective(objective, objective_args)
        for need in sorted(self.objective.needs & set(_TRAINER_OWNS)):
            raise ValueError(
                f"objective {self.objective.name!r} needs {_TRAINER_OWNS[need]}: use fuse_lm_head in a loop of your own"
            )
        check_teacher(self.objective, teacher_model)
        _check_options(args, options)
        if teacher_model is not None and "teacher" not in self.objective.needs:
            warnings.warn(f"objective {self.objective!r} reads no teacher: teacher_model is not used", stacklevel=2)
            teacher_model = None
        self._vocabulary = None if isinstance(model, str) else vocabulary_size(model)
        separate = teacher_model is not None and teacher_model not in ("self", "base")
        if isinstance(teacher_model, str) and separate:
            teacher_model, tokenizer = _load_teacher(teacher_model)
            student = options.get("processing_class")
            if student is None:
                from .models import load_tokenizer

                student = load_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
            check_tokenizers(student, tokenizer)
        if separate and self._vocabulary is not None and vocabulary_size(teacher_model) < self._vocabulary:
            raise ValueError(
                f"mismatched tokenizers: the teacher's vocabulary has {vocabulary_size(teacher_model)} entries, "
                f"the student's {self._vocabulary}"
            )
        super().__init__(model, args, *positional, **options)
        if teacher_model == "self":
            teacher_model = self._starting_model(options.get("peft_config") is not None)
        if isinstance(teacher_model, nn.Module):
            teacher_model = freeze(teacher_model).to(self.accelerator.device)
        # held in a tuple: Trainer must not mistake it for a part of the model
        self._teacher = (teacher_model,)
        self.fused_head = fuse_lm_head(
            self.model, self.objective, teacher_model=teacher_model, budget=budget, backend=backend
        )

    def _starting_model(self, fresh_adapter: bool) -> nn.Module | str:
        if fresh_adapter:  # a new adapter begins as the identity, so its base model is the starting model
            return "base"
        teacher = copy.deepcopy(self.model)
        base_model(teacher).__dict__.pop("forward", None)  # TRL's patch
        return teacher

    def _prepare_dataset(self, dataset, *args, **kwargs):
        dataset = super()._prepare_dataset(dataset, *args, **kwargs)
        if self._vocabulary is not None and hasattr(dataset, "__len__"):
            check_labels(dataset, self._vocabulary)
        return dataset


def resolve_objective(objective: str | Objective, arguments: dict | None = None) -> Objective:
    """An ``Objective`` of a name and its arguments, or the given one.  ValueError as ``objectives.get``."""
    if isinstance(objective, Objective):
        if arguments:
            raise ValueError("objective_args go with the name of an objective, not with an Objective")
        return objective
    return objectives.get(objective, **(arguments or {}))


def check_tokenizers(student, teacher) -> None:
    """ValueError unless each of the student's tokens has the same id in the teacher's tokenizer."""
    theirs = teacher.get_vocab()
    for token, index in sorted(student.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            other = f"has id {theirs[token]}" if token in theirs else "is missing"
            raise ValueError(
                f"mismatched tokenizers: token {token!r} has id {index} for the student and {other} for the teacher"
            )


def check_labels(dataset, vocabulary: int) -> None:
    """ValueError for a token or label outside ``vocabulary``, or where no label is left to train on."""
    columns = [c for c in ("input_ids", "labels") if c in dataset.column_names]
    counted = 0
    for i, row in enumerate(dataset.select_columns(columns)):
        for column in columns:
            for value in row[column]:
                if value >= vocabulary or (value < 0 and not (column == "labels" and value == -100)):
                    raise ValueError(
                        f"row {i + 1}: {'label' if column == 'labels' else 'token'} {value} is outside the vocabulary "
                        f"of {vocabulary} entries"
                    )
        # the first position has nothing before it to be predicted from
        counted += sum(value != -100 for value in row.get("labels", row.get("input_ids", []))[1:])
    if not counted:
        raise ValueError("no label is left to train on: every row is empty, masked or cut off by max_length")


def _load_teacher(name: str):
    from .models import load_model

    return load_model(name, dtype="auto")


def _check_options(args, options: dict) -> None:
    if args is not None and getattr(args, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise ValueError(f"loss_type={args.loss_type!r} would replace the objective: leave it at 'nll'")
    if args is not None and getattr(args, "label_smoothing_factor", 0):
        raise ValueError("label_smoothing_factor would replace the objective: use objective='label_smoothing'")
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would replace the objective: write it as a burnish.objective")
