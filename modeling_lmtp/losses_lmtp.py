"""Cross-entropy of the leap heads: what each learns from a batch, and the sum over all.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `N` tokens that count, `m`
leap heads, `c` context width, `E` embedding size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .backbone_lmtp import unembedding_size
from .chunked_lmtp import TokenLoss, sum_of_means, token_cross_entropy
from .context_lmtp import embed_context, num_visible
from .leaps_lmtp import drafts
from .vocabulary_lmtp import draft_labels

IGNORE_INDEX = -100

# `leap_losses`, or a function with its arguments that returns a loss and as many means
LeapObjective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class HeadTokens(NamedTuple):
    """What one leap head learns from a batch.

    Args:
        features: `(N, H)`, what the head's unembedding reads.
        targets: `(N,)`, numbered by the draft vocabulary if there is one.
        rows, positions: `(N,)` each, where the states lie; the targets lie `offset` further.
    """

    features: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor


def leap_losses(
    model: Any,
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the leap heads' cross-entropies, each at its offset.

    Args:
        model: the `LMTPForCausalLM`.
        hidden_states: `(B, L, H)`, the backbone's last hidden states.
        input_ids: `(B, L)`; None will do without grounded heads.
        labels: `(B, L)`, not shifted.
        position_ids: `(B, L)`; where they start anew, as in packed sequences, no target is seen from
            before.
        num_items: what sums over targets are divided by; by default, for each head, the number of its
            targets.

    Returns:
        The sum, a scalar, and each head's mean cross-entropy `(m,)`, detached.
    """
    labels = number_targets(model, labels)

    def loss_of(index: int, unembedding: Any) -> TokenLoss:
        tokens = head_tokens(model, index, hidden_states, input_ids, labels, position_ids)
        return token_cross_entropy(unembedding, tokens.features, tokens.targets)

    losses = (loss_of(*head) for head in enumerate(model.draft_unembeddings()))
    return sum_of_means(losses, num_items)


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raise a ValueError if a label is neither a token id nor `IGNORE_INDEX`.

    On an accelerator, the loss itself would end the process instead.
    """
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"labels: expected token ids from 0 to {vocab_size - 1}, or {IGNORE_INDEX}, got "
            f"{int(wrong[0])}. Is the tokenizer another model's?"
        )


def number_targets(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Number labels by the model's draft vocabulary, if it has one; a token outside is no target."""
    token_ids = model.config.draft_token_ids
    if token_ids is None:
        return labels
    vocab_size, _ = unembedding_size(model.backbone)
    return draft_labels(labels, token_ids, vocab_size, IGNORE_INDEX)


def head_tokens(
    model: Any,
    index: int,
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> HeadTokens:
    """Run one leap head on the states that have a target.

    Args:
        model, hidden_states, input_ids, position_ids: see `leap_losses`.
        index: the head's.
        labels: `(B, L)`, from `number_targets`.
    """
    offset = model.config.leap_offsets[index]
    labels = mask_starts(labels, position_ids, offset)
    rows, positions = leap_positions(labels, offset)
    context = _training_context(model, index, input_ids, rows, positions)
    features = model.leap_heads(index, hidden_states, context, (rows, positions))
    return HeadTokens(features, labels[rows, positions + offset], rows, positions)


def mask_starts(
    labels: torch.Tensor, position_ids: torch.Tensor | None, offset: int
) -> torch.Tensor:
    """Ignore the targets `(B, L)` whose state would lie in the sequence packed before theirs."""
    if position_ids is None or position_ids.dim() != 2:  # some have several axes
        return labels
    return labels.masked_fill(position_ids < offset, IGNORE_INDEX)


def _training_context(
    model: Any,
    index: int,
    input_ids: torch.Tensor | None,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor | None:
    """Return a grounded head's context `(N, c·E)` for the states at `rows`, `positions`, each `(N,)`.

    It sees as many following tokens as one of the look-backs that it serves would know. Which one is
    drawn anew for each state while training; in evaluation it is the nearest.
    """
    width = model.context_widths[index]
    if not width:
        return None
    if input_ids is None:
        raise ValueError("Grounded heads (head_context > 0) need input_ids, got inputs_embeds.")
    config = model.config
    look_backs = sorted(d.look_back for d in drafts(config.leap_offsets) if d.head == index)
    offset = config.leap_offsets[index]
    visible = [num_visible(offset, look_back, config.head_context) for look_back in look_backs]
    choices = len(visible) if model.training else 1
    drawn = torch.randint(choices, rows.shape, device=rows.device)
    num_known = torch.tensor(visible, device=rows.device)[drawn]
    steps = torch.arange(width, device=rows.device)
    tokens = input_ids[rows[:, None], positions[:, None] + 1 + steps]
    return embed_context(model.get_input_embeddings(), tokens, steps < num_known[:, None])


def leap_positions(labels: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the states `h_s` whose target `labels[s + offset]` counts.

    Args:
        labels: `(B, L)`, unshifted: `labels[s]` is the token at `s`, or `IGNORE_INDEX`.
        offset: the head's offset `d`.

    Returns:
        Rows and positions of the states, each `(N,)`.
    """
    rows, positions = (labels[:, offset:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, positions
