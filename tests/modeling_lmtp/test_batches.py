"""In a batch every row gets plain decoding's tokens, and goes as far as its own draft is right."""

from __future__ import annotations

import pytest
import torch
from architectures import REPRESENTATIVE, tiny_causal_lm
from batches import (
    GREEDY,
    LENGTH,
    NEW_TOKENS,
    NUM_ROWS,
    PROMPTS,
    generate,
    leap,
    num_emitted,
    padded,
    plain_texts,
    wrapped,
)
from drafters import (
    CHAIN,
    RULES,
    SHIFT,
    TREE,
    Rule,
    acceptance_lengths,
    always,
    never,
    sometimes,
)
from transformers import GenerationConfig

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.rollback_lmtp import MAX_REPLAY
from modeling_lmtp.support_lmtp import decoding_support

CHAINS = ("gpt_neo", "falcon_alibi", "bloom", "lfm2")
IN_STEP = ("mpt", "qwen3_next", "roformer")  # their rows cannot be aligned
REFUSED = ("minimax", "mamba")
TREES = tuple(name for name in REPRESENTATIVE if name not in (*CHAINS, *IN_STEP, *REFUSED))
SHAPES = {"chain": CHAIN, "tree": TREE}
RAGGED = [(name, "tree", right) for name in TREES for right in RULES.values()]
RAGGED += [(name, "chain", sometimes) for name in TREES]
RAGGED += [(name, "chain", right) for name in CHAINS for right in RULES.values()]

both_shapes = pytest.mark.parametrize("shape", SHAPES)
every_rule = pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
one_of_each_kind = pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "mistral", "llama4_text", "bloom", "lfm2", *IN_STEP]
)


def expected_lengths(new_tokens: int, right: Rule) -> list[list[int]]:
    """What each row gets accepted by each pass: the oracle's rule is shifted from row to row."""
    return [
        acceptance_lengths(
            LENGTH,
            LENGTH + new_tokens,
            CHAIN.depth,
            lambda index, row=row: right(index + SHIFT * row),
        )
        for row in range(NUM_ROWS)
    ]


@pytest.mark.parametrize(("architecture", "shape", "right"), RAGGED)
def test_rows_emit_plain_tokens_each_at_its_own_pace(architecture, shape, right):
    plain = plain_texts(architecture)
    output = leap(wrapped(architecture), plain, SHAPES[shape], right, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths == expected_lengths(NEW_TOKENS, right)
    occurring = {length for row in output.acceptance_lengths for length in row}
    assert occurring == {always: {4, 5}, never: {1}, sometimes: {1, 2, 3, 4, 5}}[right]
    if right is sometimes:
        assert len({tuple(row) for row in output.acceptance_lengths}) == NUM_ROWS


@every_rule
@pytest.mark.parametrize("architecture", IN_STEP)
def test_rows_that_cannot_be_aligned_go_in_step(architecture, right):
    model, plain = wrapped(architecture), plain_texts(architecture)
    assert not decoding_support(model.backbone).ragged
    output = leap(model, plain, CHAIN, right, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    first, *others = output.acceptance_lengths
    assert others == [first] * (NUM_ROWS - 1)
    assert (max(first) > 1) == (right is not never)


def test_a_pass_stays_short_where_drafts_are_always_wrong():
    model, plain = wrapped("qwen3_next"), plain_texts("qwen3_next")
    num_tokens = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: num_tokens.append(args[0].shape[1])
    )
    options = {**GREEDY, "return_dict_in_generate": False}
    output = leap(model, plain, CHAIN, never, **options)
    handle.remove()
    assert output.tolist() == plain.tolist()
    assert max(num_tokens[1:]) <= MAX_REPLAY + CHAIN.num_nodes


@pytest.mark.parametrize("architecture", [*TREES, *CHAINS, *IN_STEP])
def test_a_row_gets_the_tokens_of_its_prompt_alone(architecture):
    model, plain = wrapped(architecture), plain_texts(architecture)
    output = leap(model, plain, **GREEDY)
    for row, prompt in enumerate(PROMPTS):
        padding = LENGTH - len(prompt)
        text = plain[row : row + 1, padding:]
        alone = leap(model, text, inputs=padded([prompt]), **GREEDY).sequences
        assert output.sequences[row, padding:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("right", [always, sometimes])
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [(name, "tree") for name in ("mistral", "gemma2", "gemma3_text", "llama4_text", "gpt_oss")]
    + [(name, "chain") for name in ("mistral", "gemma2", "llama4_text", "gpt_neo", "lfm2")],
)
def test_windows_are_left_far_behind(architecture, shape, right):
    plain = plain_texts(architecture, 60)  # windows, or chunks, of 16 tokens
    options = {"do_sample": False, "max_new_tokens": 60}
    output = leap(wrapped(architecture), plain, SHAPES[shape], right, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths == expected_lengths(60, right)


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@one_of_each_kind
def test_padding_may_be_common_to_all_rows(architecture, num_rows):
    model, inputs = wrapped(architecture), padded(PROMPTS[:num_rows], more=5)
    plain = generate(model.backbone, inputs, **GREEDY).sequences
    output = leap(model, plain, inputs=inputs, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("lengths", [[5, 5, 5], [13, 10, 1]], ids=["equal", "padded"])
@one_of_each_kind
def test_the_attention_mask_may_be_absent(architecture, lengths):
    model = wrapped(architecture)
    prompts = [list(range(3 + row, 3 + row + length)) for row, length in enumerate(lengths)]
    inputs = {"input_ids": padded(prompts)["input_ids"]}  # Transformers infers it from the padding
    plain = generate(model.backbone, inputs, **GREEDY).sequences
    output = leap(model, plain, inputs=inputs, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()


@one_of_each_kind
def test_tokens_inside_a_prompt_may_be_masked(architecture):
    model, inputs = wrapped(architecture), padded()
    inputs["attention_mask"][0, [4, 12]] = 0  # the very last one, too
    inputs["attention_mask"][1, 6] = 0
    plain = generate(model.backbone, inputs, **GREEDY).sequences
    assert plain.tolist() != plain_texts(architecture).tolist()
    output = leap(model, plain, inputs=inputs, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_positions_may_be_given(architecture):
    model, inputs = wrapped(architecture), padded()
    inputs["position_ids"] = 7 + torch.arange(LENGTH).repeat(NUM_ROWS, 1)  # padding counted
    plain = generate(model.backbone, inputs, **GREEDY).sequences
    output = leap(model, plain, inputs=inputs, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()


@both_shapes
@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_a_total_length_bounds_all_rows(shape, new_tokens):
    whole, options = plain_texts("llama"), {"do_sample": False, "max_length": LENGTH + new_tokens}
    output = leap(wrapped("llama"), whole, SHAPES[shape], always, **options)
    assert output.sequences.tolist() == whole[:, : LENGTH + new_tokens].tolist()


@every_rule
@pytest.mark.parametrize(
    ("architecture", "shape", "setting"),
    [
        ("gpt2", "tree", "n_positions"),
        ("gpt2", "chain", "n_positions"),
        ("opt", "tree", "max_position_embeddings"),
        ("gpt_neo", "chain", "max_position_embeddings"),
    ],
    ids=str,
)
def test_learned_positions_are_filled_to_the_very_last_one(architecture, shape, setting, right):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture, **{setting: 32}))
    options = {"do_sample": False, "max_new_tokens": 32 - LENGTH}
    plain = generate(model.backbone, **options).sequences
    output = leap(model, plain, SHAPES[shape], right, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths == expected_lengths(32 - LENGTH, right)


def test_several_sequences_may_be_drawn_per_prompt():
    model = wrapped("llama")
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12}
    # With one token to draw from, all is certain
    plain = generate(model.backbone, **options, top_k=1).sequences
    output = leap(model, plain, **options, top_k=1)
    assert output.sequences.tolist() == plain.tolist()
    assert max(length for row in output.acceptance_lengths for length in row) == 5

    options["draft_length"] = 4  # so that both calls draw as many tokens per step
    output = generate(model, use_lmtp=True, **options)
    assert output.sequences[:, :LENGTH].tolist() == plain[:, :LENGTH].tolist()
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3 * NUM_ROWS
    again = generate(model, use_lmtp=True, **options)
    assert again.sequences.tolist() == output.sequences.tolist()


DRAFTS = {
    "a chain": {"draft_length": 4},
    "a short chain": {"draft_length": 2},
    "a tree": {"draft_tree": [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0)]},
    "planned": {},
    "planned, heads alone": {"prompt_lookup_num_tokens": 0},
    "a chain and look-up": {"draft_length": 4, "prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
@pytest.mark.parametrize(
    ("architecture", "draft"),
    [("mistral", draft) for draft in DRAFTS] + [("bloom", "a chain"), ("bloom", "planned")],
)
def test_leap_heads_draft_for_all_rows(architecture, draft, ends):
    # Twelve tokens, so that random heads, and repetitions, are right now and then
    backbone = tiny_causal_lm(architecture, vocab_size=12)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3, 5))
    inputs = padded([[token % 11 + 1 for token in prompt] for prompt in PROMPTS])
    options = {**GREEDY, "no_repeat_ngram_size": 5}
    if ends:
        whole = generate(model.backbone, inputs, **options).sequences
        options["eos_token_id"] = whole[0, LENGTH + 13].item()
    plain = generate(model.backbone, inputs, **options).sequences
    output = generate(model, inputs, use_lmtp=True, **options, **DRAFTS[draft])
    assert output.sequences.tolist() == plain.tolist()
    if "planned" not in draft:  # which may find that rows seldom gain together
        assert max(length for row in output.acceptance_lengths for length in row) > 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("offsets", [(6,), (2, 6), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("context", [0, 2, "path"])
def test_heads_look_back_no_further_than_to_where_padding_was_dropped(context, offsets, cache):
    backbone = tiny_causal_lm("llama")
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=offsets, head_context=context)
    inputs = padded([(70,), (33,)], more=10)
    plain = generate(backbone, inputs, **GREEDY).sequences
    output = generate(model, inputs, use_lmtp=True, cache_implementation=cache, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("context", [2, "path"])
def test_heads_look_back_no_further_than_to_where_an_ended_row_s_slots_were(context):
    backbone = tiny_causal_lm("llama")
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 6), head_context=context)
    inputs = padded([PROMPTS[0], (70,)])
    ends = generate(backbone, inputs, **GREEDY).sequences[0, LENGTH].item()
    plain = generate(backbone, inputs, **GREEDY, eos_token_id=ends).sequences
    assert num_emitted(plain[:, LENGTH:], ends)[0] == 1 < plain.shape[1] - LENGTH
    output = generate(model, inputs, use_lmtp=True, **GREEDY, eos_token_id=ends)
    assert output.sequences.tolist() == plain.tolist()


def test_settings_may_stand_in_the_generation_config():
    config = GenerationConfig(use_lmtp=True, draft_length=2, **GREEDY)
    output = generate(wrapped("llama"), generation_config=config)
    assert output.sequences.tolist() == plain_texts("llama").tolist()
    assert [1 + sum(accepted) for accepted in output.acceptance_lengths] == [NEW_TOKENS] * NUM_ROWS
