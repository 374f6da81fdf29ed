"""What ``TargetSFTTrainer`` can and cannot be given; needs neither transformers nor TRL."""

from __future__ import annotations

from .. import objectives
from ..objectives.base import Objective

_NOT_CARRIED = ("token_weight", "ids")


def resolve_objective(objective: str | Objective, arguments: dict | None = None) -> Objective:
    """An ``Objective`` of a name and its arguments, or the given one.  ValueError as ``objectives.get``."""
    if isinstance(objective, Objective):
        if arguments:
            raise ValueError("objective_args go with the name of an objective, not with an Objective")
        return objective
    return objectives.get(objective, **(arguments or {}))


def check_carried(objective: Objective) -> None:
    """ValueError where a model's forward with labels cannot give ``objective`` what it needs."""
    if objective.inputs:
        raise ValueError(
            f"objective {objective.name!r} needs {', '.join(objective.inputs)} with each batch, which the forward does "
            "not carry: use burnish.linear_loss, or fuse_policy_head in TRL's policy-gradient trainers"
        )
    if objective.aggregate != "token_mean":
        raise ValueError(
            f"objective {objective.name!r} has aggregate={objective.aggregate!r}, and here a mean is over the whole "
            "batch's labels: make it with aggregate='token_mean', or use burnish.linear_loss"
        )


def check_teacher(objective: Objective, teacher) -> None:
    """ValueError where ``objective`` needs a teacher and there is none."""
    if "teacher" in objective.needs and teacher is None:
        raise ValueError(
            f"objective {objective.name!r} needs a teacher (a teacher, reference or frozen base model), none was given"
        )


def check_objective(objective: Objective, teacher, carried: tuple[str, ...] = ()) -> None:
    """ValueError where the trainer, whose collator carries ``carried``, cannot give ``objective`` what it needs."""
    for need in _NOT_CARRIED:
        if need in objective.needs and need not in carried:
            raise ValueError(
                f"objective {objective.name!r} needs {need} with the data, which TRL's collator does not carry: "
                "use fuse_lm_head in a loop of your own"
            )
    check_carried(objective)
    check_teacher(objective, teacher)


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
    import pyarrow.compute as pc

    columns = [c for c in ("input_ids", "labels") if c in dataset.column_names]
    if not columns:
        return
    seen, labels = 0, False
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for column in columns:
            flat = pc.list_flatten(batch[column])
            bad = pc.or_(pc.greater_equal(flat, vocabulary), pc.less(flat, 0))
            if column == "labels":
                bad = pc.and_(bad, pc.not_equal(flat, -100))
            if pc.any(bad).as_py():
                at = pc.index(bad, True).as_py()
                row = pc.list_parent_indices(batch[column])[at].as_py()
                raise ValueError(
                    f"row {seen + row + 1}: {'label' if column == 'labels' else 'token'} {flat[at].as_py()} is outside "
                    f"the vocabulary of {vocabulary} entries"
                )
        # a row's first label is never predicted, hence 1:
        labels = labels or any(v != -100 for row in batch[columns[-1]].to_pylist() for v in row[1:])
        seen += batch.num_rows
    if not labels:
        raise ValueError("no label is left to train on: every row is empty, masked or cut off by max_length")
