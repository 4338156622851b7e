"""LoRA adapters on a backbone and its leap heads: where they go, and how fast each part learns."""

from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_lmtp.conversion.folding import HEADS
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import commit_of

HeadTraining = Literal["lora", "full", "none"]


def add_adapters(
    model: LMTPForCausalLM,
    *,
    rank: int = 32,
    alpha: int = 16,
    dropout: float = 0.0,
    heads: HeadTraining = "lora",
) -> PeftModel:
    """Put LoRA adapters on all linear layers but the unembedding, in place; all else is frozen.

    Trained weights are in float32, whatever the model's dtype is.

    Args:
        model: may be quantized, see `check_trainable`.
        rank, alpha, dropout: LoRA's.
        heads: `"lora"`, adapters on the heads as well (arXiv 2505.17505); `"full"`, all weights of the
            heads, kept in the adapter; `"none"`, the heads stay as they are.

    Raises:
        ValueError: `heads` is none of these, or the model cannot be trained.
    """
    check_trainable(model)
    if heads not in get_args(HeadTraining):
        raise ValueError(
            f"heads must be one of {', '.join(get_args(HeadTraining))}, got {heads!r}."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=None if heads == "lora" else rf"{HEADS}\..*",
        modules_to_save=[HEADS] if heads == "full" else None,
        task_type="CAUSAL_LM",
        revision=commit_of(model.config),
    )
    adapted = get_peft_model(model, config)
    cast_trained(adapted, torch.float32)
    return adapted


def check_trainable(model: LMTPForCausalLM) -> None:
    """Raise a ValueError if adapters on `model` would not be trained, or not rightly.

    Quantized backbones: tried with bitsandbytes 0.50.2 in 8 bits on the CPU. In 4 bits, bitsandbytes
    packs weights for the CPU at the first pass in evaluation mode, and no gradient passes them from
    then on, with only a warning. Not tried: any GPU, and other methods than bitsandbytes.
    """
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise ValueError(
            "model has adapters already. Pass the LMTPForCausalLM without them, or merge them first "
            "with merge_and_unload()."
        )
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        raise ValueError(
            "model is quantized to 4 bits on the CPU, where bitsandbytes computes no gradients through "
            "its layers. Train it on a GPU, or load it in 8 bits or whole."
        )


def cast_trained(model: PeftModel, dtype: torch.dtype, *, only_heads: bool = False) -> None:
    """Cast the weights that train, or those of whole heads alone, in place."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (not only_heads or ".modules_to_save." in name):
            parameter.data = parameter.data.to(dtype)


def parameter_groups(
    model: PeftModel, learning_rate: float, head_learning_rate: float
) -> list[dict[str, Any]]:
    """Return the optimizer's groups: what trains of the backbone, then what trains of the heads."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base: Any = model.get_base_model()
    of_heads = set(base.leap_heads.parameters())
    groups = [
        {"params": [p for p in trained if p not in of_heads], "lr": learning_rate},
        {"params": [p for p in trained if p in of_heads], "lr": head_learning_rate},
    ]
    return [group for group in groups if group["params"]]
