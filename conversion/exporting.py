"""`lmtp export`: leap heads in the layouts that serving engines read."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.leaps_lmtp import evenly_spaced_offsets
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .key_maps import (
    BIAS,
    MEDUSA,
    UNEMBEDDING,
    VLLM,
    WEIGHT,
    Layout,
    Place,
    their_name,
)
from .loading import load_lmtp
from .saving import check_output_folder, new_folder, write_record

FORMATS = {layout.name: layout for layout in (MEDUSA, VLLM)}


def export_heads(source: str, output: Path, format: str = MEDUSA.name) -> list[str]:
    """Write a checkpoint's heads in another layout; the backbone stays where it is.

    Args:
        source: folder or Hub id of a checkpoint whose heads have offsets 2, 3, 4, …
        output: a new folder.
        format: `"medusa"` (Medusa's own code, text-generation-inference, TensorRT-LLM) or `"vllm"`.

    Returns:
        Notes on what is not exact.

    Raises:
        ValueError: the layout cannot express these heads; gives all reasons.
    """
    check_output_folder(output)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    model = load_lmtp(source)
    check_expressible(model)
    layout = FORMATS[format]
    tensors = medusa_tensors(model, layout)
    with new_folder(output) as folder:
        save_file(tensors, folder / layout.file_name, metadata={"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps(medusa_config(model, layout), indent=2) + "\n"
        )
        record = {"command": "lmtp export", "checkpoint": source, "layout": layout.name}
        write_record(folder, record, model.config)
    if not model.config.lm_head_rank:
        return []
    return [
        "The low-rank updates were added to the unembedding: equal logits but for rounding in "
        f"{str(model.dtype).removeprefix('torch.')}."
    ]


def check_expressible(model: LMTPForCausalLM) -> None:
    """Raise a ValueError unless the heads are Medusa's: one state in, all of the vocabulary out."""
    config = model.config
    adjacent = evenly_spaced_offsets(config.num_leap_heads, 1)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    own_biases = [head.lm_head.bias for head in model.leap_heads if head.lm_head is not None]
    biases = own_biases if own_biases else [bias]
    reasons = {
        "there are no heads": config.num_leap_heads == 0,
        f"its heads predict {adjacent}, yours {config.leap_offsets}": config.leap_offsets
        != adjacent,
        f"its heads see no token after their state (head_context={config.head_context!r})": bool(
            config.head_context
        ),
        f"its heads read the last state alone (head_input={config.head_input!r})": (
            config.head_input != "last"
        ),
        "its heads propose any token, yours those of a draft vocabulary (draft_token_ids)": (
            config.draft_token_ids is not None
        ),
        "its unembeddings have no bias": any(b is not None and bool(b.any()) for b in biases),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"Medusa's layout cannot express these heads: {'; '.join(found)}.")


def medusa_tensors(model: LMTPForCausalLM, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the heads' tensors by the layout's names, each with an unembedding of its own."""
    num_layers = model.config.num_head_layers
    tensors: dict[str, torch.Tensor] = {}
    for index, head in enumerate(model.leap_heads):
        for layer, block in enumerate(head.blocks):
            for ours, tensor in ((WEIGHT, block.linear.weight), (BIAS, block.linear.bias)):
                tensors[their_name(layout, Place(ours, index, layer), num_layers)] = tensor
        name = their_name(layout, Place(UNEMBEDDING, index, 0), num_layers)
        tensors[name] = _unembedding(model, head)
    # Each is written out, shared or not
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _unembedding(model: LMTPForCausalLM, head: Any) -> torch.Tensor:
    unembedding: Any = head.lm_head or model.get_output_embeddings()
    weight: torch.Tensor = unembedding.weight
    if head.lm_head_update is None:
        return weight
    up, down = head.lm_head_update.up.weight, head.lm_head_update.down.weight
    return (weight.float() + up.float() @ down.float()).to(weight.dtype)


def medusa_config(model: LMTPForCausalLM, layout: Layout) -> dict[str, Any]:
    """Return the config.json that goes with the tensors."""
    vocab_size, hidden_size = unembedding_size(model.backbone)
    values = {
        "num_leap_heads": model.config.num_leap_heads,
        "num_head_layers": model.config.num_head_layers,
        "backbone": model.config.base_model_name_or_path,
    }
    return {
        **layout.fixed_config,
        **{layout.config[name]: value for name, value in values.items()},
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
