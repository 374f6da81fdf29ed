"""benchmarks/target_sft.py on a tiny scale: the rows are what the protocol says, and a killed study goes on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("study_script", ROOT / "benchmarks" / "target_sft.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def tiny(script):
    return script.Settings(
        methods=("sft", "target_0.5"), noises=(0.5,), seeds=(0, 1), sweep_seeds=(9,), sweep_noise=0.5, rates=(1e-3,),
        base_steps=2, strong_steps=2, pretrain_rows=20, rows=10, steps=2, batch_size=4, pretrain_batch_size=4,
        problems=4, width=16,
    )  # fmt: skip


def test_study_end_to_end_and_resumed(script, tiny, tmp_path, monkeypatch):
    result = script.study(tiny, tmp_path, workers=1)
    assert len(result["runs"]) == 2 + 4 and result["chosen"] == "target_0.5"
    row = result["summary"]["0.5"]["target_0.5"]
    assert row["mean"]["half"] is not None and set(row["minus"]) == {"sft"}
    json.dumps(result)
    # as if killed while the last line was written
    log = tmp_path / "runs.jsonl"
    log.write_text(log.read_text()[:-20])
    done, run = [], script.run
    monkeypatch.setattr(script, "run", lambda *a: done.append(a) or run(*a))
    again = script.study(tiny, tmp_path, workers=1)
    assert len(done) == 1
    assert again["summary"] == result["summary"]  # a run depends on its settings alone


def test_rows_are_what_the_protocol_says(script):
    settings = script.Settings(problems=30)
    rows, shares = script.demonstrations(settings, 200, 3, 0.3)
    entries = {}
    for task, data in script.held_out(settings, "test").items():
        pool = script.load_task(task, size=500, seed=4 * script.SET, **script.TASKS[task])
        entries |= {script.question(task, e): (pool.task, e) for e in pool.entries}
        held = {script.question(task, e) for e in data.entries}
        assert not held & {prompt for prompt, _ in rows}
    wrong = sum(entries[p][0].score_answer(a, entries[p][1]) < 1.0 for p, a in rows)
    assert wrong / len(rows) == pytest.approx(shares["corrupted"]) and 0.2 < shares["corrupted"] < 0.4
    assert 0.3 < shares["non_unique"] < 0.7
    tok = script.tokenizer()
    inputs, targets = script.encode(rows, tok)
    assert (inputs != tok.unk_token_id).all()
    # what is scored, read back, is the answer and its end
    assert tok.decode(targets[0][targets[0] >= 0]) == rows[0][1] + tok.eos_token
