"""What `generate(use_lmtp=True)` refuses before any work."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import distributed as dist
from transformers import GenerationConfig, StaticCache
from transformers.generation import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .cache_lmtp import check_cache
from .settings_lmtp import DRAFT_SOURCES, PROMPT_LOOKUP, LMTPSettings
from .static_lmtp import check_static_cache

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


def refuse_synced(backbone: Any, synced_gpus: bool | None) -> None:
    """Raise a ValueError where processes must go in step, as in ZeRO-3: L-MTP's need not."""
    if synced_gpus is None and dist.is_available() and dist.is_initialized():
        is_shared = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(backbone)
        synced_gpus = is_shared and dist.get_world_size() > 1
    if synced_gpus:
        raise ValueError(
            "use_lmtp=True does not support synced_gpus=True, as for a model that is sharded among "
            "processes (ZeRO-3, FSDP). Call generate() without use_lmtp."
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


def refuse_bad_inputs(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for inputs that are no tokens."""
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("use_lmtp=True needs input_ids, got inputs_embeds.")
    input_ids = inputs if inputs is not None else kwargs.get("input_ids")
    if input_ids is not None and input_ids.shape[-1] == 0:
        raise ValueError(
            "The prompt is empty: input_ids has the shape "
            f"{tuple(input_ids.shape)}. Pass at least one token, such as the BOS token."
        )


def refuse_unsupported(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for what Transformers has prepared and is not supported.

    Args:
        generation_config: as prepared.
        model_kwargs: likewise, the cache among them.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"use_lmtp=True supports greedy search and sampling, not {mode.value!r}. Set num_beams=1 "
            "and leave out other strategies, or call generate() without use_lmtp."
        )
    cache = model_kwargs.get("past_key_values")
    check_cache(cache)
    if isinstance(cache, StaticCache):
        check_static_cache(cache, generation_config)
