"""Tiny random models of many architectures: what heads and generation must work on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_UNTIED = {"tie_word_embeddings": False}
# Weights larger than usual, so that the next token depends visibly on what came before
_SMALL = {**_TOKENS, "initializer_range": 0.3}
_NEOX_LIKE = {**_SMALL, "hidden_size": 32, "num_attention_heads": 4}
_BERT_LIKE = {
    **_NEOX_LIKE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
_LLAMA_LIKE = {**_BERT_LIKE, "num_key_value_heads": 2}
_DENSE = {**_LLAMA_LIKE, **_UNTIED}
_DENSE_HEADS = {**_DENSE, "head_dim": 8}  # where the default is not hidden size by heads
_MAMBA_LIKE = {**_SMALL, **_UNTIED, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_GPT2_LIKE = {**_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OPT_LIKE = {**_TOKENS, "init_std": 0.3, "num_attention_heads": 4, "max_position_embeddings": 128}

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SMALL_EXPERTS = {"moe_intermediate_size": 16}
_SHARED_EXPERT = {**_EXPERTS, **_SMALL_EXPERTS, "shared_expert_intermediate_size": 16}
_ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, **_SMALL_EXPERTS}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_DELTA_RULE = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Chunks shorter than the longer prompts
_MAMBA2_LAYER = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}

# Some bound the time step from below in a forward pass over a text but not over one cached token:
# with a bound this low the two agree, up to rounding.
_UNCLAMPED = {"time_step_min": 1e-6}

# name: (model_type, settings); many kinds of position, window, unembedding, cache and layer
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # Dense decoders with rotary positions
    "llama": ("llama", _DENSE),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "apertus": ("apertus", {**_DENSE, **_ROPE}),
    "arcee": ("arcee", _DENSE),
    "cohere": ("cohere", {**_LLAMA_LIKE, "num_key_value_heads": 4, "logit_scale": 0.5}),
    "ernie4_5": ("ernie4_5", {**_LLAMA_LIKE, "head_dim": 8}),
    # Its scaled embeddings, tied, would repeat the last token for ever under smaller weights
    "gemma": ("gemma", {**_LLAMA_LIKE, "head_dim": 8, "initializer_range": 0.6}),
    # With no end of text given, GLM's own remain: three beyond the vocabulary, so never reached
    "glm": ("glm", _DENSE_HEADS),
    "glm4": ("glm4", _DENSE_HEADS),
    "granite": ("granite", {**_DENSE, "logits_scaling": 2.0}),
    "helium": ("helium", _DENSE_HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _DENSE_HEADS),
    "nemotron": ("nemotron", _DENSE_HEADS),
    "olmo": ("olmo", _DENSE),
    "olmo2": ("olmo2", _DENSE),
    "persimmon": ("persimmon", {**_BERT_LIKE, **_UNTIED}),
    "phi": ("phi", _DENSE),
    "phi3": ("phi3", _DENSE),
    "qwen2": ("qwen2", _DENSE),
    "qwen3": ("qwen3", _DENSE_HEADS),
    "seed_oss": ("seed_oss", _DENSE_HEADS),
    "smollm3": ("smollm3", {**_LLAMA_LIKE, "no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", _DENSE),
    "starcoder2": ("starcoder2", _LLAMA_LIKE),
    # Dense decoders with other positions, or of the first GPTs' make; scaled and tied embeddings
    # would let two of them only repeat themselves
    "biogpt": ("biogpt", {**_BERT_LIKE, "scale_embedding": False}),
    "codegen": ("codegen", {**_GPT2_LIKE, **_UNTIED, "rotary_dim": 4}),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gpt_bigcode": ("gpt_bigcode", _GPT2_LIKE),
    "gpt_neox": (
        "gpt_neox",
        {**_NEOX_LIKE, "intermediate_size": 64, "num_hidden_layers": 2},
    ),
    "gptj": ("gptj", {**_GPT2_LIKE, **_UNTIED, "rotary_dim": 4}),
    "openai-gpt": ("openai-gpt", {**_GPT2_LIKE, **_UNTIED}),  # keeps no cache
    "opt": (
        "opt",
        {
            **_OPT_LIKE,
            **_UNTIED,
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
        },
    ),
    "xglm": (
        "xglm",
        {
            **_TOKENS,
            "init_std": 0.5,
            "scale_embedding": False,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    # Encoders used as decoders
    "bert": (
        "bert",
        {
            **_BERT_LIKE,
            **_UNTIED,
            "is_decoder": True,
            "intermediate_size": 128,
            "initializer_range": 0.5,
        },
    ),
    "roformer": (
        "roformer",
        {**_BERT_LIKE, **_UNTIED, "embedding_size": 32, "is_decoder": True},
    ),
    # Sliding windows, attention in chunks
    "cohere2": ("cohere2", {**_LLAMA_LIKE, **_SLIDING, "head_dim": 8, "logit_scale": 0.5}),
    "exaone4": ("exaone4", {**_DENSE, **_SLIDING}),
    "gemma2": (
        "gemma2",
        {**_DENSE_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
    "gemma3_text": (
        "gemma3_text",
        {**_DENSE_HEADS, **_SLIDING, "query_pre_attn_scalar": 8},
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_LLAMA_LIKE,
            **_SLIDING,
            "head_dim": 8,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0],
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            **_SMALL,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "window_size": 16,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            **_DENSE_HEADS,
            **_LOCAL_EXPERTS,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
            "attn_temperature_tuning": False,  # it reads cache slots, see test_support
        },
    ),
    "ministral": ("ministral", {**_DENSE_HEADS, **_SLIDING}),
    "mistral": ("mistral", {**_DENSE, "sliding_window": 16}),
    "modernbert-decoder": (
        "modernbert-decoder",
        {
            **_BERT_LIKE,
            "local_attention": 32,  # 16 on either side, were it an encoder
            "layer_types": _SLIDING["layer_types"],
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "olmo3": ("olmo3", {**_DENSE, **_SLIDING}),
    "phi3_sliding": ("phi3", {**_DENSE, "num_key_value_heads": 1, "sliding_window": 16}),
    "qwen2_sliding": (
        "qwen2",
        {**_DENSE, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "smollm3_sliding": (
        "smollm3",
        {
            **_LLAMA_LIKE,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "starcoder2_sliding": ("starcoder2", {**_LLAMA_LIKE, "sliding_window": 16}),
    # ALiBi
    "bloom": ("bloom", {**_SMALL, **_UNTIED, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {**_NEOX_LIKE, "num_hidden_layers": 2, "alibi": False}),
    "falcon_alibi": ("falcon", {**_NEOX_LIKE, "num_hidden_layers": 2, "alibi": True}),
    "mpt": (
        "mpt",
        {
            **_SMALL,
            **_UNTIED,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "expansion_ratio": 2,
            "use_cache": True,
        },
    ),
    # Experts
    "aria_text": ("aria_text", {**_DENSE, "moe_num_experts": 4, "moe_topk": 2}),
    "dbrx": (
        "dbrx",
        {
            **_SMALL,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            # It reads a base of positions and a bound that its own configuration leaves out
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    "glm4_moe": ("glm4_moe", {**_DENSE_HEADS, **_ROUTED_EXPERTS}),
    "gpt_oss": ("gpt_oss", {**_DENSE_HEADS, **_LOCAL_EXPERTS, **_SLIDING, **_ROPE}),
    "granitemoe": (
        "granitemoe",
        {
            **_DENSE,
            **_LOCAL_EXPERTS,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "mixtral": (
        "mixtral",
        {**_DENSE, "num_local_experts": 4, "sliding_window": None},
    ),
    "olmoe": ("olmoe", {**_DENSE, **_EXPERTS, "initializer_range": 0.5}),
    "phimoe": ("phimoe", {**_DENSE, **_LOCAL_EXPERTS}),
    "qwen2_moe": ("qwen2_moe", {**_DENSE, **_SHARED_EXPERT}),
    "qwen3_moe": ("qwen3_moe", {**_DENSE_HEADS, **_EXPERTS, **_SMALL_EXPERTS}),
    # Latent attention
    "deepseek_v2": (
        "deepseek_v2",
        {**_DENSE, **_LATENT_ATTENTION, **_ROUTED_EXPERTS, "first_k_dense_replace": 1},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_DENSE,
            **_LATENT_ATTENTION,
            **_ROUTED_EXPERTS,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "minicpm3": (
        "minicpm3",
        {**_LLAMA_LIKE, **_LATENT_ATTENTION, "dim_model_base": 16, "initializer_range": 0.6},
    ),
    # Linear attention, convolution and state space, alone or beside attention
    "bamba": ("bamba", {**_DENSE, **_MAMBA2_LAYER, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "falcon_h1",
        {**_DENSE_HEADS, **_MAMBA2_LAYER, "mamba_d_ssm": 64},
    ),
    "falcon_mamba": ("falcon_mamba", _MAMBA_LIKE),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_DENSE,
            **_LOCAL_EXPERTS,
            **_MAMBA2_LAYER,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 32,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_DENSE,
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
        },
    ),
    "lfm2": ("lfm2", {**_DENSE, "layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", _MAMBA_LIKE),
    "mamba2": (
        "mamba2",
        {**_MAMBA_LIKE, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    ),
    "minimax": ("minimax", _DENSE),
    "nemotron_h": (
        "nemotron_h",
        {
            **_DENSE_HEADS,
            **_ROUTED_EXPERTS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "moe_shared_expert_intermediate_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            **_UNCLAMPED,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_DENSE, **_DELTA_RULE, "linear_num_key_heads": 4}),
    "qwen3_5_text": ("qwen3_5_text", {**_DENSE_HEADS, **_DELTA_RULE}),
    "qwen3_next": ("qwen3_next", {**_DENSE_HEADS, **_DELTA_RULE, **_SHARED_EXPERT}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            **_TOKENS,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "lru_width": 32,
            "attention_window_size": 16,
            "block_types": ["recurrent", "attention"],
            # In place of an initializer range
            "w_init_variance_scale": 1.0,
            "final_w_init_variance_scale": 1.0,
        },
    ),
    "rwkv": (
        "rwkv",
        {
            **_TOKENS,  # its weights start orthogonal, whatever the initializer range
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "context_length": 128,
        },
    ),
    "xlstm": (
        "xlstm",
        {
            **_SMALL,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            # Its cache expects multiples of 64
            "qk_dim_factor": 2.0,
            "v_dim_factor": 2.0,
            "chunk_size": 16,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 2,
            "layers_block_type": ["linear_attention", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
            "chunk_size": 16,
            **_UNCLAMPED,
        },
    ),
}


# One of each mechanism, for tests that would take too long on all of them; `test_architectures` tries all
REPRESENTATIVE = (
    *("llama", "llama_tied", "mistral", "mixtral", "gemma2", "gpt2", "gpt_neo", "qwen3_next"),
    *("opt", "bloom", "mpt", "lfm2", "minimax", "mamba", "llama4_text", "deepseek_v3"),
)


def tiny_causal_lm(architecture: str, *, seed: int = 3, **overrides: Any) -> PreTrainedModel:
    """Return a random float32 model of one of `ARCHITECTURES`, in eval mode."""
    model_type, settings = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()
