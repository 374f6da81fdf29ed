"""Growing texts token by token from any source of next-token log-probabilities: greedy or drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """How the next token is taken from scores (B, V); transformers' own processors and warpers, in its order."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    processors: tuple[Any, ...] = ()
    generator: torch.Generator | None = None

    def steps(self) -> list[Any]:
        """What scores go through, in order: f(ids, scores) -> scores.  ValueError for a value that one refuses."""
        from transformers.generation import logits_process as lp

        out: list[Any] = [*self.processors]
        if not self.do_sample:
            return out
        if self.temperature not in (None, 1.0):
            out.append(lp.TemperatureLogitsWarper(float(self.temperature)))  # type: ignore[arg-type]
        if self.top_k:
            out.append(lp.TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            out.append(lp.TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            out.append(lp.MinPLogitsWarper(self.min_p))
        return out

    def pick(self, scores: Tensor) -> Tensor:
        """(B,) tokens."""
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]


def grow(
    next_token: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor | None, choice: Choice,
    max_new_tokens: int, stops: list[int], pad: int | None, criteria: tuple[Any, ...] = (),
) -> Tensor:  # fmt: skip
    """ids (B, T) and up to ``max_new_tokens`` more columns; it ends early when every row has met a stop.

    next_token(ids, mask): scores (B, V) after the whole text so far, mask (B, T) being 0 on padding.
    """
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (B, T) with at least one token; got {tuple(ids.shape)}")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number, at least 1; got {max_new_tokens!r}")
    mask = torch.ones_like(ids) if mask is None else mask.long()
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids {tuple(ids.shape)}; got {tuple(mask.shape)}")
    if not bool((mask[:, -1] == 1).all()):
        raise ValueError("attention_mask must be 1 in the last column: pad prompts on the left")
    if pad is None and stops:
        pad = stops[0]
    steps = choice.steps()
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stop = torch.tensor(stops, device=ids.device)
    for _ in range(max_new_tokens):
        scores = next_token(ids, mask)
        for step in steps:
            scores = step(ids, scores)
        token = choice.pick(scores).to(ids.device)
        if pad is not None:
            token = torch.where(ended, pad, token)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        ended = ended | torch.isin(token, stop)
        for criterion in criteria:
            ended = ended | torch.as_tensor(criterion(ids, scores), device=ids.device)
        if bool(ended.all()):
            break
    return ids
