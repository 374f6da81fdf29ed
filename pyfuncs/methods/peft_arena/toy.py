"""Tagged sequence tasks over six digits, and a Llama of 0.13M parameters that has learned them.

    copy ... rotate     the retention set: copy, reverse, sort, +1, 9 - x, rotate
    prefix              the target: prefix sums mod 10, of which pretraining shows a little

A row is a tag, six digits, "=" and six digits; the labels are the last six.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

DIGITS = 6
PAD, END, EQUALS, TAG = 10, 11, 12, 13
TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "sort": lambda x: x.sort(1).values,
    "plus": lambda x: (x + 1) % 10,
    "nines": lambda x: 9 - x,
    "rotate": lambda x: x.roll(-1, 1),
    "prefix": lambda x: x.cumsum(1) % 10,
}
TARGET = "prefix"
VOCABULARY = TAG + len(TASKS)
#: Seeds of the splits; training sets have others.
_SEEDS = {"train": 1, "held_out": 2, "test": 3}


def batch(task: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), each (count, 14)."""
    given = torch.randint(0, 10, (count, DIGITS), generator=generator)
    tag = torch.full((count, 1), TAG + list(TASKS).index(task))
    ids = torch.cat([tag, given, torch.full((count, 1), EQUALS), TASKS[task](given)], 1)
    labels = ids.clone()
    labels[:, : DIGITS + 2] = -100
    return ids, labels


def rows(task: str, size: int, split: str = "train") -> list[dict]:
    """Rows of a task as an arena reads them; six digits have a million forms, so that splits hardly meet."""
    generator = torch.Generator().manual_seed(1000 * _SEEDS[split] + list(TASKS).index(task))
    ids, labels = batch(task, size, generator)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids.tolist(), labels.tolist(), strict=True)]


def tokenizer():
    """One token a digit, tag and sign."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*map(str, range(10)), "<pad>", "<eos>", "=", *(f"<{t}>" for t in TASKS)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def model(seed: int):
    """The Llama, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=None, eos_token_id=END,
        tie_word_embeddings=False, initializer_range=0.08,
    ))  # fmt: skip


def pretrain(folder: Path, seed: int, steps: int, exposure: float = 0.03) -> None:
    """Train a model on all tasks, the target in a share ``exposure`` of the rows, and save it whole or not at all."""
    from tqdm.auto import tqdm

    from ...paths import atomic_directory

    net, generator = model(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    kept = [t for t in TASKS if t != TARGET]
    for step in (bar := tqdm(range(steps), desc=f"seed {seed}: pretraining", mininterval=2)):
        few = round(128 * exposure)
        parts = [batch(t, (128 - few) // len(kept), generator) for t in kept] + [batch(TARGET, few, generator)]
        ids, labels = (torch.cat(x) for x in zip(*parts, strict=True))
        loss = net(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with atomic_directory(folder) as made:
        net.save_pretrained(made)
        tokenizer().save_pretrained(made)
