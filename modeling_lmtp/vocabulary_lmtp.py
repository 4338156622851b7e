"""A draft vocabulary: leap heads that only ever propose some of the tokens.

Most of a large vocabulary is never right for a draft, and a pass over the whole unembedding costs as
much as several layers. What is drafted stays exact: a token outside is merely never proposed.

Shapes: `V` vocabulary size, `D` draft vocabulary size, `H` hidden size, `…` any leading dimensions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


class DraftUnembedding:
    """The rows of an unembedding that belong to draft tokens, without weights of its own.

    Args:
        source: the backbone's unembedding.
        token_ids: the draft vocabulary; row `i` of the logits is for `token_ids[i]`.
    """

    def __init__(self, source: Any, token_ids: Sequence[int]) -> None:
        self.source = source
        # Adapted, quantized or offloaded unembeddings have more to them than a weight to cut rows from
        self._has_rows = type(source) is nn.Linear and not source.weight.is_meta
        device = source.weight.device if self._has_rows else None
        self.token_ids = torch.tensor(token_ids, device=device)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        self._frozen_rows = None if learns else self._rows()

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if not self._has_rows:
            return None
        bias = self.source.bias
        return self.source.weight[self.token_ids], None if bias is None else bias[self.token_ids]

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to logits `(…, D)`."""
        if not self._has_rows:
            logits = self.source(hidden_states)
            return logits[..., self.token_ids.to(logits.device)]
        weight, bias = self._frozen_rows or self._rows()  # type: ignore[misc]
        return nn.functional.linear(hidden_states, weight, bias)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the backbone's unembedding parameters."""
        return self.source.parameters()


def draft_labels(
    labels: torch.Tensor, token_ids: Sequence[int], vocab_size: int, ignore_index: int
) -> torch.Tensor:
    """Number labels by the draft vocabulary; a token that cannot be drafted is no target.

    Args:
        labels: any shape, token ids below `vocab_size` or `ignore_index`.
        token_ids: the draft vocabulary.
        vocab_size: `V`.
        ignore_index: the label of what is no target.

    Returns:
        Labels of the same shape: indices into `token_ids`, or `ignore_index`.
    """
    index_of = torch.full((vocab_size,), ignore_index, device=labels.device)
    index_of[torch.tensor(token_ids, device=labels.device)] = torch.arange(
        len(token_ids), device=labels.device
    )
    return torch.where(labels == ignore_index, ignore_index, index_of[labels.clamp(min=0)])
