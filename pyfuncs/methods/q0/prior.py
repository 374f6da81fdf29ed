r"""A learned prior over a population: mixture weights on a fitness set (q0, arXiv 2606.03938).

Of M members only log p_i(y_t), the log-probability of token t of the fitness text, is needed: L (M, N).  The weights
are global, one number a member, and probabilities are averaged:

    f(w) = -(1/N) sum_t log sum_i w_i p_i(y_t),    w >= 0,  sum_i w_i = 1

f is convex.  With d_t = sum_i w_i p_it and g_i = (1/N) sum_t p_it / d_t its optimum is where g_i <= 1 for every member,
= 1 where w_i > 0, and always  f(w) - min f <= log max_i g_i:  how far a point is from the best is known without it.

* EM: w_i <- w_i g_i.  Never raises f, stays on the simplex, needs no learning rate.
* Newton steps between, since EM takes very many steps to bring a weight to 0.  In F(w) = f(w) + sum w - 1, which has
  the same minimum, the quadratic model of curvature H = (1/N) sum_t p_it p_jt / d_t^2 is minimised over w >= 0 exactly;
  the step is kept only where it lowers f (else it is shortened, then EM's is taken).  So f never rises.

One step reads L once, in blocks of tokens, in fp64 whatever L's dtype; beside L the memory is a block's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

METHODS = ("em", "adamw")
#: Bytes of one block of tokens in fp64.
BLOCK_BYTES = 8 << 20
#: The authors' AdamW on w = softmax(alpha): steps, learning rate, gradient clip, floor of p, size of the first alphas.
ADAMW_STEPS, ADAMW_LR, ADAMW_CLIP, ADAMW_FLOOR, ADAMW_START = 300, 0.5, 1.0, 1e-12, 1e-4
#: EM steps before the first Newton step, which bring most useless members near 0; lengths that a step is tried at.
_WARM, _LENGTHS = 10, 6


@dataclass(frozen=True)
class Prior:
    """Mixture weights and how good they are on the fitness set.

    weights: (M,) fp64, non-negative, sum 1.
    nll: f(weights) in nats a token.
    gap: log max_i g_i, an upper bound on nll less the best possible.
    steps: passes over the log-probabilities.
    losses: f after each of them that was kept; never rises with method "em".
    """

    weights: Tensor
    nll: float
    gap: float
    steps: int
    losses: list[float] = field(repr=False, default_factory=list)

    @property
    def effective_size(self) -> float:
        return effective_size(self.weights)


def learn_prior(
    log_probs: Tensor, method: str = "em", *, tol: float = 1e-6, max_steps: int | None = None, newton: bool = True,
    start: Tensor | None = None, seed: int = 0,
) -> Prior:  # fmt: skip
    """Weights that minimise the mixture's NLL on a fitness set.

    Args:
        log_probs: (M, N), log p_i(y_t) in nats, any float dtype, any device; -inf where a member rules a token out.
        method: "em", or "adamw", the authors' own: w = softmax(alpha), 300 full-batch steps of AdamW at 0.5.
        tol: "em" ends where max_i g_i <= 1 + tol, so within log(1 + tol) nats of the optimum.
        max_steps: passes over ``log_probs`` at most; by default 2000 for "em", 300 for "adamw".
        newton: Newton steps between EM's; False is plain EM, which may need thousands of steps for a small ``tol``.
        start: (M,) weights to begin from, uniform by default ("em" only).  Plain EM never leaves a weight of 0.
        seed: of the authors' first alphas, 1e-4 randn.

    ValueError for another shape, no member, no token, NaN or a log-probability above 0, and a token that every member
    rules out (its mixture NLL is infinite whatever the weights).  Members that are copies share a weight in no
    particular way.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not tol > 0:
        raise ValueError(f"tol must be > 0; got {tol}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1; got {max_steps}")
    data = _Data(log_probs)
    if method == "adamw":
        if start is not None:
            raise ValueError("start goes with method 'em'")
        return _adamw(data, max_steps or ADAMW_STEPS, seed)
    w = _weights(start, data.members, data.device) if start is not None else data.uniform()
    return _em(data, w / w.sum(), tol, max_steps or 2000, newton)


def mixture_logp(log_probs: Tensor, weights: Tensor) -> Tensor:
    """log sum_i w_i p_i(y_t) of each token, (N,) fp64, in the log domain; -inf where no weighted member allows it.

    log_probs (M, N), weights (M,) non-negative, normalised here.
    """
    check_log_probs(log_probs)
    w = _weights(weights, log_probs.shape[0], log_probs.device)
    log_w = (w / w.sum()).log()
    parts = [
        (log_probs[:, block].double() + log_w[:, None]).logsumexp(0)
        for block in _blocks(*log_probs.shape)
    ]  # fmt: skip
    return torch.cat(parts) if parts else log_probs.new_empty(0, dtype=torch.float64)


def mixture_nll(log_probs: Tensor, weights: Tensor) -> float:
    """-(1/N) sum_t log sum_i w_i p_i(y_t), in nats a token.  ValueError where there is no token."""
    check_log_probs(log_probs)
    if log_probs.shape[1] == 0:
        raise ValueError("log_probs: no token to take a mean over")
    return float(-mixture_logp(log_probs, weights).mean())


def top_k(log_probs: Tensor, weights: Tensor, k: int, *, refit: bool = False) -> Tensor:
    """Weights (M,) of the k members with the largest ones, 0 elsewhere; of equal weights the earlier member's stays.

    The kept ones are renormalised, as the authors do it, or with ``refit`` learned anew on ``log_probs`` (M, N), which
    on them is never worse.
    """
    check_log_probs(log_probs)
    weights = _weights(weights, log_probs.shape[0], log_probs.device)
    if type(k) is not int or not 1 <= k <= len(weights):
        raise ValueError(f"k must be a whole number from 1 to {len(weights)}; got {k!r}")
    kept = torch.sort(weights, descending=True, stable=True).indices[:k]
    part = weights[kept]
    # fewer members than k may have a weight at all
    part = part / part.sum() if bool(part.sum() > 0) else torch.full_like(part, 1 / k)
    if refit:
        part = learn_prior(log_probs[kept], start=part).weights
    return torch.zeros_like(weights).index_copy_(0, kept, part)


@dataclass(frozen=True)
class KPoint:
    """One size of a mixture: its weights (M,), its NLL on the fitness set and on a second one (None: not given)."""

    k: int
    weights: Tensor
    nll: float
    second_nll: float | None = None


def sweep_k(
    log_probs: Tensor, weights: Tensor, ks: Iterable[int] | None = None, *, refit: bool = False,
    second: Tensor | None = None,
) -> list[KPoint]:  # fmt: skip
    """``top_k`` for each k, by default 1, 2, 4, ... and M; ``second`` (M, N2) is a text that chose nothing."""
    members = log_probs.shape[0]
    if ks is None:
        ks = [*(1 << i for i in range(members.bit_length()) if 1 << i < members), members]
    out = []
    for k in ks:
        w = top_k(log_probs, weights, k, refit=refit)
        other = None if second is None else mixture_nll(second, w)
        out.append(KPoint(k, w, mixture_nll(log_probs, w), other))
    return out


def choose_k(points: Sequence[KPoint], slack: float = 0.0) -> KPoint:
    """The smallest mixture whose NLL on the *fitness* set is within ``slack`` nats of the best of them."""
    if not points:
        raise ValueError("choose_k: no points")
    best = min(p.nll for p in points)
    return min((p for p in points if p.nll <= best + slack), key=lambda p: p.k)


@dataclass(frozen=True)
class SplitCheck:
    """NLL in nats a token on (the fitness set, a second split that chose nothing).

    single: of the member that is best on the fitness set.
    """

    learned: tuple[float, float]
    uniform: tuple[float, float]
    single: tuple[float, float]

    @property
    def gain(self) -> tuple[float, float]:
        """What the weights gain over uniform ones, on each split; the second is the honest one."""
        return self.uniform[0] - self.learned[0], self.uniform[1] - self.learned[1]


def check_split(fitness: Tensor, second: Tensor, weights: Tensor) -> SplitCheck:
    """Whether weights learned on ``fitness`` (M, N) also gain on ``second`` (M, N2): few tokens, many members."""
    if fitness.shape[0] != second.shape[0]:
        raise ValueError(f"second must have the fitness set's {fitness.shape[0]} members; got {second.shape[0]}")
    members = fitness.shape[0]
    uniform = torch.full((members,), 1.0 / members, dtype=torch.float64, device=fitness.device)
    best = int(fitness.mean(1, dtype=torch.float64).argmax())
    single = torch.zeros_like(uniform)
    single[best] = 1.0
    pairs = [
        (mixture_nll(fitness, w.to(fitness.device)), mixture_nll(second, w.to(second.device)))
        for w in (weights, uniform, single)
    ]
    return SplitCheck(*pairs)


def effective_size(weights: Tensor) -> float:
    """exp of the weights' entropy: M where they are equal, 1 where one member has all."""
    w = _weights(weights, len(weights), weights.device)
    w = w / w.sum()
    return math.exp(float(-torch.special.xlogy(w, w).sum()))


# Blocks


def check_log_probs(log_probs: Tensor) -> None:
    """Shape and dtype of (M, N) log-probabilities; ValueError or TypeError."""
    if not isinstance(log_probs, Tensor) or not log_probs.dtype.is_floating_point:
        got = getattr(log_probs, "dtype", type(log_probs).__name__)
        raise TypeError(f"log_probs must be a float tensor; got {got}")
    if log_probs.ndim != 2 or log_probs.shape[0] == 0:
        raise ValueError(f"log_probs must be (members, tokens) with at least one member; got {tuple(log_probs.shape)}")


def _weights(weights: Tensor, members: int, device: torch.device) -> Tensor:
    w = torch.as_tensor(weights, device=device).double()
    if w.shape != (members,):
        raise ValueError(f"weights must be ({members},), one a member; got {tuple(w.shape)}")
    if not bool((w >= 0).all()) or not bool(w.isfinite().all()) or not bool(w.sum() > 0):
        raise ValueError("weights must be finite and non-negative, and not all 0")
    return w


def _blocks(members: int, tokens: int) -> list[slice]:
    step = max(1, BLOCK_BYTES // (8 * members))
    return [slice(t, min(t + step, tokens)) for t in range(0, tokens, step)]


@dataclass
class _Point:
    """f, g and, where a support was given, H on it, at one w."""

    w: Tensor
    f: float
    g: Tensor
    h: Tensor | None = None

    @property
    def gap(self) -> float:
        return float(self.g.max().log())


class _Data:
    """Log-probabilities checked once, each token's best member as the scale of its block."""

    def __init__(self, log_probs: Tensor):
        check_log_probs(log_probs)
        self.log_probs, self.device = log_probs.detach(), log_probs.device
        self.members, self.tokens = log_probs.shape
        if self.tokens == 0:
            raise ValueError("log_probs: no token to learn weights from")
        self.blocks = _blocks(self.members, self.tokens)
        self.best = torch.empty(self.tokens, dtype=torch.float64, device=self.device)
        for block in self.blocks:
            self.best[block] = self.log_probs[:, block].amax(0)  # amax keeps a NaN
        if bool(self.best.isnan().any()):
            raise ValueError("log_probs must not be NaN")
        if bool((self.best > 1e-6).any()):  # of a sure token, by rounding
            raise ValueError(f"log_probs must be log-probabilities, at most 0; got {float(self.best.max()):.3g}")
        if bool((self.best == -torch.inf).any()):
            token = int((self.best == -torch.inf).nonzero()[0])
            raise ValueError(f"log_probs: every member rules out token {token}: no weights make that finite")

    def uniform(self) -> Tensor:
        return torch.full((self.members,), 1.0 / self.members, dtype=torch.float64, device=self.device)

    def at(self, w: Tensor, *, support: Tensor | None = None, floor: float = 0.0) -> _Point:
        """One pass.  A token whose weighted members are all e^-700 below its best counts as ruled out: f is inf.

        ``floor``: a mixture's probability is taken as at least that, without gradient.
        """
        f = 0.0
        g = torch.zeros_like(w)
        h = None if support is None else w.new_zeros(len(support), len(support))
        for block in self.blocks:
            p = (self.log_probs[:, block].double() - self.best[block]).exp_()
            d = w @ p
            log_d = d.log() + self.best[block]
            inverse = d.reciprocal()
            if floor:
                low = log_d < math.log(floor)
                log_d, inverse = log_d.clamp(min=math.log(floor)), inverse.masked_fill(low, 0.0)
            f -= float(log_d.sum())
            g += p @ inverse
            if h is not None:
                part = p[support] * inverse
                h += part @ part.T
        return _Point(w, f / self.tokens, g / self.tokens, None if h is None else h / self.tokens)


# Methods


def _em(data: _Data, w: Tensor, tol: float, max_steps: int, newton: bool) -> Prior:
    point = data.at(w)
    if not math.isfinite(point.f):  # those that it has a weight for rule out a token
        point = data.at((w + data.uniform()) / 2)
    losses, steps, stalled = [point.f], 1, False
    while steps < max_steps and not float(point.g.max()) <= 1 + tol:
        found: _Point | None = None
        # EM alone would take those in too late or never
        left_out = bool((point.w[point.g > 1] < 1e-12).any())
        ready = newton and (left_out or stalled or steps >= _WARM)
        if ready:
            # curvature costs |support|^2 N: only those that have a weight or ought to get one
            support = ((point.w > 1e-12) | (point.g > 1)).nonzero()[:, 0]
            target = _newton(data.at(point.w, support=support), support)
            steps += 1
            for i in range(_LENGTHS):
                if target is None or steps >= max_steps:
                    break
                trial = point.w + (target - point.w) / 4**i  # f falls at first, H being positive
                tried = data.at(trial / trial.sum())  # f never rises by it: F's minimum over w's scale
                steps += 1
                if tried.f < point.f:
                    found = tried
                    break
        if found is None:
            found = data.at(point.w * point.g / (point.w * point.g).sum())
            steps += 1
            if found.f >= point.f:
                if ready or not newton:  # nothing is left but rounding
                    break
                stalled = True
                continue
        point = found
        losses.append(point.f)
    return Prior(point.w, point.f, max(point.gap, 0.0), steps, losses)


def _newton(point: _Point, support: Tensor) -> Tensor | None:
    """argmin over w >= 0 of F's quadratic model on the support: min y H y / 2 - (2 g - 1) y, since H w = g there."""
    if point.h is None:
        return None
    g, h = point.g[support], point.h
    # copies of one member make H singular: a ridge far below what a step is checked by
    h = h + torch.eye(len(g), dtype=h.dtype, device=h.device) * (1e-10 * float(h.diagonal().mean()))
    y = _nonnegative(h.cpu(), (2 * g - 1).cpu(), point.w[support].cpu()).to(h.device)
    if not bool(y.isfinite().all()) or not bool(y.sum() > 0):
        return None
    return torch.zeros_like(point.w).index_copy_(0, support, y)


def _nonnegative(h: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """argmin y H y / 2 - b y over y >= 0, H positive definite: the active-set method of Lawson and Hanson from y."""
    free = y > 0
    for _ in range(3 * len(b) + 10):
        while True:
            index = free.nonzero()[:, 0]
            if not len(index):
                break
            z = torch.linalg.solve(h[index][:, index], b[index])
            if bool((z > 0).all()):
                y = torch.zeros_like(y).index_copy_(0, index, z)
                break
            # as far as the first bound, which holds from there on
            now, bad = y[index], z <= 0
            step = (now[bad] / (now[bad] - z[bad])).min()
            moved = torch.where(bad & (now / (now - z) <= step), 0.0, now + step * (z - now)).clamp(min=0.0)
            y = torch.zeros_like(y).index_copy_(0, index, moved)
            free = y > 0
        slope = torch.where(free, -torch.inf, b - h @ y)
        if float(slope.max()) <= 1e-12:
            break
        enter = int(slope.argmax())
        free[enter] = True
    return y


def _adamw(data: _Data, steps: int, seed: int) -> Prior:
    alpha = ADAMW_START * torch.randn(data.members, generator=torch.Generator().manual_seed(seed))
    alpha = alpha.to(data.device, torch.float64).requires_grad_()
    optimizer = torch.optim.AdamW([alpha], lr=ADAMW_LR, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        w = alpha.detach().softmax(0)
        point = data.at(w, floor=ADAMW_FLOOR)
        alpha.grad = w * ((w * point.g).sum() - point.g)  # of f through the softmax
        torch.nn.utils.clip_grad_norm_([alpha], ADAMW_CLIP)
        optimizer.step()
        losses.append(point.f)
    point = data.at(alpha.detach().softmax(0))
    return Prior(point.w, point.f, max(point.gap, 0.0), steps + 1, losses)
