"""QK-Pro (arXiv 2606.11052, appendix N): K as it was, and the Q nearest to the fine-tuned one that keeps the routing
form.

With W of d x d_h, R = W_Q W_K^T and the ridge lambda the paper solves

    W_Q = W_Q^post + (R^pre - W_Q^post W_K^pre^T) (W_K^pre W_K^pre^T + lambda I)^-1 W_K^pre        (a d x d inverse)

which by push-through is, with G = W_K^pre^T W_K^pre of d_h x d_h,

    W_Q = W_Q^post + (W_Q^pre - W_Q^post) (G + lambda I)^-1 G

So lambda -> 0 is QK-Restore and lambda -> inf restores K alone: a path between the two.
"""

from __future__ import annotations

import torch

from ...paths import Additive, Point, Selection, Selector, Tensors
from ...paths.blend import blend_, parts


def switch(key: torch.Tensor, lam: float) -> torch.Tensor:
    """(G + lam I)^-1 G of one head's key rows (d_h, d): V diag(s^2 / (s^2 + lam)) V^T.  fp64.

    At lam = 0 it is the projector on what the keys read, the identity where they have full rank.
    """
    rows = key.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    floor = values[-1].clamp_min(0) * rows.shape[0] * torch.finfo(torch.float64).eps
    values = torch.where(values > floor, values, 0)
    share = values / (values + lam) if lam > 0 else (values > 0).double()
    return (vectors * share) @ vectors.T


def qk_pro(
    query_pre: torch.Tensor, query_post: torch.Tensor, key_pre: torch.Tensor, lam: float, convention: str = "A"
) -> torch.Tensor:
    """One head's new query rows, in fp64.

    Args:
        query_pre, query_post, key_pre: (d_h, d) each, rows of nn.Linear weights.
        lam: the ridge, >= 0.
        convention: "A", the routing form above; "B", the same formula on the matrices as stored, where it projects on
            the inputs that the keys read and W_Q^T W_K is not preserved.
    """
    post, step = query_post.double(), query_pre.double() - query_post.double()
    if convention == "A":
        return post + switch(key_pre, lam) @ step
    key = key_pre.double()
    values, vectors = torch.linalg.eigh(key @ key.T)
    floor = values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    inverse = torch.where(values > floor, 1 / (values + lam).clamp_min(torch.finfo(torch.float64).tiny), 0)
    return post + ((step @ key.T) @ vectors * inverse) @ vectors.T @ key


def nearest_rotation(
    query_pre: torch.Tensor, key_pre: torch.Tensor, query_post: torch.Tensor, key_post: torch.Tensor
) -> torch.Tensor:
    """A, (d_h, d_h) orthogonal: (A Q^pre, A K^pre) is the pair nearest to the fine-tuned one among those with the
    same logits.

    Rows of nn.Linear weights.  In a head without rotary positions, norms or biases every such pair computes what
    Q^pre and K^pre do, so an exact Procrustes repair is QK-Restore up to rounding; this shows how near the two are.
    fp64.
    """
    product = query_post.double() @ query_pre.double().T + key_post.double() @ key_pre.double().T
    u, _, v = torch.linalg.svd(product)
    return u @ v


class ProPath(Additive):
    """At t = 0 QK-Pro's weights, at t = 1 the fine-tuned ones, between them a straight line.

    Args:
        pre, post: as ``Additive`` takes them.
        queries, keys: selectors of q and k alone, cut by heads (``burnish.paths.attention``).
        lam, convention: see ``qk_pro``.

    Each q head is solved against the kv head that it reads; where there is a bias it is one more input, of value 1.
    Beside the query before and after, the layer's keys before are held (convention "A": their d_h x d_h forms).

    ValueError for latent attention, for projections that are not cut by heads, and for biases in convention "B".
    """

    def __init__(self, pre, post, queries: Selector, keys: Selector, lam: float, convention: str = "A"):
        merged = dict(queries)
        for name, selection in keys.items():
            other = merged.get(name)
            if other is not None and other.ranges is not None and selection.ranges is not None:
                both = tuple(sorted((*other.ranges, *selection.ranges)))
                selection = Selection(both, selection.axis, "qk", selection.layer)
            merged[name] = selection
        super().__init__(pre, post, merged)
        self.queries, self.keys, self.lam, self.convention = queries, keys, lam, convention
        self._key_names: dict[int | None, dict[str, str]] = {}
        for name, s in keys.items():
            leaf = name.rsplit(".", 1)[-1]
            if not s.heads or leaf in self._key_names.setdefault(s.layer, {}):
                raise ValueError(f"{name}: QK-Pro needs one key projection a layer, cut by heads")
            self._key_names[s.layer][leaf] = name
        for name, s in queries.items():
            own = self._key_names.get(s.layer, {})
            if not s.heads or "weight" not in own or s.heads % keys[own["weight"]].heads:
                raise ValueError(f"{name}: QK-Pro needs one query projection a layer, cut by heads, and its keys")
            if convention == "B" and ("bias" in own or name.endswith(".bias")):
                raise ValueError(f"{name}: convention B has no meaning for a bias: give include_bias=False")

    def tensor(self, name: str, t: Point) -> torch.Tensor:
        at = self._at(name, t) if name in self.selector else 1.0
        post = self.template.tensor(name)
        if at == 1:
            return post
        pre = self.pre.tensor(name)
        query = self.queries.get(name)
        if query is not None:
            for new, rows in self._solve(query, pre, post):
                rows.copy_(rows.double().add_(new - rows.double(), alpha=1 - at))
        if name in self.keys:
            blend_(post, pre, at, self.keys[name])
        return post

    def _solve(self, query: Selection, pre: torch.Tensor, post: torch.Tensor):
        """(new rows, view of post's rows) head by head, both (d_h, d)."""
        own = self._key_names[query.layer]
        selection = self.keys[own["weight"]]
        weight = heads(self.pre, own["weight"], selection)
        if "bias" in own:
            weight = torch.cat([weight, heads(self.pre, own["bias"], self.keys[own["bias"]])], dim=2)
        group = query.heads // selection.heads
        forms = [switch(w, self.lam) for w in weight] if self.convention == "A" else None
        if forms is not None:
            del weight
        before, after = (views(x, query) for x in (pre, post))
        for h, (a, b) in enumerate(zip(before, after, strict=True)):
            step = a.double() - b.double()
            if forms is not None:
                new = b.double() + forms[h // group] @ step
            else:
                new = qk_pro(a, b, weight[h // group], self.lam, "B")
            yield new, b


def heads(tensors: Tensors, name: str, selection: Selection) -> torch.Tensor:
    """(heads, d_h, d) of a projection's selected rows; a bias has d = 1."""
    rows = [v.unsqueeze(1) if v.dim() == 1 else v for v in views(tensors.tensor(name), selection)]
    return torch.stack([r.double() for r in rows])


def views(x: torch.Tensor, selection: Selection) -> list[torch.Tensor]:
    """A view of each head's rows: (d_h, d), or (d_h,) of a bias."""
    cut = list(parts(x, selection))
    if selection.axis == 1 and x.dim() == 2:
        cut = [v.t() for v in cut]
    total = sum(len(v) for v in cut)
    size = total // selection.heads
    return [piece for v in cut for piece in v.split(size)]
