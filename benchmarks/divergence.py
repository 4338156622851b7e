"""Where L-MTP's text parts from plain decoding's, and whether that is a near-tie or an error.

A backbone pass over several tokens rounds differently from passes over one. Where the two best logits
are closer than that, either of them may come first; anywhere else, a difference is an error.
"""

from dataclasses import dataclass
from typing import Any

import torch

from modeling_lmtp.cache_lmtp import new_cache
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import forward_with_cache

NO_ROUNDING = 1e-2  # of a logit: it moves a draw once in hundreds
SAFETY = 2.0  # two logits may each be off by the rounding, in opposite directions


@dataclass(frozen=True)
class Divergence:
    """One token that differs, after the same tokens before it.

    Args:
        position: how many new tokens agree before it.
        top_two_gap: the plain model's best logit minus its second best there.
        rounding: the most that any logit there changes with the number of tokens in the pass, or the
            last digit of the best one, if that is more.
        is_sampled: whether the tokens were drawn: then the gap says nothing of how near it was.
    """

    position: int
    top_two_gap: float
    rounding: float
    is_sampled: bool = False

    @property
    def is_error(self) -> bool:
        """Whether rounding cannot explain it; of a draw, that is known where nothing is rounded much."""
        if self.is_sampled:
            return self.rounding < NO_ROUNDING
        return self.top_two_gap > SAFETY * self.rounding


@torch.no_grad()
def judge(
    model: LMTPForCausalLM, known: torch.Tensor, position: int, is_sampled: bool = False
) -> Divergence:
    """Look at the token after `known` `(1, L)`: as plain decoding computes it, and in one pass."""
    cache = new_cache(model.config)
    forward_with_cache(model.backbone, cache, input_ids=known[:, :-1])
    alone = forward_with_cache(model.backbone, cache, input_ids=known[:, -1:]).logits[0, -1]
    plain, together = alone.float(), model(input_ids=known).logits[0, -1].float()
    best, second = plain.topk(2).values.tolist()
    # The two passes tried here may happen to agree: no logit is known better than to its last digit
    last_digit = torch.finfo(alone.dtype).eps * abs(best)
    rounding = max(float((plain - together).abs().max()), last_digit)
    return Divergence(position, best - second, rounding, is_sampled)


def divergences(
    model: LMTPForCausalLM,
    prompt: torch.Tensor,
    plain_ids: list[int],
    lmtp_ids: list[int],
    **options: Any,
) -> list[Divergence]:
    """Find every token that L-MTP would decide differently along plain decoding's greedy text.

    After each difference it goes on from the plain text, so that one near-tie counts as one token.

    Args:
        model: the checkpoint.
        prompt: `(1, L)`.
        plain_ids: plain decoding's new tokens.
        lmtp_ids: L-MTP's.
        options: the way of L-MTP, and what else both ways were given; without `max_new_tokens`.
    """
    found = []
    start = 0
    while lmtp_ids != plain_ids[start:]:
        rest = plain_ids[start:]
        agree = [a == b for a, b in zip(rest, lmtp_ids, strict=False)]
        position = start + (agree.index(False) if False in agree else len(agree))
        known = torch.cat([prompt, prompt.new_tensor([plain_ids[:position]])], dim=-1)
        found.append(judge(model, known, position))
        start = position + 1
        if start >= len(plain_ids):
            break
        known = torch.cat([prompt, prompt.new_tensor([plain_ids[:start]])], dim=-1)
        output = model.generate(
            known,
            attention_mask=torch.ones_like(known),
            max_new_tokens=len(plain_ids) - start,
            use_lmtp=True,
            **options,
        )
        lmtp_ids = output[0, known.shape[1] :].tolist()
    return found
