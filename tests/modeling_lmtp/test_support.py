"""What a backbone can verify: what the probe does not reach makes the verdict stricter."""

from functools import wraps

import all_causal_models
import pytest
import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, Oracle, always
from tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from modeling_lmtp import LMTPForCausalLM, support_lmtp
from modeling_lmtp.cache_lmtp import reason_not_movable, reason_not_restored
from modeling_lmtp.support_lmtp import Tier, decoding_support, reason_too_long
from modeling_lmtp.transformers_lmtp import with_cache

PADDED = torch.tensor([[0, 0, 5, 6, 7, 8, 1], [0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 3]])
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
INDEXED = {**SMALL, **LATENT, "num_key_value_heads": 4, "index_head_dim": 8, "index_n_heads": 32}
COMPRESSED = {
    **SMALL,
    **LATENT,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "o_lora_rank": 16,
    "o_groups": 2,
    "max_position_embeddings": 512,
}
TEMPERATURE = {
    **SMALL,
    "head_dim": 8,
    "intermediate_size_mlp": 64,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 512,
    "max_position_embeddings": 16384,
}


def new_model(kind, **settings):
    torch.manual_seed(3)
    try:
        config = AutoConfig.for_model(kind, **settings)
    except ValueError:
        pytest.skip(f"this release has no {kind}")
    return AutoModelForCausalLM.from_config(config).eval()


def both_texts(backbone, input_ids, **options):
    mask = (input_ids != 0).long()
    chosen = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, **options}
    plain = backbone.generate(input_ids, **chosen)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3, 4))
    return plain.tolist(), model.generate(input_ids, use_lmtp=True, **chosen).tolist()


@pytest.mark.parametrize("index_topk", [2048, 8], ids=["all keys", "few keys"])
def test_rows_whose_cache_holds_the_keys_of_an_indexer_stay_where_they_are(index_topk):
    backbone = new_model("deepseek_v32", **INDEXED, index_topk=index_topk)
    support = decoding_support(backbone)
    assert support.tier is not Tier.TREE
    assert not support.ragged
    plain, fast = both_texts(backbone, PADDED)
    assert fast == plain


@pytest.mark.filterwarnings("ignore")
def test_texts_longer_than_the_keys_that_an_indexer_selects_are_decoded_plainly():
    """With few heads, many keys get the same score, 0: which are selected depends on a pass's shape."""
    backbone = new_model("deepseek_v32", **{**INDEXED, "index_n_heads": 4}, index_topk=32)
    assert reason_too_long(backbone.config, 32) is None
    assert "32 selected keys" in reason_too_long(backbone.config, 33)
    assert max(lengths_with_oracle(backbone, max_new_tokens=20)) > 1
    assert set(lengths_with_oracle(backbone, max_new_tokens=120)) == {1}


def lengths_with_oracle(backbone, max_new_tokens):
    """Check that the text over a chain is plain decoding's; return the tokens of each pass."""
    inputs = {"input_ids": PADDED[2:], "attention_mask": torch.ones_like(PADDED[2:])}
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    plain = backbone.generate(**inputs, **options)
    output = LMTPForCausalLM.from_backbone(backbone).generate(
        **inputs,
        **options,
        use_lmtp=True,
        drafter=Oracle(plain, CHAIN, always),
        return_dict_in_generate=True,
    )
    assert output.sequences.tolist() == plain.tolist()
    return output.acceptance_lengths[0]


def test_a_selection_of_unknown_size_is_decoded_plainly(monkeypatch):
    monkeypatch.setattr(support_lmtp, "_num_selected_keys", lambda _config: None)
    support = decoding_support(new_model("deepseek_v32", **INDEXED, index_topk=8))
    assert support.tier is Tier.PLAIN
    assert "does not say how many keys" in support.reason


def test_a_model_that_shifts_the_mask_of_a_padded_row_verifies_no_trees():
    """It puts the slots of an image before the mask in each pass, even where there was no image."""
    if "git" not in all_causal_models.MODEL_TYPES:
        pytest.skip("this release has no git")
    backbone = all_causal_models.build("git")
    support = decoding_support(backbone)
    assert support.tier is not Tier.TREE  # plain on Transformers 5.15, which needs an image
    if support.tier is Tier.CHAIN:
        assert "padded row" in support.reason
    plain, fast = both_texts(backbone, PADDED)
    assert fast == plain


@pytest.mark.filterwarnings("ignore")
def test_states_of_compression_blocks_are_decoded_plainly():
    backbone = new_model("deepseek_v4", **COMPRESSED, sliding_window=2048)
    assert decoding_support(backbone).tier is Tier.PLAIN
    plain, fast = both_texts(backbone, torch.tensor([[1, 8, 15, 22, 29]]), max_new_tokens=200)
    assert fast == plain


def test_layers_that_take_positions_from_slots_verify_chains_in_their_slots():
    """Its queries are scaled by a number that steps every 8,192 slots: no short probe reaches it."""
    backbone = new_model("llama4_text", **TEMPERATURE)
    assert backbone.config.floor_scale == 8192
    support = decoding_support(backbone)
    assert (support.tier, support.ragged) == (Tier.CHAIN, False)
    assert "take positions from the slots" in support.reason


def test_a_scale_that_steps_early_gives_the_same_texts():
    backbone = new_model("llama4_text", **TEMPERATURE, floor_scale=4, attn_scale=2.0)
    plain, fast = both_texts(backbone, PADDED)
    assert fast == plain


def test_chunks_that_no_probe_reaches_verify_chains_in_their_slots():
    settings = {**TEMPERATURE, "attention_chunk_size": 8192, "attn_temperature_tuning": False}
    support = decoding_support(new_model("llama4_text", **settings))
    assert (support.tier, support.ragged) == (Tier.CHAIN, False)
    assert "chunks of 8192 tokens" in support.reason


def cache_after(backbone, tokens):
    cache = DynamicCache(config=backbone.config)
    backbone(**with_cache({"input_ids": tokens, "use_cache": True}, cache))
    return cache


def test_a_state_that_a_rollback_leaves_behind_is_found():
    backbone, tokens = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
    plain, rolled_back = cache_after(backbone, tokens), cache_after(backbone, tokens)
    assert reason_not_restored(rolled_back, plain, 1e-4) is None
    for cache, length in ((plain, 4), (rolled_back, 6)):
        cache.layers[1].blocks = {"sums": [torch.ones(1, length, 8)], "count": length}
    assert "do not roll back 'blocks'" in reason_not_restored(rolled_back, plain, 1e-4)
    rolled_back.layers[1].blocks = {"sums": [torch.ones(1, 4, 8)], "count": 6}
    assert "do not roll back 'blocks'" in reason_not_restored(rolled_back, plain, 1e-4)
    rolled_back.layers[1].blocks = {"sums": [torch.ones(1, 4, 8)], "count": 4}
    assert reason_not_restored(rolled_back, plain, 1e-4) is None
    assert "hold 'blocks' as well" in reason_not_movable(plain)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_layers_without_anything_else_may_move(architecture):
    backbone = tiny_causal_lm(architecture)
    assert reason_not_movable(cache_after(backbone, torch.tensor([[5, 6, 7, 8]]))) is None
    support = decoding_support(backbone)
    assert (support.tier, support.ragged) == (Tier.TREE, True)


def test_a_recurrence_that_steps_otherwise_is_decoded_plainly():
    """It bounds its time steps from below over several tokens, but not over one."""
    support = decoding_support(tiny_causal_lm("zamba2", time_step_min=0.1))
    assert support.tier is Tier.PLAIN
    assert "than one after the other" in support.reason


def test_a_window_that_the_cache_does_not_know_verifies_no_trees():
    support = decoding_support(tiny_causal_lm("gpt_neo", window_size=100))
    assert support.tier is Tier.CHAIN
    assert "does not know the attention window of 100 tokens" in support.reason


def test_several_rows_are_tried_only_when_they_are_decoded(monkeypatch):
    backbone = tiny_causal_lm("llama")
    right, num_rows = backbone.forward, []

    @wraps(right)
    def forward(*args, **kwargs):
        num_rows.append(kwargs["input_ids"].shape[0])
        return right(*args, **kwargs)

    monkeypatch.setattr(backbone, "forward", forward)
    plain, fast = both_texts(backbone, PADDED[2:])
    assert fast == plain
    assert set(num_rows) == {1}
    assert len(num_rows) < 2 * 24 + 20  # those of both texts and of the probes
    assert not decoding_support(backbone, single_row=True).ragged

    monkeypatch.setattr(support_lmtp, "_probe_tiers", None)  # the answer for one row is known
    num_rows.clear()
    assert decoding_support(backbone).ragged
    assert 2 in num_rows
    num_rows.clear()
    assert decoding_support(backbone).ragged
    assert not num_rows
