"""Rows of a batch end at different times: their tokens, their passes, and the cache that comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from batches import (
    GREEDY,
    LENGTH,
    NEW_TOKENS,
    NEW_TOKENS_ALONE,
    NUM_ROWS,
    SECOND_TURN,
    OwnProcessor,
    assert_same_cache,
    generate,
    largest_draft,
    leap,
    new_tokens_alone,
    num_emitted,
    padded,
    plain_texts,
    slots_with_meaning,
    tokens_that_end,
    wrapped,
)
from drafters import CHAIN, TREE, Oracle, always, sometimes
from transformers import DynamicCache

from modeling_lmtp.support_lmtp import decoding_support
from modeling_lmtp.transformers_lmtp import cache_of, with_cache

KINDS = ("llama", "mistral", "gemma2", "bloom", "lfm2", "qwen3_next", "roformer")
# The tokens at these rows and steps end a text; steps are counted from 0
ENDS = {
    "each after the other": [(0, 4), (1, 11), (2, 23)],
    "the shortest prompt first": [(2, 2), (0, 14)],
    "one goes on": [(0, 7), (2, 8)],
    "one at its second token": [(1, 1)],
}

every_kind = pytest.mark.parametrize("architecture", KINDS)
all_ends = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())


@pytest.mark.parametrize("right", [always, sometimes])
@all_ends
@every_kind
def test_rows_end_inside_drafts_where_plain_decoding_ends_them(architecture, ends, right):
    model, whole = wrapped(architecture), plain_texts(architecture)
    options = {
        **GREEDY,
        "eos_token_id": tokens_that_end(whole[:, LENGTH:], ends),
        "pad_token_id": 95,
    }
    plain = generate(model.backbone, **options).sequences
    lengths = num_emitted(plain[:, LENGTH:], options["eos_token_id"])
    assert len(set(lengths)) > 1
    output = leap(model, whole, right=right, **options)  # drafts beyond the ends
    assert output.sequences.tolist() == plain.tolist()
    assert [1 + sum(accepted) for accepted in output.acceptance_lengths] == lengths


@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("first", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_rows_may_end_at_their_very_first_token(first, tree):
    model, whole = wrapped("llama"), plain_texts("llama")
    options = {**GREEDY, "eos_token_id": [int(whole[row, LENGTH]) for row in first]}
    plain = generate(model.backbone, **options).sequences
    assert (plain.shape[1] == LENGTH + 1) == (len(first) == NUM_ROWS)
    output = leap(model, whole, tree, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert all(output.acceptance_lengths[row] == [] for row in first)


@pytest.mark.parametrize("returns_dict", [False, True])
@pytest.mark.parametrize("in_step", [False, True], ids=["apart", "in step"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "lfm2"])
def test_rows_that_have_ended_leave_the_backbone_s_batch(architecture, in_step, returns_dict):
    model, whole = wrapped(architecture), plain_texts(architecture)
    options = dict(GREEDY)
    if in_step:
        options["logits_processor"] = [OwnProcessor()]
        whole = generate(model.backbone, **options).sequences
    options["eos_token_id"] = tokens_that_end(whole[:, LENGTH:], ENDS["one goes on"])
    output = leap(model, whole, **options)
    rows_per_pass = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: rows_per_pass.append(args[0].shape[0])
    )
    decoding_support(model.backbone)  # with a hook, it is tried again
    rows_per_pass.clear()
    leap(model, whole, **options, return_dict_in_generate=returns_dict)
    handle.remove()
    passes = [len(accepted) for accepted in output.acceptance_lengths]
    alive = [sum(row > number for row in passes) for number in range(max(passes))]
    assert {1, 3} <= set(alive)
    # A cache that goes back holds what plain decoding ran of rows that had ended
    lengths = num_emitted(output.sequences[:, LENGTH:], options["eos_token_id"])
    late = [1] * sum(length < max(lengths) for length in lengths) if returns_dict else []
    assert rows_per_pass == [NUM_ROWS, *alive, *late]


@pytest.mark.parametrize("right", [always, sometimes])
@pytest.mark.parametrize(
    "ends", [[], *list(ENDS.values())[:2]], ids=["to the length", *list(ENDS)[:2]]
)
@every_kind
def test_the_returned_cache_is_as_plain_decoding_leaves_it(architecture, ends, right):
    model, whole = wrapped(architecture), plain_texts(architecture)
    options = {**GREEDY, "eos_token_id": tokens_that_end(whole[:, LENGTH:], ends) or None}
    plain = generate(model.backbone, **options)
    output = leap(model, whole, right=right, **options)
    # The last token is not in it yet
    mask = slots_with_meaning(padded(), plain.sequences.shape[1] - 1)
    assert_same_cache(cache_of(output), cache_of(plain), mask, architecture)


@pytest.mark.parametrize("returns_dict", [False, True])
@every_kind
def test_a_cache_passed_in_is_brought_up_to_date_in_place(architecture, returns_dict):
    model, whole = wrapped(architecture), plain_texts(architecture)
    options = {**GREEDY, "eos_token_id": tokens_that_end(whole[:, LENGTH:], ENDS["one goes on"])}
    plain = generate(model.backbone, **options)
    cache = DynamicCache(config=model.backbone.config)
    drafter = Oracle(whole, largest_draft(model), sometimes)
    output = model.generate(
        **padded(),
        **options,
        use_lmtp=True,
        drafter=drafter,
        **with_cache({}, cache),
        return_dict_in_generate=returns_dict,
    )
    if returns_dict:
        assert cache_of(output) is cache
    mask = slots_with_meaning(padded(), plain.sequences.shape[1] - 1)
    assert_same_cache(cache, cache_of(plain), mask, architecture)


def second_turn(first, ends: list[int], masked: bool) -> dict[str, torch.Tensor]:
    """The first turn's texts, what the user adds, and the cache; pads after an end may be masked."""
    sequences = first.sequences
    attention_mask = slots_with_meaning(padded(), sequences.shape[1])
    if masked:
        for row, length in enumerate(num_emitted(sequences[:, LENGTH:], ends)):
            attention_mask[row, LENGTH + length :] = 0
    return {
        "input_ids": torch.cat([sequences, SECOND_TURN], dim=-1),
        "attention_mask": torch.cat([attention_mask, torch.ones_like(SECOND_TURN)], dim=-1),
        **with_cache({}, cache_of(first)),
    }


@pytest.mark.parametrize(
    ("flags", "masked"),
    [((True, True), False), ((True, True), True), ((True, False), True), ((False, True), True)],
    ids=["both turns, pads seen", "both turns", "first turn", "second turn"],
)
@every_kind
def test_a_conversation_goes_on_in_a_batch(architecture, masked, flags):
    model, whole = wrapped(architecture), plain_texts(architecture)
    options = {**GREEDY, "eos_token_id": tokens_that_end(whole[:, LENGTH:], ENDS["one goes on"])}
    plain = [generate(model.backbone, **options)]
    inputs = second_turn(plain[0], options["eos_token_id"], masked)
    plain.append(generate(model.backbone, inputs, **GREEDY))

    def turn(number: int, texts: torch.Tensor, inputs: dict[str, torch.Tensor], **options):
        if flags[number]:
            return leap(model, texts, inputs=inputs, **options)
        return generate(model, inputs, **options)

    first = turn(0, whole, padded(), **options)
    inputs = second_turn(first, options["eos_token_id"], masked)
    second = turn(1, plain[1].sequences, inputs, **GREEDY)
    assert [first.sequences.tolist(), second.sequences.tolist()] == [
        output.sequences.tolist() for output in plain
    ]
    mask = torch.cat([inputs["attention_mask"], torch.ones(NUM_ROWS, NEW_TOKENS - 1)], dim=-1)
    assert_same_cache(cache_of(second), cache_of(plain[1]), mask, architecture)


@pytest.mark.parametrize("right", [always, sometimes])
@pytest.mark.parametrize(
    ("prompts", "more", "ends"), NEW_TOKENS_ALONE.values(), ids=NEW_TOKENS_ALONE.keys()
)
@every_kind
def test_a_conversation_goes_on_from_its_new_tokens_alone(architecture, prompts, more, ends, right):
    model, inputs = wrapped(architecture), padded(prompts, more)
    first = generate(model.backbone, inputs, **{**GREEDY, "max_new_tokens": 6})
    turn = new_tokens_alone(first, inputs)
    endless = generate(model.backbone, copy.deepcopy(turn), **GREEDY).sequences
    emitted = endless[:, turn["input_ids"].shape[1] :]
    options = {**GREEDY, "eos_token_id": tokens_that_end(emitted, ends) or None}
    plain = generate(model.backbone, copy.deepcopy(turn), **options)
    output = leap(model, endless, right=right, inputs=turn, **options)
    assert output.sequences.tolist() == plain.sequences.tolist()
    mask = slots_with_meaning(turn, cache_of(plain).get_seq_length())
    assert_same_cache(cache_of(output), cache_of(plain), mask, architecture)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "lfm2"])
def test_a_cache_of_the_prompts_beginning_may_be_passed_in(architecture):
    model, inputs = wrapped(architecture), padded()
    beginning = DynamicCache(config=model.backbone.config)
    # The last prompt is not in it yet
    begun = {name: values[:, :-4] for name, values in inputs.items()}
    with torch.no_grad():
        model.backbone(**begun, **with_cache({}, beginning))
    inputs |= with_cache({}, copy.deepcopy(beginning))
    plain = generate(model.backbone, inputs, **GREEDY)
    inputs |= with_cache({}, beginning)
    output = leap(model, plain.sequences, inputs=inputs, **GREEDY)
    assert output.sequences.tolist() == plain.sequences.tolist()
    mask = slots_with_meaning(inputs, LENGTH + NEW_TOKENS - 1)
    assert_same_cache(cache_of(output), cache_of(plain), mask, architecture)
