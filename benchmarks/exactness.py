"""`lmtp verify`: does a checkpoint decode the same text with and without `use_lmtp=True`?"""

from collections.abc import Sequence
from typing import Any

import torch

from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import DRAFT_SHAPES
from modeling_lmtp.support_lmtp import Tier, decoding_support, decoding_tier
from modeling_lmtp.transformers_lmtp import attention_implementation
from modeling_lmtp.tree_lmtp import DraftTree, grow_tree

from .comparison import Comparison, compare

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50}
# A tree with branches at every depth, for checkpoints whose generation_config names no tree
ASSUMED_ACCURACY = 0.5
NUM_NODES = 12


def drafts_to_try(model: LMTPForCausalLM) -> dict[str, dict[str, Any]]:
    """Return, by name, the drafts that `verify` tries: a chain, and a tree if the backbone takes one."""
    horizon = len(drafts(model.config.leap_offsets))
    tried: dict[str, dict[str, Any]] = {"chain": {"draft_length": horizon}}
    if decoding_tier(model.backbone) is Tier.TREE:
        tried["tree"] = {"draft_tree": [list(path) for path in _tree(model, horizon).paths]}
    return tried


def saved_shape(model: LMTPForCausalLM) -> dict[str, Any]:
    """Return what the checkpoint's `generation_config` says of the draft's shape, if anything."""
    found = {name: getattr(model.generation_config, name, None) for name in DRAFT_SHAPES}
    return {name: value for name, value in found.items() if value is not None}


def all_drafts(model: LMTPForCausalLM) -> dict[str, dict[str, Any]]:
    """Return `drafts_to_try`, and what the checkpoint's `generation_config` drafts, if it says."""
    saved: dict[str, dict[str, Any]] = {"as saved": {}} if saved_shape(model) else {}
    return {**drafts_to_try(model), **saved}


def _tree(model: LMTPForCausalLM, horizon: int) -> DraftTree:
    saved = DraftTree.from_paths(getattr(model.generation_config, "draft_tree", None) or ())
    if not saved.is_chain:
        return saved
    falling = [ASSUMED_ACCURACY**rank for rank in range(1, 5)]
    return grow_tree([falling] * horizon, NUM_NODES)


def verify_exactness(
    model: LMTPForCausalLM,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Comparison]:
    """Decode each prompt both ways, greedily and sampling: with a chain, with a tree, and as saved.

    Args:
        model: the checkpoint, in evaluation mode; float32 is where equality is promised.
        prompts: token ids, each `(1, L)`.
        max_new_tokens: tokens per prompt; all are generated, past any end of text.
        seed: set before each generation.
        progress: show progress bars.

    Raises:
        ValueError: the backbone cannot take candidates back, so L-MTP refuses it.
    """
    results = {}
    modes: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampling": SAMPLING}
    for mode, options in modes.items():
        comparisons = compare(
            model,
            prompts,
            all_drafts(model),
            seed=seed,
            progress=progress,
            description=mode,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            **options,
        )
        results.update({f"{mode}, {draft}": found for draft, found in comparisons.items()})
    return results


def exactness_record(
    model: LMTPForCausalLM, results: dict[str, Comparison], conditions: dict[str, Any]
) -> dict[str, Any]:
    """Return the results with all their conditions, JSON-serialisable.

    Args:
        model: the checkpoint that was verified.
        results: by `verify_exactness`.
        conditions: the caller's own, such as the prompts' file.
    """
    support = decoding_support(model.backbone)
    return {
        "command": "lmtp verify",
        "base_model": model.config.base_model_name_or_path,
        "leap_offsets": model.config.leap_offsets,
        "head_context": model.config.head_context,
        "tier": support.tier.value,
        "reason": support.reason,
        "ragged_batches": support.ragged,
        "drafts": {name: draft or saved_shape(model) for name, draft in all_drafts(model).items()},
        **conditions,
        "sampling": SAMPLING,
        "device": str(model.device),
        "attention": attention_implementation(model.backbone.config),
        "threads": torch.get_num_threads(),
        "batch_size": 1,
        "versions": versions(),
        "results": {name: result.summary() for name, result in results.items()},
    }
