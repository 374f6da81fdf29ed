"""Reward functions of TRL's form whose values are known to be numbers, and the verifier of a boxed answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real


class BadData(ValueError):
    """What a judge, a reward or labels turn out to be once a run is under way."""


def checked(reward: Callable) -> Callable:
    """A reward function f(prompts, completions, **columns) whose list is checked at each call.

    ValueError naming it where it does not return one finite number, or None for "does not apply", a completion.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    @functools.wraps(reward, updated=())
    def call(*args, **kwargs):
        values = reward(*args, **kwargs)
        wanted = len(kwargs.get("completions", args[1] if len(args) > 1 else values))
        if not hasattr(values, "__len__") or len(values) != wanted:
            raise BadData(f"reward {name} must return a list of {wanted} numbers; got {values!r:.200}")
        return [_number(name, v) for v in values]

    call.__name__ = name
    return call


def _number(name: str, value):
    if value is None:
        return None
    if hasattr(value, "item"):  # a scalar of torch or NumPy
        value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise BadData(f"reward {name} must return finite numbers; got {value!r}")
    return float(value)


def text_of_completion(completion: str | Sequence[dict]) -> str:
    """A completion's text, whether it came as one or as messages."""
    return completion if isinstance(completion, str) else "".join(m.get("content") or "" for m in completion)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of a text, braces matched; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return None


def boxed(completions, answer, **_) -> list[float]:
    r"""1 where the last \boxed{} of a completion is the row's ``answer``, as text without spaces; else 0."""

    def same(completion, wanted) -> bool:
        found = last_boxed(text_of_completion(completion))
        return found is not None and found.replace(" ", "") == str(wanted).replace(" ", "")

    return [float(same(c, a)) for c, a in zip(completions, answer, strict=True)]
