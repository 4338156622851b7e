"""Rows of a batch that walk apart are distributed as plain samples are, and independent of each other.

Rows draw in another order than in plain decoding, so that their tokens cannot be compared one by one.
Instead the continuations of thousands of rows are counted, and held against exact probabilities: those
of plain forward passes over every possible prefix, put through the processors. A chi-square test fails
below p = 1e-4. There are 19 such tests, so that correct code would fail one of them for about one choice
of seeds in 500; the seeds are fixed, so that the outcome is the same every time.

Shapes: `N` rows, `V` vocabulary size, `T` new tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import tiny_causal_lm
from batches import padded
from torch.nn.functional import pad
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.drafting_lmtp import Candidates, Drafter
from modeling_lmtp.tree_lmtp import DraftTree

pytestmark = pytest.mark.slow  # thousands of samples

VOCAB, NEW_TOKENS, EOS, PAD = 7, 4, 6, 0
PROMPTS = ((3, 1, 4), (5,))
ROWS_PER_CALL, NUM_CALLS = 384, 2
THRESHOLD = 1e-4
RARE = 5  # what is expected less often is counted together

Texts = Counter[tuple[int, ...]]
Probabilities = dict[tuple[int, ...], float]


class StaticDrafter(Drafter):
    """Proposes the same tokens at every place: as children of the root, and of their own parents.

    Args:
        tokens: with all there are, a draft is always right.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        paths = [path for depth in (1, 2) for path in itertools.product(tokens, repeat=depth)]
        self.tree = DraftTree.from_paths(paths)

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        tree = self.tree.truncate(max_depth)
        tokens = input_ids.new_tensor(tree.ranks).repeat(len(input_ids), 1)
        return Candidates((tree,) * len(input_ids), tokens)


LOSSY = "leap heads, typical acceptance"
DRAFTS: dict[str, dict[str, Any]] = {
    "plain decoding": {},  # whether the test itself is right
    "every token drafted": {"use_lmtp": True, "drafter": StaticDrafter(range(VOCAB))},
    "some tokens drafted": {"use_lmtp": True, "drafter": StaticDrafter([1, 2, 5])},
    "leap heads": {"use_lmtp": True, "draft_nodes": 6},
    LOSSY: {"use_lmtp": True, "draft_length": 1, "acceptance_rule": "typical"},
}
# Options of `generate`, and what it makes of them
SETTINGS: dict[str, tuple[dict[str, Any], list[processors.LogitsProcessor]]] = {
    "bare": ({}, []),
    "temperature and top-k": (
        {"temperature": 1.6, "top_k": 4},
        [processors.TemperatureLogitsWarper(1.6), processors.TopKLogitsWarper(4)],
    ),
    "repetition penalty, temperature and top-p": (
        {"repetition_penalty": 1.8, "temperature": 2.0, "top_p": 0.9},
        [
            processors.RepetitionPenaltyLogitsProcessor(1.8),
            processors.TemperatureLogitsWarper(2.0),
            processors.TopPLogitsWarper(0.9),
        ],
    ),
    "an end and a temperature": (
        {"eos_token_id": EOS, "pad_token_id": PAD, "temperature": 1.5},
        [processors.TemperatureLogitsWarper(1.5)],
    ),
}


@pytest.fixture(scope="module")
def model() -> LMTPForCausalLM:
    backbone = tiny_causal_lm("llama", vocab_size=VOCAB, initializer_range=0.2)
    return LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3))


def sampled(model: LMTPForCausalLM, draft: str, setting: str) -> list[list[tuple[int, ...]]]:
    """Return many continuations of each prompt, neighbours in a batch beside each other."""
    samples: list[list[tuple[int, ...]]] = [[] for _ in PROMPTS]
    options = {"top_k": 0, **SETTINGS[setting][0], **DRAFTS[draft], "do_sample": True}
    for seed in range(NUM_CALLS):
        torch.manual_seed(seed)
        texts = model.generate(
            **padded(PROMPTS),
            **options,
            max_new_tokens=NEW_TOKENS,
            num_return_sequences=ROWS_PER_CALL,
        )
        emitted = texts[:, -NEW_TOKENS:].reshape(len(PROMPTS), ROWS_PER_CALL, NEW_TOKENS)
        for row, of_prompt in enumerate(emitted.tolist()):
            samples[row] += [tuple(text) for text in of_prompt]
    return samples


def counts_padding(model: LMTPForCausalLM) -> bool:
    """Whether this release of Transformers penalises padding as if it had been said (until 5.20)."""
    outputs = model.backbone.generate(
        torch.tensor([[PAD, 1]]),
        attention_mask=torch.tensor([[0, 1]]),
        repetition_penalty=2.0,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    return bool(outputs.scores[0][0, PAD] != outputs.logits[0][0, PAD])


@torch.no_grad()
def exact(model: LMTPForCausalLM, prompt: Sequence[int], setting: str) -> Probabilities:
    """Return the probability of every continuation, by plain passes over every prefix."""
    options, used = SETTINGS[setting]
    padding = max(map(len, PROMPTS)) - len(prompt) if counts_padding(model) else 0
    has_end = "eos_token_id" in options
    probabilities: Probabilities = {(): 1.0}
    for _ in range(NEW_TOKENS):
        prefixes = list(probabilities)
        input_ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        logits = model.backbone(input_ids).logits[:, -1]
        scores = LogitsProcessorList(used)(pad(input_ids, (padding, 0), value=PAD), logits)
        longer: Probabilities = {}
        for prefix, row in zip(prefixes, scores.softmax(dim=-1).tolist(), strict=True):
            if has_end and EOS in prefix:
                row = [float(token == PAD) for token in range(VOCAB)]
            for token, probability in enumerate(row):
                if probability > 0:
                    longer[(*prefix, token)] = probabilities[prefix] * probability
        probabilities = longer
    return probabilities


def p_value(counts: Counter[tuple[int, ...]], probabilities: Probabilities) -> float:
    """Pearson's chi-square test, rare outcomes pooled with those that begin like them."""
    total = sum(counts.values())
    assert counts.keys() <= probabilities.keys(), "what has no probability was drawn"
    bins = {outcome: (counts[outcome], total * p) for outcome, p in probabilities.items()}
    for length in reversed(range(len(next(iter(probabilities))))):
        pooled: dict[tuple[int, ...], tuple[int, float]] = {}
        for outcome, (observed, expected) in bins.items():
            key = outcome[:length] if expected < RARE else outcome
            so_far = pooled.get(key, (0, 0.0))
            pooled[key] = (so_far[0] + observed, so_far[1] + expected)
        bins = pooled
    rare = bins.pop((), (0, 0.0))
    if rare[1] >= 1:  # else too rare to matter, and no chi-square
        bins[()] = rare
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in bins.values())
    return chi_square_tail(statistic, len(bins) - 1)


def chi_square_tail(statistic: float, freedom: int) -> float:
    half = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half))


def test_the_tail_of_the_chi_square_distribution_is_the_tabulated_one():
    # The 5 % points of the tables
    for freedom, statistic in {1: 3.841, 10: 18.307, 100: 124.342}.items():
        assert chi_square_tail(statistic, freedom) == pytest.approx(0.05, rel=2e-3)


def p_value_of_continuations(model: LMTPForCausalLM, draft: str, setting: str) -> float:
    """Test what is drawn after all prompts together."""
    outcomes, probabilities = Counter(), {}
    for row, texts in enumerate(sampled(model, draft, setting)):
        outcomes.update((row, *text) for text in texts)
        for text, probability in exact(model, PROMPTS[row], setting).items():
            probabilities[(row, *text)] = probability / len(PROMPTS)
    return p_value(outcomes, probabilities)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("draft", [name for name in DRAFTS if name != LOSSY])
def test_continuations_are_as_frequent_as_they_are_probable(model, draft, setting):
    assert p_value_of_continuations(model, draft, setting) > THRESHOLD


def test_the_lossy_rule_is_told_from_plain_sampling(model):
    assert p_value_of_continuations(model, LOSSY, "bare") < THRESHOLD


@pytest.mark.parametrize("draft", ["plain decoding", "every token drafted", "some tokens drafted"])
def test_neighbours_in_a_batch_are_independent(model, draft):
    samples = sampled(model, draft, "bare")[0]
    single = Counter()
    for text, probability in exact(model, PROMPTS[0], "bare").items():
        single[text[1:3]] += probability
    pairs = Counter(
        (*one[1:3], *other[1:3]) for one, other in zip(samples[::2], samples[1::2], strict=True)
    )
    probabilities = {
        (*one, *other): single[one] * single[other] for one in single for other in single
    }
    assert p_value(pairs, probabilities) > THRESHOLD
