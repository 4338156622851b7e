"""In a batch, processors, criteria and streamers work as in plain decoding, row-wise or not."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import (
    GREEDY,
    LENGTH,
    NEW_TOKENS,
    PROMPTS,
    OwnProcessor,
    assert_same_steps,
    generate,
    leap,
    num_emitted,
    padded,
    plain_texts,
    tokens_that_end,
    wrapped,
)
from drafters import RULES, TREE, always
from tiny import tiny_llama, tiny_tokenizer
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import logits_process as processors
from transformers.generation.streamers import BaseStreamer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.selection_lmtp import ROW_WISE_PROCESSORS

SAMPLE = {"do_sample": True, "max_new_tokens": 24}
EVEN_TOKENS = list(range(0, 96, 2))
END_NOW_AND_THEN = {"eos_token_id": list(range(0, 96, 8))}

every_rule = pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())


@pytest.fixture(scope="module")
def model() -> LMTPForCausalLM:
    return wrapped("llama")


def own(processor: LogitsProcessor) -> dict[str, list[LogitsProcessor]]:
    """Options by which greedy search, too, uses what Transformers has for sampling."""
    return {"logits_processor": [processor]}


ROW_WISE: dict[type[LogitsProcessor], Callable[[], dict[str, Any]]] = {
    processors.EpsilonLogitsWarper: lambda: own(processors.EpsilonLogitsWarper(0.05)),
    processors.EtaLogitsWarper: lambda: own(processors.EtaLogitsWarper(0.05)),
    processors.ExponentialDecayLengthPenalty: lambda: {
        **{"exponential_decay_length_penalty": (4, 1.7), **END_NOW_AND_THEN},
    },
    processors.ForcedBOSTokenLogitsProcessor: lambda: {"forced_bos_token_id": 7},
    processors.ForcedEOSTokenLogitsProcessor: lambda: {"forced_eos_token_id": 9},
    processors.InfNanRemoveLogitsProcessor: lambda: {"remove_invalid_values": True},
    processors.LogitNormalization: lambda: {"renormalize_logits": True},
    processors.MinLengthLogitsProcessor: lambda: {"min_length": LENGTH + 9, **END_NOW_AND_THEN},
    processors.MinNewTokensLengthLogitsProcessor: lambda: {
        **{"min_new_tokens": 9, **END_NOW_AND_THEN},
    },
    processors.MinPLogitsWarper: lambda: own(processors.MinPLogitsWarper(0.2)),
    processors.NoBadWordsLogitsProcessor: lambda: {
        "bad_words_ids": [*([token] for token in EVEN_TOKENS), [7, 9]],
    },
    processors.NoRepeatNGramLogitsProcessor: lambda: {"no_repeat_ngram_size": 1},
    processors.RepetitionPenaltyLogitsProcessor: lambda: {"repetition_penalty": 1.7},
    processors.SequenceBiasLogitsProcessor: lambda: {
        "sequence_bias": [[[12], 9.0], [[12, 12], -99.0]],
    },
    processors.SuppressTokensAtBeginLogitsProcessor: lambda: {"begin_suppress_tokens": EVEN_TOKENS},
    processors.SuppressTokensLogitsProcessor: lambda: {"suppress_tokens": EVEN_TOKENS},
    processors.TemperatureLogitsWarper: lambda: own(processors.TemperatureLogitsWarper(0.5)),
    processors.TopKLogitsWarper: lambda: own(processors.TopKLogitsWarper(2)),
    processors.TopPLogitsWarper: lambda: own(processors.TopPLogitsWarper(0.4)),
    processors.TypicalLogitsWarper: lambda: own(processors.TypicalLogitsWarper(0.3)),
}


def test_every_row_wise_processor_is_tested():
    assert set(ROW_WISE) == set(ROW_WISE_PROCESSORS)


@pytest.mark.parametrize("kind", ROW_WISE, ids=lambda kind: kind.__name__)
def test_row_wise_processors_see_the_prefix_of_each_row_s_token(model, kind):
    acts_on_one_token = kind is processors.ForcedBOSTokenLogitsProcessor
    inputs = padded([prompt[:1] for prompt in PROMPTS] if acts_on_one_token else PROMPTS)
    options = {"inputs": inputs, "do_sample": False, "max_new_tokens": 24, "output_scores": True}
    plain = generate(model.backbone, **options, **ROW_WISE[kind]())
    output = leap(model, plain.sequences, **options, **ROW_WISE[kind]())
    assert output.sequences.tolist() == plain.sequences.tolist()
    emitted = plain.sequences[:, inputs["input_ids"].shape[1] :]
    lengths = num_emitted(emitted, ROW_WISE[kind]().get("eos_token_id", ()))
    assert_same_steps(output.scores, plain.scores, lengths)
    assert (
        len({tuple(row) for row in output.acceptance_lengths}) > 1
    )  # rows accepted different lengths
    if kind is not processors.InfNanRemoveLogitsProcessor:
        bare = generate(model.backbone, **options).scores
        assert any(not torch.equal(*steps) for steps in zip(plain.scores, bare, strict=False))


@every_rule
def test_row_wise_processors_may_be_combined(model, right):
    options = {"repetition_penalty": 1.4, "min_new_tokens": 12, "no_repeat_ngram_size": 2}
    options |= {**GREEDY, **END_NOW_AND_THEN}
    plain = generate(model.backbone, **options).sequences
    assert len(set(num_emitted(plain[:, LENGTH:], **END_NOW_AND_THEN))) > 1
    output = leap(model, plain, right=right, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert (max(map(max, output.acceptance_lengths)) == 5) == (right is not RULES["never right"])


class Recorder(LogitsProcessor):
    """Remembers what it was asked, and gives the tokens new scores by the number of the question."""

    def __init__(self) -> None:
        self.prefixes: list[list[list[int]]] = []
        self.shapes: list[torch.Size] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prefixes.append(input_ids.tolist())
        self.shapes.append(scores.shape)
        # Rows depend on each other, too
        return scores.roll(len(self.prefixes) + int(input_ids[:, -1].sum()), dims=-1)


@every_rule
@pytest.mark.parametrize("base", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
def test_a_processor_of_one_s_own_gets_plain_decoding_s_calls(model, ends, base, right):
    options = {**base, **END_NOW_AND_THEN} if ends else base
    plain_recorder, recorder = Recorder(), Recorder()
    plain = generate(model.backbone, logits_processor=[plain_recorder], **options).sequences
    output = leap(model, plain, right=right, logits_processor=[recorder], **options)
    assert output.sequences.tolist() == plain.tolist()
    assert recorder.prefixes == plain_recorder.prefixes
    assert recorder.shapes == plain_recorder.shapes
    if ends:
        assert len(set(num_emitted(plain[:, LENGTH:], **END_NOW_AND_THEN))) > 1


def allowed_tokens(batch_id: int, tokens: torch.Tensor) -> list[int]:
    """Each row has tokens of its own."""
    return list(range(batch_id, 96, 2 + batch_id + int(tokens[-1]) % 3))


IN_STEP = {
    "prefix constraint": {"prefix_allowed_tokens_fn": allowed_tokens},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=5.0)},
    "watermark by oneself": {
        "watermarking_config": WatermarkingConfig(bias=5.0, seeding_scheme="selfhash"),
    },
    "SynthID watermark": {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[5, 7, 11], ngram_len=3),
    },
    "classifier-free guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
@pytest.mark.parametrize("base", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("options", IN_STEP.values(), ids=IN_STEP.keys())
def test_other_processors_give_plain_tokens_from_the_same_seed(model, options, base, ends):
    bare = generate(model.backbone, **base).sequences
    options = {**base, **options}
    if ends:
        options |= END_NOW_AND_THEN
    plain = generate(model.backbone, **options).sequences
    state_after_plain = torch.get_rng_state()
    assert plain.tolist() != bare[:, : plain.shape[1]].tolist()
    output = leap(model, plain, right=always, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert torch.equal(torch.get_rng_state(), state_after_plain)
    # In step: the rows that are still going get the same number of tokens
    longest = max(output.acceptance_lengths, key=sum)
    for accepted in output.acceptance_lengths:
        assert accepted[:-1] == longest[: len(accepted) - 1 if accepted else 0]


class StopsPerRow(StoppingCriteria):
    """Remembers what it was asked, and stops each row at its own token, for one step."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)
        self.asked: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.asked.append(input_ids.tolist())
        return input_ids[:, -1] == self.tokens


@every_rule
@pytest.mark.parametrize("has_eos", [False, True], ids=["rows go on", "rows are padded"])
def test_a_criterion_of_one_s_own_stops_rows_as_in_plain_decoding(model, has_eos, right):
    whole = plain_texts("llama")
    stops = tokens_that_end(whole[:, LENGTH:], [(0, 3), (1, 9), (2, 17)])
    options = {**GREEDY, "eos_token_id": 95} if has_eos else GREEDY
    plain_criterion, criterion = StopsPerRow(stops), StopsPerRow(stops)
    plain = generate(
        model.backbone, stopping_criteria=StoppingCriteriaList([plain_criterion]), **options
    ).sequences
    assert LENGTH + 4 < plain.shape[1] < LENGTH + NEW_TOKENS
    # Without an id that ends rows, plain decoding goes on with all of them
    assert (plain.tolist() == whole[:, : plain.shape[1]].tolist()) == (not has_eos)
    output = leap(
        model,
        whole,
        right=right,
        stopping_criteria=StoppingCriteriaList([criterion]),
        **options,
    )
    assert output.sequences.tolist() == plain.tolist()
    assert criterion.asked == plain_criterion.asked


@every_rule
@pytest.mark.parametrize("has_eos", [False, True], ids=["rows go on", "rows are padded"])
def test_stop_strings_end_rows_as_in_plain_decoding(has_eos, right):
    tokenizer = tiny_tokenizer()
    backbone = tiny_llama(len(tokenizer), eos_token_id=None)
    model = LMTPForCausalLM.from_backbone(backbone)
    options = {**GREEDY, "tokenizer": tokenizer}
    if has_eos:
        options["eos_token_id"] = len(tokenizer) - 1
    whole = generate(backbone, **GREEDY).sequences
    texts = [[tokenizer.decode(token) for token in row[LENGTH:]] for row in whole]
    strings = [
        next(text for text in row[4 + 6 * number :] if text.isascii() and text.isprintable())
        for number, row in enumerate(texts)
    ]
    plain = generate(backbone, stop_strings=strings, **options).sequences
    assert plain.shape[1] < whole.shape[1]
    assert (plain.tolist() == whole[:, : plain.shape[1]].tolist()) == (not has_eos)
    output = leap(model, whole, TREE, right, stop_strings=strings, **options)
    assert output.sequences.tolist() == plain.tolist()


class Recording(BaseStreamer):
    def __init__(self) -> None:
        self.received: list[object] = []

    def put(self, value: torch.Tensor) -> None:
        self.received.append((value.dtype, value.tolist()))

    def end(self) -> None:
        self.received.append("end")


@every_rule
@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_a_streamer_that_takes_batches_gets_plain_decoding_s_calls(model, options, ends, right):
    if ends:
        options = {**options, **END_NOW_AND_THEN}
    plain_stream, stream = Recording(), Recording()
    plain = generate(model.backbone, streamer=plain_stream, **options).sequences
    output = leap(model, plain, right=right, streamer=stream, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert stream.received == plain_stream.received
    assert len(stream.received) == 1 + plain.shape[1] - LENGTH + 1


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "bloom", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("ends", [False, True], ids=["to the length", "with ends"])
def test_samples_in_step_are_plain_samples(architecture, ends):
    model, options = wrapped(architecture), {**SAMPLE, **own(OwnProcessor())}
    if ends:
        options |= {"eos_token_id": list(range(16))}
    plain = generate(model.backbone, **options).sequences
    output = leap(model, plain, right=always, **options)
    assert output.sequences.tolist() == plain.tolist()
    assert max(length for row in output.acceptance_lengths for length in row) > 1


@pytest.mark.parametrize("architecture", ["qwen3_next", "roformer"])
def test_rows_that_cannot_be_aligned_are_sampled_as_plainly(architecture):
    model = wrapped(architecture)
    plain = generate(model.backbone, **SAMPLE).sequences
    output = leap(model, plain, right=always, **SAMPLE)
    assert output.sequences.tolist() == plain.tolist()


@every_rule
def test_time_that_is_up_ends_all_rows_together(model, right, monkeypatch):
    def after_calls(number: int) -> None:
        clock = itertools.chain(itertools.repeat(0.0, number), itertools.repeat(9.0))
        monkeypatch.setattr(time, "time", lambda: next(clock))

    after_calls(8)
    options = {**GREEDY, "max_time": 5.0}
    plain = generate(model.backbone, **options).sequences
    assert LENGTH + 1 < plain.shape[1] < LENGTH + NEW_TOKENS
    after_calls(8)
    whole = plain_texts("llama")
    output = leap(model, whole, right=right, **options).sequences
    # How far they get is a matter of time, but no row is padded that has not ended
    assert LENGTH + 1 <= output.shape[1] < LENGTH + NEW_TOKENS
    assert output.tolist() == whole[:, : output.shape[1]].tolist()
