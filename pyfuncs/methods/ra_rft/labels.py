"""Which solved problem helps with which question: labels of a judge, or measured, in a file that grows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .context import Template
from .corpus import Document, Question, as_corpus, as_questions, read_rows
from .leaks import LeakGuard
from .rewards import BadData, checked


class Verdict(NamedTuple):
    """``label``: whether the document helps; ``about`` goes into the file beside it, under its own names."""

    label: bool
    about: Mapping[str, Any] = {}


Judge = Callable[[Question, Document], "bool | Verdict"]


def build_labels(
    questions: Sequence, corpus: Sequence, judge: Judge | str, path: str | Path, *, same_type: bool = True,
    guard: LeakGuard | None = None, candidates: Mapping[str, Sequence[str]] | None = None, progress: bool = True,
    rollout: Mapping[str, Any] | None = None,
) -> list[dict]:  # fmt: skip
    """Rows {"question": id, "document": id, "label": bool, ...}, one a pair, written to ``path`` as they are made.

    A run that was killed goes on where it stopped: pairs that the file has are not judged again, and a line that was
    cut short is.  Pairs come in the order of the questions and of the corpus.

    Args:
        questions: ``Question``s, or rows with ``prompt`` and perhaps ``answer`` and ``type``.
        corpus: documents, or rows with ``problem`` and ``trace``, and perhaps ``type``.
        judge: judge(question, document) -> bool or ``Verdict``.  The paper asks GPT-4o whether both share theorems,
            algorithms or proof techniques.  Or "rollout", which measures the benefit; that is ours, not the paper's.
        path: of the JSONL file.
        same_type: judge only pairs of one ``type``, as the paper does; a pair where either has none is judged.
        guard: as in ``Retriever``: a question's own problem, and what overlaps with a benchmark, is no pair.
        candidates: {question id: document ids}, to judge only these, such as what an untrained retriever finds.
        rollout: arguments of ``rollout_benefit`` for judge="rollout".

    Raises ValueError naming what is wrong: no pair at all, a verdict that is no bool, a file of other questions.
    Source: arXiv 2606.13680, stage 1.
    """
    questions, corpus = as_questions(questions), as_corpus(corpus)
    if judge == "rollout":
        judge = rollout_benefit(**(rollout or {}))
    elif rollout is not None:
        raise ValueError("rollout= goes with judge='rollout'")
    if not callable(judge):
        raise ValueError(f"judge must be callable or 'rollout'; got {judge!r}")
    guard = guard or LeakGuard()
    kept = guard.filter(corpus)[0]
    blocked = guard.over(kept)
    pairs, place = [], {d.id: i for i, d in enumerate(kept)}
    for question in questions:
        hidden = blocked.blocked(question.text)
        asked: Sequence[int] = range(len(kept))
        if candidates is not None:
            asked = sorted({place[d] for d in candidates.get(question.id, ()) if d in place})
        pairs += [
            (question, kept[i]) for i in asked
            if i not in hidden
            and not (same_type and None not in (question.type, kept[i].type) and question.type != kept[i].type)
        ]  # fmt: skip
    if not pairs:
        raise BadData("there is no pair of a question and a document to label: types or guards exclude them all")
    path = Path(path)
    done = _done(path)
    known = {(q.id, d.id) for q, d in pairs}
    strange = next((key for key in done if key not in known), None)
    if strange:
        raise ValueError(f"{path} has a label of question {strange[0]!r} and document {strange[1]!r}, not a pair here")
    bar = _bar(len(pairs), len(done), progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for question, document in pairs:
            if (question.id, document.id) in done:
                continue
            row = {"question": question.id, "document": document.id, **_verdict(judge(question, document))}
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[question.id, document.id] = row
            bar.update()
    bar.close()
    return [done[q.id, d.id] for q, d in pairs]


def _done(path: Path) -> dict[tuple[str, str], dict]:
    """What a file has; a last line that was cut short is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = read_rows(path)
    for i, row in enumerate(rows):
        if not all(isinstance(row.get(k), t) for k, t in (("question", str), ("document", str), ("label", bool))):
            raise ValueError(f"{path}:{i + 1}: a label needs question, document and label; got {row!r:.200}")
    return {(row["question"], row["document"]): row for row in rows}


def _verdict(found) -> dict:
    label, about = (found.label, dict(found.about)) if isinstance(found, Verdict) else (found, {})
    if not isinstance(label, bool):
        raise BadData(f"a judge must return a bool or a Verdict; got {found!r:.200}")
    return {"label": label, **about}


def _bar(total: int, done: int, progress: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc="labels", unit="pair", disable=not progress)


def rollout_benefit(
    model=None, tokenizer=None, reward: Callable | None = None, *, samples: int = 8, margin: float = 0.0,
    template: Template | None = None, max_new_tokens: int = 256, temperature: float = 1.0, seed: int = 0,
) -> Judge:  # fmt: skip
    r"""A judge that measures: benefit(q, c) = mean reward with c in the prompt - mean reward without.  Label: > margin.

    It is the definition of Eq. 1 of arXiv 2606.13680 sampled, which the paper declares intractable and never measures;
    its labels are a language model's opinion.  This is ours.  The mean without a context is measured once a question.

    Args:
        model, tokenizer: the policy, as transformers loads it.
        reward: a TRL reward function f(prompts, completions, **columns); columns are those of the question's row.
        samples: completions a prompt.  The error of a benefit is about sqrt(2 p (1 - p) / samples).
        margin: a benefit above it is a positive label.
        template: of the prompt with context.
        max_new_tokens, temperature: of sampling.
        seed: with the two ids it fixes the samples of a pair, so that a run that goes on gives what one run gives.
    """
    if model is None or tokenizer is None or reward is None:
        raise ValueError("judge='rollout' needs rollout={'model': ..., 'tokenizer': ..., 'reward': ...}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    shown, reward, without = template or Template(), checked(reward), {}

    def mean_reward(question: Question, documents: Sequence[Document]) -> float:
        text = shown(question.text, documents)
        prompt: Any = [{"role": "user", "content": text}] if tokenizer.chat_template else text
        name = "/".join([str(seed), question.id, *(d.id for d in documents)])
        texts = _sample(model, tokenizer, prompt, samples, max_new_tokens, temperature, name)
        completions: list[Any] = list(texts)
        columns = {k: [v] * samples for k, v in question.row.items() if k not in ("prompt", "completion", "prompts")}
        columns.setdefault("answer", [question.answer] * samples)
        if not isinstance(prompt, str):
            completions = [[{"role": "assistant", "content": c}] for c in texts]
        values = [v for v in reward(prompts=[prompt] * samples, completions=completions, **columns) if v is not None]
        if not values:
            raise BadData(f"the reward applies to no completion of question {question.id!r}")
        return sum(values) / len(values)

    def judge(question: Question, document: Document) -> Verdict:
        if question.id not in without:
            without[question.id] = mean_reward(question, ())
        base, helped = without[question.id], mean_reward(question, (document,))
        return Verdict(helped - base > margin, {"benefit": helped - base, "without": base})

    return judge


@torch.no_grad()
def _sample(model, tokenizer, prompt, count: int, tokens: int, temperature: float, name: str) -> list[str]:
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
    ids = encoded["input_ids"].to(model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type != "cpu" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            num_return_sequences=count, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
