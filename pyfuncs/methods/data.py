"""Training rows: from a JSONL file, or from a reasoning-gym task with its verifier."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The forms a row may have: the columns that make one.
FORMS = (("prompt", "completion"), ("messages",), ("input_ids",), ("text",))
#: Columns TRL reads beside them.
EXTRAS = ("labels", "tools", "chat_template_kwargs")
TASK_PREFIX = "reasoning-gym:"
#: Problems to evaluate on are drawn with a seed that no training set of ordinary seeds has.
EVALUATION_SEED = 1_000_003


@dataclass
class TaskData:
    """A procedural task: ``entries`` to learn from, ``task.score_answer(answer, entry)`` to verify with."""

    name: str
    task: Any
    entries: list[dict]

    def rows(self, chat: bool) -> list[dict]:
        """prompt and completion of each entry, as messages where the tokenizer has a chat template."""
        return [{**prompt(entry, chat), **completion(entry, chat)} for entry in self.entries]


@dataclass
class FileData:
    """The rows of a JSONL file, checked; ``ignored`` are columns that training does not read."""

    path: str
    records: list[dict]
    ignored: list[str] = field(default_factory=list)

    def rows(self, chat: bool) -> list[dict]:
        return self.records


def prompt(entry: dict, chat: bool) -> dict:
    """The question of a task's entry as TRL's ``prompt`` column."""
    question = entry["question"].strip()
    return {"prompt": [{"role": "user", "content": question}] if chat else question + "\n"}


def completion(entry: dict, chat: bool) -> dict:
    """The answer of a task's entry as TRL's ``completion`` column."""
    answer = str(entry["answer"])
    return {"completion": [{"role": "assistant", "content": answer}] if chat else answer}


def load_data(source: str, arguments: dict | None = None) -> TaskData | FileData:
    """Rows of ``FILE.jsonl`` or ``reasoning-gym:TASK``.

    ``arguments`` go with a task: ``size`` (1000 entries by default), ``seed`` (0) and the task's own
    configuration.  ValueError, in one line, for whatever is wrong; see ``read_jsonl`` and ``load_task``.
    """
    if source.startswith(TASK_PREFIX):
        return load_task(source[len(TASK_PREFIX) :], **{"size": 1000, "seed": 0, **(arguments or {})})
    if arguments:
        raise ValueError("data-args go with reasoning-gym:TASK, not with a file")
    return read_jsonl(source)


def load_task(name: str, *, size: int, seed: int, **arguments) -> TaskData:
    """``size`` entries of a reasoning-gym task.  ValueError for an unknown task (with close matches), an
    argument that it does not have, or a value it refuses."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise ValueError("reasoning-gym tasks need the package: pip install reasoning-gym") from None
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(DATASETS)} tasks"
        raise ValueError(f"unknown reasoning-gym task {name!r}: {hint}")
    known = {f.name for f in dataclasses.fields(DATASETS[name][1])}
    for key in arguments:
        if key not in known:
            raise ValueError(f"reasoning-gym task {name} has no argument {key!r}; it has {', '.join(sorted(known))}")
    for key, value, least in (("size", size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"reasoning-gym task {name}: {key} must be a whole number >= {least}; got {value!r}")
    try:
        task = create_dataset(name, size=size, seed=seed, **arguments)
        return TaskData(name, task, [task[i] for i in range(size)])
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"reasoning-gym task {name}: {str(error) or 'its configuration was refused'}") from error


def read_jsonl(path: str) -> FileData:
    """The rows of a JSONL file, each an object in one of the forms

        {"prompt": str, "completion": str}       (or both lists of messages)
        {"messages": [{"role": str, "content": str}, ...]}
        {"text": str}
        {"input_ids": [int, ...], "labels": [int, ...]}     (labels optional)

    all of the same form.  Blank lines are skipped.  ValueError, beginning "FILE:LINE: ", for a malformed row;
    ValueError for a missing or empty file.
    """
    records: list[dict] = []
    form: tuple | None = None
    ignored: set[str] = set()
    for where, row in jsonl_rows(path):
        kind = _form(row, where)
        form = form or kind
        if kind != form:
            raise ValueError(f"{where}: this row has {_describe(kind)}, the rows before it have {_describe(form)}")
        keep = (*kind[0], *EXTRAS)
        ignored |= row.keys() - set(keep)
        records.append({k: row[k] for k in keep if k in row})
    return FileData(path, records, sorted(ignored))


def jsonl_rows(path: str | Path, what: str = "data file") -> Iterator[tuple[str, dict]]:
    """("FILE:LINE", row) of a JSONL file's lines that are not blank.

    ValueError, in one line, for a file that is not there or has no row, and beginning "FILE:LINE: " for a line that is
    no JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{what} {path}: {'is a directory' if file.is_dir() else 'no such file'}")
    some = False
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                some = True
                yield f"{path}:{number}", parse_row(line, f"{path}:{number}")
    if not some:
        raise ValueError(f"{what} {path}: no rows")


def parse_row(line: bytes, where: str) -> dict:
    """The JSON object of a line.  ValueError, beginning with ``where``, for anything else."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object; got {type(row).__name__}")
    return row


def _form(row: dict, where: str) -> tuple[tuple[str, ...], str]:
    """(columns, "text" | "messages" | "ids") of a row whose values are well formed."""
    for columns in FORMS:
        present = [c for c in columns if c in row]
        if not present:
            continue
        missing = [c for c in columns if c not in row]
        if missing:
            raise ValueError(f"{where}: {present[0]!r} without {missing[0]!r}")
        if columns == ("input_ids",):
            return columns, _check_ids(row, where)
        kinds = {check_value(c, row[c], where) for c in columns}
        if len(kinds) > 1:
            raise ValueError(f"{where}: 'prompt' and 'completion' must both be strings or both lists of messages")
        return columns, kinds.pop()
    keys = ", ".join(sorted(row)) or "nothing"
    raise ValueError(f"{where}: a row needs prompt and completion, messages, text or input_ids; got {keys}")


def check_value(column: str, value, where: str) -> str:
    """Which it is, "text" or "messages".  ValueError, beginning with ``where``, for anything else."""
    if column != "messages" and isinstance(value, str):
        if not value and column != "prompt":
            raise ValueError(f"{where}: {column!r} is empty")
        return "text"
    if column == "text" or not isinstance(value, list):
        wanted = {"text": "a string", "messages": "a list of messages"}.get(column, "a string or a list of messages")
        raise ValueError(f"{where}: {column!r} must be {wanted}; got {type(value).__name__}")
    if not value:
        raise ValueError(f"{where}: {column!r} is empty")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: {column}[{i}] must be an object with a role and a content")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: {column}[{i}] has no content, a string")
    return "messages"


def _check_ids(row: dict, where: str) -> str:
    for column in ("input_ids", "labels"):
        if column not in row:
            continue
        value = row[column]
        if not isinstance(value, list) or not value or not all(type(v) is int for v in value):
            raise ValueError(f"{where}: {column!r} must be a list of integers, at least one")
    if "labels" in row and len(row["labels"]) != len(row["input_ids"]):
        raise ValueError(f"{where}: {len(row['labels'])} labels for {len(row['input_ids'])} input_ids")
    return "ids"


def _describe(form: tuple) -> str:
    columns, kind = form
    return " and ".join(columns) + (f" ({kind})" if columns == ("prompt", "completion") else "")
