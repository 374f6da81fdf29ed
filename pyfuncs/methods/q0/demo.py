"""``burnish demo q0``: many epochs over a small text, spent in several ways.

The text is modules of Python's standard library as they are on this machine; training, fitness and validation text are
different modules.  A Llama of transformers with 0.25M parameters, AdamW.  Every arm has the same number of passes over
the training text in all, whatever models it makes of them; what a teacher's forward costs comes on top.

The baselines are tuned on each seed's fitness text, over ``DECAYS``; q0's decay is one number, for all seeds.
"""

from __future__ import annotations

import math
import platform
import re
import shutil
import statistics
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from ..demo_results import publish
from ..intervals import interval
from ..run_directory import write_json
from .config import HyperEpochConfig
from .demo_options import Q0DemoOptions
from .schedule import lr_mult, wd_mult
from .snapshots import log_probs_of
from .text import make_tokenizer, tokenized
from .trainer import HyperEpochTrainer

TRAIN = ("fnmatch", "glob", "copy", "queue", "shlex")
FITNESS = ("reprlib", "linecache", "getopt")
VALIDATION = ("sched", "fileinput", "filecmp")
VOCABULARY, LENGTH = 512, 128
#: What a baseline's weight decay is chosen from.
DECAYS = (0.1, 1.0, 3.0)
#: One ordinary schedule over the run: no cycles, no teacher, no noise.
_ORDINARY = {"lr_schedule": "once", "wd_floor": 1.0, "distill_share": 0.0, "perturb_first": 0.0, "perturb_last": 0.0}


def documents(names: tuple[str, ...]) -> list[str]:
    """Standard modules, cut before their functions and classes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    pieces = [p for n in names for p in re.split(r"(?m)^(?=(?:def|class) )", (library / f"{n}.py").read_text())]
    return [p for p in pieces if p.strip()]


def texts() -> dict[str, list[np.ndarray]]:
    """Token ids of the three texts, by a BPE made of the training text."""
    train = documents(TRAIN)
    tokenizer = make_tokenizer(f"bpe:{VOCABULARY}", train)
    named = {"train": train, "fitness": documents(FITNESS), "eval": documents(VALIDATION)}
    return {name: tokenized(pieces, tokenizer) for name, pieces in named.items()}


def model(seed: int) -> LlamaForCausalLM:
    """0.25M parameters, embeddings tied."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH + 1, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip


def train(data: dict, options: Q0DemoOptions, folder: Path, seed: int, epochs: int, **arm) -> dict[str, Tensor]:
    """One trajectory; log-probabilities (M, N) of its snapshots, {"fitness", "eval"}."""
    shutil.rmtree(folder, ignore_errors=True)
    fields = {
        "learning_rate": options.learning_rate, "weight_decay": options.weight_decay,
        "distill_after_cycles": options.distill_after, **arm,
    }  # fmt: skip
    trainer = HyperEpochTrainer(
        model(seed),
        HyperEpochConfig(
            output_dir=str(folder), cycles=epochs // options.epochs_per_cycle,
            epochs_per_cycle=options.epochs_per_cycle, seq_length=LENGTH, seed=seed, save_strategy="no",
            per_device_train_batch_size=options.batch_size, adam_beta2=0.95, report_to="none", disable_tqdm=True,
            bf16=False, use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=False,
            logging_steps=10_000, per_device_eval_batch_size=16, **fields,
        ),
        train_dataset=data["train"], fitness_dataset=data["fitness"], eval_dataset=data["eval"],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = {name: log_probs_of(trainer.snapshot_folders(), name) for name in ("fitness", "eval")}
    shutil.rmtree(folder)
    return found
