"""Everything that `generate` offers works as in plain decoding: stops, processors, streams, outputs."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, RULES, TREE, Oracle
from tiny import tiny_llama, tiny_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import decoding_support
from modeling_lmtp.transformers_lmtp import cache_of, with_cache

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])
LENGTH = PROMPT.shape[1]
GREEDY = {"do_sample": False, "max_new_tokens": 24}
SAMPLE = {"do_sample": True, "max_new_tokens": 24}
SHAPES = {"chain": CHAIN, "tree": TREE}

both_shapes = pytest.mark.parametrize("tree", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(scope="module")
def model() -> LMTPForCausalLM:
    return LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3, 5))


def generate(model: PreTrainedModel, prompt: torch.Tensor = PROMPT, **options):
    options = {"attention_mask": torch.ones_like(prompt), **options}
    torch.manual_seed(4)
    return model.generate(prompt, return_dict_in_generate=True, **options)


def assert_same_tokens(model: LMTPForCausalLM, tree=TREE, **options):
    """Compare with plain decoding, drafting with an oracle and with the heads; return the first."""
    plain = generate(model.backbone, **options)
    drafter = Oracle(plain.sequences, tree, RULES["sometimes"])
    ours = generate(model, use_lmtp=True, drafter=drafter, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    with_heads = generate(model, use_lmtp=True, **options)
    assert with_heads.sequences.tolist() == plain.sequences.tolist()
    return plain, ours


@both_shapes
@pytest.mark.parametrize("position", range(1, 9))
def test_the_end_of_sequence_ends_an_accepted_draft(model, tree, position):
    plain = generate(model.backbone, **GREEDY).sequences
    eos_token_id = plain[0, LENGTH + position].item()
    options = {**GREEDY, "eos_token_id": eos_token_id}
    expected = generate(model.backbone, **options).sequences
    assert expected.shape[1] < plain.shape[1]
    # The oracle goes on beyond the end, as a drafter may
    output = generate(model, use_lmtp=True, drafter=Oracle(plain, tree), **options)
    assert output.sequences.tolist() == expected.tolist()
    assert 1 + sum(output.acceptance_lengths[0]) == expected.shape[1] - LENGTH


@both_shapes
def test_any_of_several_end_of_sequence_tokens_ends_it(model, tree):
    plain = generate(model.backbone, **GREEDY).sequences[0].tolist()
    eos_token_id = [plain[-2], plain[LENGTH + 7], 95]
    shortened, _ = assert_same_tokens(model, tree, eos_token_id=eos_token_id, **GREEDY)
    assert shortened.sequences.shape[1] < len(plain)


def test_a_total_length_bounds_prompt_and_draft(model):
    for max_length in range(LENGTH + 1, LENGTH + 9):
        plain, _ = assert_same_tokens(model, max_length=max_length, do_sample=False)
        assert plain.sequences.shape[1] == max_length


PROCESSORS = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "minimum length": {"min_new_tokens": 9, "eos_token_id": list(range(0, 96, 2))},
    "banned tokens": {"suppress_tokens": list(range(48))},
    "bias": {"sequence_bias": [[[12], 9.0], [[12, 12], -99.0]]},
    "forced end": {"forced_eos_token_id": 9},
    "watermark": {"watermarking_config": WatermarkingConfig(seeding_scheme="selfhash")},
    "classifier-free guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("base", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_processors_see_the_prefix_of_each_token(model, base, options):
    plain, ours = assert_same_tokens(model, **base, **options)
    assert plain.sequences.tolist() != generate(model.backbone, **base).sequences.tolist()
    assert max(ours.acceptance_lengths[0]) > 2


def test_a_processor_of_one_s_own_is_asked_once_per_token(model):
    class Recorder(LogitsProcessor):
        def __init__(self) -> None:
            self.prefixes: list[list[int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.prefixes.append(input_ids[0].tolist())
            return scores.roll(input_ids.shape[1], dims=-1)  # depends on the prefix

    plain_recorder, recorder = Recorder(), Recorder()
    plain = generate(model.backbone, logits_processor=[plain_recorder], **GREEDY).sequences
    drafter = Oracle(plain, TREE)
    output = generate(model, use_lmtp=True, drafter=drafter, logits_processor=[recorder], **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert recorder.prefixes == plain_recorder.prefixes
    assert max(output.acceptance_lengths[0]) == 5


class StopsAtCall(StoppingCriteria):
    """Remembers what it was asked, and stops at the tenth question."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.asked.append(input_ids[0].tolist())
        return torch.full((input_ids.shape[0],), len(self.asked) == 10)


def test_a_criterion_of_one_s_own_is_asked_once_per_token(model):
    whole = generate(model.backbone, **GREEDY).sequences
    plain_criterion, criterion = StopsAtCall(), StopsAtCall()
    plain = generate(
        model.backbone, stopping_criteria=StoppingCriteriaList([plain_criterion]), **GREEDY
    )
    output = generate(
        model,
        use_lmtp=True,
        drafter=Oracle(whole, TREE),
        stopping_criteria=StoppingCriteriaList([criterion]),
        **GREEDY,
    )
    assert (
        output.sequences.tolist() == plain.sequences.tolist() == [whole[0, : LENGTH + 10].tolist()]
    )
    assert criterion.asked == plain_criterion.asked


@pytest.mark.parametrize("in_config", [False, True], ids=["argument", "generation_config"])
def test_a_stop_string_ends_a_draft(in_config):
    tokenizer = tiny_tokenizer()
    model = LMTPForCausalLM.from_backbone(tiny_llama(len(tokenizer), eos_token_id=None))
    whole = generate(model.backbone, **GREEDY).sequences
    texts = [tokenizer.decode(token) for token in whole[0, LENGTH + 6 :]]
    text = next(text for text in texts if text.isascii() and text.isprintable())
    if in_config:
        options = {"generation_config": GenerationConfig(stop_strings=[text], **GREEDY)}
    else:
        options = {"stop_strings": [text], **GREEDY}
    plain = generate(model.backbone, tokenizer=tokenizer, **options).sequences
    assert plain.shape[1] < whole.shape[1]
    output = generate(model, use_lmtp=True, drafter=Oracle(whole), tokenizer=tokenizer, **options)
    assert output.sequences.tolist() == plain.tolist()


class Recording(BaseStreamer):
    def __init__(self) -> None:
        self.received: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.received.append(value.tolist())

    def end(self) -> None:
        self.received.append("end")


@both_shapes
@pytest.mark.parametrize("options", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_a_streamer_receives_prompt_tokens_in_order_and_end(model, tree, options):
    plain_stream, stream = Recording(), Recording()
    plain = generate(model.backbone, streamer=plain_stream, **options).sequences
    drafter = Oracle(plain, tree, RULES["sometimes"])
    generate(model, use_lmtp=True, drafter=drafter, streamer=stream, **options)
    assert stream.received == plain_stream.received
    tokens = [[token] for token in plain[0, LENGTH:].tolist()]
    assert stream.received == [PROMPT.tolist(), *tokens, "end"]


def test_what_is_given_by_position_is_what_it_is_by_name(model):
    plain_stream, stream = Recording(), Recording()
    generate(model.backbone, streamer=plain_stream, **GREEDY)
    before = [PROMPT, None, None, None, None, None, None]  # all that Transformers takes before it
    model.generate(*before, stream, use_lmtp=True, **GREEDY)
    assert stream.received == plain_stream.received
    with pytest.raises(ValueError, match="cannot be combined with"):
        model.generate(*before[:-1], model.backbone, use_lmtp=True, **GREEDY)


@both_shapes
@pytest.mark.parametrize("options", [GREEDY, {**SAMPLE, "top_k": 9}], ids=["greedy", "sample"])
def test_scores_and_logits_are_plain_decoding_s(model, tree, options):
    options = {**options, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, ours = assert_same_tokens(model, tree, **options)
    assert len(ours.scores) == len(ours.logits) == 24
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-4, atol=1e-4)


def test_a_tensor_is_returned_unless_a_dict_is_asked_for(model):
    ours = model.generate(PROMPT, use_lmtp=True, **GREEDY)
    assert ours.tolist() == model.backbone.generate(PROMPT, **GREEDY).tolist()


@pytest.mark.parametrize("use_lmtp", [False, True], ids=["plainly", "leaping"])
@pytest.mark.parametrize("max_new_tokens", [21, 23])
@pytest.mark.parametrize(
    ("architecture", "tree"),
    [
        *[("llama", TREE), ("gpt2", CHAIN), ("mistral", CHAIN), ("gemma2", TREE), ("lfm2", CHAIN)],
        *[("llama4_text", TREE), ("qwen3_next", CHAIN), ("falcon_h1", CHAIN)],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_returned_cache_goes_on_where_the_call_ended(
    architecture, tree, max_new_tokens, use_lmtp
):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), leap_offsets=(2, 3, 5))
    whole = generate(model.backbone, do_sample=False, max_new_tokens=40).sequences
    begun = generate(
        model,
        use_lmtp=True,
        drafter=Oracle(whole, tree, RULES["sometimes"]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    # As after plain decoding, the last token is not in it yet
    assert cache_of(begun).get_seq_length() == LENGTH + max_new_tokens - 1
    continued = generate(
        model,
        begun.sequences,
        **with_cache({}, cache_of(begun)),
        use_lmtp=use_lmtp,
        do_sample=False,
        max_new_tokens=40 - max_new_tokens,
    )
    assert continued.sequences.tolist() == whole.tolist()


class Cancelling(Recording):
    """Ends the call at a token."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.received) == 1 + self.num_tokens:  # the prompt is put first
            raise KeyboardInterrupt


class Failing(LogitsProcessor):
    """Fails at a token."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == LENGTH + self.num_tokens:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("by", ["streamer", "processor"])
@pytest.mark.parametrize("num_tokens", [1, 6, 7, 8, 20])
@pytest.mark.parametrize(
    ("architecture", "tree", "kind"),
    [
        *[("llama", TREE, "dynamic"), ("llama", TREE, "static"), ("mistral", CHAIN, "dynamic")],
        *[
            ("gemma2", TREE, "dynamic"),
            ("lfm2", CHAIN, "dynamic"),
            ("qwen3_next", CHAIN, "dynamic"),
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cancelled_call_leaves_a_cache_to_go_on_from(architecture, tree, kind, num_tokens, by):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), leap_offsets=(2, 3, 5))
    whole = generate(model.backbone, do_sample=False, max_new_tokens=40).sequences
    cache = DynamicCache(config=model.backbone.config)
    if kind == "static":
        cache = StaticCache(config=model.backbone.config, max_cache_len=LENGTH + 40 + 13)
    drafter = Oracle(whole, tree, RULES["sometimes"])
    drafter.max_nodes = tree.num_nodes
    end = {"streamer": Cancelling(num_tokens)}
    if by == "processor":
        end = {"logits_processor": LogitsProcessorList([Failing(num_tokens)])}
    options = {"do_sample": False, **with_cache({}, cache)}
    with pytest.raises(KeyboardInterrupt):
        generate(model, use_lmtp=True, drafter=drafter, max_new_tokens=40, **end, **options)
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert "GrowingLayer" not in kinds
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    known = whole[:, : LENGTH + num_tokens]
    rest = generate(model.backbone, known, max_new_tokens=40 - num_tokens, **options)
    assert rest.sequences.tolist() == whole.tolist()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_the_returned_cache_forgets_as_a_plain_one_does(architecture):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture))

    def slots(use_lmtp: bool) -> list[int]:
        output = generate(model, use_lmtp=use_lmtp, do_sample=False, max_new_tokens=30)
        cache = cache_of(output)
        continued = {**with_cache({}, cache), "do_sample": False, "max_new_tokens": 3}
        generate(model.backbone, output.sequences, **continued)
        return [layer.keys.shape[-2] for layer in cache.layers]

    assert slots(use_lmtp=True) == slots(use_lmtp=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
def test_padding_before_the_prompt_is_not_seen(architecture):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), leap_offsets=(2, 3, 5))
    prompt, mask = torch.tensor([[0, 0, 3, 17, 5]]), torch.tensor([[0, 0, 1, 1, 1]])
    plain = generate(model.backbone, prompt, attention_mask=mask, **GREEDY).sequences
    drafter = Oracle(plain, TREE, RULES["sometimes"])
    output = generate(model, prompt, attention_mask=mask, use_lmtp=True, drafter=drafter, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    unpadded = generate(model.backbone, prompt[:, 2:], **GREEDY).sequences
    assert plain[:, 2:].tolist() == unpadded.tolist()


@pytest.mark.parametrize("prefill_chunk_size", [1, 2, 3, 5, 9])
def test_a_prompt_may_be_prefilled_in_chunks(model, prefill_chunk_size):
    assert_same_tokens(model, prefill_chunk_size=prefill_chunk_size, **GREEDY)


def drafted_depths(model: LMTPForCausalLM, **options) -> set[int]:
    """How many tokens each pass after the first adds to the cache at once."""
    sizes = set()
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: sizes.add(args[0].shape[1])
    )
    decoding_support(model.backbone)  # with a hook, it is tried again
    sizes.clear()
    generate(model, do_sample=False, max_new_tokens=4, **options)
    handle.remove()
    return sizes - {LENGTH}


def test_settings_may_stand_in_the_generation_config():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3, 4))
    generate(model, use_lmtp=True, max_new_tokens=1)  # so that what fits is found out
    assert drafted_depths(model) == {1}
    model.generation_config.use_lmtp = True
    model.generation_config.draft_length = 3
    assert drafted_depths(model) == {3, 2, 1}  # three candidates do not fit into four tokens
    assert drafted_depths(model, use_lmtp=False) == {1}
    model.generation_config.draft_length = 1
    assert drafted_depths(model) == {2, 1}
    assert drafted_depths(model, draft_length=0) == {1}
    assert 6 in drafted_depths(model, draft_tree=[(r,) for r in range(5)])
    one_call = GenerationConfig(use_lmtp=True, draft_tree=[(r,) for r in range(6)])
    assert 7 in drafted_depths(model, generation_config=one_call)
    assert drafted_depths(model, generation_config=one_call, draft_length=0) == {1}
    assert drafted_depths(model) == {2, 1}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_texts_have_plain_decoding_s_kind_of_integers(model, dtype):
    plain = generate(model.backbone, PROMPT.to(dtype), **GREEDY).sequences
    ours = generate(model, PROMPT.to(dtype), use_lmtp=True, **GREEDY).sequences
    assert ours.dtype == plain.dtype
    assert ours.tolist() == plain.tolist()
