"""Generates for self-distillation: left-padded batches that ignore the checkpoint's settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Switches off whatever a checkpoint's generation_config may add to plain decoding
_PLAIN_DECODING = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_new_tokens": 0,  # it takes precedence over min_length
}


@dataclass(frozen=True)
class Sampling:
    """How `generate_ids` chooses tokens; a `temperature` of 0 means greedy search."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    stop_ids: list[int],
    stop_string: str | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts and return the new ids of each row, the stop id included.

    The result depends on the batch and on `sampling.seed`, not on the state of torch's random
    generators, which is restored. `stop_string` ends a row without removing what follows in it.
    """
    length = max(len(ids) for ids in prompts)
    pad_id = _pad_id(model, tokenizer, stop_ids)
    input_ids = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    config = _decoding_config(sampling, pad_id, stop_ids, stop_string)
    was_training = model.training
    model.eval()
    try:
        with _seeded(sampling.seed, model.device):
            # The type PreTrainedModel has no generate: causal-LM classes mix it in
            output = cast(Any, model).generate(
                input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                tokenizer=tokenizer if stop_string else None,
            )
    finally:
        model.train(was_training)
    return [_up_to_stop(row, set(stop_ids)) for row in output[:, length:].tolist()]


def _decoding_config(
    sampling: Sampling, pad_id: int, stop_ids: list[int], stop_string: str | None
) -> GenerationConfig:
    sample = sampling.temperature > 0
    return GenerationConfig(
        **_PLAIN_DECODING,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        # Greedy decoding ignores these three; Transformers' defaults keep it from warning.
        temperature=sampling.temperature if sample else 1.0,
        top_p=sampling.top_p if sample else 1.0,
        top_k=0 if sample else 50,
        pad_token_id=pad_id,
        eos_token_id=stop_ids or None,
        stop_strings=stop_string,
    )


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> int:
    """Return a token id to pad with. Any id does: the attention mask hides it."""
    for candidate in (model.generation_config.pad_token_id, tokenizer.pad_token_id, *stop_ids):
        if candidate is not None:
            return int(candidate)
    return 0


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and restore its random state after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def derived_seed(seed: int, *parts: object) -> int:
    """Return a seed that depends on `seed` and `parts` alone (no process, no order of calls)."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds


def _up_to_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: stop + 1]
