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
from transformers.utils import logging

from .cache_lmtp import keep_path, start_rollback
from .tree_lmtp import DraftTree
from .verification_lmtp import Verifier

logger = logging.get_logger(__name__)

MAX_PROBE_LENGTH = 1024
# Of the largest logit. Rejected candidates must leave no trace at all: the passes compared have the
# same shapes, so that only experts batched differently may round differently. A plain pass has other
# shapes, and rounds differently everywhere.
TRACE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PLAIN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION_TRACE_TOLERANCE = 1e-2
LOW_PRECISION_PLAIN_TOLERANCE = 2e-1


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
    if _may_take_trees(backbone) and _works(backbone, tree, path=(0, 2, 3)):
        return Tier.TREE
    if _works(backbone, DraftTree.chain(3), path=(0, 1)):
        return Tier.CHAIN
    return Tier.REFUSED


def _works(backbone: PreTrainedModel, tree: DraftTree, path: tuple[int, ...]) -> bool:
    """Whether the model takes such a draft at all, and exactly."""
    try:
        return _is_exact(backbone, tree, path)
    except Exception as error:  # whatever it is that this model or its cache cannot do
        logger.info(f"{type(backbone).__name__} cannot verify {tree.paths}: {error!r}")
        return False


def _may_take_trees(backbone: PreTrainedModel) -> bool:
    """Trees need positions given token by token, and cache slots that can be gathered.

    A window that the configuration names and the cache does not know may be measured in slots,
    which only float32 is precise enough to find out.
    """
    takes_positions = "position_ids" in _forward_parameters(backbone)
    takes_masks = backbone.config._attn_implementation in ("eager", "sdpa", "flex_attention")
    full_attention = all(type(layer) is DynamicLayer for layer in _new_cache(backbone).layers)
    can_tell = backbone.dtype in PLAIN_TOLERANCE or not _windows(backbone)
    return takes_positions and takes_masks and full_attention and can_tell


def _forward_parameters(backbone: PreTrainedModel) -> Collection[str]:
    return inspect.signature(backbone.forward).parameters


def _new_cache(backbone: PreTrainedModel) -> Cache:
    return DynamicCache(config=backbone.config.get_text_config(decoder=True))


def _windows(backbone: PreTrainedModel) -> list[int]:
    """The attention windows that the configuration names, in tokens."""
    settings = backbone.config.get_text_config(decoder=True).to_dict()
    return [
        value
        for name, value in settings.items()
        if ("window" in name or "chunk_size" in name) and type(value) is int and value > 0
    ]


def _is_exact(backbone: PreTrainedModel, tree: DraftTree, path: tuple[int, ...]) -> bool:
    """Whether a verified path, and what follows it, are free of rejected candidates and plain."""
    vocab_size = backbone.get_output_embeddings().weight.shape[0]
    windows = [window for window in _windows(backbone) if window < MAX_PROBE_LENGTH]
    length = max(windows, default=0) + 8  # long enough to leave any window
    tokens = torch.arange(length + len(path) + 1, device=backbone.device)[None] * 7 % vocab_size

    logits = _verified_logits(backbone, tree, path, tokens, rejected=1)
    others = _verified_logits(backbone, tree, path, tokens, rejected=2 % vocab_size)
    plain = backbone(input_ids=tokens, use_cache=False).logits[:, length:]
    trace_tolerance = TRACE_TOLERANCE.get(backbone.dtype, LOW_PRECISION_TRACE_TOLERANCE)
    plain_tolerance = PLAIN_TOLERANCE.get(backbone.dtype, LOW_PRECISION_PLAIN_TOLERANCE)
    scale = plain.abs().max()
    return bool(
        (logits - others).abs().max() <= trace_tolerance * scale
        and (logits - plain).abs().max() <= plain_tolerance * scale
    )


def _verified_logits(
    backbone: PreTrainedModel,
    tree: DraftTree,
    path: tuple[int, ...],
    tokens: torch.Tensor,
    rejected: int,
) -> torch.Tensor:
    """Verify `tree` with the tokens of `path` and `rejected` elsewhere, keep the path, go on.

    Args:
        tokens: `(1, P + len(path) + 1)`, prompt, path and the token after it.

    Returns:
        The logits of the path's nodes and of the token after it, `(1, len(path) + 1, V)`.
    """
    prompt = tokens[:, : -len(path) - 1]
    node_ids = torch.full((1, 1 + tree.num_nodes), rejected, device=tokens.device)
    node_ids[:, list(path)] = tokens[:, prompt.shape[1] : -1]
    cache = _new_cache(backbone)
    backbone(input_ids=prompt, past_key_values=cache, use_cache=True)
    start_rollback(cache)
    known = torch.cat([prompt, node_ids[:, :1]], dim=-1)
    verifier = Verifier(backbone)
    on_path = verifier.verify(known, tree, node_ids[:, 1:], _model_kwargs(backbone, cache, known))
    keep_path(cache, path, 1 + tree.num_nodes)
    after_kwargs = _model_kwargs(backbone, cache, tokens)
    after = verifier.verify(tokens, DraftTree(), tokens[:, :0], after_kwargs)
    return torch.cat([on_path.logits[:, list(path)], after.logits], dim=1)


def _model_kwargs(backbone: PreTrainedModel, cache: Cache, known: torch.Tensor) -> dict[str, Any]:
    """What `generate` would keep for the known tokens `(1, L)`."""
    model_kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "position_ids" in _forward_parameters(backbone):
        model_kwargs["position_ids"] = torch.arange(known.shape[1], device=known.device)[None]
    return model_kwargs
