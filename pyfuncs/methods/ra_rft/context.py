"""The prompt column with solved problems before the question: one rewriting for training and for inference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .corpus import Document, Searcher, text_of

#: Columns that ``with_context`` adds.
CONTEXT_IDS, CONTEXT_SCORES = "context_ids", "context_scores"


@dataclass(frozen=True)
class Template:
    r"""How documents are put before a question: ``whole`` with {documents} and {question}, each document as ``each``.

    The paper's own wording (its Fig. 6) is an image that was not to be had; this one is ours.
    """

    whole: str = (
        "Here is a solved problem that may use a related technique.\n{documents}\n"
        "Now solve the following problem and put the final answer in \\boxed{}.\n{question}"
    )
    each: str = "Problem: {problem}\n{trace}\n"

    def __post_init__(self):
        for name, text, fields in (
            ("whole", self.whole, ("documents", "question")), ("each", self.each, ("problem", "trace")),
        ):  # fmt: skip
            for field in fields:
                if f"{{{field}}}" not in text:
                    raise ValueError(f"the template's {name!r} must have {{{field}}}; got {text!r}")

    def __call__(self, question: str, documents: Sequence[Document]) -> str:
        """The text; without documents the question itself, to the byte."""
        if not documents:
            return question
        shown = "".join(_fill(self.each, {"problem": d.problem, "trace": d.trace}) for d in documents)
        return _fill(self.whole, {"documents": shown, "question": question})


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Fields replaced in one pass: braces of a trace, such as \\boxed{}, are its own."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda m: values[m[0][1:-1]], text)


def contextual(prompt: Any, documents: Sequence[Document], template: Template | None = None) -> Any:
    """A prompt, text or messages, with documents before its question: the last message of the user.

    For one prompt at inference; ``with_context`` does the same to a dataset.
    """
    template = template or Template()
    if isinstance(prompt, str):
        return template(prompt, documents)
    question = text_of(prompt)
    last = max(i for i, m in enumerate(prompt) if m.get("role") == "user" and m.get("content") == question)
    return [{**m, "content": template(question, documents)} if i == last else m for i, m in enumerate(prompt)]


def with_context(
    dataset, retriever: Searcher, k: int = 1, template: Template | None = None, *, column: str = "prompt",
    progress: bool = False,
):  # fmt: skip
    """A dataset whose prompts show the k solved problems that the retriever finds for their questions.

    Args:
        dataset: a ``datasets.Dataset`` with a column of prompts, texts or lists of messages.
        retriever: a ``Retriever``, whose guard keeps a question's own problem from it, or another ``Searcher``.
        k: documents a prompt, at most.  With 0, or where none is left, a prompt stays as it is, to the byte.
        template: a ``Template``.
        column: of the prompts.

    Returns it with the column rewritten, and columns ``context_ids`` and ``context_scores``, lists, best first.  The
    rewriting is that of training and of inference: a policy trained with it needs it at test time.

    Raises: ValueError naming a missing column, a dataset that has a context already, or k < 0; TypeError for another
    kind of dataset.  Source: arXiv 2606.13680, stage 3.
    """
    from datasets import Dataset, List, Value

    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset; got {type(dataset).__name__}")
    if column not in dataset.column_names:
        raise ValueError(f"the dataset has no column {column!r}; it has {', '.join(dataset.column_names)}")
    if CONTEXT_IDS in dataset.column_names:
        raise ValueError(f"the dataset has a column {CONTEXT_IDS!r}: its prompts have a context already")
    if type(k) is not int or k < 0:
        raise ValueError(f"k must be a whole number, at least 0; got {k!r}")
    prompts = list(dataset[column])
    if k:
        hits = retriever.search([text_of(p) for p in prompts], k, progress=progress)
    else:
        hits = [[] for _ in prompts]
    rewritten = [
        contextual(p, [retriever.corpus[h.place] for h in row], template) for p, row in zip(prompts, hits, strict=True)
    ]
    features = dataset.features.copy()
    features[CONTEXT_IDS], features[CONTEXT_SCORES] = List(Value("string")), List(Value("float32"))
    if not prompts:  # map would leave the columns out
        return Dataset.from_dict({name: [] for name in features}, features=features)

    def row(_, i: int) -> dict:
        found = hits[i]
        return {column: rewritten[i], CONTEXT_IDS: [h.id for h in found], CONTEXT_SCORES: [h.score for h in found]}

    return dataset.map(row, with_indices=True, features=features, load_from_cache_file=False, desc="contexts")
