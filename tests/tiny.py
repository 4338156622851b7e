"""Tiny random models and a tokenizer, built in memory: what the fast tests run on."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# On matrices this small, more threads only wait for each other.
torch.set_num_threads(1)

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Write a short poem about the sea and the wind.",
    "How many legs does a spider have? A spider has eight legs.",
    "The user asks and the assistant answers, turn by turn.",
)


def tiny_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text survives encoding and decoding.

    End of turn is the end-of-text and padding token, as in many chat models; `overrides` go to
    `PreTrainedTokenizerFast` (`pad_token=None`, `chat_template=None`, ...).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    settings = {
        "bos_token": START_OF_TURN,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TURN,
        "unk_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**settings, **overrides})


def tiny_llama(vocab_size: int = 320, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return a random two-layer float32 Llama in eval mode; `overrides` go to its config.

    Its weights are larger than usual at the start of training, so that its next token depends
    visibly on what came before.
    """
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = LlamaConfig(vocab_size=vocab_size, **{**settings, **overrides})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_SMALL = {**_TOKENS, "initializer_range": 0.3}
_LLAMA_LIKE = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2_LIKE = {**_SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OPT_LIKE = {**_TOKENS, "init_std": 0.3, "num_attention_heads": 4, "max_position_embeddings": 128}
_NEOX_LIKE = {**_SMALL, "hidden_size": 32, "num_attention_heads": 4}
_UNTIED = {"tie_word_embeddings": False}

# name: (model_type, settings); many kinds of position, window, unembedding, cache and layer
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA_LIKE, **_UNTIED}),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, **_UNTIED, "head_dim": 8}),
    "mistral": ("mistral", {**_LLAMA_LIKE, **_UNTIED, "sliding_window": 16}),
    "mixtral": (
        "mixtral",
        {**_LLAMA_LIKE, **_UNTIED, "num_local_experts": 4, "sliding_window": None},
    ),
    "gemma2": (
        "gemma2",
        {
            **_LLAMA_LIKE,
            **_UNTIED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
        },
    ),
    "granite": ("granite", {**_LLAMA_LIKE, **_UNTIED, "logits_scaling": 2.0}),
    "phi": ("phi", {**_LLAMA_LIKE, **_UNTIED}),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gptj": ("gptj", {**_GPT2_LIKE, **_UNTIED, "rotary_dim": 4}),
    "gpt_neox": (
        "gpt_neox",
        {**_NEOX_LIKE, "intermediate_size": 64, "num_hidden_layers": 2},
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
    "qwen3_next": (
        "qwen3_next",
        {
            **_LLAMA_LIKE,
            **_UNTIED,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
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
    "falcon": ("falcon", {**_NEOX_LIKE, "num_hidden_layers": 2, "alibi": False}),
    "falcon_alibi": ("falcon", {**_NEOX_LIKE, "num_hidden_layers": 2, "alibi": True}),
    "bloom": ("bloom", {**_SMALL, **_UNTIED, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
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
    "lfm2": (
        "lfm2",
        {**_LLAMA_LIKE, **_UNTIED, "layer_types": ["conv", "full_attention"]},
    ),
    "minimax": ("minimax", {**_LLAMA_LIKE, **_UNTIED}),
    "mamba": (
        "mamba",
        {**_SMALL, **_UNTIED, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}


def tiny_causal_lm(architecture: str, *, seed: int = 3, **overrides: Any) -> PreTrainedModel:
    """Return a random two-layer float32 model of one of `ARCHITECTURES`, in eval mode."""
    model_type, settings = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()
