r"""What training by chunks will take, before it is tried.

    device = w P                     weights
           + 4 max_j n_j             flat fp32 gradient of the largest chunk
           + (4 + s) n_a             gradients and state of what is always active
           + s' ring                 buckets of the state passing by; on a CPU the whole state instead, s P
           + activations             everything between forward and backward, logits and loss included
    host   = s P                     state at rest; 0 on a CPU, where it is counted above

P elements in all, n_j of chunk j and n_a always active, in whole tiles; s bytes of state an element: 8 (fp32 moments)
or 2 (8-bit) and 4 more for an fp32 master.  Activations are not guessed: the model's own forward and backward are run
on fake tensors, which have shapes and no memory, with the first chunk active, whose graph is the deepest, and the live
bytes are counted operation by operation.  (arXiv 2605.21177, section 3.3, gives the first terms.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..kernels.adamw import TILE
from ..ops.live_bytes import LiveBytes
from .plan import ChunkPlan, Segment
from .slices import attach
from .store import state_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: each part, and ``device`` and ``host`` in all."""

    weights: int
    gradients: int
    always: int
    ring: int
    states: int
    activations: int
    states_on_host: bool

    @property
    def device(self) -> int:
        """Peak on the device that computes."""
        resident = 0 if self.states_on_host else self.states
        return self.weights + self.gradients + self.always + self.ring + self.activations + resident

    @property
    def host(self) -> int:
        """At rest on the host."""
        return self.states if self.states_on_host else 0

    def rows(self) -> dict[str, int]:
        """What a table shows: {part: bytes}, and the sums."""
        shown = {
            "weights": self.weights, "gradients": self.gradients, "small tensors": self.always, "ring": self.ring,
            "activations": self.activations,
        }  # fmt: skip
        if not self.states_on_host:
            shown["states"] = self.states
        return {**shown, "device, peak": self.device, "host, states at rest": self.host}

    def __str__(self) -> str:
        return "\n".join(f"{name:<22}{size / 1e9:>9.2f} GB" for name, size in self.rows().items())


def _tiles(segments: tuple[Segment, ...]) -> int:
    return sum(-(-s.numel // TILE) for s in segments)


def predict_memory(
    model: nn.Module, plan: ChunkPlan, *, batch: int, seq: int, dtype: torch.dtype | None = None,
    device: str = "cuda", low_precision: str = "master", moments: str = "fp32", bucket_bytes: int = 64 << 20,
    slots: int = 3, checkpointing: bool = False, loss_bytes: int | None = None,
) -> MemoryEstimate:  # fmt: skip
    """Peak bytes of ``ChunkAdamW(model, plan=plan, ...)`` for one micro-batch of ``batch`` rows of ``seq`` tokens.

    Args:
        model: a transformers causal LM, on any device, "meta" included: only its shapes are read.
        dtype: of the weights and of the forward; None: as the model has it.
        device: "cuda" (state on the host, a ring on the device) or "cpu" (state where the weights are).
        low_precision, moments, bucket_bytes, slots: as given to ``ChunkAdamW``.
        checkpointing: gradient checkpointing, non-reentrant.
        loss_bytes: scratch of a fused loss (``burnish.linear_loss(budget=)``), which then stands in the place of
            logits; None: the model's own loss on whole logits.

    Kernels' own workspaces and an allocator's fragments are not seen.  ValueError or TypeError for bad arguments.
    """
    for name, value in (("batch", batch), ("seq", seq)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu'; got {device!r}")
    dtypes = [dtype or s.dtype for s in plan.parameters]
    low = any(d != torch.float32 for d in dtypes)
    kind = {"master": low and low_precision == "master", "moments": moments}
    planned = {s.name for s in plan.parameters}
    frozen = sum(p.numel() * (dtype or p.dtype).itemsize for n, p in model.named_parameters() if n not in planned)
    weights = frozen + sum(s.numel * d.itemsize for s, d in zip(plan.parameters, dtypes, strict=True))
    largest, always = max(map(_tiles, plan.chunks)), _tiles(plan.always)
    offloaded = device == "cuda"
    one = state_bytes(1, **kind)  # type: ignore[arg-type]
    return MemoryEstimate(
        weights=weights, gradients=4 * TILE * largest, always=always * (4 * TILE + one),
        ring=slots * max(1, bucket_bytes // one) * one if offloaded else 0,
        states=one * sum(map(_tiles, plan.chunks)), states_on_host=offloaded,
        activations=_activations(model, plan, batch, seq, dtype, checkpointing, loss_bytes),
    )  # fmt: skip


def _activations(model, plan, batch, seq, dtype, checkpointing: bool, loss_bytes: int | None) -> int:
    """Peak live bytes of forward and backward beside weights and the chunk's own gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        twin: Any = _fake(model, dtype)
        twin.train()
        if checkpointing:
            name = "activation_checkpointing_enable"  # its name in newer transformers
            enable = getattr(twin, name, None) or twin.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        ids = torch.zeros(batch, seq, dtype=torch.int64)
        with attach(twin, plan) as slices:
            flat = torch.empty(sum(s.segment.numel for s in slices.active))
            at = 0
            for s in slices.active:
                s.use(flat[at : at + s.segment.numel].view(s.leaf.shape))
                at += s.segment.numel
            with LiveBytes() as live:
                if loss_bytes is None:
                    loss = twin(input_ids=ids, labels=ids, use_cache=False).loss
                    loss.backward()
                else:
                    hidden = twin.base_model(input_ids=ids, use_cache=False).last_hidden_state
                    scratch = torch.empty(loss_bytes, dtype=torch.uint8)
                    grad = torch.empty_like(hidden)
                    del scratch
                    hidden.backward(grad)
            return live.peak


def _fake(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model with tensors of the current fake mode in the place of its own."""
    memo: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        twin = torch.empty(tensor.shape, dtype=kind, device="cpu")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, memo)
