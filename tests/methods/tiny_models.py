"""Models and tokenizers small enough to make in a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!+-*/=()[]{}<>#'\"\n|_&%"
CHAT = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def tokenizer(extra: str = "", chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a character; ids 0 and 1 are pad and eos."""
    vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS, *extra])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    out = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if chat:
        out.chat_template = CHAT
    return out


def llama(seed: int = 0, vocabulary: int = 128, tied: bool = False, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, initializer_range=0.2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(seed: int = 0, vocabulary: int = 128) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1,
        initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ))  # fmt: skip


def save(folder: Path, model=None, tok=None) -> str:
    (model or llama()).save_pretrained(folder)
    (tok or tokenizer()).save_pretrained(folder)
    return str(folder)


def rows(count: int = 16) -> list[dict]:
    return [{"prompt": f"{i}+{i * 3}=", "completion": str(i * 4) + "!" * (i % 3)} for i in range(1, count + 1)]


def write_rows(path: Path, records: list | None = None) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in (records or rows())))
    return str(path)


def batch(seed: int = 0, size: int = 3, length: int = 11, vocabulary: int = 128, prompt: int = 3):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (size, length), generator=g)
    labels = ids.clone()
    labels[:, :prompt] = -100
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0  # padding on the right
    labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
