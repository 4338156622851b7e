"""Grounding: leap heads that also see tokens that follow their state and are known already.

To draft from `h_s`, `s = t - j` (look-back `j`), the paper's head throws `x_{s+1} … x_{t+1}` away,
although they have been emitted. A grounded head takes the first `c` of them as well:

    z' = z + SiLU(W z + b + Σ_g U_g e(x_{s+g})),    g = 1 … min(c, j + 1)

differs: this project's own extension of arXiv 2505.17505; `c = 0` is the paper's head. `e` is the
backbone's input embedding, scaled to a root mean square of 1, so that one learning rate suits all.

A *path-grounded* head sees all tokens up to its target, `c = d - 1` for offset `d`: those drafted before
it on the same path as well, as Hydra's sequential heads do (arXiv 2402.05109).

Shapes: `B` batch, `L` length, `c` context width, `E` embedding size, `…` any leading dimensions.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .leaps_lmtp import drafts

PATH = "path"  # the `head_context` of heads that see every token up to their target


def num_visible(offset: int, look_back: int, head_context: int | str) -> int:
    """Return how many of the tokens that follow its state a head sees when it drafts.

    Args:
        offset: the head's offset `d`; its target is the `d`-th of these tokens.
        look_back: `j`; the first `j + 1` are known, the others are drafted on the same path.
        head_context: see `LMTPConfig`.
    """
    if head_context == PATH:
        return offset - 1
    return min(int(head_context), look_back + 1)


def context_widths(offsets: Sequence[int], head_context: int | str) -> tuple[int, ...]:
    """Return, for each head, how many following tokens it can ever see while drafting."""
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
        Tokens `(B, L, c)`: `[b, s, g - 1]` is `x_{s+g}`, any id where it does not exist; and
        `(L, c)` booleans.
    """
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)[:, None]
    following = positions + 1 + torch.arange(width, device=input_ids.device)
    return input_ids[:, following.clamp(max=length - 1)], following < length


def embed_context(
    embeddings: nn.Module, tokens: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Embed following tokens `(…, c)` as `(…, c·E)`, zero where `visible` `(…, c)`, if given, is false."""
    embedded = embeddings(tokens)
    embedded = nn.functional.rms_norm(embedded, embedded.shape[-1:], eps=1e-6)
    if visible is None:
        return embedded.flatten(-2)
    return (embedded * visible[..., None].to(embedded.dtype)).flatten(-2)
