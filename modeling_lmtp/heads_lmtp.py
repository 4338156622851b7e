"""Leap heads: residual blocks on the backbone's last hidden state, then an unembedding.

Shapes: `…` any leading dimensions, `H` hidden size, `V` vocabulary size.
"""

import torch
from torch import nn


class ZeroLinear(nn.Linear):
    """A linear layer whose weight and bias start at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ResidualBlock(nn.Module):
    """`z' = z + SiLU(W z + b)` (arXiv 2505.17505, as in Medusa); the identity while `W = 0, b = 0`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = ZeroLinear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """Map `(…, H)` to `(…, H)`; `context`, `(…, H)`, is added before the activation."""
        return hidden_states + nn.functional.silu(self.linear(hidden_states) + context)


class LeapHead(nn.Module):
    """One leap head: its own residual blocks, and its own unembedding if it does not share one.

    Args:
        hidden_size: `H`, the width of what the backbone's unembedding reads.
        num_layers: number of residual blocks, each with its own weights.
        context_size: `c·E`, the width of its embedded context (see `context_lmtp`); 0 for none.
        lm_head: the head's own unembedding, or None to reuse the backbone's.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        context_size: int = 0,
        lm_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.context = ZeroLinear(context_size, hidden_size, bias=False) if context_size else None
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_layers))
        self.lm_head = lm_head

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map states `(…, H)`, and their context `(…, c·E)`, to what the unembedding reads, `(…, H)`."""
        first, *others = self.blocks
        if self.context is None:
            hidden_states = first(hidden_states)
        else:
            hidden_states = first(hidden_states, self.context(context))
        for block in others:
            hidden_states = block(hidden_states)
        return hidden_states
