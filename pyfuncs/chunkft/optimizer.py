r"""``ChunkAdamW``: AdamW on one chunk of a model at a time, its state at rest on the host.

In step t the active chunk j, with gradient g of its rows alone, the mean over processes:

    theta_j <- AdamW(theta_j, g; m_j, v_j, t_j)      t_j counts the updates of these rows, not of the run
    after K successful updates: j <- the next chunk

Source: ChunkFT, arXiv 2605.21177, section 3; AdamW as torch.optim.AdamW computes it.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import dispatch
from ..kernels.adamw import TILE, AdamWSpec, TileTable, Update
from .parallel import Replicas, first_row, local_rows, local_tensor
from .plan import ChunkPlan, Segment
from .plan import plan as make_plan
from .rotation import ORDERS, Rotation
from .slices import Slices
from .store import Ring, Slab, buckets, part_range, state_bytes

STATE_POLICIES = ("persist", "reset", "keep_v")
LR_SCHEDULES = ("update", "cycle")
LOW_PRECISION = ("master", "stochastic")
MOMENTS = ("fp32", "8bit")
_FORMAT = 1  # of state_dict()


@dataclass
class Piece:
    """An active segment and this rank's rows of it, ``own``, in whole tiles of its part's flat spaces.

    ``first`` and ``last`` count tiles of what this rank updates, ``full`` those of the gradients it forms: the same but
    where the weights are sharded.
    """

    segment: Segment
    own: Segment
    group: int
    first: int
    last: int
    full: int
    steps: list[int] = field(default_factory=lambda: [0, 0])  # updates behind the first and the second moment


@dataclass
class Part:
    """What is updated together: a chunk, or the tensors that are always active."""

    pieces: list[Piece]
    tiles: int
    full_tiles: int
    master: bool
    slab: Slab | None = None  # made at the first update
    tables: dict[torch.dtype, tuple[int, TileTable]] = field(default_factory=dict)  # first tile, where its rows lie
    addresses: list[int] = field(default_factory=list)  # of the pieces, as the tables have them


class ChunkAdamW(torch.optim.Optimizer):
    """AdamW that trains one chunk of the model's parameters at a time; rotation happens in ``step()``.

    A drop-in for torch.optim.AdamW in any loop, and for transformers' Trainer (``optimizers=(ChunkAdamW(model),
    None)``): gradients of the active rows alone are formed, and moments are kept where they do not cost device memory.
    Make it after the model is on its device, in its dtype and wrapped by PEFT, and before DDP wraps it; after
    ``fully_shard``.

    Args:
        model: its parameters that require gradients are trained (fp32, bf16 or fp16).  Until ``detach()`` they are
            frozen, but for the small ones, and the active rows are leaves in ``model.active_slices``.
        num_chunks: N, 8 by default; 1 is AdamW on the whole model.
        steps_per_chunk: K, successful updates of a chunk before the next.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; decay is decoupled.
        no_decay: names or patterns (fnmatch) of parameters that do not decay: a second param_group.
        order: "ascending", "descending", "random" (by ``seed``), "loss" (chunks after which the loss fell most come
            first; see ``chunkft.rotation``; needs ``observe(loss)`` or ``step(closure)``).
        state_policy: of moments when a chunk's turn comes again: "persist", "reset", or "keep_v" (only the second).
        lr_schedule: what a scheduler's ``group["lr"]`` means: "update", read at every update; "cycle", read when a
            cycle begins and held for its N K updates.  Tick the scheduler once an update in both.
        low_precision: of bf16 and fp16 weights: "master", fp32 copies beside the moments; "stochastic", no copy and
            stochastic rounding, deterministic in (seed, update, element).
        moments: "fp32", or "8bit": block-wise codes, rounded stochastically.
        exact: on the CPU, the bits of torch.optim.AdamW(foreach=False), whose square root takes half the kernel's time;
            False: the rounded square root, as everywhere on GPUs.
        max_grad_norm: clips the norm over everything active, after the mean over processes.  ``grad_norm`` is the
            last one (a tensor).  Where it is None, clip as usual before ``step()``: in one process only, since
            gradients are reduced in ``step()``.
        small, align, whole: of ``chunkft.plan``; or ``plan``, one that was made before.
        bucket_bytes, slots: of the device's ring for state that is kept on the host.
        group: process group of data-parallel replicas; None is the default group, where there is one of several.
        backend: of the kernels; see ``burnish.linear_loss``.

    Raises ValueError or TypeError that names the argument and what it got.
    """

    #: A GradScaler then sets ``grad_scale`` and ``found_inf`` for the time of a step().
    _step_supports_amp_scaling = True

    def __init__(
        self, model: nn.Module, num_chunks: int | None = None, steps_per_chunk: int = 1, lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, *,
        no_decay: Sequence[str] = (), order: str = "ascending", seed: int = 0, state_policy: str = "persist",
        lr_schedule: str = "update", low_precision: str = "master", moments: str = "fp32",
        exact: bool = True, max_grad_norm: float | None = None, small: str = "always", align: bool | int = True,
        whole: Sequence[str] = (), plan: ChunkPlan | None = None, bucket_bytes: int = 64 << 20, slots: int = 3,
        group=None, backend: str = "auto",
    ):  # fmt: skip
        _check_one_of("order", order, ORDERS)
        _check_one_of("state_policy", state_policy, STATE_POLICIES)
        _check_one_of("lr_schedule", lr_schedule, LR_SCHEDULES)
        _check_one_of("low_precision", low_precision, LOW_PRECISION)
        _check_one_of("moments", moments, MOMENTS)
        _check_count("steps_per_chunk", steps_per_chunk)
        _check_count("bucket_bytes", bucket_bytes)
        _check_count("slots", slots)
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number, at least 0; got {value!r}")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 or None; got {max_grad_norm!r}")
        if plan is None:
            count = 8 if num_chunks is None else num_chunks
            plan = make_plan(model, count, small=small, align=align, whole=tuple(whole))
        elif num_chunks not in (None, plan.num_chunks):
            raise ValueError(f"num_chunks is {num_chunks}, but plan has {plan.num_chunks}")
        self.plan = plan
        segments = [*plan.always, *(s for chunk in plan.chunks for s in chunk)]
        undecayed = _matching(no_decay, [s.name for s in segments])
        parameters = dict(model.named_parameters())
        for s in plan.parameters:
            if s.name not in parameters or tuple(parameters[s.name].shape) != s.shape:
                raise ValueError(f"plan is of another model: this one has no parameter {s.name} {s.shape}")
        self.replicas = Replicas([parameters[s.name] for s in segments], group)
        self.slices = Slices(model, plan)
        self.rotation = Rotation(plan.num_chunks, steps_per_chunk, order, seed)
        self.state_policy, self.lr_schedule, self.seed = state_policy, lr_schedule, seed
        self.low_precision, self.moments, self.exact = low_precision, moments, exact
        self.max_grad_norm = max_grad_norm
        self.bucket_bytes, self.ring_slots, self._backend = bucket_bytes, slots, backend
        self.grad_norm: Tensor | None = None
        self.updates = 0  # successful ones
        self._ring: Ring | None = None
        self._lrs: list[float] = []  # of this cycle
        self._parts = [self._part(chunk, undecayed) for chunk in self.plan.chunks]
        self._always = self._part(self.plan.always, undecayed)
        self.device = local_tensor(self.slices.parameters[segments[0].name]).device

        def flat(tiles: int) -> Tensor:
            return torch.zeros(tiles * TILE, dtype=torch.float32, device=self.device)

        self._full = flat(max(part.full_tiles for part in self._parts))
        self._flat = flat(max(part.tiles for part in self._parts)) if self.replicas.sharded else self._full
        self._flat_always = flat(self._always.tiles)
        groups: list[dict[str, Any]] = [{"params": [], "lr": lr, "weight_decay": weight_decay}]
        if undecayed:
            groups.append({"params": [], "lr": lr, "weight_decay": 0.0})
        self._ready = False
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._ready = True
        self._activate()

    # What is trained

    def _part(self, segments: Sequence[Segment], undecayed: set[str]) -> Part:
        entries = [(int(s.name in undecayed), s) for s in segments]
        entries.sort(key=lambda e: (str(e[1].dtype), e[0]))  # a table has one dtype, and a launch one group as well
        pieces, at, full = [], 0, 0
        for group, s in entries:
            own = s.cut(*local_rows(self.slices.parameters[s.name], s))
            tiles = -(-own.numel // TILE)
            pieces.append(Piece(s, own, group, at, at + tiles, full))
            at, full = at + tiles, full + -(-s.numel // TILE)
        low = any(s.dtype != torch.float32 for s in segments)
        return Part(pieces, at, full, master=low and self.low_precision == "master")

    def _rows(self, piece: Piece) -> Tensor:
        """The weight's memory behind a piece, flat."""
        p = self.slices.parameters[piece.own.name]
        rows = local_tensor(p).detach()
        if rows.ndim:
            rows = rows[piece.own.start - first_row(p) : piece.own.stop - first_row(p)]
        return rows.view(-1)

    def _find(self, part: Part) -> None:
        """Find where a part's rows lie; they may have moved since (accelerate lays a model out anew)."""
        rows = [self._rows(piece) for piece in part.pieces]
        addresses = [x.data_ptr() for x in rows]
        if addresses == part.addresses:
            return
        for piece, x in zip(part.pieces, rows, strict=True):
            if (x.dtype, x.device) != (piece.own.dtype, self.device):
                raise RuntimeError(
                    f"{piece.own.name} was {piece.own.dtype} on {self.device} when ChunkAdamW was made, and is "
                    f"{x.dtype} on {x.device} now: move and cast the model first"
                )
        part.addresses, part.tables = addresses, {}
        for dtype, run in groupby(zip(part.pieces, rows, strict=True), lambda pair: pair[0].own.dtype):
            pairs = list(run)
            table = TileTable.build([(x, piece.own.offset) for piece, x in pairs])
            part.tables[dtype] = pairs[0][0].first, table

    def _activate(self) -> None:
        """Make the rotation's chunk the one that trains."""
        part = self._parts[self.rotation.chunk]
        slices = self.slices.activate([piece.segment for piece in part.pieces])
        for piece, s in zip(part.pieces, slices, strict=True):
            at = piece.full * TILE
            s.use(self._full[at : at + piece.segment.numel].view(s.leaf.shape))
        self._find(part)
        for i, group in enumerate(self.param_groups):
            own = [s.leaf for piece, s in zip(part.pieces, slices, strict=True) if piece.group == i]
            small = [self.slices.parameters[p.segment.name] for p in self._always.pieces if p.group == i]
            group["params"] = [*own, *small]

    def _forget(self) -> None:
        """What ``state_policy`` leaves of the moments of a chunk whose turn comes again."""
        part = self._parts[self.rotation.chunk]
        if part.slab is None or self.state_policy == "persist":
            return
        names = ("m", "m_scale") if self.state_policy == "keep_v" else ("m", "m_scale", "v", "v_scale")
        part.slab.fresh |= {name for name in names if name in part.slab.parts}
        for piece in part.pieces:
            piece.steps = [0, piece.steps[1] if self.state_policy == "keep_v" else 0]

    def detach(self) -> None:
        """Give the model back as it was before; the optimizer is of no use afterwards.  A second call does nothing."""
        if self._ready:
            self.slices.detach()
            self._ready = False

    def add_param_group(self, param_group) -> None:
        if self._ready:
            raise ValueError("ChunkAdamW trains the parameters of its plan: a param_group cannot be added")
        super().add_param_group(param_group)

    @property
    def chunk(self) -> int:
        """The chunk that trains now."""
        return self.rotation.chunk

    @property
    def cycle(self) -> int:
        """Whole passes over the chunks so far."""
        return self.rotation.cycle

    # An update

    def observe(self, loss: Tensor | float) -> None:
        """Tell order="loss" the loss of a (micro-)batch; with any other order it does nothing, and reads nothing."""
        if self.rotation.order == "loss":
            self.rotation.observe(self.replicas.mean_number(loss))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """One update of the active rows; the K-th of a chunk makes the next one active.

        Returns the closure's loss.  Rows without a gradient are left alone, as by torch's optimizers; with several
        processes their gradient counts as zero.  An update that a GradScaler finds infinite counts for nothing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.observe(loss)
        if not self._ready:
            raise RuntimeError("this ChunkAdamW was detached")
        rotation = self.rotation
        if not self._lrs or (rotation.index == 0 and rotation.used == 0):
            self._lrs = [float(group["lr"]) for group in self.param_groups]
        part = self._parts[rotation.chunk]
        for one in (part, self._always):
            self._find(one)
        self.slices.follow()
        work = [
            (part, self._flat, self._gather(part)), (self._always, self._flat_always, self._gather_always()),
        ]  # fmt: skip
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            found_inf = self.replicas.any(found_inf.to(torch.float32).reshape(1))
        scale = self._scale(work)
        for one, flat, present in work:
            if present:
                self._update(one, flat, present, scale, found_inf)
        changed = [self.slices.parameters[piece.own.name] for _, _, present in work for piece in present]
        torch.autograd.graph.increment_version([local_tensor(p) for p in changed])  # a graph from before is void
        if found_inf is not None and bool(found_inf):  # the one look at the device, where a GradScaler is in use
            return loss
        for _, _, present in work:
            for piece in present:
                piece.steps = [n + 1 for n in piece.steps]
        self.updates += 1
        if rotation.advance():
            self._activate()
            self._forget()
        return loss

    def _gather(self, part: Part) -> list[Piece]:
        """The chunk's gradients, the mean over processes, into the flat buffer; returns the pieces that have one."""
        present = []
        for piece, s in zip(part.pieces, self.slices.active, strict=True):
            assert s.target is not None
            grad = s.leaf.grad
            if grad is None:
                if not self.replicas:
                    continue
                s.target.zero_()
            elif grad.data_ptr() != s.target.data_ptr():
                s.target.copy_(grad)
            present.append(piece)
        if not present:
            warnings.warn(
                "no active row has a gradient: was backward() called, and does every block of a reentrant checkpoint "
                "get an input that requires a gradient (model.enable_input_require_grads())?", stacklevel=3,
            )  # fmt: skip
        if self.replicas.sharded:
            spans = [(s.segment, s.target) for s in self.slices.active if s.target is not None]
            self.replicas.scatter(self.slices.parameters, spans, [self._view(self._flat, p) for p in part.pieces])
        else:
            self.replicas.mean_(self._full[: part.full_tiles * TILE])
        return present

    def _gather_always(self) -> list[Piece]:
        present = []
        for piece in self._always.pieces:
            p = self.slices.parameters[piece.segment.name]
            view = self._view(self._flat_always, piece)
            if p.grad is None:
                if not self.replicas:
                    continue
                view.zero_()
            else:
                view.copy_(local_tensor(p.grad).reshape(-1))
            present.append(piece)
        if not self.replicas.sharded:  # FSDP has reduced its own; where DDP has, a mean of equals changes nothing
            self.replicas.mean_(self._flat_always)
        return present

    def _view(self, flat: Tensor, piece: Piece) -> Tensor:
        """A piece's gradient in the flat buffer, without the padding."""
        return flat[piece.first * TILE :][: piece.own.numel]

    def _scale(self, work) -> Tensor | None:
        """What gradients are multiplied by, (1,) on the device: 1 / loss scale, and the clip coefficient."""
        scale = getattr(self, "grad_scale", None)
        scale = None if scale is None else scale.to(torch.float32).reshape(1).reciprocal()
        if self.max_grad_norm is None:
            return scale
        views = [self._view(flat, piece) for _, flat, present in work for piece in present]
        norm = self.replicas.norm(views, self.device)
        norm = norm if scale is None else norm * scale
        self.grad_norm = norm
        clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).reshape(1)  # as torch.nn.utils.clip_grad_norm_
        return clip if scale is None else clip * scale

    def _update(self, part: Part, flat: Tensor, present: list[Piece], scale, found_inf) -> None:
        if part.slab is None:
            part.slab = self._new_slab(part)
        runs = _runs(present)
        kernels = dispatch.adamw(dispatch.resolve(self._backend, self.device))
        slab = part.slab

        def update(first: int, last: int, parts: dict[str, Tensor]) -> None:
            self._freshen(part, first, last, parts)
            for group, dtype, step_m, step_v, start, stop in runs:
                a, b = max(first, start), min(last, stop)
                if a >= b:
                    continue
                g = self.param_groups[group]
                lr = self._lrs[group] if self.lr_schedule == "cycle" else float(g["lr"])
                how = Update(
                    lr=lr, beta1=g["betas"][0], beta2=g["betas"][1], eps=g["eps"], weight_decay=g["weight_decay"],
                    step_m=step_m + 1, step_v=step_v + 1, seed=self.seed, step=self.updates,
                )  # fmt: skip
                own = {name: x[part_range(name, a - first, b - first)] for name, x in parts.items()}
                spec, (base, table) = self._spec(dtype), part.tables[dtype]
                kernels.adamw(
                    table.slice(a - base, b - base), flat[a * TILE : b * TILE], own["master"] if spec.master else None,
                    own["m"], own["v"], own.get("m_scale"), own.get("v_scale"), dtype, spec, how, scale, found_inf,
                )  # fmt: skip

        if not self._at_rest(part):
            update(0, part.tiles, slab.parts)
        else:
            self._device_ring().stream(slab, buckets(0, part.tiles, self._bucket()), update)
        slab.fresh.clear()

    def _at_rest(self, part: Part) -> bool:
        """Whether a part's state is kept on the host and passes by."""
        return part is not self._always and self.device.type == "cuda"

    def _new_slab(self, part: Part) -> Slab:
        at_rest = self._at_rest(part)
        where = torch.device("cpu") if at_rest else self.device
        return Slab(part.tiles, master=part.master, moments=self.moments, device=where, pinned=at_rest)

    def _spec(self, dtype: torch.dtype) -> AdamWSpec:
        low = dtype != torch.float32
        master = low and self.low_precision == "master"
        return AdamWSpec(self.moments, "stochastic" if low and not master else "nearest", master, self.exact)

    def _freshen(self, part: Part, first: int, last: int, parts: dict[str, Tensor]) -> None:
        """State that no update has written yet: moments zero, the master its weight."""
        assert part.slab is not None
        for name in part.slab.fresh:
            parts[name].zero_()
        if "master" in part.slab.fresh:
            for piece in part.pieces:
                rows = self._rows(piece)
                a, b = max(first, piece.first), min(last, piece.last)
                if a < b:
                    rows = rows[(a - piece.first) * TILE : (b - piece.first) * TILE]
                    parts["master"][(a - first) * TILE :][: rows.numel()].copy_(rows)

    def _bucket(self) -> int:
        """Tiles of a bucket of the ring."""
        master = any(part.master for part in self._parts)
        return max(1, self.bucket_bytes // state_bytes(1, master=master, moments=self.moments))

    def _device_ring(self) -> Ring:
        if self._ring is None:
            master = any(part.master for part in self._parts)
            self._ring = self._new_ring(
                tiles=self._bucket(), slots=self.ring_slots, master=master, moments=self.moments, device=self.device
            )
        return self._ring

    def _new_ring(self, **options) -> Ring:
        return Ring(**options)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, of this rank: moments, masters, the rotation in the middle of a cycle, rates.

        The tensors are the optimizer's own, as in torch: copy them, or save them before the next ``step()``.
        """
        if self._ring is not None:
            self._ring.wait()
        parts = []
        for part in (*self._parts, self._always):
            memory = None if part.slab is None else part.slab.memory
            fresh = [] if part.slab is None else sorted(part.slab.fresh)
            parts.append({"memory": memory, "fresh": fresh, "steps": [list(piece.steps) for piece in part.pieces]})
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {
            "state": {}, "param_groups": groups, "format": _FORMAT, "identity": self._identity(), "parts": parts,
            "rotation": self.rotation.state_dict(), "updates": self.updates, "lrs": list(self._lrs),
        }  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        return {
            "plan": self.plan.fingerprint, "num_chunks": self.plan.num_chunks, "moments": self.moments,
            "low_precision": self.low_precision, "shard": self.replicas.shard, "groups": len(self.param_groups),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``; ValueError where it is another optimizer's or of another plan."""
        if not self._ready:
            raise RuntimeError("this ChunkAdamW was detached")
        if not isinstance(state_dict, dict) or state_dict.get("format") != _FORMAT:
            raise ValueError("this is not the state of a ChunkAdamW of this version")
        for name, value in self._identity().items():
            theirs = state_dict["identity"].get(name)
            if theirs != value:
                what = "is of another plan: " if name in ("plan", "num_chunks") else ""
                raise ValueError(f"the optimizer's state {what}has {name} {theirs!r}, this run {value!r}")
        if self._ring is not None:  # copies of the last update may still be on their way into the slabs
            self._ring.wait()
        self.rotation.load_state_dict(state_dict["rotation"])
        for part, saved in zip((*self._parts, self._always), state_dict["parts"], strict=True):
            for piece, steps in zip(part.pieces, saved["steps"], strict=True):
                piece.steps = list(steps)
            if saved["memory"] is None:
                part.slab = None
                continue
            if part.slab is None:
                part.slab = self._new_slab(part)
            part.slab.memory.copy_(saved["memory"])
            part.slab.fresh = set(saved["fresh"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: tuple(v) if k == "betas" else v for k, v in saved.items()})
        self.updates, self._lrs = state_dict["updates"], list(state_dict["lrs"])
        self._activate()


def _runs(pieces: list[Piece]) -> list[tuple[int, torch.dtype, int, int, int, int]]:
    """(group, dtype, updates behind m, behind v, first tile, last tile) of neighbours that one launch can update."""
    runs: list[tuple] = []
    for p in pieces:
        key = (p.group, p.segment.dtype, *p.steps)
        if runs and runs[-1][:4] == key and runs[-1][5] == p.first:
            runs[-1] = (*runs[-1][:5], p.last)
        else:
            runs.append((*key, p.first, p.last))
    return runs


def _matching(patterns: Sequence[str], names: list[str]) -> set[str]:
    out: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"no_decay: {pattern!r} matches no trainable parameter")
        out |= found
    return out


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
