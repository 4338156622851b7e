"""The leap heads' cross-entropy, computed chunk by chunk so that no `(length, vocabulary)` tensor is kept.

Gradients are computed along with the loss: no logits are kept for the backward pass, and none are computed
twice. Losses that share a parameter, such as those of heads that share an unembedding, accumulate one
gradient of it.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `N` tokens with a target, `n` those
of one chunk, `m` leap heads (or losses), `c` context width, `E` embedding size.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .backbone_lmtp import unembedding_size
from .leaps_lmtp import drafts, embed_context, num_visible
from .unembeddings_lmtp import draft_labels

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
CHUNK_SIZE = 256  # larger chunks are no faster, and slower where they overflow the CPU's cache

# A function with the arguments and the result of `leap_losses`
LeapObjective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class HeadTokens(NamedTuple):
    """One leap head's predictions and targets in a batch.

    Args:
        features: `(N, H)`, the input of the head's unembedding.
        targets: `(N,)`, indices into the draft vocabulary if there is one.
        rows, positions: `(N,)` each, of the states; the targets are `offset` positions later.
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
    """Return the sum of the leap heads' cross-entropies, each at its offset.

    Args:
        model: the `LMTPForCausalLM`.
        hidden_states: `(B, L, H)`, the backbone's last hidden states.
        input_ids: `(B, L)`; only grounded heads need them.
        labels: `(B, L)`, not shifted.
        position_ids: `(B, L)`; where they restart, as in packed sequences, no state before the restart
            predicts a target after it.
        num_items: the divisor of each head's sum; by default, the number of the head's targets.

    Returns:
        The sum, a scalar, and each head's mean cross-entropy `(m,)`, detached.
    """
    labels = to_draft_labels(model, labels)

    def loss_of(index: int, unembedding: Any) -> TokenLoss:
        tokens = head_tokens(model, index, hidden_states, input_ids, labels, position_ids)
        return token_cross_entropy(unembedding, tokens.features, tokens.targets)

    losses = (loss_of(*head) for head in enumerate(model.draft_unembeddings()))
    return sum_of_means(losses, num_items)


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raise a ValueError if a label is neither a token id nor `IGNORE_INDEX`.

    Without this check, an accelerator would abort the process.
    """
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"labels: expected token ids from 0 to {vocab_size - 1}, or {IGNORE_INDEX}, got "
            f"{int(wrong[0])}. Is the tokenizer another model's?"
        )


def warn_without_labels(heads: nn.Module) -> None:
    """Warn once if a training pass without labels leaves out heads that are to be trained."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in heads.parameters()):
        logger.warning_once(
            "The leap heads require gradients, but this training pass has no labels, so they have no loss "
            "and do not learn. A Trainer's label_smoothing_factor and compute_loss_func take the labels "
            "away from the model: leave them unset, or pass labels to the model in a loss of your own. To "
            "train the backbone alone, call model.leap_heads.requires_grad_(False)."
        )


def to_draft_labels(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Map labels to indices of the model's draft vocabulary, if it has one; tokens outside are ignored."""
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
    """Run one leap head on the states that have a target, see `HeadTokens`.

    Args:
        model, hidden_states, input_ids, position_ids: see `leap_losses`.
        index: of the head.
        labels: `(B, L)`, from `to_draft_labels`.
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
    if position_ids is None or position_ids.dim() != 2:  # M-RoPE's have three dimensions
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

    While drafting, the number of following tokens that a head sees depends on the look-back that it serves.
    In training, each state draws one of these look-backs at random; in evaluation, it uses the smallest.
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
    """Find the states `h_s` with a target, `labels[s + offset]` other than `IGNORE_INDEX`.

    Args:
        labels: `(B, L)`, not shifted: `labels[s]` is the token at `s`, or `IGNORE_INDEX`.
        offset: the head's offset `d`.

    Returns:
        Rows and positions of the states, each `(N,)`.
    """
    rows, positions = (labels[:, offset:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, positions


class TokenLoss(NamedTuple):
    """A loss that is a sum over tokens.

    Args:
        of_chunk: maps states `(n, H)`, and their slice of the `N` tokens, to the sum of their losses.
        hidden_states: `(N, H)`; with `N = 0`, the loss and its gradient are 0.
        parameters: that the loss also depends on; frozen ones get no gradient.
    """

    of_chunk: Callable[[torch.Tensor, slice], torch.Tensor]
    hidden_states: torch.Tensor
    parameters: Iterable[nn.Parameter]


def token_cross_entropy(
    unembedding: Any, hidden_states: torch.Tensor, targets: torch.Tensor
) -> TokenLoss:
    """Return `-log softmax(unembedding(h))[target]` as a loss over tokens.

    Args:
        unembedding: maps `(n, H)` to logits `(n, V)`: a module, or a `HeadUnembedding`.
        hidden_states: `(N, H)`.
        targets: `(N,)`.
    """

    def of_chunk(states: torch.Tensor, chunk: slice) -> torch.Tensor:
        logits = at_least_float32(unembedding(states))
        return nn.functional.cross_entropy(logits, targets[chunk], reduction="sum")

    return TokenLoss(of_chunk, hidden_states, unembedding.parameters())


def sum_of_means(
    losses: Iterable[TokenLoss],
    num_items: torch.Tensor | int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of several losses, each divided by the number of its tokens (at least 1).

    Args:
        losses: at least one; an iterator is advanced only after the last loss has been computed.
        num_items: the divisor of all losses instead, unless it is 0.
        chunk_size: the number of tokens per chunk.

    Returns:
        The sum, a float32 scalar (float64 for float64 states), and each loss's mean `(m,)`, detached.
    """
    parts, means = [], []
    gradients: dict[nn.Parameter, torch.Tensor] = {}
    num_items = num_items or None
    for loss in losses:
        count = max(len(loss.hidden_states), 1)
        divisor = count if num_items is None else 1
        summed = _sum_chunks(loss, gradients, 1 / divisor, chunk_size)
        parts.append(summed / divisor)
        means.append(summed.detach() / count)
    total = torch.stack(parts).sum()
    for parameter, gradient in gradients.items():
        total = _WithGradient.apply(total, parameter, gradient)
    return total if num_items is None else total / num_items, torch.stack(means)


def _sum_chunks(
    loss: TokenLoss, gradients: dict[nn.Parameter, torch.Tensor], weight: float, chunk_size: int
) -> torch.Tensor:
    """Sum one loss, and add `weight` times its parameters' gradients to `gradients`, in place.

    Returns:
        The sum, a scalar with a gradient with respect to the states only.
    """
    trained = [p for p in loss.parameters if p.requires_grad and torch.is_grad_enabled()]
    for parameter in trained:
        if parameter not in gradients:
            gradients[parameter] = torch.zeros_like(parameter)
    accumulated = {parameter: gradients[parameter] for parameter in trained}
    needs_gradient = bool(trained) or loss.hidden_states.requires_grad
    total = at_least_float32(loss.hidden_states.new_zeros(()))
    state_gradients = []
    start = 0
    for states in loss.hidden_states.split(chunk_size):
        states = states.detach().requires_grad_(needs_gradient)
        chunk = slice(start, start + len(states))
        start = chunk.stop
        with torch.set_grad_enabled(needs_gradient):
            of_chunk = loss.of_chunk(states, chunk)
        total += of_chunk.detach()
        if needs_gradient:
            state_gradients.append(_add_gradients(of_chunk, states, accumulated, weight))
    if not needs_gradient:
        return total
    return _WithGradient.apply(total, loss.hidden_states, torch.cat(state_gradients))


def _add_gradients(
    loss: torch.Tensor,
    states: torch.Tensor,
    gradients: dict[nn.Parameter, torch.Tensor],
    weight: float,
) -> torch.Tensor:
    """Add `weight` times a loss's parameter gradients to `gradients`; return the states' gradient."""
    of_states, *parts = torch.autograd.grad(loss, (states, *gradients))
    for gradient, part in zip(gradients.values(), parts, strict=True):
        gradient.add_(part, alpha=weight)
    return of_states


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 16-bit tensor in float32, and any other as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _WithGradient(torch.autograd.Function):
    """Returns a scalar, and gives it a known gradient with respect to a tensor; can be chained."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, tensor: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [factor] = factors
        [gradient] = ctx.saved_tensors
        return factor, gradient * factor.to(gradient.dtype), None
