"""Episodes: one JSON object a trajectory, and what may be wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .returns import SUCCESS


@dataclass(frozen=True)
class Episode:
    """A finished trajectory.

    Args:
        prompt_id: what it answers; trajectories of the same are a group.
        trajectory: its number within the group, from 0.
        messages: the whole conversation, TRL's form; its last ``len(rewards)`` assistant messages are the turns.
        rewards: the verifier's, of each turn; 1 or more is correct.
        answers: what was found in each turn, None where nothing was.
        format_penalty: added to the return in the place of ``WeightOptions.format_penalty`` times the turns without an
            answer, where not None: files of the published program bring their own.
    """

    prompt_id: str | int
    trajectory: int
    messages: list[dict]
    rewards: list[float]
    answers: list[str | None]
    format_penalty: float | None = None

    @property
    def solved(self) -> bool:
        """Whether the last turn is correct."""
        return self.rewards[-1] >= SUCCESS

    def turns(self) -> list[int]:
        """Where in ``messages`` the turns are."""
        found = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return found[len(found) - len(self.rewards) :]

    def line(self) -> bytes:
        """Its line of a JSONL file, newline included."""
        record = asdict(self)
        if self.format_penalty is None:
            del record["format_penalty"]
        return json.dumps(record).encode() + b"\n"


def read_episodes(source: str | Path | Iterable[Mapping[str, Any]]) -> list[Episode]:
    """Episodes of a JSONL file, or of records (a ``datasets.Dataset`` too).

    A record has ``prompt_id``, ``messages``, ``rewards`` and ``answers``; or, as the published program writes them,
    ``turn_rewards`` {"t1": r, "t2": r, ...} and ``answer_norms``, the answers that were found, with or without a
    ``format_penalty``.  ``trajectory`` is counted where it is missing.

    ValueError that names file and line (or row), and column, for whatever is missing or malformed, a reward that is no
    finite number, an episode without a turn; for a file or a list without episodes.
    """
    out: list[Episode] = []
    counts: dict[Any, int] = {}
    for where, record in _records(source):
        episode = _episode(record, where, counts)
        counts[episode.prompt_id] = counts.get(episode.prompt_id, 0) + 1
        out.append(episode)
    if not out:
        raise ValueError(f"{source if isinstance(source, (str, Path)) else 'episodes'}: there are none")
    return out


def _records(source):
    if not isinstance(source, (str, Path)):
        for i, record in enumerate(source):
            if not isinstance(record, Mapping):
                raise ValueError(f"episode {i}: must be a mapping; got {type(record).__name__}")
            yield f"episode {i}", record
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"episodes {path}: {'is a directory' if path.is_dir() else 'no such file'}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", parse(line, f"{path}:{number}")


def parse(line: bytes, where: str) -> dict:
    """The JSON object of a line.  ValueError."""
    try:
        record = json.loads(line.decode())
    except ValueError as error:  # of the decoding as well
        raise ValueError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an episode must be a JSON object; got {type(record).__name__}")
    return record


def _episode(record: Mapping, where: str, counts: Mapping) -> Episode:
    published = record.get("rewards") is None and record.get("turn_rewards") is not None
    names = ("turn_rewards", "answer_norms") if published else ("rewards", "answers")
    for column in ("prompt_id", "messages", *names):
        if record.get(column) is None:
            raise ValueError(f"{where}: missing column {column!r}; it has {', '.join(sorted(map(str, record)))}")
    prompt_id = record["prompt_id"]
    if not isinstance(prompt_id, (str, int)) or isinstance(prompt_id, bool) or prompt_id == "":
        raise ValueError(f"{where}: prompt_id must be text or a whole number; got {prompt_id!r}")
    messages = _messages(record["messages"], where)
    rewards = _rewards(record[names[0]], where, names[0])
    answers = record[names[1]]
    if not isinstance(answers, list) or not all(a is None or isinstance(a, str) for a in answers):
        raise ValueError(f"{where}: {names[1]} must be a list of texts or nulls; got {answers!r}")
    if not published and len(answers) != len(rewards):
        raise ValueError(f"{where}: {len(answers)} answers for {len(rewards)} rewards")
    spoken = sum(m["role"] == "assistant" for m in messages)
    if spoken < len(rewards):
        raise ValueError(f"{where}: {len(rewards)} rewards, but {spoken} assistant messages")
    penalty = record.get("format_penalty")
    if penalty is not None:
        penalty = _number(penalty, where, "format_penalty")
    trajectory = record.get("trajectory", counts.get(prompt_id, 0))
    if type(trajectory) is not int or trajectory < 0:
        raise ValueError(f"{where}: trajectory must be a whole number from 0; got {trajectory!r}")
    return Episode(prompt_id, trajectory, messages, rewards, list(answers), penalty)


def _messages(value, where: str) -> list[dict]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: messages must be a list; got {type(value).__name__}")
    for i, m in enumerate(value):
        if not (isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise ValueError(f"{where}: messages[{i}] must have a role and a content, both text; got {m!r}")
    return [dict(m) for m in value]


def _rewards(value, where: str, column: str) -> list[float]:
    if isinstance(value, Mapping):
        # a Dataset fills the turns that a row does not have with None
        value = {k: v for k, v in value.items() if v is not None}
        want = [f"t{i}" for i in range(1, len(value) + 1)]
        if set(value) != set(want):
            raise ValueError(f"{where}: {column} must have the keys t1, t2, ...; got {', '.join(map(str, value))}")
        value = [value[name] for name in want]
    if not isinstance(value, list):
        raise ValueError(f"{where}: {column} must be a list of numbers; got {type(value).__name__}")
    if not value:
        raise ValueError(f"{where}: {column} is empty: an episode has at least one turn")
    return [_number(r, where, f"{column}[{i}]") for i, r in enumerate(value)]


def _number(value, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be a finite number; got {value!r}")
    return float(value)
