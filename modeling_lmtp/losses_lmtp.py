"""Cross-entropy of the leap heads, in chunks, so that no `(length, vocabulary)` tensor is kept.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `N` tokens that count.
"""

from typing import Any

import torch
from torch import nn

IGNORE_INDEX = -100
CHUNK_SIZE = 256  # larger ones are no faster, and slower where they leave the processor's cache


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
    unembedding: nn.Module,
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
    trained = [
        parameter
        for parameter in unembedding.parameters()
        if parameter.requires_grad and torch.is_grad_enabled()
    ]
    return _ChunkedCrossEntropy.apply(unembedding, targets, chunk_size, hidden_states, *trained)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss, chunk by chunk.

    The loss is the end of the graph, so its gradients are known up to a factor as soon as it is:
    no logits are kept for backward, and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unembedding: nn.Module,
        targets: torch.Tensor,
        chunk_size: int,
        hidden_states: torch.Tensor,
        *trained: nn.Parameter,
    ) -> torch.Tensor:
        total = hidden_states.new_zeros((), dtype=torch.float32)
        state_gradients = []
        trained_gradients = [torch.zeros_like(parameter) for parameter in trained]
        for states, chunk_targets in zip(
            hidden_states.split(chunk_size), targets.split(chunk_size), strict=True
        ):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                logits = unembedding(states).float()
                loss = nn.functional.cross_entropy(logits, chunk_targets, reduction="sum")
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
        return (None, None, None, *scaled)
