"""R12: neither the question itself nor a benchmark's text is retrieved."""

import pytest

from burnish.methods.ra_rft import LeakGuard, Retriever, same_problem
from burnish.methods.ra_rft.corpus import as_corpus
from burnish.methods.ra_rft.leaks import NGrams, normalise


def corpus():
    return as_corpus([
        {"problem": "add 1 and 2", "trace": "the sum is 3"},
        {"problem": "mul 3 and 4", "trace": "step 1: the answer is 12"},
        {"problem": "div 8 of 4", "trace": "the answer is 2"},
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is 2+2?", "what  is 2 + 2", True),
        ("Find $x$ with \\frac{1}{2} x = 3.", "find x with frac 1 2 x = 3", True),
        ("\ufb01nd \uff38", "find x", True),  # ligatures and full-width letters
        ("What is 2+2?", "What is 2-2?", False),
        ("What is 22?", "What is 2 2?", False),
        ("x = 1.5", "x = 15", False),
        ("", "?", True),
    ],
)
def test_same_problem(a, b, same):
    assert same_problem(a, b) is same


def test_ngrams_of_eight_words():
    long = "one two three four five six seven eight nine ten"
    grams = NGrams([long, "unrelated text"])
    assert grams.overlapping("zero one TWO three four, five six seven eight") == {0}
    assert grams.overlapping("one two three four five six seven") == set()
    assert NGrams([long], 7).overlapping("one two three four five six seven!") == {0}
    assert grams.overlapping("unrelated text") == {1} and grams.overlapping("an unrelated text") == set()
    assert grams.overlapping("") == set()
    with pytest.raises(ValueError, match="n must"):
        NGrams([], 0)


def test_benchmarks_are_dropped_from_the_corpus():
    guard = LeakGuard(["step 1: the answer is 12"], n=5)
    kept, dropped = guard.filter(corpus())
    assert [d.problem for d in dropped] == ["mul 3 and 4"] and len(kept) == 2


def test_r12_the_question_itself_is_never_found_and_r1_of_the_identity_is_1(encoder):
    documents = corpus()
    texts = [d.text for d in documents]
    # without the guard's rule, documents are found by their own text: recall@1 of the identity is 1
    found = Retriever(encoder, documents).search(texts, 3)
    assert [row[0].place for row in found] == [0, 1, 2] and all(abs(row[0].score - 1) < 1e-5 for row in found)
    for late in (False, True):
        retriever = Retriever(encoder, documents, late_interaction=late)
        for i, row in enumerate(retriever.search([f"  {d.problem.upper()}?" for d in documents], 3)):
            assert len(row) == 2 and i not in [h.place for h in row]
        assert [len(row) for row in retriever.search(["add 5 and 2"], 9)] == [3]
    strict = Retriever(encoder, documents, guard=LeakGuard(n=3, ngrams_of_questions=True))
    assert {h.place for h in strict.search(["add 1 and 9"], 3)[0]} == {1, 2}


def test_an_empty_corpus_is_an_error(encoder):
    with pytest.raises(ValueError, match="corpus is empty"):
        Retriever(encoder, [])
    with pytest.raises(ValueError, match="overlap with benchmarks"):
        Retriever(encoder, corpus()[:1], guard=LeakGuard(["add 1 and 2"]))
    assert normalise("A  b.") == "a b"
