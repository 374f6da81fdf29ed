"""Fine-tuning techniques as one table: how HF PEFT makes each, how many parameters it trains, and its usual rate.

A budget is a number of trainable parameters.  ``trainable_parameters`` counts them from shapes alone, by formulas that
tests hold against HF PEFT's own modules and against PEFT-Arena's printed counts; ``match_budget`` turns them around.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..options import did_you_mean

#: (out features, in features, whether it is the MLP's last projection) of each adapted linear layer.
Shape = tuple[int, int, bool]
#: Names of an MLP's last projection: there IA3 scales the input, and the output elsewhere.
DOWN = ("down_proj", "c_proj", "fc2", "w2", "dense_4h_to_h", "wo")


@dataclass(frozen=True)
class Technique:
    """One row of the table.

    family: which path its runs are rewound along ("lora", "oft", or "full" for the line between merged weights).
    size: the argument that a budget sets, or None where there is none to set.
    sizes: values of ``size`` that are tried for a budget.
    config: (steps, arguments) -> HF PEFT's config, or None where no adapter is made.
    count: (shapes, arguments) -> trainable parameters; None: all of the model's.
    rate: the learning rate where a config gives none: PEFT-Arena's 2e-4 for adapters and 5e-5 for all parameters.
    defaults: its arguments, with their defaults.
    """

    name: str
    family: str
    about: str
    count: Callable[[list[Shape], Mapping[str, Any]], int] | None
    config: Callable[[int, Mapping[str, Any]], Any] | None = None
    size: str | None = None
    sizes: tuple[int, ...] = ()
    rate: float = 2e-4
    defaults: Mapping[str, Any] = ()  # type: ignore[assignment]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` over the defaults.  ValueError for a name that it does not have or a number that cannot be."""
        own = dict(self.defaults)
        for name, value in given.items():
            if name not in own:
                has = f"; it has {', '.join(own)}" if own else "; it has none"
                raise ValueError(f"method {self.name} has no argument {name!r}{did_you_mean(name, own) or has}")
            whole = isinstance(own[name], int) and not isinstance(own[name], bool)
            if whole and (type(value) is not int or value < 1):
                raise ValueError(f"method {self.name}: {name} must be a whole number, at least 1; got {value!r}")
        return {**own, **given}


def all_techniques() -> dict[str, Technique]:
    """The table, by name."""
    return dict(_TABLE)


def technique(name: str) -> Technique:
    """One row.  ValueError, with close names, where there is none."""
    if name not in _TABLE:
        close = did_you_mean(name, _TABLE) or f"; there are {', '.join(_TABLE)}"
        raise ValueError(f"unknown method {name!r}{close}")
    return _TABLE[name]


def shapes(model: nn.Module) -> list[Shape]:
    """The linear layers that HF PEFT's "all-linear" adapts: all but the output head.  Meta tensors do."""
    return [(m.out_features, m.in_features, down) for _, m, down in linear_layers(model)]


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear, bool]]:
    """(name, layer, whether it is the MLP's last projection) of each layer that is adapted."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module, name.rsplit(".", 1)[-1] in DOWN and "attn" not in name


def trainable_parameters(model, name: str, **arguments) -> int:
    """Parameters that a technique trains: of a model (the meta device does) or of a transformers config.

    ValueError for an unknown technique or argument, or a model without linear layers for an adapter.
    """
    row, model = technique(name), _model(model)
    return _count(row, model, shapes(model), row.arguments(arguments))


@dataclass(frozen=True)
class Budget:
    """A technique's arguments for a budget, and what they come to.

    ``mismatch`` is parameters / budget - 1: 0.02 says that two percent more are trained.
    """

    technique: str
    arguments: dict[str, Any]
    parameters: int
    budget: int

    @property
    def mismatch(self) -> float:
        return self.parameters / self.budget - 1


def match_budget(model, name: str, budget: int, **arguments) -> Budget:
    """The size (rank, block, ...) whose count is nearest to ``budget`` by ratio; ``arguments`` are the others.

    Sizes that HF PEFT would change to fit the model's layers (blocks that do not divide their inputs) are passed over.
    A technique without a size is counted as it is, so read ``mismatch``.  ValueError for a budget below 1, a size
    that is given too, or a model without linear layers.
    """
    row, model = technique(name), _model(model)
    if type(budget) is not int or budget < 1:
        raise ValueError(f"budget must be a whole number, at least 1; got {budget!r}")
    if row.size is not None and row.size in arguments:
        raise ValueError(f"method {name}: {row.size} is what a budget sets; give one of the two")
    found = shapes(model)
    if row.size is None or not found:
        full = row.arguments(arguments)
        return Budget(name, full, _count(row, model, found, full), budget)
    narrowest = min(min(out, into) for out, into, _ in found)
    best: Budget | None = None
    for size in row.sizes:
        if row.size.endswith("block_size"):
            if any(into % size for _, into, _ in found):
                continue
        elif row.count in _FACTORS and size > narrowest:
            break  # a product of two factors has no higher rank
        full = row.arguments({**arguments, row.size: size})
        one = Budget(name, full, _count(row, model, found, full), budget)
        if best is None or abs(math.log(one.parameters / budget)) < abs(math.log(best.parameters / budget)):
            best = one
    if best is None:
        raise ValueError(f"method {name}: no {row.size} fits the model's layers")
    return best


def apply(model: nn.Module, name: str, steps: int, **arguments) -> nn.Module:
    """The model with a technique's fresh adapter around it (a ``peft.PeftModel``), or itself with all of its
    parameters trained.

    ``steps``: of the run; AdaLoRA's schedule needs them.  ValueError for what HF PEFT refuses, and for one that this
    version of it does not have.
    """
    row = technique(name)
    full = row.arguments(arguments)
    if row.config is None:
        return model.requires_grad_(True)
    import warnings

    import peft

    try:
        config = row.config(steps, full)
        with warnings.catch_warnings(), _no_cuda_build():
            # what it says of weights that an initialisation changes: the arena reads the model merged
            warnings.simplefilter("ignore")
            made = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"method {name}: HF PEFT {peft.__version__} refuses: {error}") from error
    if name == "milora":
        minor_components(made)
    return made


@contextlib.contextmanager
def _no_cuda_build() -> Iterator[None]:
    """HF PEFT compiles CUDA code for BOFT on every machine, and says so where that fails.

    Without CUDA nothing comes of it, and a process that is killed meanwhile leaves a lock on which all later ones
    wait for ever.
    """
    import peft.tuners.boft.layer as boft

    build = boft.get_fbd_cuda
    if not torch.cuda.is_available():
        boft.get_fbd_cuda = lambda: None
    try:
        yield
    finally:
        boft.get_fbd_cuda = build


@torch.no_grad()
def minor_components(model: nn.Module, adapter: str = "default") -> None:
    """Start a LoRA at the r smallest singular triples of each weight (MiLoRA, arXiv 2406.09044), in place.

    W = U S V^T: B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T with s the adapter's scale, and the base keeps
    W - s B A, so that the model computes what it did.  HF PEFT 0.21 has the principal triples (PiSSA) and MiCA (minor
    left vectors, frozen), not this.  fp32; layers on the meta device are left alone.
    """
    from peft.tuners.lora import Linear

    layers: list[Any] = [m for m in model.modules() if isinstance(m, Linear) and adapter in m.lora_A]
    for module in layers:
        base = module.get_base_layer()
        if base.weight.device.type == "meta":
            continue
        rank, scale = module.r[adapter], module.scaling[adapter]
        u, s, vh = torch.linalg.svd(base.weight.float(), full_matrices=False)
        root = (s[-rank:] / scale).sqrt()
        b, a = u[:, -rank:] * root, root[:, None] * vh[-rank:]
        factors: tuple[Any, Any] = module.lora_A[adapter], module.lora_B[adapter]
        for factor, value in zip(factors, (a, b), strict=True):
            factor.weight.copy_(value)
        base.weight.copy_(base.weight.float() - scale * (b @ a))


def _model(model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model)


def _count(row: Technique, model: nn.Module, found: list[Shape], arguments: Mapping[str, Any]) -> int:
    if row.count is None:
        return sum(p.numel() for p in model.parameters())
    if not found:
        raise ValueError(
            f"method {row.name}: {type(model).__name__} has no layer that is counted: torch.nn.Linear ones but the "
            "output head are (GPT-2's are Conv1D)"
        )
    return row.count(found, arguments)


def block_size(into: int, size: int) -> int:
    """The block that HF PEFT's OFT takes where ``size`` does not divide a layer's input: the nearest divisor, the
    smaller of two as near."""
    if size >= into:
        return into
    down = next(b for b in range(size, 0, -1) if into % b == 0)
    up = next(b for b in range(size, into + 1) if into % b == 0)
    return down if size - down <= up - size else up


def _low_rank(found: list[Shape], a: Mapping[str, Any]) -> int:
    return sum(a["r"] * (out + into) for out, into, _ in found)


def _adalora(found: list[Shape], a: Mapping[str, Any]) -> int:
    return sum(a["r"] * (out + into + 1) for out, into, _ in found)


def _dora(found: list[Shape], a: Mapping[str, Any]) -> int:
    return _low_rank(found, a) + sum(out for out, _, _ in found)


def _miss(found: list[Shape], a: Mapping[str, Any]) -> int:
    return sum(a["r"] * out for out, _, _ in found)


def _vera(found: list[Shape], a: Mapping[str, Any]) -> int:
    return sum(out + a["r"] for out, _, _ in found)


def _ia3(found: list[Shape], a: Mapping[str, Any]) -> int:
    return sum(into if down else out for out, into, down in found)


def _oft(found: list[Shape], a: Mapping[str, Any]) -> int:
    # in/b blocks of b(b-1)/2
    return sum(into * (block_size(into, a["block_size"]) - 1) // 2 for _, into, _ in found)


def _boft(found: list[Shape], a: Mapping[str, Any]) -> int:
    return sum(into * a["block_size"] + out for out, into, _ in found)


def _peft(kind: str, **fields) -> Any:
    import peft

    if not hasattr(peft, kind):
        raise ValueError(f"there is no {kind}")
    return getattr(peft, kind)(task_type="CAUSAL_LM", target_modules="all-linear", **fields)


def _lora_config(steps: int, a: Mapping[str, Any], **more) -> Any:
    alpha = 2 * a["r"] if a["alpha"] is None else a["alpha"]
    return _peft("LoraConfig", r=a["r"], lora_alpha=alpha, lora_dropout=a["dropout"], **more)


def _adalora_config(steps: int, a: Mapping[str, Any]) -> Any:
    # HF PEFT ignores AdaLoRA's r and trains init_r = 12: PEFT-Arena's "r8" was of 12.  Here r is what is trained, and
    # what the schedule leaves of it keeps the default's ratio of 8 to 12
    target = max(1, round(a["r"] * 2 / 3)) if a["target_r"] is None else a["target_r"]
    if target > a["r"]:
        raise ValueError(f"target_r {target} is above r {a['r']}")
    if steps < 3:
        raise ValueError(f"its schedule needs at least 3 steps; got {steps}")
    alpha = 2 * a["r"] if a["alpha"] is None else a["alpha"]
    return _peft(
        "AdaLoraConfig", init_r=a["r"], target_r=target, lora_alpha=alpha, lora_dropout=a["dropout"],
        total_step=steps, tinit=steps // 10, tfinal=max(1, steps // 5),
    )  # fmt: skip


def _vera_config(steps: int, a: Mapping[str, Any]) -> Any:
    return _peft("VeraConfig", r=a["r"], vera_dropout=a["dropout"], d_initial=a["d_initial"])


def _ia3_config(steps: int, a: Mapping[str, Any]) -> Any:
    # a language model's, not SEQ_CLS, and feed-forward layers named: PEFT-Arena's own script has neither
    return _peft("IA3Config", feedforward_modules=list(DOWN))


def _oft_config(steps: int, a: Mapping[str, Any]) -> Any:
    return _peft(
        "OFTConfig", oft_block_size=a["block_size"], module_dropout=a["dropout"], use_cayley_neumann=a["neumann"]
    )


def _boft_config(steps: int, a: Mapping[str, Any]) -> Any:
    # one factor: without its CUDA extension HF PEFT trains one whatever it is told, and counts must not depend on that
    return _peft("BOFTConfig", boft_block_size=a["block_size"], boft_n_butterfly_factor=1, boft_dropout=a["dropout"])


def _miss_config(steps: int, a: Mapping[str, Any]) -> Any:
    return _peft("MissConfig", r=a["r"], miss_dropout=a["dropout"])


_RANKS = tuple(range(1, 1025))
#: Counts of the techniques whose r is the rank of two factors of each layer.
_FACTORS = (_low_rank, _dora, _adalora)
_BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
_LOW_RANK = {"r": 8, "alpha": None, "dropout": 0.05}


def _lora_like(name: str, about: str, count=_low_rank, family: str = "full", **more) -> Technique:
    return Technique(
        name, family, about, count, lambda steps, a: _lora_config(steps, a, **more), "r", _RANKS, 2e-4, _LOW_RANK
    )


_ROWS = (
    Technique("full", "full", "all parameters, AdamW", None, rate=5e-5),
    Technique(
        "chunkft", "full", "all parameters, a chunk at a time (burnish.ChunkAdamW)", None, rate=5e-5,
        defaults={"chunks": 8, "steps_per_chunk": None},
    ),
    _lora_like("lora", "arXiv 2106.09685", family="lora"),
    _lora_like("dora", "arXiv 2402.09353: LoRA of the direction, a magnitude a row", _dora, use_dora=True),
    _lora_like("pissa", "arXiv 2404.02948: LoRA from the principal singular triples", init_lora_weights="pissa"),
    _lora_like("milora", "arXiv 2406.09044: LoRA from the minor singular triples"),
    Technique(
        "adalora", "full", "arXiv 2303.10512: ranks by importance; r is what is trained", _adalora, _adalora_config,
        "r", _RANKS, 2e-4, {**_LOW_RANK, "target_r": None},
    ),
    Technique(
        "miss", "full", "arXiv 2409.15371: one matrix a layer, shared over shards of the input", _miss, _miss_config,
        "r", _RANKS, 2e-4, {"r": 8, "dropout": 0.0},
    ),
    Technique(
        "vera", "full", "arXiv 2310.11454: scales of fixed random projections", _vera, _vera_config, "r",
        tuple(range(1, 4097)), 2e-4,
        {"r": 256, "dropout": 0.0, "d_initial": 0.1},
    ),
    Technique("ia3", "full", "arXiv 2205.05638: scales of activations", _ia3, _ia3_config),
    Technique(
        "oft", "oft", "arXiv 2306.07280: rotations of the input, block by block", _oft, _oft_config, "block_size",
        _BLOCKS, 2e-4, {"block_size": 32, "dropout": 0.0, "neumann": True},
    ),
    Technique(
        "boft", "full", "arXiv 2311.06243: rotations and a scale a row, one butterfly factor", _boft, _boft_config,
        "block_size", _BLOCKS,
        2e-4, {"block_size": 4, "dropout": 0.0},
    ),
)  # fmt: skip
_TABLE = {row.name: row for row in _ROWS}
