"""Stopped anywhere and resumed: every snapshot and the optimizer's state have the bits of a run that nobody stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import q0_tiny as q0
import tiny_models as tiny
import torch
from transformers import TrainerCallback

from burnish.methods import checkpoints
from burnish.methods.q0 import snapshots
from burnish.methods.q0 import trainer as trainer_module

EVERY = {"cycles": 3, "epochs_per_cycle": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}


class Stopped(BaseException):
    """As a kill: nothing cleans up after it but what the interpreter does."""


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    t = q0.trainer(folder, **EVERY)
    t.train()
    return folder, t.plan


def go_on(folder, whole):
    newest, broken = checkpoints.newest(folder)
    for path, _ in broken:
        checkpoints.set_aside(path)
    t = q0.trainer(folder, **EVERY)
    t.train(resume_from_checkpoint=str(newest) if newest else None)
    q0.assert_same(folder, whole)
    a, b = (torch.load(p / f"checkpoint-{t.plan.ends[-1]}" / "optimizer.pt") for p in (folder, whole))
    for i, state in a["state"].items():
        assert all(torch.equal(v, b["state"][i][k]) for k, v in state.items())
    assert a["param_groups"] == b["param_groups"]


@pytest.mark.parametrize("where", ["first cycle", "last step of a cycle", "after a cycle", "before any checkpoint"])
def test_stopped_at_a_step(where, whole, tmp_path):
    folder, plan = whole
    step = {
        "first cycle": plan.ends[0] - 2, "last step of a cycle": plan.ends[1] - 1, "after a cycle": plan.ends[1] + 3,
        "before any checkpoint": 1,
    }[where]  # fmt: skip
    with pytest.raises(Stopped):
        q0.trainer(tmp_path, callbacks=[StopAt(step)], **EVERY).train()
    go_on(tmp_path, folder)


def test_resumed_exactly_at_a_cycles_end(whole, tmp_path):
    """From the checkpoint of a boundary: its weights are perturbed already, its teacher is on disk."""
    folder, plan = whole
    options = {**EVERY, "save_steps": plan.ends[0]}
    with pytest.raises(Stopped):
        q0.trainer(tmp_path, callbacks=[StopAt(plan.ends[0] + 2)], **options).train()
    assert checkpoints.newest(tmp_path)[0].name == f"checkpoint-{plan.ends[0]}"
    go_on(tmp_path, folder)


@pytest.mark.parametrize("where", ["weights", "fitness", "record", "noise"])
def test_stopped_within_a_cycles_end(where, whole, tmp_path, monkeypatch):
    """While the second snapshot's weights are written, before its fitness, before its mark, before the noise."""
    module, name = {
        "weights": (snapshots, "write_json"), "fitness": (snapshots, "write_log_probs"),
        "record": (snapshots, "finish"), "noise": (trainer_module, "perturb"),
    }[where]  # fmt: skip
    real, calls = getattr(module, name), []

    def stop(*arguments):
        calls.append(arguments)
        if where == "weights" and "cycle-001" not in str(arguments[0]):
            return real(*arguments)
        if where != "weights" and len(calls) == 1:
            return real(*arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(Stopped):
            q0.trainer(tmp_path, **EVERY).train()
    second = tmp_path / "cycle-001"
    assert (second / "model.safetensors").is_file() == (where != "weights")
    assert snapshots.whole(second) == (where == "noise")
    go_on(tmp_path, whole[0])


def test_a_lost_snapshot_is_named(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole[0], copy)
    (copy / "cycle-001" / "snapshot.json").unlink()
    with pytest.raises(ValueError, match=r"the snapshot .*cycle-001 is missing or not whole"):
        q0.trainer(copy, **EVERY).train(resume_from_checkpoint=str(checkpoints.newest(copy)[0]))


def test_killed_and_resumed_from_the_command_line(tmp_path):
    """SIGKILL in a process of its own, saving at every step."""
    from burnish.cli import main

    text = tmp_path / "text.jsonl"
    tiny.write_rows(text, [{"text": f"{i} and {i * i}, then {i % 7}; " * 3} for i in range(24)])
    shape = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    (tmp_path / "q0.yaml").write_text(
        f"architecture: {shape}\ntokenizer: bytes\ndata: {text}\ncycles: 6\nseq_length: 32\nbatch_size: 4\n"
        "save_steps: 1\n"
        "fitness_share: 0.1\ndistill_after_cycles: 1\nlogging_steps: 20\n"
    )
    config = str(tmp_path / "q0.yaml")
    assert main(["q0", config, "--output", str(tmp_path / "whole")]) == 0
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "burnish.cli", "q0", config, "--output", str(cut)]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (cut / "trajectory-0" / "cycle-002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "the run ended before it was killed: give it more cycles"
    assert main(["q0", config, "--output", str(cut), "--resume"]) == 0
    q0.assert_same(cut / "trajectory-0", tmp_path / "whole" / "trajectory-0")
    for name in ("weights.json", "report.json", "fitness.safetensors"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
