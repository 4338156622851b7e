"""Under which conditions a model is measured: what a result file says besides its figures."""

from pathlib import Path
from typing import Any

import torch

from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import attention_implementation


def model_conditions(model: LMTPForCausalLM) -> dict[str, Any]:
    """Return which heads run on which backbone, device and versions, JSON-serialisable."""
    return {
        "base_model": base_name(model),
        "leap_offsets": list(model.config.leap_offsets),
        "head_context": model.config.head_context,
        "device": device_name(model.device),
        "attention": attention_implementation(model.backbone.config),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def base_name(model: LMTPForCausalLM) -> str | None:
    """Return the backbone's Hub id, or the name of its folder: a local path tells others nothing."""
    name = model.config.base_model_name_or_path
    return Path(name).name if name and Path(name).is_dir() else name


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
