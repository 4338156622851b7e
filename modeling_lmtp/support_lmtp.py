"""What a backbone can verify in one pass, found out by trying: a tree, a chain, or nothing.

No architecture is recognised by name. The structure of the cache says what is worth trying, and a small
numeric probe (`probe_lmtp`) whether the result is exact.

Shapes: `B` rows, `P` prompt length, `V` vocabulary size.
"""

import weakref
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from .cache_lmtp import (
    new_cache,
    reason_not_gatherable,
    reason_not_movable,
    reason_unknown_layers,
    windows_of,
)
from .hooks_lmtp import fingerprint
from .probe_lmtp import (
    CHAIN,
    CHUNKS,
    MAX_PROBE_LENGTH,
    PLAIN_TOLERANCE,
    RAGGED_CHAIN,
    RAGGED_TREE,
    TREE,
    named_windows,
    precision_of,
    reason_not_verified,
    reason_padding_differs,
    takes_ragged,
)
from .transformers_lmtp import (
    attention_implementation,
    reason_unavailable,
    takes_cache,
    takes_positions,
    with_cache,
)

# Ends of the names of how many keys, or blocks of keys, an indexer selects
SELECTIONS = ("topk", "topk_blocks", "budget")
# Names of the number of positions in configurations
POSITION_SETTINGS = ("max_position_embeddings", "max_seq_len", "n_positions")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # types of rotary embeddings


class Tier(str, Enum):
    """The most general draft that one pass verifies exactly."""

    TREE = "tree"
    CHAIN = "chain"
    PLAIN = "plain"


@dataclass(frozen=True)
class Support:
    """What a backbone can do.

    Args:
        tier: what one pass verifies.
        reason: why it is no higher tier.
        ragged: whether rows of a batch may accept different lengths; otherwise they run in lockstep.
    """

    tier: Tier
    reason: str
    ragged: bool = False


_cached: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Support]]" = (
    weakref.WeakKeyDictionary()
)


def decoding_support(
    backbone: PreTrainedModel, static: bool = False, single_row: bool = False
) -> Support:
    """Return what `backbone` can verify, probed once per model, attention, dtype and device.

    It is probed again when its modules, their hooks or their modes have changed.

    Args:
        backbone: the model.
        static: over a static cache, where the answer is a tree or nothing.
        single_row: for one row, which needs no probe of several rows; `ragged` is False then.
    """
    cached = _cached.setdefault(backbone, {})
    attention = attention_implementation(backbone.config)
    precision = backbone.dtype, precision_of(backbone)
    key = (fingerprint(backbone), attention, precision, backbone.device, static)
    probes = (_probe_static, _probe_static_rows) if static else (_probe_tiers, _probe_rows)
    for several_rows in (False,) if single_row else (False, True):
        if (key, several_rows) not in cached:
            support = probes[several_rows](backbone)
            if support.tier is Tier.PLAIN:  # the cause of a failure may be gone by the next call
                return support
            cached[key, several_rows] = support
    return cached[key, not single_row]


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions in a model's configuration, or None if it names none."""
    config = config.get_text_config(decoder=True)
    values = [getattr(config, name, None) for name in POSITION_SETTINGS]
    return min((value for value in values if type(value) is int and value > 0), default=None)


def reason_too_long(config: PreTrainedConfig, max_length: int) -> str | None:
    """Return why texts of that length cannot be drafted for, or None if they can.

    Rotary embeddings that are rescaled with the length of the text count drafted tokens too. Beyond the
    length at which the scaling starts, a verification pass would not compute what plain decoding
    computes. Attention to the keys that an indexer scores highest depends on the length as well: which of
    several keys with the same score, such as 0, is among them may change with the shape of a pass.
    """
    config = config.get_text_config(decoder=True)
    num_keys = _num_selected_keys(config)
    if num_keys is not None and max_length > num_keys:
        return (
            f"its layers attend to {num_keys} selected keys of longer texts, and this call allows "
            f"{max_length} tokens"
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *parameters.values()):
        if isinstance(kind, dict) and kind.get("rope_type") in LENGTH_DEPENDENT:
            limit = kind.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", config.max_position_embeddings
            )
            if max_length > limit:
                return (
                    f"its {kind['rope_type']!r} rotary embeddings depend on the length of the text beyond "
                    f"{limit} tokens, and this call allows {max_length}"
                )
    return None


def _num_selected_keys(config: PreTrainedConfig) -> int | None:
    """Return how many keys an indexer selects, by the configuration, or None if it names no number.

    Texts up to that length are attended to as a whole.
    """
    settings = config.get_text_config(decoder=True).to_dict()
    sizes = []
    for name, value in settings.items():
        is_selection = name.startswith("index") and name.endswith(SELECTIONS)
        if (is_selection or name == "keep_window_size") and type(value) is int:
            in_blocks = name.endswith("blocks")
            sizes.append(value * (settings.get("index_block_size") or 1 if in_blocks else 1))
    return min(sizes, default=None)


def decoding_tier(backbone: PreTrainedModel) -> Tier:
    """Return the tier of `decoding_support`."""
    return decoding_support(backbone).tier


@torch.no_grad()
def _probe_tiers(backbone: PreTrainedModel) -> Support:
    reason = reason_unavailable(backbone)
    if reason is None and not takes_cache(backbone):
        reason = "its forward takes no key-value cache"
    if reason is not None:
        return Support(Tier.PLAIN, reason)
    unknown = _reason_unknown_selection(backbone)
    if unknown is not None:
        return Support(Tier.PLAIN, unknown)
    fixed = _reason_fixed_slots(backbone)
    no_tree = (
        fixed or _reason_no_trees(backbone) or reason_not_verified(backbone, [TREE], [(0, 2, 3)])
    )
    no_tree = no_tree or reason_padding_differs(backbone)
    if no_tree is None:
        return Support(Tier.TREE, "trees are exact")
    no_chain = reason_not_verified(backbone, [CHAIN], [(0, 1)])
    if no_chain is None:
        return Support(Tier.CHAIN, f"no trees: {no_tree}")
    if backbone.training:
        no_chain += "; it is in training mode, call eval() first"
    return Support(Tier.PLAIN, no_chain)


@torch.no_grad()
def _probe_rows(backbone: PreTrainedModel) -> Support:
    """Return what several rows can do: whether they may accept different lengths."""
    support = decoding_support(backbone, single_row=True)
    if support.tier is Tier.TREE:
        return replace(support, ragged=takes_ragged(backbone, TREE, RAGGED_TREE))
    is_fixed = _reason_fixed_slots(backbone) is not None
    return replace(support, ragged=not is_fixed and takes_ragged(backbone, CHAIN, RAGGED_CHAIN))


@torch.no_grad()
def _probe_static(backbone: PreTrainedModel) -> Support:
    support = decoding_support(backbone, single_row=True)
    if support.tier is not Tier.TREE:
        return Support(Tier.PLAIN, support.reason)
    reason = reason_not_verified(backbone, [TREE], [(0, 2, 3)], static=True)
    return support if reason is None else Support(Tier.PLAIN, reason)


@torch.no_grad()
def _probe_static_rows(backbone: PreTrainedModel) -> Support:
    support = decoding_support(backbone)
    if not support.ragged:
        return support
    reason = reason_not_verified(backbone, [TREE] * 2, RAGGED_TREE, static=True)
    return support if reason is None else Support(Tier.PLAIN, reason)


def _reason_unknown_selection(backbone: PreTrainedModel) -> str | None:
    """Return why no text is short enough for its layers to attend to all of it, or None if some are.

    A cache that holds more per slot than keys and values has layers that choose among the slots, and the
    configuration should say how many of them; see `reason_too_long`.
    """
    cache = new_cache(backbone.config)
    tokens = torch.arange(4, device=backbone.device)[None]
    tokens = tokens % backbone.get_output_embeddings().weight.shape[0]
    try:
        backbone(**with_cache({"input_ids": tokens, "use_cache": True}, cache))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the probe of a chain says what is wrong
        return None
    unknown = reason_unknown_layers(cache)
    if unknown is not None:  # other names for keys and values are no further states
        return unknown
    reason = reason_not_movable(cache)
    if reason is None or _num_selected_keys(backbone.config) is not None:
        return None
    return f"{reason}, and its configuration does not say how many keys they select"


def _reason_fixed_slots(backbone: PreTrainedModel) -> str | None:
    """Return why slots of the cache must stay where plain decoding has them, or None if they may move.

    In a tree, and in rows that are moved, slots are not the tokens' positions.
    """
    cache = new_cache(backbone.config)
    # Chunks of a text may start at slots. The probe shows it if they are short enough for it
    chunks = [size for size in named_windows(backbone, CHUNKS) if size >= MAX_PROBE_LENGTH]
    if chunks:
        return f"its attention is cut into chunks of {chunks[0]} tokens, too many to try"
    try:
        if _reads_num_slots(backbone, cache):
            return "its layers take positions from the slots of the cache"
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the probe of a chain says what is wrong
        return None
    return reason_not_movable(cache)


def _reads_num_slots(backbone: PreTrainedModel, cache: Cache) -> bool:
    """Return whether a block asks the cache how many slots it has used, and not only the model.

    Such a block computes with slots, where others compute with `position_ids`; a scale that grows every
    few thousand tokens would show in no short probe.
    """
    blocks = [
        block
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]
    depth, asked = 0, False
    get_seq_length = cache.get_seq_length

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    def record(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked = asked or depth > 0
        return get_seq_length(*args, **kwargs)

    cache.get_seq_length = record
    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave, always_call=True) for block in blocks]
    try:
        tokens = torch.arange(4, device=backbone.device)[None]
        tokens = tokens % backbone.get_output_embeddings().weight.shape[0]
        backbone(**with_cache({"input_ids": tokens, "use_cache": True}, cache))
    finally:
        del cache.get_seq_length
        for handle in handles:
            handle.remove()
    return asked


def _reason_no_trees(backbone: PreTrainedModel) -> str | None:
    """Return why no tree is worth trying, or None if one is."""
    attention = attention_implementation(backbone.config)
    if attention not in ("eager", "sdpa"):
        return f"{attention!r} attention takes no tree mask"
    if not takes_positions(backbone):
        return "its forward takes no position_ids"
    cache = new_cache(backbone.config)
    reason = reason_not_gatherable(cache)
    if reason is not None:
        return reason
    # A window that the configuration names and the cache lacks may be measured in slots instead of
    # positions. The probe would tell only in float32, and if the keys at the window's edge matter to the
    # model. Where the configuration says which layers have windows, the cache has them all
    missing = sorted(set(named_windows(backbone)) - windows_of(cache))
    config = backbone.config.get_text_config(decoder=True)
    if missing and not getattr(config, "layer_types", None):
        return f"its cache does not know the attention window of {missing[0]} tokens"
    if missing and precision_of(backbone) not in PLAIN_TOLERANCE:
        return (
            f"in {precision_of(backbone)}, no probe can tell how it measures its attention windows"
        )
    return None
