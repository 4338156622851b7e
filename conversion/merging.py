"""`lmtp merge`: an adapter folded into its checkpoint, or the plain backbone of either."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.transformers_lmtp import commit_of

from .folding import fold_in
from .loading import adapter_config, load_lmtp, load_tokenizer
from .saving import (
    check_output_folder,
    new_folder,
    save_checkpoint,
    write_record,
)


def merge(
    source: str,
    output: Path,
    *,
    base: str | None = None,
    drop_heads: bool = False,
    dtype: str = "auto",
) -> LMTPForCausalLM:
    """Save a full checkpoint with the adapter in it, or with `drop_heads` a plain backbone.

    Args:
        source: folder or Hub id of an adapter, or with `drop_heads` of any checkpoint with heads.
        output: a new folder.
        base: the checkpoint that the adapter was trained on; by default the one that it names.
        drop_heads: save what plain decoding needs, as Transformers and any server load it.
        dtype: of the checkpoint.

    Returns:
        The merged model.

    Raises:
        ValueError: `output` holds something, there is nothing to merge, or the adapter does not fit.
    """
    check_output_folder(output)
    adapter = adapter_config(source)
    if adapter is None and not drop_heads:
        raise ValueError(
            f"{source!r} is no adapter, so there is nothing to merge. Pass --drop-heads to get its plain "
            "backbone."
        )
    if adapter is None and base is not None:
        raise ValueError(f"base={base!r} is the checkpoint of an adapter, but {source!r} is none.")
    checkpoint: str | None = source
    revision: str | None = None
    if adapter is not None:
        checkpoint = base or adapter.base_model_name_or_path
        revision = None if base else adapter.revision
    if not checkpoint:
        raise ValueError(f"{source!r} does not name its checkpoint. Pass --base.")
    pinned: dict[str, Any] = {"revision": revision} if revision else {}
    model = load_lmtp(checkpoint, dtype, **pinned)
    if adapter is not None:
        model = fold_in(model, source)
    record = {
        "command": "lmtp merge",
        "source": source,
        "checkpoint": checkpoint,
        "checkpoint_revision": commit_of(model.config, revision or "main"),
        "drop_heads": drop_heads,
    }
    tokenizer = load_tokenizer(checkpoint)
    if drop_heads:
        save_backbone(model, tokenizer, output, record)
    else:
        save_checkpoint(model, tokenizer, output, record)
    return model


def save_backbone(
    model: LMTPForCausalLM, tokenizer: Any, output: Path, record: dict[str, Any]
) -> None:
    """Save the backbone alone, in its own format, with nothing of L-MTP in it but the record."""
    backbone = model.backbone
    backbone.generation_config = plain_settings(model.generation_config)
    with new_folder(output) as folder:
        backbone.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_record(folder, record, model.config)


def plain_settings(settings: GenerationConfig) -> GenerationConfig:
    """Return generation settings without those that only L-MTP knows, and what it says of drafts."""
    plain, settings_of_lmtp = GenerationConfig(), {field.name for field in fields(LMTPSettings)}

    def is_ours(name: str) -> bool:
        # `lmtp tune` tells beside the settings how it found them
        ours = name in settings_of_lmtp or name.startswith("draft_")
        return ours and not hasattr(plain, name)

    return GenerationConfig.from_dict(
        {name: value for name, value in settings.to_dict().items() if not is_ours(name)}
    )
