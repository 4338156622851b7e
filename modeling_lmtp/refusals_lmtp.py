"""What `generate(use_lmtp=True)` refuses, or decodes plainly, before any work.

A call that contradicts itself is an error. What the model or the installed libraries cannot do is decoded
plainly, with a warning: the flag changes the speed and nothing else.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import distributed as dist
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from .settings_lmtp import DRAFT_SOURCES, PROMPT_LOOKUP, LMTPSettings
from .transformers_lmtp import is_sharded

OTHER_STRATEGIES = ("assistant_model", "custom_generate", "use_mtp", "token_healing")


def refuse_ignored(kwargs: Mapping[str, Any], has_drafter: bool, use_lmtp: bool) -> None:
    """Raise a ValueError for what a call asks for and would not get.

    A configuration may say more than a call makes use of, and `use_lmtp=False` turns off what stands
    beside it.

    Args:
        kwargs: of the call.
        has_drafter: whether it brings a drafter of its own.
        use_lmtp: as call and configurations say together.
    """
    names = [f.name for f in fields(LMTPSettings)]
    given = [n for n in names if kwargs.get(n) is not None and kwargs[n] is not False]
    if use_lmtp and has_drafter:
        beside = [name for name in given if name in DRAFT_SOURCES]
        if beside:
            raise ValueError(
                f"drafter proposes all candidates itself, so that {beside} would say nothing. Leave out "
                "one or the other, or merge drafters with MergedDrafter."
            )
    if not use_lmtp and kwargs.get("use_lmtp") is None:
        given = ["drafter"] * has_drafter + [name for name in given if name not in PROMPT_LOOKUP]
        if given:
            raise ValueError(
                f"{given} have no effect without use_lmtp=True. Pass it as well, or use_lmtp=False to "
                "decode plainly nevertheless."
            )


def refuse_prompt_learning(model: Any) -> None:
    """Raise a ValueError for prompts that PEFT has learned: the backbone generates, and has none.

    PEFT puts them where the model that it wraps would prepare its inputs.
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
    """Raise a ValueError for another way to decode, in the call or in a configuration."""
    caches = [kwargs.get("cache_implementation")]
    caches += [config.cache_implementation for config in generation_configs if config is not None]
    if "paged" in caches:
        raise ValueError(
            "use_lmtp=True does not support cache_implementation='paged', which is continuous "
            "batching. Leave it out, or pass 'dynamic'."
        )
    given = [name for name in OTHER_STRATEGIES if kwargs.get(name)]
    if given:
        raise ValueError(
            f"use_lmtp=True is a decoding strategy of its own and cannot be combined with {given}. "
            "Drop one or the other."
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
    """Raise a ValueError for a way to decode that is neither greedy search nor sampling.

    Args:
        generation_config: as Transformers has prepared it.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"use_lmtp=True supports greedy search and sampling, not {mode.value!r}. Set num_beams=1 "
            "and leave out other strategies, or call generate() without use_lmtp."
        )


def why_plain(model: Any, kwargs: Mapping[str, Any]) -> str:
    """Say why a call is decoded plainly whatever its inputs turn out to be; nothing if it need not be.

    Args:
        model: has a `backbone`.
        kwargs: of the call.
    """
    if kwargs.get("inputs_embeds") is not None:
        return "drafts need input_ids, and the call passes inputs_embeds"
    synced_gpus = kwargs.get("synced_gpus")
    if synced_gpus is None and dist.is_available() and dist.is_initialized():
        synced_gpus = dist.get_world_size() > 1 and is_sharded(model.backbone)
    if synced_gpus:
        return (
            "its processes go in step (synced_gpus=True), as for weights sharded by ZeRO-3 or FSDP"
        )
    return ""
