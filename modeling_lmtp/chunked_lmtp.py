"""Sums of losses over tokens, chunk by chunk, so that no `(length, vocabulary)` tensor is kept.

Gradients are computed along with the loss, so no logits are kept for backward and none are computed
twice. Losses that share a parameter, such as those of heads with one unembedding, add up one gradient
of it.

Shapes: `H` hidden size, `V` vocabulary size, `N` tokens that count, `n` those of one chunk, `m` losses.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

CHUNK_SIZE = 256  # larger ones are no faster, and slower where they leave the processor's cache


class TokenLoss(NamedTuple):
    """A loss that is a sum over tokens.

    Args:
        of_chunk: maps states `(n, H)`, and which of the `N` tokens they are, to the sum of their losses.
        hidden_states: `(N, H)`; `N = 0` is allowed and gives 0, with a gradient of 0.
        parameters: those that the loss depends on besides; frozen ones are left alone.
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
    """Add up losses, each divided by the number of its tokens, at least 1.

    Args:
        losses: at least one; each is done with before the next is asked for.
        num_items: what to divide by instead, all alike, unless it is 0.
        chunk_size: tokens at a time.

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
    """Sum one loss; add `weight` times its gradients to those of its parameters, in place.

    Returns:
        A scalar, whose gradient with respect to the states alone is that of the sum.
    """
    trained = [p for p in loss.parameters if p.requires_grad and torch.is_grad_enabled()]
    for parameter in trained:
        if parameter not in gradients:
            gradients[parameter] = torch.zeros_like(parameter)
    added_up = {parameter: gradients[parameter] for parameter in trained}
    learns = bool(trained) or loss.hidden_states.requires_grad
    total = at_least_float32(loss.hidden_states.new_zeros(()))
    state_gradients = []
    start = 0
    for states in loss.hidden_states.split(chunk_size):
        states = states.detach().requires_grad_(learns)
        chunk = slice(start, start + len(states))
        start = chunk.stop
        with torch.set_grad_enabled(learns):
            of_chunk = loss.of_chunk(states, chunk)
        total += of_chunk.detach()
        if learns:
            state_gradients.append(_add_gradients(of_chunk, states, added_up, weight))
    if not learns:
        return total
    return _WithGradient.apply(total, loss.hidden_states, torch.cat(state_gradients))


def _add_gradients(
    loss: torch.Tensor,
    states: torch.Tensor,
    gradients: dict[nn.Parameter, torch.Tensor],
    weight: float,
) -> torch.Tensor:
    """Add `weight` times a loss's gradients to those of the parameters; return those of the states."""
    of_states, *parts = torch.autograd.grad(loss, (states, *gradients))
    for gradient, part in zip(gradients.values(), parts, strict=True):
        gradient.add_(part, alpha=weight)
    return of_states


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of 16-bit numbers in float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to a tensor is known; several are chained."""

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
