"""Positions: where they depend on the length of the text, and where they end."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, TREE, Oracle, sometimes
from environments import PROMPT, assert_same_texts, generate, wrapped
from transformers import AutoConfig, StoppingCriteria
from transformers.utils import logging

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import num_positions, reason_too_long

LIMIT = 32
FACTORS = [1.0, 1.2, 1.5, 2.0]  # one per pair of a head's dimensions
ROTARY = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [4 * factor for factor in FACTORS],
        "rope_theta": 10000.0,
        "original_max_position_embeddings": LIMIT,
    },
}


def rescaled(kind: str) -> LMTPForCausalLM:
    positions = LIMIT if kind == "dynamic" else 4 * LIMIT
    return wrapped(rope_parameters=ROTARY[kind], max_position_embeddings=positions)


class EndsAtLimit(StoppingCriteria):
    """Stands for a text that ends by itself, in time."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= LIMIT)


@pytest.fixture
def said(monkeypatch):
    """What has been warned of."""
    messages: list[str] = []
    logger = logging.get_logger("modeling_lmtp.generation_lmtp")
    monkeypatch.setattr(logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize("kind", ROTARY)
def test_embeddings_that_the_length_rescales_are_decoded_plainly_beyond_it(kind, said):
    model = rescaled(kind)
    plain = generate(model, max_new_tokens=60).sequences
    drafter = Oracle(plain, TREE, sometimes)
    for options in ({}, {"draft_nodes": 8}, {"drafter": drafter}):
        ours = generate(model, use_lmtp=True, max_new_tokens=60, **options)
        assert ours.sequences.tolist() == plain.tolist()
        assert set(ours.acceptance_lengths[0]) == {1}
    assert all(f"{kind!r} rotary embeddings depend on the length" in text for text in said)
    assert len(said) == 3


@pytest.mark.parametrize("kind", ROTARY)
def test_within_that_length_drafts_are_verified(kind, said):
    num_prompt = PROMPT["input_ids"].shape[1]
    assert_same_texts(rescaled(kind), max_new_tokens=LIMIT - num_prompt)
    assert not said


def test_each_kind_of_layer_may_have_its_own_embeddings():
    config = AutoConfig.for_model("gemma3_text")
    assert reason_too_long(config, 10**6) is None
    kinds = dict(config.rope_parameters)
    assert len(kinds) == 2
    for kind in kinds:
        config.rope_parameters = {**kinds, kind: ROTARY["longrope"]}
        assert "'longrope'" in reason_too_long(config, LIMIT + 1)
        assert reason_too_long(config, LIMIT) is None


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mpt", "gptj"])
def test_a_text_that_ends_before_the_last_position_is_not_drafted_past_it(architecture):
    sizes = {"n_positions": LIMIT} if architecture in ("gpt2", "gptj") else {}
    sizes = sizes or {"max_seq_len" if architecture == "mpt" else "max_position_embeddings": LIMIT}
    model = wrapped(architecture, **sizes)
    assert num_positions(model.config) == LIMIT
    options = {"max_new_tokens": 100, "use_cache": True, "stopping_criteria": [EndsAtLimit()]}
    plain = generate(model, **options).sequences
    assert plain.shape[1] == LIMIT
    drafter = Oracle(plain, CHAIN)
    ours = generate(model, use_lmtp=True, drafter=drafter, **options)
    assert ours.sequences.tolist() == plain.tolist()
    # The last position is verified as well
    assert all(known + room == LIMIT for known, room in drafter.asked)
    assert generate(model, use_lmtp=True, **options).sequences.tolist() == plain.tolist()


def test_no_positions_are_no_bound():
    assert num_positions(tiny_causal_lm("bloom").config) is None
    assert torch.is_tensor(generate(wrapped("bloom"), use_lmtp=True, max_new_tokens=4).sequences)
