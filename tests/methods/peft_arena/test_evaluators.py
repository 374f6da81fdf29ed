"""Suites against plain torch and against greedy generation; splits without a row in common."""

import json

import pytest
import tiny_models as tiny
import torch

from burnish.methods import accuracy
from burnish.methods.data import load_task
from burnish.methods.peft_arena.evaluators import SEEDS, SPLITS, Suite, encode, label_stats

TASK = {"evaluator": "task", "task": "chain_sum", "args": {"max_terms": 2, "max_digits": 1}, "size": 6}


@pytest.fixture(scope="module")
def model():
    return tiny.llama().eval()


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def plain(model, ids, labels):
    """(log-probability, first choice) of each labelled token, one row at a time, logits whole."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    target = torch.tensor(labels)[1:]
    keep = target != -100
    logp = logits.log_softmax(-1)[keep].gather(1, target[keep, None])[:, 0]
    return logp, logits[keep].argmax(-1) == target[keep]


def test_label_stats_are_plain_torch(model):
    batch = tiny.batch(size=5, length=12)
    sizes = (12, 7, 9, 12, 5)
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    rows = [(x[:n], y[:n]) for x, y, n in zip(ids, labels, sizes, strict=True)]
    with torch.no_grad():
        found = label_stats(model, rows, batch_size=2)
        for (ids, labels), (logp, hit) in zip(rows, found, strict=True):
            want, first = plain(model, ids, labels)
            assert torch.allclose(logp.double(), want, atol=2e-5) and torch.equal(hit.bool(), first)


def test_exact_is_the_greedy_answer(model, tok, tmp_path):
    """A row counts where generation gives its text; rows are made so that some do."""
    rows = []
    for i, prompt in enumerate(("1+2=", "7+", "abc", "x y", "09", "3+4=", "8-", "xyz", "a b", "57")):
        ids = torch.tensor([tok(prompt)["input_ids"]])
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        answer = tok.decode(out[0, ids.shape[1] :])
        if tok(prompt + answer)["input_ids"] != out[0].tolist():
            continue  # other tokens than the model's spell it
        rows.append({"prompt": prompt, "completion": answer if i % 3 else answer[:-1] + "@"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    suite = Suite("x", {"evaluator": "exact", "rows": str(file)})
    want = {s: rows[i::2] for i, s in enumerate(SPLITS)}
    for split in SPLITS:
        right = [not r["completion"].endswith("@") for r in want[split]]
        assert suite.score(model, tok, split) == sum(right) / len(right)
    by_token = Suite("x", {"evaluator": "exact", "rows": str(file), "by": "token"})
    assert by_token.score(model, tok, "test") > suite.score(model, tok, "test")


def test_task_is_the_verifiers_accuracy(model, tok):
    suite = Suite("x", {**TASK, "max_new_tokens": 4})
    data = load_task("chain_sum", size=24, seed=SEEDS["test"], max_terms=2, max_digits=1)
    entries = list({e["question"]: e for e in data.entries}.values())[:6]
    want = accuracy(model, tok, data.task, entries=entries, max_new_tokens=4, progress=False).mean
    assert suite.score(model, tok, "test") == want


def test_nll_is_the_likelihood(model, tok, tmp_path):
    text = "the cat sat on the mat, and then it ran away. " * 6
    (tmp_path / "text").write_text(text)
    suite = Suite("x", {"evaluator": "nll", "text": str(tmp_path / "text"), "size": 2, "length": 20})
    ids = tok(text)["input_ids"]
    windows = [ids[i : i + 20] for i in range(0, len(ids) - 19, 20)]
    seen = []
    for split, mine in zip(SPLITS, (windows[0::2], windows[1::2]), strict=True):
        chosen = mine[:: len(mine) // 2][:2]
        seen.append(chosen)
        assert suite.sample(tok, 9) == chosen if split == "held_out" else True
        with torch.no_grad():
            logp = torch.cat([plain(model, w, w)[0] for w in chosen])
        assert suite.score(model, tok, split) == pytest.approx(float(logp.mean().exp()), rel=1e-5)
    with pytest.raises(ValueError, match="too few for two different windows of 500"):
        Suite("x", {"evaluator": "nll", "text": str(tmp_path / "text"), "length": 500}).score(model, tok, "test")


def test_choice_takes_the_likeliest_option(model, tok, tmp_path):
    """Answers are what the mean over tokens prefers: by the sum the shortest option wins more often."""
    problems = [{"prompt": f"{i}+1=", "options": ["2", "33", "abcd"]} for i in range(8)]
    by_sum = []
    for p in problems:
        with torch.no_grad():
            scores = [plain(model, *encode(tok, p["prompt"], o))[0] for o in p["options"]]
        p["answer"] = int(torch.stack([s.mean() for s in scores]).argmax())
        by_sum.append(int(torch.stack([s.sum() for s in scores]).argmax()) == p["answer"])
    assert not all(by_sum)
    (tmp_path / "rows").write_text("".join(json.dumps(p) + "\n" for p in problems))
    for i, split in enumerate(SPLITS):
        given = {"evaluator": "choice", "rows": str(tmp_path / "rows")}
        assert Suite("x", given).score(model, tok, split) == 1
        assert Suite("x", {**given, "normalise": False}).score(model, tok, split) == sum(by_sum[i::2]) / 4


@pytest.mark.parametrize("more, message", [
    ({"answer": "1"}, "answer must be the number of an option, from 0 to 1; got '1'"),
    ({"answer": 7}, "answer must be the number of an option, from 0 to 1; got 7"),
    ({"answer": -1}, "got -1"),
    ({"answer": True}, "got True"),
    ({"options": "ab"}, "options must be a list of strings, not empty; got 'ab'"),
])  # fmt: skip
def test_an_answer_that_is_no_option_is_refused(tmp_path, more, message):
    rows = [{"prompt": f"{i}", "options": ["a", "b"], "answer": 1} for i in range(4)]
    rows[3] |= more
    (tmp_path / "rows").write_text("".join(json.dumps(p) + "\n" for p in rows))
    with pytest.raises(ValueError, match=f"^target: it: {message}" if message[0] in "ao" else message):
        Suite("target: it", {"evaluator": "choice", "rows": str(tmp_path / "rows")})


def test_a_function_and_splits(model, tok, monkeypatch):
    calls = []
    monkeypatch.setattr(tiny, "scored", lambda m, t, split, bonus: calls.append(split) or bonus, raising=False)
    suite = Suite("x", {"evaluator": "tiny_models:scored", "bonus": 0.25})
    assert suite.score(model, tok, "held_out") == 0.25 and calls == ["held_out"] and suite.sample(tok, 3) == []
    monkeypatch.setattr(tiny, "scored", lambda m, t, split, bonus: float("nan"))
    with pytest.raises(ValueError, match="x: the score is nan"):
        Suite("x", {"evaluator": "tiny_models:scored", "bonus": 1}).score(model, tok, "test")
    with pytest.raises(ValueError, match="split must be one of held_out, test; got 'train'"):
        suite.score(model, tok, "train")


def test_no_problem_is_in_two_splits():
    suite = Suite("x", {**TASK, "size": 20})
    rows = {}
    for split in SPLITS:
        rows[split] = {e["question"] for e in load_task(
            "chain_sum", size=1, seed=SEEDS[split], max_terms=2, max_digits=1).entries}  # fmt: skip
    assert len(suite.questions) == 40 and abs(SEEDS["test"] - SEEDS["held_out"]) > 10**5
    assert rows["test"] <= suite.questions


def test_rows_in_both_splits_are_refused(tok, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}+1=", "completion": "2"} for i in range(4)]
    monkeypatch.setattr(tiny, "alike", lambda split, size: rows, raising=False)
    with pytest.raises(ValueError, match=r"^retention: it: tiny_models:alike has 4 rows in both of held_out, test"):
        Suite("retention: it", {"evaluator": "exact", "rows": "tiny_models:alike"})
    file = tmp_path / "rows.jsonl"
    given = {"evaluator": "exact", "rows": str(file)}
    # other columns make no other row
    file.write_text("".join(json.dumps({**r, "id": i}) + "\n" for i, r in enumerate([*rows, rows[1], rows[3]])))
    with pytest.raises(ValueError, match=r"^x: .*rows.jsonl has 1 rows in both"):
        Suite("x", given)
    # ... of those that are read
    Suite("x", {**given, "size": 2})


def test_a_text_that_repeats_itself_has_each_window_once(tok, tmp_path):
    (tmp_path / "text").write_text("0123456789" * 5 + "abcdefghij" * 5)
    suite = Suite("x", {"evaluator": "nll", "text": str(tmp_path / "text"), "length": 10})
    assert [tok.decode(w) for w in suite.sample(tok, 9)] == ["0123456789"]


def test_encoding_labels_what_follows(tok):
    ids, labels = encode(tok, "ab=", "cd")
    assert tok.decode(ids) == "ab=cd" and labels == [-100] * 3 + ids[3:]


@pytest.mark.parametrize("given, message", [
    ({}, "a mapping with 'evaluator'"),
    ({"evaluator": "nope"}, r"evaluator \(or task, exact, nll, choice\)"),
    ({"evaluator": "task"}, "missing a required argument: 'task'"),
    ({**TASK, "siez": 3}, "got 'siez'"),
    ({**TASK, "size": 0}, "size must be a whole number, at least 1; got 0"),
    ({**TASK, "task": "chain_sun"}, "unknown reasoning-gym task"),
    ({"evaluator": "exact", "rows": "no.jsonl"}, "no such file, and no MODULE:FUNCTION"),
    ({"evaluator": "exact", "rows": "x:y", "by": "row"}, "by must be answer or token"),
    ({"evaluator": "nll", "text": "nowhere"}, "no such file"),
])  # fmt: skip
def test_errors_name_the_suite(given, message):
    with pytest.raises(ValueError, match=message) as error:
        Suite("target: it", given)
    assert str(error.value).startswith("target: it")
