"""``burnish drift``: collect, weigh, train, and again; every stage goes on after a kill.

    OUTPUT/burnish_drift.json                the options the run began with
    OUTPUT/round-0/episodes.jsonl            and .settings.json; round 0 is of --model
    OUTPUT/round-0/checkpoint-N, and the model
    OUTPUT/round-0/round.json                written last: the round is done
    OUTPUT/round-1/...                       of round 0's model

A round begins from what is on disk, so a run that is killed and resumed has the bits of one that is not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoints
from ..data import EVALUATION_SEED, TaskData, load_data, load_task
from ..models import check_model_name, load_model, load_tokenizer
from ..processes import world_size
from ..progress import show_loss
from ..run_directory import (
    RunDirectory,
    note,
    quiet_bars,
    set_aside,
    train_and_save,
    trainer_arguments,
    write_json,
)
from .engines import Engine, TransformersEngine, VLLMEngine
from .episode import Episode, read_episodes
from .episodes import collect, settings_file, solved_at
from .options import OWN_FIELDS
from .returns import WeightOptions
from .rows import weigh, weighted_rows
from .trainer import DriftConfig, DriftTrainer
from .verify import Verifier, find_answer, task_prompts, task_verifier

RECORD = "burnish_drift.json"
DONE = "round.json"
_MAY_CHANGE = (
    "resume", "overwrite", "output", "save_steps", "logging_steps", "eval_size", "collect_only", "refresh", "server",
)  # fmt: skip


@dataclass
class Run:
    """A checked run; None: ``data`` and ``verifier`` where there is no task, ``given`` without a file of episodes,
    ``client`` without a vLLM server."""

    options: dict[str, Any]
    directory: RunDirectory
    data: TaskData | None
    verifier: Verifier | None
    given: list[Episode] | None
    client: Any = None


def prepare(options: dict[str, Any]) -> Run:
    """A run of merged options.  ValueError, in one line, for anything wrong with the input; nothing is written."""
    weights = _weights(options)
    if not 0 < options["top_p"] <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1; got {options['top_p']}")
    options["processes"] = world_size()
    alone = options["episodes"] is not None and not options["refresh"] and not options["eval_size"]
    if options["processes"] > 1 and not alone:
        raise ValueError("episodes are played by one process: several train on a file, --episodes, and nothing else")
    find = find_answer(options["answer_pattern"])
    data = verifier = given = None
    if options["data"] is not None:
        found = load_data(options["data"], options["data_args"])
        if not isinstance(found, TaskData):
            raise ValueError(f"--data must be reasoning-gym:TASK, which can verify answers; got {options['data']}")
        data, verifier = found, task_verifier(found.task, find)
    elif options["data_args"]:
        raise ValueError("--data-args go with --data")
    if options["episodes"] is not None:
        given = read_episodes(options["episodes"])
        _check_whole(options["episodes"], given)
        weigh(given, weights)
    check_model_name(options["model"])
    directory = RunDirectory(options, RECORD, _MAY_CHANGE)
    _arguments(options, directory.path)
    tokenizer = load_tokenizer(options["model"])
    if not tokenizer.chat_template:
        raise ValueError(f"model {options['model']}: its tokenizer has no chat template, which episodes need")
    client = None
    if options["engine"] == "vllm":
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=options["server"])
    return Run(options, directory, data, verifier, given, client)


def train(it: Run) -> None:
    """All rounds that are not done; a summary of each goes to stdout."""
    options, directory = it.options, it.directory
    quiet_bars()
    if options["overwrite"] and directory.path.is_dir():
        for folder in directory.path.glob("round-*"):
            shutil.rmtree(folder)
    directory.path.mkdir(parents=True, exist_ok=True)
    write_json(directory.path / RECORD, options)
    source = options["model"]
    for number in range(options["refresh"] + 1):
        folder = directory.path / f"round-{number}"
        if (folder / DONE).is_file():
            note(f"round {number} is done")
        elif not _round(it, number, folder, source):
            return
        source = str(folder)
    if options["eval_size"]:
        _evaluate(it, source)


def _round(it: Run, number: int, folder: Path, source: str) -> bool:
    """Collect, weigh, train and save; False where only episodes were asked for."""
    options = it.options
    model, tokenizer = load_model(source)
    folder.mkdir(exist_ok=True)
    if it.given is not None and number == 0:
        episodes = it.given
    else:
        assert it.data is not None and it.verifier is not None  # prepare() has seen to it
        names = ("data", "data_args", "model", "engine", "temperature", "top_p", "max_new_tokens", "answer_pattern")
        episodes = collect(
            folder / "episodes.jsonl", task_prompts(it.data, options["instruction"] or ""),
            _engine(it, model, tokenizer), it.verifier, trajectories=options["trajectories"],
            max_turns=options["max_turns"], feedback=options["feedback"], seed=f"{options['seed']}/{number}",
            batch_size=options["rollout_batch"], settings={k: options[k] for k in names},
        )  # fmt: skip
    weights = _weights(options)
    try:
        found = weigh(episodes, weights).statistics
    except ValueError as error:  # no defect: what was collected has no row for these options
        raise SystemExit(f"burnish: error: {folder}: {error}") from None
    shown = ", ".join(f"{k} {v:.4g}" for k, v in found.items())
    if options["collect_only"]:
        print(f"{folder / 'episodes.jsonl'}: {shown}")
        return False
    checkpoint, broken = checkpoints.newest(folder, options["processes"])
    trainer = DriftTrainer(
        model, _arguments(options, folder), train_dataset=weighted_rows(episodes, weights), processing_class=tokenizer
    )
    show_loss(trainer)
    first = trainer.is_world_process_zero()
    if first:
        set_aside(broken)
        if checkpoint:
            note(f"resuming from {folder.name}/{checkpoint.name}")
    result = train_and_save(trainer, folder, checkpoint)
    if first:
        write_json(folder / DONE, {**found, "steps": trainer.state.global_step})
        print(f"{folder}: {trainer.state.global_step} steps, mean training loss {result.training_loss:.6g}; {shown}")
    return True


def _arguments(options: dict[str, Any], folder: Path) -> DriftConfig:
    names = (*WeightOptions.__dataclass_fields__, "length_norm", "batch_weight_norm", "max_length")
    return trainer_arguments(
        DriftConfig, {**options, "output": str(folder)}, OWN_FIELDS, **{name: options[name] for name in names}
    )


def _engine(it: Run, model, tokenizer) -> Engine:
    sampling = {k: it.options[k] for k in ("temperature", "top_p", "max_new_tokens")}
    if it.client is not None:
        return VLLMEngine(it.client, tokenizer, **sampling)
    return TransformersEngine(model, tokenizer, **sampling)


def _check_whole(path: str, episodes: list[Episode]) -> None:
    """ValueError where a file that ``collect`` wrote lacks trajectories."""
    beside = settings_file(path)
    if not beside.is_file():
        return
    want = json.loads(beside.read_text())["trajectories"]
    sizes: dict = {}
    for e in episodes:
        sizes[e.prompt_id] = sizes.get(e.prompt_id, 0) + 1
    for prompt_id, size in sizes.items():
        if size != want:
            raise ValueError(f"{path}: prompt {prompt_id!r} has {size} of {want} trajectories: collect the rest first")


def _evaluate(it: Run, source: str) -> None:
    options = it.options
    assert it.data is not None  # prepare() has seen to it
    arguments = {**options["data_args"], "size": options["eval_size"], "seed": EVALUATION_SEED}
    fresh = load_task(it.data.name, **arguments)
    model, tokenizer = load_model(source)
    turns = options["max_turns"]
    # never the server's: it has the weights of before
    engine = TransformersEngine(model, tokenizer, temperature=0.0, max_new_tokens=options["max_new_tokens"])
    at = solved_at(
        task_prompts(fresh, options["instruction"] or ""), engine,
        task_verifier(fresh.task, find_answer(options["answer_pattern"])), max_turns=turns,
        feedback=options["feedback"], batch_size=options["rollout_batch"],
    )  # fmt: skip
    first, last = (sum(t is not None and t <= within for t in at) / len(at) for within in (1, turns))
    write_json(it.directory.path / "evaluation.json", {"task": it.data.name, "arguments": arguments, "solved_at": at})
    print(f"{source}: of {len(at)} new problems {first:.1%} solved at turn 1, {last:.1%} within {turns}")


def _weights(options: dict[str, Any]) -> WeightOptions:
    return WeightOptions(**{name: options[name] for name in WeightOptions.__dataclass_fields__}).check()
