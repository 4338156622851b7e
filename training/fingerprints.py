"""Hashes that tell whether two runs used the same model, tokenizer or prompts."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return a cheap hash of a model: names, shapes, dtypes and first 16 values of its parameters.

    It tells checkpoints apart, and a merged or trained model from its base. It is no checksum of
    the weights: a change that spares the start of every parameter goes unnoticed.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if not parameter.is_meta:
            first = parameter.detach().reshape(-1)[:16].cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, special tokens and chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_sha256([sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template])


def json_sha256(value: object) -> str:
    """Return the hash of a value's JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
