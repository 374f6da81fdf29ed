"""Episodes and rows small enough to make in a test."""

from __future__ import annotations

import tiny_models as tiny
import torch
from datasets import Dataset
from transformers.utils import logging

from burnish.methods.drift import DriftConfig, DriftTrainer, Episode

logging.disable_progress_bar()
WRONG = "no, again"


def episode(prompt: str, trajectory: int, answers: list[str | None], solved: bool, **more) -> Episode:
    """Answers as turns, feedback between them; the last is correct where ``solved``."""
    messages = [{"role": "user", "content": prompt}]
    for i, a in enumerate(answers):
        messages.append({"role": "assistant", "content": "?" if a is None else a})
        if i < len(answers) - 1:
            messages.append({"role": "user", "content": WRONG})
    rewards = [0.0] * (len(answers) - 1) + [1.0 if solved else 0.0]
    return Episode(prompt, trajectory, messages, rewards, list(answers), **more)


def episodes() -> list[Episode]:
    """Three prompts of three: mixed, all wrong, all right."""
    return [
        episode("2+2=", 0, ["4"], True), episode("2+2=", 1, ["5", "5"], False), episode("2+2=", 2, ["3", "4"], True),
        episode("1+9=", 0, ["8", "9"], False), episode("1+9=", 1, ["7", "7"], False),
        episode("1+9=", 2, ["11", "22"], False),
        episode("3+3=", 0, ["6"], True), episode("3+3=", 1, ["1", "2", "6 ok"], True), episode("3+3=", 2, ["6"], True),
    ]  # fmt: skip


def records(found: list[Episode] | None = None) -> list[dict]:
    return [
        {"prompt_id": e.prompt_id, "messages": e.messages, "rewards": e.rewards, "answers": e.answers}
        for e in found or episodes()
    ]


def rows(weights: list[float], length: int = 0) -> Dataset:
    """A row a weight; completions of one length where that is given."""
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"{i}+{2 * i}="}], "weight": w,
         "completion": [{"role": "assistant", "content": str(3 * i) if not length else "7" * length}]}
        for i, w in enumerate(weights)
    ])  # fmt: skip


OPTIONS: dict = dict(
    per_device_train_batch_size=4, max_steps=1, learning_rate=0.1, logging_steps=1, bf16=False,
    gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    dataloader_pin_memory=False, seed=7, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
)  # fmt: skip


def config(folder, **options) -> DriftConfig:
    return DriftConfig(**{**OPTIONS, "output_dir": str(folder), **options})


def trainer(folder, dataset, model=None, more: dict | None = None, **options) -> DriftTrainer:
    return DriftTrainer(
        model or tiny.llama(), config(folder, **options), train_dataset=dataset,
        processing_class=tiny.tokenizer(chat=True), **(more or {}),
    )  # fmt: skip


def step_gradient(one: DriftTrainer) -> dict:
    """What one step of SGD at rate 0.1 took off the parameters, over the rate."""
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    one.train()
    return {n: (before[n] - p.detach()) / 0.1 for n, p in one.model.named_parameters()}


def distance(a: dict, b: dict) -> float:
    """Of two gradients, relative to the second's norm."""
    return float(sum((a[n] - b[n]).square().sum() for n in b) ** 0.5 / sum(b[n].square().sum() for n in b) ** 0.5)


def reference_gradient(dataset, model=None, *, mean=False, by_weight=False) -> tuple[float, dict]:
    """Eq. 15 in plain torch, fp64, a row at a time: the mean over rows, its gradient."""
    model = (model or tiny.llama()).double()
    tok = tiny.tokenizer(chat=True)
    total = torch.zeros((), dtype=torch.float64)
    for row in dataset:
        prompt = tok.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        whole = tok.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        ids = torch.tensor(tok(whole, add_special_tokens=False)["input_ids"])[None]
        start = len(tok(prompt, add_special_tokens=False)["input_ids"])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :, 0]
        total = total - row["weight"] * (logp.mean() if mean else logp.sum())
    loss = total / (sum(dataset["weight"]) if by_weight else len(dataset))
    loss.backward()
    return loss.item(), {n: p.grad.float() for n, p in model.named_parameters()}
