"""Labels: which pairs are judged, a file that survives a kill, and the measured benefit."""

import json

import pytest
import torch

from burnish.methods.ra_rft import LeakGuard, build_labels, rollout_benefit
from burnish.methods.ra_rft.corpus import as_corpus, as_questions, name_of
from burnish.methods.ra_rft.labels import Verdict


def world():
    questions = [
        {"prompt": "add 1 and 2", "answer": "3", "type": "sum"},
        {"prompt": "walk the tree", "answer": "x", "type": "graph"},
        {"prompt": "add 2 and 2", "answer": "4"},
    ]  # fmt: skip
    corpus = [
        {"problem": "add 5 and 1", "trace": "6", "type": "sum", "id": "a"},
        {"problem": "a tree of 3", "trace": "x", "type": "graph", "id": "b"},
        {"problem": "Add 1, and 2!", "trace": "3", "type": "sum", "id": "c"},
    ]  # fmt: skip
    return questions, corpus


def test_pairs_of_one_type_without_the_problem_itself(tmp_path):
    questions, corpus = world()
    asked = []

    def judge(question, document):
        asked.append((question.text, document.id))
        return Verdict(document.id == "a", {"why": "the same sum"})

    rows = build_labels(questions, corpus, judge, tmp_path / "labels.jsonl", progress=False)
    assert asked == [("add 1 and 2", "a"), ("walk the tree", "b"), *[("add 2 and 2", x) for x in "abc"]]
    assert rows == [json.loads(x) for x in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert rows[0] == {"question": name_of("add 1 and 2"), "document": "a", "label": True, "why": "the same sum"}
    asked.clear()
    build_labels(questions, corpus, judge, tmp_path / "all.jsonl", same_type=False, progress=False,
                 guard=LeakGuard(["a tree of 3"]))  # fmt: skip
    assert len(asked) == 5 and "b" not in [d for _, d in asked]
    asked.clear()
    some = {name_of("add 2 and 2"): ["c"]}
    build_labels(questions, corpus, judge, tmp_path / "some.jsonl", candidates=some, progress=False)
    assert asked == [("add 2 and 2", "c")]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    questions, corpus = world()
    path, asked = tmp_path / "deep" / "labels.jsonl", []

    def judge(question, document):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((question.id, document.id))
        return len(asked) % 2 == 0

    with pytest.raises(KeyboardInterrupt):
        build_labels(questions, corpus, judge, path, progress=False)
    with path.open("a") as file:
        file.write('{"question": "')  # cut in the middle of a line
    before, first = path.read_text(), list(asked)
    asked.clear()
    rows = build_labels(questions, corpus, lambda q, d: asked.append((q.id, d.id)) or True, path, progress=False)
    assert len(first) == 3 and len(asked) == 2 and not set(first) & set(asked)
    assert path.read_text().startswith(before.rsplit("\n", 1)[0]) and len(rows) == 5
    assert [r["label"] for r in rows] == [False, True, False, True, True]
    assert [json.loads(x) for x in path.read_text().splitlines()] == rows


def test_a_file_of_another_run_and_a_bad_verdict_are_refused(tmp_path):
    questions, corpus = world()
    path = tmp_path / "labels.jsonl"
    with pytest.raises(ValueError, match="must return a bool or a Verdict; got 1"):
        build_labels(questions, corpus, lambda q, d: 1, path, progress=False)
    path.write_text('{"question": "other", "document": "a", "label": true}\n')
    with pytest.raises(ValueError, match=r"'other'.*not a pair here"):
        build_labels(questions, corpus, lambda q, d: True, path, progress=False)
    path.write_text('{"question": "other", "label": true}\n')
    with pytest.raises(ValueError, match=r"labels.jsonl:1: a label needs"):
        build_labels(questions, corpus, lambda q, d: True, path, progress=False)
    for match, change in (
        ("judge must be callable", {"judge": "gpt"}),
        ("corpus is empty", {"corpus": []}),
        ("no questions", {"questions": []}),
        ("no column 'prompt'", {"questions": [{"question": "x"}]}),
        ("no pair", {"questions": questions[1:2], "corpus": corpus[:1]}),
        ("goes with judge='rollout'", {"rollout": {}}),
        ("needs rollout=", {"judge": "rollout"}),
    ):
        given = {"questions": questions, "corpus": corpus, "judge": lambda q, d: True, "path": tmp_path / "n.jsonl"}
        with pytest.raises(ValueError, match=match):
            build_labels(**{**given, **change}, progress=False)


class Parrot(torch.nn.Module):
    """Answers with the digit after the first "=" of its prompt, else with "7"."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.calls = tokenizer, []
        self.device = torch.device("cpu")

    def generate(self, ids, attention_mask, num_return_sequences, **_):
        text = self.tokenizer.decode(ids[0])
        self.calls.append((text, torch.rand(1).item()))
        said = text.split("=")[1][:1] if "=" in text else "7"
        said = self.tokenizer(said, return_tensors="pt")["input_ids"]
        return torch.cat([ids, said], 1).expand(num_return_sequences, -1)


def test_the_measured_benefit(tmp_path):
    """Reward with the document less reward without; the plain question is answered once, samples hang on the pair."""
    import tiny_models

    tokenizer = tiny_models.tokenizer()
    model = Parrot(tokenizer)
    seen = []

    def right(prompts, completions, answer, level, **_):
        seen.append((len(prompts), level))
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    questions = [{"prompt": "what is it?", "answer": "3", "level": 2}]
    corpus = [{"problem": "p", "trace": "it =3"}, {"problem": "q", "trace": "it =4"}, {"problem": "r", "trace": "none"}]
    made = {"model": model, "tokenizer": tokenizer, "reward": right, "samples": 4}
    rows = build_labels(questions, corpus, "rollout", tmp_path / "a.jsonl", rollout=made, progress=False)
    assert [r["label"] for r in rows] == [True, False, False]
    assert [r["benefit"] for r in rows] == [1.0, 0.0, 0.0] and rows[0]["without"] == 0.0
    assert seen == [(4, [2] * 4)] * 4 and sum("Problem: " in text for text, _ in model.calls) == 3
    first = [r for _, r in model.calls]
    model.calls.clear()
    judge = rollout_benefit(**made)
    judge(as_questions(questions)[0], as_corpus(corpus)[2])
    assert [r for _, r in model.calls] == [first[0], first[3]]  # whatever came before
    strict = rollout_benefit(**made, margin=1.0)
    assert strict(as_questions(questions)[0], as_corpus(corpus)[0]).label is False


@pytest.mark.parametrize("value", ["yes", float("nan"), float("inf"), [1.0], "short"])
def test_a_reward_that_is_no_number_is_named(value):
    import tiny_models

    tokenizer = tiny_models.tokenizer()

    def odd(completions, **_):
        return [] if value == "short" else [value] * len(completions)

    judge = rollout_benefit(Parrot(tokenizer), tokenizer, odd, samples=2)
    with pytest.raises(ValueError, match="reward odd must return"):
        judge(as_questions([{"prompt": "x"}])[0], as_corpus([{"problem": "p", "trace": "t"}])[0])
