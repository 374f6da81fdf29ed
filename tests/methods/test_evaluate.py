"""Batched, left-padded, sorted generation gives each entry the answer it gets alone."""

from typing import ClassVar

import pytest
import tiny_models as tiny
import torch

import burnish
from burnish.methods import accuracy, fuse_lm_head


class Task:
    """Entries of uneven length; an answer scores by its share of the letter a."""

    entries: ClassVar = [{"question": "ab" * n, "answer": "a"} for n in (5, 1, 9, 2, 7)]

    def __iter__(self):
        return iter(self.entries)

    def score_answer(self, answer, entry):
        return float(answer.startswith("a")) if answer is not None else 0.0


@pytest.mark.parametrize("chat", [False, True])
def test_batching_changes_no_answer(chat):
    model, tok = tiny.llama().train(), tiny.tokenizer(chat=chat)
    fuse_lm_head(model, burnish.objectives.nll())
    together = accuracy(model, tok, Task(), batch_size=3, max_new_tokens=6, progress=False)
    alone = accuracy(model, tok, Task(), batch_size=1, max_new_tokens=6, progress=False)
    assert together.answers == alone.answers and len(set(together.answers)) > 1
    assert model.training and all(m.training for m in model.modules())
    prompt = "[user]" + "ab" * 9 + "<eos>[assistant]" if chat else "ab" * 9 + "\n"
    ids = torch.tensor([tok(prompt).input_ids])
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == together.answers[2]


def test_scores_keep_the_order_of_entries():
    model, tok = tiny.llama(), tiny.tokenizer()
    result = accuracy(model, tok, Task(), entries=Task.entries[:3], max_new_tokens=3, progress=False)
    assert result.scores == [float(a.startswith("a")) for a in result.answers] and len(result.scores) == 3
    assert result.mean == pytest.approx(sum(result.scores) / 3) and 0 <= result.solved <= 1
    with pytest.raises(ValueError, match="no entries"):
        accuracy(model, tok, Task(), entries=[])


def test_a_model_that_knows_the_answers():
    class Oracle(Task):
        def score_answer(self, answer, entry):
            return float(answer == wanted[entry["question"]])

    model, tok = tiny.llama(), tiny.tokenizer()
    first = accuracy(model, tok, Task(), max_new_tokens=4, progress=False, prompt_format=lambda e: e["question"])
    wanted = {e["question"]: a for e, a in zip(Task.entries, first.answers, strict=True)}
    again = accuracy(model, tok, Oracle(), max_new_tokens=4, progress=False, prompt_format=lambda e: e["question"])
    assert again.solved == 1.0
