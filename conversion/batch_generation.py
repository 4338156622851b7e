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
    pad = pad_id(model, tokenizer.pad_token_id, *stop_ids)
    input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    config = _decoding_config(sampling, pad, stop_ids, stop_string)
    was_training = model.training
    model.eval()
    try:
        with _settings_alone(model, config), _seeded(sampling.seed, model.device):
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
    sampling: Sampling, pad: int, stop_ids: list[int], stop_string: str | None
) -> GenerationConfig:
    sample = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        # Greedy decoding ignores these three; Transformers' defaults keep it from warning.
        temperature=sampling.temperature if sample else 1.0,
        top_p=sampling.top_p if sample else 1.0,
        top_k=0 if sample else 50,
        pad_token_id=pad,
        eos_token_id=stop_ids or None,
        stop_strings=stop_string,
    )


def pad_id(model: PreTrainedModel, *candidates: int | None) -> int:
    """Return an id to pad with. Any that the model embeds does: the attention mask hides it.

    Args:
        model: its own padding id is taken if it embeds it; that of some checkpoints lies outside.
        candidates: the ids to try next; 0 is the last resort.
    """
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    for candidate in (model.generation_config.pad_token_id, *candidates):
        if candidate is not None and 0 <= candidate < num_embeddings:
            return int(candidate)
    return 0


@contextmanager
def _settings_alone(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation settings inside the block.

    Transformers and L-MTP take from them whatever `config` leaves open, and a checkpoint may have saved
    any setting: penalties, suppressed tokens, a lossy acceptance rule.
    """
    saved = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved


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
