"""Token objectives: each a few lines of torch on row statistics.

``burnish.objectives.get("target_sft", eta=0.5)`` makes one by name; ``names()`` lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from . import distill, policy, qtarget
from .aggregate import AGGREGATES, count_items
from .base import STATISTICS, Objective, RowStats, objective
from .distill import chain_distillation, jsd, kd, kd_hybrid, on_policy_distillation, reverse_kl
from .policy import (
    bnpo,
    cispo,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    gspo,
    ppo_clip,
    reinforce,
    rloo,
    sapo,
    weighted_nll,
)
from .qtarget import (
    asft,
    beyond_log,
    cft,
    confidence_penalty,
    deft,
    dft,
    eaft,
    focal,
    gce,
    gem,
    gift,
    idft,
    iw_sft,
    label_smoothing,
    mae,
    nll,
    poly,
    prift,
    profit,
    psft,
    rho1,
    sft_kl,
    talr,
    target_sft,
    unlikelihood,
)

_REGISTRY: dict[str, Callable[..., Objective]] = {
    name: factory
    for module in (qtarget, distill, policy)
    for name, factory in vars(module).items()
    if not name.startswith("_") and inspect.isfunction(factory) and factory.__module__ == module.__name__
}


def names() -> list[str]:
    """Names of all registered objectives, sorted."""
    return sorted(_REGISTRY)


def register(name: str, factory: Callable[..., Objective]) -> None:
    """Add an objective of your own under a name, so that ``get`` and the command line find it.

    Raises ValueError if the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"objective name {name!r} is taken")
    _REGISTRY[name] = factory


def get(name: str, **arguments) -> Objective:
    """An objective by name.  ValueError for an unknown name or an argument it does not take."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(names())}")
    factory = _REGISTRY[name]
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"objective {name}{inspect.signature(factory)}: {error}") from None
    try:
        return factory(**arguments)
    except TypeError as error:  # a value of the wrong kind
        raise ValueError(f"objective {name}: {error}") from None


def describe() -> list[dict[str, str]]:
    """A row for each objective: name, arguments, gauge (weight, trust, residual), needs, paper."""
    rows = []
    for name in names():
        signature = inspect.signature(_REGISTRY[name])
        required = {
            p.name: 0.5
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
        }
        one = _REGISTRY[name](**required)
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        text = str(inspect.Signature(plain))
        rows.append({
            "name": name, "arguments": text, "weight": one.weight, "trust": one.trust, "residual": one.residual,
            "needs": ", ".join([*one.inputs, *sorted(one.needs)]), "paper": one.paper,
        })  # fmt: skip
    return rows


__all__ = [
    "AGGREGATES",
    "STATISTICS",
    "Objective",
    "RowStats",
    "asft",
    "beyond_log",
    "bnpo",
    "cft",
    "chain_distillation",
    "cispo",
    "confidence_penalty",
    "count_items",
    "dapo",
    "deft",
    "describe",
    "dft",
    "dr_grpo",
    "eaft",
    "focal",
    "gce",
    "gem",
    "get",
    "gift",
    "gmpo",
    "grpo",
    "gspo",
    "idft",
    "iw_sft",
    "jsd",
    "kd",
    "kd_hybrid",
    "label_smoothing",
    "mae",
    "names",
    "nll",
    "objective",
    "on_policy_distillation",
    "poly",
    "ppo_clip",
    "prift",
    "profit",
    "psft",
    "register",
    "reinforce",
    "reverse_kl",
    "rho1",
    "rloo",
    "sapo",
    "sft_kl",
    "talr",
    "target_sft",
    "unlikelihood",
    "weighted_nll",
]  # fmt: skip
