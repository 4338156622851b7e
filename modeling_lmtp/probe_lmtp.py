"""A numeric probe: whether one pass over a draft computes what plain decoding computes.

It takes a few dozen tokens, without randomness, and a prompt that exceeds every attention window.

Shapes: `B` rows, `P` prompt length, `V` vocabulary size.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .acceptance_lmtp import AcceptedPath
from .cache_lmtp import (
    has_recurrent_states,
    new_cache,
    reason_not_croppable,
    reason_not_restored,
    reason_unknown_layers,
)
from .drafting_lmtp import Candidates
from .rows_lmtp import Rows
from .static_lmtp import StaticVerifier
from .transformers_lmtp import RELEASE, is_stateful, prefill, takes_positions, with_cache
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
TREE = DraftTree.from_paths([(0,), (1,), (1, 0)])
CHAIN = DraftTree.chain(3)
# The accepted nodes of two rows that accept different lengths
RAGGED_TREE: list[tuple[int, ...]] = [(0, 2, 3), (0, 1)]
RAGGED_CHAIN: list[tuple[int, ...]] = [(0, 1, 2), (0,)]


def takes_ragged(backbone: PreTrainedModel, tree: DraftTree, paths: list[tuple[int, ...]]) -> bool:
    """Return whether rows may accept different lengths, both within a sliding window and beyond it."""
    trees, lengths = [tree] * len(paths), {_prompt_length(backbone), SHORT_PROMPT}
    return not any(reason_not_verified(backbone, trees, paths, length) for length in lengths)


def reason_not_verified(
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
    windows = [window for window in named_windows(backbone) if window < MAX_PROBE_LENGTH]
    return max(windows, default=0) + SHORT_PROMPT


def named_windows(
    backbone: PreTrainedModel, names: tuple[str, ...] = (*WINDOWS, *CHUNKS)
) -> list[int]:
    """Return the attention windows in the configuration, in tokens."""
    settings = backbone.config.get_text_config(decoder=True).to_dict()
    return [
        value
        for name, value in settings.items()
        if name.endswith(names) and type(value) is int and value > 0
    ]


def precision_of(backbone: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which the backbone computes, which autocast may change."""
    kind = backbone.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else backbone.dtype


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
    precision = precision_of(backbone)
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
        backbone, trees, paths, static: see `reason_not_verified`.
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


def reason_padding_differs(backbone: PreTrainedModel) -> str | None:
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
    tolerance = PLAIN_TOLERANCE.get(precision_of(backbone), LOW_PRECISION_PLAIN_TOLERANCE)
    if (in_tree - plain).abs().max() > tolerance * plain.abs().max():
        return "a padded row gets other logits from a tree's mask"
    return None
