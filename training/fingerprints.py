"""Hashes that tell whether two runs used the same model, tokenizer or prompts."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return a cheap hash of a model: names, shapes, dtypes and first 16 values of its parameters.

    It tells checkpoints apart, and a merged or trained model from its base. It is no checksum of
    the weights: a change that spares the start of every parameter goes unnoticed.

    Args:
        model: the model.
        dtype: take the parameters that are of the model's dtype as if they were of this one.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        is_cast = dtype is not None and parameter.dtype == model.dtype
        shown = dtype if is_cast else parameter.dtype
        digest.update(f"{name} {tuple(parameter.shape)} {shown}\n".encode())
        if not parameter.is_meta:
            first = parameter.detach().reshape(-1)[:16].to(shown).cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_model_of(model: PreTrainedModel, fingerprint: str, dtype: torch.dtype) -> bool | None:
    """Return whether a fingerprint, taken in `dtype`, is that of `model`; None if it can't be known.

    It can't if the model is quantized, or loaded in a dtype that does not hold all numbers of the
    other and the rest does not settle it.
    """
    if getattr(model, "is_quantized", False):
        return None
    if model_fingerprint(model, dtype) == fingerprint:
        return True
    is_exact = torch.promote_types(model.dtype, dtype) == model.dtype
    return False if is_exact else None


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, special tokens and chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_sha256([sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template])


def json_sha256(value: object) -> str:
    """Return the hash of a value's JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
