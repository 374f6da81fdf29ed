"""Engines: conversations and a seed for each -> the next turn of each.

An engine is any callable (list of conversations, list of seeds) -> list of texts.  A turn depends on its own seed and
not on a generator that turns share, so two trajectories of one prompt are independent draws, and a turn can be drawn
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from ..frozen import evaluating

Engine = Callable[[list[list[dict]], list[int]], list[str]]
_INDEX_BITS = 32


def turn_seed(base: int | str, prompt: int, trajectory: int, turn: int, *, trajectories: int, turns: int) -> int:
    """A seed of 63 bits for a turn; those of a collection are all different.

    Args:
        base: the collection's own; its hash is the upper 31 bits.
        prompt, trajectory, turn: from 0; their number in the collection is the lower 32 bits.
        trajectories, turns: how many of each a prompt and a trajectory have at most.

    ValueError where the collection has more turns than numbers.
    """
    index = (prompt * trajectories + trajectory) * turns + turn
    if index >= 1 << _INDEX_BITS:
        raise ValueError(f"a collection may have 2^{_INDEX_BITS} turns; prompt {prompt} is beyond")
    digest = hashlib.blake2b(str(base).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 33) << _INDEX_BITS | index


class TransformersEngine:
    """Turns sampled by ``model.generate``, a whole list at once, padded on the left.

    Args:
        model: a causal LM; in training mode it is put back to it.  Its head may be fused.
        tokenizer: with a chat template, which must render a conversation's beginning as the beginning of the whole.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this probability is drawn from.
        max_new_tokens: a turn's longest length.

    The same list with the same seeds gives the same texts, on one machine; another list may differ where rounding
    decides between two tokens, as padding differs.  ValueError for a tokenizer without a chat template and for numbers
    out of range.
    """

    def __init__(self, model, tokenizer, *, temperature: float = 1.0, top_p: float = 1.0, max_new_tokens: int = 512):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("an engine needs a tokenizer with a chat template: set tokenizer.chat_template")
        if not temperature >= 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError(
                "temperature must be at least 0, top_p in (0, 1] and max_new_tokens at least 1; got "
                f"{temperature}, {top_p} and {max_new_tokens}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens

    def __call__(self, conversations: list[list[dict]], seeds: list[int]) -> list[str]:
        tok = self.tokenizer
        texts = [tok.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
        inputs = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]  # the template writes its own
        width = max(map(len, inputs))
        pad = tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id
        ids = torch.full((len(inputs), width), pad)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(inputs):
            ids[row, width - len(one) :] = torch.tensor(one)
            mask[row, width - len(one) :] = 1
        device = next(self.model.parameters()).device
        processors = []
        if self.temperature > 0:
            processors.append(_SeededDraw(seeds, width, self.temperature, self.top_p, self.max_new_tokens))
        with torch.no_grad(), evaluating(self.model):
            out = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=self.max_new_tokens,
                do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=_ends(self.model, tok), use_cache=True,
                logits_processor=processors, temperature=None, top_p=None, top_k=None,
                repetition_penalty=1.0,  # the model's own settings would bend what is drawn from
            )  # fmt: skip
        return tok.batch_decode(out[:, width:], skip_special_tokens=True)


class _SeededDraw(LogitsProcessor):
    """Leaves of each row the one token that its own random numbers draw, so that argmax is sampling.

    Row i's t-th token is the first whose cumulated probability exceeds the t-th uniform number of a Philox generator
    with the row's seed as key: different seeds are different streams.  (torch's CPU generator keeps 32 bits of a seed.)
    """

    def __init__(self, seeds: Sequence[int], width: int, temperature: float, top_p: float, steps: int):
        draws = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]
        self.uniform = torch.from_numpy(np.stack(draws))
        self.width, self.temperature = width, temperature
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.float() / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        cumulated = scores.double().softmax(-1).cumsum(-1)
        total = cumulated[:, -1:].contiguous()
        u = self.uniform[:, input_ids.shape[1] - self.width, None].to(scores.device)
        drawn = torch.searchsorted(cumulated, u * total, right=True)
        drawn = drawn.minimum(torch.searchsorted(cumulated, total))  # rounding may give the total itself
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _ends(model, tokenizer) -> list[int]:
    """The tokens that end a turn: the tokenizer's and the model's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(i for i in ids if i is not None))


class VLLMEngine:
    """Turns sampled by a vLLM server through TRL's client, one request a conversation, each with its own seed.

    Args:
        client: a ``trl.generation.vllm_client.VLLMClient``.
        tokenizer: the served model's, to decode with; the server renders its chat template.
        temperature, top_p, max_new_tokens: as ``TransformersEngine``.
        concurrency: requests at a time; the server batches them.

    The server keeps the weights it was started with: it is the fixed reference policy.  vLLM does not promise the same
    text for the same seed in another batch.
    """

    def __init__(
        self, client: Any, tokenizer, *, temperature: float = 1.0, top_p: float = 1.0, max_new_tokens: int = 512,
        concurrency: int = 64,
    ):  # fmt: skip
        self.client, self.tokenizer, self.concurrency = client, tokenizer, concurrency
        self.options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "logprobs": None}

    def __call__(self, conversations: list[list[dict]], seeds: list[int]) -> list[str]:
        def ask(conversation: list[dict], seed: int) -> list[int]:
            reply = self.client.chat([conversation], generation_kwargs={"seed": seed}, **self.options)
            return reply["completion_ids"][0]

        with ThreadPoolExecutor(min(self.concurrency, len(conversations))) as pool:
            ids = list(pool.map(ask, conversations, seeds))
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
