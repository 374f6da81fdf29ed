"""``burnish drift``: every stage, a kill at every stage, and what is wrong with the input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from drift_cases import episode, episodes
from safetensors.torch import load_file

from burnish.cli import main
from burnish.methods.drift import episodes as collection
from burnish.methods.drift import read_episodes, run
from burnish.methods.drift.options import OPTIONS, OWN_FIELDS
from burnish.methods.drift.returns import WeightOptions

TASK = "{size: 3, seed: 1, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), tiny.llama(), tiny.tokenizer(chat=True))


def command(model: str, output: Path, *more: str) -> list[str]:
    return [
        "drift", "--model", model, "--data", "reasoning-gym:chain_sum", "--data-args", TASK, "--output", str(output),
        "--trajectories", "4", "--max-turns", "2", "--max-new-tokens", "4", "--rollout-batch", "5", "--refresh", "1",
        "--batch-size", "4", "--accumulation", "2", "--max-steps", "3", "--save-steps", "1", "--learning-rate", "1e-2",
        "--logging-steps", "1", *more,
    ]  # fmt: skip


def files(folder: Path) -> dict:
    """What a run leaves, bit for bit."""
    out: dict = {}
    for name in ("round-0", "round-1"):
        out[name] = [
            (folder / name / "episodes.jsonl").read_bytes(),
            json.loads((folder / name / run.DONE).read_text()),
        ]
        out[name] += [(k, v.numpy().tobytes()) for k, v in load_file(folder / name / "model.safetensors").items()]
        state = torch.load(folder / name / "checkpoint-3" / "optimizer.pt")["state"]
        out[name] += [v.numpy().tobytes() for s in state.values() for v in s.values()]
    return out


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(model, output, "--eval-size", "4")) == 0
    return output


def test_two_rounds(whole, model, capsys):
    first, second = (read_episodes(whole / f"round-{i}" / "episodes.jsonl") for i in range(2))
    assert len(first) == len(second) == 12
    assert [e.messages for e in first] != [e.messages for e in second]
    settings = [json.loads((whole / f"round-{i}" / "episodes.settings.json").read_text()) for i in range(2)]
    assert [s["seed"] for s in settings] == ["42/0", "42/1"]
    done = json.loads((whole / "round-1" / run.DONE).read_text())
    assert done["prompts"] == 3 and done["episodes"] == 12 and done["steps"] == 3
    start, one, two = (load_file(f / "model.safetensors") for f in (Path(model), whole / "round-0", whole / "round-1"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[name], one[name]) and not torch.equal(one[name], two[name])
    assert len(json.loads((whole / "evaluation.json").read_text())["solved_at"]) == 4
    history = json.loads((whole / "round-0" / "trainer_state.json").read_text())["log_history"]
    for name in ("weight_mean", "weight_entropy", "effective_sample_size", "success_share"):
        assert name in history[0]
    assert main(command(model, whole, "--resume")) == 0  # nothing is left to do
    assert "round 1 is done" in capsys.readouterr().err


class Killed(BaseException):
    pass


def kill_after(monkeypatch, owner, name: str, calls: int) -> None:
    real, seen = getattr(owner, name), []

    def counted(*args, **kw):
        seen.append(1)
        if len(seen) > calls:
            raise Killed
        return real(*args, **kw)

    monkeypatch.setattr(owner, name, counted)


STAGES = {
    "in the episodes": (collection.os, "fsync", 7),
    "before training": (run.DriftTrainer, "train", 0),
    "in training": (run.DriftTrainer, "training_step", 5),
    "in round 1's episodes": (collection.os, "fsync", 17),
    "before round 1 is recorded": (run, "write_json", 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed(stage, model, whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, *STAGES[stage])
        main(command(model, output))
    assert not (output / "round-1" / run.DONE).exists()
    assert main(command(model, output, "--resume")) == 0
    assert files(output) == files(whole)


def test_killed_and_resumed(model, whole, tmp_path):
    """SIGKILL of a process of its own, while it trains."""
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "burnish.cli", *command(model, output)], stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (output / "round-0" / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(command(model, output, "--resume")) == 0
    assert files(output) == files(whole)


def test_a_round_plays_and_trains_the_policy_of_the_one_before(model, tmp_path, monkeypatch):
    loaded, played, trained = [], [], []
    load, engine, train = run.load_model, run.TransformersEngine, run.DriftTrainer

    def loading(name):
        loaded.append((name, load(name)))
        return loaded[-1][1]

    monkeypatch.setattr(run, "load_model", loading)
    monkeypatch.setattr(run, "TransformersEngine", lambda m, *a, **k: played.append(m) or engine(m, *a, **k))
    monkeypatch.setattr(run, "DriftTrainer", lambda m, *a, **k: trained.append(m) or train(m, *a, **k))
    assert main(command(model, tmp_path / "run", "--max-steps", "1")) == 0
    assert [name for name, _ in loaded] == [model, str(tmp_path / "run" / "round-0")]
    for i, (_, (policy, _)) in enumerate(loaded):
        assert policy is played[i] is trained[i]


def test_collect_only_and_then_a_file(model, whole, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(command(model, output, "--collect-only")) == 0
    assert "weight_entropy" in capsys.readouterr().out
    file = output / "round-0" / "episodes.jsonl"
    assert file.read_bytes() == (whole / "round-0" / "episodes.jsonl").read_bytes()
    assert sorted(p.name for p in (output / "round-0").iterdir()) == ["episodes.jsonl", "episodes.settings.json"]
    other = tmp_path / "file"
    short = ["--batch-size", "4", "--accumulation", "2", "--max-steps", "3", "--save-steps", "1"]
    short += ["--learning-rate", "1e-2", "--model", model, "--output", str(other)]
    assert main(["drift", "--episodes", str(file), *short]) == 0
    a, b = (load_file(f / "round-0" / "model.safetensors") for f in (whole, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert main(command(model, output, "--resume")) == 0
    assert files(output) == files(whole)


def test_options_of_the_method_reach_it():
    defaults = WeightOptions()
    for name in WeightOptions.__dataclass_fields__:
        assert OPTIONS[name].default == getattr(defaults, name) and name in OWN_FIELDS


BAD = {
    "--model is required": ["drift", "--output", "x"],
    "--data is required to collect episodes": ["drift", "--model", "MODEL", "--output", "x"],
    "--refresh collects again: it needs --data": ["drift", "--model", "MODEL", "--output", "x", "--episodes", "f",
                                                  "--refresh", "1"],
    "exclude each other": ["drift", "--model", "MODEL", "--output", "x", "--data", "d", "--episodes", "f",
                           "--collect-only"],
    "--engine vllm and --server go together": ["--engine", "vllm"],
    "--refresh needs --engine transformers": ["--engine", "vllm", "--server", "http://localhost:1"],
    "--drift-beta must be a number": ["--drift-beta", "nan"],
    "vLLM is not installed": ["--engine", "vllm", "--server", "http://localhost:1", "--refresh", "0"],
    "--supervise must be one of last, all; got 'first'": ["--supervise", "first"],
    "gamma must be a number between 0.0 and 1.0; got 2.0": ["--gamma", "2"],
    "--top-p must be above 0": ["--top-p", "0"],
    "answer pattern '(': ": ["--answer-pattern", "("],
    "unknown reasoning-gym task 'chain_sun'": ["--data", "reasoning-gym:chain_sun"],
    "no such file": ["--episodes", "nothing.jsonl"],
    "--set drift_beta: use --drift-beta": ["--set", "drift_beta=1"],
    "DriftConfig has no such field": ["--set", "drift_bata=1"],
    "is not empty; give --resume": ["--output", "USED"],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, model, whole, tmp_path, capsys):
    arguments = BAD[message]
    if arguments[0] != "drift":
        arguments = [*command("MODEL", tmp_path / "out"), *arguments]
    places = {"MODEL": model, "USED": str(whole)}
    before = sorted(tmp_path.rglob("*"))
    assert main([places.get(a, a) for a in arguments]) in (2,)
    err = capsys.readouterr().err
    assert message in err and err.startswith("burnish: error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_episode_files_are_one_line(model, tmp_path, capsys):
    file = tmp_path / "episodes.jsonl"
    arguments = ["drift", "--model", model, "--episodes", str(file), "--output", str(tmp_path / "out")]
    good = episodes()[0].line()
    for line, message in (
        (b'{"prompt_id": 1}', "missing column 'messages'"),
        (good.replace(b'"rewards": [1.0]', b'"rewards": ["1"]'), "must be a finite number; got '1'"),
        (good.replace(b'"rewards": [1.0]', b'"rewards": [NaN]'), "must be a finite number; got nan"),
        (good.replace(b'"rewards": [1.0]', b'"rewards": []'), "is empty: an episode has at least one turn"),
        (b"", "there are none"),
    ):
        file.write_bytes(line + b"\n")
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    file.write_bytes(episode("p", 0, ["1"], False).line())
    assert main([*arguments, "--weighting", "rejection"]) == 2
    assert "none of 1 episodes is solved" in capsys.readouterr().err
    collection.settings_file(file).write_text('{"trajectories": 2}')
    assert main(arguments) == 2
    assert "prompt 'p' has 1 of 2 trajectories" in capsys.readouterr().err


def test_nothing_solved_is_said_when_it_is_known(model, tmp_path):
    with pytest.raises(SystemExit, match=r"burnish: error: .*none of 12 episodes is solved"):
        main(command(model, tmp_path / "run", "--weighting", "rejection"))


def test_several_processes_train_on_a_file_only(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(model, tmp_path / "run")) == 2
    assert "episodes are played by one process" in capsys.readouterr().err


def test_a_yaml_file(model, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\ndata: reasoning-gym:chain_sum\noutput: {tmp_path / 'out'}\ndrift-bata: 1\n")
    assert main(["drift", "--config", str(file)]) == 2
    assert "unknown key 'drift-bata'; did you mean drift_beta" in capsys.readouterr().err
