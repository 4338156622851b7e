"""Finds where L-MTP's text differs from plain decoding's, and tells a near-tie from an error.

A backbone pass over several tokens rounds differently from passes over one. If the two best logits are
closer than that rounding, either token may win; any other difference is an error.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_lmtp.cache_lmtp import new_cache
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import Tier, decoding_tier
from modeling_lmtp.transformers_lmtp import forward_parameters, forward_with_cache

NO_ROUNDING = 1e-2  # of a logit: it changes one sampled token in hundreds
SAFETY = 2.0  # rounding may move the two logits in opposite directions


@dataclass(frozen=True)
class Divergence:
    """One token that differs, after the same tokens before it.

    Args:
        position: how many new tokens agree before it.
        top_two_gap: the plain model's best logit minus its second best there.
        rounding: the largest change of any logit there with the number of tokens in the pass, but at
            least the last digit of the best one.
        is_sampled: whether the tokens were sampled; the gap then says nothing about how close it was.
    """

    position: int
    top_two_gap: float
    rounding: float
    is_sampled: bool = False

    @property
    def is_error(self) -> bool:
        """Whether rounding cannot explain the difference; for a sampled token, whether rounding is tiny."""
        if self.is_sampled:
            return self.rounding < NO_ROUNDING
        return self.top_two_gap > SAFETY * self.rounding


@torch.no_grad()
def judge(
    model: LMTPForCausalLM,
    prompt: torch.Tensor,
    plain_ids: list[int],
    positions: Collection[int],
    is_sampled: bool = False,
) -> dict[int, Divergence]:
    """Judge the tokens at some positions of a plain text, by plain decoding's logits and those of one pass.

    Plain decoding reads the last known token alone, after a cache; the tokens before it are read together,
    and once for all positions if the backbone can read several tokens after a cache.

    Args:
        model: its backbone judges.
        prompt: `(1, L)`.
        plain_ids: the new tokens of plain decoding.
        positions: how many of them are known at each token to judge.
        is_sampled: whether they were sampled.
    """
    text = _extend(prompt, plain_ids[: max(positions)])
    together = model(input_ids=text).logits[0]
    cache, num_cached = new_cache(model.config), 0
    continues = decoding_tier(model.backbone) is Tier.TREE
    takes_number = "logits_to_keep" in forward_parameters(model.backbone)
    unread = (
        {"logits_to_keep": 1} if takes_number else {}
    )  # those of a long text take as long as it
    found = {}
    for position in sorted(set(positions)):
        if not continues:
            cache, num_cached = new_cache(model.config), 0
        last = prompt.shape[1] + position - 1
        before = text[:, num_cached:last]
        if before.shape[1]:
            forward_with_cache(model.backbone, cache, input_ids=before, **unread)
        alone = forward_with_cache(model.backbone, cache, input_ids=text[:, last : last + 1])
        num_cached = last + 1
        found[position] = _divergence(position, alone.logits[0, -1], together[last], is_sampled)
    return found


def _divergence(
    position: int, alone: torch.Tensor, together: torch.Tensor, is_sampled: bool
) -> Divergence:
    """Compare the logits `(V,)` of a token in a pass by itself and in a pass over the text."""
    plain = alone.float()
    best, second = plain.topk(2).values.tolist()
    # These two passes may agree by chance, but no logit is more precise than its last digit
    last_digit = torch.finfo(alone.dtype).eps * abs(best)
    rounding = max(float((plain - together.float()).abs().max()), last_digit)
    return Divergence(position, best - second, rounding, is_sampled)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens agree before two texts differ, or before the shorter one ends."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def first_divergence(
    model: LMTPForCausalLM,
    prompt: torch.Tensor,
    plain_ids: list[int],
    lmtp_ids: list[int],
    is_sampled: bool = False,
) -> Divergence:
    """Judge the first token that differs after the prompt `(1, L)`."""
    position = first_difference(plain_ids, lmtp_ids)
    return judge(model, prompt, plain_ids, [position], is_sampled)[position]


def divergences(
    model: LMTPForCausalLM,
    prompt: torch.Tensor,
    plain_ids: list[int],
    lmtp_ids: list[int],
    **options: Any,
) -> list[Divergence]:
    """Find every token that L-MTP would decide differently along plain decoding's greedy text.

    After each difference it continues from the plain text, so that one near-tie counts as one token.

    Args:
        model: the checkpoint.
        prompt: `(1, L)`.
        plain_ids: the new tokens of plain decoding.
        lmtp_ids: the new tokens of L-MTP.
        options: the draft's options and those common to both calls, without `max_new_tokens`.
    """
    positions = []
    start = 0
    while lmtp_ids != plain_ids[start:]:
        position = start + first_difference(plain_ids[start:], lmtp_ids)
        positions.append(position)
        start = position + 1
        if start >= len(plain_ids):
            break
        known = _extend(prompt, plain_ids[:start])
        output = model.generate(
            known,
            attention_mask=torch.ones_like(known),
            max_new_tokens=len(plain_ids) - start,
            use_lmtp=True,
            **options,
        )
        lmtp_ids = output[0, known.shape[1] :].tolist()
    return list(judge(model, prompt, plain_ids, positions).values()) if positions else []


def _extend(prompt: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    return torch.cat([prompt, prompt.new_tensor([token_ids])], dim=-1)
