"""The command line: merging of options, one line for bad input, nothing half written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "methods"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("trl")

import tiny_models as tiny
import torch

from burnish.cli import main
from burnish.methods import options, sft_options


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "full").mkdir()
    (folder / "full" / "something").write_text("x")
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n')
    (folder / "ids.jsonl").write_text('{"input_ids": [3, 4, 500]}\n')
    (folder / "cut.jsonl").write_text('{"prompt": "abcdefgh", "completion": "b"}\n')
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (folder / "key.yaml").write_text("objectiv: nll\n")
    (folder / "type.yaml").write_text("max_steps: soon\n")
    (folder / "broken.yaml").write_text("a: [1\nb: 2\n")
    (folder / "list.yaml").write_text("- 1\n")
    other = tiny.tokenizer(extra="~^")
    tiny.save(folder / "model")
    tiny.save(folder / "teacher", tiny.llama(1), other)
    tiny.save(folder / "small", tiny.llama(1, vocabulary=50), tiny.tokenizer())
    student = tiny.tokenizer(extra="^~")
    tiny.save(folder / "student", tiny.llama(0), student)
    tiny.write_rows(folder / "rows.jsonl")
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {"model": "model", "data": "rows.jsonl", "output": "out", "objective": "nll", "max-steps": "1"}
CASES = {
    "unknown objective": ({"objective": "nil"}, "unknown objective 'nil'; known: asft"),
    "objective argument": ({"objective": "target_sft"}, "missing a required argument: 'eta'"),
    "surplus argument": ({"objective-arg": "eta=1"}, "objective nll() "),
    "argument range": ({"objective": "target_sft", "objective-arg": "eta=3"}, "eta must lie in"),
    "argument form": ({"objective-arg": "eta"}, "--objective-arg takes KEY=VALUE; got 'eta'"),
    "no teacher": ({"objective": "asft"}, "objective 'asft' needs a teacher"),
    "token weights": ({"objective": "cft"}, "needs token_weight with the data"),
    "missing data": ({"data": "none.jsonl"}, "none.jsonl: no such file"),
    "empty data": ({"data": "empty.jsonl"}, "empty.jsonl: no rows"),
    "malformed row": ({"data": "bad.jsonl"}, "bad.jsonl:3: 'prompt' without 'completion'"),
    "label outside": ({"data": "ids.jsonl"}, "row 1: token 500 is outside the vocabulary of 128"),
    "all cut off": ({"data": "cut.jsonl", "max-length": "5"}, "no label is left to train on"),
    "no chat template": ({"data": "chat.jsonl"}, "has no chat template"),
    "unknown task": ({"data": "reasoning-gym:chain_sums"}, "task 'chain_sums': did you mean chain_sum"),
    "task argument": ({"data": "reasoning-gym:chain_sum", "data-args": "{terms: 2}"}, "has no argument 'terms'"),
    "task value": ({"data": "reasoning-gym:chain_sum", "data-args": "{size: 0}"}, "size must be a whole number >= 1"),
    "task refused": ({"data": "reasoning-gym:chain_sum", "data-args": "{min_terms: 9, max_terms: 2}"}, "chain_sum: "),
    "args for a file": ({"data-args": "{size: 2}"}, "data-args go with reasoning-gym"),
    "args not yaml": ({"data-args": "{size"}, "--data-args must be a mapping"),
    "evaluation": ({"eval-size": "3"}, "--eval-size needs reasoning-gym data"),
    "missing model": ({"model": "./nowhere"}, "nowhere: no such directory"),
    "not a model": ({"model": "full"}, "has no config.json"),
    "missing teacher": ({"objective": "kd", "teacher": "/no/where"}, "/no/where: no such directory"),
    "tokenizers": ({"objective": "kd", "model": "student", "teacher": "teacher"}, "mismatched tokenizers: token '^'"),
    "small teacher": ({"objective": "kd", "teacher": "small"}, "the teacher's vocabulary has 50 entries"),
    "output in use": ({"output": "full"}, "is not empty; give --resume to go on or --overwrite"),
    "output is a file": ({"output": "rows.jsonl"}, "is not a directory"),
    "missing config": ({"config": "no.yaml"}, "config file no.yaml: no such file"),
    "yaml key": ({"config": "key.yaml"}, "unknown key 'objectiv'; did you mean objective"),
    "yaml type": ({"config": "type.yaml"}, "type.yaml: max_steps must be a whole number, at least 1; got 'soon'"),
    "yaml syntax": ({"config": "broken.yaml"}, "not YAML at line 2"),
    "yaml list": ({"config": "list.yaml"}, "a mapping of options is needed; got list"),
    "flag type": ({"batch-size": "two"}, "--batch-size must be a whole number"),
    "negative": ({"learning-rate": "-1"}, "--learning-rate must be a number, at least 0"),
    "both lengths": ({"epochs": "2"}, "--max-steps and --epochs exclude each other"),
    "both restarts": ({"resume": None, "overwrite": None}, "--resume and --overwrite exclude each other"),
    "set unknown": ({"set": "warmup_step=1"}, "SFTConfig has no such field; did you mean warmup_steps"),
    "set ours": ({"set": "max_steps=1"}, "--set max_steps: use --max-steps"),
    "set value": ({"set": "lr_scheduler_type=zigzag"}, "SFTConfig refuses these values"),
    "unknown flag": ({"lerning-rate": "1"}, "unrecognized arguments: --lerning-rate"),
    "no such data arg": ({"data": "reasoning-gym:zzzqqq"}, "there are"),
}  # fmt: skip


def arguments(changes: dict) -> list[str]:
    out = ["sft"]
    for key, value in {**BASE, **changes}.items():
        out += [f"--{key}"] if value is None else [f"--{key}", value]
    return out


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_written(case, paths, monkeypatch, capfd):
    monkeypatch.chdir(paths)
    before = sorted(paths.rglob("*"))
    changes, expected = CASES[case]
    assert main(arguments(changes)) == 2
    out, err = capfd.readouterr()
    assert err.startswith("burnish: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert expected in err and not out
    assert sorted(paths.rglob("*")) == before


@pytest.mark.parametrize("case", ["tokenizers", "unknown objective"])
def test_bad_input_in_a_process(case, paths):
    command = [sys.executable, "-m", "burnish.cli", *arguments(CASES[case][0])]
    done = subprocess.run(command, cwd=paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and CASES[case][1] in done.stderr, done.stderr
    assert not (paths / "out").exists()


def test_missing_required_and_no_command(capfd):
    assert main(["sft"]) == 2 and "--model is required" in capfd.readouterr().err
    assert main([]) == 2 and "COMMAND" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0


def test_flags_override_yaml_which_overrides_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: a\ndata: b\noutput: c\nlearning-rate: 1e-4\nbatch_size: 3\nobjective_args: {eta: 0.5, trust: 0.2}\n"
        "set: {warmup_steps: 5, weight_decay: 1e-2}\nresume: true\n"
    )
    got = sft_options.merge({"batch_size": "7", "objective_args": "{eta: 1}", "set": {"warmup_steps": 9}}, str(file))
    assert got["learning_rate"] == 1e-4 and got["batch_size"] == 7 and got["seed"] == 42 and got["resume"] is True
    assert got["objective_args"] == {"eta": 1, "trust": 0.2}
    assert got["set"] == {"warmup_steps": 9, "weight_decay": 0.01}
    assert sft_options.OPTIONS["set"].default == {}  # a default is never written to
    assert options.assignments(["a=1", "b=1e-3", "c=x", "d=null", "e=true"], "--set") == {
        "a": 1, "b": 1e-3, "c": "x", "d": None, "e": True,
    }  # fmt: skip


def test_scalars_are_those_of_yaml_1_2():
    read = options.parse_yaml
    assert read("[no, off, 1.5, -.5e3, 7, 2e-5, .inf, '1', 1.2.3, False, null]") == [
        "no", "off", 1.5, -500.0, 7, 2e-5, float("inf"), "1", "1.2.3", False, None,
    ]  # fmt: skip
    assert options.assignments(["save_strategy=no"], "--set") == {"save_strategy": "no"}


def test_a_run_from_yaml(paths, tmp_path, capfd):
    config = {
        "model": str(paths / "model"), "data": "reasoning-gym:chain_sum", "data_args": {"size": 8, "seed": 3},
        "objective_args": {"eta": 0.5}, "teacher": "self", "output": str(tmp_path / "out"), "max_steps": 2,
        "batch_size": 2, "logging_steps": 1, "eval_size": 2, "set": {"warmup_steps": 1},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["sft", "--config", str(tmp_path / "c.yaml"), "--learning-rate", "1e-3"]) == 0
    out, err = capfd.readouterr()
    assert "2 steps, mean training loss" in out and "of 2 new problems solved" in out and "loss=" in err
    assert len(json.loads((tmp_path / "out" / "evaluation.json").read_text())["answers"]) == 2
    record = json.loads((tmp_path / "out" / "burnish_sft.json").read_text())
    assert record["learning_rate"] == 1e-3 and record["objective"] == "target_sft"
    # going on with another objective is refused, starting anew is not
    again = ["sft", "--config", str(tmp_path / "c.yaml")]
    assert main([*again, "--resume"]) == 2
    assert "learning_rate is 2e-05, but the run in" in capfd.readouterr().err
    assert main([*again, "--overwrite", "--eval-size", "0", "--save-steps", "1"]) == 0
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_columns_that_are_not_read_are_named(paths, tmp_path, capfd):
    data = tiny.write_rows(tmp_path / "r.jsonl", [{"text": "abc", "id": 4}, {"text": "abd", "source": "x"}])
    run = ["sft", "--model", str(paths / "model"), "--data", data, "--output", str(tmp_path / "o")]
    assert main([*run, "--max-steps", "1", "--objective", "dft"]) == 0
    assert "burnish: columns that training does not read: id, source" in capfd.readouterr().err


def test_objectives_lists_them_all(capfd):
    from burnish.objectives import names

    assert main(["objectives"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *names()]
    (ours,) = (line for line in lines if line.startswith("target_sft "))
    assert "eta" in ours and "teacher" in ours and "2606.11189" in ours


def test_doctor(capfd):
    assert main(["doctor"]) == 0
    found = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    for name in ("python", "torch", "triton", "transformers", "trl", "CPU", "C++ compiler", "weights"):
        assert found[name].strip(), name
    assert "on cpu" in found["linear_loss"] and "on cpu" in found["row_loss"]

    if not torch.cuda.is_available():
        assert "none" in found["GPU"]


def test_burnish_imports_neither_transformers_nor_trl():
    code = (
        "import sys, burnish, burnish.methods, burnish.cli\n"
        "print([m for m in ('transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
