"""Kill and resume: bit for bit the run that nobody killed; a half-written checkpoint harms nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.methods import checkpoints


def command(model: str, data: str, output: Path, *more: str) -> list[str]:
    return [
        "sft", "--model", model, "--data", data, "--output", str(output), "--objective", "target_sft",
        "--objective-arg", "eta=0.5", "--teacher", "self", "--batch-size", "2", "--accumulation", "2",
        "--learning-rate", "1e-2", "--logging-steps", "1", *more,
    ]  # fmt: skip


def equal(a: Path, b: Path) -> bool:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def step_of(folder: Path) -> int:
    return max((int(p.name[11:]) for p in folder.glob("checkpoint-*")), default=0)


def run(arguments, output: Path, kill_after: float | None = None) -> int:
    """The command in a process of its own; killed that long after its first checkpoint."""
    log = output.parent / "log"
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "burnish.cli", *arguments], stdout=stderr, stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if kill_after is not None:
            start, deadline = step_of(output), time.monotonic() + 120
            while step_of(output) <= start and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        code = process.wait(timeout=180)
    if kill_after is None:
        assert code == 0, log.read_text()[-3000:]
    return code


def test_killed_twice_and_resumed(model_folder, data_file, tmp_path):
    """Saving at every step, so that a kill is likely to fall into a save."""
    more = ("--max-steps", "40", "--save-steps", "1", "--set", "save_total_limit=3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(command(model_folder, data_file, whole, *more), whole)
    codes = [run(command(model_folder, data_file, cut, *more), cut, kill_after=0.13)]
    codes.append(run(command(model_folder, data_file, cut, *more, "--resume"), cut, kill_after=0.37))
    assert codes[0] == -signal.SIGKILL, "the run ended before it was killed: give it more steps"
    assert checkpoints.newest(cut)[0] is not None
    run(command(model_folder, data_file, cut, *more, "--resume"), cut)
    assert equal(whole, cut)
    a, b = (torch.load(p / "checkpoint-40" / "optimizer.pt") for p in (whole, cut))
    for i, state in a["state"].items():
        assert all(torch.equal(v, b["state"][i][k]) for k, v in state.items() if isinstance(v, torch.Tensor))


@pytest.fixture(scope="module")
def finished(model_folder, data_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(model_folder, data_file, output, "--max-steps", "6", "--save-steps", "2")) == 0
    return output


def truncate(path: Path, share: float = 0.5) -> None:
    size = path.stat().st_size
    os.truncate(path, int(size * share))


DAMAGE = {
    "weights cut": lambda c: truncate(c / "model.safetensors"),
    "weights' last byte": lambda c: os.truncate(c / "model.safetensors", (c / "model.safetensors").stat().st_size - 1),
    "weights missing": lambda c: (c / "model.safetensors").unlink(),
    "optimizer cut": lambda c: truncate(c / "optimizer.pt", 0.9),
    "optimizer missing": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler empty": lambda c: truncate(c / "scheduler.pt", 0.0),
    "random state cut": lambda c: truncate(c / "rng_state.pth", 0.7),
    "random state missing": lambda c: (c / "rng_state.pth").unlink(),
    "state cut": lambda c: truncate(c / "trainer_state.json"),
    "state missing": lambda c: (c / "trainer_state.json").unlink(),
    "only the weights": lambda c: [p.unlink() for p in c.iterdir() if p.name != "model.safetensors"],
    "nothing": lambda c: [p.unlink() for p in c.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert checkpoints.newest(copy) == (copy / "checkpoint-6", [])
    DAMAGE[damage](copy / "checkpoint-6")
    found, broken = checkpoints.newest(copy)
    assert found == copy / "checkpoint-4" and [b[0].name for b in broken] == ["checkpoint-6"] and broken[0][1]


def test_resume_passes_over_a_damaged_checkpoint(model_folder, data_file, finished, tmp_path, capfd):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "model.safetensors").unlink()
    truncate(copy / "checkpoint-6" / "model.safetensors")
    more = ("--max-steps", "6", "--save-steps", "2", "--resume", "--output", str(copy))
    assert main(command(model_folder, data_file, copy, *more)) == 0
    err = capfd.readouterr().err
    assert "checkpoint-6 is not whole (model.safetensors is cut short): set aside as incomplete-checkpoint-6" in err
    assert "resuming from checkpoint-4" in err
    assert (copy / "incomplete-checkpoint-6").is_dir() and equal(copy, finished)


def test_resumed_after_the_last_checkpoint_takes_no_step_more(model_folder, data_file, finished, tmp_path):
    """Killed before the model was written; six steps end in the middle of an epoch."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "model.safetensors").unlink()
    more = ("--max-steps", "6", "--save-steps", "2", "--resume", "--output", str(copy))
    assert main(command(model_folder, data_file, copy, *more)) == 0
    assert equal(copy, finished) and step_of(copy) == 6


def test_resume_without_a_checkpoint_starts_anew_and_says_so(model_folder, data_file, finished, tmp_path, capfd):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for folder in copy.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    assert main(command(model_folder, data_file, copy, "--max-steps", "6", "--save-steps", "2", "--resume")) == 0
    assert "no checkpoint to resume from: starting anew" in capfd.readouterr().err
    assert equal(copy, finished) and len(list(copy.glob("incomplete-*"))) == 3


def test_sharded_and_adapter_checkpoints(tmp_path, finished):
    from test_fused_head import lora

    folder = tmp_path / "checkpoint-2"
    shutil.copytree(finished / "checkpoint-2", folder)
    (folder / "model.safetensors").unlink()
    tiny.llama().save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and checkpoints.incomplete(folder) is None
    truncate(shards[-1])
    assert shards[-1].name in checkpoints.incomplete(folder)
    shards[0].unlink()
    assert "missing" in checkpoints.incomplete(folder)
    (folder / "model.safetensors.index.json").unlink()
    lora(tiny.llama()).save_pretrained(folder)
    assert checkpoints.incomplete(folder) is None
    truncate(folder / "adapter_model.safetensors")
    assert "adapter_model" in checkpoints.incomplete(folder)
