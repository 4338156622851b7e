"""LoRA adapters on a backbone and its leap heads, and a learning rate for each part."""

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
    """Add LoRA adapters to all linear layers except the unembedding, and freeze the other weights.

    The model changes in place. Trainable weights are cast to float32, whatever the model's dtype.

    Args:
        model: may be quantized, see `check_trainable`.
        rank, alpha, dropout: see `peft.LoraConfig`.
        heads: `"lora"` adds adapters to the heads too (arXiv 2505.17505); `"full"` trains all weights
            of the heads and stores them in the adapter; `"none"` freezes the heads.

    Raises:
        ValueError: `heads` has another value, or the model cannot be trained.
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
    """Raise a ValueError if adapters on `model` would get no gradients, or wrong ones.

    Quantized backbones were tested with bitsandbytes 0.50.2 in 8 bits on the CPU only. In 4 bits,
    bitsandbytes repacks the weights for the CPU in the first evaluation pass; from then on it passes no
    gradients through them, and only warns.
    """
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise ValueError(
            "model must be an LMTPForCausalLM without adapters, got one that has adapters already. Merge "
            "them first with merge_and_unload()."
        )
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        raise ValueError(
            "model is quantized to 4 bits on the CPU, where bitsandbytes computes no gradients through "
            "its layers. Train it on a GPU, or load it in 8 bits or unquantized."
        )


def cast_trained(model: PeftModel, dtype: torch.dtype, *, only_heads: bool = False) -> None:
    """Cast the trainable weights in place; with `only_heads`, only those of fully trained heads."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (not only_heads or ".modules_to_save." in name):
            parameter.data = parameter.data.to(dtype)


def parameter_groups(
    model: PeftModel, learning_rate: float, head_learning_rate: float
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: the backbone's trainable weights, then the heads'."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base: Any = model.get_base_model()
    head_parameters = set(base.leap_heads.parameters())
    groups = [
        {"params": [p for p in trainable if p not in head_parameters], "lr": learning_rate},
        {"params": [p for p in trainable if p in head_parameters], "lr": head_learning_rate},
    ]
    # PyTorch rejects an empty group; the heads' is empty with `heads="none"`.
    return [group for group in groups if group["params"]]
