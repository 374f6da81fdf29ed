"""What an objective is: a few lines of torch on row statistics, and what they ask for."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from .aggregate import AGGREGATES

#: Names an objective may ask for; ``logp`` to ``ids`` are differentiable, the rest are constants.
STATISTICS = (
    "lse", "label", "logp", "mean", "square", "uniform", "mix", "mix_lse", "cross", "other", "jsd", "ids",
    "hit", "top_entropy", "teacher_lse", "teacher_logp", "teacher_entropy",
)  # fmt: skip
_DERIVED = {"entropy": ("lse", "mean"), "prob": ("logp",), "ids_logp": ("ids", "lse")}
_NEEDS = frozenset({"teacher", "ids", "token_weight", "sequences"})
_TEACHER = {"cross", "other", "jsd", "teacher_lse", "teacher_logp", "teacher_entropy"}
#: What ``RowStats`` has beside statistics; no input may take such a name.
_TAKEN = {*STATISTICS, *_DERIVED, "valid", "sequence", "weight"}


class RowStats:
    """Statistics of N rows of logits; each attribute is a tensor (N,), except ``ids`` (N, K).

    With z the logits, p = softmax(z), t the teacher's logits, T = softmax(t) and y the label:

    ==================  ==========================================================================
    ``lse``             log sum_k exp z_k
    ``label``           z_y
    ``logp``            log p_y (its gradient at y is formed without cancellation)
    ``mean``            E_p[z];  ``entropy`` = lse - mean
    ``square``          sum_k p_k^2
    ``uniform``         mean_k z_k
    ``mix``             E_q[z], q = softmax(alpha z + eta t), q constant
    ``mix_lse``         log sum_k exp(alpha z_k + eta t_k): with alpha = 1 / T and eta = 0, lse at temperature T
    ``cross``           E_T[z]
    ``other``           E_p[t]
    ``jsd``             generalised Jensen-Shannon divergence at ``beta``
    ``ids``             z at the given ids, NaN where an id is -1;  ``ids_logp`` = their log-probabilities
    ``hit``             1.0 where argmax z = y (lowest index on ties); constant
    ``top_entropy``     entropy of the renormalised top k of p, in nats; constant
    ``teacher_lse``     log sum_k exp t_k; constant
    ``teacher_logp``    log T_y; constant
    ``teacher_entropy`` H(T) in nats; constant
    ``valid``           bool: the row counts (its label is not ``ignore_index``, its token weight not 0)
    ``sequence``        int64: which sequence the row belongs to, or None
    ``weight``          what ``Objective.couple`` returned, or None
    ==================  ==========================================================================

    and, under their names, the objective's own ``inputs``, constants that come with the data (None where an optional
    one was not given).

    Reading a statistic that was not asked for raises AttributeError with the remedy.
    """

    def __init__(self, valid=None, sequence=None, weight=None, normalizer=None, **stats: torch.Tensor):
        self.valid, self.sequence, self.weight, self._normalizer = valid, sequence, weight, normalizer
        for name, value in stats.items():  # torch 2.11 does not trace an update of __dict__
            setattr(self, name, value)

    @property
    def entropy(self) -> torch.Tensor:
        """H(p) in nats, differentiable."""
        return self.lse - self.mean

    @property
    def prob(self) -> torch.Tensor:
        """p_y, differentiable."""
        return self.logp.exp()

    @property
    def ids_logp(self) -> torch.Tensor:
        """log p at the given ids (N, K), differentiable; NaN where an id is -1.

        Its value is taken relative to the row's maximum, which keeps the digits that z - lse loses.
        """
        plain = self.ids - self.lse[..., None]
        if self._normalizer is None:
            return plain
        top, log_sum = self._normalizer
        exact = (self.ids.detach() - top[..., None]) - log_sum[..., None]
        return plain + (exact - plain.detach())

    def __getattr__(self, name: str):
        if name in STATISTICS:
            raise AttributeError(f"statistic {name!r} was not asked for: add it to the objective's `stats`")
        raise AttributeError(f"RowStats has no {name!r}; statistics are {', '.join(STATISTICS)}")

    def __repr__(self) -> str:
        return f"RowStats({', '.join(k for k, v in self.__dict__.items() if v is not None and k[0] != '_')})"


#: Every objective alive, by key: how a torch.library op, which takes no Python objects, finds it.
LIVE: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()
_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Objective:
    """A token objective.

    Args:
        name: shown in errors, logs and the registry.
        fn: RowStats -> per-token loss (N,), written with torch and differentiable in the statistics
            that have a gradient.  Rows must not interact: entry i may depend on row i alone (use
            ``couple`` for what needs other rows, ``joint`` where that has a gradient).  Detach what is a weight.
        stats: names of the statistics ``fn`` reads ("entropy" and "prob" stand for what they need).
        alpha, eta: the mix q = softmax(alpha z + eta t); eta != 0 needs a teacher.
        beta: weight of the teacher in ``jsd``'s mixture.
        top_k: k of ``top_entropy``.
        temperature: divides the logits of student and teacher (multiplied with the op's own).
        teacher_temperature: divides the teacher's logits alone, beside ``temperature``; with ``mix_lse`` at
            alpha = 1 / T an objective reads the student at temperature 1 and both sides at T.
        couple: RowStats (detached, all rows) -> weight (N,), handed to ``fn`` as ``s.weight``; for
            objectives whose weight depends on a sequence or a batch.  Costs one more forward GEMM.
        couple_stats: the statistics ``couple`` reads.
        needs: what the caller must give beside logits and labels: any of "teacher", "ids",
            "token_weight", "sequences".  A teacher is added by itself where a statistic needs it.
        inputs, optional: names of constants a row that come with the data, given to the ops as
            ``inputs={name: tensor}`` and read as ``s.name``; the optional ones may be left out and are None then.
        aggregate: what ``reduction="mean"`` means, one of ``aggregate.AGGREGATES``.
        joint: rows interact: ``fn`` may mix them and is differentiated as it stands, over all rows at once.  Rows that
            are not ``s.valid`` have zeros for statistics and inputs.  In vocabulary-outer order only.
        weight, trust, residual: the gauge in words: dL/dz = weight * (p - trust * delta - (1 - trust)
            * residual).  Documentation only.
        paper: source.
        params: arguments the objective was made with.
    """

    name: str
    fn: Callable[[RowStats], torch.Tensor]
    stats: tuple[str, ...]
    alpha: float = 1.0
    eta: float = 0.0
    beta: float = 0.5
    top_k: int = 0
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    couple: Callable[[RowStats], torch.Tensor] | None = None
    couple_stats: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    aggregate: str = "token_mean"
    joint: bool = False
    weight: str = ""
    trust: str = ""
    residual: str = ""
    paper: str = ""
    params: dict = field(default_factory=dict)
    key: str = field(default="", init=False)

    def __post_init__(self):
        for attribute in ("stats", "couple_stats"):
            names = _expand(self.name, getattr(self, attribute))
            object.__setattr__(self, attribute, names)
        if not set(self.needs) <= _NEEDS:
            raise ValueError(
                f"objective {self.name!r}: needs may name {', '.join(sorted(_NEEDS))}; got {set(self.needs)}"
            )
        _, needs = asks(self.name, self.stats + self.couple_stats, self.eta)
        self._check_inputs()
        if self.aggregate not in AGGREGATES:
            known = ", ".join(AGGREGATES)
            raise ValueError(f"objective {self.name!r}: aggregate must be one of {known}; got {self.aggregate!r}")
        if self.joint and self.couple is not None:
            raise ValueError(f"objective {self.name!r}: joint and couple exclude each other")
        if self.aggregate != "token_mean":
            needs |= {"sequences"}
        object.__setattr__(self, "needs", frozenset(self.needs) | needs)
        for attribute in ("temperature", "teacher_temperature"):
            if not getattr(self, attribute) > 0:
                raise ValueError(f"objective {self.name!r}: {attribute} must be > 0; got {getattr(self, attribute)}")
        key = f"{self.name}#{next(_serial)}"
        object.__setattr__(self, "key", key)
        LIVE[key] = self

    def _check_inputs(self) -> None:
        for attribute in ("inputs", "optional"):
            names = getattr(self, attribute)
            if isinstance(names, str):
                raise TypeError(f"objective {self.name!r}: {attribute} must be a tuple of names; got {names!r}")
            object.__setattr__(self, attribute, tuple(names))
        names = self.inputs + self.optional
        bad = [n for n in names if not n.isidentifier() or n[0] == "_" or n in _TAKEN or names.count(n) > 1]
        if bad:
            raise ValueError(
                f"objective {self.name!r}: inputs must be new names, each once, none of a statistic's; got {bad[0]!r}"
            )

    def __deepcopy__(self, memo) -> Objective:
        return self  # immutable, and known to the ops by its key

    def __reduce__(self):
        # a registered objective by name; one of your own by its fields, if its functions can be pickled
        values = None if self.fn.__module__.startswith(__package__ + ".") else {
            f.name: getattr(self, f.name) for f in fields(self) if f.init}  # fmt: skip
        return _restore, (self.name, self.params, values)

    def __call__(self, stats: RowStats) -> torch.Tensor:
        loss = self.fn(stats)
        reference = stats.lse
        if not isinstance(loss, torch.Tensor) or loss.shape != reference.shape:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(
                f"objective {self.name!r} must return one loss a row, shape {tuple(reference.shape)}; got {got}"
            )
        return loss

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.params.items())})"


def _restore(name: str, params: dict, values: dict | None) -> Objective:
    from . import get

    return get(name, **params) if values is None else Objective(**values)


def _expand(name: str, stats) -> tuple[str, ...]:
    if isinstance(stats, str):
        raise TypeError(f"objective {name!r}: stats must be a tuple of names; got the string {stats!r}")
    out: list[str] = []
    for stat in stats:
        for base in _DERIVED.get(stat, (stat,)):
            if base not in STATISTICS:
                raise ValueError(f"objective {name!r}: unknown statistic {stat!r}; known: {', '.join(STATISTICS)}")
            out.append(base)
    return tuple(dict.fromkeys(out))


def asks(name: str, stats: tuple[str, ...], eta: float) -> tuple[tuple[str, ...], frozenset[str]]:
    """The statistics that names stand for, and what the caller must give for them: "teacher", "ids"."""
    names = _expand(name, stats)
    needs = {"teacher"} if set(names) & _TEACHER or ({"mix", "mix_lse"} & set(names) and eta != 0.0) else set()
    return names, frozenset(needs | ({"ids"} if "ids" in names else set()))


def objective(*stats: str, **options) -> Callable[[Callable[[RowStats], torch.Tensor]], Objective]:
    """Decorator: make an objective of a function on RowStats.

        @burnish.objective("logp", "entropy")
        def sharpened(s):
            return -s.logp + 0.1 * s.entropy

    ``stats`` are the names it reads, ``options`` the other fields of ``Objective``.
    """

    def make(fn: Callable[[RowStats], torch.Tensor]) -> Objective:
        return Objective(name=options.pop("name", fn.__name__), fn=fn, stats=stats, **options)

    return make
