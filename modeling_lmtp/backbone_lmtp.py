"""The few things asked of a backbone: that it is a causal model, and its last hidden states.

Shapes: `B` batch, `L` length, `H` hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .transformers_lmtp import execution_device


def check_backbone(backbone: PreTrainedModel) -> None:
    """Raise a ValueError unless `backbone` is a causal language model that heads can stand on."""
    name = type(backbone).__name__
    if getattr(backbone, "peft_config", None):
        raise ValueError(
            f"{name} has adapters, and a checkpoint of it could not be loaded again. Merge them first "
            "(PeftModel's merge_and_unload), save that, and give it the heads."
        )
    if hasattr(backbone, "leap_heads"):
        raise ValueError(
            f"{name} has leap heads already. Give others to its backbone, the model without them."
        )
    if backbone.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model. Leap heads need a causal language model, as "
            "AutoModelForCausalLM loads it."
        )
    if backbone.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no language-modeling head. Load the backbone with AutoModelForCausalLM, not "
            "AutoModel."
        )


def unembedding_size(backbone: PreTrainedModel) -> tuple[int, int]:
    """Return `(V, H)` of the backbone's unembedding; `H` is the width of the states that heads read."""
    weight = backbone.get_output_embeddings().weight
    return weight.shape[0], weight.shape[1]


def unembedding_device(backbone: PreTrainedModel) -> torch.device:
    """Return where the unembedding computes; meta in the midst of loading."""
    unembedding = backbone.get_output_embeddings()
    device = unembedding.weight.device
    return (execution_device(unembedding) if device.type == "meta" else None) or device


def copy_unembedding(
    backbone: PreTrainedModel, token_ids: Sequence[int] | None = None
) -> nn.Linear:
    """Return a new linear layer with the unembedding's weights, or those of some tokens only.

    Raises:
        ValueError: they are not in memory.
    """
    source = backbone.get_output_embeddings()
    if source.weight.is_meta and unembedding_device(backbone).type != "meta":
        raise ValueError(
            f"The unembedding of {type(backbone).__name__} is offloaded, so heads cannot start from a "
            "copy of it. Keep it in memory (device_map), or let heads share it."
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


def keep_rows(old: Any, new: Any) -> None:
    """Copy the rows that both linear layers have, `(min(V, V'), H)`, from `old` to `new`."""
    rows = min(old.out_features, new.out_features)
    with torch.no_grad():
        new.weight[:rows] = old.weight[:rows]
        if new.bias is not None:
            new.bias[:rows] = old.bias[:rows]


@contextmanager
def unembedding_inputs(
    backbone: PreTrainedModel, num_logits: int | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect what the unembedding reads, `(B, L, H)`, in each forward pass inside the block.

    These are the last hidden states `h_s` that leap heads read. (Neither the base model's output nor
    the last of `output_hidden_states` will do: some architectures normalise, project or scale in
    between.)

    Args:
        backbone: the model.
        num_logits: let the unembedding compute the logits of that many leading tokens only, where
            the states are all that is wanted.

    Raises:
        RuntimeError: on leaving the block, if the forward pass never called the unembedding.
    """
    states: list[torch.Tensor] = []
    device = unembedding_device(backbone)  # where the heads are
    own_thread = get_ident()  # others may be running the same model

    def collect(
        module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if not torch.compiler.is_compiling() and get_ident() != own_thread:
            return None
        states.append(args[0] if device.type == "meta" else args[0].to(device))
        return (args[0][..., :num_logits, :], *args[1:])

    handle = backbone.get_output_embeddings().register_forward_pre_hook(collect)
    try:
        yield states
    finally:
        handle.remove()
    if not states:
        raise RuntimeError(
            f"{type(backbone).__name__} computes its logits without calling the module that its "
            "get_output_embeddings() returns, so leap heads have no states to read."
        )
