"""The key-value cache around one verification: what it must be able to do, and keeping one path.

Slots are places along the cache's sequence axis. A verified tree occupies the last `1 + N` of them,
and every row ends in the last slot: rows that accepted less are moved to the right, so that a batch
always looks like a left-padded one.

This file and `static_lmtp` are the only ones that know the attributes of cache layers.

Shapes: `B` rows, `W` slots, `C ≥ W` slots with a place, `Q` new ones, `D` head dimension.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache

from .transformers_lmtp import (
    RELEASE,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

MIN_ROOM = 64  # slots; beyond it, room for a quarter of what there is

# What is read of each kind of layer once it has been used
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    DynamicLayer: ("keys", "values"),
    DynamicSlidingWindowLayer: (
        "sliding_window",
        "cumulative_length",
        "record_past",
        "activate_past_recording",
    ),
    LinearAttentionCacheLayerMixin: (
        "conv_states",
        "recurrent_states",
        "is_recurrent_states_initialized",
        "record_past",
        "activate_past_recording",
    ),
    StaticLayer: ("keys", "values", "cumulative_length"),
}


# --- What a cache is


def new_cache(config: PreTrainedConfig, static_length: int | None = None) -> Cache:
    """Return an empty cache for a model; with `static_length`, a static one of that many slots."""
    config = config.get_text_config(decoder=True)
    if static_length is not None:
        return StaticCache(config=config, max_cache_len=static_length)
    return DynamicCache(config=config)


def why_not_rolled_back(cache: Cache | None) -> str:
    """Say why rejected candidates cannot be taken out of a cache again; nothing if they can.

    Args:
        cache: of a call, perhaps a cache of the caller's own.
    """
    if cache is None:
        return (
            "this model or this call has no key-value cache that can be rolled back "
            "(use_cache=False, or a model that keeps its state elsewhere)"
        )
    if type(cache) not in (DynamicCache, StaticCache):
        return (
            f"a {type(cache).__name__} is not known to roll back; pass a DynamicCache or a StaticCache, "
            "and no other cache_implementation than 'dynamic', 'offloaded' or 'static'"
        )
    return why_unknown_layers(cache)


def why_unknown_layers(cache: Cache) -> str:
    """Say what of a cache's layers is not what it was in the releases tested; nothing if all is there."""
    for layer in cache.layers:
        for kind, names in _ATTRIBUTES.items():
            lacking = [name for name in names if not hasattr(layer, name)]
            if isinstance(layer, kind) and lacking and _is_used(layer):
                lacks = f"cache layers of the kind {type(layer).__name__} lack {', '.join(lacking)}"
                return f"{lacks} in {RELEASE}"
    return ""


def _is_used(layer: Any) -> bool:
    return bool(getattr(layer, "is_initialized", True))


def why_not_cropped(cache: Cache) -> str:
    """Say why a used cache cannot be cropped without a trace, if it says so itself."""
    if has_recurrent_states(cache) or getattr(cache, "is_croppable", True):
        return ""
    return f"its {type(cache).__name__} says that it cannot be cropped"


def why_not_gathered(cache: Cache) -> str:
    """Say why a path of a tree cannot be gathered among a cache's slots; nothing if it can."""
    other = {
        type(layer).__name__
        for layer in cache.layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    return (
        f"cache layers of the kind {', '.join(sorted(other))} cannot be gathered" if other else ""
    )


def windows_of(cache: Cache) -> set[int]:
    """Return the attention windows that the layers of a cache keep, in tokens."""
    return {layer.sliding_window for layer in cache.layers if hasattr(layer, "sliding_window")}


def window_of(cache: Cache, layer: int) -> int | None:
    """Return the attention window that one layer keeps, in tokens; None if it keeps everything."""
    return getattr(cache.layers[layer], "sliding_window", None)


def visible_slots(cache: Cache, num_new: int, is_sliding: bool) -> int | None:
    """Return how many slots the layers of one kind show to a pass over new tokens.

    Args:
        cache: before the pass.
        num_new: `Q`.
        is_sliding: of layers with a window, or of the others.

    Returns:
        The last so many; None if there is no such layer.
    """
    layers = [n for n, sliding in enumerate(cache.is_sliding) if sliding == is_sliding]
    if not layers:
        return None
    length, _offset = cache.get_mask_sizes(num_new, layers[0])
    return length


def has_recurrent_states(cache: Cache) -> bool:
    """Return whether any layer of a cache that has been used holds a recurrent state."""
    return any(
        any(getattr(layer, "is_recurrent_states_initialized", {}).values())
        for layer in cache.layers
    )


def _counts_slots(cache: Cache) -> bool:
    """Whether any layer has slots: pure state-space models keep none."""
    return any(hasattr(layer, "get_seq_length") for layer in cache.layers)


def num_slots_of(cache: Cache, default: int = 0) -> int:
    """Return how many slots a cache has used; `default` if none of its layers has slots."""
    return int(cache.get_seq_length()) if _counts_slots(cache) else default


def recurrent_states(cache: Cache) -> Iterator[tuple[dict[int, Any], int]]:
    """Yield each recurrent and convolution state by where it is kept: a dict and a key."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            for index, states in getattr(layer, name, {}).items():
                if torch.is_tensor(states):
                    yield getattr(layer, name), index


def crop_attention(cache: Cache, num_slots: int) -> None:
    """Drop the last slots of all layers that have slots; recurrent states stay as they are."""
    for layer in cache.layers:
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.crop(-num_slots)
        elif isinstance(layer, DynamicLayer):  # attention beside the recurrence
            DynamicLayer.crop(layer, -num_slots)


# --- Moving slots and rows


def keep_paths(cache: Cache, paths: Sequence[Sequence[int]], num_slots: int) -> None:
    """Keep, of each row's last `num_slots` slots, those of the nodes on its path; drop the rest.

    Rows with a shorter path than others are moved right, and get padding on their left.

    Args:
        cache: holds verified trees in its last slots, node `n` in slot `n` of them.
        paths: per row the accepted nodes, root first: `0 = path[0] < path[1] < …`.
        num_slots: `1 + N`, root and candidates.
    """
    longest = max(len(path) for path in paths)
    moves = [
        (row, list(path), longest - len(path))
        for row, path in enumerate(paths)
        if list(path) != list(range(longest))
    ]
    if moves:
        on_device: dict[
            tuple[int, torch.device], torch.Tensor
        ] = {}  # paths, the same in all layers
        for states in _states_by_slot(cache):
            for row, path, shift in moves:
                key = row, states.device
                if key not in on_device:
                    on_device[key] = torch.tensor(path, device=states.device)
                _keep_path_of_row(states[row], path, on_device[key], num_slots, shift)
    cache.crop(-(num_slots - longest))


def _states_by_slot(cache: Cache) -> Iterator[torch.Tensor]:
    """Yield all that the cache holds per slot, as views whose second-to-last axis is the slots."""
    for layer in cache.layers:
        if torch.is_tensor(getattr(layer, "keys", None)):
            yield layer.keys
            yield layer.values
        for states in getattr(layer, "conv_states", {}).values():
            if states is not None:
                yield states.transpose(-1, -2)


def _keep_path_of_row(
    states: torch.Tensor, path: list[int], nodes: torch.Tensor, num_slots: int, shift: int
) -> None:
    """Gather the path's slots behind those of the prefix, then move all that to the right, in place.

    Args:
        states: `(…, W, D)`, one row.
        path, nodes: the accepted nodes, on the host and as a tensor beside the states.
        num_slots: `1 + N`.
        shift: by how many slots.
    """
    prefix = states.shape[-2] - num_slots
    if path != list(range(len(path))):
        accepted = states[..., prefix:, :].index_select(-2, nodes)
        states[..., prefix : prefix + len(path), :] = accepted
    if shift:
        kept = states[..., : prefix + len(path), :].clone()
        states[..., shift : prefix + len(path) + shift, :] = kept


def select_rows(cache: Cache, rows: Sequence[int]) -> None:
    """Keep these rows of the batch, in this order."""
    cache.reorder_cache(torch.tensor(rows))


def move_left(cache: Cache, num_slots: int) -> None:
    """Move all rows left by so many slots, padding in every row; or right, where negative."""
    if num_slots == 0:
        return
    for layer in cache.layers:
        if not torch.is_tensor(getattr(layer, "keys", None)):
            continue
        length = layer.get_seq_length() - num_slots
        layer.keys = _flush_right(layer.keys, length, layer)
        layer.values = _flush_right(layer.values, length, layer)
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length


def _flush_right(states: torch.Tensor, length: int, layer: Any) -> torch.Tensor:
    """Return the last slots of `(B, heads, W, D)`: `length`, or as many as the layer's window holds."""
    if hasattr(layer, "sliding_window"):
        length = min(length, layer.sliding_window - 1)
    missing = length - states.shape[-2]
    if missing > 0:
        return torch.nn.functional.pad(states, (0, 0, missing, 0))
    return states[..., -missing:, :]


def take_row(cache: Cache, row: int) -> Cache:
    """Return a new cache that holds one row."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in taken.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, dict(value))
    select_rows(taken, [row])
    return taken


def join_rows(cache: Cache, rows: Sequence[Cache]) -> None:
    """Make `cache` hold these rows, which have the same number of slots."""
    for number, layer in enumerate(cache.layers):
        parts = [row.layers[number] for row in rows]
        vars(layer).update(vars(parts[0]))
        if torch.is_tensor(getattr(layer, "keys", None)):
            layer.keys = torch.cat([part.keys for part in parts])
            layer.values = torch.cat([part.values for part in parts])
        for name in ("conv_states", "recurrent_states"):
            for index, states in getattr(layer, name, {}).items():
                if torch.is_tensor(states):
                    joined = torch.cat([getattr(part, name)[index] for part in parts])
                    getattr(layer, name)[index] = joined


# --- Room to grow


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose `keys` and `values` are the first slots of larger tensors.

    Transformers' dynamic layer concatenates, and so copies all its slots in every pass; in a long text that
    is more than the pass itself reads. Here all slots move only when the room is used up. Whatever else
    gives the layer other keys and values (a selection of rows, say) takes the room away, and the next pass
    makes new room.
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


def _converted(layer: Any, other: Any) -> Any:
    own = {name: value for name, value in vars(layer).items() if name not in ("_room", "_shown")}
    vars(other).update(own)
    return other


def start_rollback(cache: Cache) -> None:
    """Let a cache be rolled back until `stop_rollback`.

    Layers that forget, such as sliding windows, keep what a rollback needs; plain ones grow in place.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # what a subclass does beside would be lost
            cache.layers[number] = _converted(layer, GrowingLayer())
    keeps_states = has_recurrent_states(cache)  # copied instead, see `rollback_lmtp.ReplayedSlots`
    for layer in cache.layers:
        is_copied = keeps_states and isinstance(layer, LinearAttentionCacheLayerMixin)
        if hasattr(layer, "activate_past_recording") and not is_copied:
            layer.activate_past_recording()


def stop_rollback(cache: Cache) -> None:
    """Undo `start_rollback`, because the cache goes back to the caller: copies of it may not share room."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer:
            cache.layers[number] = _converted(layer, DynamicLayer())
        elif hasattr(layer, "record_past"):
            layer.record_past = False
