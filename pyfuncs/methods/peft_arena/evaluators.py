"""Suites of an arena: a named evaluator and what it reads.  A score is higher where the model is better.

Each suite has two splits without a row in common: "held_out", on which points of a path are chosen, and "test".

    {evaluator: task, task: chain_sum, args: {...}, size: 64}     a reasoning-gym task, answered and verified
    {evaluator: exact, rows: FILE.jsonl | reasoning-gym:TASK | MODULE:FUNCTION}   the greedy answer, in one forward
    {evaluator: nll, text: FILE | MODULE:FUNCTION}                exp(-NLL a token): likelihood, in [0, 1]
    {evaluator: choice, rows: FILE.jsonl | MODULE:FUNCTION}       accuracy by the options' log-likelihoods
    {evaluator: MODULE:FUNCTION, ...}                             function(model, tokenizer, split=, **rest)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...ops.linear_stats import linear_stats
from ..data import EVALUATION_SEED, TASK_PREFIX, TaskData, jsonl_rows, load_task
from ..evaluate import accuracy
from ..frozen import evaluating
from ..functions import load_function
from ..output_head import backbone, base_model, output_head

SPLITS = ("held_out", "test")
#: Seed of a split's problems, apart from those of training sets.  reasoning-gym draws problem i with seed + i: seeds
#: that are near each other give the same problems.
SEEDS = {"test": EVALUATION_SEED, "held_out": 2 * EVALUATION_SEED}
#: (token ids, labels with -100 where nothing is asked) of one row.
Row = tuple[list[int], list[int]]


class NotFinite(ValueError):
    """A model's outputs, or a score of them, are not finite."""


class Suite:
    """One evaluation; see the module.  ``questions`` are a task's of both splits, which training must not contain, and
    ``prompts`` what ``prompt_of`` gives for the rows of both.

    Making one reads its rows but needs no model.  ValueError, beginning with ``where``, for anything wrong.
    """

    def __init__(self, where: str, given: Mapping[str, Any], batch_size: int = 16):
        if not isinstance(given, Mapping) or not isinstance(given.get("evaluator"), str):
            raise ValueError(f"{where}: a mapping with 'evaluator' is needed; got {given!r}")
        self.where, self.batch_size = where, batch_size
        arguments = {k: v for k, v in given.items() if k != "evaluator"}
        maker = _MAKERS.get(given["evaluator"])
        self.questions: set[str] = set()
        self.prompts: set[str] = set()
        if maker is None:
            function = load_function(given["evaluator"], f"{where}: evaluator (or {', '.join(_MAKERS)})")
            self._score: Callable = lambda model, tokenizer, split: function(model, tokenizer, split=split, **arguments)
            self._sample: Callable | None = None
            return
        known = [p for p in inspect.signature(maker).parameters if p != "suite"]
        for name in arguments:
            if name not in known:
                raise ValueError(f"{where}: {given['evaluator']} has {', '.join(known)}; got {name!r}")
        try:
            inspect.signature(maker).bind(self, **arguments)
        except TypeError as error:
            raise ValueError(f"{where}: {given['evaluator']}: {error}") from None
        self._score, self._sample = maker(self, **arguments)

    def score(self, model, tokenizer, split: str) -> float:
        """The model's score on a split.  ValueError for another split, NotFinite for a score or outputs that are no
        numbers."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        with torch.no_grad(), evaluating(model):
            try:
                score = float(self._score(model, tokenizer, split))
            except NotFinite as error:
                raise NotFinite(f"{self.where}: {error}") from None
        if not math.isfinite(score):
            raise NotFinite(f"{self.where}: the score is {score}")
        return score

    def sample(self, tokenizer, count: int) -> list[list[int]]:
        """Token ids of up to ``count`` rows of the held-out split, for metrics; none of a function's suite."""
        return [] if self._sample is None else [ids for ids, _ in self._sample(tokenizer, "held_out")[:count]]


def label_stats(model, rows: list[Row], batch_size: int, pad: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log-probability, whether it is the model's first choice) of each labelled token, row by row, on the CPU.

    Only rows of hidden states that have a label meet the LM head; logits are never whole.  NotFinite where hidden
    states or log-probabilities are not finite.
    """
    core, device = base_model(model), next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    out: list = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(rows[i][0]) for i in batch)
        ids = torch.full((len(batch), width), pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            n = len(rows[i][0])
            ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(rows[i][0]), torch.tensor(rows[i][1]), 1
        hidden = backbone(core)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        keep = labels[:, 1:] != -100
        head, asked = output_head(core), hidden.last_hidden_state[:, :-1][keep.to(device)]
        found = linear_stats(
            asked, head.weight, labels[:, 1:][keep].to(device),
            stats=("logp", "hit"), bias=head.bias, scale=head.scale, softcap=head.softcap,
        )  # fmt: skip
        if not bool(asked.isfinite().all() and found.logp.isfinite().all()):
            raise NotFinite("the model's outputs are not finite")
        counts = keep.sum(1).tolist()
        for i, logp, hit in zip(batch, found.logp.cpu().split(counts), found.hit.cpu().split(counts), strict=True):
            out[i] = logp, hit
    return out


def encode(tokenizer, prompt: str, completion: str, chat: bool = False) -> Row:
    """The row of a prompt and what should follow it; only that is labelled.  Text is tokenised as one.

    ``chat``: a template has written the prompt, with its own special tokens.
    """
    before, both = (tokenizer(x, add_special_tokens=not chat)["input_ids"] for x in (prompt, prompt + completion))
    shared = 0
    while shared < min(len(before), len(both) - 1) and before[shared] == both[shared]:
        shared += 1
    return both, [-100] * shared + both[shared:]


def _row(tokenizer, row: Mapping[str, Any]) -> Row:
    if "input_ids" in row:
        return row["input_ids"], row.get("labels", row["input_ids"])
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, completion)
    written = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return encode(tokenizer, written, completion[0]["content"], chat=True)


def prompt_of(row: Mapping[str, Any]) -> str:
    """What two rows that ask the same have alike."""
    return repr(row.get("input_ids", row.get("prompt")))


def _size(suite: Suite, size) -> int:
    if type(size) is not int or size < 1:
        raise ValueError(f"{suite.where}: size must be a whole number, at least 1; got {size!r}")
    return size


def _problems(suite: Suite, name: str, args: Mapping | None, size: int) -> dict[str, TaskData]:
    """A task's problems by split; none is in both."""
    size = _size(suite, size)
    try:
        found = {s: load_task(name, size=4 * size, seed=seed, **(args or {})) for s, seed in SEEDS.items()}
    except ValueError as error:
        raise ValueError(f"{suite.where}: {error}") from None
    taken: set[str] = set()
    for split, data in found.items():
        fresh = {e["question"]: e for e in data.entries if e["question"] not in taken}
        data.entries = list(fresh.values())[:size]
        if not data.entries:
            raise ValueError(f"{suite.where}: the task {name} has too few problems for two splits")
        taken |= {e["question"] for e in data.entries}
        suite.questions |= taken
        found[split] = data
    return found


def _task(suite, task, args=None, size=64, max_new_tokens=64, prompt=None, answer=None):
    found = _problems(suite, task, args, size)
    functions = {
        "prompt_format": None if prompt is None else load_function(prompt, f"{suite.where}: prompt"),
        "extract": str.strip if answer is None else load_function(answer, f"{suite.where}: answer"),
    }

    def score(model, tokenizer, split: str) -> float:
        data = found[split]
        return accuracy(
            model, tokenizer, data.task, entries=data.entries, batch_size=suite.batch_size, progress=False,
            max_new_tokens=max_new_tokens, **functions,
        ).mean  # fmt: skip

    def sample(tokenizer, split: str) -> list[Row]:
        return [_row(tokenizer, r) for r in found[split].rows(bool(tokenizer.chat_template))]

    return score, sample


def _exact(suite, rows, args=None, size=64, by="answer"):
    if by not in ("answer", "token"):
        raise ValueError(f"{suite.where}: by must be answer or token; got {by!r}")
    if isinstance(rows, str) and rows.startswith(TASK_PREFIX):
        problems = _problems(suite, rows.removeprefix(TASK_PREFIX), args, size)
        source = lambda tokenizer, split: problems[split].rows(bool(tokenizer.chat_template))  # noqa: E731
    else:
        found = _rows(suite, rows, args, size, ("input_ids",), ("prompt", "completion"))
        source = lambda tokenizer, split: found(split)  # noqa: E731

    def sample(tokenizer, split: str) -> list[Row]:
        return [_row(tokenizer, r) for r in source(tokenizer, split)]

    def score(model, tokenizer, split: str) -> float:
        hits = [hit for _, hit in label_stats(model, sample(tokenizer, split), suite.batch_size)]
        if by == "token":
            return float(torch.cat(hits).float().mean())
        return sum(bool(h.all()) for h in hits) / len(hits)

    return score, sample


def _nll(suite, text, args=None, size=16, length=128):
    size, file = _size(suite, size), Path(text)
    if type(length) is not int or length < 2:
        raise ValueError(f"{suite.where}: length must be a whole number, at least 2; got {length!r}")
    if file.is_file():
        content = file.read_text()
    elif ":" in text:
        content = load_function(text, f"{suite.where}: text")(**(args or {}))
    else:
        raise ValueError(f"{suite.where}: text {text}: no such file, and no MODULE:FUNCTION")

    def sample(tokenizer, split: str) -> list[Row]:
        ids = tokenizer(content, add_special_tokens=False)["input_ids"]
        # a text that repeats itself has windows that are alike: each once, so that none is in both splits
        windows = [*map(list, dict.fromkeys(
            tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)
        ))]  # fmt: skip
        mine = windows[SPLITS.index(split) :: 2]
        if not mine:
            raise ValueError(f"{suite.where}: {len(ids)} tokens are too few for two different windows of {length}")
        # spread over the text, not its beginning
        return [(w, w) for w in mine[:: max(1, len(mine) // size)][:size]]

    def score(model, tokenizer, split: str) -> float:
        logp = torch.cat([x for x, _ in label_stats(model, sample(tokenizer, split), suite.batch_size)])
        return math.exp(float(logp.double().mean()))

    return score, sample


def _choice(suite, rows, args=None, size=64, normalise=True):
    found = _rows(suite, rows, args, size, ("prompt", "options", "answer"))
    for p in (p for split in SPLITS for p in found(split)):
        options, answer = p["options"], p["answer"]
        if not isinstance(options, (list, tuple)) or not options or not all(isinstance(o, str) for o in options):
            raise ValueError(f"{suite.where}: options must be a list of strings, not empty; got {options!r}")
        if type(answer) is not int or not 0 <= answer < len(options):
            raise ValueError(
                f"{suite.where}: answer must be the number of an option, from 0 to {len(options) - 1}; got {answer!r}"
            )

    def sample(tokenizer, split: str) -> list[Row]:
        return [encode(tokenizer, p["prompt"], option) for p in found(split) for option in p["options"]]

    def score(model, tokenizer, split: str) -> float:
        problems, encoded = found(split), sample(tokenizer, split)
        logp = [x.mean() if normalise else x.sum() for x, _ in label_stats(model, encoded, suite.batch_size)]
        right, start = 0, 0
        for p in problems:
            end = start + len(p["options"])
            right += int(torch.stack(logp[start:end]).argmax()) == p["answer"]
            start = end
        return right / len(problems)

    return score, sample


def _rows(suite: Suite, source: str, args, size: int, *forms: tuple[str, ...]) -> Callable[[str], list[dict]]:
    """split -> rows of a file (every other one) or of function(split=, size=, **args)."""
    size = _size(suite, size)

    def form_of(row: dict) -> tuple[str, ...] | None:
        return next((form for form in forms if all(column in row for column in form)), None)

    def checked(rows: list[dict]) -> list[dict]:
        if not rows:
            raise ValueError(f"{suite.where}: {source} has no rows")
        for row in rows:
            if form_of(row) is None:
                needed = " or ".join(", ".join(form) for form in forms)
                raise ValueError(f"{suite.where}: a row of {source} needs {needed}; got {', '.join(row)}")
        return rows

    def apart(drawn: dict[str, list[dict]]) -> Callable[[str], list[dict]]:
        held, test = ({repr([row[c] for c in form_of(row) or ()]): row for row in drawn[s]} for s in SPLITS)
        shared = [row for key, row in held.items() if key in test]
        if shared:
            raise ValueError(
                f"{suite.where}: {source} has {len(shared)} rows in both of {', '.join(SPLITS)}; the first is "
                f"{str(shared[0])[:80]}"
            )
        suite.prompts = {prompt_of(row) for split in SPLITS for row in drawn[split]}
        return lambda split: drawn[split]

    if Path(source).is_file():
        every = checked([row for _, row in jsonl_rows(source)])
        if len(every) < 2:
            raise ValueError(f"{suite.where}: {source} has too few rows for two splits")
        return apart({split: every[i::2][:size] for i, split in enumerate(SPLITS)})
    if ":" not in source:
        raise ValueError(f"{suite.where}: rows {source}: no such file, and no MODULE:FUNCTION")
    function = load_function(source, f"{suite.where}: rows")
    return apart({split: checked(list(function(split=split, size=size, **(args or {})))) for split in SPLITS})


_MAKERS: dict[str, Callable] = {"task": _task, "exact": _exact, "nll": _nll, "choice": _choice}
