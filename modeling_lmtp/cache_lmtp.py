"""The key-value cache around one verification: what it must be able to do, and keeping one path.

Slots are places along the cache's sequence axis. A verified tree occupies the last `1 + N` of them,
and every row ends in the last slot: rows that accepted less are moved to the right, so that a batch
always looks like a left-padded one. Shapes: `B` rows, `W` slots, `D` head dimension.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .growing_lmtp import give_back_room, make_room
from .replay_lmtp import has_recurrent_states


def check_cache(cache: Cache | None) -> None:
    """Raise a ValueError unless rejected candidates can be taken out of `cache` again."""
    if cache is None:
        raise ValueError(
            "use_lmtp=True needs a key-value cache that can be rolled back, and this model or this "
            "call has none (use_cache=False, or a state-space model). Call generate() without "
            "use_lmtp."
        )
    if any(hasattr(layer, "_quantize") for layer in cache.layers):
        raise ValueError(
            "use_lmtp=True does not support quantized caches: cropping one leaves its length "
            "unchanged. Leave out cache_implementation, or pass 'dynamic'."
        )


def start_rollback(cache: Cache) -> None:
    """Make layers that forget, such as sliding windows, keep what a rollback needs; let others grow.

    Recurrent states cannot be rolled back by slots, see `replay_lmtp`.
    """
    make_room(cache)
    if has_recurrent_states(cache):
        layers = [
            layer for layer in cache.layers if not isinstance(layer, LinearAttentionCacheLayerMixin)
        ]
    else:
        layers = cache.layers
    for layer in layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()


def stop_rollback(cache: Cache) -> None:
    """Undo `start_rollback`, because the cache goes back to the caller."""
    give_back_room(cache)
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


class CacheSlots:
    """What a batch does with the slots of its cache; here every row ends in the last one.

    Args:
        cache: holds the prompts, and later the rows that are still generating.

    Attributes:
        num_prompt_slots: how many slots the prompts have used, those of earlier turns and padding
            included.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.num_prompt_slots = int(cache.get_seq_length())

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Keep, of the last pass's `num_slots` slots, those of each row's path; drop the rest."""
        keep_paths(self.cache, paths, num_slots)

    def take_back(self, num_slots: int) -> None:
        """Drop all of the last pass's `num_slots` slots."""
        self.cache.crop(-num_slots)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, by their place among the present ones."""
        select_rows(self.cache, rows)

    def move_left(self, num_slots: int) -> None:
        """Drop so many first slots, of no meaning in any row."""
        move_left(self.cache, num_slots)


def keep_paths(cache: Cache, paths: Sequence[Sequence[int]], num_slots: int) -> None:
    """Keep, of each row's last `num_slots` slots, those of the nodes on its path; drop the rest.

    Rows with a shorter path than others are moved right, and get slots of no meaning on their left.

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
    """Move all rows left by so many slots, of no meaning in any row; or right, where negative."""
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
