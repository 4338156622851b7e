"""What a backbone can verify at once, found out by trying it: a tree, a chain, or nothing.

No architecture is known by name. The structure of the cache tells what is worth trying, and a tiny
numeric check (a few dozen tokens, no randomness) whether it comes out right.
"""

import weakref
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .acceptance_lmtp import AcceptedPath
from .cache_lmtp import (
    new_cache,
    why_not_cropped,
    why_not_gathered,
    why_unknown_layers,
    windows_of,
)
from .drafting_lmtp import Candidates
from .rows_lmtp import Rows
from .static_verification_lmtp import StaticVerifier
from .transformers_lmtp import (
    RELEASE,
    attention_implementation,
    prefill,
    takes_cache,
    takes_positions,
    why_unavailable,
    with_cache,
)
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
# How configurations call a window; `max_window_layers` and `sliding_window_pattern` are none
WINDOW_SETTINGS = ("window", "window_size", "attention_chunk_size")
# How configurations call the number of positions
POSITION_SETTINGS = ("max_position_embeddings", "max_seq_len", "n_positions")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of rotary embeddings
TREE = DraftTree.from_paths([(0,), (1,), (1, 0)])


class Tier(str, Enum):
    """The most that one verification may hold, and still be exact."""

    TREE = "tree"
    CHAIN = "chain"
    PLAIN = "plain"


@dataclass(frozen=True)
class Support:
    """What a backbone can do.

    Args:
        tier: what one verification may hold.
        reason: why it is not more.
        ragged: whether rows of a batch may accept different lengths; otherwise they go in step.
    """

    tier: Tier
    reason: str
    ragged: bool = False


_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Support]]" = (
    weakref.WeakKeyDictionary()
)


def decoding_support(backbone: PreTrainedModel, static: bool = False) -> Support:
    """Return what `backbone` can verify; tried once per model, attention, dtype, device and mode.

    A refusal is not remembered.

    Args:
        backbone: the model.
        static: over a static cache, where it is a tree or nothing.
    """
    known = _known.setdefault(backbone, {})
    attention = attention_implementation(backbone.config)
    precision = backbone.dtype, _precision(backbone)
    key = (attention, precision, backbone.device, backbone.training, static)
    if key in known:
        return known[key]
    found = _try_static(backbone) if static else _try_tiers(backbone)
    if found.tier is not Tier.PLAIN:  # what stood in the way may be gone by the next call
        known[key] = found
    return found


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model says that it has; None if it does not say."""
    config = config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in POSITION_SETTINGS]
    return min((value for value in found if type(value) is int and value > 0), default=None)


def why_not_that_long(config: PreTrainedConfig, max_length: int) -> str:
    """Say why texts of that length cannot be drafted for; nothing if they can.

    Rotary embeddings that are rescaled by the length of the text count drafted tokens as well, so that
    what is verified beyond the length that they begin with is not what plain decoding computes.
    """
    config = config.get_text_config(decoder=True)
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
    return ""


def decoding_tier(backbone: PreTrainedModel) -> Tier:
    """Return the tier of `decoding_support`."""
    return decoding_support(backbone).tier


@torch.no_grad()
def _try_tiers(backbone: PreTrainedModel) -> Support:
    unavailable = why_unavailable(backbone)
    if not unavailable and not takes_cache(backbone):
        unavailable = "its forward takes no key-value cache"
    if unavailable:
        return Support(Tier.PLAIN, unavailable)
    no_tree = _why_no_trees(backbone) or _why_not(backbone, [TREE], [(0, 2, 3)])
    if not no_tree:
        ragged = _takes_ragged(backbone, TREE, [(0, 2, 3), (0, 1)])
        return Support(Tier.TREE, "trees come out exact", ragged)
    chain = DraftTree.chain(3)
    no_chain = _why_not(backbone, [chain], [(0, 1)])
    if not no_chain:
        ragged = _takes_ragged(backbone, chain, [(0, 1, 2), (0,)])
        return Support(Tier.CHAIN, f"no trees: {no_tree}", ragged)
    if backbone.training:
        no_chain += "; it is in training mode, call eval() first"
    return Support(Tier.PLAIN, no_chain)


@torch.no_grad()
def _try_static(backbone: PreTrainedModel) -> Support:
    support = decoding_support(backbone)
    if support.tier is not Tier.TREE:
        return Support(Tier.PLAIN, support.reason)
    paths: list[tuple[int, ...]] = [(0, 2, 3), (0, 1)] if support.ragged else [(0, 2, 3)]
    reason = _why_not(backbone, [TREE] * len(paths), paths, static=True)
    return Support(Tier.PLAIN, reason) if reason else support


def _takes_ragged(backbone: PreTrainedModel, tree: DraftTree, paths: list[tuple[int, ...]]) -> bool:
    """Whether rows that accept different paths come out right, within a window and beyond it."""
    trees = [tree] * len(paths)
    return not (_why_not(backbone, trees, paths) or _why_not(backbone, trees, paths, within=True))


def _why_not(
    backbone: PreTrainedModel,
    trees: list[DraftTree],
    paths: list[tuple[int, ...]],
    within: bool = False,
    static: bool = False,
) -> str:
    """Say why the model does not take such drafts exactly, one per row; nothing if it does."""
    try:
        return _why_inexact(backbone, trees, paths, within, static)
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except Exception as error:  # whatever it is that this model or its cache cannot do
        logger.info(f"{type(backbone).__name__} cannot verify {trees}: {error!r}")
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        # A name or a signature that is not what it was
        is_change = isinstance(error, AttributeError | TypeError)
        return f"{reason}, in {RELEASE}" if is_change else reason


def _why_no_trees(backbone: PreTrainedModel) -> str:
    """Trees need masks, positions given token by token, and cache slots that can be gathered.

    A window that the configuration names and the cache does not know may be measured in slots,
    which only float32 is precise enough to find out.
    """
    attention = attention_implementation(backbone.config)
    if attention not in ("eager", "sdpa"):
        return f"{attention!r} attention takes no mask of ours"
    if not takes_positions(backbone):
        return "its forward takes no position_ids"
    cache = new_cache(backbone.config)
    reason = why_not_gathered(cache)
    if reason:
        return reason
    in_cache = windows_of(cache)
    if _precision(backbone) not in PLAIN_TOLERANCE and not set(_windows(backbone)) <= in_cache:
        return f"in {_precision(backbone)} it cannot be told how it measures its attention windows"
    return ""


def _precision(backbone: PreTrainedModel) -> torch.dtype:
    """What the backbone computes in, autocast considered."""
    kind = backbone.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else backbone.dtype


def _windows(backbone: PreTrainedModel) -> list[int]:
    """The attention windows that the configuration names, in tokens."""
    settings = backbone.config.get_text_config(decoder=True).to_dict()
    return [
        value
        for name, value in settings.items()
        if name.endswith(WINDOW_SETTINGS) and type(value) is int and value > 0
    ]


def _why_inexact(
    backbone: PreTrainedModel,
    trees: list[DraftTree],
    paths: list[tuple[int, ...]],
    within: bool = False,
    static: bool = False,
) -> str:
    """Compare verified paths, and what follows them, with rejected candidates changed and with none.

    The prompt is long enough to leave any window, or short, `within` every one.
    """
    vocab_size = backbone.get_output_embeddings().weight.shape[0]
    windows = [window for window in _windows(backbone) if window < MAX_PROBE_LENGTH]
    length = 8 if within else max(windows, default=0) + 8
    numbers = torch.arange(length + max(len(path) for path in paths) + 1, device=backbone.device)
    tokens = torch.stack([(numbers * 7 + 5 * row) % vocab_size for row in range(len(trees))])

    logits = _verified_logits(backbone, trees, paths, tokens, static, rejected=1)
    others = _verified_logits(backbone, trees, paths, tokens, static, rejected=2 % vocab_size)
    precision = _precision(backbone)
    trace_tolerance = TRACE_TOLERANCE.get(precision, LOW_PRECISION_TRACE_TOLERANCE)
    plain_tolerance = PLAIN_TOLERANCE.get(precision, LOW_PRECISION_PLAIN_TOLERANCE)
    for row, path in enumerate(paths):
        known = tokens[row : row + 1, : length + len(path) + 1]
        plain = backbone(input_ids=known, use_cache=False).logits[0, length:]
        scale = plain.abs().max()
        if (logits[row] - others[row]).abs().max() > trace_tolerance * scale:
            return "rejected candidates leave a trace"
        if (logits[row] - plain).abs().max() > plain_tolerance * scale:
            return "several tokens at once give other logits than one after the other"
    return ""


def _verified_logits(
    backbone: PreTrainedModel,
    trees: list[DraftTree],
    paths: list[tuple[int, ...]],
    tokens: torch.Tensor,
    static: bool,
    rejected: int,
) -> list[torch.Tensor]:
    """Verify trees with the tokens of the paths and `rejected` elsewhere, keep the paths, go on.

    Args:
        tokens: `(B, P + longest path + 1)`, prompt, path and the token after it.

    Returns:
        Per row the logits of the path's nodes and of the token after it, `(len(path) + 1, V)`.
    """
    longest = max(len(path) for path in paths)
    prompts = tokens[:, : -longest - 1]
    length = prompts.shape[1]
    num_nodes = trees[0].num_nodes
    node_ids = torch.full((len(trees), 1 + num_nodes), rejected, device=tokens.device)
    for row, path in enumerate(paths):
        node_ids[row, list(path)] = tokens[row, length : length + len(path)]
    candidates = Candidates(tuple(trees), node_ids[:, 1:])
    cache = new_cache(backbone.config, tokens.shape[1] + num_nodes if static else None)
    model_kwargs = with_cache({"use_cache": True}, cache)
    if takes_positions(backbone):
        model_kwargs["position_ids"] = torch.arange(length, device=tokens.device)[None]
    prefill(backbone, prompts, GenerationConfig(), model_kwargs)
    reason = why_unknown_layers(cache) or ("" if static else why_not_cropped(cache))
    if reason:
        raise NotImplementedError(reason)

    no_states = torch.zeros((len(trees), 1, 1), device=tokens.device)
    verifier = StaticVerifier(backbone, num_nodes) if static else Verifier(backbone)
    rows = Rows(prompts, no_states, 1, model_kwargs, verifier.slots(model_kwargs, *prompts.shape))
    rows.commit([AcceptedPath(tokens=[int(root)]) for root in tokens[:, length]], 1)
    on_paths = verifier.verify(rows.input_ids, candidates, rows.model_kwargs).outputs.logits
    rows.new_states = no_states.expand(-1, 1 + candidates.num_nodes, 1)
    rows.commit(
        [
            AcceptedPath(list(path), tokens[row, length + 1 : length + 1 + len(path)].tolist())
            for row, path in enumerate(paths)
        ],
        1 + candidates.num_nodes,
    )
    none = Candidates.none(rows.input_ids)
    num_replayed = rows.slots.num_replayed
    after = verifier.verify(rows.input_ids, none, rows.model_kwargs, num_replayed).outputs.logits
    return [
        torch.cat([on_paths[row, list(path)], after[row, :1]]) for row, path in enumerate(paths)
    ]
