"""The loss of warm-up: the answers' tokens, the backbone's distribution, or a mix of both.

Shapes: `B` batch, `L` length, `H` hidden size, `K` states that a head reads of each token, `n` targets of
one chunk, `D` draft vocabulary size, `m` leap heads.
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
from modeling_lmtp.unembeddings_lmtp import HeadUnembedding, logit_scale, shared_unembedding

# The columns of a tally; targets outside the draft vocabulary are only counted
MEASURES = ("loss", "divergence", "correct", "targets", "outside")

OUTSIDE = MEASURES.index("outside")


class HeadObjective:
    """The heads' loss, with running sums per head; pass it to `forward` as `leap_objective`.

    The loss of one target is `(1 - w) · CE(target) + w · T² · KL(p ‖ q)` (arXiv 1503.02531). `q` is the
    head's distribution at temperature `T`, and `p` the backbone's own next-token distribution for that
    target, read one position before it. With a draft vocabulary, both cover only its tokens. Both are
    scaled as the model scales its logits; a soft cap is left out.

    Args:
        num_heads: `m`.
        weight: `w`, the weight of the backbone's distribution, from 0 (only the answers' tokens) to 1.
        temperature: `T`; higher values give more weight to unlikely tokens.
    """

    def __init__(self, num_heads: int, weight: float = 0.0, temperature: float = 1.0) -> None:
        self.weight = weight
        self.temperature = temperature
        self.num_heads = num_heads
        self.tally = self.new_tally()

    def new_tally(self) -> torch.Tensor:
        """Return `(m, 5)` zeros, one column for each of `MEASURES`."""
        return torch.zeros(self.num_heads, len(MEASURES))

    def take_tally(self) -> torch.Tensor:
        """Return the sums since the last call, `(m, 5)`, and reset them."""
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
        """Compute the sum of the heads' losses, and update the tally.

        Args:
            model, hidden_states, input_ids, labels, position_ids, num_items: see `leap_losses`.
            active: for each head whether it trains, at least one; by default all do.

        Returns:
            The sum, a scalar, and each head's mean loss `(m,)`, detached; 0 for inactive heads.
        """
        token_labels, labels = labels, to_draft_labels(model, labels)
        self.tally = self.tally.to(labels.device)
        teacher = _teacher(model) if self.weight else None
        unembeddings = model.draft_unembeddings()

        def head_loss(index: int) -> TokenLoss:
            tokens = head_tokens(model, index, hidden_states, input_ids, labels, position_ids)
            offset = model.config.leap_offsets[index]
            tally, unembedding = self.tally[index], unembeddings[index]
            # `tokens` holds only the targets inside the draft vocabulary
            rows, _ = leap_positions(mask_starts(token_labels, position_ids, offset), offset)
            tally[OUTSIDE] += len(rows) - len(tokens.targets)
            chunk_loss = _ChunkLoss(
                self, tally, unembedding, tokens, teacher, hidden_states, offset
            )
            return TokenLoss(chunk_loss, tokens.features, unembedding.parameters())

        heads = [i for i in range(self.num_heads) if active is None or active[i]]
        loss, active_means = sum_of_means(map(head_loss, heads), num_items)
        means = active_means.new_zeros(self.num_heads)
        means[heads] = active_means
        return loss, means


def _teacher(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from the backbone's states `(n, H)` to its draft-vocabulary logits `(n, D)`."""
    shared = shared_unembedding(model.backbone, model.config.draft_token_ids)
    return HeadUnembedding(shared, scale=logit_scale(model.backbone))


class _ChunkLoss:
    """Computes one head's loss chunk by chunk (see `TokenLoss`).

    Args:
        objective: holds the weight and the temperature.
        tally: the head's row `(5,)` of the tally, updated in place.
        unembedding: the head's unembedding.
        tokens: the head's features and targets.
        teacher: see `_teacher`; None if the weight is 0.
        hidden_states: `(B, L, K·H)`, the backbone's states; the last layer's come last.
        offset: the head's offset.
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
        """Return the sum of the losses of one chunk of targets.

        Args:
            states: `(n, H)`, the head's states for these targets.
            chunk: the targets' range in `tokens`.
        """
        targets = self.tokens.targets[chunk]
        logits = at_least_float32(self.unembedding(states))
        loss = hard = nn.functional.cross_entropy(logits, targets, reduction="sum")
        soft = hard.new_zeros(())
        if self.teacher is not None:
            weight = self.objective.weight
            soft = soft_loss(logits, self._teacher_logits(chunk), self.objective.temperature)
            loss = (1 - weight) * hard + weight * soft
        # Finding the largest logit is several times faster than finding where it is
        highest = logits.detach().amax(dim=-1)
        correct = (logits.detach().gather(-1, targets[:, None])[:, 0] == highest).sum()
        counted = [hard.detach(), soft.detach(), correct, torch.ones_like(targets).sum()]
        self.tally[:OUTSIDE] += torch.stack([value.float() for value in counted])
        return loss

    @torch.no_grad()
    def _teacher_logits(self, chunk: slice) -> torch.Tensor:
        """Return the backbone's logits `(n, D)` for the targets, from one position before each."""
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
        temperature: `T`; the factor `T²` keeps gradients comparable across temperatures.
    """
    teacher_probs = (teacher_logits / temperature).softmax(dim=-1)
    cross_entropy = nn.functional.cross_entropy(
        logits / temperature, teacher_probs, reduction="sum"
    )
    return (cross_entropy - torch.special.entr(teacher_probs).sum()) * temperature**2
