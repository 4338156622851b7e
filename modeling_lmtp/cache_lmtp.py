"""The key-value cache: what it supports, keeping accepted paths, moving rows, growing in place.

Slots are positions along the cache's sequence axis. A verified tree occupies the last `1 + N` of them.
Every row ends in the last slot: rows that accepted less are moved to the right, so a batch always looks
left-padded.

Only this file and `static_lmtp` use the attributes of cache layers.

Shapes: `B` rows, `W` slots, `Q` new ones, `D` head dimension.
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

MIN_ROOM = 64  # spare slots of a growing layer; a quarter of its slots if that is more

# The attributes that are used of each kind of layer
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


# --- What a cache supports


def new_cache(config: PreTrainedConfig, static_length: int | None = None) -> Cache:
    """Return an empty cache for a model; with `static_length`, a static one with that many slots."""
    config = config.get_text_config(decoder=True)
    if static_length is not None:
        return StaticCache(config=config, max_cache_len=static_length)
    return DynamicCache(config=config)


def reason_no_rollback(cache: Cache | None) -> str | None:
    """Return why a call's cache cannot drop rejected candidates, or None if it can."""
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
    return reason_unknown_layers(cache)


def reason_unknown_layers(cache: Cache) -> str | None:
    """Return which attributes a cache's layers lack that they had in the tested releases, or None."""
    for layer in cache.layers:
        for kind, names in _ATTRIBUTES.items():
            lacking = [name for name in names if not hasattr(layer, name)]
            if isinstance(layer, kind) and lacking and _is_used(layer):
                lacks = f"cache layers of the kind {type(layer).__name__} lack {', '.join(lacking)}"
                return f"{lacks} in {RELEASE}"
    return None


def _is_used(layer: Any) -> bool:
    return bool(getattr(layer, "is_initialized", True))


def reason_not_croppable(cache: Cache) -> str | None:
    """Return why a used cache cannot be cropped, if it says so itself, or None."""
    if has_recurrent_states(cache) or getattr(cache, "is_croppable", True):
        return None  # recurrent states are restored, not cropped
    return f"its {type(cache).__name__} says that it cannot be cropped"


def reason_not_gatherable(cache: Cache) -> str | None:
    """Return why a tree's path cannot be gathered from a cache's slots, or None if it can."""
    other = {
        type(layer).__name__
        for layer in cache.layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    return (
        f"cache layers of the kind {', '.join(sorted(other))} cannot be gathered" if other else None
    )


def _other_states(layer: Any) -> dict[str, Any]:
    """Return what a layer holds beside the attributes that are used of each kind of layer."""
    known = {name for names in _ATTRIBUTES.values() for name in names}
    ours = ("_buffers", "_views")
    return {
        name: value for name, value in vars(layer).items() if name not in known and name not in ours
    }


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def reason_not_movable(cache: Cache) -> str | None:
    """Return why slots of a used cache must stay where they are, or None if they may move.

    A layer may hold more for each slot than keys and values, such as the keys of an indexer. Its own
    methods crop it and select rows; no public method moves it.
    """
    for layer in cache.layers:
        for name, value in _other_states(layer).items():
            if any(tensor.ndim > 1 for tensor in _tensors(value)):
                return f"cache layers of the kind {type(layer).__name__} hold {name!r} as well"
    return None


def reason_not_restored(cache: Cache, plain: Cache, tolerance: float) -> str | None:
    """Return what a cache that was rolled back holds and plain decoding's does not, or None.

    Keys, values and recurrent states are not compared: the logits show whether they are right.

    Args:
        cache: a cache of one row, after a rollback.
        plain: a cache of the same tokens.
        tolerance: how far states may differ, relative to the largest one.
    """
    for layer, plain_layer in zip(cache.layers, plain.layers, strict=True):
        states = _other_states(layer)
        for name, expected in _other_states(plain_layer).items():
            if not _is_close(states.get(name), expected, tolerance):
                kind = type(plain_layer).__name__
                return f"cache layers of the kind {kind} do not roll back {name!r}"
    return None


def _is_close(state: Any, expected: Any, tolerance: float) -> bool:
    if torch.is_tensor(expected):
        if not torch.is_tensor(state) or state.shape != expected.shape:
            return False
        if not expected.is_floating_point() or expected.numel() == 0:
            return bool(torch.equal(state, expected))
        return bool((state - expected).abs().max() <= tolerance * expected.abs().max())
    if isinstance(expected, dict):
        return isinstance(state, dict) and all(
            _is_close(state.get(key), part, tolerance) for key, part in expected.items()
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(state, type(expected))
            and len(state) == len(expected)
            and all(_is_close(*parts, tolerance) for parts in zip(state, expected, strict=True))
        )
    return not isinstance(expected, int) or state == expected


def windows_of(cache: Cache) -> set[int]:
    """Return the sliding windows of a cache's layers, in tokens."""
    return {layer.sliding_window for layer in cache.layers if hasattr(layer, "sliding_window")}


def window_of(cache: Cache, layer: int) -> int | None:
    """Return the sliding window of one layer, in tokens; None if it has none."""
    return getattr(cache.layers[layer], "sliding_window", None)


def visible_slots(cache: Cache, num_new: int, is_sliding: bool) -> int | None:
    """Return how many of the last slots one kind of layer shows to a pass; None if there is no such layer.

    Args:
        cache: before the pass.
        num_new: `Q`, the tokens of the pass.
        is_sliding: whether the kind is that of layers with a sliding window.
    """
    layers = [n for n, sliding in enumerate(cache.is_sliding) if sliding == is_sliding]
    if not layers:
        return None
    length, _offset = cache.get_mask_sizes(num_new, layers[0])
    return length


def has_recurrent_states(cache: Cache) -> bool:
    """Return whether any layer of a used cache has a recurrent state."""
    return any(
        any(getattr(layer, "is_recurrent_states_initialized", {}).values())
        for layer in cache.layers
    )


def _counts_slots(cache: Cache) -> bool:
    """Return whether any layer has slots; those of pure state-space models have none."""
    return any(hasattr(layer, "get_seq_length") for layer in cache.layers)


def num_slots_of(cache: Cache, default: int = 0) -> int:
    """Return how many slots a cache has used; `default` if none of its layers has slots."""
    return int(cache.get_seq_length()) if _counts_slots(cache) else default


def recurrent_states(cache: Cache) -> Iterator[tuple[dict[int, Any], int]]:
    """Yield the dict and the key of each recurrent and convolution state."""
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            for index, states in getattr(layer, name, {}).items():
                if torch.is_tensor(states):
                    yield getattr(layer, name), index


def crop_attention(cache: Cache, num_slots: int) -> None:
    """Drop the last slots of all layers that have any; recurrent states are not touched."""
    for layer in cache.layers:
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.crop(-num_slots)
        elif isinstance(layer, DynamicLayer):  # a hybrid layer, with attention as well
            DynamicLayer.crop(layer, -num_slots)


# --- Moving slots and rows


def keep_paths(cache: Cache, paths: Sequence[Sequence[int]], num_slots: int) -> None:
    """Keep the slots of each row's accepted nodes among its last `num_slots`; drop the others.

    Rows with a shorter path are moved right, and get padding on their left.

    Args:
        cache: holds verified trees in its last slots, node `n` in the `n`-th of them.
        paths: per row, the accepted nodes, root first: `0 = path[0] < path[1] < …`.
        num_slots: `1 + N`, root and candidates.
    """
    longest = max(len(path) for path in paths)
    moves = [
        (row, list(path), longest - len(path))
        for row, path in enumerate(paths)
        if list(path) != list(range(longest))
    ]
    if moves:
        # One transfer per path and device, not one per layer
        on_device: dict[tuple[int, int, torch.device], torch.Tensor] = {}
        for states in _states_by_slot(cache):
            prefix = states.shape[-2] - num_slots
            for row, path, shift in moves:
                key = row, prefix, states.device
                if key not in on_device:
                    slots = [prefix + node for node in path]
                    on_device[key] = torch.tensor(slots, device=states.device)
                of_row = states if len(paths) == 1 else states[row]
                _keep_path_of_row(of_row, prefix, path, on_device[key], shift)
    cache.crop(-(num_slots - longest))


def _states_by_slot(cache: Cache) -> Iterator[torch.Tensor]:
    """Yield everything the cache holds per slot, as views with the slots in the second-to-last axis."""
    for layer in cache.layers:
        if torch.is_tensor(getattr(layer, "keys", None)):
            yield layer.keys
            yield layer.values
        for states in getattr(layer, "conv_states", {}).values():
            if states is not None:
                yield states.transpose(-1, -2)


def _keep_path_of_row(
    states: torch.Tensor, prefix: int, path: list[int], slots: torch.Tensor, shift: int
) -> None:
    """Gather the path's slots after those of the prefix, then move both to the right, in place.

    Args:
        states: `(…, W, D)`, one row.
        prefix: the number of slots before the root's.
        path: the accepted nodes, root first.
        slots: theirs, on the states' device.
        shift: the number of slots to move by.
    """
    end = prefix + len(path)
    if path != list(range(len(path))):
        states[..., prefix:end, :] = states.index_select(-2, slots)
    if shift:
        states[..., shift : end + shift, :] = states[..., :end, :].clone()


def select_rows(cache: Cache, rows: Sequence[int]) -> None:
    """Keep only these rows of the batch, in this order."""
    cache.reorder_cache(torch.tensor(rows))


def move_left(cache: Cache, num_slots: int) -> None:
    """Drop the first slots of all rows, which are padding; add padding if `num_slots` is negative."""
    if num_slots == 0:
        return
    for layer in cache.layers:
        if not torch.is_tensor(getattr(layer, "keys", None)):
            continue
        length = layer.get_seq_length() - num_slots
        layer.keys = _last_slots(layer.keys, length, layer)
        layer.values = _last_slots(layer.values, length, layer)
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length


def _last_slots(states: torch.Tensor, length: int, layer: Any) -> torch.Tensor:
    """Return the last `length` slots of `(B, heads, W, D)`, or as many as the layer's window holds."""
    if hasattr(layer, "sliding_window"):
        length = min(length, layer.sliding_window - 1)
    missing = length - states.shape[-2]
    if missing > 0:
        return torch.nn.functional.pad(states, (0, 0, missing, 0))
    return states[..., -missing:, :]


def take_row(cache: Cache, row: int) -> Cache:
    """Return a new cache with a copy of one row."""
    row_cache = copy.copy(cache)
    row_cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in row_cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, dict(value))
    select_rows(row_cache, [row])
    return row_cache


def join_rows(cache: Cache, rows: Sequence[Cache]) -> None:
    """Replace the contents of `cache` by these rows, which have the same number of slots."""
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


# --- Growing in place


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose `keys` and `values` are views of the first slots of larger buffers.

    Transformers' dynamic layer concatenates, so it copies all its slots in every pass; in a long text
    that is more than the pass itself reads. This layer copies them only when a buffer is full. Any
    operation that assigns other keys and values, such as a selection of rows, invalidates the buffers,
    and the next pass allocates new ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `(B, heads, Q, D)`; return all slots, `(B, heads, W + Q, D)`."""
        if not self.is_initialized or self.keys.numel() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        known, length = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._has_room(length):
            self._buffers = _new_buffer(self.keys, length), _new_buffer(self.values, length)
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., known:length, :] = new
        self._set_length(length)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last slots, but keep the buffers."""
        if tokens_to_remove < 0 and self._has_room(0):
            self._set_length(max(0, self.keys.shape[-2] + tokens_to_remove))
        else:
            super().crop(tokens_to_remove)

    def _has_room(self, length: int) -> bool:
        """Return whether keys and values are the current views, of buffers with that many slots."""
        if self._buffers is None or self._views is None:
            return False
        is_view = self.keys is self._views[0] and self.values is self._views[1]
        return is_view and length <= self._buffers[0].shape[-2]

    def _set_length(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)
        self._views = self.keys, self.values


def _new_buffer(states: torch.Tensor, length: int) -> torch.Tensor:
    """Return a buffer for `length` slots and more, with `(B, heads, W, D)` in its first slots."""
    capacity = length + max(MIN_ROOM, length // 4)
    buffer = states.new_empty((*states.shape[:-2], capacity, states.shape[-1]))
    buffer[..., : states.shape[-2], :] = states
    return buffer


def _copy_attributes(layer: Any, other: Any) -> Any:
    """Give another kind of layer everything that a layer holds, except its buffers."""
    attributes = {
        name: value for name, value in vars(layer).items() if name not in ("_buffers", "_views")
    }
    vars(other).update(attributes)
    return other


def start_rollback(cache: Cache) -> None:
    """Let a cache be rolled back until `stop_rollback`.

    Layers that drop old slots, such as sliding windows, keep what a rollback needs. Others grow in place.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # not a subclass, whose additions would be lost
            cache.layers[number] = _copy_attributes(layer, GrowingLayer())
    copies_states = has_recurrent_states(cache)  # see `rollback_lmtp.ReplayedSlots`
    for layer in cache.layers:
        is_copied = copies_states and isinstance(layer, LinearAttentionCacheLayerMixin)
        if hasattr(layer, "activate_past_recording") and not is_copied:
            layer.activate_past_recording()


def stop_rollback(cache: Cache) -> None:
    """Undo `start_rollback` before the caller gets the cache: copies of it must not share buffers."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is GrowingLayer:
            cache.layers[number] = _copy_attributes(layer, DynamicLayer())
        elif hasattr(layer, "record_past"):
            layer.record_past = False
