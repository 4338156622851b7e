"""`generate(use_lmtp=True)`: the text of plain decoding, in fewer backbone passes.

Every call runs through the backbone's own `generate`, so Transformers prepares inputs, cache, logits
processors and stopping criteria for that architecture. L-MTP passes it a decoding loop
(`custom_generate`).
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

from .drafting_lmtp import Drafter, MergedDrafter
from .leap_drafter_lmtp import DraftHeads
from .leaps_lmtp import PATH, drafts
from .outputs_lmtp import as_lmtp_output
from .path_drafter_lmtp import proposing_drafter
from .planned_drafter_lmtp import PlannedDrafter
from .planner_lmtp import DraftPlanner
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
from .selection_lmtp import TokenSelector
from .settings_lmtp import STRICT, LMTPSettings
from .support_lmtp import Tier, decoding_support
from .transformers_lmtp import attention_implementation, passed_cache

logger = logging.get_logger(__name__)


class LMTPGenerationMixin(GenerationMixin):
    """Generation for a model with a `backbone` and `leap_heads`."""

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

        If the model or the installed libraries do not support a call with `use_lmtp=True`, it is decoded
        plainly, with one warning that says why; `use_lmtp="strict"` raises a ValueError instead.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria, args, kwargs: everything that
                the backbone's `generate` takes.
            use_lmtp: draft with the leap heads. This and the other settings of `LMTPSettings`
                (`draft_nodes`, `prompt_lookup_num_tokens`, `draft_tree`, …) may be stored in
                `generation_config` instead. Settings that draft nothing decode plainly.
            drafter: proposes the candidates in place of leap heads and prompt lookup. It may propose chains
                only, if the model cannot verify trees. `ForwardDrafter(model.new_drafter())` is the paper's
                ablation F-MTP, see `drafting_lmtp`.

        Returns:
            What the backbone's `generate` returns. With `use_lmtp=True` and `return_dict_in_generate=True`,
            that is an `LMTPGenerateOutput`, which adds acceptance lengths, numbers of candidates and the
            source of each token.

        Raises:
            ValueError: before any work, if the call contradicts itself, or passes settings or a drafter
                that would have no effect.
        """
        names = [*inspect.signature(GenerationMixin.generate).parameters]
        kwargs.update(
            zip(names[5:], args, strict=False)
        )  # those after self and the four named here
        in_call = dict(kwargs)
        settings = LMTPSettings.take_from(kwargs, generation_config, self.generation_config)
        refuse_unused_arguments(in_call, drafter is not None, bool(settings.use_lmtp))
        refuse_prompt_learning(self)
        self.backbone.generation_config = self.generation_config
        positional = inputs, generation_config, logits_processor, stopping_criteria
        if not settings.use_lmtp:
            if in_call.get("use_lmtp") is False:  # it also turns off stored settings
                kwargs.setdefault("prompt_lookup_num_tokens", None)
            return self.backbone.generate(*positional, **kwargs)

        refuse_other_strategies(kwargs, generation_config, self.generation_config)
        refuse_empty_prompt(inputs, kwargs)
        settings.check(self.horizon, self.num_draftable)
        if settings.prompt_lookup_num_tokens is not None:
            kwargs["prompt_lookup_num_tokens"] = None  # here it is a part of the draft
        try:
            check_call(self, kwargs)
            return self._generate_with_drafts(settings, drafter, positional, dict(kwargs))
        except PlainDecoding as decision:
            reason = decision
        # Outside the handler, so that an error of plain decoding is not shown as caused by the decision
        return self._generate_plainly(settings, reason, positional, kwargs)

    def _generate_with_drafts(
        self,
        settings: LMTPSettings,
        drafter: Drafter | None,
        positional: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ModelOutput | torch.Tensor:
        """Let Transformers prepare the call, then decode with drafts.

        Raises:
            PlainDecoding: before the first pass, and before the streamer gets anything.
        """
        streamer = kwargs.pop("streamer", None)
        cache, mask = passed_cache(kwargs), kwargs.get("attention_mask")
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
        reason: PlainDecoding,
        positional: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ModelOutput | torch.Tensor:
        if settings.use_lmtp == STRICT and not reason.by_choice:
            raise ValueError(f"use_lmtp={STRICT!r} would decode plainly: {reason}") from None
        logger.warning_once(f"use_lmtp=True decodes plainly here: {reason}")
        output = self.backbone.generate(*positional, **kwargs)
        if torch.is_tensor(output):
            return output
        prompts = positional[0] if positional[0] is not None else kwargs.get("input_ids")
        if prompts is not None:
            length = prompts.shape[1]
        else:  # Transformers starts from the BOS token, or from embeddings, which are not in the output
            length = 0 if kwargs.get("inputs_embeds") is not None else 1
        return as_lmtp_output(output, length, self._end_ids(positional[1], kwargs))

    def _end_ids(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Collection[int]:
        """Return the tokens that end a row."""
        if "eos_token_id" in kwargs:
            ends = kwargs["eos_token_id"]
        else:
            configs = (generation_config, self.generation_config)
            values = (getattr(config, "eos_token_id", None) for config in configs)
            ends = next((value for value in values if value is not None), None)
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def horizon(self) -> int:
        """The largest distance that the heads draft."""
        return len(drafts(self.config.leap_offsets))

    @property
    def num_draftable(self) -> int:
        """The number of tokens that the heads choose from."""
        ids = self.config.draft_token_ids
        return self.config.get_text_config().vocab_size if ids is None else len(ids)

    def new_drafter(
        self, settings: LMTPSettings | None = None, tier: Tier | None = None
    ) -> Drafter:
        """Return a drafter that uses the leap heads, and prompt lookup if the settings ask for it.

        Args:
            settings: by default, those of a call that sets none.
            tier: what the backbone can verify; by default, that is tried out.
        """
        settings = settings or LMTPSettings()
        tier = tier or decoding_support(self.backbone, single_row=True).tier
        takes_trees = tier is Tier.TREE
        shape, lookup = settings.shape(), settings.prompt_lookup()
        if shape is None:
            heads = proposing_drafter(self.draft_heads(), settings.max_nodes)
            return PlannedDrafter(
                self.draft_planner, heads, lookup, settings.max_nodes, takes_trees
            )
        if not (takes_trees or shape.is_chain):
            chain = shape.to_chain(self.horizon)
            logger.warning_once(
                f"{type(self.backbone).__name__} with "
                f"{attention_implementation(self.backbone.config)!r} attention cannot verify a draft "
                f"tree exactly; a chain of {chain.length} candidates is drafted instead."
            )
            shape = chain
        drafter: Drafter = shape.new_drafter(self.draft_heads())
        return drafter if lookup is None else MergedDrafter([lookup, drafter], takes_trees)

    @property
    def draft_planner(self) -> DraftPlanner:
        """What planned drafts have learned on this model."""
        planner: DraftPlanner | None = getattr(self, "_draft_planner", None)
        if planner is None:
            planner = self._draft_planner = DraftPlanner()
        return planner

    def draft_heads(self) -> DraftHeads:
        """Return the parts of this model that drafters use."""
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
    """Turn `stop_strings` into a criterion, as Transformers keeps the tokenizer from custom loops."""
    places = [kwargs.get("stop_strings")]
    places += [config.stop_strings for config in generation_configs if config is not None]
    stop_strings = next((strings for strings in places if strings is not None), None)
    if stop_strings is None or kwargs.get("tokenizer") is None:
        return stopping_criteria
    kwargs["stop_strings"] = None
    criterion = StopStringCriteria(kwargs["tokenizer"], stop_strings)
    return StoppingCriteriaList([*(stopping_criteria or []), criterion])
