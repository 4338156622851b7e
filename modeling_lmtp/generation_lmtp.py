"""`generate(use_lmtp=True)`: plain decoding's text, in fewer backbone passes.

Plain or not, generation runs through the backbone's own `generate`, so that inputs, cache, logits
processors and stopping criteria are prepared by Transformers for that very architecture. L-MTP is a
decoding loop handed to it.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .choosing_lmtp import TokenChooser
from .compiled_lmtp import compiled_pass
from .composition_lmtp import ForwardDrafter, MergedDrafter
from .context_lmtp import PATH
from .decoding_lmtp import Decoder
from .drafting_lmtp import Drafter
from .leap_drafter_lmtp import DynamicLeapHeadDrafter, LeapHeadDrafter
from .leaps_lmtp import drafts
from .outputs_lmtp import with_acceptance_lengths
from .path_drafter_lmtp import DynamicPathDrafter, PathDrafter
from .refusals_lmtp import (
    refuse_bad_inputs,
    refuse_ignored,
    refuse_other_strategies,
    refuse_prompt_learning,
    refuse_synced,
    refuse_unsupported,
)
from .settings_lmtp import LMTPSettings
from .static_lmtp import check_room, enlarge
from .static_verification_lmtp import StaticVerifier
from .support_lmtp import Support, Tier, decoding_support, num_positions, why_not_that_long
from .texts_lmtp import Texts
from .tree_lmtp import DraftTree
from .verification_lmtp import Verifier
from .walking_lmtp import GreedyWalker, RowByRowWalker, StepwiseWalker, TypicalRule, Walker

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
            ValueError: with `use_lmtp=True`, for a call that it does not support, before any work; and
                for settings or a drafter in a call that leaves them without effect.
        """
        names = [*inspect.signature(GenerationMixin.generate).parameters]
        kwargs.update(zip(names[5:], args, strict=False))  # those after self and these four
        in_call = dict(kwargs)
        settings = LMTPSettings.take_from(kwargs, generation_config, self.generation_config)
        refuse_ignored(in_call, drafter is not None, settings.use_lmtp)
        refuse_prompt_learning(self)
        self.backbone.generation_config = self.generation_config
        if not settings.use_lmtp:
            if in_call.get("use_lmtp") is False:  # turns off what the configuration says beside it
                kwargs.setdefault("prompt_lookup_num_tokens", None)
            return self.backbone.generate(
                inputs, generation_config, logits_processor, stopping_criteria, **kwargs
            )

        refuse_other_strategies(kwargs, generation_config, self.generation_config)
        refuse_synced(self.backbone, kwargs.get("synced_gpus"))
        refuse_bad_inputs(inputs, kwargs)
        settings.check(self._horizon, self._num_draftable)
        stopping_criteria = _with_stop_strings(
            stopping_criteria, kwargs, generation_config, self.generation_config
        )
        if settings.prompt_lookup_num_tokens is not None:
            kwargs["prompt_lookup_num_tokens"] = None  # no strategy of its own
        return self.backbone.generate(
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            custom_generate=self._decoding_method(
                settings,
                drafter,
                streamer=kwargs.get("streamer"),
                cache_is_given=kwargs.get("past_key_values") is not None,
            ),
            **kwargs,
        )

    def _decoding_method(
        self,
        settings: LMTPSettings,
        drafter: Drafter | None,
        streamer: BaseStreamer | None,
        cache_is_given: bool,
    ) -> Callable[..., ModelOutput | torch.Tensor]:
        """Return the loop that Transformers calls when all is prepared; it drops the streamer."""

        def lmtp_decoding(
            backbone: Any,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> ModelOutput | torch.Tensor:
            refuse_unsupported(generation_config, model_kwargs)
            too_long = why_not_that_long(backbone.config, generation_config.max_length)
            support = self._decoding_support()
            returns_dict = bool(generation_config.return_dict_in_generate)
            chooser = TokenChooser(logits_processor, stopping_criteria, generation_config)
            own_settings = settings.for_batch(input_ids.shape[0])
            if too_long or (drafter is None and own_settings.drafts_nothing(self._horizon)):
                _say_drafting_is_off(
                    too_long
                    or f"the settings draft no candidates at batch size {input_ids.shape[0]} "
                    "(`lmtp tune` writes so where drafting cannot win)"
                )
                output = backbone._sample(
                    input_ids,
                    logits_processor,
                    stopping_criteria,
                    generation_config,
                    streamer=streamer,
                    **model_kwargs,
                )
                if not returns_dict:
                    return output
                return with_acceptance_lengths(output, input_ids, chooser.eos_token_ids)
            own_drafter = drafter or self.new_drafter(own_settings, support.tier)
            if isinstance(model_kwargs["past_key_values"], StaticCache):
                verifier = self._static_verifier(
                    input_ids,
                    own_drafter.max_nodes,
                    generation_config,
                    model_kwargs,
                    cache_is_given,
                )
            else:
                verifier = Verifier(backbone, takes_trees=support.tier is Tier.TREE)
            decoder = Decoder(
                verifier,
                self.head_states,
                own_drafter,
                _walker(own_settings, support, chooser, input_ids, generation_config, streamer),
                Texts(input_ids, chooser.pad_token_id, streamer),
                generation_config,
                # A token past the last position could not be verified
                min(generation_config.max_length, 1 + (num_positions(backbone.config) or math.inf)),
                returns_cache=returns_dict or cache_is_given,
                may_move=support.ragged,
            )
            output = decoder.decode(model_kwargs)
            return output if returns_dict else output.sequences

        return lmtp_decoding

    @property
    def _horizon(self) -> int:
        """The furthest distance that the heads draft."""
        return len(drafts(self.config.leap_offsets))

    @property
    def _num_draftable(self) -> int:
        """How many tokens the heads choose among."""
        ids = self.config.draft_token_ids
        return self.config.get_text_config().vocab_size if ids is None else len(ids)

    def _decoding_support(self) -> Support:
        support = decoding_support(self.backbone)
        if support.tier is Tier.REFUSED:
            raise ValueError(
                f"use_lmtp=True is not possible with {type(self.backbone).__name__}: rejected "
                f"candidates cannot be taken out of its cache exactly ({support.reason}). Call "
                "generate() without it."
            )
        return support

    def _static_verifier(
        self,
        input_ids: torch.Tensor,
        max_nodes: int,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        cache_is_given: bool,
    ) -> Verifier:
        """Make room for a draft in the cache, and compile the pass where Transformers would."""
        support = decoding_support(self.backbone, static=True)
        if support.tier is Tier.REFUSED:
            raise ValueError(
                f"use_lmtp=True does not support static caches with {type(self.backbone).__name__} "
                f"({support.reason}). Leave out cache_implementation, or pass 'dynamic'."
            )
        cache = model_kwargs["past_key_values"]
        if cache_is_given:
            mask = model_kwargs.get("attention_mask")  # over tokens of earlier turns as well
            length = input_ids.shape[1]
            num_known = (
                getattr(generation_config, "_mask_length", length)
                if mask is None
                else mask.shape[1]
            )
            check_room(cache, num_known - length + generation_config.max_length, max_nodes)
        else:
            enlarge(cache, self.backbone, max_nodes)
        compiled = compiled_pass(
            self.backbone, self.config.head_input, generation_config, model_kwargs
        )
        return StaticVerifier(self.backbone, max_nodes, compiled)

    def new_drafter(self, settings: LMTPSettings, tier: Tier) -> Drafter:
        """Return the drafter of settings for one batch size, for a backbone that verifies `tier`."""
        drafter: Drafter = self._leap_head_drafter(settings, tier)
        lookup = settings.prompt_lookup()
        if lookup is not None:
            drafter = MergedDrafter([lookup, drafter], takes_trees=tier is Tier.TREE)
        return ForwardDrafter(drafter) if settings.forward_decoding else drafter

    def _leap_head_drafter(self, settings: LMTPSettings, tier: Tier) -> LeapHeadDrafter:
        tree = settings.tree(self._horizon)
        num_nodes = settings.draft_nodes
        if num_nodes is not None:  # a tree is no deeper than it has nodes
            tree = DraftTree.chain(min(tree.depth, num_nodes))
        if tier is not Tier.TREE:
            if not tree.is_chain or (num_nodes or 0) > 1:
                logger.warning_once(
                    f"{type(self.backbone).__name__} with "
                    f"{self.backbone.config._attn_implementation!r} attention cannot verify a draft "
                    f"tree exactly; a chain of {tree.depth} candidates is drafted instead."
                )
            tree, num_nodes = DraftTree.chain(tree.depth), None
        token_ids = self.config.draft_token_ids
        heads = (
            self.leap_heads,
            self.config.leap_offsets,
            self.context_widths,
            self.get_input_embeddings(),
            self.draft_unembeddings(),
            None if token_ids is None else torch.tensor(token_ids, device=self.device),
            tree,
        )
        is_path = self.config.head_context == PATH
        if num_nodes is not None:
            dynamic = DynamicPathDrafter if is_path else DynamicLeapHeadDrafter
            return dynamic(num_nodes, settings.draft_threshold or 0.0, *heads)
        return PathDrafter(*heads) if is_path else LeapHeadDrafter(*heads)


def _say_drafting_is_off(reason: str) -> None:
    logger.warning_once(f"use_lmtp=True decodes plainly here: {reason}.")


def _walker(
    settings: LMTPSettings,
    support: Support,
    chooser: TokenChooser,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> Walker:
    """Rows walk apart where nothing needs them in step: that is as far as each of them goes."""
    returns_dict = generation_config.return_dict_in_generate
    keep_scores = bool(returns_dict and generation_config.output_scores)
    keep_logits = bool(returns_dict and generation_config.output_logits)
    num_rows, length = input_ids.shape
    apart = num_rows == 1 or (support.ragged and streamer is None)
    if settings.acceptance_rule == "typical":
        logger.warning_once(
            "acceptance_rule='typical' is lossy: the text is not plain decoding's, and samples are "
            "not distributed as plain samples."
        )
        if not (apart and (num_rows == 1 or chooser.is_row_wise)):
            raise ValueError(
                "acceptance_rule='typical' judges every row by itself, which this model, or one of "
                "the logits processors and stopping criteria, does not allow. Pass one prompt at a "
                "time, or acceptance_rule='exact'."
            )
        rule = TypicalRule(settings.posterior_threshold, settings.posterior_alpha)
        return RowByRowWalker(input_ids, chooser, keep_scores, keep_logits, rule)
    if apart and chooser.is_plain_greedy and not (keep_scores or keep_logits):
        return GreedyWalker([length] * num_rows, chooser)
    if apart and num_rows > 1 and chooser.is_row_wise:
        return RowByRowWalker(input_ids, chooser, keep_scores, keep_logits)
    return StepwiseWalker(input_ids, chooser, keep_scores, keep_logits)


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
