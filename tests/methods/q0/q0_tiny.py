"""A text, a model and a trainer small enough for a test; dropout is on, so that random states matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_models as tiny
import torch
from safetensors.torch import load_file

from burnish.methods.q0 import HyperEpochConfig, HyperEpochTrainer


def documents(count: int = 40, seed: int = 0) -> list[dict]:
    """Of 5 to 40 tokens; each token is likely to be followed by the next."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        steps = rng.choice([1, 1, 1, 2, 7], rng.integers(4, 39))
        walk = rng.integers(40) + np.cumsum(steps)
        out.append({"input_ids": [*(3 + walk % 40).tolist(), 1]})
    return out


def config(output, **changes) -> HyperEpochConfig:
    options = {
        "output_dir": str(output), "cycles": 3, "epochs_per_cycle": 1, "seq_length": 16, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "distill_after_cycles": 1, "fitness_share": 0.2, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1000, "seed": 7,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return HyperEpochConfig(**{**options, **changes})


def trainer(output, *, model=None, data=None, eval_data=None, callbacks=None, **changes) -> HyperEpochTrainer:
    if model is None:
        model = tiny.llama(3, vocabulary=64, tied=True, attention_dropout=0.1)
    out = HyperEpochTrainer(
        model, config(output, **changes), train_dataset=documents() if data is None else data, eval_dataset=eval_data,
        callbacks=callbacks,
    )  # fmt: skip
    from transformers import PrinterCallback

    out.remove_callback(PrinterCallback)
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and cached log-probabilities of a snapshot."""
    return {**load_file(folder / "model.safetensors"), "logp": load_file(folder / "fitness.safetensors")["logp"]}


def assert_same(a: Path, b: Path) -> None:
    """Every snapshot of two runs has the same bits."""
    names = sorted(p.name for p in a.glob("cycle-*"))
    assert names and names == sorted(p.name for p in b.glob("cycle-*"))
    for name in names:
        x, y = stored(a / name), stored(b / name)
        assert x.keys() == y.keys()
        for k in x:
            assert torch.equal(x[k], y[k]), f"{name}: {k}"


def for_ranks(output, batch_size: int) -> HyperEpochTrainer:
    """A run that one process and two make alike: without dropout, whose draws are each rank's own."""
    return trainer(
        output, model=tiny.llama(3, vocabulary=64, tied=True), snapshot_dtype="float32", fitness_share=0.3,
        per_device_eval_batch_size=2, per_device_train_batch_size=batch_size,
    )  # fmt: skip
