"""Accuracy of a model on a verifiable task: greedy answers, scored by the task itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .data import prompt
from .frozen import evaluating


@dataclass(frozen=True)
class Accuracy:
    """Of each entry, in the order given: ``scores`` in [0, 1] and ``answers``."""

    scores: list[float]
    answers: list[str]

    @property
    def mean(self) -> float:
        """Mean score, partial credit included."""
        return sum(self.scores) / len(self.scores)

    @property
    def solved(self) -> float:
        """Fraction of entries with the full score of 1."""
        return sum(s >= 1.0 for s in self.scores) / len(self.scores)


def accuracy(
    model, tokenizer, dataset, *, entries: Iterable[dict] | None = None, batch_size: int = 16,
    max_new_tokens: int = 64, prompt_format: Callable[[dict], str] | None = None,
    extract: Callable[[str], str] = str.strip, progress: bool = True,
) -> Accuracy:  # fmt: skip
    """Generate greedily for each entry of a reasoning-gym dataset and score the answers.

    Args:
        model, tokenizer: a causal LM and its tokenizer; the model may be in training mode (it is put back)
            and may have a fused head.
        dataset: its ``score_answer(answer, entry)`` is the verifier.
        entries: what to answer; by default the dataset's own.
        batch_size: prompts a batch, padded on the left.  They are sorted by length, so that little is padding.
        max_new_tokens: an answer's longest length.
        prompt_format: entry -> the text to complete; by default what ``burnish sft`` trains on: the chat
            template's turn where the tokenizer has one, else the question and a newline.
        extract: generated text -> the answer in it.
        progress: show a bar.

    A model that FSDP2 shards is asked by all processes at once, with the same entries.

    ValueError if there is no entry.
    """
    entries = list(dataset if entries is None else entries)
    if not entries:
        raise ValueError("accuracy: no entries")
    chat = bool(getattr(tokenizer, "chat_template", None))
    if prompt_format is None:
        prompt_format = _chat(tokenizer) if chat else lambda entry: prompt(entry, False)["prompt"]
    # a chat template writes its own special tokens
    inputs = [tokenizer(prompt_format(e), add_special_tokens=not chat)["input_ids"] for e in entries]
    order = sorted(range(len(entries)), key=lambda i: len(inputs[i]))
    answers = [""] * len(entries)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    # where parameters are sharded every process must take part in each forward, and so take as many steps
    synced = any(hasattr(p, "full_tensor") for p in model.parameters()) or None
    bar = tqdm(total=len(entries), desc="evaluating", disable=not progress)
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(inputs[i]) for i in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                n = len(inputs[i])
                ids[row, width - n :] = torch.tensor(inputs[i])
                mask[row, width - n :] = 1
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
                do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, use_cache=True,
                temperature=None, top_p=None, top_k=None, synced_gpus=synced,
            )  # fmt: skip
            for i, text in zip(batch, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
                answers[i] = extract(text)
            bar.update(len(batch))
    bar.close()
    scores = [float(dataset.score_answer(answer, entry)) for answer, entry in zip(answers, entries, strict=True)]
    return Accuracy(scores, answers)


def _chat(tokenizer) -> Callable[[dict], str]:
    return lambda entry: tokenizer.apply_chat_template(
        prompt(entry, True)["prompt"], add_generation_prompt=True, tokenize=False
    )
