"""Cache layers with room to grow: new slots are written behind the old ones, which stay where they are.

Transformers' dynamic layer concatenates, and so copies all its slots in every pass; in a long text that
is more than the pass itself reads. Here all slots move only when the room is used up.

Shapes: `B` rows, `W` slots, `C ≥ W` slots with a place, `Q` new ones, `D` head dimension.
"""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 64  # slots; beyond it, room for a quarter of what there is


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose `keys` and `values` are the first slots of larger tensors.

    Whatever else gives it other keys and values (a selection of rows, say) takes the room away, and
    the next pass makes new room.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shown: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `(B, heads, Q, D)` behind the slots there are; return all, `(B, heads, W + Q, D)`."""
        if not self.is_initialized or self.keys.numel() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        known, length = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._has_room(length):
            self._room = _with_room(self.keys, length), _with_room(self.values, length)
        assert self._room is not None
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., known:length, :] = new
        self._show(length)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last slots; their places are kept."""
        in_room = self._has_room(0)
        super().crop(tokens_to_remove)
        if in_room:
            self._show(self.keys.shape[-2])

    def _has_room(self, length: int) -> bool:
        """Whether keys and values are those last shown, and so many slots have a place."""
        if self._room is None or self._shown is None:
            return False
        is_own = self.keys is self._shown[0] and self.values is self._shown[1]
        return is_own and length <= self._room[0].shape[-2]

    def _show(self, length: int) -> None:
        assert self._room is not None
        self.keys, self.values = (room[..., :length, :] for room in self._room)
        self._shown = self.keys, self.values


def _with_room(states: torch.Tensor, length: int) -> torch.Tensor:
    """Copy `(B, heads, W, D)` into the first slots of a larger tensor."""
    capacity = length + max(MIN_ROOM, length // 4)
    room = states.new_empty((*states.shape[:-2], capacity, states.shape[-1]))
    room[..., : states.shape[-2], :] = states
    return room


def make_room(cache: Cache) -> None:
    """Let plain dynamic layers grow in place from now on."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # what a subclass does beside would be lost
            cache.layers[number] = _converted(layer, GrowingLayer())


def give_back_room(cache: Cache) -> None:
    """Undo `make_room`, because the cache goes back to the caller: copies of it may not share room."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer:
            cache.layers[number] = _converted(layer, DynamicLayer())


def _converted(layer: DynamicLayer, other: DynamicLayer) -> DynamicLayer:
    own = {name: value for name, value in vars(layer).items() if name not in ("_room", "_shown")}
    vars(other).update(own)
    return other
