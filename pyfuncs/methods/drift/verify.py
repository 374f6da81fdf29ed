"""Prompts and verifiers: what an episode starts from, and what says that a turn is correct."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..data import TaskData, prompt

#: Turn's text, prompt's entry -> its reward (1 or more ends the episode) and the answer in it, None for none.
Verifier = Callable[[str, Any], tuple[float, str | None]]


@dataclass(frozen=True)
class Prompt:
    """``messages`` to answer, under an id, and whatever the verifier needs as ``entry``."""

    prompt_id: str | int
    messages: list[dict]
    entry: Any = None


def task_prompts(data: TaskData, instruction: str = "") -> list[Prompt]:
    """The questions of a reasoning-gym task, each with ``instruction`` on a line of its own behind it."""
    out = []
    for i, entry in enumerate(data.entries):
        messages = prompt(entry, True)["prompt"]
        if instruction:
            messages[-1]["content"] += "\n" + instruction
        out.append(Prompt(f"{data.name}/{i}", messages, entry))
    return out


def find_answer(pattern: str | None) -> Callable[[str], str | None]:
    """Text -> the answer in it: the first group of the pattern's last match, or None; without a pattern all the text.

    ValueError for a pattern that is none or has no group.
    """
    if pattern is None:
        return lambda text: text.strip() or None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"answer pattern {pattern!r}: {error}") from None
    if not compiled.groups:
        raise ValueError(f"answer pattern {pattern!r} has no group: put what is the answer in parentheses")

    def find(text: str) -> str | None:
        found = None
        for found in compiled.finditer(text):  # noqa: B007  (the last one)
            pass
        return None if found is None or found[1] is None else found[1].strip()

    return find


def task_verifier(task, find: Callable[[str], str | None] | None = None) -> Verifier:
    """A reasoning-gym dataset's ``score_answer`` as a verifier; a turn without an answer scores 0.

    ``find``: text -> the answer in it, by default all of it (``find_answer``).
    """
    find = find or find_answer(None)

    def verify(text: str, entry) -> tuple[float, str | None]:
        answer = find(text)
        return (0.0 if answer is None else float(task.score_answer(answer, entry))), answer

    return verify
