"""The files of a repository to publish: assembled in a folder, and tried in a clean process."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .forms import Form, check_hub_id, form_of
from .loading import load_tokenizer
from .remote_check import generate_as_remote_code
from .saving import PROVENANCE, file_sha256, read_json, versions

CHECK_PROMPT = "Why is the sky blue?"
CHECK_TOKENS = 24
OTHER_BACKBONE = (
    "If its backbone was trained, publish it with --form full; else check --base-model and "
    "--base-revision."
)
COMMIT = re.compile("[0-9a-f]{40}")


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
        folder: exists and is empty.
        form: what to make of it.
        base_model, base_revision: where others get the base model; as the checkpoint says by default.
        base_folder: a copy of the base model, in place of the one that `source` names.
        max_shard_size: see `save_pretrained`.

    Returns:
        The model that was written, on the CPU in its own dtype, and its tokenizer.

    Raises:
        ValueError: `source` cannot take that form, the base model is not named or not pinned so that
            others could load it, or the tokenizer does not fit.
    """
    own = form_of(source)
    if (own is Form.ADAPTER) != (form is Form.ADAPTER):
        raise ValueError(
            f"{source} is of form {own.value!r} and cannot be published as {form.value!r}. An adapter is "
            "published as it is, or made a full checkpoint with `lmtp merge`."
        )
    if form is Form.ADAPTER:
        tokenizer = load_tokenizer(source)
        model, config = _write_adapter(source, folder, base_model, base_revision, base_folder)
    else:
        given = {"backbone": base_folder} if base_folder and own is Form.HEADS else {}
        model = LMTPForCausalLM.from_pretrained(source, **given).eval()
        config = model.config
        tokenizer = _tokenizer(source, config, base_folder)
        config.base_model_name_or_path = base_model or config.base_model_name_or_path
        config.base_model_revision = base_revision or config.base_model_revision
        check_hub_id(config.base_model_name_or_path, "--base-model")
        config.backbone_config.name_or_path = config.base_model_name_or_path
        if form is Form.HEADS:
            check_pinned(config.base_model_revision)
        options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(folder, heads_only=form is Form.HEADS, **options)
    check_tokenizer(tokenizer, model)
    tokenizer.save_pretrained(folder)
    _write_record(source, folder, form, config)
    return model, tokenizer


def _tokenizer(source: Path, config: Any, base_folder: Path | None) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, or where it has none its backbone's."""
    if (source / TOKENIZER_CONFIG_FILE).exists():
        return load_tokenizer(source)
    if base_folder is not None:
        return load_tokenizer(base_folder)
    named, revision = config.base_model_name_or_path, config.base_model_revision
    return AutoTokenizer.from_pretrained(named, revision=revision or "main")


def check_pinned(revision: str | None) -> None:
    """Raise a ValueError unless a revision is a commit, which nobody can move."""
    if not COMMIT.fullmatch(revision or ""):
        raise ValueError(
            "The base model must be pinned to a commit, of 40 hexadecimal digits; got revision "
            f"{revision!r}. Give it with --base-revision."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Raise a ValueError if a tokenizer has tokens that a model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    vocab_size, _ = unembedding_size(model)
    if highest >= vocab_size:
        raise ValueError(
            f"The tokenizer does not match the model: its token ids go up to {highest}, the model's "
            f"vocabulary has {vocab_size}. Save the backbone's own tokenizer beside the checkpoint."
        )


def _write_adapter(
    source: Path,
    folder: Path,
    base_model: str | None,
    base_revision: str | None,
    base_folder: Path | None,
) -> tuple[Any, Any]:
    """Copy an adapter and name its base model; return the adapted model and the base's configuration."""
    adapter = PeftConfig.from_pretrained(str(source))
    named, pinned = adapter.base_model_name_or_path, adapter.revision
    adapter.base_model_name_or_path = check_hub_id(base_model or named, "--base-model")
    adapter.revision = base_revision or pinned
    check_pinned(adapter.revision)
    adapter.save_pretrained(folder)
    shutil.copy(source / "adapter_model.safetensors", folder)
    where = {"revision": adapter.revision} if base_folder is None else {}
    base = LMTPForCausalLM.from_pretrained(base_folder or adapter.base_model_name_or_path, **where)
    return PeftModel.from_pretrained(base, source).eval(), base.config


def _write_record(source: Path, folder: Path, form: Form, config: Any) -> None:
    """Write the source's `provenance.json` with what publishing adds, and no path of this machine."""
    path = source / PROVENANCE
    record = read_json(path) if path.exists() else {}
    if form is Form.ADAPTER:
        whole = json.loads(config.to_json_string(use_diff=False))
        record["lmtp_config"] = {**whole, "backbone_config": None, "auto_map": None}
    record = {
        **_without_paths(record),
        "base_model": config.base_model_name_or_path,
        "base_model_revision": config.base_model_revision,
        "publication": {
            "command": "lmtp publish",
            "form": form.value,
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
        folder, form: what to check.
        model: what the repository must hold.
        prompt_ids: what to continue.
        base_folder: of heads or an adapter, a copy of their base model.
        advice: what to do if the logits differ.

    Raises:
        ValueError: it gives other logits or other text than the model, or other text with leap heads
            than without.
        RuntimeError: it does not load.
    """
    base = str(base_folder) if base_folder is not None and form is not Form.FULL else None
    found = generate_as_remote_code(folder, prompt_ids, CHECK_TOKENS, form=form, base=base)
    input_ids = torch.tensor([prompt_ids])
    outputs = model(input_ids=input_ids, output_leap_logits=True)
    leap = {f"leap_logits.{i}": logits for i, logits in enumerate(outputs.leap_logits)}
    for name, logits in {"logits": outputs.logits, **leap}.items():
        try:
            torch.testing.assert_close(found["tensors"][name], logits)
        except AssertionError as error:
            raise ValueError(
                f"What was assembled is not the model: loaded anew, its {name} are others. {advice}\n"
                f"{error}"
            ) from error
    ids = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=CHECK_TOKENS,
        do_sample=False,
        use_lmtp=False,
    )
    if found["ids"] != ids[0, len(prompt_ids) :].tolist():
        raise ValueError(
            "What was assembled is not the model: loaded anew, it writes another text."
        )
    if found["lmtp_ids"] != found["plain_ids"]:
        raise ValueError(
            "With use_lmtp=True the assembled model writes another text in float32 than without. Run "
            "`lmtp verify` on the checkpoint."
        )
