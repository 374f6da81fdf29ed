"""The ways to compute one objective that the benchmarks put side by side: plain torch, other libraries, burnish.

A way takes a ``Problem`` and returns a scalar loss, the mean over rows; ``ways(device)`` lists those that can run
here.  A library that is not installed is left out; nothing here is a dependency of burnish.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import burnish
from burnish import Teacher, linear_loss, objectives
from burnish.kernels import gemm_host

ETA, BETA = 0.5, 0.7
#: GRPO's clip range and coefficient of the divergence.
CLIP, KL = 0.2, 0.04
#: Chain distillation's share of the divergence and temperature, and the softcap of q0's logits.
SHARE, TAU, CAP = 0.45, 1.2, 15.0


@dataclass(frozen=True)
class Problem:
    """hidden (N, H), weight (V, H), target (N,), a teacher's (N, H_t) and (V, H_t), upstream gradients (N,)."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    t_hidden: Tensor
    t_weight: Tensor
    up_logp: Tensor
    up_entropy: Tensor

    def rows(self, n: int) -> Problem:
        per_row = ("hidden", "target", "t_hidden", "up_logp", "up_entropy")
        return replace(self, **{name: getattr(self, name)[:n] for name in per_row})

    def to(self, dtype: torch.dtype) -> Problem:
        floats = ("hidden", "weight", "t_hidden", "t_weight", "up_logp", "up_entropy")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in floats})

    def trainable(self) -> Problem:
        """The same numbers with hidden and weight as fresh leaves."""
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in ("hidden", "weight")}
        return replace(self, **leaves)


def problem(
    n: int, h: int, v: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, scale: float = 0.05
) -> Problem:  # fmt: skip
    """Random numbers; logits of standard deviation about scale sqrt(H)."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g).mul_(scale).to(device, dtype)

    return Problem(
        rand(n, h), rand(v, h, scale=scale), torch.randint(0, v, (n,), generator=g).to(device), rand(n, h),
        rand(v, h, scale=scale), torch.randn(n, generator=g).to(device), torch.randn(n, generator=g).to(device),
    )  # fmt: skip


# Plain torch: each objective on logits, as a trainer would write it.  In fp64 these are also the references.


def _nll(z, target, t, p):
    return F.cross_entropy(z, target)


def _label(logp, target):
    return logp.gather(1, target[:, None])[:, 0]


def _dft(z, target, t, p):
    logp = _label(z.log_softmax(-1), target)
    return -(logp.detach().exp() * logp).mean()


def _target_sft(z, target, t, p):
    logp = z.log_softmax(-1)
    with torch.no_grad():
        label = _label(logp, target).exp()
        q = ((1 - ETA) * logp + ETA * t).softmax(-1) * (1 - label)[:, None]
        q.scatter_add_(1, target[:, None], label[:, None])
    return -(q * logp).sum(-1).mean()


def _kd(z, target, t, p):
    return F.kl_div(z.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)


def _reverse_kl(z, target, t, p):
    return F.kl_div(t.log_softmax(-1), z.log_softmax(-1), reduction="batchmean", log_target=True)


def _chain(z, target, t, p):
    soft = F.kl_div((z / TAU).log_softmax(-1), (t / TAU).log_softmax(-1), reduction="batchmean", log_target=True)
    return (1 - SHARE) * F.cross_entropy(z, target) + SHARE * TAU**2 * soft


def _chain_softcap(z, target, t, p):
    return _chain(CAP * torch.tanh(z / CAP), target, CAP * torch.tanh(t / CAP), p)


def _gem(z, target, t, p):
    logp = z.log_softmax(-1)
    q = (z.detach() / BETA).softmax(-1)
    return ((q * logp).sum(-1) - _label(logp, target)).mean()


def _logp_entropy(z, target, t, p):
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return (p.up_logp * _label(logp, target) + p.up_entropy * entropy).mean()


def _old_and_reference(p):
    """log p of two other policies: near that of the labels of random logits."""
    wide = torch.promote_types(p.up_logp.dtype, torch.float32)
    middle = -math.log(p.weight.shape[0])
    return middle + 0.1 * p.up_entropy.to(wide), middle + 0.1 * p.up_logp.to(wide)


def _policy_loss(objective, logp, p):
    """Weighted NLL, or GRPO's clipped surrogate with a k3 divergence, a mean over tokens, as TRL writes it."""
    if objective == "weighted_nll":
        return -(p.up_logp * logp).mean()
    old, reference = _old_and_reference(p)
    ratio, advantages = (logp - old).exp(), p.up_logp
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    away = reference - logp
    return (KL * (away.exp() - away - 1) - surrogate).mean()


def _weighted_nll(z, target, t, p):
    return _policy_loss("weighted_nll", _label(z.log_softmax(-1), target), p)


def _grpo(z, target, t, p):
    return _policy_loss("grpo", _label(z.log_softmax(-1), target), p)


#: objective -> (loss on logits (z, target, teacher logits or None, problem), burnish's objective, reads a teacher)
OBJECTIVES: dict[str, tuple[Callable, object, bool]] = {
    "nll": (_nll, objectives.nll(), False),
    "dft": (_dft, objectives.dft(), False),
    "target_sft": (_target_sft, objectives.target_sft(ETA), True),
    "kd": (_kd, objectives.kd(), True),
    "reverse_kl": (_reverse_kl, objectives.reverse_kl(), True),
    "gem": (_gem, objectives.gem(BETA), False),
    "logp_entropy": (_logp_entropy, None, False),  # no objective: two statistics, an upstream gradient for each
    "weighted_nll": (_weighted_nll, objectives.weighted_nll(), False),
    "grpo": (_grpo, objectives.grpo(CLIP, beta=KL, correct_kl=False, aggregate="token_mean"), False),
    "chain_distillation": (_chain, objectives.chain_distillation(SHARE, TAU), True),
    "chain_softcap": (_chain_softcap, objectives.chain_distillation(SHARE, TAU), True),
}
#: Those of benchmarks/policy.py and benchmarks/post.py; the others, and logp_entropy, are benchmarks/linear_loss.py's.
POLICY = ("weighted_nll", "grpo")
CHAIN = ("chain_distillation", "chain_softcap")


def has_teacher(objective: str) -> bool:
    return OBJECTIVES[objective][2]


def beside(objective: str, p: Problem) -> dict:
    """What ``linear_loss`` is given for an objective beside hidden states, labels and a teacher."""
    if objective == "chain_softcap":
        return {"softcap": CAP}
    if objective == "weighted_nll":
        return {"token_weight": p.up_logp}
    if objective == "grpo":
        old, ref = _old_and_reference(p)
        return {"inputs": {"advantages": p.up_logp, "old_logp": old, "ref_logp": ref}}
    return {}


def materialised(objective: str, p: Problem, accumulate: torch.dtype = torch.float32) -> Tensor:
    """Whole logits in the operands' dtype, then the loss in ``accumulate``."""
    loss, _, teacher = OBJECTIVES[objective]
    t = None
    if teacher:
        with torch.no_grad():
            t = (p.t_hidden @ p.t_weight.t()).to(accumulate)
    return loss((p.hidden @ p.weight.t()).to(accumulate), p.target, t, p)


def exact(objective: str, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dX and dW in fp64 of the operands as they are."""
    q = p.to(torch.float64).trainable()
    loss = materialised(objective, q, torch.float64)
    return (loss.detach(), *torch.autograd.grad(loss, (q.hidden, q.weight)))


@dataclass(frozen=True)
class Way:
    """One way of computing some of the objectives.

    ``bounded``: it holds no (N, V) buffer.  ``recompute``: it makes the logits twice.  ``proxy``: the way whose probe
    stands for this one's, so that a compiled way is not compiled for the probe's shape too.
    """

    name: str
    objectives: tuple[str, ...]
    loss: Callable[[str, Problem], Tensor]
    bounded: bool = False
    recompute: bool = False
    proxy: str = ""
    ours: bool = False
    dtypes: tuple[torch.dtype, ...] = ()  # () is all


def _upcast(objective: str, p: Problem) -> Tensor:
    return materialised(objective, p.to(torch.float32))


def _torch_ways() -> list[Way]:
    every, low = tuple(OBJECTIVES), (torch.bfloat16, torch.float16)
    # a new shape is a new graph, not a dynamic one: what a training run with packed batches has
    compiled = torch.compile(materialised, dynamic=False)
    compiled_up = torch.compile(_upcast, dynamic=False)
    out = [
        Way("torch", every, materialised),
        Way("torch_compile", every, compiled, proxy="torch"),
        # where low-precision products are slow, as on most CPUs, operands cast up once are the stronger baseline
        Way("torch_upcast", every, _upcast, dtypes=low),
        Way("torch_compile_upcast", every, compiled_up, proxy="torch_upcast", dtypes=low),
    ]
    if not hasattr(F, "linear_cross_entropy"):
        return out

    def reference(objective: str, p: Problem) -> Tensor:
        return F.linear_cross_entropy(p.hidden, p.weight, p.target)

    def chunked(objective: str, p: Problem) -> Tensor:
        # (class probabilities as targets fall back to the materialised form, with a warning: no KD here)
        options = torch.nn.LinearCrossEntropyOptions()
        if objective == "nll":
            return F.linear_cross_entropy(p.hidden, p.weight, p.target, options=options)
        losses = F.linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none", options=options)
        return _from_logp(objective, -losses)

    return [
        *out,
        Way("torch_lce", ("nll",), reference),
        Way("torch_lce_chunked", ("nll", "dft"), chunked, bounded=True),
    ]


def _from_logp(objective: str, logp: Tensor) -> Tensor:
    """NLL or DFT from per-token log-probabilities."""
    return -(logp if objective == "nll" else logp.detach().exp() * logp).mean()


def _cce_ways(device: str) -> list[Way]:
    from cut_cross_entropy import linear_cross_entropy

    # its Triton kernels want a GPU; its path for other devices compiles the materialised form
    impl = "cce" if device == "cuda" else "torch_compile"

    def loss(objective: str, p: Problem) -> Tensor:
        if objective == "nll":
            return linear_cross_entropy(p.hidden, p.weight, p.target, impl=impl)
        return _from_logp(objective, -linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none", impl=impl))

    proxy = "" if device == "cuda" else "torch"
    return [Way(f"cce_{impl}", ("nll", "dft"), loss, bounded=device == "cuda", recompute=device == "cuda", proxy=proxy)]


def _trl_ways() -> list[Way]:
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logprob(objective: str, p: Problem) -> Tensor:
        outputs = ("entropy",) if objective == "logp_entropy" else ()
        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            p.hidden, p.weight, None, p.target, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, outputs
        )
        if objective == "logp_entropy":
            return (p.up_logp * logp + p.up_entropy * entropy).mean()
        return _policy_loss(objective, logp, p) if objective in POLICY else _from_logp(objective, logp)

    def divergence(objective: str, p: Problem) -> Tensor:
        beta = 0.0 if objective == "kd" else 1.0
        return ChunkedDivergenceFunction.apply(
            p.hidden, p.weight, None, p.t_hidden, p.t_weight, None, beta
        )[0].mean()  # fmt: skip

    both = {"bounded": True, "recompute": True}
    return [
        Way("trl", ("nll", "dft", "logp_entropy", *POLICY), logprob, **both),
        Way("trl", ("kd", "reverse_kl"), divergence, **both),
    ]


def _liger_ways(device: str) -> list[Way]:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def distil(compiled: bool) -> Callable[[str, Problem], Tensor]:
        def loss(objective: str, p: Problem) -> Tensor:
            beta = 1.0 if objective == "reverse_kl" else 0.0
            # weights of label and divergence, and temperature: it has no T^2 of its own
            hard, soft, tau = (1 - SHARE, SHARE * TAU**2, TAU) if objective in CHAIN else (0.0, 1.0, 1.0)
            return LigerFusedLinearJSDFunction.apply(
                p.hidden, p.weight, p.t_hidden, p.t_weight, p.target, None, None, hard, soft, beta, -100, tau, compiled
            )

        return loss

    def scaled(objective: str, p: Problem) -> Tensor:
        want = objective == "logp_entropy"
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(p.hidden, p.weight, p.target, return_entropy=want)
        if want:
            return (p.up_entropy * out[1] - p.up_logp * out[0]).mean()
        return _policy_loss(objective, -out, p) if objective in POLICY else _from_logp(objective, -out)

    # softcaps it has none in distillation
    pairs, single = ("kd", "reverse_kl", "chain_distillation"), ("nll", "dft", "logp_entropy", *POLICY)
    out = [
        Way("liger_chunked_eager", pairs, distil(False), bounded=True),
        Way("liger_chunked", pairs, distil(True), bounded=True, proxy="liger_chunked_eager"),
        Way("liger_scaled", single, scaled, bounded=True, recompute=True),
    ]
    return out + liger_triton_ways() if device == "cuda" else out


def liger_triton_ways() -> list[Way]:
    """Liger's Triton kernels: on a GPU, or for their numbers alone in the interpreter."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def cross_entropy(objective: str, p: Problem) -> Tensor:
        # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, z-loss, accum_dtype,
        # use_token_scaling, which is DFT
        rest = (None, None, -100, 0.0, 0.0, "mean", None, False, None, objective == "dft")
        return LigerFusedLinearCrossEntropyFunction.apply(p.hidden, p.weight, p.target, *rest)[0]

    def divergence(objective: str, p: Problem) -> Tensor:
        beta = 0.0 if objective == "kd" else 1.0
        return LigerFusedLinearJSDFunction.apply(
            p.hidden, p.weight, p.t_hidden, p.t_weight, p.target, beta, -100, 1.0
        )  # fmt: skip

    return [
        Way("liger_triton", ("nll", "dft"), cross_entropy, bounded=True),
        Way("liger_triton", ("kd", "reverse_kl"), divergence, bounded=True),
    ]


def our_ways(backends: tuple[str, ...]) -> list[Way]:
    """burnish on each backend: as a user gets it, and in the loop order that it does not take by itself."""
    from burnish.ops import linear_loss as module

    def fused(backend: str, plan: str) -> Callable[[str, Problem], Tensor]:
        def loss(objective: str, p: Problem) -> Tensor:
            given, teacher = beside(objective, p), None
            if has_teacher(objective):
                teacher = Teacher(hidden=p.t_hidden, weight=p.t_weight, softcap=given.get("softcap"))
            objective_ = OBJECTIVES[objective][1]
            return linear_loss(
                p.hidden, p.weight, p.target, objective_, teacher=teacher, plan=plan, backend=backend, **given
            )

        return loss

    def stats(backend: str) -> Callable[[str, Problem], Tensor]:
        def loss(objective: str, p: Problem) -> Tensor:
            s = burnish.linear_stats(p.hidden, p.weight, p.target, stats=("logp", "entropy"), backend=backend)
            return (p.up_logp * s.logp + p.up_entropy * s.entropy).mean()

        return loss

    losses = tuple(name for name, (_, objective, _) in OBJECTIVES.items() if objective is not None)
    plans = getattr(module, "PLANS", ("tokens",))
    twice = {"bounded": True, "recompute": True, "ours": True}
    out = []
    for backend in backends:
        out.append(Way(f"burnish_{backend}", losses, fused(backend, "auto"), bounded=True, ours=True))
        tiles = backend == "host" and gemm_host.supported()  # there bf16 takes the vocabulary-outer order
        if tiles:
            low = (torch.bfloat16,)
            out.append(
                Way("burnish_host_tokens", losses, fused(backend, "tokens"), bounded=True, ours=True, dtypes=low)
            )
        if "vocab" in plans:
            kinds = (torch.float32,) if tiles else ()
            out.append(Way(f"burnish_{backend}_vocab", losses, fused(backend, "vocab"), **twice, dtypes=kinds))
        if hasattr(burnish, "linear_stats"):
            out.append(Way(f"burnish_{backend}", ("logp_entropy",), stats(backend), **twice))
    return out


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def peer_ways(device: str) -> list[Way]:
    """Everybody else's, as far as installed."""
    out = _torch_ways()
    if installed("cut_cross_entropy"):
        out += _cce_ways(device)
    if installed("trl") and importlib.util.find_spec("trl.kernels") is not None:
        out += _trl_ways()
    if installed("liger_kernel"):
        out += _liger_ways(device)
    return out
