"""Layers that start at zero: what they are added to starts as it was."""

from torch import nn


class ZeroLinear(nn.Linear):
    """A linear layer whose weight and bias start at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
