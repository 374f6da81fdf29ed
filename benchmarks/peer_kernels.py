"""Liger's and TRL's fused losses, from hidden states to gradients, as their own host code launches them.

``paths()`` lists what is installed.  static.py *records* the launches (``recorded``: nothing runs, block sizes
and warps are those the host code picks for a target); ledger.py lets Triton's interpreter run them.  What
host code does only where there is no GPU, casting operands up for a product, is replaced by the product alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

#: Liger's name of each target's architecture, by which it picks warps.
ARCHITECTURES = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}


@dataclass
class Problem:
    """Tokens and two heads; logits are (N, V)."""

    hidden: torch.Tensor  # (N, H), requires grad
    weight: torch.Tensor  # (V, H), requires grad
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    target: torch.Tensor  # (N,)

    @property
    def logits(self) -> torch.Tensor:
        return self.hidden @ self.weight.t()

    @property
    def teacher_logits(self) -> torch.Tensor:
        return self.teacher_hidden @ self.teacher_weight.t()


def problem(rows: int, columns: int, dtype: torch.dtype, width: int = 16) -> Problem:
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return Problem(
        rand(rows, width).requires_grad_(), rand(columns, width).requires_grad_(), rand(rows, width),
        rand(columns, width), torch.randint(0, columns, (rows,), generator=g),
    )  # fmt: skip


@dataclass(frozen=True)
class Path:
    """One way through a library: ``run`` returns the mean loss of an objective, differentiable."""

    library: str
    name: str
    objective: str
    run: Callable[[Problem], torch.Tensor]


def versions() -> dict[str, str]:
    found = {}
    for library, package in (("liger", "liger-kernel"), ("trl", "trl")):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(package)
    return found


def paths() -> list[Path]:
    installed = versions()
    return (_liger() if "liger" in installed else []) + (_trl() if "trl" in installed else [])


def _module(name: str):
    return importlib.import_module(name)


def _liger() -> list[Path]:
    ops = "liger_kernel.ops."
    ce = _module(ops + "cross_entropy").LigerCrossEntropyFunction
    flce = _module(ops + "fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    fljsd = _module(ops + "fused_linear_jsd").LigerFusedLinearJSDFunction
    flkl = _module(ops + "fused_linear_kl_div").LigerFusedLinearKLDivFunction
    kl = _module(ops + "kl_div").LigerKLDivLossFunction

    def fused_ce(p, scaling=False):
        args = (None, None, -100, 0.0, 0.0, "mean", None, False, None, scaling)
        return flce.apply(p.hidden, p.weight, p.target, *args)[0]

    def jsd(beta):
        # without labels every row counts, and the divisor is the number of rows
        return lambda p: fljsd.apply(
            p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, None, beta, -100, 1.0
        )  # fmt: skip

    # both take what somebody has to make first; in the logits' own dtype, which is least to write
    def kl_div(p):
        log_p, log_t = torch.log_softmax(p.logits, -1), torch.log_softmax(p.teacher_logits, -1)
        return kl.apply(log_p, log_t, "batchmean", True)

    def fused_kl(p):
        return flkl.apply(p.hidden, p.weight, torch.softmax(p.teacher_logits, -1))

    return [
        Path("liger", "cross_entropy", "nll", lambda p: ce.apply(p.logits, p.target, None)[0]),
        Path("liger", "fused_linear_cross_entropy", "nll", fused_ce),
        Path("liger", "fused_linear_cross_entropy, token scaling", "dft", lambda p: fused_ce(p, True)),
        Path("liger", "fused_linear_kl_div", "kd", fused_kl),
        Path("liger", "kl_div", "kd", kl_div),
        Path("liger", "fused_linear_jsd", "kd", jsd(0.0)),
        Path("liger", "fused_linear_jsd", "reverse_kl", jsd(1.0)),
        Path("liger", "fused_linear_jsd", "jsd", jsd(0.5)),
    ]


#: Weight of the entropy in the objective "entropy", as in ``burnish.objectives.confidence_penalty``.
BETA = 0.1


def _trl() -> list[Path]:
    logprob = _module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = _module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    logits = _module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    chunk = _module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

    def chunked(p, outputs):
        return logprob.apply(p.hidden, p.weight, None, p.target, 1.0, chunk, None, 1.0, outputs)

    def entropy(p):
        logp, h, *_ = chunked(p, ("entropy",))
        return -(logp + BETA * h).mean()

    def whole(p):
        logp, h = logits(p.logits, p.target)
        return -(logp + BETA * h).mean()

    def div(beta):
        return lambda p: divergence.apply(
            p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, beta
        )[0].mean()  # fmt: skip

    return [
        Path("trl", "chunked_logprob", "nll", lambda p: -chunked(p, ())[0].mean()),
        Path("trl", "chunked_logprob", "entropy", entropy),
        Path("trl", "logprob_entropy", "entropy", whole),
        Path("trl", "chunked_divergence", "kd", div(0.0)),
        Path("trl", "chunked_divergence", "reverse_kl", div(1.0)),
        Path("trl", "chunked_divergence", "jsd", div(0.5)),
    ]


def unseen(function):
    """A call that dispatch modes do not see: what stands in for a product on a GPU."""

    @functools.wraps(function)
    def inner(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return inner


@contextlib.contextmanager
def as_on(target: str) -> Iterator[None]:
    """The libraries' host code decides as it would on a target, and multiplies as it would on a GPU."""

    def product(inputs, weight):  # mm(out_dtype=float32)
        return (inputs.float() @ weight.float().t()).detach()

    def accumulate(acc, a, b):  # addmm(out_dtype=float32)
        acc.addmm_(a.float(), b.float())

    replaced = {
        "liger_kernel.ops.fused_linear_jsd": {"_project_to_float32": unseen(product)},
        "trl.kernels.chunked_logprob": {"_use_triton": lambda device: True, "_addmm_fp32": unseen(accumulate)},
        "trl.kernels.chunked_divergence": {"_use_triton": lambda device: True, "_addmm_fp32": unseen(accumulate)},
    }
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            changes = dict(replaced.get(name, {}))
            if name.startswith("liger_kernel."):
                if "is_hip" in vars(module):
                    changes["is_hip"] = lambda: target.startswith("gfx")
                if "infer_device_arch" in vars(module):
                    changes["infer_device_arch"] = lambda: ARCHITECTURES[target]
            for attribute, value in changes.items():
                stack.enter_context(mock.patch.object(module, attribute, value))
        yield


@dataclass
class Launch:
    kernel: object  # triton.JITFunction
    args: dict[str, object]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel").removeprefix("liger_")


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are written down instead of made.  Not for the interpreter."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **kwargs):
        bound = dict(zip(kernel.arg_names, args, strict=False))
        bound |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        launches.append(Launch(kernel, bound, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches
