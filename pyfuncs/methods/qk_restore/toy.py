"""The demonstration's model and its two tasks.

``Hybrid`` is HypeNet's layout at 0.2M parameters: ``mixer_types`` says which layers are softmax attention (without
positions) and which decayed linear attention, and both keep their projections under ``self_attn.q_proj``.  The linear
layers have a short convolution before their projections, as those of real hybrids have: it tells a value which key
stands before it.

Recall and the chain share their key and value tokens, but what a key asks for is far away in the one and in the two
tokens before it in the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KEYS, VALUES, FILLERS, PAIRS, CHAIN = 16, 10, 16, 4, 12
ASK, START = 1, 2
KEY, VALUE, FILLER = 3, 3 + KEYS, 3 + KEYS + VALUES
VOCABULARY = FILLER + FILLERS
SOFTMAX, LINEAR = "attn", "lightning-attn"
#: Tokens of a block of the linear attention.
_BLOCK = 128


class HybridConfig(PretrainedConfig):
    """Sizes of ``Hybrid``, in HypeNet's fields."""

    model_type = "burnish_toy_hybrid"

    def __init__(self, mixer_types=(LINEAR, SOFTMAX, LINEAR, SOFTMAX), hidden_size=64, num_attention_heads=4, **more):
        self.mixer_types = list(mixer_types)
        self.num_hidden_layers = len(self.mixer_types)
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_attention_heads, hidden_size // num_attention_heads
        self.vocab_size = VOCABULARY
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": 0, **more})


def decayed(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """sum over s <= t of exp(-rate (t - s)) (q_t . k_s) v_s, in blocks.  q, k, v (B, heads, T, d), rate (heads,)."""
    rate = rate[:, None, None]
    state = torch.zeros(k.shape[-1], v.shape[-1], dtype=q.dtype)
    out = []
    for a, b, c in zip(q.split(_BLOCK, 2), k.split(_BLOCK, 2), v.split(_BLOCK, 2), strict=True):
        n = a.shape[2]
        at = torch.arange(n, dtype=q.dtype)[:, None]
        inside = torch.exp(-rate * (at - at.T).clamp_min(0)).tril()
        out.append((a @ b.transpose(2, 3) * inside) @ c + (a * torch.exp(-rate * (at + 1))) @ state)
        state = state * torch.exp(-rate * n) + (b * torch.exp(-rate * (n - 1 - at))).transpose(2, 3) @ c
    return torch.cat(out, 2)


class _Mixer(nn.Module):
    """q, k, v and o of either kind."""

    def __init__(self, config: HybridConfig, layer: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, True
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> list[Tensor]:
        return [m(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj)]


class _Softmax(_Mixer):
    def forward(self, x: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, *self.split(x), None, scaling=(x.shape[2] // self.heads) ** -0.5, dropout=0.0)
        return self.o_proj(out.flatten(2))


class _Linear(_Mixer):
    def __init__(self, config: HybridConfig, layer: int):
        super().__init__(config, layer)
        width = config.hidden_size
        self.conv = nn.Parameter(torch.randn(3, width) / 3**0.5)
        self.g_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # as sums of shifted tokens: torch's depthwise convolution is slower here
        shifted = (F.pad(x, (0, 0, n, 0))[:, : x.shape[1]] for n in range(len(self.conv)))
        x = F.silu(sum(w * s for w, s in zip(self.conv, shifted, strict=True)))
        q, k, v = self.split(x)
        rate = 2.0 ** (1 - 8 / self.heads * torch.arange(self.heads, dtype=x.dtype))
        out = decayed(F.silu(q), F.silu(k), v, rate)
        out = F.rms_norm(out, out.shape[-1:], eps=1e-6).transpose(1, 2).flatten(2)
        return self.o_proj(out * torch.sigmoid(self.g_proj(x)))


class _MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: HybridConfig, layer: int):
        super().__init__()
        self.self_attn = (_Softmax if config.mixer_types[layer] == SOFTMAX else _Linear)(config, layer)
        self.mlp = _MLP(config.hidden_size)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(config.hidden_size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Hybrid(PreTrainedModel):
    """A causal LM of decayed linear attention and softmax attention without positions."""

    config_class = HybridConfig
    _supports_sdpa = True

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        self.model.layers = nn.ModuleList(_Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation stays."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_) -> CausalLMOutput:
        """Logits (B, T, V); with labels the loss alone, over the tokens that have one."""
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        x = self.model.norm(x)
        if labels is None:
            return CausalLMOutput(logits=self.lm_head(x))
        # the answers are few: nothing else is projected
        asked = labels[:, 1:] != -100
        return CausalLMOutput(loss=F.cross_entropy(self.lm_head(x[:, :-1][asked]), labels[:, 1:][asked]))


def model(seed: int) -> Hybrid:
    """The hybrid, with random weights."""
    torch.manual_seed(seed)
    return Hybrid(HybridConfig())


def recall(batch: int, length: int, generator: torch.Generator, repeats: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids, labels): PAIRS keys with values hidden among fillers, then keys asked for; labels at the values.

    ``repeats`` questions are drawn with repetition; by default every key is asked for once.
    """
    questions = repeats or PAIRS
    body = length - 3 * questions
    rows = torch.randint(FILLER, VOCABULARY, (batch, body), generator=generator)
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :PAIRS] + KEY
    values = torch.randint(VALUE, VALUE + VALUES, (batch, PAIRS), generator=generator)
    # places two apart, so that pairs do not overlap
    places = torch.rand(batch, body // 2, generator=generator).argsort(1)[:, :PAIRS] * 2
    rows.scatter_(1, places, keys).scatter_(1, places + 1, values)
    if repeats:
        order = torch.randint(PAIRS, (batch, questions), generator=generator)
    else:
        order = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    asked = torch.stack([torch.full_like(order, ASK), keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    ids = torch.cat([rows, asked], 1)
    labels = torch.full_like(ids, -100)
    at = torch.arange(body + 2, length, 3)
    labels[:, at] = ids[:, at]
    return ids, labels


def chain(batch: int, generator: torch.Generator, *, other: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, labels): v0 k1 v1 k2 v2 ..., v_t = v_{t-1} + k_t mod 10; ``other`` spells it with fillers."""
    steps = torch.randint(0, KEYS if not other else 6, (batch, CHAIN), generator=generator)
    first = torch.randint(0, VALUES, (batch, 1), generator=generator)
    values = torch.cat([first, first + steps.cumsum(1)], 1) % VALUES
    key, value = (FILLER + VALUES, FILLER) if other else (KEY, VALUE)
    ids = torch.stack([values[:, :-1] + value, steps + key], 2).flatten(1)
    ids = torch.cat([torch.full((batch, 1), START), ids, values[:, -1:] + value], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 3::2] = ids[:, 3::2]
    return ids, labels
