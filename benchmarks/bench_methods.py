"""The decoding methods that `lmtp bench` compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_lmtp.drafting_lmtp import PromptLookupDrafter
from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import DEFAULT_NODES, STRICT
from modeling_lmtp.support_lmtp import Tier, decoding_tier

from .drafts_to_try import drafts_to_try, saved_shape

PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """A decoding method.

    Args:
        name: its name in tables.
        model: the model that generates.
        options: passed to `generate`.
        is_ours: whether it promises plain decoding's text.
        takes_batches: whether it can decode several prompts at a time.
    """

    name: str
    model: LMTPForCausalLM
    options: dict[str, Any]
    is_ours: bool = True
    takes_batches: bool = True


def plain_method(model: LMTPForCausalLM) -> Method:
    """Return plain decoding, the baseline of the others."""
    return Method(PLAIN, model, {"use_lmtp": False}, is_ours=False)


def methods_to_compare(
    model: LMTPForCausalLM,
    others: Mapping[str, LMTPForCausalLM] | None = None,
    assistant: Any = None,
    *,
    draft_nodes: int = DEFAULT_NODES,
    lookup_tokens: int = 10,
) -> list[Method]:
    """List the methods that decode with a model, and with other heads on its backbone.

    Args:
        model: the checkpoint.
        others: models with the same backbone, by name.
        assistant: a small model for Transformers' assisted decoding.
        draft_nodes: the largest number of candidates of a planned draft.
        lookup_tokens: candidates of prompt lookup.
    """
    in_transformers = {"use_lmtp": False, "prompt_lookup_num_tokens": lookup_tokens}
    in_lmtp = {"use_lmtp": STRICT, "drafter": PromptLookupDrafter(lookup_tokens)}
    theirs = {"is_ours": False, "takes_batches": False}  # Transformers' speculation
    methods = [
        plain_method(model),
        Method("prompt lookup (Transformers)", model, in_transformers, **theirs),
        Method("prompt lookup", model, in_lmtp),
    ]
    if assistant is not None:
        assisted = {"use_lmtp": False, "assistant_model": assistant}
        methods.append(Method("assistant", model, assisted, **theirs))
    methods += _with_heads(model, "", draft_nodes)
    for name, other in (others or {}).items():
        methods += _with_heads(other, f"{name}: ", draft_nodes)
    return methods


def _with_heads(model: LMTPForCausalLM, prefix: str, draft_nodes: int) -> list[Method]:
    tried: dict[str, dict[str, Any]] = {
        "chain": {"draft_length": len(drafts(model.config.leap_offsets))}
    }
    if decoding_tier(model.backbone) is Tier.TREE:
        tried["static tree"] = drafts_to_try(model)["tree"]
    tried["planned, heads alone"] = {"draft_nodes": draft_nodes, "prompt_lookup_num_tokens": 0}
    tried["planned"] = {"draft_nodes": draft_nodes}
    if saved_shape(model):
        tried["as saved"] = {}
    return [
        Method(prefix + name, model, {"use_lmtp": STRICT, **options})
        for name, options in tried.items()
    ]


def choose_methods(methods: Sequence[Method], only: Sequence[str] | None) -> list[Method]:
    """Keep plain decoding and the named methods.

    Raises:
        ValueError: there is no method of that name.
    """
    if only is None:
        return list(methods)
    names = [method.name for method in methods]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"There is no method {unknown[0]!r}. Choose from: {', '.join(names)}.")
    return [methods[0], *(method for method in methods[1:] if method.name in only)]
