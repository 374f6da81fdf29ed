"""A fixed text as documents of token ids, cut into rows anew for every epoch.

Documents are joined in an order that is drawn for each epoch, and the stream is cut into rows of ``length`` + 1 tokens
which overlap by one, so that every row has ``length`` labels.  A row may hold the end of one document and the beginning
of the next, and attention sees both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


def as_documents(data: Any, name: str) -> list[np.ndarray]:
    """Token ids of each document, int32, of rows with ``input_ids`` or of sequences of ids.

    ValueError naming ``name``.
    """
    out = []
    for i, row in enumerate(data):
        ids = row["input_ids"] if isinstance(row, dict) else row
        array = np.asarray(ids)
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise ValueError(f"{name}, document {i}: a list of token ids is needed; got {type(ids).__name__}")
        if len(array):
            out.append(array.astype(np.int32))
    if not out:
        raise ValueError(f"{name}: no document with a token")
    return out


def split_front(documents: Sequence[Any], share: float, name: str) -> tuple[list, list]:
    """(whole documents from the front with at least ``share`` of all tokens, the rest).  ValueError if none is left."""
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie in (0, 1); got {share}")
    total, taken, count = sum(map(len, documents)), 0, 0
    while taken < share * total:
        taken += len(documents[count])
        count += 1
    if count == len(documents):
        raise ValueError(f"{name}={share} takes all {count} documents: give more or shorter ones")
    return list(documents[:count]), list(documents[count:])


class EpochRows(Dataset):
    """Row g of a run of many epochs: row g mod R of epoch g div R, R = ``rows``; a function of ``seed`` and g alone.

    Items are {"input_ids", "labels"} of ``length`` + 1 tokens.  What does not fill a row at an epoch's end is left out;
    it is another end in every epoch.  ValueError where the documents do not fill one row.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int, seed: int, epochs: int):
        self.documents, self.length, self.seed, self.epochs = list(documents), length, seed, epochs
        self.tokens = sum(map(len, documents))
        self.rows = (self.tokens - 1) // length
        if self.rows < 1:
            raise ValueError(f"seq_length={length}: the training documents have {self.tokens} tokens, less than a row")
        self._stream = lru_cache(maxsize=2)(self._make)

    def __len__(self) -> int:
        return self.rows * self.epochs

    def order(self, epoch: int) -> np.ndarray:
        """Which document comes when in an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))

    def _make(self, epoch: int) -> np.ndarray:
        return np.concatenate([self.documents[i] for i in self.order(epoch)])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, row = divmod(index, self.rows)
        ids = self._stream(epoch)[row * self.length : (row + 1) * self.length + 1]
        tokens = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens.clone()}

    def __getstate__(self):  # for the workers of a DataLoader
        return {k: v for k, v in self.__dict__.items() if k != "_stream"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._stream = lru_cache(maxsize=2)(self._make)


class HeldOutRows(Dataset):
    """The rows of documents in their given order, to measure on; every token but the first is a label once.

    The last row is padded with id 0 and label -100.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int, name: str):
        self.stream, self.length = np.concatenate(list(documents)), length
        if len(self.stream) < 2:
            raise ValueError(f"{name}: at least two tokens are needed; got {len(self.stream)}")

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.stream[index * self.length : (index + 1) * self.length + 1]
        tokens = torch.zeros(self.length + 1, dtype=torch.int64)
        labels = torch.full_like(tokens, -100)
        tokens[: len(ids)] = labels[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": tokens, "labels": labels}


class Plan:
    """How many optimizer steps each cycle has, and which rows each step takes.

    Args:
        rows: of an epoch.
        cycles, epochs_per_cycle: each cycle takes its epochs' rows in order, step by step; what does not fill its last
            step is left out.
        batches: rows a micro-batch and rank, of each cycle.
        accumulation, world: micro-batches an optimizer step; ranks.

    ValueError where a cycle has no whole step.
    """

    def __init__(
        self, rows: int, cycles: int, epochs_per_cycle: int, batches: Sequence[int], accumulation: int, world: int
    ):  # fmt: skip
        self.batches, self.accumulation, self.world = list(batches), accumulation, world
        self.rows_of_cycle, self.rows_of_epoch = rows * epochs_per_cycle, rows
        self.lengths = [self.rows_of_cycle // self.rows_of_step(c) for c in range(cycles)]
        if min(self.lengths) < 1:
            most = max(self.rows_of_step(c) for c in range(cycles))
            raise ValueError(
                f"an optimizer step takes {most} rows, a cycle of {epochs_per_cycle} epochs has {self.rows_of_cycle}: "
                "lower the batch or seq_length"
            )
        self.ends = list(accumulate(self.lengths))

    def rows_of_step(self, cycle: int) -> int:
        """Rows of an optimizer step, over micro-batches and ranks."""
        return self.batches[cycle] * self.accumulation * self.world

    def epoch_at(self, step: int) -> float:
        """Epochs done behind so many steps of the run."""
        cycle = next(c for c, end in enumerate(self.ends) if step <= end)
        if step == self.ends[cycle]:
            return (cycle + 1) * self.rows_of_cycle / self.rows_of_epoch
        within = step - (self.ends[cycle] - self.lengths[cycle])
        return (cycle * self.rows_of_cycle + within * self.rows_of_step(cycle)) / self.rows_of_epoch


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one rank for a whole run, as indices into ``EpochRows``.

    A step's rows are the same whatever the ranks and micro-batches are that they are cut into.
    """

    def __init__(self, plan: Plan, rank: int):
        self.plan, self.rank = plan, rank

    def __len__(self) -> int:
        return self.plan.ends[-1] * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        for cycle, steps in enumerate(plan.lengths):
            size, start = plan.batches[cycle], cycle * plan.rows_of_cycle
            for _ in range(steps):
                for micro in range(plan.accumulation):
                    first = start + (micro * plan.world + self.rank) * size
                    yield list(range(first, first + size))
                start += plan.rows_of_step(cycle)
