"""Finds where L-MTP's text differs from plain decoding's, and tells a near-tie from an error.

A backbone pass over several tokens rounds differently from passes over one. If the two best logits are
closer than that rounding, either token may win; any other difference is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_lmtp.cache_lmtp import new_cache
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import forward_parameters, forward_with_cache

NO_ROUNDING = 1e-2  # of a logit: it changes one sampled token in hundreds
SAFETY = 2.0  # rounding may move the two logits in opposite directions
NUM_ALONE = 8  # tokens that are read one by one


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
    model: LMTPForCausalLM, known: torch.Tensor, position: int, is_sampled: bool = False
) -> Divergence:
    """Judge the token after `known` `(1, L)` by plain decoding's logits and those of one pass.

    Plain decoding reads one token at a time, after a cache. Here it reads the last `NUM_ALONE` tokens so,
    because rounding adds up in the cache, and one pass those before them: a verdict depends on the text
    alone. Passes over several tokens after a cache are not asked, because they may be what is wrong.
    """
    cache = new_cache(model.config)
    takes_number = "logits_to_keep" in forward_parameters(model.backbone)
    unread = (
        {"logits_to_keep": 1} if takes_number else {}
    )  # a pass may spend half its time on logits
    start = max(0, known.shape[1] - NUM_ALONE)
    if start > 0:
        forward_with_cache(model.backbone, cache, input_ids=known[:, :start], **unread)
    for token in known[:, start:].split(1, dim=1):
        alone = forward_with_cache(model.backbone, cache, input_ids=token).logits[0, -1]
    plain, together = alone.float(), model(input_ids=known).logits[0, -1].float()
    best, second = plain.topk(2).values.tolist()
    # Both ways may agree by chance, but no logit is more precise than its last digit
    last_digit = torch.finfo(alone.dtype).eps * abs(best)
    rounding = max(float((plain - together).abs().max()), last_digit)
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
    return judge(model, _extend(prompt, plain_ids[:position]), position, is_sampled)


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
    found = []
    start = 0
    while lmtp_ids != plain_ids[start:]:
        position = start + first_difference(plain_ids[start:], lmtp_ids)
        found.append(judge(model, _extend(prompt, plain_ids[:position]), position))
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
    return found


def _extend(prompt: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    return torch.cat([prompt, prompt.new_tensor([token_ids])], dim=-1)
