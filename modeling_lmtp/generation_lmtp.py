"""`generate(use_lmtp=True)`: plain decoding's text, in fewer backbone passes.

Plain or not, generation runs through the backbone's own `generate`, so that inputs, cache, logits
processors and stopping criteria are prepared by Transformers for that very architecture. L-MTP is a
decoding loop handed to it.
"""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import ModelOutput, logging

from .acceptance_lmtp import TokenSelector
from .context_lmtp import PATH
from .drafting_lmtp import Drafter, MergedDrafter
from .leap_drafter_lmtp import DraftHeads
from .leaps_lmtp import drafts
from .outputs_lmtp import with_acceptance_lengths
from .planning_lmtp import (
    Call,
    PlainDecoding,
    check_call,
    plan,
    refuse_empty_prompt,
    refuse_other_strategies,
    refuse_prompt_learning,
    refuse_unused_arguments,
)
from .settings_lmtp import STRICT, LMTPSettings
from .support_lmtp import Tier, decoding_support
from .transformers_lmtp import attention_implementation, given_cache

logger = logging.get_logger(__name__)


class LMTPGenerationMixin(GenerationMixin):
    """Generation of a model that has a `backbone` and `leap_heads`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args: Any,
        drafter: Drafter | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.Tensor:
        """Generate as Transformers does; with `use_lmtp=True`, the same text in fewer passes.

        What the model or the installed libraries do not support with `use_lmtp=True` is decoded plainly,
        with one warning that says why; `use_lmtp="strict"` raises a ValueError instead.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria, args, kwargs: all that
                the backbone's `generate` takes.
            use_lmtp: draft with the leap heads. Like the other settings of `LMTPSettings`
                (`draft_tree`, `draft_length`, `draft_nodes`, `prompt_lookup_num_tokens`, …), it may
                stand in `generation_config` instead. Settings that draft nothing decode plainly.
            drafter: proposes candidates in place of the leap heads and of prompt lookup; only chains,
                where the model takes no trees.

        Returns:
            What the backbone's `generate` returns; with `return_dict_in_generate=True`, an
            `LMTPGenerateOutput`, which also has the acceptance lengths.

        Raises:
            ValueError: with `use_lmtp=True`, for a call that contradicts itself, before any work; and
                for settings or a drafter in a call that leaves them without effect.
        """
        names = [*inspect.signature(GenerationMixin.generate).parameters]
        kwargs.update(zip(names[5:], args, strict=False))  # those after self and these four
        in_call = dict(kwargs)
        settings = LMTPSettings.take_from(kwargs, generation_config, self.generation_config)
        refuse_unused_arguments(in_call, drafter is not None, bool(settings.use_lmtp))
        refuse_prompt_learning(self)
        self.backbone.generation_config = self.generation_config
        positional = inputs, generation_config, logits_processor, stopping_criteria
        if not settings.use_lmtp:
            if in_call.get("use_lmtp") is False:  # turns off what the configuration says beside it
                kwargs.setdefault("prompt_lookup_num_tokens", None)
            return self.backbone.generate(*positional, **kwargs)

        refuse_other_strategies(kwargs, generation_config, self.generation_config)
        refuse_empty_prompt(inputs, kwargs)
        settings.check(self.horizon, self.num_draftable)
        if settings.prompt_lookup_num_tokens is not None:
            kwargs["prompt_lookup_num_tokens"] = None  # no strategy of its own
        try:
            check_call(self, kwargs)
            return self._generate_with_drafts(settings, drafter, positional, dict(kwargs))
        except PlainDecoding as found:
            why = found
        return self._generate_plainly(settings, why, positional, kwargs)

    def _generate_with_drafts(
        self,
        settings: LMTPSettings,
        drafter: Drafter | None,
        positional: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ModelOutput | torch.Tensor:
        """Let Transformers prepare the call, and decode with drafts.

        Raises:
            PlainDecoding: before any pass of the call, and before the streamer gets anything.
        """
        streamer = kwargs.pop("streamer", None)
        cache, mask = given_cache(kwargs), kwargs.get("attention_mask")
        *others, criteria = positional
        criteria = _with_stop_strings(criteria, kwargs, positional[1], self.generation_config)

        def decode(
            backbone: Any,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> ModelOutput | torch.Tensor:
            num_known = input_ids.shape[1] if mask is None else mask.shape[1]
            call = Call(
                input_ids,
                TokenSelector(logits_processor, stopping_criteria, generation_config),
                generation_config,
                model_kwargs,
                streamer,
                num_cached_tokens=None if cache is None else num_known,
            )
            decoder = plan(self, settings, drafter, call)
            if streamer is not None:
                streamer.put(input_ids.cpu())  # as Transformers does, before the first token
            output = decoder.decode(model_kwargs)
            return output if call.returns_dict else output.sequences

        return self.backbone.generate(*others, criteria, custom_generate=decode, **kwargs)

    def _generate_plainly(
        self,
        settings: LMTPSettings,
        why: PlainDecoding,
        positional: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ModelOutput | torch.Tensor:
        if settings.use_lmtp == STRICT and not why.by_choice:
            raise ValueError(f"use_lmtp={STRICT!r} would decode plainly: {why}") from None
        logger.warning_once(f"use_lmtp=True decodes plainly here: {why}")
        output = self.backbone.generate(*positional, **kwargs)
        if torch.is_tensor(output):
            return output
        prompts = positional[0] if positional[0] is not None else kwargs.get("input_ids")
        has_none = prompts is None and kwargs.get("inputs_embeds") is not None
        length = 0 if has_none else 1 if prompts is None else prompts.shape[1]
        return with_acceptance_lengths(output, length, self._end_ids(positional[1], kwargs))

    def _end_ids(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Collection[int]:
        """The tokens at which a row of a call ends."""
        if "eos_token_id" in kwargs:
            ends = kwargs["eos_token_id"]
        else:
            configs = (generation_config, self.generation_config)
            given = (getattr(config, "eos_token_id", None) for config in configs)
            ends = next((value for value in given if value is not None), None)
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def horizon(self) -> int:
        """The furthest distance that the heads draft."""
        return len(drafts(self.config.leap_offsets))

    @property
    def num_draftable(self) -> int:
        """How many tokens the heads choose among."""
        ids = self.config.draft_token_ids
        return self.config.get_text_config().vocab_size if ids is None else len(ids)

    def new_drafter(
        self, settings: LMTPSettings | None = None, tier: Tier | None = None
    ) -> Drafter:
        """Return a drafter that uses the leap heads, and prompt lookup if the settings ask for it.

        Args:
            settings: for one batch size; by default, a chain of all that the heads can draft.
            tier: what the backbone can verify; by default, that is tried out.
        """
        settings = settings or LMTPSettings()
        tier = tier or decoding_support(self.backbone).tier
        shape = settings.shape(self.horizon)
        if tier is not Tier.TREE:
            chain = shape.to_chain(self.horizon)
            if not shape.is_chain:
                logger.warning_once(
                    f"{type(self.backbone).__name__} with "
                    f"{attention_implementation(self.backbone.config)!r} attention cannot verify a draft "
                    f"tree exactly; a chain of {chain.length} candidates is drafted instead."
                )
            shape = chain
        drafter: Drafter = shape.new_drafter(self.draft_heads())
        lookup = settings.prompt_lookup()
        return drafter if lookup is None else MergedDrafter([lookup, drafter], tier is Tier.TREE)

    def draft_heads(self) -> DraftHeads:
        """Return what drafters use of this model."""
        token_ids = self.config.draft_token_ids
        return DraftHeads(
            self.leap_heads,
            self.config.leap_offsets,
            self.context_widths,
            self.config.head_context == PATH,
            self.get_input_embeddings(),
            self.draft_unembeddings(),
            None if token_ids is None else torch.tensor(token_ids, device=self.device),
        )


def _with_stop_strings(
    stopping_criteria: StoppingCriteriaList | None,
    kwargs: dict[str, Any],
    *generation_configs: GenerationConfig | None,
) -> StoppingCriteriaList | None:
    """Turn `stop_strings` into a criterion: Transformers drops the tokenizer of a call with a loop."""
    given = [kwargs.get("stop_strings")]
    given += [config.stop_strings for config in generation_configs if config is not None]
    stop_strings = next((strings for strings in given if strings is not None), None)
    if stop_strings is None or kwargs.get("tokenizer") is None:
        return stopping_criteria
    kwargs["stop_strings"] = None
    criterion = StopStringCriteria(kwargs["tokenizer"], stop_strings)
    return StoppingCriteriaList([*(stopping_criteria or []), criterion])
