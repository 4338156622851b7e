"""The plan of a call: whether it is refused, decoded plainly or decoded with drafts, and by what.

A call that contradicts itself is an error. What the model or the installed libraries cannot do is decoded
plainly, with a warning: the flag changes the speed and nothing else. All of that is decided before the
call's first pass, so that a call that is decoded plainly starts as if it had never been planned.

Shapes: `B` rows, `L` prompt length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import distributed as dist
from transformers import GenerationConfig, StaticCache
from transformers.generation import BaseStreamer, GenerationMode
from transformers.utils import logging

from .acceptance_lmtp import Acceptor, new_acceptor
from .cache_lmtp import reason_no_rollback
from .compiled_lmtp import compiled_pass
from .decoding_lmtp import Decoder
from .drafting_lmtp import Drafter
from .hooks_lmtp import reason_hooked
from .outputs_lmtp import EmittedTokens
from .selection_lmtp import TokenSelector, TypicalRule
from .settings_lmtp import DRAFT_SOURCES, PROMPT_LOOKUP, LMTPSettings
from .static_lmtp import StaticVerifier, enlarge, reason_no_room, reason_not_static
from .support_lmtp import Support, Tier, decoding_support, num_positions, reason_too_long
from .transformers_lmtp import cache_of, is_sharded, reason_unavailable, remedy_for
from .verification_lmtp import Verifier

logger = logging.get_logger(__name__)

# A planned draft over a static cache is padded to its bound, so that is low unless the call sets it
STATIC_NODES = 15
OTHER_STRATEGIES = ("assistant_model", "custom_generate", "use_mtp", "token_healing")


# --- What is refused


def refuse_unused_arguments(kwargs: Mapping[str, Any], has_drafter: bool, use_lmtp: bool) -> None:
    """Raise a ValueError for arguments of a call that would have no effect.

    A configuration may hold more settings than a call uses, and `use_lmtp=False` in the call turns off all
    other settings.

    Args:
        kwargs: of the call.
        has_drafter: whether the call passes a drafter.
        use_lmtp: the setting of call and configurations together.
    """
    names = [field.name for field in fields(LMTPSettings)]
    passed = [n for n in names if kwargs.get(n) is not None and kwargs[n] is not False]
    if use_lmtp and has_drafter:
        ignored = [name for name in passed if name in DRAFT_SOURCES]
        if ignored:
            raise ValueError(
                f"drafter supplies every candidate, so {ignored} would be ignored. Pass one or the other, "
                "or combine drafters with MergedDrafter."
            )
    if not use_lmtp and kwargs.get("use_lmtp") is None:
        passed = ["drafter"] * has_drafter + [name for name in passed if name not in PROMPT_LOOKUP]
        if passed:
            raise ValueError(
                f"{passed} have no effect without use_lmtp=True. Pass it as well, or use_lmtp=False to "
                "decode plainly nevertheless."
            )


def refuse_prompt_learning(model: Any) -> None:
    """Raise a ValueError for a prompt that PEFT has learned.

    PEFT inserts it where the wrapped model prepares its inputs, but here the backbone prepares them.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    if prepare is not None and getattr(prepare, "__self__", None) is not model:
        raise ValueError(
            "A learned prompt (prompt, prefix or p-tuning) on a model with leap heads does not reach "
            "its backbone, which generates. Use LoRA or another adapter of layers."
        )


def refuse_other_strategies(
    kwargs: dict[str, Any], *generation_configs: GenerationConfig | None
) -> None:
    """Raise a ValueError for another decoding strategy, in the call or in a configuration."""
    caches = [kwargs.get("cache_implementation")]
    caches += [config.cache_implementation for config in generation_configs if config is not None]
    if "paged" in caches:
        raise ValueError(
            "use_lmtp=True does not support cache_implementation='paged', which is continuous "
            "batching. Leave it out, or pass 'dynamic'."
        )
    strategies = [name for name in OTHER_STRATEGIES if kwargs.get(name)]
    if strategies:
        raise ValueError(
            "use_lmtp=True is a decoding strategy of its own and cannot be combined with "
            f"{strategies}. Drop one or the other."
        )


def refuse_empty_prompt(inputs: torch.Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError for a prompt without tokens."""
    input_ids = inputs if inputs is not None else kwargs.get("input_ids")
    if kwargs.get("inputs_embeds") is None and input_ids is not None and input_ids.shape[-1] == 0:
        raise ValueError(
            "The prompt is empty: input_ids has the shape "
            f"{tuple(input_ids.shape)}. Pass at least one token, such as the BOS token."
        )


def refuse_other_modes(generation_config: GenerationConfig) -> None:
    """Raise a ValueError unless a prepared configuration asks for greedy search or sampling."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"use_lmtp=True supports greedy search and sampling, not {mode.value!r}. Set num_beams=1 "
            "and leave out other strategies, or call generate() without use_lmtp."
        )


# --- What is decoded plainly


class PlainDecoding(Exception):  # noqa: N818 (a decision, not an error)
    """A call must be decoded plainly.

    Args:
        reason: why, for the user.
        by_choice: whether the settings ask for it.
    """

    def __init__(self, reason: str, by_choice: bool = False) -> None:
        super().__init__(f"{reason}. {'' if by_choice else remedy_for(reason)}".rstrip())
        self.by_choice = by_choice


def check_call(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Check what can be known before Transformers prepares a call.

    Args:
        model: has a `backbone`.
        kwargs: of the call.

    Raises:
        PlainDecoding: the call, the model or this Transformers cannot be decoded with drafts.
    """
    reason = _reason_for_plain_decoding(model, kwargs) or reason_unavailable(model.backbone)
    if reason:
        raise PlainDecoding(reason)


def _reason_for_plain_decoding(model: Any, kwargs: Mapping[str, Any]) -> str | None:
    if kwargs.get("inputs_embeds") is not None:
        return "drafts need input_ids, and the call passes inputs_embeds"
    synced_gpus = kwargs.get("synced_gpus")
    if synced_gpus is None and dist.is_available() and dist.is_initialized():
        synced_gpus = dist.get_world_size() > 1 and is_sharded(model.backbone)
    if synced_gpus:
        # Processes accept different lengths, so they would run different numbers of passes
        return (
            "its processes run in step (synced_gpus=True), as for weights sharded by ZeRO-3 or FSDP"
        )
    return _reason_other_dtype(model) or reason_hooked(model.backbone)


def _reason_other_dtype(model: Any) -> str | None:
    """Return why heads cannot read the backbone's states, as while they train in float32, or None."""
    heads, states = next(model.leap_heads.parameters(), None), model.backbone.dtype
    is_cast = torch.is_autocast_enabled(model.backbone.device.type)
    if heads is None or not heads.is_floating_point() or is_cast or heads.dtype == states:
        return None
    return (
        f"its leap heads are in {heads.dtype} and its backbone in {states} (use autocast, or "
        "model.leap_heads.to(model.backbone.dtype))"
    )


# --- The plan


@dataclass
class Call:
    """A call of `generate`, as Transformers has prepared it.

    Args:
        input_ids: the prompts, `(B, L)`; when a text is continued, perhaps only what its cache lacks.
        selector: selects tokens as this call asks for.
        generation_config: of this call.
        model_kwargs: what `generate` keeps between steps, with the cache.
        streamer: receives each token once, in order.
        num_cached_tokens: if the caller passes a cache, how many tokens it will hold after the prefill.
    """

    input_ids: torch.Tensor
    selector: TokenSelector
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    streamer: BaseStreamer | None = None
    num_cached_tokens: int | None = None

    @property
    def returns_dict(self) -> bool:
        """Whether the caller gets an output with fields instead of the tokens alone."""
        return bool(self.generation_config.return_dict_in_generate)


def plan(model: Any, settings: LMTPSettings, drafter: Drafter | None, call: Call) -> Decoder:
    """Choose the drafter, verifier and acceptor of a call.

    Args:
        model: has a `backbone` and leap heads.
        settings: of the call.
        drafter: the caller's, in place of the leap heads.
        call: as prepared by Transformers.

    Raises:
        PlainDecoding: the call cannot be decoded with drafts, or its settings draft nothing.
        ValueError: the call contradicts itself.
    """
    backbone, generation_config = model.backbone, call.generation_config
    refuse_other_modes(generation_config)
    support = _support(backbone, call)
    if drafter is None and settings.drafts_nothing():
        raise PlainDecoding("the settings draft no candidates", by_choice=True)
    acceptor = _acceptor(settings, support, call)
    is_static = isinstance(cache_of(call.model_kwargs), StaticCache)
    if is_static and settings.draft_nodes is None:
        settings = replace(settings, draft_nodes=STATIC_NODES)
    drafter = drafter or model.new_drafter(settings, support.tier)
    if is_static:
        verifier: Verifier = _static_verifier(model, drafter.max_nodes, call)
    else:
        verifier = Verifier(backbone, support.tier is Tier.TREE, model.run_pass)
    return Decoder(
        verifier,
        model.head_states,
        drafter,
        acceptor,
        EmittedTokens(call.input_ids, call.selector.pad_token_id, call.streamer),
        generation_config,
        # A candidate past the last position could not be verified
        min(generation_config.max_length, 1 + (num_positions(backbone.config) or math.inf)),
        returns_cache=call.returns_dict or call.num_cached_tokens is not None,
        can_drop_padding=support.ragged,
    )


def _support(backbone: Any, call: Call) -> Support:
    """Return what the backbone can verify over the call's cache.

    Raises:
        PlainDecoding: it can verify nothing.
    """
    cache = cache_of(call.model_kwargs)
    is_static = isinstance(cache, StaticCache)
    reason = reason_no_rollback(cache) or reason_too_long(
        backbone.config, call.generation_config.max_length
    )
    if not reason and is_static:
        reason = reason_not_static(cache, call.generation_config)
    if reason:
        raise PlainDecoding(reason)
    single_row = call.input_ids.shape[0] == 1
    support = decoding_support(backbone, is_static, single_row)
    if support.tier is Tier.PLAIN:
        raise PlainDecoding(
            f"rejected candidates cannot be taken out of the {'static ' if is_static else ''}cache of "
            f"{type(backbone).__name__} exactly ({support.reason})"
        )
    return support


def _static_verifier(model: Any, max_nodes: int, call: Call) -> Verifier:
    """Make room for drafts in the cache, and compile the pass if Transformers would.

    Raises:
        PlainDecoding: the caller's cache has no room for drafts.
    """
    cache = cache_of(call.model_kwargs)
    if call.num_cached_tokens is None:
        enlarge(cache, model.backbone, max_nodes)
    else:
        num_new = call.generation_config.max_length - call.input_ids.shape[1]
        reason = reason_no_room(cache, call.num_cached_tokens + num_new, max_nodes)
        if reason:
            raise PlainDecoding(reason)
    compiled = compiled_pass(
        model.backbone, model.config.head_input, call.generation_config, call.model_kwargs
    )
    run = compiled or model.run_pass
    return StaticVerifier(model.backbone, max_nodes, run, has_one_size=compiled is not None)


def _acceptor(settings: LMTPSettings, support: Support, call: Call) -> Acceptor:
    rule = None
    if settings.acceptance_rule == "typical":
        rule = TypicalRule(settings.posterior_threshold, settings.posterior_alpha)
    acceptor = new_acceptor(
        call.input_ids,
        call.selector,
        # A streamer gets the tokens of all rows together, step by step
        rows_are_independent=support.ragged and call.streamer is None,
        keep_scores=bool(call.returns_dict and call.generation_config.output_scores),
        keep_logits=bool(call.returns_dict and call.generation_config.output_logits),
        rule=rule,
    )
    if rule is not None:
        logger.warning_once(
            "acceptance_rule='typical' is lossy: the text differs from plain decoding's, and samples are "
            "not distributed as plain samples."
        )
    return acceptor
