"""`generate(use_lmtp=True)`: plain decoding's text, in fewer backbone passes.

Plain or not, generation runs through the backbone's own `generate`, so that inputs, cache, logits
processors and stopping criteria are prepared by Transformers for that very architecture. L-MTP is a
decoding loop handed to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .cache_lmtp import check_cache
from .decoding_lmtp import TokenChooser, decode
from .drafting_lmtp import Drafter, LeapHeadDrafter
from .leaps_lmtp import drafts
from .support_lmtp import Tier, decoding_tier
from .tree_lmtp import DraftTree
from .verification_lmtp import Verifier

logger = logging.get_logger(__name__)

SETTINGS = ("use_lmtp", "draft_tree", "draft_length")
OTHER_STRATEGIES = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "use_mtp")


@dataclass
class LMTPSettings:
    """What `generate` and `generation_config` say about L-MTP.

    Args:
        use_lmtp: draft with the leap heads.
        draft_tree: the draft tree as the paths of its nodes, see `DraftTree.from_paths`.
        draft_length: instead of a tree, a top-1 chain of that many candidates.
    """

    use_lmtp: bool = False
    draft_tree: Sequence[Sequence[int]] | None = None
    draft_length: int | None = None

    @classmethod
    def take_from(
        cls, kwargs: dict[str, Any], *generation_configs: GenerationConfig | None
    ) -> "LMTPSettings":
        """Take the settings out of `kwargs`, and what they leave open from the configurations.

        A tree or a length in one place hides both in the places after it.
        """
        places = [{name: kwargs.pop(name) for name in SETTINGS if name in kwargs}]
        places += [
            {name: getattr(config, name, None) for name in SETTINGS}
            for config in generation_configs
            if config is not None
        ]
        settings = cls()
        for place in places:
            if place.get("use_lmtp") is not None:
                settings.use_lmtp = place["use_lmtp"]
                break
        for place in places:
            tree, length = place.get("draft_tree"), place.get("draft_length")
            if tree is not None and length is not None:
                raise ValueError(
                    f"Pass either draft_tree or draft_length, not both, got {tree} and {length}."
                )
            if tree is not None or length is not None:
                settings.draft_tree, settings.draft_length = tree, length
                break
        return settings

    def tree(self, horizon: int) -> DraftTree:
        """Return the draft tree for heads that draft up to distance `horizon`.

        Raises:
            ValueError: the tree is malformed, or deeper than the heads can draft.
        """
        if self.draft_length is not None:
            if isinstance(self.draft_length, bool) or not isinstance(self.draft_length, int):
                raise ValueError(f"draft_length must be an integer, got {self.draft_length!r}.")
            if self.draft_length < 0:
                raise ValueError(f"draft_length must be 0 or more, got {self.draft_length}.")
            tree = DraftTree.chain(self.draft_length)
        elif self.draft_tree is not None:
            tree = DraftTree.from_paths(self.draft_tree)
        else:
            tree = DraftTree.chain(horizon)
        if tree.depth > horizon:
            raise ValueError(
                f"The draft is {tree.depth} tokens deep, but these leap heads can draft {horizon} "
                "(their largest offset minus 1). Shorten draft_tree or draft_length."
            )
        return tree


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
            use_lmtp: draft with the leap heads. Like the next two, it may stand in
                `generation_config` instead.
            draft_tree: the draft tree, as a list of paths, each the ranks taken from the root.
            draft_length: a top-1 chain of so many candidates; by default all that the heads draft.
            drafter: proposes candidates in place of the leap heads; only chains, where the model
                takes no trees.

        Returns:
            What the backbone's `generate` returns; with `return_dict_in_generate=True`, an
            `LMTPGenerateOutput`, which also has the acceptance lengths.

        Raises:
            ValueError: with `use_lmtp=True`, for a call that it does not support, before any work.
        """
        settings = LMTPSettings.take_from(kwargs, generation_config, self.generation_config)
        self.backbone.generation_config = self.generation_config
        if not settings.use_lmtp:
            return self.backbone.generate(
                inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs
            )

        _refuse_other_strategies(kwargs)
        _refuse_bad_inputs(inputs, kwargs)
        tree = settings.tree(horizon=len(drafts(self.config.leap_offsets)))
        stopping_criteria = _with_stop_strings(
            stopping_criteria, kwargs, generation_config, self.generation_config
        )
        return self.backbone.generate(
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            *args,
            custom_generate=self._decoding_method(tree, drafter, kwargs.get("streamer")),
            **kwargs,
        )

    def _decoding_method(
        self, tree: DraftTree, drafter: Drafter | None, streamer: BaseStreamer | None
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
            _refuse_unsupported(input_ids, generation_config, model_kwargs)
            tier = self._decoding_tier()
            returns_dict = generation_config.return_dict_in_generate
            chooser = TokenChooser(
                logits_processor,
                stopping_criteria,
                generation_config.do_sample,
                scores=[] if returns_dict and generation_config.output_scores else None,
                logits=[] if returns_dict and generation_config.output_logits else None,
            )
            output = decode(
                Verifier(backbone, takes_trees=tier is Tier.TREE),
                input_ids,
                drafter or self._leap_head_drafter(tree, tier),
                chooser,
                generation_config,
                streamer,
                model_kwargs,
            )
            return output if returns_dict else output.sequences

        return lmtp_decoding

    def _decoding_tier(self) -> Tier:
        tier = decoding_tier(self.backbone)
        if tier is Tier.REFUSED:
            raise ValueError(
                f"use_lmtp=True is not possible with {type(self.backbone).__name__}: rejected "
                "candidates cannot be taken out of its cache exactly. Call generate() without it."
            )
        return tier

    def _leap_head_drafter(self, tree: DraftTree, tier: Tier) -> LeapHeadDrafter:
        if tier is Tier.CHAIN and not tree.is_chain:
            logger.warning_once(
                f"{type(self.backbone).__name__} with "
                f"{self.backbone.config._attn_implementation!r} attention cannot verify a draft "
                f"tree exactly; a chain of {tree.depth} candidates is drafted instead."
            )
            tree = DraftTree.chain(tree.depth)
        token_ids = self.config.draft_token_ids
        return LeapHeadDrafter(
            self.leap_heads,
            self.config.leap_offsets,
            self.context_widths,
            self.get_input_embeddings(),
            self.draft_unembeddings(),
            None if token_ids is None else torch.tensor(token_ids, device=self.device),
            tree,
        )


def _refuse_other_strategies(kwargs: dict[str, Any]) -> None:
    given = [name for name in OTHER_STRATEGIES if kwargs.get(name)]
    if given:
        raise ValueError(
            f"use_lmtp=True is a decoding strategy of its own and cannot be combined with {given}. "
            "Drop one or the other."
        )


def _refuse_bad_inputs(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("use_lmtp=True needs input_ids, got inputs_embeds.")
    input_ids = inputs if inputs is not None else kwargs.get("input_ids")
    if input_ids is not None and input_ids.shape[-1] == 0:
        raise ValueError(
            "The prompt is empty: input_ids has the shape "
            f"{tuple(input_ids.shape)}. Pass at least one token, such as the BOS token."
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


def _refuse_unsupported(
    input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Refuse what is prepared but not supported, before the first forward pass."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"use_lmtp=True supports greedy search and sampling, not {mode.value!r}. Set num_beams=1 "
            "and leave out other strategies, or call generate() without use_lmtp."
        )
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"use_lmtp=True supports one sequence at a time, got {input_ids.shape[0]} (batch size "
            "times num_return_sequences). Call it once per prompt, or without use_lmtp."
        )
    wanted = [
        name
        for name in ("output_attentions", "output_hidden_states")
        if getattr(generation_config, name)
    ]
    if wanted:
        raise ValueError(f"use_lmtp=True does not return {wanted}. Leave them out.")
    check_cache(model_kwargs.get("past_key_values"))
