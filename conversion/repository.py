"""Assembles the files of a Hub repository in a folder, and tries them in a clean process.

A repository takes one of three forms: a full checkpoint, leap heads only, or an adapter.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .loading import load_tokenizer, load_tokenizer_with_fallback, reading
from .remote_check import generate_as_remote_code
from .saving import PROVENANCE, file_sha256, read_json, versions

Form = Literal["full", "heads", "adapter"]

CHECK_PROMPT = "Why is the sky blue?"
CHECK_TOKENS = 24
OTHER_BACKBONE = (
    "If its backbone was trained, publish it with --form full; else check --base_model and "
    "--base_revision."
)
COMMIT = re.compile("[0-9a-f]{40}")


def form_of(folder: Path, name: str | None = None) -> Form:
    """Return the form of the checkpoint in a folder.

    Args:
        folder: holds at least the checkpoint's configuration.
        name: what to call it in an error; the folder's path by default.

    Raises:
        ValueError: the folder holds neither a checkpoint with leap heads nor an adapter.
    """
    if (folder / "adapter_config.json").exists():
        return "adapter"
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("model_type") != "lmtp":
        raise ValueError(
            f"{name or folder} holds neither a checkpoint with leap heads nor an adapter. Make one with "
            "`lmtp train` or `lmtp convert`."
        )
    return "heads" if config.get("heads_only") else "full"


def check_hub_id(name: str | None, option: str) -> str:
    """Return `name` if it can be the id of a repository on the Hub.

    Raises:
        ValueError: the name is missing, a path, or malformed; the message names the option to set.
    """
    if not name or Path(name).is_absolute() or Path(name).exists():
        raise ValueError(
            f"Others cannot load from {name!r}. Give the repository's id on the Hub, such as "
            f"name/model, with {option}."
        )
    validate_repo_id(name)
    return name


def assemble(
    source: Path,
    folder: Path,
    form: Form,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    base_folder: Path | None = None,
    max_shard_size: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Write code, weights, settings, tokenizer and record of a checkpoint into a folder.

    Args:
        source: a checkpoint of any form.
        folder: an existing, empty folder.
        form: the form of the repository.
        base_model, base_revision: where others get the base model; what the checkpoint says by default.
        base_folder: a local copy of the base model, loaded in place of the one that `source` names.
        max_shard_size: passed to `save_pretrained`.

    Returns:
        The model that was written, on the CPU in the checkpoint's dtype, and its tokenizer.

    Raises:
        ValueError: `source` cannot take that form, the base model has no name or commit that others
            could load, or the tokenizer does not fit.
    """
    source_form = form_of(source)
    if (source_form == "adapter") != (form == "adapter"):
        raise ValueError(
            f"{source} is of form {source_form!r} and cannot be published as {form!r}. Publish an adapter "
            "as it is, or make a full checkpoint of it with `lmtp export --to full`."
        )
    if form == "adapter":
        tokenizer = load_tokenizer(source)
        model, config = _write_adapter(source, folder, base_model, base_revision, base_folder)
    else:
        given = {"backbone": base_folder} if base_folder and source_form == "heads" else {}
        with reading(source):
            model = LMTPForCausalLM.from_pretrained(source, **given).eval()
        config = model.config
        tokenizer = load_tokenizer_with_fallback(source, config, base_folder)
        config.base_model_name_or_path = base_model or config.base_model_name_or_path
        config.base_model_revision = base_revision or config.base_model_revision
        check_hub_id(config.base_model_name_or_path, "--base_model")
        config.backbone_config.name_or_path = config.base_model_name_or_path
        if form == "heads":
            check_pinned(config.base_model_revision)
        options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(folder, heads_only=form == "heads", **options)
    check_tokenizer(tokenizer, model)
    tokenizer.save_pretrained(folder)
    _write_record(source, folder, form, config)
    return model, tokenizer


def check_pinned(revision: str | None) -> None:
    """Raise a ValueError unless a revision is a commit: branches and tags can be moved."""
    if not COMMIT.fullmatch(revision or ""):
        raise ValueError(
            "The base model must be pinned to a commit, of 40 hexadecimal digits; got revision "
            f"{revision!r}. Give it with --base_revision."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Raise a ValueError if a tokenizer has tokens for which the model has no embedding."""
    highest = max(tokenizer.get_vocab().values())
    vocab_size, _ = unembedding_size(model)
    if highest >= vocab_size:
        raise ValueError(
            f"The tokenizer does not match the model: its token ids go up to {highest}, the model's "
            f"vocabulary has {vocab_size}. Save the backbone's tokenizer with the checkpoint."
        )


def _write_adapter(
    source: Path,
    folder: Path,
    base_model: str | None,
    base_revision: str | None,
    base_folder: Path | None,
) -> tuple[Any, Any]:
    """Copy an adapter and name its base model; return the adapted model and the base's configuration."""
    with reading(source):
        adapter = PeftConfig.from_pretrained(str(source))
    named, pinned = adapter.base_model_name_or_path, adapter.revision
    adapter.base_model_name_or_path = check_hub_id(base_model or named, "--base_model")
    adapter.revision = base_revision or pinned
    check_pinned(adapter.revision)
    adapter.save_pretrained(folder)
    shutil.copy(source / "adapter_model.safetensors", folder)
    where = {"revision": adapter.revision} if base_folder is None else {}
    named = base_folder or adapter.base_model_name_or_path
    with reading(named):
        base = LMTPForCausalLM.from_pretrained(named, **where)
    with reading(source):
        return PeftModel.from_pretrained(base, source).eval(), base.config


def _write_record(source: Path, folder: Path, form: Form, config: Any) -> None:
    """Write the source's `provenance.json` with an entry on the publication, without local paths."""
    path = source / PROVENANCE
    record = read_json(path) if path.exists() else {}
    if form == "adapter":  # so that its card can describe the heads without the base model
        whole = json.loads(config.to_json_string(use_diff=False))
        record["lmtp_config"] = {**whole, "backbone_config": None, "auto_map": None}
    record = {
        **_without_paths(record),
        "base_model": config.base_model_name_or_path,
        "base_model_revision": config.base_model_revision,
        "publication": {
            "command": "lmtp publish",
            "form": form,
            "versions": versions(),
            "sha256": {path.name: file_sha256(path) for path in weight_files(folder)},
        },
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def weight_files(folder: Path) -> list[Path]:
    """Return the weights of a repository."""
    return sorted(folder.glob("*.safetensors"))


@torch.no_grad()
def check_repository(
    folder: Path,
    form: Form,
    model: Any,
    prompt_ids: list[int],
    base_folder: Path | None = None,
    advice: str = OTHER_BACKBONE,
) -> None:
    """Load a repository in a clean process without this package, and compare it with the model.

    Args:
        folder, form: the repository.
        model: the model that it must hold.
        prompt_ids: token ids to continue.
        base_folder: a local copy of the base model of heads or an adapter.
        advice: what to do if the logits differ.

    Raises:
        ValueError: the repository gives other logits or text than the model, or its text with leap
            heads differs from its text without.
        RuntimeError: it does not load.
    """
    base = str(base_folder) if base_folder is not None and form != "full" else None
    remote = generate_as_remote_code(folder, prompt_ids, CHECK_TOKENS, form=form, base=base)
    input_ids = torch.tensor([prompt_ids])
    outputs = model(input_ids=input_ids, output_leap_logits=True)
    leap = {f"leap_logits.{i}": logits for i, logits in enumerate(outputs.leap_logits)}
    for name, logits in {"logits": outputs.logits, **leap}.items():
        try:
            torch.testing.assert_close(remote["tensors"][name], logits)
        except AssertionError as error:
            raise ValueError(
                f"The assembled repository is not the model: its {name} differ. {advice}\n{error}"
            ) from error
    ids = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=CHECK_TOKENS,
        do_sample=False,
        use_lmtp=False,
    )
    if remote["ids"] != ids[0, len(prompt_ids) :].tolist():
        raise ValueError("The assembled repository is not the model: it generates another text.")
    if remote["lmtp_ids"] != remote["plain_ids"]:
        raise ValueError(
            "The assembled model generates another text with use_lmtp=True than without, in float32. Run "
            "`lmtp verify` on the checkpoint."
        )
