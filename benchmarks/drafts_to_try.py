"""What `lmtp verify` and `lmtp bench` try: drafts of a checkpoint, and how to sample."""

from typing import Any

from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import DEFAULT_NODES, DRAFT_SHAPES
from modeling_lmtp.support_lmtp import Tier, decoding_tier
from modeling_lmtp.tree_lmtp import DraftTree, grow_tree

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50}
# A tree that branches at every depth, for checkpoints whose generation_config has none
ASSUMED_ACCURACY = 0.5
NUM_NODES = 12


def drafts_to_try(model: LMTPForCausalLM) -> dict[str, dict[str, Any]]:
    """Return drafts by name: a chain, and a tree if the backbone can verify one."""
    horizon = len(drafts(model.config.leap_offsets))
    tried: dict[str, dict[str, Any]] = {"chain": {"draft_length": horizon}}
    if decoding_tier(model.backbone) is Tier.TREE:
        tried["tree"] = {"draft_tree": [list(path) for path in _tree(model, horizon).paths]}
    return tried


def saved_shape(model: LMTPForCausalLM) -> dict[str, Any]:
    """Return the settings of the draft's shape in the checkpoint's `generation_config`, if any."""
    settings = {name: getattr(model.generation_config, name, None) for name in DRAFT_SHAPES}
    return {name: value for name, value in settings.items() if value is not None}


def all_drafts(model: LMTPForCausalLM) -> dict[str, dict[str, Any]]:
    """Return `drafts_to_try`, planned drafts, and the draft that the `generation_config` pins, if any."""
    saved: dict[str, dict[str, Any]] = {"as saved": {}} if saved_shape(model) else {}
    return {**drafts_to_try(model), "planned": {"draft_nodes": DEFAULT_NODES}, **saved}


def _tree(model: LMTPForCausalLM, horizon: int) -> DraftTree:
    saved = DraftTree.from_paths(getattr(model.generation_config, "draft_tree", None) or ())
    if not saved.is_chain:
        return saved
    falling = [ASSUMED_ACCURACY**rank for rank in range(1, 5)]
    return grow_tree([falling] * horizon, NUM_NODES)
