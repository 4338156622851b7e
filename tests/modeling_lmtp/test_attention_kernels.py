"""Whatever computes attention, the text is plain decoding's, or the call is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drafters import CHAIN, TREE
from environments import BATCH, PROMPT, assert_same_texts, generate, wrapped
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from modeling_lmtp.support_lmtp import Tier, decoding_support


@pytest.mark.parametrize("inputs", [PROMPT, BATCH], ids=["prompt", "batch"])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("mistral", "sdpa"),
     ("gemma2", "eager"), ("gpt2", "eager"), ("gpt2", "sdpa"), ("llama4_text", "eager")],
)  # fmt: skip
def test_attention_that_takes_masks_verifies_trees(architecture, attention, inputs):
    model = wrapped(architecture, attn_implementation=attention)
    support = decoding_support(model.backbone)
    if architecture != "llama4_text":  # whose masks some releases of Transformers cannot make
        assert (support.tier, support.ragged) == (Tier.TREE, True)
    assert_same_texts(model, inputs, TREE if support.tier is Tier.TREE else CHAIN)


def test_another_attention_may_be_chosen_between_calls():
    model = wrapped(attn_implementation="sdpa")
    plain = generate(model).sequences
    for attention, tier in [("lmtp_tests_aligned", Tier.CHAIN), ("eager", Tier.TREE)]:
        model.set_attn_implementation(attention)
        assert model.backbone.config._attn_implementation == attention
        assert decoding_support(model.backbone).tier is tier
        assert_same_texts(model, tree=TREE if tier is Tier.TREE else CHAIN, plain=plain)


@pytest.mark.filterwarnings(
    "ignore:.*_compile flag on create_block_mask:DeprecationWarning",  # Transformers passes it
    "ignore:.*torch.jit.script_method:DeprecationWarning",  # what torch imports for it uses that
    "ignore:flex_attention called without torch.compile:UserWarning",  # as is the intention here
)
@pytest.mark.parametrize("inputs", [PROMPT, BATCH], ids=["prompt", "batch"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_flex_attention_verifies_chains(architecture, inputs):
    # What the compiler makes of it needs half a minute, and on a CPU does not build for windows
    with torch.compiler.set_stance("force_eager"):
        model = wrapped(architecture, attn_implementation="flex_attention")
        support = decoding_support(model.backbone)
        assert (support.tier, support.ragged) == (Tier.CHAIN, True), support.reason
        assert_same_texts(model, inputs, CHAIN)


def like_flash_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Do as FlashAttention: align queries with the last keys, take padding as a 2D mask or not at all."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    slots = torch.arange(num_keys)
    distances = slots[num_keys - num_queries :, None] - slots
    mask = distances >= 0
    if sliding_window is not None:
        mask &= distances < sliding_window
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        mask = mask & attention_mask[:, None, None, -num_keys:].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


def align_with_first_keys(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Be right for a whole text and for one token, and wrong for several tokens after a cache."""
    assert attention_mask is None
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register("lmtp_tests_padding", like_flash_attention)
AttentionMaskInterface.register("lmtp_tests_padding", flash_attention_mask)
AttentionInterface.register("lmtp_tests_aligned", like_flash_attention)  # gets no mask at all
AttentionInterface.register("lmtp_tests_misaligned", align_with_first_keys)


@pytest.mark.parametrize("inputs", [PROMPT, BATCH], ids=["prompt", "batch"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "lfm2"])
def test_attention_that_takes_padding_only_verifies_chains(architecture, inputs):
    model = wrapped(architecture, attn_implementation="lmtp_tests_padding")
    support = decoding_support(model.backbone)
    assert (support.tier, support.ragged) == (Tier.CHAIN, True), support.reason
    assert "takes no tree mask" in support.reason
    assert_same_texts(model, inputs, CHAIN)


@pytest.mark.parametrize("inputs", [PROMPT, BATCH], ids=["prompt", "batch"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_attention_that_takes_nothing_verifies_chains_in_step(architecture, inputs):
    model = wrapped(architecture, attn_implementation="lmtp_tests_aligned")
    support = decoding_support(model.backbone)
    assert (support.tier, support.ragged) == (Tier.CHAIN, False), support.reason
    lengths = assert_same_texts(model, inputs, CHAIN)
    assert all(row == lengths[0] for row in lengths)


def test_attention_that_is_wrong_for_several_tokens_is_decoded_plainly():
    model = wrapped(attn_implementation="lmtp_tests_misaligned")
    plain = generate(wrapped()).sequences.tolist()
    assert generate(model).sequences.tolist() == plain
    assert generate(model, use_lmtp=True).sequences.tolist() == plain
    with pytest.raises(ValueError, match="several tokens at once give other logits than one"):
        generate(model, use_lmtp="strict")
