"""Which layers a config says are softmax attention."""

import pytest

from burnish.paths import layer_count, layer_kinds

HYPENET = {
    "9B": [1, 2, 4, 6, 7, 10, 24, 33, 34],
    "5B": [0, 1, 7, 14, 15, 22, 24, 31, 33],
    "2B": [2, 3, 6, 8, 9, 21, 25],
}
HYPENET_LAYERS = {"9B": 36, "5B": 36, "2B": 28}


def hypenet(size):
    """A HypeNet config's fields (arXiv 2601.22156), as its released checkpoints have them."""
    count = HYPENET_LAYERS[size]
    return {
        "model_type": "hybrid", "num_hidden_layers": count, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_size": 32,
        "mixer_types": ["attn" if i in HYPENET[size] else "lightning-attn" for i in range(count)],
    }  # fmt: skip


@pytest.mark.parametrize("size", HYPENET)
def test_hypenet(size):
    found = layer_kinds(hypenet(size))
    assert found.indices("softmax") == HYPENET[size] and found.field == "mixer_types"
    assert set(found.kinds) == {"softmax", "linear"}


def test_jet_nemotron():
    types = ["attn" if i in (14, 19) else "swa" if i in (20, 21) else "jet" for i in range(28)]
    found = layer_kinds({"num_hidden_layers": 28, "layer_types": types})
    assert found.indices("softmax") == [14, 19] and found.indices("sliding") == [20, 21]


@pytest.mark.parametrize(
    ("config", "softmax"),
    [
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, [3]),
        ({"full_attention_interval": 4, "num_hidden_layers": 8}, [3, 7]),  # Qwen3-Next, as first released
        ({"layer_types": ["mamba", "attention", "mamba"]}, [1]),  # Granite 4
        ({"layers_block_type": ["mamba", "hybrid"]}, [1]),  # Zamba
        ({"attn_layer_indices": [0, 2], "num_hidden_layers": 3}, [0, 2]),  # Bamba
        ({"full_attn_idxs": [1], "num_hidden_layers": 3}, [1]),  # LFM2
        ({"attn_layer_period": 8, "attn_layer_offset": 4, "num_hidden_layers": 16}, [4, 12]),  # Jamba
        ({"hybrid_override_pattern": "M-M*E*"}, [3, 5]),  # Nemotron-H
        ({"attn_type_list": [0, 0, 1, 0]}, [2]),  # MiniMax-01
        ({"layer_group_size": 3, "num_hidden_layers": 7}, [2, 5]),  # Ling
        ({"linear_attn_config": {"full_attn_layers": [4, 8]}, "num_hidden_layers": 8}, [3, 7]),  # Kimi counts from one
        ({"block_types": ["recurrent", "recurrent", "attention"], "num_hidden_layers": 5}, []),  # RecurrentGemma
        ({"text_config": {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types": ["mamba"]}, [0]),
    ],
)  # fmt: skip
def test_fields(config, softmax):
    found = layer_kinds(config)
    assert found.indices("softmax") == softmax
    assert layer_count(config) == len(found.kinds)


def test_what_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match=r"model_type 'llama'\): no field says .*mixer_types, layer_types.*layers="):
        layer_kinds({"model_type": "llama", "num_hidden_layers": 2})
    config = {"layer_types": ["linear_attention", "indexed_attention"]}
    with pytest.raises(ValueError, match=r"kinds={'indexed_attention': 'softmax'}"):
        layer_kinds(config)
    assert layer_kinds(config, {"indexed_attention": "softmax"}).indices("softmax") == [1]
    with pytest.raises(ValueError, match="'quick' is none of"):
        layer_kinds(config, {"indexed_attention": "quick"})
    with pytest.raises(ValueError, match="layer_types is of 2 layers, num_hidden_layers of 3"):
        layer_kinds({**config, "num_hidden_layers": 3}, {"indexed_attention": "softmax"})
    with pytest.raises(ValueError, match="names layer 9 of 3"):
        layer_kinds({"attn_layer_indices": [9], "num_hidden_layers": 3})
