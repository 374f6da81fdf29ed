"""Guards against leaks: the question itself among the documents, and the text of a benchmark in the corpus."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .corpus import Document

_WORD = re.compile(r"[^\W_]+(?:\.\d+)?|[^\w\s]")
#: Marks that change with typesetting and not with the problem.
_IGNORED = frozenset(".,;:!?\"'`$\\{}")


def words(text: str) -> list[str]:
    """Words, numbers and operators in one spelling: compatibility forms, case, spaces and punctuation folded."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [w for w in _WORD.findall(folded) if w not in _IGNORED]


def normalise(text: str) -> str:
    """The normal form two texts are compared in."""
    return " ".join(words(text))


def same_problem(a: str, b: str) -> bool:
    """Whether two texts state one problem, up to case, spaces, punctuation and typesetting."""
    return normalise(a) == normalise(b)


class NGrams:
    """The n-grams of texts, in words, and which texts have one in common with another.

    A text shorter than n words is one gram, so that it overlaps with nothing but itself.
    Source: the 8-gram decontamination of open-r1, which RA-RFT's corpus has been through (arXiv 2606.13680).
    """

    def __init__(self, texts: Iterable[str], n: int = 8):
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        self.n = n
        self._where: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, text in enumerate(texts):
            for gram in self._grams(text):
                self._where[gram].append(i)

    def _grams(self, text: str) -> set[tuple[str, ...]]:
        w = words(text)
        return {tuple(w[i : i + self.n]) for i in range(max(1, len(w) - self.n + 1))} if w else set()

    def overlapping(self, text: str) -> set[int]:
        """Places, among the texts, of those with an n-gram of this one."""
        return {i for gram in self._grams(text) for i in self._where.get(gram, ())}


class LeakGuard:
    """What must not be shown beside a question.

    Args:
        benchmarks: texts of evaluation problems.  A document with an n-gram of one is dropped from the corpus.
        n: words of a gram.
        ngrams_of_questions: also keep a document from a question with which it shares an n-gram.  Off by default:
            problems made from one template share their wording, and that is no leak.

    The question's own problem is always kept from it.
    """

    def __init__(self, benchmarks: Iterable[str] = (), *, n: int = 8, ngrams_of_questions: bool = False):
        self.n, self.ngrams_of_questions = n, ngrams_of_questions
        self._benchmarks = NGrams(benchmarks, n)

    def filter(self, corpus: Sequence[Document]) -> tuple[list[Document], list[Document]]:
        """(kept, dropped) documents: dropped is what overlaps with a benchmark, in its problem or its trace."""
        kept: list[Document] = []
        dropped: list[Document] = []
        for document in corpus:
            leaks = any(self._benchmarks.overlapping(t) for t in (document.problem, document.trace))
            (dropped if leaks else kept).append(document)
        return kept, dropped

    def over(self, corpus: Sequence[Document]) -> CorpusGuard:
        """The guard of one corpus."""
        return CorpusGuard(corpus, self.n if self.ngrams_of_questions else None)


class CorpusGuard:
    """``blocked(question)``: places in the corpus of what must not be retrieved for it."""

    def __init__(self, corpus: Sequence[Document], n: int | None):
        self._same: dict[str, set[int]] = defaultdict(set)
        for i, document in enumerate(corpus):
            self._same[normalise(document.problem)].add(i)
        self._grams = None if n is None else NGrams((d.problem for d in corpus), n)

    def blocked(self, question: str) -> set[int]:
        found = set(self._same.get(normalise(question), ()))
        return found if self._grams is None else found | self._grams.overlapping(question)
