"""Every registered objective with arguments, and problems to run it on; shared by the tests."""

from __future__ import annotations

import torch

from burnish import Teacher, objectives

BACKENDS = ("torch", "triton", "host")
#: name -> argument sets that together reach every branch.
ARGUMENTS: dict[str, list[dict]] = {
    "asft": [{}, {"lam": 1.0}],
    "beyond_log": [{}, {"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 10.0}],
    "bnpo": [{}],
    "chain_distillation": [{}, {"share": 0.0}, {"share": 1.0, "temperature": 0.5}, {"share": 0.3, "temperature": 1.0}],
    "cispo": [{"cap": 1.1, "floor": 0.9, "beta": 0.1, "kl": "k2"}],
    "confidence_penalty": [{}],
    "dapo": [{}, {"delta": 1.3, "beta": 0.1, "kl": "k1", "entropy": 0.01}],
    "deft": [{}, {"eps": 1e-6}],
    "dr_grpo": [{"length": 4.0}],
    "eaft": [{"k": 3}, {"k": 5, "power": 2.0}],
    "focal": [{}, {"gamma": 0.5}],
    "gem": [{}, {"beta": 1.0}],
    "gift": [{}, {"beta": 1.0}],
    "gmpo": [{"beta": 0.1, "entropy": 0.01}],
    "grpo": [{"beta": 0.1, "entropy": 0.01}, {"beta": 0.1, "correct_kl": False}],
    "gspo": [{}, {"low": 0.2, "high": 0.2, "beta": 0.1, "entropy": 0.01}],
    "iw_sft": [{}],
    "jsd": [{}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1}],
    "kd": [{}, {"temperature": 2.5}],
    "kd_hybrid": [{}],
    "label_smoothing": [{}],
    "poly": [{}],
    "ppo_clip": [{"dual": 1.5}],
    "profit": [{"tau": 0.05}],
    "psft": [{}],
    "reinforce": [{"beta": 0.1, "entropy": 0.01}],
    "rho1": [{}, {"normalize": "selected"}],
    "rloo": [{}],
    "sapo": [{}],
    "sft_kl": [{}],
    "talr": [{}, {"tau": 1.5}],
    "target_sft": [{"eta": 0.3}, {"eta": 0.0}, {"eta": 1.0}, {"eta": 0.6, "trust": 0.25}],
    "unlikelihood": [{}, {"likelihood": 1.0}],
    "weighted_nll": [{}, {"aggregate": "sequence_mean_token_mean"}],
}


def all_objectives():
    """(id, factory arguments) of every registered objective."""
    for name in objectives.names():
        for arguments in ARGUMENTS.get(name, [{}]):
            label = ",".join(f"{k}={v}" for k, v in arguments.items())
            yield f"{name}({label})", name, arguments


def problem(name: str, arguments: dict, n=7, v=37, *, h=11, seed=0, dtype=torch.float64, ignored=True):
    """Objective, hidden, weight, bias, target, and keyword arguments with what the objective needs."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    o = objectives.get(name, **arguments)
    hidden, weight, bias = rand(n, h), rand(v, h, scale=0.7), rand(v)
    target = torch.randint(0, v, (n,), generator=g)
    if ignored and n > 2:
        target[1] = -100
    extra: dict = {}
    if "teacher" in o.needs:
        extra["teacher"] = Teacher(hidden=rand(n, h + 2), weight=rand(v, h + 2, scale=0.7), bias=rand(v))
    if "ids" in o.needs:
        ids = torch.randint(0, v, (n, 3), generator=g)
        ids[:1, 1] = -1
        extra["ids"] = ids
    if "sequences" in o.needs:
        extra["sequences"] = torch.arange(n) // 3
    if "token_weight" in o.needs:
        extra["token_weight"] = (torch.rand(n, generator=g) < 0.7).to(dtype)
    if o.inputs:
        # log-probabilities near the policy's own, so that ratios lie on both sides of the bounds
        logp = (hidden @ weight.T + bias).double().log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        make = {
            "advantages": lambda: rand(n), "old_logp": lambda: logp + 0.4 * rand(n).double(),
            "ref_logp": lambda: logp + 0.4 * rand(n).double(), "correction": lambda: rand(n).exp(),
            "entropy_weight": lambda: rand(n).exp(),
        }  # fmt: skip
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        extra["inputs"] = {k: make[k]().to(wide) for k in (*o.inputs, *o.optional)}
    return o, hidden, weight, bias, target, extra


def summed(o) -> str:
    """The reduction of ``row_loss`` whose sum is that of the token losses."""
    return "sum" if o.joint else "none"


def dense_teacher(extra: dict):
    """Teacher logits (N, V) of a problem, or None."""
    t = extra.get("teacher")
    return None if t is None else t.hidden @ t.weight.T + t.bias
