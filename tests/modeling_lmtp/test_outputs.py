"""What `generate(use_lmtp=True)` returns beside its tokens is laid out, and filled, as plainly."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import tiny_causal_lm
from batches import (
    LENGTH,
    OwnProcessor,
    assert_same_states,
    assert_same_steps,
    generate,
    num_emitted,
    padded,
    tokens_that_end,
    wrapped,
)
from drafters import CHAIN, RULES, TREE, Oracle, Rule, sometimes
from transformers import PreTrainedModel

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import cache_of
from modeling_lmtp.tree_lmtp import DraftTree

DRAFTS = {
    **dict.fromkeys(["llama", "gemma2", "mistral"], TREE),
    **dict.fromkeys(["bloom", "lfm2", "qwen3_next"], CHAIN),
}
BATCHES = {"alone": padded([[3, 17, 5, 9, 44]]), "batch": padded()}
GREEDY = {"do_sample": False, "max_new_tokens": 24}  # windows of 16 tokens are left
STATES = {"output_hidden_states": True, "output_attentions": True}
SCORES = {"output_scores": True, "output_logits": True}

every_architecture = pytest.mark.parametrize(
    ("architecture", "tree"), DRAFTS.items(), ids=DRAFTS.keys()
)
alone_and_batch = pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES.keys())


@functools.cache
def eager(architecture: str) -> LMTPForCausalLM:
    """A model whose attention weights can be seen; the same one every time."""
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture))
    model.backbone.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def llama() -> LMTPForCausalLM:
    return eager("llama")


def both(
    model: LMTPForCausalLM,
    tree: DraftTree,
    inputs: dict[str, torch.Tensor],
    right: Rule = sometimes,
    **options,
):
    """What L-MTP returns, and what plain decoding does; the drafts go on beyond an end."""
    whole = generate(model.backbone, inputs, **{**options, "eos_token_id": None}).sequences
    plain = generate(model.backbone, inputs, **options)
    drafter = Oracle(whole, tree, right)
    ours = generate(model, inputs, use_lmtp=True, drafter=drafter, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    return ours, plain


def eos_token_ids(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> list[int]:
    """Tokens that end rows at different times, inside drafts; the last row of several goes on."""
    whole = generate(model, inputs, **GREEDY, **options).sequences
    places = [(row, 6 + 8 * row) for row in range(max(1, len(whole) - 1))]
    return tokens_that_end(whole[:, inputs["input_ids"].shape[1] :], places)


@alone_and_batch
@every_architecture
@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
def test_hidden_states_and_attentions_are_plain_decoding_s(architecture, tree, inputs, ends):
    model = eager(architecture)
    options = dict(GREEDY)
    if ends:
        options["eos_token_id"] = eos_token_ids(model.backbone, inputs)
    ours, plain = both(model, tree, inputs, **options, **STATES)
    emitted = plain.sequences[:, inputs["input_ids"].shape[1] :]
    lengths = num_emitted(emitted, options.get("eos_token_id", ()))
    assert (len(set(lengths)) > 1) == (ends and len(lengths) > 1)
    assert_same_states(ours.hidden_states, plain.hidden_states, lengths, architecture)
    assert_same_states(ours.attentions, plain.attentions, lengths, architecture)
    assert len(plain.attentions[0]) > 0


@alone_and_batch
@every_architecture
@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
def test_scores_and_logits_are_plain_decoding_s(architecture, tree, inputs, ends):
    model = wrapped(architecture)
    options = {**GREEDY, "no_repeat_ngram_size": 1}
    if ends:
        options["eos_token_id"] = eos_token_ids(model.backbone, inputs)
    ours, plain = both(model, tree, inputs, **options, **SCORES)
    emitted = plain.sequences[:, inputs["input_ids"].shape[1] :]
    lengths = num_emitted(emitted, options.get("eos_token_id", ()))
    assert_same_steps(ours.scores, plain.scores, lengths, architecture)
    assert_same_steps(ours.logits, plain.logits, lengths, architecture)
    assert not torch.equal(plain.scores[0], plain.logits[0])


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
def test_rows_in_step_have_scores_and_logits_up_to_their_end(llama, right):
    inputs = padded()
    in_step = {"logits_processor": [OwnProcessor()]}
    options = {"eos_token_id": eos_token_ids(llama.backbone, inputs, **in_step), **SCORES}
    options |= {**GREEDY, **in_step}
    ours, plain = both(llama, TREE, inputs, right, **options)
    lengths = num_emitted(plain.sequences[:, LENGTH:], options["eos_token_id"])
    assert len(set(lengths)) > 1
    assert_same_steps(ours.scores, plain.scores, lengths)
    assert_same_steps(ours.logits, plain.logits, lengths)


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_sampling_returns_the_scores_and_states_of_what_it_drew(architecture):
    model, inputs = eager(architecture), padded([[3, 17, 5, 9, 44]])
    options = {"do_sample": True, "max_new_tokens": 16, "top_k": 9, **SCORES, **STATES}
    ours, plain = both(model, DRAFTS[architecture], inputs, **options)
    assert_same_steps(ours.scores, plain.scores, [16])
    assert_same_steps(ours.logits, plain.logits, [16])
    assert_same_states(ours.hidden_states, plain.hidden_states, [16])
    assert_same_states(ours.attentions, plain.attentions, [16])


@pytest.mark.parametrize("prefill_chunk_size", [2, 5, 13])
@alone_and_batch
def test_a_prompt_prefilled_in_chunks_has_plain_decoding_s_states(
    llama, inputs, prefill_chunk_size
):
    options = {**GREEDY, "prefill_chunk_size": prefill_chunk_size, **STATES, **SCORES}
    ours, plain = both(llama, TREE, inputs, **options)
    lengths = [24] * len(inputs["input_ids"])
    assert_same_states(ours.hidden_states, plain.hidden_states, lengths)
    assert_same_states(ours.attentions, plain.attentions, lengths)
    assert_same_steps(ours.logits, plain.logits, lengths)


@pytest.mark.parametrize("normalize_logits", [False, True])
@alone_and_batch
def test_transition_scores_can_be_computed(llama, inputs, normalize_logits):
    options = {**GREEDY, "eos_token_id": eos_token_ids(llama.backbone, inputs)}
    ours, plain = both(llama, TREE, inputs, **options, output_scores=True)
    lengths = num_emitted(
        plain.sequences[:, inputs["input_ids"].shape[1] :], options["eos_token_id"]
    )
    computed, expected = (
        model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=normalize_logits
        )
        for model, output in ((llama, ours), (llama.backbone, plain))
    )
    assert computed.shape == expected.shape == (len(lengths), max(lengths))
    for own, other, length in zip(computed, expected, lengths, strict=True):
        torch.testing.assert_close(own[:length], other[:length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
@pytest.mark.parametrize("in_step", [False, True], ids=["apart", "in step"])
@alone_and_batch
def test_acceptance_lengths_sum_up_to_the_tokens_of_each_row(llama, inputs, in_step, ends, right):
    options = {"logits_processor": [OwnProcessor()]} if in_step else {}
    if ends:
        options["eos_token_id"] = eos_token_ids(llama.backbone, inputs, **options)
    options |= GREEDY
    ours, plain = both(llama, TREE, inputs, right, **options)
    emitted = plain.sequences[:, inputs["input_ids"].shape[1] :]
    sums = [1 + sum(accepted) for accepted in ours.acceptance_lengths]
    assert sums == num_emitted(emitted, options.get("eos_token_id", ()))
    assert all(1 <= length <= 5 for accepted in ours.acceptance_lengths for length in accepted)


FIELDS = {
    "scores": "output_scores",
    "logits": "output_logits",
    "hidden_states": "output_hidden_states",
    "attentions": "output_attentions",
}


@pytest.mark.parametrize("asked", [None, *FIELDS])
@alone_and_batch
def test_what_is_not_asked_for_is_none(llama, inputs, asked):
    options = {} if asked is None else {FIELDS[asked]: True}
    ours, plain = both(llama, TREE, inputs, **GREEDY, **options)
    for name in FIELDS:
        assert (getattr(ours, name) is None) == (getattr(plain, name) is None) == (name != asked)
    assert cache_of(ours) is not None
    added = {"acceptance_lengths", "num_candidates", "token_sources"}
    assert set(plain.keys()) | added == set(ours.keys())


@pytest.mark.parametrize("asked", FIELDS)
@alone_and_batch
def test_a_tensor_is_returned_where_no_dict_is_wanted_whatever_is_asked_for(llama, inputs, asked):
    options = {**GREEDY, FIELDS[asked]: True, "return_dict_in_generate": False}
    plain = generate(llama.backbone, inputs, **options)
    ours = generate(llama, inputs, use_lmtp=True, drafter=Oracle(plain, TREE), **options)
    assert torch.is_tensor(ours)
    assert ours.tolist() == plain.tolist()
