"""``DriftTrainer``: fine-tuning by per-sequence weighted log-likelihood, on TRL's SFTTrainer, logits never whole."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ... import objectives
from ..target_sft import TargetSFTTrainer
from .episode import read_episodes
from .returns import WeightOptions
from .rows import weighted_rows


@dataclass
class DriftConfig(SFTConfig):
    """``trl.SFTConfig`` and the options of ``WeightOptions``, which turn episodes into rows.

    Args:
        length_norm: of a row's loss: "sum" of its completion's tokens (the paper, Eq. 15), or their "mean" (its code).
        batch_weight_norm: divide a batch's loss by the sum of its weights instead of the number of its rows (the code's
            BATCH_WEIGHT_NORMAL).
        max_length: tokens; rows that are longer are left out whole, with a warning that counts them: a turn cut short,
            or without its history, is none that the policy took.  None, the default: no limit.

    ValueError naming the option for values out of range, and for TRL options that weights do not go with.
    """

    drift_beta: float = 0.1
    gamma: float = 0.9
    repetition_penalty: float = 0.5
    format_penalty: float = 0.0
    return_form: str = "paper"
    weight_norm: str = "prompt"
    supervise: str = "last"
    drop_all_failed: bool = False
    weighting: str = "drift"
    length_norm: str = "sum"
    batch_weight_norm: bool = False
    max_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        WeightOptions.of(self)
        if self.length_norm not in ("sum", "mean"):
            raise ValueError(f"length_norm must be 'sum' or 'mean'; got {self.length_norm!r}")
        if not isinstance(self.batch_weight_norm, bool):
            raise ValueError(f"batch_weight_norm must be true or false; got {self.batch_weight_norm!r}")


class DriftTrainer(TargetSFTTrainer):
    """DRIFT's training (arXiv 2605.31455, Eqs. 14 and 15): weighted log-likelihood of multi-turn trajectories.

    With w_b the weight of row b, and B the rows of an optimizer step over all its micro-batches and all ranks,

        loss = (1 / B) sum_b w_b sum_t -log p(y_bt | x_b, y_b<t)

    so micro-batches, accumulation and ranks leave value and gradient as they are, and a row of weight 0 counts in B.
    ``length_norm="mean"`` divides row b's sum by its tokens; ``batch_weight_norm`` puts sum_b w_b in B's place.  The
    loss is one pass of ``burnish.linear_loss`` (6 N V H FLOPs, N the supervised tokens of rows with a weight above 0).

    Args:
        model: as ``TargetSFTTrainer``.
        args: a ``DriftConfig``.
        train_dataset, eval_dataset: a ``datasets.Dataset`` of episodes (``prompt_id``, ``messages``, ``rewards``,
            ``answers``), weighed here by ``args``; or of rows with a ``weight`` (``weighted_rows``), each in TRL's
            prompt and completion, or ``input_ids`` and ``labels``, and with or without ``success`` (0 or 1).
        budget, backend, chunkft, ...: as ``TargetSFTTrainer``.

    Logged beside TRL's metrics, of each optimizer step's B rows: ``weight_mean``, ``weight_max``, ``weight_entropy``
    (nats, of the weights over their sum), ``effective_sample_size`` (a share of B), ``success_share``.

    Raises TypeError for another kind of config or dataset; ValueError naming the column for one that is missing, a
    weight that is negative or not finite; naming the option for packing, a collator, metrics of logits, an objective,
    an average that is not over all ranks, and tensor, context or sequence parallelism.
    """

    _tag_names = ["trl", "drift", "burnish"]  # noqa: RUF012  (TRL's own form)
    _carries = ("token_weight",)
    loss_is_scaled_for_ga: Any = True

    args: Any
    model: Any

    def __init__(self, model, args: DriftConfig | None = None, *, train_dataset=None, eval_dataset=None, **options):
        args = DriftConfig("drift") if args is None else args
        if not isinstance(args, DriftConfig):
            raise TypeError(f"args must be a DriftConfig; got {type(args).__name__}")
        _check(args, options)
        train_dataset = _rows(train_dataset, args, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: _rows(v, args, f"eval_dataset[{k!r}]") for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = _rows(eval_dataset, args, "eval_dataset")
        super().__init__(
            model, args, objective=objectives.weighted_nll(), train_dataset=train_dataset, eval_dataset=eval_dataset,
            **options,
        )  # fmt: skip
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            raise ValueError(f"{type(self.data_collator).__name__} carries no weights: rows must be text")
        parallel = self.accelerator.parallelism_config
        if parallel is not None and parallel.non_data_parallel_size > 1:
            raise ValueError("parallelism_config: rows are counted over data-parallel ranks; tp, cp and sp must be 1")
        self.data_collator = _WeightedCollator(self.data_collator, args.length_norm)
        self._rescale: Tensor | float = 1.0

    def _prepare_dataset(self, dataset, processing_class, args, *rest, **named):
        dataset = _rows(dataset, args, "dataset")  # given to evaluate()
        whole = copy.copy(args)
        whole.max_length = None  # TRL would cut rows; here too long ones are left out
        dataset = super()._prepare_dataset(dataset, processing_class, whole, *rest, **named)
        before = len(dataset)
        longest = math.inf if args.max_length is None else args.max_length
        dataset = dataset.filter(lambda ids: len(ids) <= longest, input_columns="input_ids")
        if len(dataset) < before:
            text = f"{before - len(dataset)} of {before} rows are longer than max_length={args.max_length}: left out"
            if not len(dataset):
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)
        return dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += ["weight", "success"]

    def _get_num_items_in_batch(self, batch_samples: list, device) -> Tensor | None:
        """Rows of the step's whole batch, over micro-batches and ranks; weights are put in relation to them here."""
        if not batch_samples:
            return None
        weights = torch.cat([b["weight"] for b in batch_samples]).double()
        success = torch.cat([b["success"] for b in batch_samples]).double()
        known = ~success.isnan()
        logs = torch.where(weights > 0, weights.log(), 0.0)
        sums = torch.stack([
            torch.ones_like(weights).sum(), weights.sum(), weights.square().sum(), (weights * logs).sum(),
            success[known].sum(), known.double().sum(),
        ])  # fmt: skip
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(device), "sum")
        rows, total = sums[0], sums[1]
        self._rescale = rows / total.clamp(min=torch.finfo(torch.float32).tiny) if self.args.batch_weight_norm else 1.0
        if self.is_in_train:  # a model is loaded in eval mode, and put into training mode by its first step
            self._observe(sums.tolist(), weights.max())
        return rows.float().to(device)

    def _observe(self, sums: list[float], largest: Tensor) -> None:
        rows, total, squares, logs, solved, known = sums
        found = {"weight_mean": total / rows, "weight_max": self.accelerator.gather(largest.float()).max().item()}
        if total > 0:
            found["weight_entropy"] = math.log(total) - logs / total
            found["effective_sample_size"] = total**2 / (rows * squares)
        if known:
            found["success_share"] = solved / known
        for name, value in found.items():
            self._metrics["train"][name].append(value)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("DriftTrainer makes no logits: use evaluate(), with prediction_loss_only")
        if num_items_in_batch is None:  # evaluation: of this rank's batch, which the trainer then averages
            rows, weights = len(inputs["weight"]), inputs["weight"]
            self._rescale = rows / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
            if not self.args.batch_weight_norm:
                self._rescale = 1.0
            num_items_in_batch = torch.tensor(float(rows * self.accelerator.num_processes), device=weights.device)
        inputs = {k: v for k, v in inputs.items() if k not in ("weight", "success")}
        inputs["token_weight"] = inputs["token_weight"] * self._rescale
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


@dataclass
class _WeightedCollator:
    """TRL's collator, with each token's weight (B, T) beside its label, and each row's weight and success (rows,)."""

    inner: DataCollatorForLanguageModeling
    length_norm: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner(examples)
        weight = torch.tensor([float(e["weight"]) for e in examples])
        rows = []
        for example, w in zip(examples, weight, strict=True):
            labels = torch.tensor(example["labels"])
            supervised = (labels[1:] != -100).sum().clamp(min=1)  # a row's first label is never predicted
            rows.append((w / supervised if self.length_norm == "mean" else w).expand(len(labels)))
        if self.inner.padding_free:
            rows = [torch.cat(rows)]
        width = batch["labels"].shape[1]
        batch["token_weight"] = torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])
        batch["weight"] = weight
        batch["success"] = torch.tensor([math.nan if e.get("success") is None else e["success"] for e in examples])
        return batch


def _check(args: DriftConfig, options: dict) -> None:
    prepared: Any = args.dataset_kwargs or {}
    refused = {
        "packing=True: a packed row has many weights; padding_free=True spares the padding": args.packing,
        "eval_packing=True": args.eval_packing,
        "average_tokens_across_devices=False: the mean is over the rows of all ranks":
            not args.average_tokens_across_devices,
        "completion_only_loss=False: what the policy did not write has no weight": args.completion_only_loss is False,
        "dataset_kwargs skip_prepare_dataset": prepared.get("skip_prepare_dataset", False),
        "data_collator": options.get("data_collator") is not None,
        "compute_metrics: there are no logits": options.get("compute_metrics") is not None,
        "objective": "objective" in options or "objective_args" in options,
        "teacher_model": options.get("teacher_model") is not None,
        "formatting_func": options.get("formatting_func") is not None,
    }  # fmt: skip
    for option, given in refused.items():
        if given:
            raise ValueError(f"DriftTrainer does not support {option}")


def _rows(dataset, args: DriftConfig, name: str) -> Dataset:
    """A dataset of rows with weights, made of episodes where these are given."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset of episodes or weighted rows; got {type(dataset).__name__}")
    columns = dataset.column_names
    if "weight" not in columns and "messages" in columns:
        return weighted_rows(read_episodes(dataset), WeightOptions.of(args))
    if "weight" not in columns:
        raise ValueError(
            f"{name}: missing column 'weight' (rows), or 'messages', 'rewards' and 'answers' (episodes); it has "
            f"{', '.join(columns) or 'none'}"
        )
    missing = [c for c in ("prompt", "completion") if c not in columns]
    if missing and not {"input_ids", "labels"} <= set(columns):
        raise ValueError(f"{name}: missing column {missing[0]!r} beside 'weight'; it has {', '.join(columns)}")
    for i, w in enumerate(dataset["weight"]):
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 <= w < math.inf:
            raise ValueError(f"{name}, row {i}: weight must be a finite number, at least 0; got {w!r}")
    return dataset
