"""``with_context``: the template, byte-identical prompts without a context, both forms of prompts, refusals."""

import pytest
from datasets import Dataset, IterableDataset

from burnish.methods.ra_rft import Template, with_context
from burnish.methods.ra_rft.context import contextual
from burnish.methods.ra_rft.corpus import Hit, as_corpus


class Shelf:
    """Finds the documents of the corpus in order, for questions that do not ask for nothing."""

    def __init__(self, *documents):
        self.corpus = as_corpus(documents or [
            {"problem": "1+1?", "trace": r"It is \boxed{2}, not {question}.", "id": "a"},
            {"problem": "2+{trace}?", "trace": "It is 5.", "id": "b"},
        ])  # fmt: skip
        self.asked = []

    def search(self, questions, k=1, *, progress=False):
        self.asked += questions
        return [
            [] if "nothing" in q else [Hit(i, d.id, 1.0 - i) for i, d in enumerate(self.corpus[:k])] for q in questions
        ]


def test_the_template():
    documents = Shelf().corpus
    assert Template()("Why?", documents[:1]) == (
        "Here is a solved problem that may use a related technique.\n"
        "Problem: 1+1?\nIt is \\boxed{2}, not {question}.\n\n"
        "Now solve the following problem and put the final answer in \\boxed{}.\nWhy?"
    )
    both = Template("{documents}-{question}", "[{problem}|{trace}]")
    assert both("{documents}", documents) == (
        "[1+1?|It is \\boxed{2}, not {question}.][2+{trace}?|It is 5.]-{documents}"
    )
    assert Template()("Why {question}?", []) == "Why {question}?"
    with pytest.raises(ValueError, match=r"'whole' must have \{documents\}"):
        Template("{question}")
    with pytest.raises(ValueError, match=r"'each' must have \{trace\}"):
        Template(each="{problem}")


@pytest.mark.parametrize("chat", [False, True], ids=["text", "messages"])
def test_prompts_are_rewritten_and_those_without_a_context_stay_as_they_are(chat):
    questions = ["Why?", "nothing \u00e4 \n ", "How?"]
    system = {"role": "system", "content": "Be brief. Why?"}
    prompts = [[system, {"role": "user", "content": q}] if chat else q for q in questions]
    data = Dataset.from_dict({"level": [1, 2, 3], "prompt": prompts, "answer": ["x", "y", "z"]})
    shelf = Shelf()
    got = with_context(data, shelf, k=2)
    assert shelf.asked == questions
    assert got.column_names == ["level", "prompt", "answer", "context_ids", "context_scores"]
    assert got.features["prompt"] == data.features["prompt"] and list(got["answer"]) == ["x", "y", "z"]
    assert got[1]["prompt"] == prompts[1] and got[1]["context_ids"] == []
    assert got[0]["context_ids"] == ["a", "b"] and got[0]["context_scores"] == [1.0, 0.0]
    want = Template()("Why?", shelf.corpus)
    assert got[0]["prompt"] == ([system, {"role": "user", "content": want}] if chat else want)
    assert data[0]["prompt"] == prompts[0]
    same = with_context(data, shelf, k=0)
    assert list(same["prompt"]) == prompts and same[0]["context_ids"] == []


def test_the_last_message_of_the_user_is_the_question():
    talk = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    ]
    got = contextual(talk, Shelf().corpus[:1], Template("{documents}{question}", "{problem}{trace}"))
    assert got[:2] == talk[:2] and got[2]["content"].endswith("Why?") and got[2]["content"].startswith("1+1?")
    with pytest.raises(ValueError, match="a user's text"):
        contextual([{"role": "system", "content": "x"}], [])


def test_refusals():
    data = Dataset.from_dict({"prompt": ["Why?"]})
    shelf = Shelf()
    with pytest.raises(ValueError, match="no column 'prompt'; it has question"):
        with_context(data.rename_column("prompt", "question"), shelf)
    with pytest.raises(ValueError, match="have a context already"):
        with_context(with_context(data, shelf), shelf)
    for k in (-1, 1.5, True):
        with pytest.raises(ValueError, match="k must"):
            with_context(data, shelf, k=k)
    with pytest.raises(TypeError, match="got IterableDataset"):
        with_context(IterableDataset.from_generator(lambda: iter([{"prompt": "x"}])), shelf)
    empty = with_context(data.select([]), shelf)
    assert len(empty) == 0 and "context_ids" in empty.column_names
