"""``burnish sft`` under ``accelerate launch`` on two gloo ranks, DDP and FSDP2, against one process.

Two launches run all the trainings, since starting two processes takes longer than a tiny training.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from burnish import cli
from burnish.methods import checkpoints, processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

DOCS = Path(__file__).parents[2] / "docs" / "sft.md"
FLAGS = {
    "ddp": ["--multi_gpu"],
    "fsdp": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
}
TARGET = ["--objective", "target_sft", "--objective-arg", "eta=0.5"]
#: Adam turns rounding into steps, so only the run that is resumed has it.
SGD = ["--learning-rate", "0.2", "--set", "optim=sgd"]
RUNS = {
    "nll": ["--model", "untied", "--objective", "nll", *SGD],
    "nll, tied": ["--model", "tied", "--objective", "nll", *SGD],
    "target_sft": ["--model", "untied", *TARGET, "--teacher", "teacher", *SGD],
    "target_sft, tied": ["--model", "tied", *TARGET, "--teacher", "self", *SGD],
    "adam": ["--model", "tied", *TARGET, "--teacher", "self", "--save-steps", "2", "--learning-rate", "0.01"],
    "bf16": ["--model", "untied", "--objective", "nll", *SGD, "--set", "bf16=true"],
    # each rank its own mean: what the equality below must tell from the mean over all tokens
    "mean of means": ["--model", "untied", "--objective", "nll", *SGD, "--set", "average_tokens_across_devices=false"],
}


def arguments(run: str, output: Path, batch: int, *more: str) -> list[str]:
    common = ["--max-steps", "4", "--accumulation", "2", "--logging-steps", "1", "--set", "save_total_limit=2"]
    if "--data" not in more:
        more = ("--data", "rows.jsonl", *more)
    return ["sft", *RUNS[run], *common, "--batch-size", str(batch), "--output", str(output), *more]


def launch(flags: list[str], folder: Path, *command: str) -> subprocess.CompletedProcess:
    start = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *start, "--dynamo_backend", "no", *flags, *command],
        cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def history(folder: Path, name: str) -> list[float]:
    return [e[name] for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if name in e]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and rows; of any two ranks' rows one has about ten times the other's labels."""
    folder = tmp_path_factory.mktemp("launch")
    tiny.save(folder / "untied")
    tiny.save(folder / "tied", tiny.llama(tied=True))
    tiny.save(folder / "teacher", tiny.llama(1))
    texts = ["ab", "The quick brown fox, 0123456789!", "c" * 5, "xyzzy plugh " * 4]
    tiny.write_rows(folder / "rows.jsonl", [{"prompt": f"{i}=", "completion": texts[i % 4]} for i in range(24)])
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """Each run in this process, with twice the batch."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for run in RUNS:
            assert cli.main(arguments(run, folder / "one" / run, 4)) == 0
        assert cli.main(arguments("nll", folder / "one" / "answers", 4, *TASK)) == 0
    finally:
        os.chdir(before)
    return folder / "one"


TASK = ("--data", "reasoning-gym:chain_sum", "--data-args", "{size: 24}", "--eval-size", "5")


@pytest.fixture(scope="module", params=FLAGS)
def two(request, folder):
    """(kind, folder of the runs, what the launch printed)."""
    output = folder / request.param
    lines = [arguments(run, output / run, 2) for run in RUNS]
    lines.append(arguments("nll", output / "answers", 2, *TASK))
    (folder / "lines.json").write_text(json.dumps(lines))
    script = Path(__file__).parent / "launch_ranks.py"
    done = launch(FLAGS[request.param], folder, str(script), "lines.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, output, done


def test_losses_and_weights_are_those_of_one_process(folder, one, two):
    output = two[1]
    for run in RUNS:
        if run in ("mean of means", "bf16"):
            continue
        tolerance = {"rel": 1e-5 if run != "adam" else 1e-4}
        for name in ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens"):
            expected = history(one / run, name)
            assert len(expected) == 4 and history(output / run, name) == pytest.approx(expected, **tolerance), run
        if run == "adam":
            continue
        a, b = load_file(one / run / "model.safetensors"), load_file(output / run / "model.safetensors")
        start = load_file(folder / RUNS[run][1] / "model.safetensors")
        # FSDP's gathered weights no longer share memory, so that a tied head is saved beside its embedding
        assert a.keys() == start.keys() and a.keys() <= b.keys() <= a.keys() | {"lm_head.weight"}
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.allclose(a["model.embed_tokens.weight"], start["model.embed_tokens.weight"], atol=1e-3)


def test_the_equality_can_fail(one, two):
    """The rows are so unequal that averaging the ranks' own means gives other losses."""
    expected, got = history(one / "nll", "loss"), history(two[1] / "mean of means", "loss")
    assert max(abs(a - b) / a for a, b in zip(expected, got, strict=True)) > 1e-2


def test_mixed_precision(one, two):
    """Other roundings (FSDP2 holds bf16 copies where autocast casts), the same training."""
    expected = history(one / "bf16", "loss")
    assert history(two[1] / "bf16", "loss") == pytest.approx(expected, rel=0.02)
    saved = load_file(two[1] / "bf16" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_one_rank_writes_and_prints(two):
    _, output, done = two
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) == len(RUNS) + 1 and all("4 steps, mean training loss" in line for line in lines), done.stdout
    assert json.loads((output / "nll" / "burnish_sft.json").read_text())["processes"] == 2


def test_answers_are_those_of_one_process(one, two):
    a, b = (json.loads((p / "answers" / "evaluation.json").read_text()) for p in (one, two[1]))
    assert a == b and len(a["answers"]) == 5


def test_checkpoints_load_in_one_process(two, tmp_path):
    kind, output, _ = two
    last = load_file(output / "adam" / "model.safetensors")
    checkpoint = output / "adam" / "checkpoint-4"
    assert checkpoints.sharded(checkpoint) == (kind == "fsdp")  # else FSDP was not in use at all
    assert checkpoints.incomplete(checkpoint, 2) is None
    if kind == "fsdp":
        from accelerate.utils import merge_fsdp_weights

        merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path))
        saved = load_file(tmp_path / "model.safetensors")
    else:
        saved = load_file(checkpoint / "model.safetensors")
    for name in saved:
        assert torch.equal(saved[name], last[name]), name
    model = AutoModelForCausalLM.from_pretrained(output / "adam")
    assert torch.equal(model.lm_head.weight, last["model.embed_tokens.weight"])


def test_damaged_checkpoints_of_two_ranks_are_passed_over(two, tmp_path):
    kind, output, _ = two
    damage = ["rng_state_1.pth", "trainer_state.json", "scheduler.pt"]
    damage += ["optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"] if kind == "fsdp" else ["optimizer.pt"]
    for number, name in enumerate(damage):
        copy = tmp_path / str(number)
        shutil.copytree(output / "adam", copy)
        (copy / "checkpoint-4" / name).unlink()
        assert checkpoints.newest(copy, 2)[0] == copy / "checkpoint-2", name


def test_two_ranks_resume(two, folder, tmp_path):
    """By the command, and for FSDP2 the configuration file, of docs/sft.md; bit for bit the run that was not cut."""
    kind, output, _ = two
    copy = tmp_path / "adam"
    shutil.copytree(output / "adam", copy)
    for name in ("checkpoint-4", "model.safetensors", "trainer_state.json"):
        (shutil.rmtree if name.startswith("checkpoint") else os.remove)(copy / name)
    flags = FLAGS[kind]
    if kind == "fsdp":
        (block,) = re.findall(r"((?:    .*\n)*    distributed_type: FSDP\n(?:    .*\n)*)", DOCS.read_text())
        (tmp_path / "fsdp.yaml").write_text(re.sub("^    ", "", block, flags=re.M))
        flags = ["--config_file", str(tmp_path / "fsdp.yaml")]
    done = launch(flags, folder, "-m", "burnish.cli", *arguments("adam", copy, 2, "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("resuming from checkpoint-2") == 1
    assert history(copy, "loss") == history(output / "adam", "loss")
    a, b = load_file(output / "adam" / "model.safetensors"), load_file(copy / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_process_does_not_resume_two(two, folder, monkeypatch, capfd):
    kind, output, _ = two
    monkeypatch.chdir(folder)
    assert cli.main(arguments("adam", output / "adam", 2, "--resume")) == 2
    assert "--resume: processes is 1, but the run in" in capfd.readouterr().err
    if kind == "fsdp":
        record = output / "adam" / "burnish_sft.json"
        text = record.read_text()
        record.write_text(text.replace('"processes": 2', '"processes": 1'))
        assert cli.main(arguments("adam", output / "adam", 2, "--resume")) == 2
        record.write_text(text)
        assert "was saved under FSDP, and this run is without it" in capfd.readouterr().err


def test_a_user_error_is_reported_once(folder):
    (folder / "ids.jsonl").write_text('{"input_ids": [3, 4, 500]}\n')
    done = launch(FLAGS["ddp"], folder, "-m", "burnish.cli", *arguments("nll", folder / "no", 2, "--data", "ids.jsonl"))
    assert done.returncode != 0 and done.stderr.count("burnish: error: ") == 1, done.stderr
    assert "row 1: token 500 is outside the vocabulary of 128" in done.stderr and not (folder / "no").exists()


def test_the_first_process_speaks(monkeypatch, capfd):
    """The launcher ends all processes when one exits: the others must not exit before the first has spoken."""
    waited = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    assert cli.main(["sft"]) == 2 and not waited
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["sft"]) == 2 and waited == [20.0]
