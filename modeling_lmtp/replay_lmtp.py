"""Rolling back what has no slots: the recurrent states of linear attention and state-space layers.

Such a state cannot be cropped. It is copied while it is known to be right, put back when a candidate
was rejected, and the tokens since then are run again at the head of the next pass: known tokens cost
little there, because a pass over a few tokens costs about as much as one over a single token.

Shapes: `B` rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

# Known tokens that a pass may run again; then one pass without candidates gives a new copy
MAX_REPLAY = 16


def has_recurrent_states(cache: Cache) -> bool:
    """Whether any layer of a cache that has been used holds a recurrent state."""
    return any(
        any(getattr(layer, "is_recurrent_states_initialized", {}).values())
        for layer in cache.layers
    )


class Snapshot:
    """A copy of a cache's recurrent and convolution states.

    Args:
        cache: right as it is.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.copies = [states[index].clone() for states, index in _states(cache)]

    def restore(self, num_slots: int) -> None:
        """Put the states back, and drop the slots that attention layers got since."""
        for (states, index), copied in zip(_states(self.cache), self.copies, strict=True):
            states[index].copy_(copied)
        for layer in self.cache.layers:
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.crop(-num_slots)
            elif isinstance(layer, DynamicLayer):  # attention beside the recurrence
                DynamicLayer.crop(layer, -num_slots)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows of the copy, as `select_rows` does of the cache."""
        self.copies = [copied[list(rows)] for copied in self.copies]


def _states(cache: Cache) -> Iterator[tuple[dict[int, Any], int]]:
    """Yield each state by where it is kept."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            for index, states in getattr(layer, name, {}).items():
                if torch.is_tensor(states):
                    yield getattr(layer, name), index
