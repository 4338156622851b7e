"""Merges an adapter into the checkpoint that it was trained on, completely or not at all."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

HEADS = "leap_heads"  # the name of the module


def fold_in(model: LMTPForCausalLM, source: str) -> LMTPForCausalLM:
    """Merge an adapter into a checkpoint, in place.

    If the adapter stores embeddings, the checkpoint gets its vocabulary. Embeddings are no longer tied if
    the adapter changes them apart.

    Raises:
        ValueError: the adapter is damaged, was trained on another model, or is not finite.
    """
    try:
        stored = load_peft_weights(source, device="cpu")
        _take_vocabulary(model, stored)
        unembedding = model.get_output_embeddings()  # PEFT may wrap it
        with warnings.catch_warnings():
            # PEFT only warns of missing weights and starts them at zero; they are an error below
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            # It warns that it merges into both of two tied embeddings; they are taken apart below
            warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
            adapted = PeftModel.from_pretrained(model, source)
    except SafetensorError as error:
        raise ValueError(
            f"The adapter {source!r} is damaged ({error}). Download or save it again."
        ) from error
    except (RuntimeError, KeyError) as error:
        raise _does_not_fit(source, str(error)) from error
    required = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    possible = get_peft_model_state_dict(adapted, save_embedding_layers=True).keys()
    differing = sorted((required - stored.keys()) | (stored.keys() - possible))
    if differing:
        raise _does_not_fit(source, f"{', '.join(differing[:3])} are in one and not in the other")
    # PEFT does not compare the number of heads: an adapter of two heads would load into three
    tuned = {int(match[1]) for name in stored if (match := re.search(rf"{HEADS}\.(\d+)\.", name))}
    if tuned and tuned != set(range(model.config.num_leap_heads)):
        raise _does_not_fit(
            source, f"it tunes heads {sorted(tuned)} of {model.config.num_leap_heads}"
        )
    return _merge(adapted, unembedding)


def _take_vocabulary(model: LMTPForCausalLM, stored: Mapping[str, torch.Tensor]) -> None:
    """Resize a model to the embeddings among an adapter's weights, if there are any."""
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    names = [re.escape(name) for name, module in model.named_modules() if module in embeddings]
    # Changed embeddings are a layer below the one that changes them
    keys = re.compile(
        rf"base_model\.model\.({'|'.join(names)})\.(weight|(.+\.)?base_layer\.weight)"
    )
    sizes = {len(weight) for key, weight in stored.items() if keys.fullmatch(key)}
    if sizes - {model.config.vocab_size}:
        model.resize_token_embeddings(max(sizes))


def _merge(adapted: PeftModel, unembedding: Any) -> LMTPForCausalLM:
    """Merge an adapter, into input and output embeddings apart, and tie them again if they stay equal."""
    model: Any = adapted.get_base_model()
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if is_tied:
        unembedding.weight = torch.nn.Parameter(unembedding.weight.detach().clone())
        model.config.tie_word_embeddings = False
    merged: LMTPForCausalLM = adapted.merge_and_unload(safe_merge=True)
    weights: list[Any] = [
        merged.get_input_embeddings().weight,
        merged.get_output_embeddings().weight,
    ]
    if is_tied and torch.equal(*weights):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    return merged


def _does_not_fit(source: str, reason: str) -> ValueError:
    return ValueError(
        f"The adapter {source!r} does not fit the checkpoint: {reason}. Pass the checkpoint that the "
        "adapter was trained on with --base."
    )
