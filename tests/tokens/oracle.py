"""The method by its definition (specs/tokens.md 1.3): the dense model, with scores of other keys at -inf."""

import torch


def grid(layout, stride):
    """T_sigma of the published code, one token after another."""
    out = list(range(layout.special))
    for y in range(0, layout.height, stride):
        for x in range(0, layout.width, stride):
            out.append(layout.special + y * layout.width + x)
    return out + list(range(layout.special + layout.height * layout.width, layout.tokens))


def mask(layout, kind, chosen, stride, *, own=False, tail="dense"):
    """(L, L): 0 where a query may see a key, -inf elsewhere.

    ``chosen``: frames of S, or for each query frame its own; ``own``: and the query's frame.
    """
    p, n = layout.tokens, layout.frames
    seen = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for f in range(n):
        if kind == "dense":
            keys = set(range(n * p))
        elif kind == "local":
            keys = {f * p + t for t in range(p)}
        else:
            frames = set(chosen[f] if isinstance(chosen[0], (list, tuple)) else chosen) | ({f} if own else set())
            tokens = grid(layout, stride) if kind == "stride" else range(p)
            keys = {g * p + t for g in frames for t in tokens}
        for key in keys:
            seen[f * p : (f + 1) * p, key] = True
    seen[:, n * p :] = True
    if tail == "dense" or kind == "local":
        seen[n * p :] = True
    else:
        seen[n * p :] = seen[0]
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


class Masked:
    """``attn.forward`` of a dense model with a mask (B or 1, heads or 1, L, L) added to its scores."""

    def __init__(self, attn, added, rope="rope"):
        self.attn, self.added, self.rope = attn, added, getattr(attn, rope, None)
        self.calls = 0

    def __call__(self, x, *args, **kwargs):
        self.calls += 1
        where = next((a for a in (*args, *kwargs.values()) if torch.is_tensor(a)), None)
        b, n, _ = x.shape
        q, k, v = self.attn.qkv(x).view(b, n, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        if self.rope is not None and where is not None:
            q, k = self.rope(q, where), self.rope(k, where)
        if getattr(self.attn, "use_scalable_softmax", False):
            q = q * torch.log(torch.tensor(n))
        if getattr(self.attn, "use_entropy_scaling", False):
            growth, base = self.attn.entropy_scaling_growth_factor, self.attn.base_token_count_for_entropy_scaling
            q = q * torch.sqrt(growth * torch.log(torch.tensor(n)) / torch.log(torch.tensor(base)))
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + self.added.to(q.dtype)).softmax(-1)
        return self.attn.proj((weights @ v).transpose(1, 2).flatten(2))


class masked:
    """Context: the global blocks of a model attend as ``masks`` say, a mask for each."""

    def __init__(self, blocks, masks, rope="rope"):
        self.attns = [block.attn for block in blocks]
        self.added = [m if m.ndim == 4 else m[None, None] for m in masks]
        self.rope = rope

    def __enter__(self):
        for attn, added in zip(self.attns, self.added, strict=True):
            attn.forward = Masked(attn, added, self.rope)
        return self

    def __exit__(self, error, *_):
        used = [attn.forward.calls for attn in self.attns]
        for attn in self.attns:
            del attn.forward
        assert error is not None or all(used), used
