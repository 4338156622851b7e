"""The key-value cache around one verification: what it must be able to do, and keeping one path.

Slots are places along the cache's sequence axis; a verified tree occupies the last `1 + N` of them.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, StaticCache


def check_cache(cache: Cache | None) -> None:
    """Raise a ValueError unless rejected candidates can be taken out of `cache` again."""
    if cache is None:
        raise ValueError(
            "use_lmtp=True needs a key-value cache that can be rolled back, and this model or this "
            "call has none (use_cache=False, or a state-space model). Call generate() without "
            "use_lmtp."
        )
    if isinstance(cache, StaticCache):
        raise ValueError(
            "use_lmtp=True does not support static caches: they cannot be rolled back. Leave out "
            "cache_implementation, or pass 'dynamic'."
        )
    if any(hasattr(layer, "_quantize") for layer in cache.layers):
        raise ValueError(
            "use_lmtp=True does not support quantized caches: cropping one leaves its length "
            "unchanged. Leave out cache_implementation, or pass 'dynamic'."
        )


def start_rollback(cache: Cache) -> None:
    """Make layers that forget, such as sliding windows, keep what a rollback needs."""
    cache.activate_past_recording()


def stop_rollback(cache: Cache) -> None:
    """Undo `start_rollback`, because the cache goes back to the caller."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False


def keep_path(cache: Cache, path: Sequence[int], num_slots: int) -> None:
    """Keep, of the last `num_slots` slots, those of the nodes on `path`, in order; drop the rest.

    Args:
        cache: holds a verified tree in its last slots, node `n` in slot `n` of them.
        path: the accepted nodes, root first: `0 = path[0] < path[1] < …`.
        num_slots: `1 + N`, root and candidates.
    """
    if list(path) != list(range(len(path))):
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                _move_to_front(states, path, num_slots)
    cache.crop(-(num_slots - len(path)))


def _move_to_front(states: torch.Tensor, path: Sequence[int], num_slots: int) -> None:
    """Copy the path's slots to the front of the tree's, in place; `states`: `(B, heads, slots, D)`."""
    tree_slots = states[..., states.shape[-2] - num_slots :, :]
    index = torch.tensor(path, device=states.device)
    tree_slots[..., : len(path), :] = tree_slots.index_select(-2, index)
