"""``burnish axpo``: from options to a trained model.  As in ``run_sft``, what is cheap to check comes first."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from ..functions import load_function
from ..models import PACKAGED, check_model_name, load_model
from ..processes import world_size
from ..run_directory import RunDirectory, note, quiet_bars, train_and_save, trainer_arguments
from .calculator import calculator
from .options import OWN_FIELDS
from .questions import load_questions, reward_function

RECORD = "burnish_axpo.json"
_CHATML = ("<|im_start|>", "<|im_end|>")


def prepare(options: dict[str, Any]):
    """(trainer, output directory) for merged options.

    ValueError, in one line, for anything wrong with the input; then nothing has been written.
    """
    questions, task = load_questions(options["data"], options["data_args"], options["system"])
    reward = reward_function(options["reward"], questions, task)
    names = [name.strip() for name in options["tool"].split(",")]
    tools = [calculator if name == "calculator" else load_function(name, "--tool") for name in names]
    check_model_name(options["model"])
    options["processes"] = world_size()
    directory = RunDirectory(options, RECORD)
    quiet_bars()
    from datasets import Dataset

    from ..policy_head import fuse_policy_head
    from ..progress import show_loss
    from .config import AXPOConfig
    from .trainer import AXPOTrainer

    arguments = trainer_arguments(
        AXPOConfig, options, OWN_FIELDS, num_generations=options["generations"], resample_budget=options["budget"],
        num_resamples=options["resamples"], axpo_norm=options["norm"], confidence=options["confidence"],
        max_completion_length=options["max_completion_length"],
    )  # fmt: skip
    model, tokenizer = load_model(options["model"])
    with_tools(tokenizer, options["chat_template"])
    with directory.preparing(), _on_disk(model, options["model"], arguments.beta):
        trainer = AXPOTrainer(
            model, reward, arguments, train_dataset=Dataset.from_list(questions), processing_class=tokenizer,
            tools=tools,
        )  # fmt: skip
    if options["head"] == "fused":
        fuse_policy_head(trainer)
    show_loss(trainer)
    return trainer, directory


def train(prepared) -> None:
    """Train and save what ``prepare`` made; a summary goes to stdout."""
    trainer, directory = prepared
    first = trainer.is_world_process_zero()
    if first:
        directory.begin()
    result = train_and_save(trainer, directory.path, directory.checkpoint)
    if first:
        print(f"{directory.path}: {trainer.state.global_step} steps, mean training loss {result.training_loss:.6g}")


def with_tools(tokenizer, template: str) -> None:
    """Give the tokenizer a chat template that writes tool calls; ValueError where there is none.

    "auto" keeps a template that does.  Else, where the model speaks ChatML (SmolLM2 does), it takes the one that TRL
    has for Qwen 2.5, which is ChatML with tools, and says so.
    """
    from trl.chat_template_utils import qwen2_5_chat_template, supports_tool_calling

    if template != "auto":
        file = Path(template)
        if not file.is_file():
            raise ValueError(f"chat template {template}: no such file")
        tokenizer.chat_template = file.read_text()
        if not supports_tool_calling(tokenizer):
            raise ValueError(f"chat template {template}: does not write tool calls and what tools say")
    elif not supports_tool_calling(tokenizer):
        vocabulary = tokenizer.get_vocab()
        if not all(token in vocabulary for token in _CHATML):
            raise ValueError("the model's chat template does not know tools: give one with --chat-template FILE")
        tokenizer.chat_template = qwen2_5_chat_template
        note("the model's chat template does not know tools: Qwen 2.5's, also ChatML, is used and saved with it")


@contextlib.contextmanager
def _on_disk(model, name: str, beta: float):
    """The packaged weights as a directory while TRL reads its reference model from where the policy came from."""
    if name != PACKAGED or not beta:
        yield
        return
    before = model.config._name_or_path
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config._name_or_path = folder
        try:
            yield
        finally:
            model.config._name_or_path = before
