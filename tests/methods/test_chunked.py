"""ChunkFT inside trainers: the plain one, TRL's, the command, two launched ranks, a kill in the middle of a save."""

import json
import signal
import sys

import pytest
import tiny_models as tiny
import torch
from test_fused_head import lora
from test_launch import FLAGS, history, launch
from test_resume import equal, run
from test_target_sft import check_equal, losses, make, parameters
from transformers import Trainer, TrainingArguments

import burnish
from burnish import ChunkAdamW
from burnish.chunkft import plan
from burnish.chunkft.slices import Slices
from burnish.cli import main
from burnish.methods import checkpoints, fuse_lm_head
from burnish.methods.chunked import find


def own(parameters: dict) -> dict:
    return {name: value for name, value in parameters.items() if "active_slices" not in name}


# The fused head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("objective", [burnish.objectives.nll(), burnish.objectives.dft()])
def test_only_the_active_rows_of_a_fused_head_get_a_gradient(tied, objective):
    model, batch = tiny.llama(tied=tied), tiny.batch()
    fuse_lm_head(model, objective)
    model(**batch).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = {name: torch.full_like(g, torch.nan) for name, g in want.items()}
    cut = plan(model, 5, align=False)
    slices = Slices(model, cut)
    for chunk in cut.chunks:
        active = slices.activate(chunk)
        with Widest() as widest:
            model(**batch).loss.backward()
        rows = sum(s.segment.rows for s in active if s.segment.name.endswith(("lm_head.weight", "embed_tokens.weight")))
        assert widest.rows <= rows, "the head's gradient was formed beyond its active rows"
        for s in active:
            found[s.segment.name][s.segment.start : s.segment.stop] = s.leaf.grad
        for s in cut.always:
            found[s.name] = slices.parameters[s.name].grad.clone()
        model.zero_grad()
    for name, grad in want.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most rows of a new (rows, 32) tensor made by ``empty``: where a head's dW would be written."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty_like" in str(func) and out.ndim == 2 and out.shape[1] == 32:
            self.rows = max(self.rows, out.shape[0])
        return out


# Trainers


def test_the_plain_trainer_takes_it_as_an_optimizer(tmp_path):
    """One chunk against the Trainer's own AdamW; then three, whose chunks move by turns."""
    from datasets import Dataset

    rows = [{k: v[i] for k, v in tiny.batch(size=8).items()} for i in range(8)]

    def trainer(optimizers=None, **options):
        model = tiny.llama()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
            learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, seed=1,
            use_cpu=True, weight_decay=0.0, adam_epsilon=1e-3, **options,
        )  # fmt: skip
        made = (optimizers(model), None) if optimizers else (None, None)
        return Trainer(model, arguments, train_dataset=Dataset.from_list(rows), optimizers=made)

    theirs = trainer(optim="adamw_torch")
    ours = trainer(lambda m: ChunkAdamW(m, 1, lr=1e-2, weight_decay=0.0, eps=1e-3))
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    check_equal(own(parameters(ours)), parameters(theirs), 1e-4)
    three = trainer(lambda m: ChunkAdamW(m, 3, lr=1e-2))
    found = losses(three)
    assert find(three.optimizer).cycle == 2 and found[-1] < found[0]


def test_trls_trainer_with_one_chunk_is_trls_with_adamw(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    theirs = make(tmp_path, objective="nll", arguments={**options, "gradient_accumulation_steps": 2})
    ours = make(
        tmp_path, objective="nll", chunkft={"num_chunks": 1}, arguments={**options, "gradient_accumulation_steps": 2}
    )
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    check_equal(own(parameters(ours)), parameters(theirs), 1e-4)
    assert ours.args.max_grad_norm == 0.0 and find(ours.optimizer).max_grad_norm == 1.0
    decays = [group["weight_decay"] for group in find(ours.optimizer).param_groups]
    assert decays == [0.1, 0.0]


@pytest.mark.parametrize("arguments", [
    {"num_chunks": 3, "order": "loss"}, {"num_chunks": 2, "moments": "8bit", "small": "chunk"},
])  # fmt: skip
def test_trls_trainer_with_checkpointing(tmp_path, arguments):
    options = {"gradient_checkpointing": True, "learning_rate": 1e-2, "max_steps": 8}
    found = losses(make(tmp_path, objective="nll", chunkft=arguments, arguments=options))
    assert found[-1] < found[0]


def test_a_chunked_adapter(tmp_path):
    from peft import LoraConfig

    peft = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian")
    made = make(tmp_path, objective="nll", chunkft={"num_chunks": 2}, peft_config=peft,
                arguments={"learning_rate": 1e-2, "max_steps": 8})  # fmt: skip
    before = own(parameters(made))
    found = losses(made)
    after = own(parameters(made))
    assert found[-1] < found[0]
    assert {n for n in after if not torch.equal(after[n], before[n])} == {n for n in after if "lora" in n}


def test_arguments_are_checked_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="no argument 'chunks'"):
        make(tmp_path, objective="nll", chunkft={"chunks": 3})
    with pytest.raises(ValueError, match="lr comes from the training arguments"):
        make(tmp_path, objective="nll", chunkft={"lr": 1.0})


def test_lora_on_the_head_is_chunked(tmp_path):
    model, batch = lora(tiny.llama()).eval(), tiny.batch()
    fuse_lm_head(model, burnish.objectives.nll())
    model(**batch).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cut = plan(model, 3, align=False)
    slices = Slices(model, cut)
    for chunk in cut.chunks:
        active = slices.activate(chunk)
        model(**batch).loss.backward()
        for s in active:
            g = want[s.segment.name][s.segment.start : s.segment.stop]
            torch.testing.assert_close(s.leaf.grad, g, rtol=1e-4, atol=1e-7)
        model.zero_grad()


# The command


def command(model, data, output, *more):
    return [
        "sft", "--model", str(model), "--data", str(data), "--output", str(output), "--objective", "dft",
        "--optimizer", "chunkft", "--chunks", "3", "--batch-size", "2", "--accumulation", "2",
        "--learning-rate", "1e-2", "--logging-steps", "1", *more,
    ]  # fmt: skip


def test_killed_in_the_middle_and_resumed_to_the_same_bits(model_folder, data_file, tmp_path):
    """Saving at every step, so that a kill is likely to fall into a save."""
    more = ("--max-steps", "40", "--save-steps", "1", "--set", "save_total_limit=3", "--optimizer-args",
            "{steps_per_chunk: 2, order: random}")  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(command(model_folder, data_file, whole, *more), whole)
    code = run(command(model_folder, data_file, cut, *more), cut, kill_after=0.21)
    assert code == -signal.SIGKILL, "the run ended before it was killed: give it more steps"
    assert checkpoints.newest(cut)[0] is not None
    run(command(model_folder, data_file, cut, *more, "--resume"), cut)
    assert equal(whole, cut)
    a, b = (torch.load(p / "checkpoint-40" / "optimizer.pt", weights_only=True) for p in (whole, cut))
    assert a["rotation"] == b["rotation"] and a["rotation"]["cycle"] == 6
    for one, two in zip(a["parts"], b["parts"], strict=True):
        assert one["steps"] == two["steps"] and torch.equal(one["memory"], two["memory"])


def test_a_resumed_run_must_have_the_same_chunks(model_folder, data_file, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(command(model_folder, data_file, output, "--max-steps", "2", "--save-steps", "1")) == 0
    more = ("--max-steps", "3", "--resume", "--chunks", "4")
    assert main(command(model_folder, data_file, output, *more)) == 2
    assert "chunks is 4, but the run" in capsys.readouterr().err


@pytest.mark.parametrize("more, match", [
    (("--optimizer", "sideways"), "--optimizer must be one of default, chunkft"),
    (("--optimizer", "default", "--optimizer-args", "{order: random}"), "--optimizer-args go with --optimizer chunkft"),
    (("--set", "optim=sgd"), "exclude each other"), (("--chunks", "0"), "--chunks must be a whole number"),
    (("--optimizer-args", "{color: red}"), "no argument 'color'"),
    (("--optimizer-args", "{lr: 1}"), "lr comes from the training arguments"),
])  # fmt: skip
def test_bad_options(model_folder, data_file, tmp_path, capsys, more, match):
    assert main(command(model_folder, data_file, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("burnish: error: ") and match in err and not (tmp_path / "run").exists()


def test_progress_shows_chunk_and_cycle(model_folder, data_file, tmp_path):
    import subprocess

    line = command(model_folder, data_file, tmp_path / "run", "--max-steps", "5")
    done = subprocess.run([sys.executable, "-m", "burnish.cli", *line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chunk=3/3, cycle=2" in done.stderr.replace("\r", "\n"), done.stderr[-2000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_launched_ranks_train_as_one_process(tmp_path):
    tiny.save(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(24))
    # eps: Adam turns rounding into steps where a gradient is next to nothing
    more = ("--max-steps", "7", "--set", "adam_epsilon=1e-3", "--save-steps", "7")
    one = command(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "one", "--batch-size", "4", *more)
    assert main(one) == 0
    two = command("model", "rows.jsonl", "two", "--batch-size", "2", *more)
    done = launch(FLAGS["ddp"], tmp_path, "-m", "burnish.cli", *two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert history(tmp_path / "two", "loss") == pytest.approx(history(tmp_path / "one", "loss"), rel=1e-4)
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-4)


def test_fsdp_in_the_trainer_is_refused_with_what_to_do(tmp_path):
    tiny.save(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl")
    two = command("model", "rows.jsonl", "two", "--max-steps", "1")
    done = launch(FLAGS["fsdp"], tmp_path, "-m", "burnish.cli", *two)
    assert done.returncode != 0 and "wrap the model with fully_shard" in done.stderr
    assert not (tmp_path / "two" / "model.safetensors").exists()


def test_the_config_of_a_run_names_its_optimizer(model_folder, data_file, tmp_path):
    output = tmp_path / "run"
    assert main(command(model_folder, data_file, output, "--max-steps", "1")) == 0
    record = json.loads((output / "burnish_sft.json").read_text())
    assert (record["optimizer"], record["chunks"]) == ("chunkft", 3)
