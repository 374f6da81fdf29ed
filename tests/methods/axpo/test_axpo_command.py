"""`burnish axpo`: data, tool and reward from options; a run with real sampling that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import axpo_tiny as toy
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from transformers import AddedToken
from transformers.utils import get_json_schema as schema

from burnish.cli import main
from burnish.methods.axpo.calculator import calculator
from burnish.methods.axpo.questions import exact, final_answer, load_questions, reward_function


@pytest.mark.parametrize(("expression", "want"), [
    ("3 + 4", "7"), (" (3+4)*2 ", "14"), ("7/2", "3.5"), ("8/2", "4"), ("7//2", "3"), ("-7 % 3", "2"),
    ("2**10", "1024"), ("1e3", "1000"), ("0.1+0.2", "0.3"),
    ("10**20", "100000000000000000000"), ("-(-3)", "3"), ("1/3", "0.333333333333"),
])  # fmt: skip
def test_calculator(expression, want):
    assert calculator(expression) == want


@pytest.mark.parametrize(("expression", "text"), [
    ("", "must be a string"), (None, "must be a string"), ("1/0", "division by zero"), ("1%0", "division by zero"),
    ("2**1000", "an exponent is larger"), ("9**99**2", "exponent is larger"), ("(10**99)*(10**99)", "too large"),
    ("1e308*10", "too large"), ("(-1)**0.5", "root of a negative"), ("__import__('os')", "only numbers"),
    ("a+1", "only numbers"), ("'a'*9", "only numbers"), ("True+1", "only numbers"), ("[1]", "only numbers"),
    ("1 if 1 else 2", "only numbers"), ("3 +", "not an arithmetic expression"), ("(" * 150, "not an arithmetic"),
    ("1+" * 120 + "1", "longer than 200"), ("x=1", "not an arithmetic"), ("\\0", "not an arithmetic"),
    ("1e308**9", "too large"), ("lambda: 1", "only numbers"), ("1j", "only numbers"),
])  # fmt: skip
def test_calculator_refuses(expression, text):
    with pytest.raises(ValueError, match=text):
        calculator(expression)


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def test_answers_and_rewards():
    assert final_answer(message("so <answer>1</answer> or <answer> 42\n</answer>.")) == "42"
    assert final_answer(message(" 42 ")) == "42"
    assert final_answer(message("7", "tool")) == final_answer([]) == final_answer([{"role": "assistant"}]) == ""
    assert exact([message("4 "), message("5")], [4, "6"]) == [1.0, 0.0]
    rows, task = load_questions("reasoning-gym:chain_sum", {"size": 3, "seed": 1}, "Be brief.")
    assert [m["role"] for m in rows[0]["prompt"]] == ["system", "user"] and [r["entry"] for r in rows] == [0, 1, 2]
    verify = reward_function("auto", rows, task)
    right = [message(f"<answer>{e['answer']}</answer>") for e in task.entries]
    assert verify(right, entry=[0, 1, 2]) == [1, 1, 1] and verify(right[1:], entry=[0, 0]) == [0, 0]
    # a partial score is not right
    assert task.task.score_answer("the answer is " + task.entries[0]["answer"], task.entries[0]) < 1


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """(folder, data) of a tiny model that has learnt to call the calculator, with digits that it draws."""
    folder = tmp_path_factory.mktemp("caller")
    tok, model = toy.tokenizer(), toy.model()
    opening, begin, end = "<tool_call>", '\n{"name": "calculator", "arguments": {"expression": "', '"}}\n</tool_call>'
    tok.add_tokens([AddedToken(x, normalized=False) for x in (opening, begin, end, json.dumps(schema(calculator)))])
    generator = torch.Generator().manual_seed(0)
    rows, starts = [], []
    for i in range(48):
        x, y, a, b = torch.randint(1, 5, (4,), generator=generator).tolist()
        prompt = tok.apply_chat_template(message(f"{x}+{y}", "user"), tools=[calculator], add_generation_prompt=True)
        said = f"{opening}{begin}{a}+{b}{end}" if i % 3 else str(a + b)
        if i % 6 == 1:  # behind the tool's answer, that answer
            said += f"{toy.END}\n{toy.START}user\n<tool_response>\n{a + b}\n</tool_response>{toy.END}\n"
            said += f"{toy.START}assistant\n{a + b}"
        starts.append(len(prompt["input_ids"]))
        rows.append(prompt["input_ids"] + tok(said + toy.END, add_special_tokens=False)["input_ids"])
    width = max(map(len, rows))
    ids = torch.tensor([r + [tok.pad_token_id] * (width - len(r)) for r in rows])
    labels = ids.masked_fill(ids == tok.pad_token_id, -100)
    for row, start in zip(labels, starts, strict=True):
        row[:start] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data = folder / "rows.jsonl"
    tiny.write_rows(data, [{"prompt": f"{x}+{y}", "answer": str(x + y)} for x in range(1, 5) for y in range(1, 5)])
    return tiny.save(folder / "model", model, tok), str(data)


def command(caller, output, *more):
    return ["axpo", "--model", caller[0], "--data", caller[1], "--system", "", "--output", str(output), "--generations",
            "4", "--resamples", "2", "--budget", "1.0", "--batch-size", "16", "--learning-rate", "1e-3",
            "--max-completion-length", "100", "--logging-steps", "1", "--max-steps", "4", "--save-steps", "1",
            *more]  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_killed_and_resumed_to_the_same_bits(caller, tmp_path, capfd):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(caller, whole)) == 0
    logs = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert sum(e.get("axpo/resampled_rows", 0) for e in logs) > 0, "no call was tried again: nothing is tested"
    process = subprocess.Popen(
        [sys.executable, "-m", "burnish.cli", *command(caller, cut)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (cut / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    capfd.readouterr()
    assert main(command(caller, cut, "--resume")) == 0
    assert "resuming from checkpoint-" in capfd.readouterr().err
    assert same(whole, cut)
    assert main(command(caller, whole)) == 2 and "is not empty; give --resume" in capfd.readouterr().err
    assert main(command(caller, cut, "--resume", "--budget", "0.5")) == 2
    assert "--resume: budget is 0.5, but the run in" in capfd.readouterr().err


def test_yaml_modules_and_trls_head(caller, tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text(
        'def double(expression: str) -> str:\n    """Doubles.\n\n    Args:\n        expression: a number.\n    """\n'
        "    return '2'\n\n\ndef score(completions, **_):\n    return [1.0 for _ in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"model: {caller[0]}\ndata: {caller[1]}\noutput: out\nhead: trl\ntool: calculator, mine:double\n"
        "reward: mine:score\n"
        "max-steps: 1\ngenerations: 2\nbatch-size: 4\nmax-completion-length: 20\nset: {beta: 0.0, temperature: 0.9}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["axpo", "--config", "run.yaml", "--logging-steps", "1"]) == 0
    assert "1 steps, mean training loss" in capfd.readouterr().out
    record = json.loads((tmp_path / "out" / "burnish_axpo.json").read_text())
    assert record["head"] == "trl" and record["set"] == {"beta": 0.0, "temperature": 0.9}


@pytest.mark.parametrize(("more", "text"), [
    (["--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--data", "{}/empty.jsonl"], "empty.jsonl: no rows"),
    (["--data", "{}/noprompt.jsonl"], "noprompt.jsonl:1: a row needs a prompt; got answer"),
    (["--data", "{}/blank.jsonl"], "blank.jsonl:1: 'prompt' is empty"),
    (["--data", "{}/uneven.jsonl"], "uneven.jsonl:2: this row has prompt, the first answer, prompt"),
    (["--data", "{}/noanswer.jsonl"], "--reward exact reads the column answer; the data have prompt"),
    (["--data", "reasoning-gym:chain_sums"], "unknown reasoning-gym task 'chain_sums'"),
    (["--data-args", "size=3"], "data-args must be a mapping"),
    (["--data-args", "{{size: 3}}"], "data-args go with reasoning-gym:TASK"),
    (["--reward", "verifier"], "--reward verifier needs reasoning-gym data"),
    (["--reward", "score"], "--reward must be one of its names or MODULE:FUNCTION; got 'score'"),
    (["--reward", "json:nothing"], "--reward json:nothing: cannot be imported: module 'json' has no"),
    (["--tool", "no_such_module:f"], "--tool no_such_module:f: cannot be imported: No module named"),
    (["--tool", "json:__name__"], "--tool json:__name__: is not callable"),
    (["--norm", "rows"], "--norm must be one of token_mean, row"),
    (["--set", "num_generations=4"], "--set num_generations: use --generations"),
    (["--set", "bata=1"], "AXPOConfig has no such field; did you mean beta"),
    (["--set", "scale_rewards=batch"], "AXPO does not support scale_rewards='batch'"),
    (["--set", "tool_call_open=<call>"], "tool_call_open='<call>' is not how the chat template writes a call"),
    (["--chat-template", "none.jinja"], "chat template none.jinja: no such file"),
    (["--chat-template", "{}/plain.jinja"], "does not write tool calls"),
    (["--model", "{}/plain"], "the model's chat template does not know tools: give one with --chat-template"),
    (["--generations", "7"], "must be divisible by num_generations"),
], ids=lambda v: str(v)[:40])  # fmt: skip
def test_errors(caller, tmp_path, capfd, more, text):
    files = {"empty": "\n", "noprompt": '{"answer": 1}\n', "blank": '{"prompt": " ", "answer": 1}\n',
             "uneven": '{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n', "noanswer": '{"prompt": "a"}\n'}  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "plain.jinja").write_text(tiny.CHAT)
    if "{}/plain" in more:
        tiny.save(tmp_path / "plain")
    output = tmp_path / "out"
    given = command(caller, output)
    for flag, value in zip(more[::2], more[1::2], strict=True):
        value = value.format(tmp_path)
        if flag in given:
            given[given.index(flag) + 1] = value
        else:
            given += [flag, value]
    assert main(given) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("burnish: error: ") and text in error
    assert not output.exists()
