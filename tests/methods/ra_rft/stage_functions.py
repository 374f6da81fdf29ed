"""A judge and rewards for the command's tests, named as MODULE:FUNCTION; each can be told to stop the process."""

from __future__ import annotations

calls = {"judge": 0, "reward": 0}
stop_at: dict[str, int] = {}


def count(what: str) -> None:
    calls[what] += 1
    if calls[what] == stop_at.get(what):
        raise KeyboardInterrupt


def same_word(question, document) -> bool:
    count("judge")
    return question.text.split()[0] == document.trace.split()[0]


def never(question, document) -> bool:
    return False


def length(completions, **_):
    count("reward")
    return [float(len(set(c))) for c in completions]


def words(completions, **_):
    return ["good"] * len(completions)
