"""The plan of a call: whether it is decoded with drafts, and if so by what.

Everything that can stand in the way is found out here, before the call's first pass, so that a call that is
decoded plainly instead starts as if it had never been planned.

Shapes: `B` rows, `L` prompt length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StaticCache
from transformers.generation import BaseStreamer
from transformers.utils import logging

from .acceptance_lmtp import Acceptor, TokenSelector, TypicalRule, new_acceptor
from .cache_lmtp import why_not_rolled_back
from .compiled_lmtp import compiled_pass
from .decoding_lmtp import Decoder
from .drafting_lmtp import Drafter
from .refusals_lmtp import refuse_other_modes, why_plain
from .settings_lmtp import LMTPSettings
from .static_lmtp import enlarge, why_no_room, why_not_static
from .static_verification_lmtp import StaticVerifier
from .support_lmtp import Support, Tier, decoding_support, num_positions, why_not_that_long
from .texts_lmtp import Texts
from .transformers_lmtp import cache_of, remedy_for, why_unavailable
from .verification_lmtp import Verifier

logger = logging.get_logger(__name__)


class PlainDecoding(Exception):  # noqa: N818 (a decision, not an error)
    """A call is to be decoded plainly.

    Args:
        reason: why, for the user.
        by_choice: whether that is what the settings ask for.
    """

    def __init__(self, reason: str, by_choice: bool = False) -> None:
        super().__init__(f"{reason}. {'' if by_choice else remedy_for(reason)}".rstrip())
        self.by_choice = by_choice


@dataclass
class Call:
    """A call of `generate`, as Transformers has prepared it.

    Args:
        input_ids: the prompts, `(B, L)`; of a text that goes on, perhaps only what the cache lacks.
        selector: selects tokens as this call asks for.
        generation_config: the call's own.
        model_kwargs: what `generate` keeps between steps, the cache among them.
        streamer: receives each token once, in order.
        num_slots_given: for a cache that the caller passes, how many tokens it will hold after the prefill.
    """

    input_ids: torch.Tensor
    selector: TokenSelector
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    streamer: BaseStreamer | None = None
    num_slots_given: int | None = None

    @property
    def returns_dict(self) -> bool:
        """Whether the caller gets an output with fields, and not the tokens alone."""
        return bool(self.generation_config.return_dict_in_generate)


def check_call(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Find out what can be known before Transformers prepares a call.

    Args:
        model: has a `backbone`.
        kwargs: of the call.

    Raises:
        PlainDecoding: the call, the model or this Transformers cannot be decoded with drafts.
    """
    reason = why_plain(model, kwargs) or why_unavailable(model.backbone)
    if reason:
        raise PlainDecoding(reason)


def plan(model: Any, settings: LMTPSettings, drafter: Drafter | None, call: Call) -> Decoder:
    """Choose drafter, verifier and acceptor of a call.

    Args:
        model: has a `backbone` and leap heads.
        settings: of the call.
        drafter: of the call, in place of the leap heads.
        call: as it has been prepared.

    Raises:
        PlainDecoding: it cannot be decoded with drafts, or need not be.
        ValueError: the call contradicts itself.
    """
    backbone, generation_config = model.backbone, call.generation_config
    refuse_other_modes(generation_config)
    support = _support(backbone, call)
    num_rows = call.input_ids.shape[0]
    settings = settings.for_batch(num_rows)
    if drafter is None and settings.drafts_nothing(model.horizon):
        raise PlainDecoding(
            f"the settings draft no candidates at batch size {num_rows} (`lmtp tune` writes so where "
            "drafting cannot win)",
            by_choice=True,
        )
    acceptor = _acceptor(settings, support, call)
    drafter = drafter or model.new_drafter(settings, support.tier)
    is_static = isinstance(cache_of(call.model_kwargs), StaticCache)
    return Decoder(
        _static_verifier(model, drafter.max_nodes, call)
        if is_static
        else Verifier(backbone, support.tier is Tier.TREE, model.run_pass),
        model.head_states,
        drafter,
        acceptor,
        Texts(call.input_ids, call.selector.pad_token_id, call.streamer),
        generation_config,
        # A token past the last position could not be verified
        min(generation_config.max_length, 1 + (num_positions(backbone.config) or math.inf)),
        returns_cache=call.returns_dict or call.num_slots_given is not None,
        may_move=support.ragged,
    )


def _support(backbone: Any, call: Call) -> Support:
    """Find out what the backbone can verify over the call's cache.

    Raises:
        PlainDecoding: nothing.
    """
    cache = cache_of(call.model_kwargs)
    is_static = isinstance(cache, StaticCache)
    reason = why_not_rolled_back(cache) or why_not_that_long(
        backbone.config, call.generation_config.max_length
    )
    if not reason and is_static:
        reason = why_not_static(cache, call.generation_config)
    if reason:
        raise PlainDecoding(reason)
    support = decoding_support(backbone, static=is_static)
    if support.tier is Tier.PLAIN:
        raise PlainDecoding(
            f"rejected candidates cannot be taken out of the {'static ' if is_static else ''}cache of "
            f"{type(backbone).__name__} exactly ({support.reason})"
        )
    return support


def _static_verifier(model: Any, max_nodes: int, call: Call) -> Verifier:
    """Make room for a draft in the cache, and compile the pass where Transformers would.

    Raises:
        PlainDecoding: a cache that the caller passes has no room for one.
    """
    cache = cache_of(call.model_kwargs)
    if call.num_slots_given is None:
        enlarge(cache, model.backbone, max_nodes)
    else:
        num_new = call.generation_config.max_length - call.input_ids.shape[1]
        reason = why_no_room(cache, call.num_slots_given + num_new, max_nodes)
        if reason:
            raise PlainDecoding(reason)
    compiled = compiled_pass(
        model.backbone, model.config.head_input, call.generation_config, call.model_kwargs
    )
    return StaticVerifier(model.backbone, max_nodes, compiled or model.run_pass)


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
