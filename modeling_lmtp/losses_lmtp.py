"""Cross-entropy of the leap heads, in chunks, so that no `(length, vocabulary)` tensor is kept.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `N` tokens that count.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_SIZE = 1024  # tokens whose logits exist at a time


def leap_targets(
    hidden_states: torch.Tensor, labels: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair each state `h_s` with its target `labels[s + offset]`, ignored targets left out.

    Args:
        hidden_states: `(B, L, H)`.
        labels: `(B, L)`, unshifted: `labels[s]` is the token at `s`, or `IGNORE_INDEX`.
        offset: the head's offset `d`.

    Returns:
        States `(N, H)` and targets `(N,)`.
    """
    targets = labels[:, offset:]
    counts = targets != IGNORE_INDEX
    return hidden_states[:, : targets.shape[1]][counts], targets[counts]


def chunked_cross_entropy(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Sum `-log softmax(logits_of(h))[target]` over tokens, keeping one chunk's logits at a time.

    Backward recomputes each chunk's logits, so peak memory is `chunk_size × V` whatever `N`.

    Args:
        logits_of: maps `(n, H)` to logits `(n, V)`.
        hidden_states: `(N, H)`; `N = 0` is allowed and gives 0, with a gradient of 0.
        targets: `(N,)`.
        chunk_size: tokens per chunk.

    Returns:
        The float32 sum, a scalar.
    """

    def chunk_loss(states: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        logits = logits_of(states).float()
        return nn.functional.cross_entropy(logits, chunk_targets, reduction="sum")

    total = hidden_states.new_zeros((), dtype=torch.float32)
    # `split` gives one empty chunk for no tokens, which keeps the heads in the graph
    for states, chunk_targets in zip(
        hidden_states.split(chunk_size), targets.split(chunk_size), strict=True
    ):
        total = total + checkpoint(chunk_loss, states, chunk_targets, use_reentrant=False)
    return total
