"""A run resumed from the checkpoint of its last step, in the middle of an epoch, takes no step more."""

import sys
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig

from burnish.methods import RARFTTrainer, TargetSFTTrainer

sys.path.insert(0, str(Path(__file__).parent / "axpo"))
import axpo_tiny

COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 1, "save_steps": 1, "save_strategy": "steps", "learning_rate": 0.1,
    "optim": "sgd", "report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
    "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


def sft(folder, model):
    rows = Dataset.from_list([{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(16)])
    args = SFTConfig(str(folder), **COMMON)
    return TargetSFTTrainer(model, args, objective="nll", train_dataset=rows, processing_class=tiny.tokenizer())


def grpo(folder, model, kind=GRPOTrainer):
    names = {"context_ids": ["a"], "context_scores": [1.0]}
    rows = Dataset.from_list([{"prompt": f"{i}+{i}=", **names} for i in range(16)])
    args = GRPOConfig(str(folder), num_generations=2, max_completion_length=5, **COMMON)
    return kind(model, lengths, args, rows, processing_class=tiny.tokenizer())


def lengths(completions, **_):
    return [float(sum(map(str.isdigit, c))) for c in completions]


def ra_rft(folder, model):
    return grpo(folder, model, RARFTTrainer)


def axpo(folder, model):
    return axpo_tiny.trainer(folder, axpo_tiny.save(folder / "model"), **COMMON)


@pytest.mark.parametrize("make", [sft, axpo, ra_rft])
def test_it_takes_no_step_more(make, tmp_path, model_folder):
    first = make(tmp_path, model_folder)
    first.train()
    again = make(tmp_path, model_folder)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == first.state.global_step == 1
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_transformers_still_needs_this(tmp_path, model_folder):
    """Where this fails, transformers has mended it and ``last_step.py`` can go."""
    grpo(tmp_path, model_folder).train()
    again = grpo(tmp_path, model_folder)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2
