"""What leap heads learn in warm-up: the answers' tokens, the backbone's own distribution, or both.

Shapes: `B` batch, `L` length, `H` hidden size, `N` targets of one head, `m` leap heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from modeling_lmtp.losses_lmtp import (
    HeadTokens,
    TokenLoss,
    at_least_float32,
    head_tokens,
    leap_positions,
    mask_starts,
    sum_of_means,
    to_draft_labels,
)
from modeling_lmtp.unembeddings_lmtp import DraftUnembedding

# The columns of a tally; targets outside the draft vocabulary are counted, and not learned
MEASURES = ("loss", "divergence", "correct", "targets", "outside")

OUTSIDE = MEASURES.index("outside")


class HeadObjective:
    """The heads' loss, and what it says of each head; goes to `forward` as `leap_objective`.

    The loss of one target is `(1 - w) · CE(target) + w · T² · KL(p ‖ q)`: `q` is the head's
    distribution at temperature `T`, `p` the one that the frozen unembedding gives where the backbone
    itself predicts that target, one position before it. With a draft vocabulary both are over its
    tokens alone. `p` and `q` are the unembedding's own, before any cap or scale that an architecture
    puts on its logits afterwards.

    Args:
        num_heads: `m`.
        weight: `w`, the share of the backbone's distribution, from 0 (none, its tokens alone) to 1.
        temperature: `T`; higher ones show more of the less likely tokens.
    """

    def __init__(self, num_heads: int, weight: float = 0.0, temperature: float = 1.0) -> None:
        self.weight = weight
        self.temperature = temperature
        self.num_heads = num_heads
        self.tally = self.new_tally()

    def new_tally(self) -> torch.Tensor:
        """Return `(m, 5)` zeros, a column for each of `MEASURES`."""
        return torch.zeros(self.num_heads, len(MEASURES))

    def take_tally(self) -> torch.Tensor:
        """Return what has been counted since the last time, `(m, 5)`, and start anew."""
        tally, self.tally = self.tally, self.new_tally()
        return tally

    def __call__(
        self,
        model: Any,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        num_items: torch.Tensor | int | None = None,
        *,
        active: Sequence[bool] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up the losses of the heads and count their targets; arguments as for `leap_losses`.

        Args:
            active: which heads take part, at least one; by default all.

        Returns:
            The sum, a scalar, and each head's mean `(m,)`, detached: 0 of those that take no part.
        """
        tokens_of_text, labels = labels, to_draft_labels(model, labels)
        self.tally = self.tally.to(labels.device)
        teacher = _teacher(model) if self.weight else None
        unembeddings = model.draft_unembeddings()

        def loss_of(index: int) -> TokenLoss:
            tokens = head_tokens(model, index, hidden_states, input_ids, labels, position_ids)
            offset = model.config.leap_offsets[index]
            tally, unembedding = self.tally[index], unembeddings[index]
            all_targets = leap_positions(mask_starts(tokens_of_text, position_ids, offset), offset)
            tally[OUTSIDE] += len(all_targets[0]) - len(tokens.targets)
            of_chunk = _LossOfChunk(
                self, tally, unembedding, tokens, teacher, hidden_states, offset
            )
            return TokenLoss(of_chunk, tokens.features, unembedding.parameters())

        heads = [i for i in range(self.num_heads) if active is None or active[i]]
        loss, of_heads = sum_of_means(map(loss_of, heads), num_items)
        means = of_heads.new_zeros(self.num_heads)
        means[heads] = of_heads
        return loss, means


def _teacher(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what maps the backbone's states `(n, H)` to its logits of the draft vocabulary `(n, D)`."""
    unembedding = model.get_output_embeddings()
    token_ids = model.config.draft_token_ids
    return unembedding if token_ids is None else DraftUnembedding(unembedding, token_ids)


class _LossOfChunk:
    """One head's loss, chunk by chunk (see `TokenLoss`).

    Args:
        objective: the weight and the temperature.
        tally: `(5,)`, the head's; what is seen is added to it.
        unembedding: the head's.
        tokens: what the head learns from.
        teacher: see `_teacher`; None where only tokens are learned.
        hidden_states: `(B, L, H)`, the backbone's; or `(B, L, K·H)`, the last of `K` states the last.
        offset: the head's.
    """

    def __init__(
        self,
        objective: HeadObjective,
        tally: torch.Tensor,
        unembedding: Any,
        tokens: HeadTokens,
        teacher: Callable[[torch.Tensor], torch.Tensor] | None,
        hidden_states: torch.Tensor,
        offset: int,
    ) -> None:
        self.objective = objective
        self.tally = tally
        self.unembedding = unembedding
        self.tokens = tokens
        self.teacher = teacher
        self.hidden_states = hidden_states
        self.offset = offset

    def __call__(self, states: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Return the sum of the losses of `states` `(n, H)`, the head's targets `chunk`."""
        targets = self.tokens.targets[chunk]
        logits = at_least_float32(self.unembedding(states))
        loss = hard = nn.functional.cross_entropy(logits, targets, reduction="sum")
        soft = hard.new_zeros(())
        if self.teacher is not None:
            weight = self.objective.weight
            soft = soft_loss(logits, self._teacher_logits(chunk), self.objective.temperature)
            loss = (1 - weight) * hard + weight * soft
        correct = (logits.detach().argmax(dim=-1) == targets).sum()
        counted = [hard.detach(), soft.detach(), correct, torch.ones_like(targets).sum()]
        self.tally[:OUTSIDE] += torch.stack([value.float() for value in counted])
        return loss

    @torch.no_grad()
    def _teacher_logits(self, chunk: slice) -> torch.Tensor:
        """Return `(n, D)`, from the states that lie one before the targets."""
        assert self.teacher is not None
        rows, positions = self.tokens.rows[chunk], self.tokens.positions[chunk]
        before_target = positions + self.offset - 1
        states = self.hidden_states[rows, before_target, -self.tokens.features.shape[-1] :]
        return at_least_float32(self.teacher(states))


def soft_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sum `T² · KL(softmax(teacher / T) ‖ softmax(logits / T))` over tokens (arXiv 1503.02531).

    Args:
        logits, teacher_logits: `(n, D)` each.
        temperature: `T`; its square keeps the size of the gradient.
    """
    wanted = (teacher_logits / temperature).softmax(dim=-1)
    cross_entropy = nn.functional.cross_entropy(logits / temperature, wanted, reduction="sum")
    return (cross_entropy - torch.special.entr(wanted).sum()) * temperature**2
