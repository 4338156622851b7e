"""Cross-entropy of the leap heads, in chunks, so that no `(length, vocabulary)` tensor is kept.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `N` tokens that count, `m`
leap heads, `c` context width, `E` embedding size.
"""

from typing import Any

import torch
from torch import nn

from .backbone_lmtp import unembedding_size
from .context_lmtp import embed_context
from .leaps_lmtp import drafts
from .vocabulary_lmtp import DraftUnembedding, draft_labels

IGNORE_INDEX = -100
CHUNK_SIZE = 256  # larger ones are no faster, and slower where they leave the processor's cache


def leap_losses(
    model: Any,
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum each leap head's cross-entropy at its offset.

    Args:
        model: the `LMTPForCausalLM`.
        hidden_states: `(B, L, H)`, the backbone's last hidden states.
        input_ids: `(B, L)`; None will do without grounded heads.
        labels: `(B, L)`, not shifted.

    Returns:
        The sums `(m,)`, and how many targets each has `(m,)`, at least 1.
    """
    config = model.config
    if config.draft_token_ids is not None:
        vocab_size, _ = unembedding_size(model.backbone)
        labels = draft_labels(labels, config.draft_token_ids, vocab_size, IGNORE_INDEX)
    totals, counts = [], []
    unembeddings = model.draft_unembeddings()
    for index, offset in enumerate(config.leap_offsets):
        rows, positions = leap_positions(labels, offset)
        context = _training_context(model, index, input_ids, rows, positions)
        features = model.leap_heads[index](hidden_states[rows, positions], context)
        targets = labels[rows, positions + offset]
        totals.append(chunked_cross_entropy(unembeddings[index], features, targets))
        counts.append(max(targets.numel(), 1))
    return torch.stack(totals), torch.tensor(counts, device=labels.device)


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
    look_backs = sorted(d.look_back for d in drafts(model.config.leap_offsets) if d.head == index)
    choices = len(look_backs) if model.training else 1
    drawn = torch.randint(choices, rows.shape, device=rows.device)
    num_known = torch.tensor(look_backs, device=rows.device)[drawn] + 1
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
    unembedding: nn.Module | DraftUnembedding,
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
        unembedding: nn.Module | DraftUnembedding,
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
