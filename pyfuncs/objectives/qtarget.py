r"""Q-target objectives that need a label, and at most a frozen reference beside the student.

Every loss here has a logit gradient of the form ``w (p - gamma delta_y - (1 - gamma) r)``: a weight w,
a trust gamma in the label and a residual distribution r ("the gauge", arXiv 2606.11189).  A gradient
fixes Q = p - g only up to w, so each function states the w it uses.  Weights are detached unless the
docstring says that the loss is differentiated as written.  1 - p_y is always -expm1(log p_y).
"""

from __future__ import annotations

import math

import torch

from .aggregate import numbers
from .base import Objective, RowStats


def _one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """1 - e^x for x <= 0, value and slope both to full relative precision.

    torch differentiates expm1 as result + 1, which cancels where e^x is small; this carries e^x itself.
    """
    e = x.exp()
    return (e.detach() - e) - torch.expm1(x.detach())


def _range(objective: str, name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{objective}: {name} must be a number; got {value!r}")
    below = value <= low if open_low else value < low
    if below or value > high or value != value:
        raise ValueError(f"{objective}: {name} must lie in {'(' if open_low else '['}{low}, {high}]; got {value}")


def nll() -> Objective:
    """Standard SFT: -log p_y.  Gauge: w = 1, gamma = 1.  dL/dz = p - delta."""
    return Objective("nll", lambda s: -s.logp, ("logp",), weight="1", trust="1", residual="-", paper="standard SFT")


def dft() -> Objective:
    """Dynamic fine-tuning: -sg[p_y] log p_y (arXiv 2508.05629).

    Gauge: w = p_y, gamma = 1 (or w = 1, gamma = p_y, r = p).  dL/dz = p_y (p - delta).
    """
    return Objective(
        "dft", lambda s: -s.logp.detach().exp() * s.logp, ("logp",),
        weight="1", trust="p_y", residual="p", paper="arXiv 2508.05629",
    )  # fmt: skip


def beyond_log(alpha: float = 1.0) -> Objective:
    """(1 - p_y^alpha) / alpha (arXiv 2510.00526), differentiated as written.

    ``alpha`` >= 0; 0 is NLL.  Gauge: w = 1, gamma = p_y^alpha, r = p.  dL/dz = p_y^alpha (p - delta).
    """
    _range("beyond_log", "alpha", alpha, 0.0, math.inf)

    def fn(s: RowStats) -> torch.Tensor:
        return _one_minus_exp(alpha * s.logp) / alpha if alpha else -s.logp

    return Objective(
        "beyond_log", fn, ("logp",), weight="1", trust="p_y^alpha", residual="p",
        paper="arXiv 2510.00526", params={"alpha": alpha},
    )  # fmt: skip


def gce(q: float = 0.7) -> Objective:
    """Generalised cross-entropy (1 - p_y^q) / q (arXiv 1805.07836): ``beyond_log`` under its older name."""
    _range("gce", "q", q, 0.0, math.inf, open_low=True)
    return Objective(
        "gce", lambda s: _one_minus_exp(q * s.logp) / q, ("logp",),
        weight="1", trust="p_y^q", residual="p", paper="arXiv 1805.07836", params={"q": q},
    )  # fmt: skip


def mae() -> Objective:
    """Mean absolute error between p and delta: 2 (1 - p_y) (arXiv 1712.09482).  dL/dz = 2 p_y (p - delta)."""
    return Objective(
        "mae", lambda s: 2 * _one_minus_exp(s.logp), ("logp",),
        weight="2 p_y", trust="1", residual="-", paper="arXiv 1712.09482",
    )  # fmt: skip


def profit(tau: float = 0.1) -> Objective:
    """ProFiT: NLL of the tokens with p_y > tau (arXiv 2601.09195); the others count in the mean as 0.

    Gauge: w = 1, gamma = 1[p_y > tau], r = p.  The paper's default tau is 0.1.
    """
    _range("profit", "tau", tau, 0.0, 1.0)

    def fn(s: RowStats) -> torch.Tensor:
        return torch.where(s.logp.detach().exp() > tau, -s.logp, 0.0 * s.logp)

    return Objective(
        "profit", fn, ("logp",), weight="1", trust="1[p_y > tau]", residual="p",
        paper="arXiv 2601.09195", params={"tau": tau},
    )  # fmt: skip


def eaft(k: int = 20, power: float = 1.0) -> Objective:
    """Entropy-adaptive fine-tuning: -sg[(H_k / log k)^power] log p_y (arXiv 2601.02151).

    H_k is the entropy of the renormalised top k of p, so the weight lies in [0, 1].  (One public
    implementation divides by 3.0 for k = 20; log 20 = 2.9957.)
    """
    if type(k) is not int or k < 2:
        raise ValueError(f"eaft: k must be a whole number, at least 2; got {k!r}")
    _range("eaft", "power", power, 0.0, math.inf)

    def fn(s: RowStats) -> torch.Tensor:
        weight = (s.top_entropy / math.log(k)).clamp(0.0, 1.0)
        return -weight.pow(power) * s.logp

    return Objective(
        "eaft", fn, ("logp", "top_entropy"), top_k=k, weight="1", trust="(H_k / log k)^power", residual="p",
        paper="arXiv 2601.02151", params={"k": k, "power": power},
    )  # fmt: skip


def _segment_means(values: torch.Tensor, s: RowStats) -> tuple[torch.Tensor, torch.Tensor]:
    """(means, segment): the mean of each sequence over its valid rows, NaN where it has none, at its number."""
    segment = numbers(s.sequence)
    total = torch.zeros_like(values).index_add_(0, segment, torch.where(s.valid, values, 0.0))
    count = torch.zeros_like(values).index_add_(0, segment, s.valid.to(values.dtype))
    return torch.where(count > 0, total / count, torch.nan), segment


def iw_sft(temperature: float = 1.0, clip: float = 16.0) -> Objective:
    """Importance-weighted SFT: one weight a sequence (arXiv 2507.12856).  Needs a reference (teacher).

    w = clamp(exp(temperature * mean_t [log p_theta - log p_ref]), 0, clip), detached.
    Gauge: w = 1, gamma = w(tau) (it may exceed 1), r = p.
    """

    _range("iw_sft", "temperature", temperature, -math.inf, math.inf)
    _range("iw_sft", "clip", clip, 0.0, math.inf)

    def couple(s: RowStats) -> torch.Tensor:
        means, segment = _segment_means(s.logp - s.teacher_logp, s)
        return (temperature * means[segment]).exp().clamp(0.0, clip)

    return Objective(
        "iw_sft", lambda s: -s.weight * s.logp, ("logp",), couple=couple, couple_stats=("logp", "teacher_logp"),
        needs=frozenset({"sequences"}), weight="1", trust="w(sequence)", residual="p",
        paper="arXiv 2507.12856", params={"temperature": temperature, "clip": clip},
    )  # fmt: skip


def cft() -> Objective:
    """Critical-token fine-tuning: NLL of the tokens marked critical (arXiv 2510.10974).

    The marks c_t in {0, 1} come with the data, as ``token_weight``; rows with 0 are never projected.
    """
    return Objective(
        "cft", lambda s: -s.logp, ("logp",), needs=frozenset({"token_weight"}),
        weight="1", trust="c_t", residual="p", paper="arXiv 2510.10974",
    )  # fmt: skip


def label_smoothing(eps: float = 0.1) -> Objective:
    """-(1 - eps) log p_y - (eps / V) sum_k log p_k: torch's ``label_smoothing`` exactly.

    Gauge: w = 1, gamma = 1 - eps, r = uniform over the unmasked vocabulary.
    """
    _range("label_smoothing", "eps", eps, 0.0, 1.0)
    return Objective(
        "label_smoothing", lambda s: -(1 - eps) * s.logp + eps * (s.lse - s.uniform), ("logp", "lse", "uniform"),
        weight="1", trust="1 - eps", residual="uniform", paper="arXiv 1512.00567", params={"eps": eps},
    )  # fmt: skip


def _forward_kl(s: RowStats) -> torch.Tensor:
    """KL(T | p) = H(T, p) - H(T)."""
    return s.lse - s.cross - s.teacher_entropy


_KL_STATS = ("lse", "cross", "teacher_entropy")


def sft_kl(lam: float = 0.1) -> Objective:
    """-log p_y + lam KL(ref | p) (arXiv 2509.04259).  Needs a reference (teacher).

    Gauge: w = 1 + lam, gamma = 1 / (1 + lam), r = ref.
    """
    _range("sft_kl", "lam", lam, 0.0, math.inf)
    return Objective(
        "sft_kl", lambda s: -s.logp + lam * _forward_kl(s), ("logp", *_KL_STATS),
        weight="1 + lam", trust="1 / (1 + lam)", residual="ref", paper="arXiv 2509.04259", params={"lam": lam},
    )  # fmt: skip


def asft(lam: float = 0.1) -> Objective:
    """Anchored SFT: DFT + lam KL(base | p) (arXiv 2509.23753).  Needs the base model (teacher).

    Gauge: w = p_y + lam, gamma = p_y / (p_y + lam), r = base.  0.1 is the authors' code's default.
    """
    _range("asft", "lam", lam, 0.0, math.inf)
    return Objective(
        "asft", lambda s: -s.logp.detach().exp() * s.logp + lam * _forward_kl(s), ("logp", *_KL_STATS),
        weight="p_y + lam", trust="p_y / (p_y + lam)", residual="base", paper="arXiv 2509.23753",
        params={"lam": lam},
    )  # fmt: skip


def psft(low: float = 0.2, high: float = 0.28) -> Objective:
    """Proximal SFT: -min(r, clip(r, 1 - low, 1 + high)), r = p_y / p_old(y) (arXiv 2508.17784).

    Needs the old policy (teacher; only its log-probability of the label is read).  Differentiated as
    written.  Gauge: w = 1, gamma = r 1[r <= 1 + high], r = p.  With an advantage of 1 the lower
    clip never binds.
    """

    _range("psft", "low", low, 0.0, 1.0)
    _range("psft", "high", high, 0.0, math.inf)
    top = math.log1p(high)

    def fn(s: RowStats) -> torch.Tensor:
        # min(r, clip(r)) is r up to 1 + high and constant above; in the log domain r cannot overflow
        return -(s.logp - s.teacher_logp).clamp(max=top).exp()

    return Objective(
        "psft", fn, ("logp", "teacher_logp"), weight="1", trust="r 1[r <= 1 + high]", residual="p",
        paper="arXiv 2508.17784", params={"low": low, "high": high},
    )  # fmt: skip


def gem(beta: float = 0.7) -> Objective:
    """GEM: CE(delta, p) - CE(q, p), q = softmax(z / beta) held constant (arXiv 2408.16673).

    The linear form of the paper (h(x) = x).  dL/dz = q - delta; Q = delta + p - q may be negative.
    beta = 1 has NLL's gradient, although the value is NLL - H(p).
    """
    _range("gem", "beta", beta, 0.0, math.inf, open_low=True)
    return Objective(
        "gem", lambda s: s.mix - s.label, ("mix", "label"), alpha=1.0 / beta,
        weight="1", trust="1", residual="p - softmax(z / beta), signed", paper="arXiv 2408.16673",
        params={"beta": beta},
    )  # fmt: skip


def target_sft(eta: float, trust: float | None = None) -> Objective:
    """Target-SFT: cross-entropy to Q = gamma delta + (1 - gamma) r (arXiv 2606.11189).

    r = softmax((1 - eta) z + eta t) is the normalised geometric mean of student and teacher, and
    gamma = p_y unless ``trust`` gives a constant.  Q is held constant, so dL/dz = p - Q; in
    particular dz_y = -(1 - p_y) r_y.  ``eta`` in [0, 1] has no published default and must be given:
    0 is DFT's gradient and needs no teacher, 1 puts the teacher itself in the residual.
    """
    _range("target_sft", "eta", eta, 0.0, 1.0)
    if trust is not None:
        _range("target_sft", "trust", trust, 0.0, 1.0)

    def fn(s: RowStats) -> torch.Tensor:
        if trust is None:
            logp = s.logp.detach()
            gamma, rest = logp.exp(), _one_minus_exp(logp)
        else:
            gamma = torch.full_like(s.logp, trust)
            rest = 1.0 - gamma
        return -gamma * s.logp + rest * (s.lse - s.mix)

    return Objective(
        "target_sft", fn, ("logp", "lse", "mix"), alpha=1.0 - eta, eta=eta,
        weight="1", trust="p_y" if trust is None else str(trust), residual="softmax((1 - eta) z + eta t)",
        paper="arXiv 2606.11189", params={"eta": eta, "trust": trust},
    )  # fmt: skip


def gift(beta: float = 20.0) -> Objective:
    """GIFT: cross-entropy to softmax(log p_ref + beta delta) (arXiv 2601.09233).  Needs a reference.

    Exactly a Q-target: gamma = sigmoid(log p_ref(y) + log(e^beta - 1)), r = p_ref.
    """
    _range("gift", "beta", beta, 0.0, math.inf)
    log_expm1 = beta + math.log(-math.expm1(-beta)) if beta else -math.inf

    def fn(s: RowStats) -> torch.Tensor:
        odds = s.teacher_logp + log_expm1
        return -odds.sigmoid() * s.logp + (-odds).sigmoid() * (s.lse - s.cross)

    return Objective(
        "gift", fn, ("logp", "lse", "cross", "teacher_logp"),
        weight="1", trust="p_ref(y)(e^b - 1) / (1 + p_ref(y)(e^b - 1))", residual="p_ref",
        paper="arXiv 2601.09233", params={"beta": beta},
    )  # fmt: skip


def focal(gamma: float = 2.0) -> Objective:
    """-(1 - p_y)^gamma log p_y (arXiv 1708.02002), differentiated as written.

    Gauge: w = (1 - p)^g - g p (1 - p)^(g - 1) log p, which can exceed 1; gamma (the trust) = 1.
    """
    _range("focal", "gamma", gamma, 0.0, math.inf)

    def fn(s: RowStats) -> torch.Tensor:
        rest = _one_minus_exp(s.logp)
        # a power below 1 has an infinite slope at 0, where log p is 0 as well
        return -rest.clamp(min=torch.finfo(rest.dtype).tiny).pow(gamma) * s.logp

    return Objective(
        "focal", fn, ("logp",), weight="(1-p)^g - g p (1-p)^(g-1) log p", trust="1", residual="-",
        paper="arXiv 1708.02002", params={"gamma": gamma},
    )  # fmt: skip


def poly(eps: float = 1.0) -> Objective:
    """PolyLoss-1: -log p_y + eps (1 - p_y) (arXiv 2204.12511).  dL/dz = (1 + eps p_y)(p - delta)."""
    _range("poly", "eps", eps, -1.0, math.inf)
    return Objective(
        "poly", lambda s: -s.logp + eps * _one_minus_exp(s.logp), ("logp",),
        weight="1 + eps p_y", trust="1", residual="-", paper="arXiv 2204.12511", params={"eps": eps},
    )  # fmt: skip


def deft(eps: float = 0.0) -> Objective:
    """DEFT: (1 - p_y^a) / (a + eps), a = sg[sum_k p_k^2] (arXiv 2602.11424).

    dL/dz = a / (a + eps) p_y^a (p - delta).  The authors' code adds eps = 1e-6; the paper's form is 0.
    """

    _range("deft", "eps", eps, 0.0, math.inf)

    def fn(s: RowStats) -> torch.Tensor:
        a = s.square.detach()
        return _one_minus_exp(a * s.logp) / (a + eps)

    return Objective(
        "deft", fn, ("logp", "square"), weight="1", trust="p_y^a, a = sum p^2", residual="p",
        paper="arXiv 2602.11424", params={"eps": eps},
    )  # fmt: skip


def idft(tau: float = 0.0, width: float = 1.0, low: float = 0.1, high: float = 1.0) -> Objective:
    """IDFT: -sg[w] log p_y, w = low + (high - low) sigmoid(-(phi - tau) / width) (arXiv 2602.12222).

    phi = log p_y + H(p).  Defaults are those of the authors' code.
    """
    _range("idft", "width", width, 0.0, math.inf, open_low=True)
    for name, value in (("tau", tau), ("low", low), ("high", high)):
        _range("idft", name, value, -math.inf, math.inf)

    def fn(s: RowStats) -> torch.Tensor:
        phi = s.logp.detach() + s.entropy.detach()
        return -(low + (high - low) * torch.sigmoid((tau - phi) / width)) * s.logp

    return Objective(
        "idft", fn, ("logp", "entropy"), weight="1", trust="w(log p_y + H)", residual="p",
        paper="arXiv 2602.12222", params={"tau": tau, "width": width, "low": low, "high": high},
    )  # fmt: skip


def talr(tau: float | None = None, floor: float = 0.01) -> Objective:
    """TALR: -sg[max(p_y^(1 / tau), floor)] log p_y (arXiv 2509.20758).

    ``tau`` None takes the median over the batch's sequences of their mean token NLL.  The form is that
    of a third-party implementation; the paper's own was not available.
    """

    if tau is not None:
        _range("talr", "tau", tau, 0.0, math.inf, open_low=True)
    _range("talr", "floor", floor, 0.0, math.inf)

    def couple(s: RowStats) -> torch.Tensor:
        if tau is not None:
            t = torch.as_tensor(tau, dtype=s.logp.dtype, device=s.logp.device)
        else:
            # NaN marks numbers that no sequence has; without a single valid row any t will do
            t = torch.nanmedian(_segment_means(-s.logp, s)[0]).nan_to_num(1.0)
        return (s.logp / t.clamp(min=1e-6)).exp().clamp(min=floor)

    return Objective(
        "talr", lambda s: -s.weight * s.logp, ("logp",), couple=couple, couple_stats=("logp",),
        needs=frozenset() if tau is not None else frozenset({"sequences"}),
        weight="1", trust="max(p_y^(1/tau), floor)", residual="p", paper="arXiv 2509.20758",
        params={"tau": tau, "floor": floor},
    )  # fmt: skip


def prift() -> Objective:
    """PriFT-prob: -p_base(y) log p_y with a frozen base model's probability (arXiv 2606.09396).

    Needs the base model (teacher; only its log-probability of the label is read).  From the abstract.
    """
    return Objective(
        "prift", lambda s: -s.teacher_logp.exp() * s.logp, ("logp", "teacher_logp"),
        weight="1", trust="p_base(y)", residual="p", paper="arXiv 2606.09396",
    )  # fmt: skip


def rho1(ratio: float = 0.6, normalize: str = "all") -> Objective:
    """Rho-1, selective language modelling: NLL of the tokens with the largest excess loss (arXiv 2404.07965).

    Keeps the ``ratio`` of the batch's tokens with the largest NLL_theta - NLL_ref.  ``normalize``:
    "all" divides by all tokens, "selected" by the kept ones.  Needs a reference (teacher).
    """
    _range("rho1", "ratio", ratio, 0.0, 1.0, open_low=True)
    if normalize not in ("all", "selected"):
        raise ValueError(f"rho1: normalize must be 'all' or 'selected'; got {normalize!r}")

    def couple(s: RowStats) -> torch.Tensor:
        excess = torch.where(s.valid, s.teacher_logp - s.logp, -torch.inf)
        count = s.valid.sum()
        kept = (count.double() * ratio - 1e-9).ceil()  # 0.6 of 25 is 15, whatever 25 * 0.6 rounds to
        # ranks by a stable sort: ties go to the earlier row, and no count has to reach the host
        order = torch.argsort(excess, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        mask = ((rank < kept) & s.valid).to(s.logp.dtype)
        return mask * (count / kept.clamp(min=1)) if normalize == "selected" else mask

    return Objective(
        "rho1", lambda s: -s.weight * s.logp, ("logp",), couple=couple, couple_stats=("logp", "teacher_logp"),
        weight="1", trust="1[excess loss in the top ratio]", residual="p", paper="arXiv 2404.07965",
        params={"ratio": ratio, "normalize": normalize},
    )  # fmt: skip


def confidence_penalty(beta: float = 0.1) -> Objective:
    """-log p_y - beta H(p) (arXiv 1701.06548).  dL/dz = p - delta + beta p (log p + H)."""
    _range("confidence_penalty", "beta", beta, -math.inf, math.inf)
    return Objective(
        "confidence_penalty", lambda s: -s.logp - beta * s.entropy, ("logp", "entropy"),
        weight="1", trust="1", residual="-, Q_k = delta_k - beta p_k (log p_k + H)", paper="arXiv 1701.06548",
        params={"beta": beta},
    )  # fmt: skip


def unlikelihood(likelihood: float = 0.0) -> Objective:
    """-sum_c log(1 - p_c) - likelihood * log p_y over negative tokens c (arXiv 1908.04319).

    The negatives are ``ids`` (N, K) of the op, -1 for none.  Where 1 - p_c is below the rounding of p_c (1e-7 in
    fp32) its gradient is no longer resolved.  ``likelihood`` adds the usual NLL of the label.
    """

    _range("unlikelihood", "likelihood", likelihood, 0.0, math.inf)

    def fn(s: RowStats) -> torch.Tensor:
        present = ~s.ids.isnan()
        logp = torch.where(present, s.ids_logp, -torch.inf)
        # p_c = 1 would be log 0: stop one rounding step before it
        rest = _one_minus_exp(logp.clamp(max=-torch.finfo(logp.dtype).eps))
        return -torch.where(present, rest.log(), 0.0).sum(1) - likelihood * s.logp

    return Objective(
        "unlikelihood", fn, ("ids_logp", "logp"), weight="-p_c / (1 - p_c)", trust="1 on c", residual="-",
        paper="arXiv 1908.04319", params={"likelihood": likelihood},
    )  # fmt: skip
