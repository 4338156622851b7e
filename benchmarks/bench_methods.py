"""The ways of decoding that `lmtp bench` puts side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modeling_lmtp.drafting_lmtp import PromptLookupDrafter
from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import STRICT
from modeling_lmtp.support_lmtp import Tier, decoding_tier

from .exactness import drafts_to_try, saved_shape

PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """One way of decoding.

    Args:
        name: as the tables say it.
        model: what generates.
        options: what `generate` is told.
        is_ours: whether it promises plain decoding's text.
        takes_batches: whether it decodes more than one prompt at a time.
    """

    name: str
    model: LMTPForCausalLM
    options: dict[str, Any]
    is_ours: bool = True
    takes_batches: bool = True


def plain_method(model: LMTPForCausalLM) -> Method:
    """Return plain decoding, what the others are measured by."""
    return Method(PLAIN, model, {"use_lmtp": False}, is_ours=False)


def methods_to_compare(
    model: LMTPForCausalLM,
    others: Mapping[str, LMTPForCausalLM] | None = None,
    assistant: Any = None,
    *,
    draft_nodes: int = 8,
    lookup_tokens: int = 10,
) -> list[Method]:
    """List the ways to decode with a model, and with other heads on its backbone.

    Args:
        model: the checkpoint.
        others: by name, models with the same backbone.
        assistant: a small model that drafts, as Transformers has it.
        draft_nodes: candidates of a dynamic tree.
        lookup_tokens: candidates of prompt lookup.
    """
    theirs = {"use_lmtp": False, "prompt_lookup_num_tokens": lookup_tokens}
    alone = {"use_lmtp": STRICT, "drafter": PromptLookupDrafter(lookup_tokens)}
    methods = [
        plain_method(model),
        Method("prompt lookup (Transformers)", model, theirs, is_ours=False, takes_batches=False),
        Method("prompt lookup", model, alone),
    ]
    if assistant is not None:
        helped = {"use_lmtp": False, "assistant_model": assistant}
        methods.append(Method("assistant", model, helped, is_ours=False, takes_batches=False))
    for prefix, with_heads in {
        "": model,
        **{f"{n}: ": m for n, m in (others or {}).items()},
    }.items():
        methods += _of_heads(with_heads, prefix, draft_nodes, lookup_tokens)
    return methods


def _of_heads(
    model: LMTPForCausalLM, prefix: str, draft_nodes: int, lookup_tokens: int
) -> list[Method]:
    tried: dict[str, dict[str, Any]] = {
        "chain": {"draft_length": len(drafts(model.config.leap_offsets))}
    }
    if decoding_tier(model.backbone) is Tier.TREE:
        tried["static tree"] = drafts_to_try(model)["tree"]
        tried["dynamic tree"] = {"draft_nodes": draft_nodes}
    widest = tried.get("dynamic tree", tried["chain"])
    tried["heads and prompt lookup"] = {**widest, "prompt_lookup_num_tokens": lookup_tokens}
    if saved_shape(model):
        tried["as saved"] = {}
    return [
        Method(prefix + name, model, {"use_lmtp": STRICT, **options})
        for name, options in tried.items()
    ]
