"""Cross-entropy of the leap heads, in chunks, so that no `(length, vocabulary)` tensor is kept.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `N` tokens that count, `m`
leap heads, `c` context width, `E` embedding size.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .backbone_lmtp import unembedding_size
from .context_lmtp import embed_context, num_visible
from .leaps_lmtp import drafts
from .unembeddings_lmtp import HeadUnembedding
from .vocabulary_lmtp import draft_labels

IGNORE_INDEX = -100
CHUNK_SIZE = 256  # larger ones are no faster, and slower where they leave the processor's cache


# `leap_losses`, or a function with its arguments that returns as many sums and counts
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum each leap head's cross-entropy at its offset.

    Args:
        model: the `LMTPForCausalLM`.
        hidden_states: `(B, L, H)`, the backbone's last hidden states.
        input_ids: `(B, L)`; None will do without grounded heads.
        labels: `(B, L)`, not shifted.
        position_ids: `(B, L)`; where they start anew, as in packed sequences, no target is seen from
            before.

    Returns:
        The sums `(m,)`, and how many targets each has `(m,)`, at least 1.
    """
    labels = number_targets(model, labels)
    totals, counts = [], []
    for index, unembedding in enumerate(model.draft_unembeddings()):
        tokens = head_tokens(model, index, hidden_states, input_ids, labels, position_ids)
        totals.append(chunked_cross_entropy(unembedding, tokens.features, tokens.targets))
        counts.append(max(tokens.targets.numel(), 1))
    return torch.stack(totals), torch.tensor(counts, device=labels.device)


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
    if position_ids is not None and position_ids.dim() == 2:  # some have several axes
        labels = labels.masked_fill(position_ids < offset, IGNORE_INDEX)
    rows, positions = leap_positions(labels, offset)
    context = _training_context(model, index, input_ids, rows, positions)
    features = model.leap_heads(index, hidden_states, context, (rows, positions))
    return HeadTokens(features, labels[rows, positions + offset], rows, positions)


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


def chunked_cross_entropy(
    unembedding: nn.Module | HeadUnembedding,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Sum `-log softmax(unembedding(h))[target]` over tokens, one chunk's logits at a time.

    Args:
        unembedding: maps `(n, H)` to logits `(n, V)`.
        hidden_states: `(N, H)`; `N = 0` is allowed and gives 0, with a gradient of 0.
        targets: `(N,)`.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        The float32 sum, a scalar.
    """

    def loss_of_chunk(states: torch.Tensor, chunk: slice) -> torch.Tensor:
        logits = at_least_float32(unembedding(states))
        return nn.functional.cross_entropy(logits, targets[chunk], reduction="sum")

    return chunked_sum(loss_of_chunk, hidden_states, unembedding.parameters(), chunk_size)


def chunked_sum(
    loss_of_chunk: Callable[[torch.Tensor, slice], torch.Tensor],
    hidden_states: torch.Tensor,
    parameters: Iterable[nn.Parameter],
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Sum a loss over tokens, chunk by chunk, each chunk's gradients along with it.

    Args:
        loss_of_chunk: maps states `(n, H)`, and which of the `N` tokens they are, to the sum of their
            losses.
        hidden_states: `(N, H)`.
        parameters: those that the loss depends on besides; frozen ones are left alone.
        chunk_size: tokens at a time.

    Returns:
        The sum, a float32 scalar (float64 for float64 states).
    """
    trained = [p for p in parameters if p.requires_grad and torch.is_grad_enabled()]
    return _ChunkedSum.apply(loss_of_chunk, chunk_size, hidden_states, *trained)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of 16-bit numbers in float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _ChunkedSum(torch.autograd.Function):
    """Computes the gradients along with the loss, chunk by chunk.

    The loss is the end of the graph, so its gradients are known up to a factor as soon as it is:
    no logits are kept for backward, and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss_of_chunk: Callable[[torch.Tensor, slice], torch.Tensor],
        chunk_size: int,
        hidden_states: torch.Tensor,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        total = at_least_float32(hidden_states.new_zeros(()))
        state_gradients = []
        trained_gradients = [torch.zeros_like(parameter) for parameter in trained]
        start = 0
        for states in hidden_states.split(chunk_size):
            states = states.detach().requires_grad_()
            chunk = slice(start, start + len(states))
            start = chunk.stop
            with torch.enable_grad():
                loss = loss_of_chunk(states, chunk)
            total += loss.detach()
            if any(ctx.needs_input_grad):
                of_states, *of_trained = torch.autograd.grad(loss, (states, *trained))
                state_gradients.append(of_states)
                for gradient, part in zip(trained_gradients, of_trained, strict=True):
                    gradient += part
        if state_gradients:
            ctx.save_for_backward(torch.cat(state_gradients), *trained_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [factor] = gradients
        scaled = (gradient * factor.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (None, None, *scaled)
