"""Questions and solved problems: what they are, their names, and the JSONL files that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from ..data import parse_row
from .leaks import normalise


@dataclass(frozen=True)
class Document:
    """A solved problem.  ``type`` is its coarse kind ("algebra"), None where unknown."""

    id: str
    problem: str
    trace: str
    type: str | None = None

    @property
    def text(self) -> str:
        """What a retriever reads: problem and trace."""
        return f"{self.problem}\n{self.trace}"


@dataclass(frozen=True)
class Question:
    """A question to label, or to train a retriever on; ``row`` is the whole row it came in, for judges and rewards."""

    id: str
    text: str
    answer: str | None = None
    type: str | None = None
    row: Mapping = field(default_factory=dict, compare=False, repr=False)


class Hit(NamedTuple):
    """A document that was found: its place in the corpus, its id and its score."""

    place: int
    id: str
    score: float


class Searcher(Protocol):
    """What ``with_context`` asks of a retriever."""

    corpus: list[Document]

    def search(self, questions: list[str], k: int = 1, *, progress: bool = False) -> list[list[Hit]]:
        """At most k documents of each question, best first."""


def name_of(text: str) -> str:
    """16 hex digits of a text's normal form: the same in any order and in any file."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def as_corpus(rows: Iterable[Mapping | Document]) -> list[Document]:
    """Documents of rows with ``problem`` and ``trace``, perhaps ``type`` and ``id``; equal problems once, the first.

    ValueError for an empty corpus, a missing column, a value that is no text, or one id for two problems.
    """
    found: dict[str, Document] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, Document):
            for column in ("problem", "trace"):
                if column not in row:
                    raise ValueError(f"corpus row {i}: no column {column!r}; got {', '.join(sorted(row)) or 'nothing'}")
                if not isinstance(row[column], str) or not row[column].strip():
                    raise ValueError(f"corpus row {i}: {column!r} must be a text; got {row[column]!r}")
            kind = row.get("type")
            row = Document(str(row.get("id") or name_of(row["problem"])), row["problem"], row["trace"],
                           None if kind is None else str(kind))  # fmt: skip
        before = found.setdefault(row.id, row)
        if normalise(before.problem) != normalise(row.problem):
            raise ValueError(f"corpus row {i}: id {row.id!r} is that of another problem")
    if not found:
        raise ValueError("the corpus is empty")
    return list(found.values())


def as_questions(rows: Iterable[Mapping | Question], column: str = "prompt") -> list[Question]:
    """Questions of a dataset's rows: the text of ``column`` (a string, or messages), ``answer``, ``type``; equal once.

    ValueError for no rows, a missing column, or one id for two questions.
    """
    found: dict[str, Question] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, Question):
            if column not in row:
                raise ValueError(f"question row {i}: no column {column!r}; got {', '.join(sorted(row)) or 'nothing'}")
            answer, kind = row.get("answer"), row.get("type")
            row = Question(
                question_id(row, column), text_of(row[column]), None if answer is None else str(answer),
                None if kind is None else str(kind), row,
            )  # fmt: skip
        before = found.setdefault(row.id, row)
        if normalise(before.text) != normalise(row.text):
            raise ValueError(f"question row {i}: id {row.id!r} is that of another question")
    if not found:
        raise ValueError("there are no questions")
    return list(found.values())


def question_id(row: Mapping, column: str = "prompt") -> str:
    """The name of a row's question: its ``id``, or that of its text."""
    return str(row.get("id") or name_of(text_of(row[column])))


def text_of(prompt: str | Sequence[Mapping]) -> str:
    """The question in a prompt: itself, or its last user message.  ValueError where there is none."""
    if isinstance(prompt, str):
        return prompt
    for message in reversed(list(prompt)):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return message["content"]
    raise ValueError(f"a prompt must be a text, or messages with a user's text; got {prompt!r:.200}")


def read_rows(path: str | Path) -> list[dict]:
    """Objects of a JSONL file.  ValueError, beginning "FILE:LINE: ", for a malformed line; OSError for no file."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            rows.append(parse_row(line, f"{path}:{number}"))
    return rows


def write_corpus(path: Path, corpus: Sequence[Document]) -> None:
    path.write_text("".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in corpus))
