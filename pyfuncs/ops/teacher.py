"""The teacher side of an objective, in whichever form it is at hand."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

TAILS = ("zero", "uniform", "student")
_warned_vocabularies: set[tuple[int, int]] = set()


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen distribution over the vocabulary, one row a token.  No gradient flows into it.

    Exactly one form:

    * ``hidden`` (N, H_t) and ``weight`` (V_t, H_t), with ``bias`` (V_t,) or None: a second LM head; its
      logits are formed tile by tile beside the student's.  Leading dimensions may be (B, T).
    * ``logits`` (N, V_t): logits or log-probabilities that already exist.
    * ``ids`` (N, K) int64 and ``logp`` (N, K): the top-K tokens' true log-probabilities, distinct ids,
      -1 for none.  With rho = 1 - sum exp(logp), ``tail`` says where the rest of the mass lies:
      "zero" nowhere (T is renormalised over the K), "uniform" rho / (V - K) on each other token, "student"
      shaped like the student, rho p_k / (1 - p(S)).

    A teacher vocabulary larger than the student's is cut to it, with one warning (padding rows); a smaller
    one is a ValueError.  ``scale``, ``softcap`` and ``temperature`` are the teacher's own transforms.
    """

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    logp: torch.Tensor | None = None
    tail: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self):
        forms = {
            "hidden and weight": (self.hidden, self.weight),
            "logits": (self.logits,),
            "ids and logp": (self.ids, self.logp),
        }
        begun = [name for name, parts in forms.items() if any(p is not None for p in parts)]
        if len(begun) != 1:
            raise ValueError(
                f"Teacher takes exactly one of: hidden and weight; logits; ids and logp; got {begun or 'none'}"
            )
        if any(p is None for p in forms[begun[0]]):
            raise ValueError(f"Teacher needs both {begun[0]}")
        if self.bias is not None and self.weight is None:
            raise ValueError("Teacher: bias goes with hidden and weight")
        for part in ("hidden", "weight", "bias", "logits", "ids", "logp"):
            value = getattr(self, part)
            if value is not None and not isinstance(value, torch.Tensor):
                raise TypeError(f"Teacher: {part} must be a tensor; got {type(value).__name__}")
        for part in ("scale", "temperature"):
            if not getattr(self, part) > 0:
                raise ValueError(f"Teacher: {part} must be > 0; got {getattr(self, part)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"Teacher: bias must be ({self.weight.shape[0]},); got {tuple(self.bias.shape)}")
        if self.ids is not None:
            if self.ids.ndim < 2 or self.ids.shape[-1] == 0:
                raise ValueError(f"Teacher: ids must be (N, K) with K >= 1; got {tuple(self.ids.shape)}")
            if self.tail not in TAILS:
                raise ValueError(f"Teacher with ids and logp needs tail, one of {', '.join(TAILS)}; got {self.tail!r}")
            if self.scale != 1.0 or self.softcap or self.temperature != 1.0:
                raise ValueError("Teacher: scale, softcap and temperature do not apply to log-probabilities")
            if self.ids.shape != self.logp.shape:
                raise ValueError(
                    f"Teacher: ids {tuple(self.ids.shape)} and logp {tuple(self.logp.shape)} must have the same shape"
                )
            if self.ids.dtype != torch.int64:
                raise TypeError(f"Teacher: ids must be int64; got {self.ids.dtype}")
        elif self.tail is not None:
            raise ValueError("Teacher: tail goes with ids and logp")

    @property
    def kind(self) -> str:
        return "hidden" if self.hidden is not None else "logits" if self.logits is not None else "topk"

    def tensors(self, rows: int, vocabulary: int, device: torch.device) -> list[torch.Tensor]:
        """The form's tensors, checked, flattened to ``rows`` rows; see ``cut``."""
        names = {"hidden": ("hidden", "weight", "bias"), "logits": ("logits",), "topk": ("ids", "logp")}[self.kind]
        out = []
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if value.device != device:
                raise ValueError(f"teacher.{name} must be on {device}; got {value.device}")
            value = value.detach()
            if name not in ("weight", "bias"):
                value = value.flatten(0, -2)  # the vocabulary may be empty here: no -1
                if value.shape[0] != rows:
                    raise ValueError(f"teacher.{name} must have {rows} rows, one a label; got {value.shape[0]}")
            out.append(value)
        if self.kind == "hidden":
            if out[1].ndim != 2 or out[0].shape[1] != out[1].shape[1]:
                raise ValueError(
                    f"teacher.weight must be (V, {out[0].shape[1]}) to fit teacher.hidden; got {tuple(out[1].shape)}"
                )
            size = out[1].shape[0]
        elif self.kind == "logits":
            size = out[0].shape[1]
        else:
            return out
        if size < vocabulary:
            raise ValueError(f"teacher vocabulary {size} is smaller than the student's {vocabulary}")
        return out


def cut(teacher: list[torch.Tensor], kind: str, vocabulary: int) -> list[torch.Tensor]:
    """The teacher's tensors on the student's vocabulary; one warning for each pair of sizes.

    Called inside the ops: a warning is a side effect that torch.compile would not trace.
    """
    size = {"hidden": lambda: teacher[1].shape[0], "logits": lambda: teacher[0].shape[1]}.get(
        kind, lambda: vocabulary
    )()
    if size == vocabulary:
        return teacher
    if (size, vocabulary) not in _warned_vocabularies:
        _warned_vocabularies.add((size, vocabulary))
        warnings.warn(
            f"teacher vocabulary {size} is larger than the student's {vocabulary}: the extra rows are dropped",
            stacklevel=2,
        )
    return [teacher[0], *(x[:vocabulary] for x in teacher[1:])] if kind == "hidden" else [teacher[0][:, :vocabulary]]


def fill_topk(out, ids, logp, tail: str, z_plain=None, lse=None, z_ids=None, *, start: int = 0, vocabulary=None):
    """Dense teacher log-probabilities of the columns from ``start`` on, from a top-K list, into ``out`` (n, v).

    ``vocabulary`` is V, v by default.  For tail "student": z_plain(out) writes the student's transformed logits into
    ``out``; lse (n,) is their log-sum-exp and z_ids (n, K) their values at ids (NaN where there is none), both over
    the whole vocabulary.
    """
    vocabulary = out.shape[1] if vocabulary is None else vocabulary
    present = (ids >= 0) & (ids < vocabulary)
    logp = torch.where(present, logp.to(out.dtype), -torch.inf)
    rest = (1.0 - logp.exp().sum(1)).clamp(min=0.0)
    if tail == "zero":
        out.fill_(-torch.inf)
    elif tail == "uniform":
        others = (vocabulary - present.sum(1)).clamp(min=1)
        out.copy_((rest / others).log()[:, None].expand_as(out))
    else:
        z_plain(out)
        inside = torch.where(present, (z_ids - lse[:, None]).exp(), 0.0).sum(1)
        outside = (1.0 - inside).clamp(min=torch.finfo(out.dtype).tiny)
        out.add_((rest.log() - outside.log() - lse)[:, None])
    present = present & (ids >= start) & (ids < start + out.shape[1])
    ids = ids - start
    # an absent id scatters the value that its column 0 would have had: only present ids may write
    at = torch.where(present, ids, 0)
    keep = out[:, :1].clone()
    out.scatter_(1, at, torch.where(present, logp, out.gather(1, at)))
    first = ((ids == 0) & present).any(1, keepdim=True)
    value = torch.where(present & (ids == 0), logp, -torch.inf).amax(1, keepdim=True)
    out[:, :1] = torch.where(first, value, keep)
