"""``burnish chunkft plan``: how a model, given by its config alone, is cut into chunks."""

from __future__ import annotations

import torch

from ..chunkft import ChunkPlan
from .models import PACKAGED, _guard, check_model_name, packaged_weights


def empty_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A causal LM on the meta device, tied as its config says: shapes and no weights, which are not read.

    ``name``: as for ``load_model``, of which only the config is needed; ``dtype``: of the parameters.  ValueError, in
    one line, where there is no such config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model_name(name)
    source, file = packaged_weights() if name == PACKAGED else (name, None)

    def build():
        try:
            config = AutoConfig.from_pretrained(source, gguf_file=file)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except StrictDataclassError as error:  # its own first line does not say what is wrong
            raise ValueError(str(error.__cause__ or error)) from error

    return _guard(name, build)


def report(model: torch.nn.Module, plan: ChunkPlan, batch: int, seq: int) -> str:
    """What the command prints, given the model on the meta device: the plan's table, and memory on a GPU beside the
    host, for micro-batches of ``batch`` rows of ``seq`` tokens."""
    columns: dict[str, dict] = {
        "plain": {}, "checkpointed": {"checkpointing": True},
        "8-bit, checkpointed": {"checkpointing": True, "moments": "8bit", "low_precision": "stochastic"},
    }  # fmt: skip
    guesses = {name: plan.predict_memory(model, batch=batch, seq=seq, **options) for name, options in columns.items()}
    lines = [f"memory, GB, {batch} x {seq} tokens".ljust(30) + "".join(name.rjust(22) for name in guesses)]
    for row in next(iter(guesses.values())).rows():
        lines.append(row.ljust(30) + "".join(f"{g.rows()[row] / 1e9:22.2f}" for g in guesses.values()))
    lines.append("8-bit: moments in blocks, weights rounded stochastically, no fp32 master (low precision only)")
    return "\n".join([str(plan), "", *lines])
