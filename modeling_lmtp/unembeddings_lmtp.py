"""What maps a leap head's features to logits.

`W` is the backbone's unembedding, or its rows for the draft vocabulary.

| `share_lm_head` | `lm_head_rank` | logits of features `f` | a head's own parameters |
|---|---|---|---|
| true | 0 | `W f` | none |
| true | r | `W f + B (A f)`, `B = 0` at the start | `r (H + D)` |
| false | 0 | `W_i f`, `W_i = W` at the start (arXiv 2505.17505) | `H D` |

Shapes: `H` hidden size, `D` size of the vocabulary, or of the draft vocabulary, `r` rank, `B` batch,
`n` states of one head, `…` any leading dimensions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .backbone_lmtp import keep_rows
from .zero_lmtp import ZeroLinear


class LowRankUpdate(nn.Module):
    """`B (A f)`, zero at the start: what a head adds to the logits of a shared unembedding.

    Args:
        hidden_size: `H`.
        rank: `r`.
        vocab_size: `D`.
    """

    def __init__(self, hidden_size: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = ZeroLinear(rank, vocab_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to `(…, D)`."""
        return self.up(self.down(features))

    def resize(self, vocab_size: int) -> None:
        """Give the vocabulary another size; new rows are zero."""
        trained = self.up
        self.up = ZeroLinear(trained.in_features, vocab_size, bias=False)
        self.up.to(device=trained.weight.device, dtype=trained.weight.dtype)
        keep_rows(trained, self.up)


class HeadUnembedding:
    """One head's unembedding, put together of what may be shared and what is its own.

    Args:
        base: `W`, a module or a `DraftUnembedding`, or the head's own `W_i`.
        update: the head's low-rank update, if it has one.
    """

    def __init__(self, base: Any, update: nn.Module | None = None) -> None:
        self.base = base
        self.update = update

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to logits `(…, D)`."""
        logits = self.base(features)
        return logits if self.update is None else logits + self.update(features)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of both."""
        yield from self.base.parameters()
        if self.update is not None:
            yield from self.update.parameters()


def unembed(
    unembeddings: Sequence[HeadUnembedding], features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Unembed several heads' features, in one product with what they share.

    Args:
        unembeddings: one per head.
        features: one `(B, n, H)` per head; `n` may differ.

    Returns:
        `(B, Σ n, D)`.
    """
    base = unembeddings[0].base
    if any(unembedding.base is not base for unembedding in unembeddings):
        own = zip(unembeddings, features, strict=True)
        return torch.cat([unembedding(part) for unembedding, part in own], dim=1)
    logits = base(torch.cat(list(features), dim=1))
    if unembeddings[0].update is None:
        return logits
    updates = [
        unembedding.update(part)  # type: ignore[misc]
        for unembedding, part in zip(unembeddings, features, strict=True)
    ]
    return logits + torch.cat(updates, dim=1)
