"""Which chunk trains, and which comes next."""

from __future__ import annotations

import random
from typing import Any

ORDERS = ("ascending", "descending", "random", "loss")


class Rotation:
    """K updates of a chunk, then the next; N chunks, each once a cycle.

    order: "ascending" or "descending" in the plan; "random", each cycle a permutation drawn from (seed, cycle);
        "loss", by how far the loss fell during a chunk's last turns, largest fall first, chunks never seen before all
        others.  A turn's fall is the loss observed at its first update less that at the next turn's first update; the
        mean of the last fall and of what was kept before counts.  (Ours; the paper's order is ascending.)
    """

    def __init__(self, num_chunks: int, steps_per_chunk: int, order: str, seed: int):
        self.num_chunks, self.steps_per_chunk, self.order, self.seed = num_chunks, steps_per_chunk, order, seed
        self.cycle = self.index = self.used = 0
        self.falls: dict[int, float] = {}
        self._begun: float | None = None  # the loss at this turn's first update
        self._before: tuple[int, float] | None = None  # the turn before: (chunk, loss at its first update)
        self.turns = self._order()

    @property
    def chunk(self) -> int:
        return self.turns[self.index]

    def _order(self) -> list[int]:
        chunks = list(range(self.num_chunks))
        if self.order == "descending":
            chunks.reverse()
        elif self.order == "random":
            random.Random(f"{self.seed} {self.cycle}").shuffle(chunks)
        elif self.order == "loss":
            chunks.sort(key=lambda c: -self.falls.get(c, float("inf")))
        return chunks

    def observe(self, loss: float) -> None:
        """The loss of this update's batch; several micro-batches may each be told, the first counts."""
        if self.used == 0 and self._begun is None:
            self._begun = loss
            if self._before is not None:
                chunk, then = self._before
                fall = then - loss
                self.falls[chunk] = (self.falls[chunk] + fall) / 2 if chunk in self.falls else fall

    def advance(self) -> bool:
        """Count an update; whether another chunk trains from now on."""
        self.used += 1
        if self.used < self.steps_per_chunk:
            return False
        if self.order == "loss" and self._begun is None:
            raise RuntimeError("order='loss' needs the losses: step(closure), or observe(loss) before each step()")
        before = self.chunk
        if self._begun is not None:
            self._before = (before, self._begun)
        self.used, self._begun, self.index = 0, None, self.index + 1
        if self.index == self.num_chunks:
            self.index, self.cycle = 0, self.cycle + 1
            self.turns = self._order()
        return self.chunk != before

    def state_dict(self) -> dict[str, Any]:
        names = ("num_chunks", "steps_per_chunk", "order", "seed", "cycle", "index", "used", "turns")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**state, "falls": dict(self.falls), "begun": self._begun, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where the state is of another rotation."""
        for name in ("num_chunks", "steps_per_chunk", "order", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but the optimizer's state has {state[name]!r}")
        self.cycle, self.index, self.used = state["cycle"], state["index"], state["used"]
        self.turns, self.falls = list(state["turns"]), dict(state["falls"])
        self._begun, self._before = state["begun"], None if state["before"] is None else tuple(state["before"])
