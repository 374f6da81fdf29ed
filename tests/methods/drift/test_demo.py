"""The demo: the toy is the one described, every arm runs, and the page shows what was measured."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from burnish.cli import main
from burnish.methods.drift import demo
from burnish.methods.drift.demo_options import DriftDemoOptions

ROOT = Path(__file__).parents[3]


def test_the_script_is_the_policy_that_is_described():
    rng = random.Random(0)
    first, again, fresh, total = 0, 0, 0, 4000
    for _ in range(total):
        words = demo.scripted(rng, 4)
        symbols, mode, answers = words[:4], words[4], words[6::4]
        assert len(set(symbols)) == 4 and set(symbols) <= set(demo.SYMBOLS) and mode in ("easy", "hard")
        assert len(answers) == 4 and set(answers) <= set(symbols)
        first += answers[0] == max(symbols)
        again += sum(a == b for a, b in pairwise(answers))
        fresh += mode == "hard"
    assert first / total == pytest.approx(demo.PREFERS, abs=0.03)
    assert again / total / 3 == pytest.approx(demo.REPEATS, abs=0.02)
    assert fresh / total == pytest.approx(0.5, abs=0.03)


def test_the_reference_is_fitted_to_what_it_is_asked():
    """The script's words are the chat template's, so the engine's prompts begin as the fitted conversations do."""
    tok = demo.tokenizer()
    words = demo.scripted(random.Random(1), 3)
    messages = [{"role": "user", "content": " ".join(words[:5])}]
    for turn, answer in enumerate(words[6::4]):
        messages.append({"role": "assistant", "content": answer})
        if turn < 2:
            messages.append({"role": "user", "content": demo.FEEDBACK})
    assert tok.apply_chat_template(messages, tokenize=False).split() == words
    assert tok(" ".join(words))["input_ids"] == tok.convert_tokens_to_ids(words)
    assert tok.unk_token_id not in tok.convert_tokens_to_ids(words)


def test_prompts_are_fresh_and_verified():
    found = demo.prompts(3, 1400)
    texts = [p.messages[0]["content"] for p in found]
    assert len(set(texts)) == 1400
    for p, text in zip(found, texts, strict=True):
        *symbols, mode = text.split()
        assert p.entry == (max(symbols) if mode == "easy" else min(symbols))
    assert demo.verifier(" 7 ", "7") == (1.0, "7") and demo.verifier("6", "7") == (0.0, "6")
    assert demo.verifier("", "7") == (0.0, None)


def test_every_arm_runs(tmp_path, capsys):
    out = tmp_path / "demo"
    arguments = ["--seeds", "2", "--prompts", "12", "--trajectories", "4", "--turns", "2", "--steps", "2"]
    arguments += ["--batch-size", "4", "--reference-steps", "3", "--problems", "20", "--output", str(out)]
    assert main(["demo", "drift", *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == [demo.REFERENCE, *demo.ARMS] and len(demo.ARMS) == 6
    for runs in results["arms"].values():
        assert len(runs) == 2 and all(0 <= r[c] <= 1 for r in runs for c in demo._COLUMNS)
    assert results["episodes"][0]["prompts"] == 12 and results["episodes"][0]["episodes"] == 48
    assert demo.table(results) in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["curves.png", "results.json"]


def test_intervals():
    mean, half = demo.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert math.isnan(demo.interval([1.0])[1])


@pytest.mark.parametrize("flag, value", [("--seeds", "0"), ("--learning-rate", "0"), ("--problems", "3000")])
def test_bad_options(flag, value, tmp_path, capsys):
    assert main(["demo", "drift", flag, value, "--output", str(tmp_path / "x")]) == 2
    assert flag[2:] in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_page_shows_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo_drift.json").read_text())
    assert results["options"]["seeds"] == 5
    assert {**DriftDemoOptions().__dict__, "output": ""} == {**results["options"], "output": ""}
    assert demo.table(results) in (ROOT / "docs" / "drift.md").read_text()
