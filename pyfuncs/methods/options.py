"""The options of a command: their types and defaults, and how flags, a YAML file and defaults merge."""

from __future__ import annotations

import argparse
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def number(convert: Callable, least: float, what: str) -> Callable[[Any], Any]:
    """A reader of numbers of at least ``least``, which errors call ``what``."""

    def read(value):
        # a flag's value is text, and a bool would pass for an int
        if isinstance(value, bool):
            raise ValueError(what)
        if isinstance(value, float) and convert is int and not value.is_integer():
            raise ValueError(what)
        converted = convert(value)
        if not converted >= least:
            raise ValueError(what)
        return converted

    read.what = what  # type: ignore[attr-defined]
    return read


def text(value) -> str:
    """Reads a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def flag(value) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise ValueError
    return value


def mapping(value) -> dict:
    """Reads a mapping, or YAML text of one."""
    if isinstance(value, str):
        value = parse_yaml(value)
    if not isinstance(value, dict):
        raise ValueError
    return {str(k): v for k, v in value.items()}


text.what = "a string"  # type: ignore[attr-defined]
flag.what = "true or false"  # type: ignore[attr-defined]
mapping.what = "a mapping"  # type: ignore[attr-defined]
count = number(int, 1, "a whole number, at least 1")
natural = number(int, 0, "a whole number, at least 0")
nonnegative = number(float, 0.0, "a number, at least 0")


def one_of(*choices: str) -> Callable[[Any], str]:
    """A reader of one of the ``choices``."""

    def read(value):
        if value not in choices:
            raise ValueError
        return value

    read.what = f"one of {', '.join(choices)}"  # type: ignore[attr-defined]
    return read


@dataclass(frozen=True)
class Option:
    """``read`` turns a flag's text or a YAML value into the option's type, or raises."""

    read: Callable[[Any], Any]
    default: Any
    help: str


def output_options(save_steps: int = 500, logging_steps: int = 10) -> dict[str, Option]:
    """The options that every command which trains has for what it writes and how it goes on."""
    return {
        "output": Option(text, None, "directory to write checkpoints and the model to"),
        "save_steps": Option(count, save_steps, "optimizer steps between checkpoints"),
        "logging_steps": Option(count, logging_steps, "optimizer steps between logs"),
        "resume": Option(flag, False, "go on from the newest whole checkpoint in --output"),
        "overwrite": Option(flag, False, "start again in an --output that is not empty"),
    }


def add_flags(parser: argparse.ArgumentParser, options: Mapping[str, Option], configuration: str) -> None:
    """A flag for each option and ``--config``; ``configuration`` is the class whose fields ``set`` takes."""
    parser.add_argument("--config", metavar="FILE.yaml", help="options by name; flags override it")
    for name, option in options.items():
        spelt = f"--{name.replace('_', '-')}"
        if name == "set":
            about = f"any other {configuration} field; repeatable"
            parser.add_argument(spelt, action="append", metavar="KEY=VALUE", help=about)
        elif option.default is False:
            parser.add_argument(spelt, action="store_true", default=None, help=option.help)
        else:
            shown = "" if option.default in (None, {}) else f" ({option.default})"
            parser.add_argument(spelt, metavar=name.rsplit("_", 1)[-1].upper(), help=option.help + shown)


def given_flags(arguments: argparse.Namespace, options: Mapping[str, Option]) -> dict[str, Any]:
    """What the command line gave of ``options``."""
    flags = {k: v for k in options if (v := getattr(arguments, k)) is not None}
    if "set" in flags:
        flags["set"] = assignments(flags["set"], "--set")
    return flags


def merge(
    options: Mapping[str, Option], required: Sequence[str], flags: Mapping[str, Any], config: str | None
) -> dict[str, Any]:
    """Every option's value: flags over the YAML file over defaults.  Mappings merge key by key.

    ``flags`` holds only what was given.  ValueError for an unknown or malformed key, a required one that nothing
    gives, two of --max-steps and --epochs, or of --resume and --overwrite.
    """
    given = read_config(config, options) if config else {}
    out: dict[str, Any] = {}
    for name, option in options.items():
        values = []
        for source, origin in ((given, f"{config}: {name}"), (flags, f"--{name.replace('_', '-')}")):
            if name in source:
                values.append(_read(option, source[name], origin))
        if option.read is mapping:
            out[name] = {k: v for value in [option.default, *values] for k, v in value.items()}
        else:
            out[name] = values[-1] if values else option.default
    for name in required:
        if out[name] is None:
            raise ValueError(f"--{name.replace('_', '-')} is required (or {name}: in the YAML file)")
    if out.get("max_steps") is not None and out.get("epochs") is not None:
        raise ValueError("--max-steps and --epochs exclude each other")
    if out.get("resume") and out.get("overwrite"):
        raise ValueError("--resume and --overwrite exclude each other")
    return out


def read_config(path: str, options: Mapping[str, Option]) -> dict[str, Any]:
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
        if name not in options:
            raise ValueError(f"config file {path}: unknown key {key!r}{did_you_mean(name, options)}")
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
