"""``burnish ra-rft``: labels, retriever, contexts, policy, each a stage that a run which was killed does not repeat.

labels.jsonl          a row a judged pair; goes on after the last whole line
retriever-training/   the retriever's checkpoints; goes on from the newest whole one
retriever/            the trained retriever and its index: there whole, or not at all
contexts.jsonl        the training data with rewritten prompts: there whole, or not at all
checkpoint-N/         the policy's
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoints
from ..data import TASK_PREFIX, TaskData, jsonl_rows, load_data, prompt
from ..functions import load_function
from ..models import check_model_name, load_model, load_tokenizer
from ..processes import world_size
from ..run_directory import (
    RunDirectory,
    note,
    quiet_bars,
    set_aside,
    train_and_save,
    trainer_arguments,
    write_whole,
)
from .corpus import Document, as_corpus, as_questions, question_id, read_rows, text_of
from .labels import build_labels
from .leaks import LeakGuard
from .options import OWN_FIELDS
from .rewards import BadData, boxed, last_boxed, text_of_completion

RECORD = "burnish_ra_rft.json"
#: What the stages leave in the output directory, in their order.
PRODUCTS = ("labels.jsonl", "retriever-training", "retriever", "contexts.jsonl")


@dataclass
class Prepared:
    """What the stages need: everything that could be wrong with the input has been looked at."""

    options: dict[str, Any]
    directory: RunDirectory
    rows: list[dict]
    corpus: list[Document]
    guard: LeakGuard
    judge: Callable | str | None
    reward: Callable
    arguments: Any


def prepare(options: dict[str, Any]) -> Prepared:
    """Data, corpus, functions and configuration of merged options; nothing is written, and no model is loaded.

    ValueError, in one line, for anything wrong with the input.
    """
    judge, reward = options["judge"], options["reward"]
    if judge == "none":
        judge = None
    elif judge != "rollout":
        judge = load_function(judge, "--judge")
    check_model_name(options["model"])
    chat = bool(load_tokenizer(options["model"]).chat_template)
    rows, task = read_data(options["data"], options["data_args"], chat)
    if reward == "auto":
        reward = "boxed" if task is None else "task"
    if reward == "boxed":
        missing = next((i for i, row in enumerate(rows) if row.get("answer") is None), None)
        if missing is not None:
            raise ValueError(
                f"data {options['data']}: row {missing} has no column 'answer', which --reward boxed needs"
            )
        found: Callable = boxed
    elif reward == "task":
        if task is None:
            raise ValueError("--reward task needs reasoning-gym data, which can verify an answer")
        found = task_reward(task)
    else:
        found = load_function(reward, "--reward")
    corpus = read_corpus(options["corpus"], options["corpus_args"])
    guard = LeakGuard(_benchmarks(options["benchmarks"]))
    if not guard.filter(corpus)[0]:
        raise ValueError(f"corpus {options['corpus']}: is empty once what overlaps with --benchmarks is dropped")
    from trl import GRPOConfig

    from .retriever import load_encoder

    options["processes"] = world_size()
    if options["processes"] > 1 and not (Path(options["output"]) / "contexts.jsonl").exists():
        raise ValueError("labels, retriever and contexts are made by one process: run without a launcher first, "
                         "with --max-steps 1, then with --resume under it")  # fmt: skip
    directory = RunDirectory(options, RECORD)
    quiet_bars()
    load_encoder(options["encoder"])
    arguments = trainer_arguments(
        GRPOConfig, options, OWN_FIELDS, num_generations=options["generations"],
        max_completion_length=options["max_completion_length"], temperature=options["temperature"], beta=0.0,
    )  # fmt: skip
    for name in ("use_liger_kernel", "torch_compile"):
        if options["head"] == "fused" and getattr(arguments, name):
            raise ValueError(f"--set {name}=true needs --head trl")
    return Prepared(options, directory, rows, corpus, guard, judge, found, arguments)


def train(made: Prepared) -> None:
    """Every stage that has not been done yet; a summary goes to stdout.

    What turns out to be wrong with the data on the way ends the run with one line and exit code 1.
    """
    try:
        _stages(made)
    except BadData as error:
        raise SystemExit(f"burnish: error: {error}") from error


def _stages(made: Prepared) -> None:
    directory, output, options = made.directory, made.directory.path, made.options
    output.mkdir(parents=True, exist_ok=True)
    if options["processes"] == 1 or _first():
        if options["overwrite"]:
            for name in PRODUCTS:
                path = output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        directory.begin()
    contexts = output / "contexts.jsonl"
    if not contexts.exists():
        retriever = _retriever(made, output)
        _write_contexts(made, retriever, contexts)
    _policy(made, contexts)


def _retriever(made: Prepared, output: Path):
    """The trained retriever of the output directory, from labels on where it is not there."""
    from .retriever import Retriever, RetrieverTrainer, load_encoder, retriever_arguments

    options, how = made.options, {"guard": made.guard, "late_interaction": made.options["late_interaction"]}
    if (output / "retriever").exists():
        note("the retriever is trained already")
        return Retriever.load(output / "retriever", guard=made.guard)
    if made.judge is None:
        retriever = Retriever(load_encoder(options["encoder"]), made.corpus, **how)
        retriever.index(progress=True)
        retriever.save(output / "retriever")
        return retriever
    questions, candidates = as_questions(made.rows), None
    if options["candidates"]:
        nearest = Retriever(load_encoder(options["encoder"]), made.corpus, **how)
        hits = nearest.search([q.text for q in questions], options["candidates"], progress=True)
        candidates = {q.id: [h.id for h in row] for q, row in zip(questions, hits, strict=True)}
    rollout = None
    if made.judge == "rollout":
        model, tokenizer = load_model(options["model"])
        rollout = {
            "model": model.eval(), "tokenizer": tokenizer, "reward": made.reward, "samples": options["samples"],
            "margin": options["margin"], "max_new_tokens": options["max_completion_length"],
            "temperature": options["temperature"], "seed": options["seed"],
        }  # fmt: skip
    labels = build_labels(questions, made.corpus, made.judge, output / "labels.jsonl", guard=made.guard,
                          candidates=candidates, rollout=rollout)  # fmt: skip
    note(f"{sum(row['label'] for row in labels)} of {len(labels)} labels are positive")
    folder = output / "retriever-training"
    trained = len({row["question"] for row in labels if row["label"]})
    trainer = RetrieverTrainer(
        load_encoder(options["encoder"]), questions, made.corpus, labels,
        retriever_arguments(
            str(folder), evaluate=trained > 1, num_train_epochs=options["retriever_epochs"], seed=options["seed"],
            per_device_train_batch_size=options["retriever_batch_size"],
            learning_rate=options["retriever_learning_rate"],
        ),
        temperature=options["retriever_temperature"], seed=options["seed"], **how,
    )  # fmt: skip
    checkpoint, broken = checkpoints.newest(folder)
    set_aside(broken)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    retriever = trainer.retriever()
    if trainer.held_out:
        found = retriever.recall(trainer.held_out, trainer.positives)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        note(f"retriever: {shown} of {len(trainer.held_out)} held-out questions")
    retriever.index(progress=True)
    retriever.save(output / "retriever")
    return retriever


def _write_contexts(made: Prepared, retriever, path: Path) -> None:
    from datasets import Dataset

    from .context import with_context

    positives: dict[str, list[str]] = {}
    labels = path.parent / "labels.jsonl"
    for row in read_rows(labels) if labels.exists() else ():
        if row["label"]:
            positives.setdefault(row["question"], []).append(row["document"])
    rows = [{**row, "positive_ids": positives.get(question_id(row), [])} for row in made.rows]
    data = with_context(Dataset.from_list(rows), retriever, made.options["k"], progress=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in data.to_list()))


def _policy(made: Prepared, contexts: Path) -> None:
    from datasets import Dataset

    from ..policy_head import fuse_policy_head
    from ..progress import show_loss
    from .trainer import RARFTTrainer

    directory, options = made.directory, made.options
    model, tokenizer = load_model(options["model"])
    trainer = RARFTTrainer(
        model, made.reward, made.arguments, Dataset.from_list(read_rows(contexts)), k=options["k"],
        processing_class=tokenizer,
    )  # fmt: skip
    head = fuse_policy_head(trainer) if options["head"] == "fused" else None
    show_loss(trainer)
    train_and_save(trainer, directory.path, directory.checkpoint)
    if head:
        head.restore()
    if trainer.is_world_process_zero():
        rewards = [e["reward"] for e in trainer.state.log_history if "reward" in e]
        mean = f", mean reward {sum(rewards) / len(rewards):.4g}" if rewards else ""
        print(f"{directory.path}: {trainer.state.global_step} steps{mean}")


def read_data(source: str, arguments: dict, chat: bool) -> tuple[list[dict], TaskData | None]:
    """Rows with ``prompt``, ``answer`` and ``type`` of a file or a task, and the task.  ValueError for bad rows."""
    if not source.startswith(TASK_PREFIX):
        if arguments:
            raise ValueError("data-args go with reasoning-gym:TASK, not with a file")
        rows = _file(source, "data")
        for i, row in enumerate(rows):
            if "prompt" not in row:
                raise ValueError(f"data {source}: row {i} has no column 'prompt'; got {', '.join(sorted(row))}")
            if not isinstance(row["prompt"], str) and not chat:
                raise ValueError(f"data {source}: row {i} is messages, but the model's tokenizer has no chat template")
            text_of(row["prompt"])
        return rows, None
    task = load_data(source, arguments)
    assert isinstance(task, TaskData)
    rows = [
        {**prompt(entry, chat), "answer": str(entry["answer"]), "type": task.name, "entry_index": i}
        for i, entry in enumerate(task.entries)
    ]  # fmt: skip
    return rows, task


def read_corpus(source: str, arguments: dict) -> list[Document]:
    """Documents of a file, or of a task's entries: their question, and the answer in a box as the trace."""
    if not source.startswith(TASK_PREFIX):
        if arguments:
            raise ValueError("corpus-args go with reasoning-gym:TASK, not with a file")
        return as_corpus(_file(source, "corpus"))
    task = load_data(source, {"seed": 1, **arguments})
    assert isinstance(task, TaskData)
    return as_corpus(
        {"problem": entry["question"].strip(), "trace": f"The final answer is: \\boxed{{{entry['answer']}}}",
         "type": task.name}
        for entry in task.entries
    )  # fmt: skip


def _file(source: str, what: str) -> list[dict]:
    return [row for _, row in jsonl_rows(source, f"{what} file")]


def _benchmarks(source: str | None) -> list[str]:
    if source is None:
        return []
    rows = _file(source, "benchmarks")
    for i, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"benchmarks {source}: row {i} has no column 'prompt'; got {', '.join(sorted(row))}")
    return [text_of(row["prompt"]) for row in rows]


def task_reward(task: TaskData) -> Callable:
    """The task's own verifier, on what stands in the last box of a completion, or on all of it without one."""

    def verified(completions, entry_index, **_) -> list[float]:
        texts = [text_of_completion(c) for c in completions]
        answers = [last_boxed(t) or t.strip() for t in texts]
        return [
            float(task.task.score_answer(answer=a, entry=task.entries[i]))
            for a, i in zip(answers, entry_index, strict=True)
        ]  # fmt: skip

    return verified


def _first() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process
