"""Which tensors, and which of their rows, a path moves: plain dicts from a tensor's name to its ``Selection``.

Layers are chosen by the model's config (``kinds.py``).  Within a chosen layer the attention's own projections are
told apart by what they are called and by their shape; where a projection holds more than one part (fused q, k, v; a
query with its output gate; latent attention) rows are selected, not tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .kinds import LINEAR, NONE, SLIDING, SOFTMAX, as_config, layer_count, layer_kinds
from .layers import find_stack
from .tensors import Tensors

#: Parts of attention: projections, their norms, and the latent that keys and values share in latent attention.
PARTS = ("q", "k", "v", "o", "latent")

_PLAIN = {
    "q": ("q_proj", "query", "query_proj", "wq", "Wq", "q_lin", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "key", "key_proj", "wk", "Wk", "k_lin"),
    "v": ("v_proj", "value", "value_proj", "wv", "Wv", "v_lin"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "out_lin"),
}
_ROLE = {name: role for role, names in _PLAIN.items() for name in names}
_NORM_NAMES = {
    "q": ("q_norm", "q_layernorm", "query_norm", "query_layernorm", "q_ln", "q_a_layernorm", "q_a_norm"),
    "k": ("k_norm", "k_layernorm", "key_norm", "key_layernorm", "k_ln"),
    "latent": ("kv_a_layernorm", "kv_a_norm"),
}
_NORMS = {name: role for role, names in _NORM_NAMES.items() for name in names}
#: Zamba2's per-use adapters of a shared projection are part of that projection's map.
_ADAPTERS = {"linear_q_adapter_list": "q", "linear_k_adapter_list": "k", "linear_v_adapter_list": "v"}
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "c_attn", "W_pack", "qkv")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")

#: Order of the rows of a fused projection by ``model_type``: "stacked" q, k, v one after another; "per_head" q, k, v of
#: a head, then the next; "grouped" the queries of a kv group, its k, its v, then the next group.
FUSED_LAYOUTS = {
    **dict.fromkeys(("phi3", "gpt2", "mpt", "dbrx", "baichuan", "chatglm", "qwen"), "stacked"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "minimax"), "per_head"),
    **dict.fromkeys(("falcon", "internlm2"), "grouped"),
}
#: A query projection of twice the rows, by ``model_type``: each head's query, then its output gate ("per_head").
_GATED = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text")
QUERY_GATES = dict.fromkeys(_GATED, "per_head")


@dataclass(frozen=True)
class Selection:
    """What of a tensor is selected.

    ranges: half-open ranges along ``axis``; None is the whole tensor.
    axis: 0, or 1 for weights stored (in, out).
    part: the part of attention it is, where it is one.
    layer: the decoder layer it is of.
    heads: heads the selected rows are of, in order; 0 where they are not cut by heads.
    """

    ranges: tuple[tuple[int, int], ...] | None = None
    axis: int = 0
    part: str = ""
    layer: int | None = None
    heads: int = 0

    def elements(self, shape: Collection[int]) -> int:
        """Number of elements selected of a tensor of this shape."""
        total = 1
        for size in shape:
            total *= size
        if self.ranges is None:
            return total
        return total // tuple(shape)[self.axis] * sum(b - a for a, b in self.ranges)


Selector = Mapping[str, Selection]


def everything(tensors: Tensors) -> dict[str, Selection]:
    """Every tensor whole."""
    return {name: Selection() for name in tensors}


def whole_layers(tensors: Tensors, config, layers: Iterable[int], stack: str | None = None) -> dict[str, Selection]:
    """Every tensor of these decoder layers.  ValueError for a layer that the checkpoint lacks."""
    found = find_stack(tensors, layer_count(config), stack)
    wanted, out = set(layers), {}
    for name in tensors:
        layer = None if found is None else found.layer(name)
        if layer in wanted:
            out[name] = Selection(layer=layer)
    missing = wanted - {s.layer for s in out.values()}
    if missing:
        raise ValueError(f"layers: the checkpoint has no layer {min(missing)}")
    return out


@dataclass(frozen=True)
class Attention:
    """The attention's sizes, from a config.  ``latent`` holds latent attention's, where the config has them."""

    heads: int
    kv_heads: int
    head_dim: int
    latent: Mapping[str, int] | None = None


def attention_sizes(config, layer: int = 0) -> Attention:
    """Heads, kv heads and head size.  ValueError naming the field that is missing."""
    fields = as_config(config)

    def read(*names: str) -> int | None:
        for name in names:
            value = fields.get(name)
            if isinstance(value, (list, tuple)):
                value = value[layer]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    heads = read("num_attention_heads", "n_head", "n_heads", "num_heads")
    if not heads:
        raise ValueError("config: no number of attention heads: give num_attention_heads")
    kv_heads = read("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    if fields.get("model_type") == "falcon" and not fields.get("new_decoder_architecture"):
        kv_heads = 1 if fields.get("multi_query", True) else heads
    head_dim = read("head_dim", "attention_head_dim", "kv_channels")
    if head_dim is None:
        hidden = read("hidden_size", "n_embd", "d_model")
        if hidden is None:
            raise ValueError("config: no size of a head: give head_dim, or hidden_size")
        head_dim = hidden // heads
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    latent = {n: fields[n] for n in names} if all(isinstance(fields.get(n), int) for n in names) else None
    return Attention(heads, kv_heads or heads, head_dim, latent)


def attention(
    tensors: Tensors, config, *, parts: Collection[str] = ("q", "k"), layers: str | Iterable[int] | None = None,
    bias: bool = True, qk_norm: bool = False, sliding: bool = False, kinds: Mapping[str, str] | None = None,
    fused: str | None = None, query_gate: str | None = None, stack: str | None = None,
) -> dict[str, Selection]:  # fmt: skip
    """Parts of the attention of some layers; by default the queries and keys of the softmax layers.

    Args:
        tensors: of the checkpoint; only names and shapes are read.
        config: its config, a dict or transformers' object.
        parts: of "q", "k", "v", "o" and "latent" (the rows that keys and values share in latent attention, which "k"
            alone leaves).
        layers: indices, or "all"; by default those that the config calls softmax.
        bias: with the projections' biases, where there are any.
        qk_norm: with the norms of the parts selected.
        sliding: with the layers of sliding-window attention.
        kinds: layer types that ``layer_kinds`` does not know.
        fused: order of the rows of a fused projection (``FUSED_LAYOUTS``), where the ``model_type`` is not known.
        query_gate: "per_head" or "stacked": where the gates are in a query projection of twice the rows.
        stack: prefix of the decoder's layers, where the checkpoint has several stacks of as many.

    Layers that share one module (Zamba) have its tensors once, at the first of them, as they are saved.

    ValueError where there is no such layer, where a layer has no projection known, or where shapes are not what the
    config says; the message says which field or argument to give.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ValueError(f"parts: {unknown[0] if unknown else 'nothing'!r} is none of {', '.join(PARTS)}")
    chosen, shared = _layers(config, layers, sliding, kinds)
    found = find_stack(tensors, layer_count(config), stack)
    inside: dict[int, dict[str, str]] = {i: {} for i in chosen}
    for name in tensors:
        split = found.split(name) if found is not None else None
        if split and split[0] in inside:
            inside[split[0]][split[1]] = name
    out: dict[str, Selection] = {}
    empty = []
    for layer, rests in inside.items():
        roles = _roles(rests)
        if not roles:
            empty.append(layer)
            continue
        sizes = attention_sizes(config, layer)
        for rest, (role, leaf) in roles.items():
            name = rests[rest]
            if leaf == "bias" and not bias:
                continue
            cut = _cut(name, role, tensors.shape(name), sizes, as_config(config), fused, query_gate)
            for part, selection in cut.items():
                if part.removesuffix("_norm") in parts and (qk_norm or not part.endswith("_norm")):
                    known = out.get(name)
                    ranges = selection.ranges
                    if known is not None and known.ranges is not None and ranges is not None:
                        ranges = tuple(sorted((*known.ranges, *ranges)))
                        part = known.part + part
                        selection = Selection(ranges, selection.axis)
                    out[name] = Selection(ranges, selection.axis, part, layer, selection.heads)
    if empty and (not out or not shared):
        there = ", ".join(sorted(inside[empty[0]])[:8]) or "nothing"
        raise ValueError(
            f"layer {empty[0]}: no query, key or fused projection among {there}"
            f" (known: {', '.join((*_PLAIN['q'], *_PLAIN['k'], *_FUSED, *_LATENT))}); give the layers with layers="
        )
    return out


def _layers(config, layers, sliding, kinds) -> tuple[list[int], bool]:
    """(layers chosen, whether layers may share a module)."""
    fields = as_config(config)
    shared = str(fields.get("model_type", "")).startswith("zamba")
    if layers is None or layers == "softmax":
        found = layer_kinds(config, kinds)
        chosen = found.indices(SOFTMAX, SLIDING) if sliding else found.indices(SOFTMAX)
        if not chosen:
            others = {k: len(found.indices(k)) for k in (SLIDING, LINEAR, NONE)}
            hint = "; sliding-window layers are left out unless sliding=True" if others[SLIDING] else ""
            raise ValueError(
                f"config: by {found.field} none of the {len(found.kinds)} layers is softmax attention "
                f"({', '.join(f'{n} {k}' for k, n in others.items() if n)}){hint}"
            )
        return chosen, shared
    count = layer_count(config)
    if layers == "all":
        if count is None:
            raise ValueError("config: no number of layers: give num_hidden_layers")
        return list(range(count)), shared
    if isinstance(layers, str):
        raise ValueError(f"layers: indices, 'softmax' or 'all'; got {layers!r}")
    chosen = sorted(set(layers))
    if not chosen:
        raise ValueError("layers: none given")
    for i in chosen:
        if not isinstance(i, int) or i < 0 or (count is not None and i >= count):
            raise ValueError(f"layers: {i!r} is not one of the {count} layers")
    return chosen, shared


def _roles(rests: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """name within the layer -> (part, "fused", a latent projection, or PART_norm; its leaf)."""
    pieces = {rest: rest.split(".") for rest in rests}
    parents = {
        tuple(p[:-2])
        for p in pieces.values()
        if len(p) >= 2 and (_ROLE.get(p[-2]) in ("q", "k") or p[-2] in _FUSED or p[-2] in _LATENT)
    }
    if not parents:
        return {}
    depth = min(map(len, parents))
    parents = {p for p in parents if len(p) == depth}
    if len(parents) > 1:
        named = ", ".join(".".join(p) for p in sorted(parents))
        raise ValueError(f"a layer has several modules with queries and keys: {named}; select among them by hand")
    (parent,) = parents
    out = {}
    for rest, p in pieces.items():
        if tuple(p[:depth]) != parent or len(p) < depth + 2:
            continue
        module, leaf = p[depth], p[-1]
        if leaf not in ("weight", "bias"):
            if module in _ROLE or module in _FUSED or module in _LATENT:
                raise ValueError(f"{rests[rest]}: a quantised projection: dequantise the checkpoint first")
            continue
        if len(p) == depth + 2:
            if module in _FUSED:
                out[rest] = ("fused", leaf)
            elif module in _LATENT:
                out[rest] = (module, leaf)
            elif module in _ROLE:
                out[rest] = (_ROLE[module], leaf)
            elif module in _NORMS:
                out[rest] = (f"{_NORMS[module]}_norm", leaf)
        elif module in _ADAPTERS:
            out[rest] = (f"{_ADAPTERS[module]}_adapter", leaf)
    return out


def _cut(
    name: str, role: str, shape: tuple[int, ...], sizes: Attention, fields: Mapping[str, Any], fused: str | None,
    query_gate: str | None,
) -> dict[str, Selection]:  # fmt: skip
    """part -> its selection, for one tensor."""
    latent = sizes.latent
    h, kv, d = sizes.heads, sizes.kv_heads, sizes.head_dim
    kind = str(fields.get("model_type", ""))
    if role.endswith("_adapter"):
        return {role.removesuffix("_adapter"): Selection()}
    if role in _LATENT:
        if latent is None:
            need = "kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim"
            raise ValueError(f"{name}: latent attention: the config must have {need}")
        nope, value, rank = latent["qk_nope_head_dim"], latent["v_head_dim"], latent["kv_lora_rank"]
        if role == "kv_a_proj_with_mqa":
            _check(name, shape, rank + latent["qk_rope_head_dim"])
            return {"latent": Selection(((0, rank),)), "k": Selection(((rank, shape[0]),))}
        _check(name, shape, h * (nope + value))
        step = nope + value
        return {
            "k": Selection(tuple((i * step, i * step + nope) for i in range(h)), heads=h),
            "v": Selection(tuple((i * step + nope, (i + 1) * step) for i in range(h)), heads=h),
        }
    if role == "fused":
        layout = fused or FUSED_LAYOUTS.get(kind)
        if kind == "gpt_bigcode":
            layout = fused or ("stacked" if fields.get("multi_query", True) else "per_head")
            kv = 1 if fields.get("multi_query", True) else h
        if layout not in ("stacked", "per_head", "grouped"):
            raise ValueError(
                f"{name}: a fused projection of model_type {kind!r}: say how its rows are ordered with fused="
                f"'stacked', 'per_head' or 'grouped'" + (f"; got {layout!r}" if layout else "")
            )
        if layout == "per_head" and 3 * h * d in shape:
            kv = h  # a linear layer's projection beside softmax layers with fewer kv heads (MiniMax)
        rows = (h + 2 * kv) * d
        axis = 1 if len(shape) == 2 and shape[0] != rows and shape[1] == rows else 0
        _check(name, shape[axis:], rows)
        cuts = _fused(layout, h, kv, d)
        return {p: Selection(r, axis, heads=h if p == "q" else kv) for p, r in cuts.items()}
    if role == "q" and latent is None:
        if shape[0] == 2 * h * d:
            gate = query_gate or QUERY_GATES.get(kind)
            if gate not in ("per_head", "stacked"):
                raise ValueError(
                    f"{name}: {shape[0]} rows, twice {h} heads of {d}: half of them may be an output gate; say where "
                    f"with query_gate='per_head' or 'stacked'" + (f"; got {gate!r}" if gate else "")
                )
            if gate == "stacked":
                return {"q": Selection(((0, h * d),), heads=h)}
            return {"q": Selection(tuple((2 * i * d, (2 * i + 1) * d) for i in range(h)), heads=h)}
        _check(name, shape, h * d)
        return {"q": Selection(heads=h)}
    if role == "k" and latent is None:
        _check(name, shape, kv * d)
        return {"k": Selection(heads=kv)}
    return {role: Selection()}


def _check(name: str, shape: Collection[int], rows: int) -> None:
    got = next(iter(shape), 0)
    if got != rows:
        raise ValueError(
            f"{name}: {got} rows, {rows} by the config's heads and head size: correct num_attention_heads, "
            f"num_key_value_heads or head_dim"
        )


def _fused(layout: str, h: int, kv: int, d: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Rows of q, k, v in a fused projection of h query heads and kv key heads of size d."""
    if layout == "stacked":
        ends = (0, h * d, (h + kv) * d, (h + 2 * kv) * d)
        return {p: ((ends[i], ends[i + 1]),) for i, p in enumerate("qkv")}
    if layout == "per_head" and h != kv:
        raise ValueError(f"fused='per_head' needs as many kv heads as heads; the config has {kv} of {h}: 'grouped'?")
    group = h // kv
    step = (group + 2) * d
    starts = range(0, kv * step, step)
    return {
        "q": tuple((s, s + group * d) for s in starts),
        "k": tuple((s + group * d, s + (group + 1) * d) for s in starts),
        "v": tuple((s + (group + 1) * d, s + step) for s in starts),
    }
