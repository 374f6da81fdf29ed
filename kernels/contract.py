r"""The contract between objectives and row kernels.

Notation, for one row (token): z the student's logits after every transform, t the
teacher's, p = softmax(z), T = softmax(t), y the label, V the number of unmasked entries.

    raw -> scale * raw -> softcap * tanh(. / softcap) -> . / temperature          (z; t likewise)

A *fold* walks the columns of a tile once and updates an online state; tiles of one row may
come in any number of vocabulary slabs.  From the final state follow the statistics

    lse     log sum_k e^{z_k}             d/dz_k = p_k
    label   z_y                           1[k = y]
    logp    z_y - lse                     1[k = y] - p_k      (at y: -expm1(logp), no cancellation)
    mean    E_p[z]                        p_k (1 + z_k - mean)
    square  sum_k p_k^2                   2 p_k (p_k - square)
    uniform (1/V) sum_k z_k               1/V
    mix     E_q[z], q = softmax(alpha z + eta t) held constant     q_k
    mix_lse log sum_k e^{alpha z_k + eta t_k}                      alpha q_k   (alpha = 1/T, eta = 0: lse at a second
                                          temperature, in the same pass)
    cross   E_T[z]                        T_k
    other   E_p[t]                        p_k (t_k - other)
    jsd     beta KL(T|M) + (1-beta) KL(p|M), M = beta T + (1-beta) p
                                          (1-beta) p_k (s_k - E_p[s]), s = log p - log M
    ids     z at K given columns a row    scatter

and, without gradient: hit (argmax = y, lowest index first), top_entropy, teacher_lse,
teacher_logp (log T_y), teacher_entropy.  A *grad* evaluates, once the upstream gradients of
the statistics are known,

    dz_k = p_k (a + b z_k + c p_k + e t_k) + d q_k + f T_k + u + g p_k (s_k - E_p[s]) + scatter

and multiplies by the derivative of the transforms.

A row whose teacher has no mass at all on the student's support does not count: loss 0, gradient 0.

Masked entries.  z_k = -inf removes entry k from both distributions (T is renormalised over what
is left) and its gradient is zero; t_k = -inf means T_k = 0 and adds nothing to ``other``.  A label
that is itself masked has z_y = -1e30, so that 0 * z_y is 0.  A label outside every slab leaves
``label`` NaN: a visible error for that row, never a wild read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows of the online state, shape (STATE_ROWS, N) in the accumulator dtype.
STATE = (
    "z_max", "z_sum", "z_label", "z_exp", "p_square", "z_total", "z_count", "t_exp",  # student
    "m_max", "m_sum", "m_exp",  # mix
    "t_max", "t_sum", "t_z", "t_t", "t_label",  # teacher
    "argmax", "jsd_t", "jsd_p",
)  # fmt: skip
STATE_INDEX = {name: i for i, name in enumerate(STATE)}

# Rows of the coefficients that ``grad`` reads, shape (COEF_ROWS, N).
COEF = (
    # log p = (z - z_max) - z_log, and so for the mix and the teacher: the two parts of a log-sum-exp stay
    # apart, because their sum would round a logit of 1e4 to three digits
    "z_max", "z_log", "m_max", "m_log", "t_max", "t_log",
    "a", "a_label", "b", "c", "e",  # p_k (a + b z + c p + e t); a_label replaces a at k = y
    "d", "f", "u", "label",  # d q, f T, u, [k = y] label
    "g", "jsd_p",
)  # fmt: skip
COEF_INDEX = {name: i for i, name in enumerate(COEF)}

#: Statistics with a gradient, in the order in which their upstream gradients are collected.
DIFFERENTIABLE = (
    "lse", "label", "logp", "mean", "square", "uniform", "mix", "mix_lse", "cross", "other", "jsd", "ids",
)  # fmt: skip
#: Statistics that objectives may read but not differentiate.
CONSTANT = ("hit", "top_entropy", "teacher_lse", "teacher_logp", "teacher_entropy")
STATISTICS = DIFFERENTIABLE + CONSTANT
#: Statistics that need the teacher's logits.
NEED_TEACHER = ("cross", "other", "jsd", "teacher_lse", "teacher_logp", "teacher_entropy")

#: What a masked label (z_y = -inf) is replaced by.
MASKED = -1e30


@dataclass(frozen=True)
class RowSpec:
    """What one launch computes: hashable, so a kernel is specialised on it once.

    ``stats`` are names from ``STATISTICS``; ``alpha`` and ``eta`` define the mix
    q = softmax(alpha z + eta t); ``beta`` the JSD; ``top_k`` the entropy of the renormalised top k.
    ``softcap`` 0 means none.
    """

    stats: frozenset[str]
    alpha: float = 1.0
    eta: float = 0.0
    beta: float = 0.5
    top_k: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0
    temperature: bool = False  # whether inv_temp differs from one anywhere
    teacher_temperature: bool = False

    def has(self, *names: str) -> bool:
        return any(n in self.stats for n in names)

    @property
    def folds_mix(self) -> bool:
        return self.has("mix", "mix_lse")

    @property
    def mix_teacher(self) -> bool:
        return self.folds_mix and self.eta != 0.0

    @property
    def uses_teacher(self) -> bool:
        return self.mix_teacher or self.has(*NEED_TEACHER)

    @property
    def folds_teacher(self) -> bool:
        """Whether T itself (its log-sum-exp) is needed, not only t."""
        return self.has(*NEED_TEACHER[:1], *NEED_TEACHER[2:])


def new_state(rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The state before any tile: maxima -inf, sums zero, labels unseen (NaN). (STATE_ROWS, rows)"""
    state = torch.zeros(len(STATE), rows, dtype=dtype, device=device)
    for name in ("z_max", "m_max", "t_max"):
        state[STATE_INDEX[name]] = float("-inf")
    for name in ("z_label", "t_label"):
        state[STATE_INDEX[name]] = float("nan")
    return state


def finalize(state: torch.Tensor, spec: RowSpec) -> dict[str, torch.Tensor]:
    """Statistics, each (N,), from a state that has seen every column of its rows."""
    s = {name: state[i] for name, i in STATE_INDEX.items()}
    out = {"z_max": s["z_max"], "z_log": s["z_sum"].log()}
    out["lse"] = out["z_max"] + out["z_log"]
    label = s["z_label"].masked_fill(s["z_label"] == float("-inf"), MASKED)
    out["label"] = label
    out["logp"] = (label - out["z_max"]) - out["z_log"]
    if spec.has("hit"):
        out["hit"] = s["argmax"]
    if spec.has("mean"):
        out["mean"] = s["z_exp"] / s["z_sum"]
    if spec.has("square"):
        out["square"] = s["p_square"] / s["z_sum"].square()
    if spec.has("uniform"):
        out["uniform"] = s["z_total"] / s["z_count"]
        out["count"] = s["z_count"]
    if spec.has("other"):
        out["other"] = s["t_exp"] / s["z_sum"]
    if spec.folds_mix:
        out["m_max"], out["m_log"], total = _normalizer(s["m_max"], s["m_sum"])
    if spec.has("mix"):
        out["mix"] = s["m_exp"] / total
    if spec.has("mix_lse"):
        out["mix_lse"] = out["m_max"] + out["m_log"]
    if spec.folds_teacher:
        out["t_max"], out["t_log"], t_total = _normalizer(s["t_max"], s["t_sum"])
        out["teacher_lse"] = out["t_max"] + out["t_log"]
    if spec.has("teacher_logp"):
        t_label = s["t_label"].masked_fill(s["t_label"] == float("-inf"), MASKED)
        out["teacher_logp"] = (t_label - out["t_max"]) - out["t_log"]
    if spec.has("cross"):
        out["cross"] = s["t_z"] / t_total
    if spec.has("teacher_entropy"):
        out["teacher_entropy"] = out["teacher_lse"] - s["t_t"] / t_total
    if spec.has("jsd"):
        some = s["t_sum"] > 0  # without a teacher the sums are not numbers
        out["jsd_p"] = torch.where(some, s["jsd_p"], 0.0)
        out["jsd"] = torch.where(some, spec.beta * s["jsd_t"] + (1 - spec.beta) * s["jsd_p"], 0.0)
    return out


def _normalizer(top: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(maximum, log of the sum, sum); of an empty distribution 0, 0 and 1, so that nothing becomes NaN."""
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    return torch.where(empty, 0.0, top), total.log(), total


def supported(state: torch.Tensor, spec: RowSpec) -> torch.Tensor | None:
    """Rows (N,) whose teacher has mass on the student's support; None where no teacher is asked for."""
    sums = [name for name, used in (("m_sum", spec.mix_teacher), ("t_sum", spec.folds_teacher)) if used]
    if not sums:
        return None
    return torch.stack([state[STATE_INDEX[name]] > 0 for name in sums]).all(0)


def coefficients(stats: dict[str, torch.Tensor], upstream: dict[str, torch.Tensor], spec: RowSpec) -> torch.Tensor:
    """Fold the statistics' upstream gradients into the row scalars of ``grad``: (COEF_ROWS, N).

    ``upstream`` maps a differentiable statistic to dL/dstatistic, (N,); absent means zero.
    """
    lse = stats["lse"]
    coef = lse.new_zeros(len(COEF), lse.numel())

    def put(name: str, value: torch.Tensor) -> None:
        coef[COEF_INDEX[name]] += value

    for name in ("z_max", "z_log", "m_max", "m_log", "t_max", "t_log"):
        if name in stats:
            put(name, stats[name])
    if (g := upstream.get("lse")) is not None:
        put("a", g)
    if (g := upstream.get("mean")) is not None:
        put("a", g * (1 - stats["mean"]))
        put("b", g)
    if (g := upstream.get("square")) is not None:
        put("a", -2 * g * stats["square"])
        put("c", 2 * g)
    if (g := upstream.get("other")) is not None:
        put("a", -g * stats["other"])
        put("e", g)
    coef[COEF_INDEX["a_label"]] = coef[COEF_INDEX["a"]]
    if (g := upstream.get("logp")) is not None:
        put("a", -g)  # off the label: -g p_k
        put("label", -g * stats["logp"].expm1())  # at it: g (1 - p_y)
    if (g := upstream.get("label")) is not None:
        put("label", g)
    if (g := upstream.get("mix")) is not None:
        put("d", g)
    if (g := upstream.get("mix_lse")) is not None:
        put("d", spec.alpha * g)
    if (g := upstream.get("cross")) is not None:
        put("f", g)
    if (g := upstream.get("uniform")) is not None:
        put("u", g / stats["count"])
    if spec.has("jsd"):
        put("jsd_p", stats["jsd_p"])
    if (g := upstream.get("jsd")) is not None:
        put("g", (1 - spec.beta) * g)
    return coef


#: Coefficients that are linear in the upstream gradient; the others normalise a distribution.  A slice, not a
#: list: indexing with a list copies it to the device.
LINEAR = slice(COEF_INDEX["a"], COEF_INDEX["g"] + 1)


def scale_coefficients(coef: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply every row's gradient by factor (N,); a factor of 0 makes it exactly 0, even from NaN."""
    out = coef.clone()
    out[LINEAR] = torch.where(factor == 0, 0.0, coef[LINEAR] * factor)
    return out
