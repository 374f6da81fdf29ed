"""Collecting episodes: a fixed policy plays against a verifier, one line a finished trajectory; a kill loses a line."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..run_directory import write_json
from .engines import Engine, turn_seed
from .episode import Episode, parse, read_episodes
from .returns import SUCCESS
from .verify import Prompt, Verifier

FEEDBACK = "Incorrect. Please think again."


def play(
    starts: Sequence[tuple[Prompt, int]], engine: Engine, verifier: Verifier, seed: Callable[[int, int], int], *,
    max_turns: int = 5, feedback: str = FEEDBACK,
) -> Iterator[Episode]:  # fmt: skip
    """Play trajectories side by side to their first correct turn, or to ``max_turns``.

    Args:
        starts: (prompt, number of the trajectory within it); all still open ones make one call of the engine a turn.
        engine: (conversations, seeds) -> texts; texts of another number are a ValueError.
        verifier: (text, entry) -> (reward, answer or None); a reward that is not finite is a ValueError.
        seed: (index into starts, turn from 0) -> the turn's seed.

    Yields episodes as they end: by turn, then by index.
    """
    talks = [copy.deepcopy(prompt.messages) for prompt, _ in starts]
    rewards: list[list[float]] = [[] for _ in starts]
    answers: list[list[str | None]] = [[] for _ in starts]
    going = list(range(len(starts)))
    for turn in range(max_turns):
        if not going:
            return
        texts = engine([talks[i] for i in going], [seed(i, turn) for i in going])
        if len(texts) != len(going):
            raise ValueError(f"the engine gave {len(texts)} texts for {len(going)} conversations")
        left = []
        for i, text in zip(going, texts, strict=True):
            prompt, trajectory = starts[i]
            reward, answer = verifier(text, prompt.entry)
            if not math.isfinite(reward):
                raise ValueError(f"the verifier gave {reward!r} for a turn of prompt {prompt.prompt_id!r}")
            talks[i].append({"role": "assistant", "content": text})
            rewards[i].append(float(reward))
            answers[i].append(answer)
            if reward >= SUCCESS or turn == max_turns - 1:
                yield Episode(prompt.prompt_id, trajectory, talks[i], rewards[i], answers[i])
            else:
                talks[i].append({"role": "user", "content": feedback})
                left.append(i)
        going = left


def collect(
    path: str | Path, prompts: Sequence[Prompt], engine: Engine, verifier: Verifier, *, trajectories: int = 16,
    max_turns: int = 5, feedback: str = FEEDBACK, seed: int | str = 0, batch_size: int = 64,
    settings: dict[str, Any] | None = None, progress: bool = True,
) -> list[Episode]:  # fmt: skip
    """Episodes of every prompt, in a JSONL file that grows by whole lines and is gone on with where it exists.

    Each finished trajectory is appended and synced to disk.  After a kill the same call cuts a half line off and plays
    the rest: trajectories are played in blocks of ``batch_size`` that depend on nothing else, and each turn has a seed
    of its own, so the file becomes what it would have been, byte for byte where the engine repeats itself.

    Args:
        path: the file; beside it ``path`` with the suffix .settings.json records what made it.
        prompts: with different ids.
        engine, verifier: as ``play``.
        trajectories: K, of each prompt.
        max_turns: T.
        seed: of the whole collection; see ``turn_seed``.
        batch_size: trajectories played side by side.
        settings: anything else that decides the result (model, temperature), JSON values: recorded and compared.

    Returns all episodes.  ValueError for numbers out of range, ids given twice, an existing file of other settings, or
    one that is damaged before its last line.
    """
    path = Path(path)
    for name, value in (("trajectories", trajectories), ("max_turns", max_turns), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not prompts:
        raise ValueError("prompts: there are none")
    ids = [p.prompt_id for p in prompts]
    if len(set(ids)) != len(ids):
        raise ValueError(f"prompts: the id {next(i for i in ids if ids.count(i) > 1)!r} is given twice")
    content = json.dumps([[p.prompt_id, p.messages] for p in prompts], sort_keys=True).encode()
    record = {
        **(settings or {}), "prompts": hashlib.sha256(content).hexdigest(), "trajectories": trajectories,
        "max_turns": max_turns, "feedback": feedback, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    done = _prepare(path, record, {(i, k) for i in ids for k in range(trajectories)})
    starts = [(prompt, k) for prompt in prompts for k in range(trajectories)]
    bar = tqdm(total=len(starts), initial=len(done), desc="episodes", disable=not progress)
    solved = sum(e.solved for e in done.values())
    with path.open("ab") as file:
        for first in range(0, len(starts), batch_size):
            block = starts[first : first + batch_size]
            if all((p.prompt_id, k) in done for p, k in block):
                continue

            def seed_of(index: int, turn: int, first: int = first) -> int:
                prompt, k = divmod(first + index, trajectories)
                return turn_seed(seed, prompt, k, turn, trajectories=trajectories, turns=max_turns)

            for episode in play(block, engine, verifier, seed_of, max_turns=max_turns, feedback=feedback):
                key = (episode.prompt_id, episode.trajectory)
                if key in done:
                    continue
                file.write(episode.line())
                file.flush()
                os.fsync(file.fileno())
                done[key] = episode
                solved += episode.solved
                bar.update()
                bar.set_postfix(solved=f"{solved / len(done):.1%}")
    bar.close()
    return read_episodes(path)


def settings_file(path: str | Path) -> Path:
    """Where ``collect`` records what made a file of episodes."""
    return Path(path).with_suffix(".settings.json")


def _prepare(path: Path, record: dict, wanted: set) -> dict:
    """The episodes that are there, by id and trajectory, with a half line cut off; the settings are on disk."""
    beside = settings_file(path)
    if beside.is_file():
        before = json.loads(beside.read_text())
        for name in record.keys() | before.keys():
            if before.get(name) != record.get(name):
                raise ValueError(
                    f"{path}: {name} is {record.get(name)!r}, but these episodes began with {before.get(name)!r}"
                )
    elif path.exists():
        raise ValueError(f"{path}: exists without {beside.name}, so what made it is unknown: choose another file")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, record)
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    lines = content[:whole].splitlines()
    done = {}
    for number, line in enumerate(lines, 1):
        (episode,) = read_episodes([parse(line, f"{path}:{number}")])
        key = (episode.prompt_id, episode.trajectory)
        if key not in wanted or key in done:
            raise ValueError(f"{path}:{number}: trajectory {key[1]} of prompt {key[0]!r} does not belong here")
        done[key] = episode
    return done


def solved_at(
    prompts: Sequence[Prompt], engine: Engine, verifier: Verifier, *, max_turns: int = 5, feedback: str = FEEDBACK,
    seed: int | str = 0, batch_size: int = 64, progress: bool = True,
) -> list[int | None]:  # fmt: skip
    """Of each prompt the turn, from 1, at which one trajectory solved it, or None: accuracy within T turns.

    The prompts, the feedback and the calls of the engine are those of ``collect``.
    """
    if not prompts:
        raise ValueError("prompts: there are none")
    out: list[int | None] = [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc="evaluating", disable=not progress)
    for first in range(0, len(prompts), batch_size):
        block = [(p, first + i) for i, p in enumerate(prompts[first : first + batch_size])]

        def seed_of(index: int, turn: int, first: int = first) -> int:
            return turn_seed(seed, first + index, 0, turn, trajectories=1, turns=max_turns)

        for episode in play(block, engine, verifier, seed_of, max_turns=max_turns, feedback=feedback):
            out[episode.trajectory] = len(episode.rewards) if episode.solved else None
            bar.update()
    bar.close()
    return out
