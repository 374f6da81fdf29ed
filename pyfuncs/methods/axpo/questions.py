"""Questions for tool-using rollouts, and their rewards: 1 for a right answer, 0 for any other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..data import TASK_PREFIX, TaskData, check_value, jsonl_rows, load_task
from ..functions import load_function

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_answer(completion: list[dict]) -> str:
    """What a rollout answered: the last <answer>...</answer> of its last message, or else the message."""
    last = completion[-1] if completion else {}
    text = last.get("content") if last.get("role") == "assistant" else ""
    text = text if isinstance(text, str) else ""
    found = _ANSWER.findall(text)
    return (found[-1] if found else text).strip()


def load_questions(source: str, arguments: dict, system: str) -> tuple[list[dict], TaskData | None]:
    """(rows with a ``prompt`` of messages, the task) of ``reasoning-gym:TASK`` or ``FILE.jsonl``.

    A task's rows have ``entry``, the number of the problem.  A file's rows have a prompt, a string or messages, and
    whatever else the reward reads.  ``system`` begins a prompt that has no system message; "" leaves it out.
    ValueError, in one line, for whatever is wrong.
    """
    task = None
    if source.startswith(TASK_PREFIX):
        task = load_task(source[len(TASK_PREFIX) :], **{"size": 1000, "seed": 0, **arguments})
        rows: list[dict] = [{"prompt": e["question"].strip(), "entry": i} for i, e in enumerate(task.entries)]
    elif arguments:
        raise ValueError("data-args go with reasoning-gym:TASK, not with a file")
    else:
        rows = _read(source)
    for row in rows:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if system and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        row["prompt"] = prompt
    return rows, task


def _read(path: str) -> list[dict]:
    rows: list[dict] = []
    for where, row in jsonl_rows(path):
        if "prompt" not in row:
            raise ValueError(f"{where}: a row needs a prompt; got {', '.join(sorted(row)) or 'nothing'}")
        if check_value("prompt", row["prompt"], where) == "text" and not row["prompt"].strip():
            raise ValueError(f"{where}: 'prompt' is empty")
        if rows and row.keys() != rows[0].keys():
            here, first = (", ".join(sorted(r)) for r in (row, rows[0]))
            raise ValueError(f"{where}: this row has {here}, the first {first}")
        rows.append(row)
    return rows


def reward_function(name: str, rows: list[dict], task: TaskData | None) -> Callable[..., Any]:
    """The reward: "verifier" (a task's own; 1 for full score), "exact" (the column ``answer``), "auto" (the one that
    the data have) or MODULE:FUNCTION, as TRL calls it.  ValueError where the data lack what it reads."""
    if name == "auto":
        name = "exact" if task is None else "verifier"
    if name == "verifier":
        if task is None:
            raise ValueError("--reward verifier needs reasoning-gym data; for a file: exact, or MODULE:FUNCTION")
        return _verifier(task)
    if name == "exact":
        if "answer" not in rows[0]:
            raise ValueError(f"--reward exact reads the column answer; the data have {', '.join(sorted(rows[0]))}")
        return exact
    return load_function(name, "--reward")


def _verifier(task: TaskData) -> Callable[..., list[float]]:
    def verifier(completions, entry, **_) -> list[float]:
        pairs = zip(completions, entry, strict=True)
        return [float(task.task.score_answer(final_answer(c), task.entries[i]) == 1.0) for c, i in pairs]

    return verifier


def exact(completions, answer, **_) -> list[float]:
    """1 where the final answer is the column ``answer``, as text."""
    return [float(final_answer(c) == str(a).strip()) for c, a in zip(completions, answer, strict=True)]
