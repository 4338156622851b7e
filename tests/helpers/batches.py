"""Batches of prompts of different length, and comparisons with plain decoding of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, TREE, Oracle, Rule, sometimes
from transformers import Cache, LogitsProcessor, PreTrainedModel

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import Tier, decoding_support
from modeling_lmtp.transformers_lmtp import cache_of, with_cache
from modeling_lmtp.tree_lmtp import DraftTree

# On matrices this small, more threads only wait for each other.
torch.set_num_threads(1)

# In a batch they are padded by 0, 3 and 12
PROMPTS = (
    (3, 17, 5, 9, 44, 60, 2, 31, 8, 8, 8, 90, 14),
    (7, 23, 4, 50, 11, 80, 29, 6, 33, 12),
    (70,),
)
NUM_ROWS, LENGTH = len(PROMPTS), len(PROMPTS[0])
NEW_TOKENS = 30
# A recurrence over several tokens at once adds up in another order
TOLERANCES = {"qwen3_next": 1e-3}
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}


def padded(prompts: Sequence[Sequence[int]] = PROMPTS, more: int = 0) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, padded on the left; by `more` even the longest one."""
    width = max(map(len, prompts)) + more
    input_ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}


@functools.cache
def wrapped(architecture: str) -> LMTPForCausalLM:
    """Return a tiny model with leap heads; the same one every time, so leave it as it is."""
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), leap_offsets=(2, 3, 5))
    decoding_support(model.backbone)  # tried once per model, with passes of its own
    return model


@functools.cache
def plain_texts(architecture: str, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """Return plain decoding's texts of `PROMPTS`, which have no end; leave them as they are."""
    options = {"do_sample": False, "max_new_tokens": new_tokens}
    return generate(wrapped(architecture).backbone, **options).sequences


def slots_with_meaning(inputs: dict[str, torch.Tensor], num_slots: int) -> torch.Tensor:
    """Which slots of a returned cache are not padding before a prompt, `(B, num_slots)`."""
    mask = inputs["attention_mask"]
    return torch.cat([mask, mask.new_ones(len(mask), num_slots - mask.shape[1])], dim=-1)


# What a user adds in a second turn
SECOND_TURN = torch.tensor([[41, 42, 43], [51, 52, 53], [61, 62, 63]])
# Prompts of a first turn, by how much even the longest is padded, and where rows end in the second
NEW_TOKENS_ALONE = {
    "no padding": ([prompt[:4] for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0][5:])], 0, []),
    "all rows padded": (PROMPTS, 12, []),
    "the widest row ends first": ((PROMPTS[0], (31, 5), (70,)), 0, [(0, 1)]),
}


def new_tokens_alone(first: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return a second turn without the first one's tokens: the last, which the cache lacks, and new ones.

    Args:
        first: what the first turn returned.
        inputs: of the first turn.
    """
    width = first.sequences.shape[1] + SECOND_TURN.shape[1]
    return {
        "input_ids": torch.cat([first.sequences[:, -1:], SECOND_TURN], dim=-1),
        "attention_mask": slots_with_meaning(inputs, width),
        **with_cache({}, cache_of(first)),
    }


def largest_draft(model: LMTPForCausalLM) -> DraftTree:
    """Return `TREE` or `CHAIN`, whichever the model can verify."""
    return TREE if decoding_support(model.backbone).tier is Tier.TREE else CHAIN


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor] | None = None, **options: Any):
    """Generate from a seed of its own, and return all there is, unless told otherwise."""
    torch.manual_seed(4)
    inputs = padded() if inputs is None else inputs
    return model.generate(**inputs, **{"return_dict_in_generate": True, **options})


def leap(
    model: LMTPForCausalLM,
    texts: torch.Tensor,
    tree: DraftTree | None = None,
    right: Rule = sometimes,
    **options: Any,
):
    """Generate with an oracle that knows `texts` `(B, L)`."""
    drafter = Oracle(texts, largest_draft(model) if tree is None else tree, right)
    return generate(model, use_lmtp=True, drafter=drafter, **options)


class OwnProcessor(LogitsProcessor):
    """Not known to judge rows one by one, though it does, so that rows have to go in step."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(1, dims=-1)


def tokens_that_end(emitted: torch.Tensor, places: Sequence[tuple[int, int]]) -> list[int]:
    """Choose for each place, a row of what was emitted `(B, T)` and a step, a token ending this row.

    The row has it first near that step, counted from 0, and other rows do not have it.
    """
    texts, chosen = emitted.tolist(), []
    for row, step in places:
        others = {token for number, text in enumerate(texts) if number != row for token in text}
        own = texts[row]
        possible = [number for number, token in enumerate(own) if token not in others]
        firsts = [number for number in possible if own.index(own[number]) == number]
        chosen.append(own[min(firsts, key=lambda number, step=step: abs(number - step))])
    return chosen


def num_emitted(emitted: torch.Tensor, eos_token_id: int | Sequence[int] = ()) -> list[int]:
    """How many tokens each row of `(B, T)` has up to its end, that one included."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return [
        next((t for t, token in enumerate(row, start=1) if token in ends), len(row))
        for row in emitted.tolist()
    ]


def assert_close(own: torch.Tensor, other: torch.Tensor, architecture: str) -> None:
    tolerance = TOLERANCES.get(architecture, 1e-4)
    torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


def assert_same_cache(
    ours: Cache, plain: Cache, attention_mask: torch.Tensor, architecture: str
) -> None:
    """Compare all that two caches hold in slots that mean something, by `attention_mask` `(B, W)`."""
    assert ours.get_seq_length() == plain.get_seq_length() == attention_mask.shape[1]
    for own, other in zip(ours.layers, plain.layers, strict=True):
        assert type(own) is type(other)
        for name in ("keys", "values"):
            states, expected = getattr(own, name, None), getattr(other, name, None)
            if not torch.is_tensor(expected):
                continue
            assert states.shape == expected.shape
            seen = attention_mask[:, None, -expected.shape[-2] :, None].bool()
            assert_close(states * seen, expected * seen, architecture)
        for name in ("conv_states", "recurrent_states"):
            for index, expected in getattr(other, name, {}).items():
                if expected is not None:
                    assert_close(getattr(own, name)[index], expected, architecture)
        for name in ("cumulative_length", "record_past"):
            assert getattr(own, name, None) == getattr(other, name, None)


def assert_same_steps(
    ours: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    lengths: Sequence[int],
    architecture: str = "llama",
) -> None:
    """Compare a tensor per step, `(B, …)`: plain decoding's up to a row's length, 0 after it."""
    assert len(ours) == len(plain) == max(lengths)
    for step, (states, expected) in enumerate(zip(ours, plain, strict=True)):
        assert states.shape == expected.shape
        assert states.dtype == expected.dtype
        alive = torch.tensor([step < length for length in lengths])
        alive = alive.view(-1, *[1] * (expected.ndim - 1))
        expected = expected.masked_fill(~alive, 0)
        assert_close(states, expected, architecture)


def assert_same_states(
    ours: Sequence[Sequence[torch.Tensor]],
    plain: Sequence[Sequence[torch.Tensor]],
    lengths: Sequence[int],
    architecture: str = "llama",
) -> None:
    """Compare a tensor per layer and step, like `assert_same_steps`."""
    assert [len(layers) for layers in ours] == [len(layers) for layers in plain]
    for own, other in zip(zip(*ours, strict=True), zip(*plain, strict=True), strict=True):
        assert_same_steps(own, other, lengths, architecture)
