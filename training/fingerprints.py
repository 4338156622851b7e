"""Hashes that identify a model, a tokenizer or JSON data across runs."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return a cheap hash of a model: name, shape, dtype and first 16 values of each parameter.

    It distinguishes checkpoints, and a merged or trained model from its base. It is not a checksum of
    the weights: it misses a change that leaves the first values of every parameter as they are.

    Args:
        model: the model.
        dtype: hash the parameters in the model's dtype as if they had this dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        is_cast = dtype is not None and parameter.dtype == model.dtype
        hash_dtype = dtype if is_cast else parameter.dtype
        digest.update(f"{name} {tuple(parameter.shape)} {hash_dtype}\n".encode())
        if not parameter.is_meta:
            values = parameter.detach().reshape(-1)[:16].to(hash_dtype).cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def matches_fingerprint(
    model: PreTrainedModel, fingerprint: str, dtype: torch.dtype
) -> bool | None:
    """Return whether a fingerprint that was taken in `dtype` belongs to `model`.

    The result is None, for unknown, if the model is quantized, or if the fingerprints differ but the
    model's dtype cannot represent all numbers of `dtype`, so that rounding may explain the difference.
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
