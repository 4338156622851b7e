"""What a backbone can verify at once, found out by trying it: a tree, a chain, or nothing.

No architecture is known by name. The structure of the cache tells what is worth trying, and a tiny
numeric check (a few dozen tokens, no randomness) whether it comes out right.
"""

import inspect
import weakref
from collections.abc import Collection
from enum import Enum
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .cache_lmtp import keep_path, start_rollback
from .tree_lmtp import DraftTree
from .verification_lmtp import verify

MAX_PROBE_LENGTH = 1024
# Of the largest logit: float32 paths differ by about 1e-6 of it, a token seen wrongly by 1e-3
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION_TOLERANCE = 5e-2


class Tier(str, Enum):
    """The most that one verification may hold, and still be exact."""

    TREE = "tree"
    CHAIN = "chain"
    REFUSED = "refused"


_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Tier]]" = weakref.WeakKeyDictionary()


def decoding_tier(backbone: PreTrainedModel) -> Tier:
    """Return what `backbone` can verify; tried once per model, attention, dtype and device."""
    known = _known.setdefault(backbone, {})
    key = (backbone.config._attn_implementation, backbone.dtype, backbone.device)
    if key not in known:
        known[key] = _try_tiers(backbone)
    return known[key]


@torch.no_grad()
def _try_tiers(backbone: PreTrainedModel) -> Tier:
    if "past_key_values" not in _forward_parameters(backbone):
        return Tier.REFUSED
    tree = DraftTree.from_paths([(0,), (1,), (1, 0)])
    if _may_take_trees(backbone) and _is_exact(backbone, tree, path=(0, 2, 3)):
        return Tier.TREE
    if _is_exact(backbone, DraftTree.chain(3), path=(0, 1)):
        return Tier.CHAIN
    return Tier.REFUSED


def _may_take_trees(backbone: PreTrainedModel) -> bool:
    """Trees need positions given token by token, and slots that can be gathered."""
    takes_positions = "position_ids" in _forward_parameters(backbone)
    takes_masks = backbone.config._attn_implementation in ("eager", "sdpa", "flex_attention")
    layers = _new_cache(backbone).layers
    return takes_positions and takes_masks and all(type(layer) is DynamicLayer for layer in layers)


def _forward_parameters(backbone: PreTrainedModel) -> Collection[str]:
    return inspect.signature(backbone.forward).parameters


def _new_cache(backbone: PreTrainedModel) -> Cache:
    return DynamicCache(config=backbone.config.get_text_config(decoder=True))


def _is_exact(backbone: PreTrainedModel, tree: DraftTree, path: tuple[int, ...]) -> bool:
    """Whether a verified path, and what follows after the rest is dropped, equal a plain pass."""
    length = _probe_length(backbone)
    vocab_size = backbone.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(length + tree.num_nodes + 2, device=backbone.device)[None] % vocab_size
    prompt, tree_ids, next_id = tokens.split([length, 1 + tree.num_nodes, 1], dim=-1)

    cache = _new_cache(backbone)
    model_kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    backbone(input_ids=prompt, **model_kwargs)
    start_rollback(cache)
    known = torch.cat([prompt, tree_ids[:, :1]], dim=-1)
    if "position_ids" in _forward_parameters(backbone):
        model_kwargs["position_ids"] = torch.arange(length + 1, device=backbone.device)[None]
    verified = verify(backbone, known, tree, tree_ids[:, 1:], model_kwargs).logits
    keep_path(cache, path, 1 + tree.num_nodes)
    continued = torch.cat([prompt, tree_ids[:, list(path)], next_id], dim=-1)
    if "position_ids" in model_kwargs:
        model_kwargs["position_ids"] = torch.arange(continued.shape[1], device=backbone.device)[None]
    after = verify(backbone, continued, DraftTree(), continued[:, :0], model_kwargs).logits

    plain = backbone(input_ids=continued, use_cache=False).logits[:, length:]
    ours = torch.cat([verified[:, list(path)], after], dim=1)
    tolerance = TOLERANCE.get(backbone.dtype, LOW_PRECISION_TOLERANCE)
    return bool((ours - plain).abs().max() <= tolerance * plain.abs().max())


def _probe_length(backbone: PreTrainedModel) -> int:
    """Prompt tokens for the check: enough to leave any attention window that the configuration names."""
    settings = backbone.config.get_text_config(decoder=True).to_dict()
    windows = [
        value
        for name, value in settings.items()
        if ("window" in name or "chunk_size" in name) and type(value) is int
    ]
    fitting = [window for window in windows if window < MAX_PROBE_LENGTH]
    return max(fitting, default=0) + 8
