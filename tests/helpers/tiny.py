"""Tiny random models and a tokenizer, built in memory: what the fast tests run on."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
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
