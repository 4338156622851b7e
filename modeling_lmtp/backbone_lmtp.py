"""What leap heads need of a backbone: a causal language model with an unembedding.

Shapes: `H` hidden size, `V` vocabulary size.
"""

from collections.abc import Sequence
from inspect import ismethod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .transformers_lmtp import execution_device


def check_backbone(backbone: PreTrainedModel) -> None:
    """Raise a ValueError unless `backbone` is a causal language model that can be given leap heads."""
    name = type(backbone).__name__
    if getattr(backbone, "peft_config", None):
        raise ValueError(
            f"{name} has adapters, so a checkpoint of it could not be loaded again. Merge them first "
            "(PeftModel's merge_and_unload), save the result, and add leap heads to that."
        )
    if hasattr(backbone, "leap_heads"):
        raise ValueError(f"{name} already has leap heads. Add new ones to its .backbone instead.")
    if backbone.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model. Leap heads need a causal language model, as "
            "AutoModelForCausalLM loads it."
        )
    packed = [type(m) for m in backbone.modules() if ismethod(getattr(m, "weight", None))]
    if packed:
        raise ValueError(
            f"{name} has layers of {packed[0].__module__}, as quantize_dynamic makes them, which neither "
            "leap heads nor checkpoints can use. Quantize the model with from_pretrained(..., "
            "quantization_config=...) instead."
        )
    if backbone.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no language-modeling head. Load the backbone with AutoModelForCausalLM, not "
            "AutoModel."
        )


def unembedding_size(backbone: PreTrainedModel) -> tuple[int, int]:
    """Return `(V, H)` of the backbone's unembedding; `H` is also the width of the heads' input."""
    weight = backbone.get_output_embeddings().weight
    return weight.shape[0], weight.shape[1]


def unembedding_device(backbone: PreTrainedModel) -> torch.device:
    """Return the device on which the unembedding computes; meta while the model is being loaded."""
    unembedding = backbone.get_output_embeddings()
    device = unembedding.weight.device
    return (execution_device(unembedding) if device.type == "meta" else None) or device


def copy_unembedding(
    backbone: PreTrainedModel, token_ids: Sequence[int] | None = None
) -> nn.Linear:
    """Return a new linear layer with the unembedding's weights, or only its rows for some tokens.

    Raises:
        ValueError: the weights are offloaded.
    """
    source = backbone.get_output_embeddings()
    if source.weight.is_meta and unembedding_device(backbone).type != "meta":
        raise ValueError(
            f"The unembedding of {type(backbone).__name__} is offloaded, so heads cannot copy it. "
            "Keep it in memory (device_map), or set share_lm_head=True."
        )
    vocab_size, hidden_size = unembedding_size(backbone)
    rows = slice(None) if token_ids is None else list(token_ids)
    has_bias = getattr(source, "bias", None) is not None
    copy = nn.Linear(
        hidden_size,
        vocab_size if token_ids is None else len(token_ids),
        bias=has_bias,
        device=source.weight.device,
        dtype=source.weight.dtype,
    )
    with torch.no_grad():
        copy.weight.copy_(source.weight[rows])
        if has_bias:
            copy.bias.copy_(source.bias[rows])
    return copy


def copy_common_rows(old: Any, new: Any) -> None:
    """Copy the rows that two linear layers have in common, `(min(V, V'), H)`, from `old` to `new`."""
    rows = min(old.out_features, new.out_features)
    with torch.no_grad():
        new.weight[:rows] = old.weight[:rows]
        if new.bias is not None:
            new.bias[:rows] = old.bias[:rows]
