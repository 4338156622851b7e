"""What a backbone can verify in one pass, found out by trying: a tree, a chain, or nothing.

No architecture is recognised by name. The structure of the cache says what is worth trying, and a small
numeric probe (a few dozen tokens, no randomness) whether the result is exact.

Shapes: `B` rows, `P` prompt length, `V` vocabulary size.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .acceptance_lmtp import AcceptedPath
from .cache_lmtp import (
    has_recurrent_states,
    new_cache,
    reason_not_croppable,
    reason_not_gatherable,
    reason_not_movable,
    reason_not_restored,
    reason_unknown_layers,
    windows_of,
)
from .drafting_lmtp import Candidates
from .hooks_lmtp import fingerprint
from .rows_lmtp import Rows
from .static_lmtp import StaticVerifier
from .transformers_lmtp import (
    RELEASE,
    attention_implementation,
    is_stateful,
    prefill,
    reason_unavailable,
    takes_cache,
    takes_positions,
    with_cache,
)
from .tree_lmtp import DraftTree
from .verification_lmtp import Verifier

logger = logging.get_logger(__name__)

MAX_PROBE_LENGTH = 1024
SHORT_PROMPT = 8  # tokens
# Relative to the largest logit. Rejected candidates must leave no trace: the passes compared have the same
# shapes, so they round alike, except for experts that are batched differently. A plain pass has other
# shapes, so it rounds differently everywhere.
TRACE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PLAIN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION_TRACE_TOLERANCE = 1e-2
LOW_PRECISION_PLAIN_TOLERANCE = 2e-1
# Names of windows in configurations; `max_window_layers` and `sliding_window_pattern` are no windows
WINDOWS = ("window", "window_size")
CHUNKS = ("attention_chunk_size",)
# Ends of the names of how many keys, or blocks of keys, an indexer selects
SELECTIONS = ("topk", "topk_blocks", "budget")
# Names of the number of positions in configurations
POSITION_SETTINGS = ("max_position_embeddings", "max_seq_len", "n_positions")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # types of rotary embeddings
TREE = DraftTree.from_paths([(0,), (1,), (1, 0)])
CHAIN = DraftTree.chain(3)
# The accepted nodes of two rows that accept different lengths
RAGGED_TREE: list[tuple[int, ...]] = [(0, 2, 3), (0, 1)]
RAGGED_CHAIN: list[tuple[int, ...]] = [(0, 1, 2), (0,)]


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
    one = _probe_once(backbone, static, True, _probe_static if static else _probe_tiers)
    if single_row or one.tier is Tier.PLAIN:
        return one
    return _probe_once(backbone, static, False, _probe_static_rows if static else _probe_rows)


def _probe_once(
    backbone: PreTrainedModel,
    static: bool,
    single_row: bool,
    probe: Callable[[PreTrainedModel], Support],
) -> Support:
    """Return what a probe finds, or what it has found."""
    cached = _cached.setdefault(backbone, {})
    attention = attention_implementation(backbone.config)
    precision = backbone.dtype, _precision(backbone)
    key = (fingerprint(backbone), attention, precision, backbone.device, static, single_row)
    if key in cached:
        return cached[key]
    support = probe(backbone)
    if support.tier is not Tier.PLAIN:  # the cause of a failure may be gone by the next call
        cached[key] = support
    return support


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
    no_tree = fixed or _reason_no_trees(backbone) or _probe(backbone, [TREE], [(0, 2, 3)])
    no_tree = no_tree or _reason_padding_differs(backbone)
    if no_tree is None:
        return Support(Tier.TREE, "trees are exact")
    no_chain = _probe(backbone, [CHAIN], [(0, 1)])
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
        return replace(support, ragged=_takes_ragged(backbone, TREE, RAGGED_TREE))
    is_fixed = _reason_fixed_slots(backbone) is not None
    return replace(support, ragged=not is_fixed and _takes_ragged(backbone, CHAIN, RAGGED_CHAIN))


@torch.no_grad()
def _probe_static(backbone: PreTrainedModel) -> Support:
    support = decoding_support(backbone, single_row=True)
    if support.tier is not Tier.TREE:
        return Support(Tier.PLAIN, support.reason)
    reason = _probe(backbone, [TREE], [(0, 2, 3)], static=True)
    return support if reason is None else Support(Tier.PLAIN, reason)


@torch.no_grad()
def _probe_static_rows(backbone: PreTrainedModel) -> Support:
    support = decoding_support(backbone)
    if not support.ragged:
        return support
    reason = _probe(backbone, [TREE] * 2, RAGGED_TREE, static=True)
    return support if reason is None else Support(Tier.PLAIN, reason)


def _takes_ragged(backbone: PreTrainedModel, tree: DraftTree, paths: list[tuple[int, ...]]) -> bool:
    """Return whether rows may accept different lengths, both within a sliding window and beyond it."""
    trees, lengths = [tree] * len(paths), {_prompt_length(backbone), SHORT_PROMPT}
    return not any(_probe(backbone, trees, paths, length) for length in lengths)


def _probe(
    backbone: PreTrainedModel,
    trees: list[DraftTree],
    paths: list[tuple[int, ...]],
    length: int | None = None,
    static: bool = False,
) -> str | None:
    """Return why the model does not verify these trees exactly, one per row, or None if it does.

    The prompt has that `length`; by default, it exceeds every window of the model.
    """
    length = _prompt_length(backbone) if length is None else length
    return _reason_if_failing(backbone, _reason_inexact, backbone, trees, paths, length, static)


def _prompt_length(backbone: PreTrainedModel) -> int:
    """Return the length of a prompt that exceeds every window of the model."""
    windows = [window for window in _windows(backbone) if window < MAX_PROBE_LENGTH]
    return max(windows, default=0) + SHORT_PROMPT


def _reason_if_failing(
    backbone: PreTrainedModel, examine: Callable[..., str | None], *arguments: Any
) -> str | None:
    """Return the reason that an examination returns, or the error that it fails with."""
    try:
        return examine(*arguments)
    except torch.OutOfMemoryError:  # the device's fault, not the model's
        raise
    except Exception as error:  # a model or cache may fail in any way
        logger.info(f"{type(backbone).__name__} fails in {examine.__name__}: {error!r}")
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        # A renamed attribute or a changed signature is the release's fault
        is_change = isinstance(error, AttributeError | TypeError)
        return f"{reason}, in {RELEASE}" if is_change else reason


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


def _reason_padding_differs(backbone: PreTrainedModel) -> str | None:
    """Return why a padded row would not get plain decoding's logits from a tree, or None if it would.

    Plain decoding passes a mask of tokens, and the model makes of it what it makes; a tree's mask is of
    slots, and is used as it is.
    """
    return _reason_if_failing(backbone, _reason_other_padding, backbone)


def _reason_other_padding(backbone: PreTrainedModel) -> str | None:
    vocab_size = backbone.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(1, 14, device=backbone.device)[None] * 7 % vocab_size
    prompt, mask = tokens[:, :-1], torch.ones_like(tokens[:, :-1])
    mask[:, :4] = 0
    no_states = torch.zeros((1, 1, 1), device=tokens.device)
    tree = Candidates((TREE,), tokens[:, : TREE.num_nodes])
    verifier, logits = Verifier(backbone), []
    for candidates in (None, tree):
        cache = new_cache(backbone.config)
        model_kwargs = with_cache({"use_cache": True, "attention_mask": mask}, cache)
        if takes_positions(backbone):
            model_kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        prefill(backbone, prompt, GenerationConfig(), model_kwargs)
        rows = Rows(prompt, no_states, 1, model_kwargs, verifier.slots(model_kwargs, *prompt.shape))
        rows.commit([AcceptedPath(tokens=[int(tokens[0, -1])])], 1)
        chosen = Candidates.none(rows.input_ids) if candidates is None else candidates
        outputs = verifier.verify(rows.input_ids, chosen, rows.model_kwargs).outputs
        logits.append(outputs.logits[0, 0])
    plain, in_tree = logits
    tolerance = PLAIN_TOLERANCE.get(_precision(backbone), LOW_PRECISION_PLAIN_TOLERANCE)
    if (in_tree - plain).abs().max() > tolerance * plain.abs().max():
        return "a padded row gets other logits from a tree's mask"
    return None


def _reason_fixed_slots(backbone: PreTrainedModel) -> str | None:
    """Return why slots of the cache must stay where plain decoding has them, or None if they may move.

    In a tree, and in rows that are moved, slots are not the tokens' positions.
    """
    cache = new_cache(backbone.config)
    # Chunks of a text may start at slots. The probe shows it if they are short enough for it
    chunks = [size for size in _windows(backbone, CHUNKS) if size >= MAX_PROBE_LENGTH]
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
    missing = sorted(set(_windows(backbone)) - windows_of(cache))
    config = backbone.config.get_text_config(decoder=True)
    if missing and not getattr(config, "layer_types", None):
        return f"its cache does not know the attention window of {missing[0]} tokens"
    if missing and _precision(backbone) not in PLAIN_TOLERANCE:
        return f"in {_precision(backbone)}, no probe can tell how it measures its attention windows"
    return None


def _precision(backbone: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which the backbone computes, which autocast may change."""
    kind = backbone.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else backbone.dtype


def _windows(backbone: PreTrainedModel, names: tuple[str, ...] = (*WINDOWS, *CHUNKS)) -> list[int]:
    """Return the attention windows in the configuration, in tokens."""
    settings = backbone.config.get_text_config(decoder=True).to_dict()
    return [
        value
        for name, value in settings.items()
        if name.endswith(names) and type(value) is int and value > 0
    ]


def _reason_inexact(
    backbone: PreTrainedModel,
    trees: list[DraftTree],
    paths: list[tuple[int, ...]],
    length: int,
    static: bool,
) -> str | None:
    """Return why the logits on the paths, and after them, are wrong, or None if they are right.

    They are compared with those for other rejected candidates, with those of plain decoding, token by
    token after the prompt of `length` tokens, and with those of one pass over everything.
    """
    vocab_size = backbone.get_output_embeddings().weight.shape[0]
    numbers = torch.arange(length + max(len(path) for path in paths) + 1, device=backbone.device)
    tokens = torch.stack([(numbers * 7 + 5 * row) % vocab_size for row in range(len(trees))])

    logits, cache = _verified_logits(backbone, trees, paths, tokens, static, rejected=1)
    # The same, with other rejected candidates
    others, _ = _verified_logits(backbone, trees, paths, tokens, static, rejected=2 % vocab_size)
    precision = _precision(backbone)
    trace_tolerance = TRACE_TOLERANCE.get(precision, LOW_PRECISION_TRACE_TOLERANCE)
    plain_tolerance = PLAIN_TOLERANCE.get(precision, LOW_PRECISION_PLAIN_TOLERANCE)
    for row, path in enumerate(paths):
        known = tokens[row : row + 1, : length + len(path) + 1]
        plain, plain_cache = _run_in_parts(backbone, known, [length] + [1] * (len(path) + 1))
        at_once, _ = _run_in_parts(backbone, known, [known.shape[1]])
        plain, at_once = plain[0, length:], at_once[0, length:]
        scale = plain.abs().max()
        if (logits[row] - others[row]).abs().max() > trace_tolerance * scale:
            return "rejected candidates leave a trace"
        difference = max((logits[row] - other).abs().max() for other in (plain, at_once))
        if difference > plain_tolerance * scale:
            return "several tokens at once give other logits than one after the other"
        if has_recurrent_states(cache) and _steps_differ(backbone, known, plain_tolerance):
            return "a recurrence over several tokens gives other logits than token after token"
        if len(paths) == 1 and not static:
            return reason_not_restored(cache, plain_cache, plain_tolerance)
    return None


def _steps_differ(backbone: PreTrainedModel, tokens: torch.Tensor, tolerance: float) -> bool:
    """Return whether tokens `(1, L)` one by one get other logits than all in one pass.

    A layer may, for example, bound its time step in one of the two only.
    """
    steps, _ = _run_in_parts(backbone, tokens, [1] * tokens.shape[1])
    at_once, _ = _run_in_parts(backbone, tokens, [tokens.shape[1]])
    return bool((steps - at_once).abs().max() > tolerance * at_once.abs().max())


def _run_in_parts(
    backbone: PreTrainedModel, tokens: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, Cache]:
    """Run tokens `(1, L)` in passes of these sizes; return the logits `(1, L, V)` and the cache."""
    cache, logits = new_cache(backbone.config), []
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    for part, places in zip(tokens.split(sizes, -1), positions.split(sizes, -1), strict=True):
        inputs = with_cache({"input_ids": part, "use_cache": True}, cache)
        if takes_positions(backbone):
            inputs["position_ids"] = places
        logits.append(backbone(**inputs).logits)
    return torch.cat(logits, dim=1), cache


def _verified_logits(
    backbone: PreTrainedModel,
    trees: list[DraftTree],
    paths: list[tuple[int, ...]],
    tokens: torch.Tensor,
    static: bool,
    rejected: int,
) -> tuple[list[torch.Tensor], Cache]:
    """Verify trees with the paths' tokens and `rejected` elsewhere, accept the paths, run one more pass.

    Args:
        backbone, trees, paths, static: see `_probe`.
        tokens: `(B, P + longest path + 1)`, the prompt, the path and the token after it.
        rejected: the token of all other candidates.

    Returns:
        Per row, the logits of the path's nodes and of the token after it, `(len(path) + 1, V)`; and the
        cache.
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
    reason = reason_unknown_layers(cache) or (None if static else reason_not_croppable(cache))
    if reason is None and is_stateful(backbone) and not has_recurrent_states(cache):
        reason = "it keeps states that no cache layer rolls back"
    if reason is not None:
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
    logits = [
        torch.cat([on_paths[row, list(path)], after[row, :1]]) for row, path in enumerate(paths)
    ]
    return logits, cache
