"""Offsets of leap heads, which head serves which position of a draft, and which tokens it sees.

Notation (arXiv 2505.17505): the backbone has seen `x_1 … x_t`, `h_s` is its last hidden state at position
`s`, and `x_{t+1}` has just been emitted. A leap head of offset `d` predicts `x_{s+d}` from `h_s`; the
language-modeling head is the offset `d = 1`.

To draft from `h_s`, `s = t - j` (look-back `j`), the paper's head ignores `x_{s+1} … x_{t+1}`, although
they have been emitted. A *grounded* head also reads the first `c` of them:

    z' = z + SiLU(W z + b + Σ_g U_g e(x_{s+g})),    g = 1 … min(c, j + 1)

differs: this is the project's own extension of arXiv 2505.17505; `c = 0` is the paper's head. `e` is the
backbone's input embedding, scaled to a root mean square of 1, so that one learning rate suits all models.

A *path-grounded* head sees all tokens up to its target, `c = d - 1` for offset `d`. That includes the
tokens drafted before it on the same path, as in Hydra's sequential heads (arXiv 2402.05109).

Shapes: `B` batch, `L` length, `c` context width, `E` embedding size, `…` any leading dimensions.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

PATH = "path"  # the `head_context` of heads that see every token up to their target


class Draft(NamedTuple):
    """Which leap head and which earlier state predict `x_{t+1+distance}`.

    `(t - look_back) + offsets[head] = t + 1 + distance`.
    """

    distance: int
    head: int
    look_back: int


def evenly_spaced_offsets(num_leap_heads: int, leap_stride: int) -> tuple[int, ...]:
    """Return the paper's offsets `1 + k·i`, `i = 1 … m` (`leap_stride=1`: 2, 3, 4, as in Medusa).

    Raises:
        ValueError: `num_leap_heads` is negative or `leap_stride` is below 1.
    """
    if num_leap_heads < 0:
        raise ValueError(
            f"num_leap_heads must be 0 (plain next-token prediction) or more, got {num_leap_heads}."
        )
    if leap_stride < 1:
        raise ValueError(
            f"leap_stride must be 1 (multi-token prediction) or more, got {leap_stride}."
        )
    return tuple(1 + leap_stride * (i + 1) for i in range(num_leap_heads))


def check_offsets(offsets: Sequence[int]) -> None:
    """Raise a ValueError unless `offsets` are increasing integers of at least 2."""
    if any(isinstance(offset, bool) or not isinstance(offset, int) for offset in offsets):
        raise ValueError(f"leap_offsets must be integers, got {tuple(offsets)}.")
    if any(offset < 2 for offset in offsets):
        raise ValueError(
            f"leap_offsets must be 2 or more, got {tuple(offsets)}: offset 1 is the language-modeling "
            "head, which every backbone has."
        )
    if any(later <= earlier for earlier, later in pairwise(offsets)):
        raise ValueError(
            f"leap_offsets must be increasing, got {tuple(offsets)}. Sort them and drop duplicates."
        )


def resolve_offsets(
    num_leap_heads: int | None, leap_stride: int | None, leap_offsets: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the offsets that `from_backbone` was asked for: the paper's `3, 5, 7` by default.

    Raises:
        ValueError: the offsets are given in both ways, or are invalid.
    """
    if leap_offsets is None:
        return evenly_spaced_offsets(
            3 if num_leap_heads is None else num_leap_heads,
            2 if leap_stride is None else leap_stride,
        )
    if num_leap_heads is not None or leap_stride is not None:
        raise ValueError(
            f"Pass either leap_offsets ({tuple(leap_offsets)}) or num_leap_heads and leap_stride "
            f"({num_leap_heads}, {leap_stride}), not both."
        )
    check_offsets(leap_offsets)
    return tuple(leap_offsets)


def drafts(offsets: Sequence[int]) -> tuple[Draft, ...]:
    """List, for each draftable distance `a = 1, 2, …`, the head and the look-back that serve it.

    The nearest head at or beyond the target serves it: offset `d ≥ 1 + a`, look-back `j = d - 1 - a`,
    because `(t - j) + d = t + 1 + a`. For the evenly spaced offsets of leap `k` this is
    `i = ceil(a / k)` (counting heads from 1), `j = k·i - a`.

    differs: the rule printed in arXiv 2505.17505 agrees for `k ≤ 2` only; this one holds for any
    increasing offsets.

    Args:
        offsets: increasing integers ≥ 2, one per leap head; may be empty.

    Returns:
        One `Draft` per distance `1 … max(offsets) - 1`, in order.
    """
    check_offsets(offsets)
    horizon = offsets[-1] - 1 if offsets else 0
    schedule = []
    for distance in range(1, horizon + 1):
        head = next(i for i, offset in enumerate(offsets) if offset >= 1 + distance)
        schedule.append(Draft(distance, head, look_back=offsets[head] - 1 - distance))
    return tuple(schedule)


def num_draft_states(schedule: Sequence[Draft]) -> int:
    """Return how many of the last hidden states a schedule reads: the largest look-back plus one."""
    return max((draft.look_back + 1 for draft in schedule), default=0)


def draftable(schedule: Sequence[Draft], num_states: int) -> tuple[Draft, ...]:
    """Return the leading drafts whose state exists when only `num_states` states are known.

    Right after a very short prompt, `h_{t-j}` may not exist. Drafts after a missing one are useless,
    because verification accepts positions in order.
    """
    available = []
    for draft in schedule:
        if draft.look_back >= num_states:
            break
        available.append(draft)
    return tuple(available)


def num_visible(offset: int, look_back: int, head_context: int | str) -> int:
    """Return how many of the tokens after its state a head sees when it drafts.

    Args:
        offset: the head's offset `d`; the `d`-th of these tokens is its target.
        look_back: `j`; the first `j + 1` tokens are known, the others are drafted on the same path.
        head_context: see `LMTPConfig`.
    """
    if head_context == PATH:
        return offset - 1
    return min(int(head_context), look_back + 1)


def context_widths(offsets: Sequence[int], head_context: int | str) -> tuple[int, ...]:
    """Return, for each head, the largest number of following tokens that it sees while drafting."""
    widths = [0] * len(offsets)
    for draft in drafts(offsets):
        visible = num_visible(offsets[draft.head], draft.look_back, head_context)
        widths[draft.head] = max(widths[draft.head], visible)
    return tuple(widths)


def following_tokens(input_ids: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `width` tokens that follow each position, and which of them exist.

    Args:
        input_ids: `(B, L)`.
        width: `c`.

    Returns:
        Tokens `(B, L, c)`, where `[b, s, g - 1]` is `x_{s+g}`, or an arbitrary id if that does not exist;
        and `(L, c)` booleans.
    """
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)[:, None]
    following = positions + 1 + torch.arange(width, device=input_ids.device)
    return input_ids[:, following.clamp(max=length - 1)], following < length


def embed_context(
    embeddings: nn.Module, tokens: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Embed following tokens `(…, c)` as `(…, c·E)`; zero where `visible` `(…, c)` is false."""
    embedded = embeddings(tokens)
    embedded = nn.functional.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)
    if visible is None:
        return embedded.flatten(-2)
    return (embedded * visible[..., None].to(embedded.dtype)).flatten(-2)
