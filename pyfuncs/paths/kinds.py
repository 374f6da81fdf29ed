"""What each layer of a model mixes tokens with, read from its config's fields and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOFTMAX, SLIDING, LINEAR, NONE = "softmax", "sliding", "linear", "none"

#: Layers' types as configs write them, by kind.  "hybrid" layers (Zamba, Falcon-H1) hold softmax attention and a state.
_WORDS = {
    SOFTMAX: "full_attention attention attn softmax global global_attention hybrid *",
    SLIDING: "sliding_attention swa sliding local local_attention chunked_attention hybrid_sliding",
    LINEAR: "linear_attention lightning-attn lightning_attention lightning linear mamba mamba2 jet gdn gated_deltanet "
    "deltanet kda gla rwkv retention recurrent conv M",
    NONE: "moe mlp E -",
}
KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}

#: Fields with a layer's type for each layer, in the order they are looked for.
LISTS = ("mixer_types", "layer_types", "layers_block_type")
#: Fields with the indices of the softmax layers; every other layer is linear.
INDICES = ("attn_layer_indices", "full_attn_idxs", "full_attention_layers", "hybrid_layer_ids")
OTHERS = (
    "hybrid_override_pattern", "attn_type_list", "block_types", "linear_attn_config.full_attn_layers",
    "attn_layer_period", "full_attention_interval", "layer_group_size",
)  # fmt: skip


@dataclass(frozen=True)
class LayerKinds:
    """``kinds[i]`` is layer i's kind, ``field`` the config's field that says so."""

    kinds: tuple[str, ...]
    field: str

    def indices(self, *kinds: str) -> list[int]:
        """The layers of these kinds."""
        return [i for i, k in enumerate(self.kinds) if k in kinds]


def as_config(config) -> dict[str, Any]:
    """The text decoder's fields of a config: a dict as in ``config.json``, or transformers' object."""
    fields = dict(config) if isinstance(config, Mapping) else config.to_dict()
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(fields.get(name), Mapping):
            return {**fields, **fields[name]}
    return fields


def layer_kinds(config, kinds: Mapping[str, str] | None = None) -> LayerKinds:
    """The kind of each layer: "softmax", "sliding", "linear" or "none".

    Read from the first field that is there: a list of types (``mixer_types``, HypeNet; ``layer_types``, Jet-Nemotron,
    Qwen3-Next, Granite 4; ``layers_block_type``, Zamba), indices (``attn_layer_indices``, Bamba; ``full_attn_idxs``,
    LFM2), a pattern (``hybrid_override_pattern``, Nemotron-H), or a period (``attn_layer_period``, Jamba).

    Args:
        config: a dict as in ``config.json``, or transformers' object.
        kinds: more types, or other kinds for known ones: ``{"indexed_attention": "softmax"}``.

    ValueError where no field is there, naming those that are known, or where a type is not known.
    """
    fields = as_config(config)
    table = {**KINDS, **(kinds or {})}
    bad = sorted({str(k) for k in table.values()} - {SOFTMAX, SLIDING, LINEAR, NONE})
    if bad:
        raise ValueError(f"kinds: {bad[0]!r} is none of softmax, sliding, linear, none")
    types, field = _types(fields)
    count = fields.get("num_hidden_layers")
    if count is not None and len(types) != count:
        raise ValueError(f"config: {field} is of {len(types)} layers, num_hidden_layers of {count}")
    unknown = sorted(set(types) - table.keys())
    if unknown:
        raise ValueError(
            f"config: {field} has the layer type {unknown[0]!r}, which is not known: say what it is with "
            f"kinds={{{unknown[0]!r}: 'softmax'}} (or 'sliding', 'linear', 'none')"
        )
    return LayerKinds(tuple(table[t] for t in types), field)


def layer_count(config) -> int | None:
    """Number of decoder layers a config says it has, or None."""
    fields = as_config(config)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(fields.get(name), int):
            return fields[name]
    try:
        return len(_types(fields)[0])
    except ValueError:
        return None


def _types(fields: Mapping[str, Any]) -> tuple[list[str], str]:
    for name in LISTS:
        if fields.get(name):
            return [str(t) for t in fields[name]], name
    pattern = fields.get("hybrid_override_pattern")
    if pattern:
        return list(pattern), "hybrid_override_pattern"
    if fields.get("attn_type_list"):
        return [("linear_attention", "full_attention")[int(t)] for t in fields["attn_type_list"]], "attn_type_list"
    count = fields.get("num_hidden_layers")
    if isinstance(count, int):
        for name in INDICES:
            if fields.get(name) is not None:
                return _at(fields[name], count, name), name
        inner = fields.get("linear_attn_config")
        if isinstance(inner, Mapping) and inner.get("full_attn_layers") is not None:
            name = "linear_attn_config.full_attn_layers"  # Kimi Linear counts from one
            return _at([i - 1 for i in inner["full_attn_layers"]], count, name), name
        if fields.get("block_types"):
            # RecurrentGemma's attention is local
            repeat = ["sliding_attention" if t == "attention" else t for t in fields["block_types"]]
            return [repeat[i % len(repeat)] for i in range(count)], "block_types"
        if fields.get("attn_layer_period"):
            period, offset = fields["attn_layer_period"], fields.get("attn_layer_offset", 0)
            return _at([i for i in range(count) if i % period == offset], count, ""), "attn_layer_period"
        for name in ("full_attention_interval", "layer_group_size"):
            if fields.get(name):
                return _at([i for i in range(count) if (i + 1) % fields[name] == 0], count, name), name
    raise ValueError(
        f"config (model_type {fields.get('model_type')!r}): no field says which layers are softmax attention: give one "
        f"of {', '.join((*LISTS, *INDICES, *OTHERS))}, or layers= (a list of indices, or 'all' where every layer is)"
    )


def _at(indices: Sequence[int], count: int, field: str) -> list[str]:
    outside = [i for i in indices if not 0 <= i < count]
    if outside:
        raise ValueError(f"config: {field} names layer {outside[0]} of {count}")
    return ["full_attention" if i in set(indices) else "linear_attention" for i in range(count)]
