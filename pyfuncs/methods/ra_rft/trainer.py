"""``RARFTTrainer``: TRL's GRPOTrainer on prompts that show what a frozen retriever found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import GRPOTrainer

from ..last_step import NoStepBeyondTheLast
from .context import CONTEXT_IDS, CONTEXT_SCORES, Template, with_context
from .corpus import Searcher
from .rewards import checked

#: A column of document ids that are known to help, from which recall@k is logged.
POSITIVES = "positive_ids"


class RARFTTrainer(NoStepBeyondTheLast, GRPOTrainer):
    """GRPO on retrieved contexts; everything but the prompts is TRL's.

        trainer = RARFTTrainer(model, boxed, GRPOConfig(...), train_dataset=data, retriever=retriever)
        with burnish.methods.fuse_policy_head(trainer):
            trainer.train()

    Retriever and corpus are frozen, so contexts are found once, before training, and written into the prompt column of
    the training and evaluation data.  The policy is updated on the prompts it was sampled with, and a context takes no
    loss: prompts never do in TRL.  An RLOO or DAPO objective is TRL's ``loss_type`` and friends.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, ...: as TRL's GRPOTrainer.  Rewards written in Python
            must return a finite number, or None, for each completion.
        retriever: a ``Retriever`` or another ``Searcher``; None where the data has been through ``with_context``.
        k: documents a prompt, 1 as in the paper.
        template: a ``Template``; use the same at inference.

    Columns ``context_ids`` and ``context_scores`` stay in the data and reach reward functions.  In the log, of the
    first process's rows: ``retrieval/with_context``, the share of prompts that have one; ``retrieval/score``, mean of
    their first scores; ``retrieval/distinct``, different first documents a prompt; and where the data has a column
    ``positive_ids``, ``retrieval/recall@k`` over prompts that have a positive.

    Raises ValueError or TypeError naming what is not supported: an IterableDataset, an environment or a rollout
    function, which make prompts of their own, or data that ``with_context`` refuses.

    Source: arXiv 2606.13680, stage 3 and Eq. 3.
    """

    def __init__(
        self, model, reward_funcs, args=None, train_dataset=None, eval_dataset=None, *,
        retriever: Searcher | None = None, k: int = 1, template: Template | None = None, **options,
    ):  # fmt: skip
        for name in ("rollout_func", "environment_factory"):
            if options.get(name) is not None:
                raise ValueError(f"RARFTTrainer does not support {name}: it would make prompts without their contexts")
        if getattr(args, "remove_unused_columns", False):
            raise ValueError("RARFTTrainer does not support remove_unused_columns=True: it reads the retrieved ids")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        if train_dataset is None:
            raise ValueError("train_dataset is required")
        given: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}

        def add(name: str, data):
            if data is None or (retriever is None and CONTEXT_IDS in getattr(data, "column_names", ())):
                return data
            if retriever is None:
                raise ValueError(f"{name} has no column {CONTEXT_IDS!r}: give retriever=, or data of with_context")
            return with_context(data, retriever, k, template)

        for name, data in given.items():
            if isinstance(data, Mapping):
                given[name] = {n: add(f"{name}[{n!r}]", d) for n, d in data.items()}
            else:
                given[name] = add(name, data)
        listed = isinstance(reward_funcs, list)
        rewards = [checked(r) if _is_plain(r) else r for r in (reward_funcs if listed else [reward_funcs])]
        self.k, self.retriever = k, retriever
        super().__init__(model, rewards if listed else rewards[0], args, **given, **options)

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        for name, value in retrieval_metrics(inputs, self.k).items():
            self._metrics[mode][f"retrieval/{name}"].append(value)
        return super()._generate_and_score_completions(inputs)


def _is_plain(reward) -> bool:
    from torch import nn

    return callable(reward) and not isinstance(reward, (str, nn.Module))


def retrieval_metrics(rows: list[Mapping[str, Any]], k: int) -> dict[str, float]:
    """Of a batch's rows: with_context, score, distinct, and recall@k where rows name their positives."""
    found = [(list(row[CONTEXT_IDS]), list(row[CONTEXT_SCORES])) for row in rows]
    some = [(ids, scores) for ids, scores in found if ids]
    out = {"with_context": len(some) / len(rows)}
    if some:
        out["score"] = sum(scores[0] for _, scores in some) / len(some)
        prompts = {str(row["prompt"]) for row in rows if row[CONTEXT_IDS]}
        out["distinct"] = len({ids[0] for ids, _ in some}) / len(prompts)
    known = [(ids, set(row[POSITIVES])) for (ids, _), row in zip(found, rows, strict=True) if row.get(POSITIVES)]
    for depth in sorted({1, k}) if known else ():
        out[f"recall@{depth}"] = sum(bool(p.intersection(ids[:depth])) for ids, p in known) / len(known)
    return out
