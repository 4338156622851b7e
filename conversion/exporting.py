"""`lmtp export`: a checkpoint as one full model, as a plain backbone, or as heads for serving engines."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import has_file

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.leaps_lmtp import evenly_spaced_offsets
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.transformers_lmtp import commit_of

from .command_line import console
from .folding import fold_in
from .key_maps import (
    BIAS,
    MEDUSA,
    UNEMBEDDING,
    WEIGHT,
    Layout,
    Place,
    their_name,
)
from .loading import adapter_config, load_config, load_lmtp, load_tokenizer_with_fallback
from .options import Dtype, Options
from .saving import check_output_folder, check_settings, new_folder, save_checkpoint, write_record
from .vllm_serving import save_for_vllm

LAYOUTS = {layout.name: layout for layout in (MEDUSA,)}
NAMES = {
    "full": "the full checkpoint",
    "plain": "the plain backbone",
    "vllm": "backbone and heads",
    "medusa": "the heads",
}


@dataclass
class ExportOptions(Options):
    """What to export, and as what."""

    source: str = field(
        metadata={
            "help": "Folder or Hub id of a checkpoint with leap heads, or of an adapter of one."
        }
    )
    output: Path = field(metadata={"help": "New folder for the result."})
    to: Literal["full", "plain", "vllm", "medusa"] = field(
        kw_only=True,
        metadata={
            "help": "full: backbone and heads in one checkpoint, with the adapter merged. plain: the "
            "backbone without heads. vllm: backbone and heads, each in a folder. medusa: the heads in "
            "Medusa's layout."
        },
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The checkpoint that the adapter was trained on, or the backbone of a heads-only "
            "checkpoint, if not the one that SOURCE names."
        },
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Load and save in this dtype."})


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, with its adapter merged.

    Args:
        model: the model.
        checkpoint: where its heads came from; for an adapter, the checkpoint that it was trained on.
        backbone: the folder or Hub id that replaced the backbone of a heads-only checkpoint.
    """

    model: LMTPForCausalLM
    checkpoint: str
    backbone: str | None = None


def export(options: ExportOptions) -> None:
    """Save a checkpoint in another form. SOURCE stays as it is.

    Examples:
      lmtp export ADAPTER OUT --to full        merge an adapter of `lmtp joint`
      lmtp export CHECKPOINT OUT --to plain    a model for any server, without leap heads
      lmtp export CHECKPOINT OUT --to vllm     for vLLM; the heads' offsets must be 2, 3, 4, ...
    """
    for note in export_checkpoint(options):
        console.print(f"Note: {note}", markup=False, highlight=False)
    console.print(f"Saved {NAMES[options.to]} in {options.output}.", markup=False, highlight=False)


def export_checkpoint(options: ExportOptions) -> list[str]:
    """Save `options.source` in the form `options.to`.

    Returns:
        Notes on what is not exact.

    Raises:
        ValueError: the output folder holds something, there is nothing to export, the adapter does not
            fit its checkpoint, or the layout cannot express the heads (gives all reasons).
    """
    check_output_folder(options.output)
    loaded = _load(options)
    record = {
        "command": "lmtp export",
        "to": options.to,
        "source": options.source,
        "checkpoint": loaded.checkpoint,
        "checkpoint_revision": commit_of(loaded.model.config),
    }
    if options.to in LAYOUTS:
        return save_heads(loaded.model, options.output, LAYOUTS[options.to], record)
    settings = loaded.model.generation_config
    if options.to != "full":
        settings = plain_settings(settings)
    check_settings(settings)
    # An adapter may have brought tokens of its own
    has_tokenizer = has_file(options.source, TOKENIZER_CONFIG_FILE)
    source = options.source if has_tokenizer else loaded.checkpoint
    tokenizer = load_tokenizer_with_fallback(source, loaded.model.config, loaded.backbone)
    if options.to == "vllm":
        command = save_for_vllm(loaded.model, tokenizer, options.output, record, settings)
        return [f"Serve them with: {command}"]
    save: Callable[..., None] = save_checkpoint if options.to == "full" else save_backbone
    save(loaded.model, tokenizer, options.output, record)
    return []


def _load(options: ExportOptions) -> Loaded:
    source, base = options.source, options.base
    adapter = adapter_config(source)
    if adapter is not None:
        checkpoint = base or adapter.base_model_name_or_path
        if not checkpoint:
            raise ValueError(f"The adapter {source!r} does not name its checkpoint. Pass --base.")
        revision = None if base else adapter.revision
        pinned: dict[str, Any] = {"revision": revision} if revision else {}
        model = load_lmtp(checkpoint, options.dtype, **pinned)
        return Loaded(fold_in(model, source), checkpoint)
    config = load_config(source)
    if config.model_type == "lmtp" and not config.heads_only:
        if options.to == "full":
            raise ValueError(
                f"{source!r} is a full checkpoint already. --to plain drops its heads; --to vllm and --to "
                "medusa export them."
            )
        if base is not None:
            raise ValueError(
                f"--base {base} is for an adapter or a heads-only checkpoint, but {source!r} holds its own "
                "backbone. Leave --base out."
            )
    given: dict[str, Any] = {"backbone": base} if base is not None else {}
    return Loaded(load_lmtp(source, options.dtype, **given), source, backbone=base)


def save_backbone(
    model: LMTPForCausalLM, tokenizer: Any, output: Path, record: dict[str, Any]
) -> None:
    """Save the backbone in its own format; only `provenance.json` tells that it had leap heads."""
    backbone = model.backbone
    backbone.generation_config = plain_settings(model.generation_config)
    with new_folder(output) as folder:
        backbone.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_record(folder, record, model.config)


def plain_settings(settings: GenerationConfig) -> GenerationConfig:
    """Return generation settings without those of L-MTP, such as `use_lmtp` and `draft_nodes`."""
    plain, settings_of_lmtp = GenerationConfig(), {field.name for field in fields(LMTPSettings)}

    def is_lmtp(name: str) -> bool:
        # Checkpoints of version 0.1 also have draft_by_batch_size, draft_conditions and others
        known = name in settings_of_lmtp or name.startswith("draft_")
        return known and not hasattr(plain, name)

    return GenerationConfig.from_dict(
        {name: value for name, value in settings.to_dict().items() if not is_lmtp(name)}
    )


def save_heads(
    model: LMTPForCausalLM, output: Path, layout: Layout, record: dict[str, Any]
) -> list[str]:
    """Save the heads in an engine's layout, without the backbone.

    Returns:
        Notes on what is not exact.

    Raises:
        ValueError: the layout cannot express these heads; gives all reasons.
    """
    check_expressible(model)
    tensors = medusa_tensors(model, layout)
    with new_folder(output) as folder:
        save_file(tensors, folder / layout.file_name, metadata={"format": "pt"})
        config = json.dumps(medusa_config(model, layout), indent=2) + "\n"
        (folder / "config.json").write_text(config)
        write_record(folder, {**record, "layout": layout.name}, model.config)
    if not model.config.lm_head_rank:
        return []
    return [
        "The low-rank updates were added to the unembedding: equal logits but for rounding in "
        f"{str(model.dtype).removeprefix('torch.')}."
    ]


def check_expressible(model: LMTPForCausalLM) -> None:
    """Raise a ValueError unless the heads are Medusa's kind: one state in, the full vocabulary out."""
    config = model.config
    adjacent = evenly_spaced_offsets(config.num_leap_heads, 1)
    shared_bias = getattr(model.get_output_embeddings(), "bias", None)
    head_biases = [head.lm_head.bias for head in model.leap_heads if head.lm_head is not None]
    biases = head_biases or [shared_bias]
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
    holding = [reason for reason, holds in reasons.items() if holds]
    if holding:
        raise ValueError(f"Medusa's layout cannot express these heads: {'; '.join(holding)}.")


def medusa_tensors(model: LMTPForCausalLM, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the heads' tensors under the layout's names; every head gets an unembedding."""
    num_layers = model.config.num_head_layers
    tensors: dict[str, torch.Tensor] = {}
    for index, head in enumerate(model.leap_heads):
        for layer, block in enumerate(head.blocks):
            for ours, tensor in ((WEIGHT, block.linear.weight), (BIAS, block.linear.bias)):
                tensors[their_name(layout, Place(ours, index, layer), num_layers)] = tensor
        name = their_name(layout, Place(UNEMBEDDING, index, 0), num_layers)
        tensors[name] = _unembedding(model, head)
    # safetensors refuses tensors that share memory, as shared unembeddings do
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
