"""16 bits and autocast: plain decoding's text, up to a token that plain decoding nearly ties on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, TREE, Oracle, sometimes
from environments import BATCH, PROMPT, assert_same_texts, generate, wrapped

from modeling_lmtp import probe_lmtp
from modeling_lmtp.support_lmtp import Tier, decoding_support
from modeling_lmtp.tree_lmtp import DraftTree

# Of the largest logit; 16 bits round several tokens at once otherwise than one. (With experts, the
# choice of experts may be what nearly ties, and then the logits part by any amount.)
NEAR_TIE = 0.02
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


class Persistent(Oracle):
    """Goes on drafting, by the number of tokens known, when a text has parted from what it knows."""

    def _place(self, known: list[int]) -> tuple[list[int], int]:
        try:
            return super()._place(known)
        except AssertionError:
            return self.texts[0], len(known)


def assert_same_text_up_to_a_near_tie(model: Any, tree: DraftTree) -> bool:
    """Compare one prompt's text with plain decoding's; return whether all of it is the same."""
    plain = generate(model, output_logits=True)
    [text], prompt_length = plain.sequences.tolist(), PROMPT["input_ids"].shape[1]
    drafter = Persistent(plain.sequences, tree, sometimes)
    output = generate(model, use_lmtp=True, drafter=drafter)
    [ours] = output.sequences.tolist()
    assert len(ours) == len(text)
    assert max(output.acceptance_lengths[0]) >= 3
    if ours == text:
        return True
    parted = next(index for index, token in enumerate(ours) if token != text[index])
    logits = plain.logits[parted - prompt_length][0].float()
    best, second = logits.topk(2).values
    assert best - second <= NEAR_TIE * logits.abs().max(), f"parted at {parted}"
    return False


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "falcon", "lfm2"])
def test_16_bits_give_plain_text_up_to_a_near_tie(architecture, dtype):
    same = []
    for seed in (3, 4, 5):
        model = wrapped(architecture, seed=seed).to(dtype)
        tier = decoding_support(model.backbone).tier
        assert tier is (Tier.CHAIN if architecture == "lfm2" else Tier.TREE)
        same.append(assert_same_text_up_to_a_near_tie(model, TREE if tier is Tier.TREE else CHAIN))
    assert any(same)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3_text", "exaone4"])
def test_settings_that_are_no_windows_do_not_stand_in_the_way_of_trees(architecture, dtype):
    """Such as `max_window_layers`, a number of layers, and `sliding_window_pattern`."""
    assert decoding_support(tiny_causal_lm(architecture).to(dtype)).tier is Tier.TREE


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("architecture", ["bamba", "nemotron_h", "qwen3_next", "falcon_h1"])
def test_recurrent_states_keep_batches_in_step_in_any_precision(architecture, dtype):
    model = wrapped(architecture).to(dtype)
    assert not decoding_support(model.backbone).ragged
    plain = generate(model, BATCH).sequences
    drafter = Persistent(plain, CHAIN, sometimes)
    output = generate(model, BATCH, use_lmtp=True, drafter=drafter)
    assert output.sequences.shape == plain.shape
    if dtype is torch.float32:
        assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3_sliding", "gpt2", "lfm2"])
def test_autocast_gives_plain_text_up_to_a_near_tie_and_leaves_no_verdict_behind(architecture):
    model, fresh = wrapped(architecture), wrapped(architecture)
    expected = decoding_support(fresh.backbone)
    tree = TREE if expected.tier is Tier.TREE else CHAIN
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_text_up_to_a_near_tie(model, tree)
    assert decoding_support(model.backbone) == expected
    assert_same_texts(model, tree=tree)


def test_a_call_in_training_mode_leaves_no_verdict_behind():
    model = wrapped("llama", attention_dropout=0.1).train()
    model.backbone.train()  # which a frozen one is not, unless it is told apart
    with pytest.raises(ValueError, match=r"it is in training mode, call eval\(\) first"):
        generate(model, use_lmtp="strict")
    assert_same_texts(model.eval(), tree=TREE)


def test_memory_that_ran_out_leaves_no_verdict_behind(monkeypatch):
    model = wrapped("llama")

    def full(*args):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(probe_lmtp, "_reason_inexact", full)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
            generate(model, use_lmtp=True)
    assert_same_texts(model, tree=TREE)
