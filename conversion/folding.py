"""Merges an adapter into the checkpoint that it was trained on, completely or not at all."""

import re
import warnings
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

HEADS = "leap_heads"  # the name of the module


def fold_in(model: LMTPForCausalLM, source: str) -> LMTPForCausalLM:
    """Merge an adapter into a checkpoint, in place.

    Raises:
        ValueError: the adapter is damaged, was trained on another model, or is not finite.
    """
    try:
        stored = load_peft_weights(source, device="cpu")
        _check_vocabulary(model, source, stored)
        with warnings.catch_warnings():
            # PEFT only warns of missing weights and starts them at zero; they are an error below
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, source)
    except SafetensorError as error:
        raise ValueError(
            f"The adapter {source!r} is damaged ({error}). Download or save it again."
        ) from error
    except (RuntimeError, KeyError) as error:
        raise _does_not_fit(source, str(error)) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # PEFT stores embeddings too if the vocabulary was resized, or if it is told to
    allowed = get_peft_model_state_dict(adapted, save_embedding_layers=True).keys()
    differing = sorted((stored.keys() - allowed) | (expected - stored.keys()))
    if differing:
        raise _does_not_fit(source, f"{', '.join(differing[:3])} are in one and not in the other")
    # PEFT does not compare the number of heads: an adapter of two heads would load into three
    tuned = {int(match[1]) for name in stored if (match := re.search(rf"{HEADS}\.(\d+)\.", name))}
    if tuned and tuned != set(range(model.config.num_leap_heads)):
        raise _does_not_fit(
            source, f"it tunes heads {sorted(tuned)} of {model.config.num_leap_heads}"
        )
    merged: LMTPForCausalLM = adapted.merge_and_unload(safe_merge=True)
    return merged


def _check_vocabulary(model: LMTPForCausalLM, source: str, stored: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError if an adapter stores embeddings of another number of tokens."""
    embeddings: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in embeddings]
    weights = [f"base_model.model.{n}{part}.weight" for n in names for part in ("", ".base_layer")]
    sizes = {len(stored[weight]) for weight in weights if weight in stored}
    num_tokens = embeddings[0].weight.shape[0]
    if sizes - {num_tokens}:
        raise ValueError(
            f"The adapter {source!r} stores embeddings of {max(sizes)} tokens, and the checkpoint has "
            f"{num_tokens}: it was trained after the vocabulary was resized. Resize the checkpoint "
            f"likewise (model.resize_token_embeddings({max(sizes)})), save it, and pass it with --base."
        )


def _does_not_fit(source: str, reason: str) -> ValueError:
    return ValueError(
        f"The adapter {source!r} does not fit the checkpoint: {reason}. Pass the checkpoint that the "
        "adapter was trained on with --base."
    )
