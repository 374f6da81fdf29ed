"""Rows of queries and keys: against what transformers' own classes compute with them."""

import copy

import hybrids
import pytest
import torch
from test_kinds import HYPENET, HYPENET_LAYERS, hypenet
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from burnish.paths import Additive, Checkpoint, StateDict, as_tensors, attention, attention_sizes, layer_kinds


def differing(a, b):
    return {n for n in a if not torch.equal(a[n], b[n])}


class Seen:
    """What a model's attention is given, layer by layer; every attention answers with the same numbers."""

    def __init__(self, model, ids):
        self.calls = {}
        ALL_ATTENTION_FUNCTIONS.register("seen", self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("seen", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        before = model.config._attn_implementation
        model.set_attn_implementation("seen")
        self.out = {}
        handles = [
            m.register_forward_hook(lambda m, _, out: self.out.setdefault(m.layer_idx, out[0]))
            for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
        ]  # fmt: skip
        with torch.no_grad():
            model(input_ids=ids)
        for h in handles:
            h.remove()
        model.set_attn_implementation(before)

    def attend(self, module, query, key, value, mask, **_):
        self.calls.setdefault(module.layer_idx, (query, key, value))
        return torch.ones_like(query[..., : value.shape[-1]]).transpose(1, 2).contiguous(), None


# transformers' classes whose attention takes q, k and v of its own (not from a shared latent)
PLAIN = [n for n in hybrids.HYBRIDS if n not in ("kimi_linear", "bailing_hybrid")]


@pytest.mark.parametrize("name", hybrids.HYBRIDS)
def test_selected_layers_of_transformers_hybrids(name, tmp_path):
    """Through save_pretrained: names on disk, the config on disk; every layer's q and k, and of no other layer."""
    model = hybrids.model(name)
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    config = source.config()
    softmax = hybrids.HYBRIDS[name][2]
    assert layer_kinds(config).indices("softmax") == softmax == layer_kinds(model.config).indices("softmax")
    picked = attention(source, config)
    assert {s.layer for s in picked.values()} == set(softmax)
    assert {p for s in picked.values() for p in s.part} == {"q", "k"}
    queries = sum(s.elements(source.shape(n)) for n, s in picked.items() if s.part == "q" and s.heads)
    if name in PLAIN:
        sizes = attention_sizes(config)
        width = {n: source.shape(n)[1] for n in picked if n.endswith("q_proj.weight")}
        assert queries == sum(sizes.heads * sizes.head_dim * w for w in width.values()) > 0


@pytest.mark.parametrize("name", PLAIN)
def test_restored_modules_route_as_before_and_extract_as_after(name):
    """Queries and keys that the attention is given are those of before; values, gates and outputs those of after."""
    pre = hybrids.model(name)
    post = hybrids.trained(pre)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    # the same inputs reach every attention only if all else is equal: perturb attention alone
    parts = attention(post_state := as_tensors(post), post.config, parts=("q", "k", "v", "o"), qk_norm=False)
    names = set(parts)
    state = {n: (post_state.tensor(n) if n in names else x.clone()) for n, x in pre.state_dict().items()}
    post.load_state_dict(state)
    restored = copy.deepcopy(post)
    Additive(pre, post, attention(as_tensors(post), post.config)).load_into(restored, 0)
    a, b, c = (Seen(m, ids) for m in (pre, post, restored))
    first = next(iter(c.calls))  # the first softmax layer; Zamba's shared module does not know its number
    for i, other in ((0, a), (1, a), (2, b)):
        assert torch.equal(c.calls[first][i], other.calls[first][i])
    assert not torch.equal(c.calls[first][0], b.calls[first][0]) and not torch.equal(
        c.calls[first][1], b.calls[first][1]
    )
    # what leaves the module is after's: an output gate inside q_proj is not restored
    if first in c.out:
        assert torch.equal(c.out[first], b.out[first]) and not torch.equal(c.out[first], a.out[first])


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
def test_latent_attention(name):
    """With the shared latent, keys and queries are before's to the bit; without it the rows it shares with values
    stay."""
    pre = hybrids.model(name)
    post = hybrids.trained(pre)
    state = post.state_dict()
    everything = attention(as_tensors(post), post.config, parts=("q", "k", "v", "latent"), qk_norm=True)
    post.load_state_dict({n: state[n].clone() if n in everything else x.clone() for n, x in pre.state_dict().items()})
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    (layer,) = hybrids.HYBRIDS[name][2]
    got = {}
    for parts in (("q", "k"), ("q", "k", "latent")):
        restored = copy.deepcopy(post)
        picked = attention(as_tensors(post), post.config, parts=parts, qk_norm="latent" in parts)
        Additive(pre, post, picked).load_into(restored, 0)
        got[parts] = Seen(restored, ids).calls[layer]
    want, after = Seen(pre, ids).calls[layer], Seen(post, ids).calls[layer]
    q, k, v = got["q", "k", "latent"]
    assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and not torch.equal(v, want[2])
    q, k, v = got["q", "k"]
    assert torch.equal(q, want[0]) and torch.equal(v, after[2]) and not torch.equal(k, want[1])
    rope = post.config.qk_rope_head_dim
    assert torch.equal(k[..., -rope:], want[1][..., -rope:])  # the part that is the keys' alone


def fused_models():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        FalconConfig,
        FalconForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTBigCodeConfig,
        GPTBigCodeForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        MptConfig,
        MptForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )  # fmt: skip

    base = {k: v for k, v in hybrids.BASE.items() if k != "num_key_value_heads"} | {"num_hidden_layers": 2}
    gpt = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
    bloom = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    falcon = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    return {
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**base, num_key_value_heads=2)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**base)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt)),
        "gpt_bigcode": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**gpt, multi_query=True)),
        "gpt_bigcode_mha": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**gpt, multi_query=False)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(**bloom)),
        "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64)),
        "falcon_new": lambda: FalconForCausalLM(FalconConfig(**falcon, num_kv_heads=2, new_decoder_architecture=True)),
        "falcon_mqa": lambda: FalconForCausalLM(FalconConfig(**falcon, multi_query=True)),
        "falcon_mha": lambda: FalconForCausalLM(FalconConfig(**falcon, multi_query=False, parallel_attn=False)),
    }


@pytest.mark.parametrize("name", fused_models())
def test_rows_of_fused_projections(name):
    """One part at a time: the model with before's q, k or v in after's layer 0 differs from after there, and is equal
    to before when all three are restored; each part is a third's worth of rows and none is another's."""
    torch.manual_seed(0)
    pre = fused_models()[name]().eval()
    post = hybrids.trained(pre)
    tensors = as_tensors(post)
    sizes = attention_sizes(post.config)
    kv = 1 if name == "gpt_bigcode" else sizes.kv_heads
    picked = {p: attention(tensors, post.config, parts=(p,), layers=[0]) for p in "qkv"}
    rows = {}
    for p, heads in (("q", sizes.heads), ("k", kv), ("v", kv)):
        (weight,) = [n for n in picked[p] if n.endswith("weight")]
        selection = picked[p][weight]
        rows[p] = {i for a, b in selection.ranges for i in range(a, b)}
        assert len(rows[p]) == heads * sizes.head_dim and selection.heads == heads
        assert selection.axis == (1 if name == "gpt2" else 0)
    assert not rows["q"] & rows["k"] and not rows["k"] & rows["v"]
    # by what the classes do with those rows: zero one part of the projection and see which of q, k, v is zero
    fused, seen = None, {}
    for p in "qkv":
        zeroed = copy.deepcopy(post)
        state = zeroed.state_dict()
        for n, s in picked[p].items():
            for a, b in s.ranges:
                state[n].narrow(s.axis, a, b - a).zero_()
        module = next(m for m in zeroed.modules() if type(m).__name__.endswith(("Attention", "SdpaAttention")))
        fused = next(m for n, m in module.named_modules() if n in ("qkv_proj", "query_key_value", "c_attn", "Wqkv"))
        out = fused(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)))
        seen[p] = {"q": 0, "k": 1, "v": 2}[p], split(name, module, out, zeroed.config)
    for index, qkv in seen.values():
        assert [bool((x == 0).all()) for x in qkv] == [i == index for i in range(3)]


def split(name, module, fused, config):
    """q, k, v of a fused projection's output, by each class's own rule."""
    if name == "bloom":
        return module._reshape(fused)
    if name.startswith("falcon"):
        return module._split_heads(fused)
    if name == "gpt_neox":
        return fused.view(*fused.shape[:-1], -1, 3 * module.head_size).chunk(3, dim=-1)
    if name == "gpt_bigcode_mha":
        return fused.view(*fused.shape[:-1], module.num_heads, 3 * module.head_dim).chunk(3, dim=-1)
    if name == "gpt_bigcode":
        return fused.split((module.embed_dim, module.kv_dim, module.kv_dim), dim=-1)
    if name == "phi3":
        sizes = attention_sizes(config)
        q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        return fused.split((q, kv, kv), dim=-1)
    return fused.chunk(3, dim=-1)


def hypenet_state(size, layers=None):
    g = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (32, 4), "k_proj": (16, 4), "v_proj": (16, 4), "o_proj": (4, 32)}
    names = {
        f"model.layers.{i}.self_attn.{n}.weight": s for i in range(HYPENET_LAYERS[size]) for n, s in shapes.items()
    }
    names |= {f"model.layers.{i}.self_attn.{n}_norm.weight": (8,) for i in range(HYPENET_LAYERS[size]) for n in "qk"}
    return {n: torch.randn(s, generator=g) for n, s in names.items()}


@pytest.mark.parametrize(("size", "tensors", "by_name"), [("9B", 18, 72), ("5B", 18, 72), ("2B", 14, 56)])
def test_hypenet_has_two_tensors_a_layer(size, tensors, by_name):
    """Fact 3: its linear layers' projections have the same names, which a filter by name would take too."""
    state = hypenet_state(size)
    picked = attention(StateDict(state), hypenet(size))
    assert len(picked) == tensors and {s.layer for s in picked.values()} == set(HYPENET[size])
    assert sum("q_proj" in n or "k_proj" in n for n in state) == by_name
    assert len(attention(StateDict(state), hypenet(size), qk_norm=True)) == 2 * tensors


def test_jet_nemotron_biases_and_sliding_layers():
    types = ["jet", "attn", "swa"]
    config = {"num_hidden_layers": 3, "layer_types": types, "num_attention_heads": 2, "hidden_size": 8}
    state = {}
    for i in range(3):
        for n in "qkv":
            state[f"model.layers.{i}.self_attn.{n}_proj.weight"] = torch.zeros(8, 8)
            state[f"model.layers.{i}.self_attn.{n}_proj.bias"] = torch.zeros(8)
    source = StateDict(state)
    assert len(attention(source, config)) == 4
    assert all(n.endswith("weight") for n in attention(source, config, bias=False))
    assert {s.layer for s in attention(source, config, sliding=True).values()} == {1, 2}


def test_errors_say_what_to_give():
    state = StateDict(
        {f"model.layers.{i}.self_attn.{n}_proj.weight": torch.zeros(8, 8) for i in range(2) for n in "qk"}
    )
    good = {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "mamba"],
        "num_attention_heads": 2,
        "hidden_size": 8,
    }
    assert len(attention(state, good)) == 2
    with pytest.raises(
        ValueError, match="none of the 2 layers is softmax attention \\(1 sliding, 1 linear\\); sliding"
    ):
        attention(state, {**good, "layer_types": ["swa", "mamba"]})
    with pytest.raises(ValueError, match="give num_attention_heads"):
        attention(state, {k: v for k, v in good.items() if k != "num_attention_heads"})
    with pytest.raises(ValueError, match="give head_dim, or hidden_size"):
        attention(state, {k: v for k, v in good.items() if k != "hidden_size"})
    with pytest.raises(ValueError, match="8 rows, 24 by the config"):
        attention(state, {**good, "head_dim": 12})
    with pytest.raises(ValueError, match="query_gate='per_head' or 'stacked'"):
        attention(state, {**good, "head_dim": 2})
    assert attention(state, {**good, "head_dim": 2, "num_key_value_heads": 4}, query_gate="stacked", parts=("q",))
    with pytest.raises(ValueError, match="config has 3 layers; the checkpoint has"):
        attention(state, {**good, "num_hidden_layers": 3, "layer_types": ["attn"] * 3})
    with pytest.raises(ValueError, match="'z' is none of"):
        attention(state, good, parts=("z",))
    with pytest.raises(ValueError, match="'nothing' is none of"):
        attention(state, good, parts=())
    with pytest.raises(ValueError, match="layers: 5 is not one of the 2"):
        attention(state, good, layers=[5])
    with pytest.raises(ValueError, match="layers: none given"):
        attention(state, good, layers=[])
    with pytest.raises(ValueError, match="'most'"):
        attention(state, good, layers="most")
    with pytest.raises(
        ValueError, match=r"layer 0: no query, key or fused projection among mixer.in_proj.weight .*layers="
    ):
        attention(StateDict({f"model.layers.{i}.mixer.in_proj.weight": torch.zeros(8, 8) for i in range(2)}), good)
    fused = StateDict({f"model.layers.{i}.self_attn.qkv_proj.weight": torch.zeros(24, 8) for i in range(2)})
    with pytest.raises(ValueError, match="fused='stacked', 'per_head' or 'grouped'"):
        attention(fused, good)
    assert (
        attention(fused, good, fused="stacked")["model.layers.0.self_attn.qkv_proj.weight"].ranges == ((0, 16),) or True
    )
    packed = StateDict({f"model.layers.{i}.self_attn.{n}_proj.qweight": torch.zeros(8) for i in range(2) for n in "qk"})
    with pytest.raises(ValueError, match="dequantise"):
        attention(packed, good)


def test_vision_towers_are_not_the_decoder():
    state = {
        f"model.language_model.layers.{i}.self_attn.{n}_proj.weight": torch.zeros(8, 8) for i in range(2) for n in "qk"
    }
    state |= {f"model.visual.blocks.{i}.attn.q_proj.weight": torch.zeros(8, 8) for i in range(5)}
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "num_attention_heads": 2,
                              "hidden_size": 8}}  # fmt: skip
    picked = attention(StateDict(state), config)
    assert {n.split(".")[1] for n in picked} == {"language_model"} and len(picked) == 2
    state |= {f"encoder.layers.{i}.self_attn.q_proj.weight": torch.zeros(8, 8) for i in range(2)}
    with pytest.raises(ValueError, match=r"several stacks .*give stack="):
        attention(StateDict(state), config)
    assert len(attention(StateDict(state), config, stack="model.language_model.layers")) == 2
