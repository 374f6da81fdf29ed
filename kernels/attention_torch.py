r"""The torch twin of gathered-key attention, and its form on the CPU; the contract is in ``attention``.

Keys and values of a block of frames are gathered, heads and frames are batch dimensions of plain products.  On the CPU
torch's own blockwise attention is asked first, once a frame: it keeps the scores of a block in the cache and gives the
log-sum-exp.  The entropy then is

    - sum_j p_j log p_j = lse - scale q . sum_j p_j k_j

one more pass, with k where v was.  What that cannot do (a bias, a gradient of lse or entropy, an entropy in bf16, fp16,
fp64) goes the plain way.  Sums over the queries that list a key run in the order of frames, by index_add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Output, Saved, check
from .launch import accumulator

#: Bytes of scores that are held at once.
SCORE_BYTES = 32 << 20


def _index(lists: Tensor, counts: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that can be followed, which entries count, and which lists have an entry beyond the keys."""
    inside = torch.arange(lists.shape[-1], device=lists.device) < counts[..., None]
    wild = (inside & (lists >= keys)).any(-1)
    inside = inside & (lists >= 0) & (lists < keys)
    return torch.where(inside, lists, 0).long(), inside, wild


class _Blocks:
    """Frames and queries cut so that a block's scores fit; operands of a block with heads as (Hkv, R)."""

    def __init__(self, q, k, v, lists, counts, bias, scale):
        self.acc = accumulator(q.dtype)
        b, self.heads, length, d = q.shape
        self.key_heads, keys = k.shape[1:3]
        self.frames, m = lists.shape[1], lists.shape[3]
        self.queries = length // self.frames
        # (B, F, Hkv, R, P, D)
        group = (self.key_heads, self.heads // self.key_heads)
        self.q = q.view(b, *group, self.frames, self.queries, d).permute(0, 3, 1, 2, 4, 5)
        self.k, self.v, self.scale = k, v, scale
        self.bias = bias
        row, inside, wild = _index(lists, counts, keys)
        # (B', F, Hkv or 1, R or 1, M)
        apart = (1, 1) if lists.shape[2] == 1 else (self.key_heads, lists.shape[2] // self.key_heads)
        self.row, self.inside = (x.unflatten(2, apart) for x in (row, inside))
        self.wild = wild.unflatten(2, apart)
        each = max(1, b * self.heads * m * self.acc.itemsize)
        rows = max(1, SCORE_BYTES // each)
        self.step = min(max(self.queries, 1), rows)
        self.together = max(1, rows // max(self.queries, 1))

    def __iter__(self):
        for f in range(0, self.frames, self.together):
            for p in range(0, self.queries, self.step):
                yield slice(f, min(f + self.together, self.frames)), slice(p, min(p + self.step, self.queries))

    def gather(self, x: Tensor, frames: slice) -> Tensor:
        """Listed rows of x (B, Hkv, Lk[, D]) as (B, f, Hkv, R or 1, M[, D])."""
        row = self.row[:, frames]
        b = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1, 1)
        h = torch.arange(x.shape[1], device=x.device).view(1, 1, -1, 1, 1)
        return x[b, h, row]

    def add_back(self, out: Tensor, grad: Tensor, frames: slice) -> None:
        """The transpose of ``gather``: out (B, Hkv, Lk[, D]) += grad, in order."""
        row = self.row[:, frames]
        if row.shape[3] == 1:  # the query heads of a key head have one list: their sum
            grad = grad.sum(3, keepdim=True)
        row = row.expand(grad.shape[:5])
        b, h, keys = out.shape[:3]
        line = torch.arange(b * h, device=out.device).view(b, 1, h, 1, 1) * keys + row
        out.view(b * h * keys, *out.shape[3:]).index_put_(
            (line.reshape(-1),), grad.reshape(line.numel(), *out.shape[3:]), accumulate=True
        )

    def scores(self, frames: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, f, Hkv, R, p, D), k (B, f, Hkv, R or 1, M, D) and s (B, f, Hkv, R, p, M) in the accumulator's dtype."""
        q, k = self.q[:, frames, :, :, rows].to(self.acc), self.gather(self.k, frames).to(self.acc)
        s = (q @ k.transpose(-1, -2)).mul_(self.scale)
        if self.bias is not None:
            s += self.gather(self.bias, frames).to(self.acc)[..., None, :]
        s.masked_fill_(~self.inside[:, frames, :, :, None], -torch.inf)
        return q, k, s.masked_fill_(self.wild[:, frames, :, :, None, None], torch.nan)

    def part(self, x: Tensor, frames: slice, rows: slice) -> Tensor:
        """The block's part of x (B, Hq, L, ...), as (B, f, Hkv, R, p, ...); of a view of x, a view."""
        x = x.view(x.shape[0], self.key_heads, -1, self.frames, self.queries, *x.shape[3:]).movedim(3, 1)
        return x[:, frames, :, :, rows]


def forward(q, k, v, lists, counts, bias, scale: float, *, entropy: bool) -> Output:
    """Attention over the lists; see the contract."""
    check(q, k, v, lists, counts, bias)
    acc = accumulator(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    spread = torch.empty_like(lse) if entropy else None
    if not q.numel():
        return Output(out, lse, spread)
    # in bf16 the products would round what the entropy is made of
    if _blockwise(q, bias) and (spread is None or q.dtype == torch.float32):
        _frames(q, k, v, lists, counts, scale, out, lse, spread)
        return Output(out, lse, spread)
    blocks = _Blocks(q, k, v, lists, counts, bias, scale)
    for frames, rows in blocks:
        _, _, s = blocks.scores(frames, rows)
        top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
        empty = top == -torch.inf
        s -= torch.where(empty, 0, top)
        p = s.exp()
        total = p.sum(-1, keepdim=True)
        blocks.part(lse, frames, rows).copy_((total.log() + top)[..., 0])
        safe = torch.where(empty, 1, total)
        if spread is not None:
            t = torch.where(p > 0, p * s, torch.where(p.isnan(), p, 0)).sum(-1, keepdim=True)
            blocks.part(spread, frames, rows).copy_((safe.log() - t / safe).clamp_(min=0)[..., 0])
        value = (p / safe) @ blocks.gather(v, frames).to(acc)
        blocks.part(out, frames, rows).copy_(value)
    return Output(out, lse, spread)


def backward(q, k, v, lists, counts, bias, scale: float, saved: Saved):
    """dq, dk, dv as the inputs and dbias in the accumulator's dtype, None without a bias."""
    check(q, k, v, lists, counts, bias)
    acc = accumulator(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=acc, device=q.device) for _ in range(2))
    d_bias = None if bias is None else torch.zeros(bias.shape, dtype=acc, device=q.device)
    if not q.numel() or not k.shape[2] or not lists.shape[3]:
        return dq.zero_(), dk.to(k.dtype), dv.to(v.dtype), d_bias
    if _blockwise(q, bias) and saved.d_lse is None and saved.d_entropy is None:
        _frames_backward(q, k, v, lists, counts, scale, saved, dq, dk, dv)
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_bias
    blocks = _Blocks(q, k, v, lists, counts, bias, scale)
    out, lse, d_out = (x.contiguous() for x in (saved.out, saved.lse, saved.d_out))
    entropy, d_lse, d_entropy = (
        None if x is None else x.contiguous() for x in (saved.entropy, saved.d_lse, saved.d_entropy)
    )
    for frames, rows in blocks:
        query, key, s = blocks.scores(frames, rows)
        total = blocks.part(lse, frames, rows)[..., None]
        s -= torch.where(total == -torch.inf, 0, total)
        p = s.exp()
        do = blocks.part(d_out, frames, rows).to(acc)
        slope = do @ blocks.gather(v, frames).to(acc).transpose(-1, -2)
        slope -= (do * blocks.part(out, frames, rows).to(acc)).sum(-1, keepdim=True)
        if d_lse is not None:
            slope += blocks.part(d_lse, frames, rows)[..., None]
        if d_entropy is not None and entropy is not None:
            finite = torch.where(s == -torch.inf, 0, s)
            slope -= blocks.part(d_entropy, frames, rows)[..., None] * (
                finite + blocks.part(entropy, frames, rows)[..., None]
            )
        ds = slope.mul_(p)
        blocks.part(dq, frames, rows).copy_((ds @ key).mul_(scale))
        blocks.add_back(dv, p.transpose(-1, -2) @ do, frames)
        blocks.add_back(dk, (ds.transpose(-1, -2) @ query).mul_(scale), frames)
        if d_bias is not None:
            blocks.add_back(d_bias, ds.sum(-2), frames)
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_bias


def _blockwise(q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's blockwise attention on the CPU serves these operands."""
    return q.device.type == "cpu" and bias is None and q.dtype in (torch.float32, torch.bfloat16)


class _Units:
    """Lists one by one, or those of a frame's heads together where they are of one length."""

    def __init__(self, q, k, lists, counts):
        heads, length = q.shape[1:3]
        key_heads, self.keys = k.shape[1:3]
        self.lists, self.counts = lists, counts
        self.frames = lists.shape[1]
        self.apart = max(lists.shape[2], key_heads)  # heads that have a list and keys of their own
        self.each = self.apart // key_heads
        self.fold = (self.apart, heads // self.apart, length // self.frames)
        self.batch = q.shape[0]

    def __iter__(self):
        """(batch, frame, heads, rows (heads, m), whether any entry points beyond the keys)."""
        counts = self.counts.tolist()
        for batch in range(self.batch):
            of = batch if self.lists.shape[0] > 1 else 0
            for frame in range(self.frames):
                each = counts[of][frame]
                same = len(set(each)) == 1
                for heads in [slice(0, self.apart)] if same else [slice(h, h + 1) for h in range(self.apart)]:
                    lists = self.lists[of, frame, heads if len(each) > 1 else slice(0, 1)]
                    rows = lists[:, : each[heads.start if len(each) > 1 else 0]]
                    if bool((rows < 0).any()):  # holes: the heads may differ in what is left
                        for h in range(heads.start, heads.stop):
                            own = rows[h - heads.start if len(rows) > 1 else 0]
                            yield self.unit(batch, frame, slice(h, h + 1), own[own >= 0][None])
                    else:
                        yield self.unit(batch, frame, heads, rows)

    def unit(self, batch, frame, heads, rows):
        wild = rows >= self.keys
        if bool(wild.any()):
            return batch, frame, heads, rows.clamp(max=self.keys - 1).long(), True
        return batch, frame, heads, rows.long(), False

    def lines(self, heads: slice, rows: Tensor) -> Tensor:
        """Rows of a key tensor with heads and keys in one dimension."""
        head = torch.arange(heads.start, heads.stop) // self.each
        return (head[:, None] * self.keys + rows).reshape(-1)

    def buffers(self, x: Tensor) -> list[Tensor]:
        """Memory for two ``gather``s, used again and again: fresh memory costs more than what is copied to it."""
        size = self.apart * self.lists.shape[-1] * x.shape[-1]
        return [torch.empty(size, dtype=x.dtype, device=x.device) for _ in range(2)]

    def gather(self, x: Tensor, batch: int, heads: slice, rows: Tensor, buffer: Tensor) -> Tensor:
        """Rows of x (B, Hkv, Lk, D) as (1, heads, m, D)."""
        n, d = heads.stop - heads.start, x.shape[-1]
        m = rows.shape[1]
        out = buffer[: n * m * d].view(n, m, d)
        if len(rows) == 1 and (self.each == 1 or n == 1):  # one list for all of them, a key head each
            first = heads.start // self.each
            torch.index_select(x[batch, first : first + n], 1, rows[0], out=out)
        else:
            torch.index_select(x[batch].flatten(0, 1), 0, self.lines(heads, rows), out=out.view(n * m, d))
        return out[None]

    def add_back(self, out: Tensor, grad: Tensor, batch: int, heads: slice, rows: Tensor) -> None:
        """The transpose of ``gather``, in fp32: out (B, Hkv, Lk, D)."""
        out[batch].flatten(0, 1).index_add_(0, self.lines(heads, rows), grad[0].flatten(0, 1).to(out.dtype))

    def part(self, x: Tensor, batch: int, frame: int, heads: slice) -> Tensor:
        """A frame of x (B, Hq, L[, D]) as (1, heads, R, P[, D]); of a view of x, a view."""
        x = x[batch].unflatten(0, self.fold[:2])[heads].unflatten(2, (self.frames, self.fold[2]))
        return x[None, :, :, frame] if x.ndim > 3 else x[None]

    def queries(self, x: Tensor, batch: int, frame: int, heads: slice) -> Tensor:
        """A frame of x (B, Hq, L, D) as (1, heads, R P, D)."""
        return self.part(x, batch, frame, heads).flatten(2, 3)


def _frames(q, k, v, lists, counts, scale, out, lse, entropy):
    k, v = k.contiguous(), v.contiguous()  # rows are gathered once a frame
    units = _Units(q, k, lists, counts)
    some, more = units.buffers(k)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for batch, frame, heads, rows, wild in units:
        place = [None if x is None else units.part(x, batch, frame, heads) for x in (out, lse, entropy)]
        if wild or rows.numel() == 0:
            for x, value in zip(place, (0, -torch.inf, 0), strict=True):
                if x is not None:
                    x.fill_(torch.nan if wild else value)
            continue
        query, key = units.queries(q, batch, frame, heads), units.gather(k, batch, heads, rows, some)
        got, sums = attend(query, key, units.gather(v, batch, heads, rows, more), scale=scale)
        place[0].copy_(got.reshape(place[0].shape))
        place[1].copy_(sums.reshape(place[1].shape))
        if entropy is not None:
            mean = (attend(query, key, key, scale=scale)[0] * query).sum(-1) * scale
            place[2].copy_((sums - mean).clamp_(min=0).reshape(place[2].shape))


def _frames_backward(q, k, v, lists, counts, scale, saved, dq, dk, dv):
    k, v = k.contiguous(), v.contiguous()
    units = _Units(q, k, lists, counts)
    buffers = units.buffers(k)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for batch, frame, heads, rows, wild in units:
        place = units.part(dq, batch, frame, heads)
        if wild or rows.numel() == 0:
            place.fill_(torch.nan if wild else 0)
            continue
        do, query, out = (units.queries(x, batch, frame, heads) for x in (saved.d_out, q, saved.out))
        lse = units.part(saved.lse, batch, frame, heads).flatten(2, 3)
        key, value = (units.gather(x, batch, heads, rows, b) for x, b in zip((k, v), buffers, strict=True))
        grads = attend(do, query, key, value, out, lse, 0.0, False, scale=scale)
        place.copy_(grads[0].reshape(place.shape))
        units.add_back(dk, grads[1], batch, heads, rows)
        units.add_back(dv, grads[2], batch, heads, rows)
