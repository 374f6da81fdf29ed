"""A needle in a haystack, after RULER (arXiv 2404.06654), made here: nothing is fetched.

One sentence, "One of the special magic numbers for KEY is: VALUE.", stands at a depth of a text of a length; the
model is asked for the value.  The three single-needle tasks are RULER's kinds: ``single_1`` hides a number among
repeated sentences, ``single_2`` a number in prose, ``single_3`` a UUID in prose.  RULER's prose is a set of essays;
by default ours is the text of Python's own language reference, which every Python carries, so that figures are not
comparable to published ones.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..evaluate import accuracy

TASKS = {"single_1": ("noise", "number"), "single_2": ("prose", "number"), "single_3": ("prose", "uuid")}
_NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_FIRST = (
    "amber", "brisk", "calm", "dusty", "early", "faint", "gentle", "hollow", "icy", "jolly", "keen", "late",
    "mellow", "narrow", "open", "pale", "quiet", "rough", "silver", "tidy", "urban", "vivid", "warm", "young",
)  # fmt: skip
_SECOND = (
    "anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "tunnel", "umbrella",
    "valley", "window", "yard",
)  # fmt: skip
_BEFORE = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {what} afterwards.\n"
)
_AFTER = (
    "\nWhat is the special magic {what} for {key} mentioned in the provided text? "
    "The special magic {what} for {key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class NeedleGrid:
    """Recall by length and depth: ``scores[i][j]`` is the share of values found at ``lengths[i]``, ``depths[j]``."""

    lengths: list[int]
    depths: list[float]
    scores: list[list[float]]
    count: int

    @property
    def by_length(self) -> list[float]:
        """Mean over depths."""
        return [sum(row) / len(row) for row in self.scores]

    def __str__(self) -> str:
        lines = ["length " + "".join(f"{d:>7.0%}" for d in self.depths) + "   mean"]
        for n, row, mean in zip(self.lengths, self.scores, self.by_length, strict=True):
            lines.append(f"{n:>6} " + "".join(f"{s:>7.0%}" for s in row) + f"{mean:>7.1%}")
        return "\n".join(lines)


def needles(
    tokenizer, length: int, depth: float, count: int = 10, *, task: str = "single_1", text: str | None = None,
    seed: int = 0, reserve: int = 0,
) -> list[dict]:  # fmt: skip
    """``count`` prompts of at most ``length`` tokens with the needle at ``depth``.

    Args:
        tokenizer: counts the tokens, its own special ones included.
        length: tokens of a prompt and ``reserve`` together; as much text is put in as fits.
        depth: 0 before the text's first sentence, 1 after its last.
        task: ``single_1``, ``single_2`` or ``single_3``.
        text: the prose, instead of Python's reference; repeated where it is too short.
        seed: of keys, values and where in the prose a prompt begins.
        reserve: tokens kept for the answer.

    Returns entries with "question", "answer", "key", "length" (its tokens) and "depth".  ValueError where not even the
    question fits, or for a depth outside [0, 1].
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1]; got {depth}")
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    hay, what = TASKS[task]
    rng = random.Random(f"{task} {seed} {length} {depth}")
    sentences = list(_NOISE) if hay == "noise" else _sentences(prose() if text is None else text)
    return [_one(tokenizer, length - reserve, depth, what, sentences, hay == "prose", rng) for _ in range(count)]


def needle_accuracy(
    model, tokenizer, lengths: Sequence[int], depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), count: int = 10, *,
    task: str = "single_1", text: str | None = None, seed: int = 0, batch_size: int = 1,
    max_new_tokens: int | None = None, progress: bool = True,
) -> NeedleGrid:  # fmt: skip
    """Greedy recall on a grid of lengths and depths; an answer counts where the value stands in it (RULER's string
    match).

    See ``needles`` for the prompts; ``length`` includes ``max_new_tokens`` (64 for numbers and UUIDs by default).
    """
    new = 64 if max_new_tokens is None else max_new_tokens
    scores = []
    for length in lengths:
        row = []
        for depth in depths:
            entries = needles(tokenizer, length, depth, count, task=task, text=text, seed=seed, reserve=new)
            result = accuracy(
                model, tokenizer, _Match(), entries=entries, batch_size=batch_size, max_new_tokens=new,
                prompt_format=lambda e: e["question"], progress=progress,
            )  # fmt: skip
            row.append(result.mean)
        scores.append(row)
    return NeedleGrid(list(lengths), list(depths), scores, count)


class _Match:
    @staticmethod
    def score_answer(answer: str, entry: dict) -> float:
        return float(entry["answer"].lower() in answer.lower())


def prose() -> str:
    """The text of Python's language reference, as the interpreter carries it for ``help()``."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def _sentences(text: str) -> list[str]:
    words = " ".join(text.split())
    found = [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", words) if s]
    if not found:
        raise ValueError("text: no sentence in it")
    return found


def _one(
    tokenizer, budget: int, depth: float, what: str, sentences: list[str], prose: bool, rng: random.Random
) -> dict:
    key = f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"
    number, code = rng.randint(1_000_000, 9_999_999), uuid.UUID(int=rng.getrandbits(128), version=4)
    value = str(number if what == "number" else code)
    needle = f"One of the special magic {what}s for {key} is: {value}."
    start = rng.randrange(len(sentences)) if prose else 0

    def build(n: int) -> str:
        hay = [sentences[(start + i) % len(sentences)] for i in range(n)]
        hay.insert(round(depth * n), needle)
        return _BEFORE.format(what=what) + " ".join(hay) + _AFTER.format(what=what, key=key)

    def size(n: int) -> int:
        return len(tokenizer(build(n))["input_ids"])

    if size(0) > budget:
        raise ValueError(f"length: the question alone is {size(0)} tokens; {budget} are left for it")
    n = _largest(size, budget)
    question = build(n)
    return {"question": question, "answer": value, "key": key, "length": size(n), "depth": depth}


def _largest(size: Callable[[int], int], budget: int) -> int:
    """The largest n with size(n) <= budget, where size rises and size(0) fits."""
    low, high = 0, 1
    while size(high) <= budget:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low
