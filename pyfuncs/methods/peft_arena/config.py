"""The file that describes an arena: model, data, suites, methods, rates, seeds, controls, rewinding.

Everything that can be read without a model is checked here; the runs that it asks for are listed in ``plan``.
"""

from __future__ import annotations

import math
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import options
from ..options import Option, count, did_you_mean, flag, mapping, nonnegative, text
from . import techniques

#: Paths that a finished run may be rewound along, by the family of its technique; the first is its own.
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": ("line",),
    "lora": ("scale",),
    "oft": ("generator", "safe", "min", "line"),
}
RULES = ("best_target", "furthest", "best_sum")
#: PEFT-Arena's own training settings, as fields of trl.SFTConfig (warmup_steps below 1 is a share of all steps).
TRAINING = {
    "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.01, "warmup_steps": 0.1, "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
}  # fmt: skip


def _list(read, what: str):
    def many(value):
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError
        return [read(v) for v in values]

    many.what = what  # type: ignore[attr-defined]
    return many


def _positive(value) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError
    return number


def _raw(value):
    if not isinstance(value, (dict, list)) or not value:
        raise ValueError
    return value


_raw.what = "a mapping or a list, not empty"  # type: ignore[attr-defined]
_rates = _list(_positive, "a number above 0, or a list of such")
_seeds = _list(options.natural, "a whole number, at least 0, or a list of such")

OPTIONS: dict[str, Option] = {
    "model": Option(text, None, "directory, hub name or smollm2; {seed} in it stands for a run's seed"),
    "output": Option(text, None, "directory of the runs and the report"),
    "data": Option(text, None, "what to train on: FILE.jsonl, reasoning-gym:TASK or MODULE:FUNCTION"),
    "data_args": Option(mapping, {}, "of a task or a function"),
    "target": Option(mapping, {}, "suites of what is trained for, by name"),
    "retention": Option(mapping, {}, "suites of what should stay, by name: General is their mean, and of these only"),
    "methods": Option(_raw, None, "names, or mappings with method, its arguments, budget, lr, label"),
    "budget": Option(count, None, "trainable parameters of each method that gives neither a size nor a budget"),
    "lr": Option(_rates, None, "learning rates of each method that gives none"),
    "seeds": Option(_seeds, [0, 1, 2], "of data order and initialisation"),
    "steps": Option(count, None, "optimizer steps of a run"),
    "controls": Option(mapping, {}, "steps: fewer of them; lr_scale: factors below 1; each at a method's highest rate"),
    "rewind": Option(mapping, {}, "grid, variants (a list), power"),
    "rule": Option(mapping, {}, "how a point is chosen: best_target, furthest or best_sum: NUMBER (best_sum: 1)"),
    "metrics": Option(mapping, {}, "weights, activations, modules, rows"),
    "batch_size": Option(count, 8, "rows a micro-batch"),
    "accumulation": Option(count, 1, "micro-batches an optimizer step"),
    "max_length": Option(count, 1024, "tokens a row; longer ones are cut"),
    "eval_batch_size": Option(count, 16, "rows a batch in evaluation"),
    "save_steps": Option(count, 500, "optimizer steps between checkpoints"),
    "logging_steps": Option(count, 10, "optimizer steps between logs"),
    "forgetting": Option(_list(nonnegative, "numbers, at least 0"), [0.01, 0.02, 0.05, 0.1], "limits in the report"),
    "keep": Option(flag, False, "keep each run's model or adapter"),
    "training": Option(mapping, TRAINING, "any other trl.SFTConfig field"),
}
REQUIRED = ("model", "output", "data", "methods", "steps")
_METHOD_KEYS = ("method", "label", "budget", "lr")


@dataclass(frozen=True)
class Method:
    """One entrant: a technique with its arguments, or with a budget that sets its size, and its learning rates."""

    label: str
    technique: str
    arguments: Mapping[str, Any]
    rates: tuple[float, ...]
    budget: int | None


@dataclass(frozen=True)
class Config:
    """A checked arena.  ``values`` has every option of ``OPTIONS``; the rest is read out of them."""

    values: Mapping[str, Any]
    methods: tuple[Method, ...]
    grid: tuple[float, ...]
    variants: tuple[str, ...]
    power: float
    rule: tuple[str, float]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def model(self, seed: int) -> str:
        """The model of a seed's runs."""
        return self["model"].replace("{seed}", str(seed))

    def paths(self, family: str) -> tuple[str, ...]:
        """The paths that runs of a technique's family are rewound along."""
        return tuple(v for v in VARIANTS[family] if v in self.variants)


def read_config(path: str) -> Config:
    """A YAML file's arena.  ValueError, in one line, for anything wrong in it."""
    return make_config(options.merge(OPTIONS, REQUIRED, {}, path))


def make_config(values: Mapping[str, Any]) -> Config:
    """An arena of options by name; those that are missing have their defaults.  ValueError as ``read_config``."""
    for name in values:
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r}{did_you_mean(name, OPTIONS)}")
    given = {name: values.get(name, option.default) for name, option in OPTIONS.items()}
    for name in REQUIRED:
        if given[name] is None:
            raise ValueError(f"{name} is required")
    given["training"] = {**TRAINING, **given["training"]}
    rewind = {"grid": [i / 10 for i in range(11)], "variants": None, "power": 0.5, **given["rewind"]}
    _known("rewind", rewind, ("grid", "variants", "power"))
    grid = _numbers("rewind: grid", rewind["grid"], 0.0, 1.0)
    every = tuple(dict.fromkeys(v for names in VARIANTS.values() for v in names))
    named = rewind["variants"]
    variants = every if named is None else tuple(named if isinstance(named, list) else [named])
    for variant in variants:
        if variant not in every:
            raise ValueError(f"rewind: variants are {', '.join(every)}; got {variant!r}")
    try:
        power = _positive(rewind["power"])
    except (TypeError, ValueError):
        raise ValueError(f"rewind: power must be above 0; got {rewind['power']!r}") from None
    # as they were read: an output's arena is the same however its numbers are written
    read = {"grid": grid, "variants": None if named is None else list(variants), "power": power}
    given["rewind"] = {k: read[k] for k in given["rewind"]}
    given["controls"] = _controls(given["controls"], given["steps"])
    rule = _rule(given["rule"])
    given["rule"] = dict([rule])
    given["metrics"] = _metrics(given["metrics"])
    for axis in ("target", "retention"):
        if not given[axis]:
            raise ValueError(f"{axis}: at least one suite is needed")
    shared = set(given["target"]) & set(given["retention"])
    if shared:
        raise ValueError(
            f"the suite {sorted(shared)[0]!r} is of both target and retention: give each a name of its own"
        )
    _files_apart(given)
    return Config(
        given, _methods(given), tuple(sorted({0.0, *grid, 1.0})), variants, power, rule,
    )  # fmt: skip


def files_in(value: Any) -> Iterator[Path]:
    """The files that an option's value names, however deep in it."""
    if isinstance(value, str) and os.path.isfile(value):
        yield Path(value)
    elif isinstance(value, (Mapping, list)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from files_in(one)


def _files_apart(given: Mapping[str, Any]) -> None:
    """ValueError where a suite reads the file that is trained on: training reads all rows of it."""
    data = Path(given["data"])
    if not data.is_file():
        return
    for axis in ("target", "retention"):
        for name, suite in given[axis].items():
            for key in ("rows", "text"):
                other = suite.get(key) if isinstance(suite, Mapping) else None
                if isinstance(other, str) and Path(other).is_file() and data.samefile(other):
                    raise ValueError(
                        f"data and {axis}: {name}: {key} are one file, {data.resolve()}: a suite needs rows that are "
                        "not trained on"
                    )


def _methods(given: Mapping[str, Any]) -> tuple[Method, ...]:
    entries = given["methods"]
    if isinstance(entries, Mapping):
        entries = [{"label": k, "method": k, **(v or {})} for k, v in entries.items()]
    out: list[Method] = []
    for entry in entries:
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise ValueError(f"methods: a name, or a mapping with 'method', is needed; got {entry!r}")
        row = techniques.technique(entry["method"])
        arguments = {k: v for k, v in entry.items() if k not in _METHOD_KEYS}
        row.arguments(arguments)
        budget = entry.get("budget", None if row.size in arguments else given["budget"])
        if budget is not None:
            if row.size is None:
                if "budget" in entry:
                    raise ValueError(f"method {row.name}: it has no size that a budget could set")
                budget = None
            elif row.size in arguments:
                raise ValueError(f"method {row.name}: give {row.size} or budget, not both")
            elif type(budget) is not int or budget < 1:
                raise ValueError(f"method {row.name}: budget must be a whole number, at least 1; got {budget!r}")
        rates = entry.get("lr", given["lr"] or [row.rate])
        try:
            rates = tuple(sorted(set(_rates(rates))))
        except (TypeError, ValueError):
            raise ValueError(f"method {row.name}: lr must be {_rates.what}; got {rates!r}") from None
        label = entry.get("label", _label(row, arguments))
        if not isinstance(label, str) or not label or any(c in label for c in "/\\ "):
            raise ValueError(f"method {row.name}: label must be a word that a file can have; got {label!r}")
        if any(m.label == label for m in out):
            raise ValueError(f"methods: two are called {label!r}; give one a label")
        out.append(Method(label, row.name, arguments, rates, budget))
    return tuple(out)


def _label(row: techniques.Technique, arguments: Mapping[str, Any]) -> str:
    size = arguments.get(row.size) if row.size else None
    return row.name if size is None else f"{row.name}-{'r' if row.size == 'r' else 'b'}{size}"


def _controls(controls: Mapping[str, Any], steps: int) -> dict[str, Any]:
    _known("controls", controls, ("steps", "lr_scale"))
    out = dict(controls)
    if "steps" in controls:
        out["steps"] = controls["steps"] if isinstance(controls["steps"], list) else [controls["steps"]]
        for fewer in out["steps"]:
            if type(fewer) is not int or not 0 < fewer < steps:
                raise ValueError(f"controls: steps must be whole numbers below {steps}; got {fewer!r}")
    if "lr_scale" in controls:
        out["lr_scale"] = _numbers("controls: lr_scale", controls["lr_scale"], 0.0, 1.0, ends=False)
    return out


def _names(value) -> str | list[str]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError
    return value


_names.what = "a name, or a list of names"  # type: ignore[attr-defined]
_METRICS = {"weights": flag, "activations": flag, "modules": _names, "rows": count}


def _metrics(given: Mapping[str, Any]) -> dict[str, Any]:
    _known("metrics", given, tuple(_METRICS))
    out = {}
    for name, value in given.items():
        read: Any = _METRICS[name]
        try:
            out[name] = read(value)
        except (TypeError, ValueError):
            raise ValueError(f"metrics: {name} must be {read.what}; got {value!r}") from None
    return out


def _known(where: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise ValueError(f"{where} has {', '.join(names)}; got {name!r}")


def _numbers(where: str, values, low: float, high: float, ends: bool = True) -> list[float]:
    out = []
    try:
        for v in values if isinstance(values, list) else [values]:
            number = nonnegative(v)
            if not (low <= number <= high if ends else low < number < high):
                raise ValueError
            out.append(number)
        if not out:
            raise ValueError
    except (TypeError, ValueError):
        kind = f"in [{low:g}, {high:g}]" if ends else f"between {low:g} and {high:g}"
        raise ValueError(f"{where} must be a list of numbers {kind}; got {values!r}") from None
    return out


def _rule(rule: Mapping[str, Any]) -> tuple[str, float]:
    try:
        ((name, number),) = (rule or {"best_sum": 1.0}).items()
        number = nonnegative(number)
        if name not in RULES or number == math.inf:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"rule must be one of {', '.join(RULES)} with a number, at least 0; got {dict(rule)!r}"
        ) from None
    return name, number
