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
        nn.init.zeros_(self.bias)


class ResidualBlock(nn.Module):
    """`z' = z + SiLU(W z + b)` (arXiv 2505.17505, as in Medusa); the identity while `W = 0, b = 0`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = ZeroLinear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to `(…, H)`."""
        return hidden_states + nn.functional.silu(self.linear(hidden_states))


class LeapHead(nn.Module):
    """One leap head: its own residual blocks, and its own unembedding if it does not share one.

    Args:
        hidden_size: `H`, the width of what the backbone's unembedding reads.
        num_layers: number of residual blocks, each with its own weights.
        lm_head: the head's own unembedding, or None to reuse the backbone's.
    """

    def __init__(self, hidden_size: int, num_layers: int, lm_head: nn.Linear | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_layers))
        self.lm_head = lm_head

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states `(…, H)` to what the unembedding reads, `(…, H)`."""
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states
