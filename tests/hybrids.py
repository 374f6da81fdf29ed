"""transformers' own hybrid classes at a size that a test can make."""

from __future__ import annotations

import torch

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip

#: name -> (classes' prefix, config arguments, softmax layers)
HYBRIDS = {
    "qwen3_next": ("Qwen3Next", {
        "num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }, [3]),
    "qwen3_5": ("Qwen3_5", {
        "num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    }, [1, 3]),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "shared_intermediate_size": 16, "position_embedding_type": "nope", **MAMBA2,
    }, [1]),
    "jamba": ("Jamba", {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    }, [1, 3]),
    "bamba": ("Bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1], **MAMBA2}, [1]),
    "nemotron_h": ("NemotronH", {
        "layer_types": ["linear_attention", "mlp", "full_attention", "moe"], "head_dim": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "n_group": 1,
        "topk_group": 1,
    }, [2]),
    "lfm2": ("Lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}, [1]),
    "minimax": ("MiniMax", {
        "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8,
    }, [0, 2]),
    "olmo_hybrid": ("OlmoHybrid", {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }, [1]),
    "zamba2": ("Zamba2", {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1,
        "mamba_d_state": 8, "n_mamba_heads": 4, "num_key_value_heads": 4, "chunk_size": 8,
        "use_shared_attention_adapter": True, "adapter_rank": 2,
    }, [1, 3]),
    "zamba": ("Zamba", {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 4,
        "mamba_dt_rank": 4, "n_mamba_heads": 2, "num_key_value_heads": 4,
    }, [1, 3]),
    "kimi_linear": ("KimiLinear", {
        "num_hidden_layers": 4, "head_dim": 12, "linear_attn_config": {
            "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 8, "num_heads": 4,
            "short_conv_kernel_size": 4,
        }, "first_k_dense_replace": 4, **LATENT,
    }, [3]),
    "bailing_hybrid": ("BailingHybrid", {
        "num_hidden_layers": 3, "head_dim": 8, "layer_group_size": 3, "first_k_dense_replace": 3,
        "moe_intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, **LATENT,
    }, [2]),
}  # fmt: skip


def config(name: str):
    import transformers

    prefix, own, _ = HYBRIDS[name]
    suffix = "TextConfig" if name == "qwen3_5" else "Config"
    return getattr(transformers, prefix + suffix)(**{**BASE, **own})


def model(name: str, seed: int = 0):
    """A tiny model with weights that are all different from initialisation's zeros and ones."""
    import transformers

    torch.manual_seed(seed)
    made = getattr(transformers, HYBRIDS[name][0] + "ForCausalLM")(config(name))
    return made.eval()


def trained(before, seed: int = 1, scale: float = 0.1):
    """A copy with every parameter moved, as after fine-tuning."""
    import copy

    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in after.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return after
