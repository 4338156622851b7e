"""The answers that a model learns from or is judged by, and what a user should know of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.conversion.prompts import Example, answer_end_id
from modeling_lmtp.conversion.saving import PROVENANCE, file_sha256, read_json
from modeling_lmtp.support_lmtp import num_positions

from .answers import Answers, read_answers
from .distill_files import manifest_path
from .examples import split_examples
from .fingerprints import is_model_of
from .processes import processes

logger = logging.get_logger(__name__)


def load_answers(
    path: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    bad_rows: str = "refuse",
) -> Answers:
    """Read answers for a model, and note if another one made them.

    Args:
        path: what `lmtp distill` made, or such a file.
        model: a backbone, with or without heads.
        tokenizer: its tokenizer.
        max_length: longer examples are cut, at the latest where the model's positions end.
        bad_rows: see `read_answers`.

    Raises:
        ValueError: a bad row is refused, or nothing is left.
    """
    backbone = getattr(model, "backbone", model)
    end_id = answer_end_id(model, tokenizer)
    vocab_size, _ = unembedding_size(backbone)
    max_length = min(max_length, num_positions(backbone.config) or max_length)
    answers = read_answers(
        path, tokenizer, end_id, max_length, vocab_size=vocab_size, bad_rows=bad_rows
    )
    note = other_model_note(path, model)
    return Answers(answers.examples, answers.skipped, (*answers.notes, *([note] if note else [])))


def warn(notes: Sequence[str]) -> None:
    """Tell what a user should know of the answers, on the main process."""
    if processes().is_main_process:
        for note in notes:
            logger.warning(note)


def other_model_note(path: Path, model: Any) -> str | None:
    """Say so if the manifest beside a file of answers names another model than this; None if not.

    Answers without a manifest, or from a server, may be anyone's.
    """
    manifest_file = manifest_path(path)
    manifest = read_json(manifest_file) if manifest_file.is_file() else {}
    if "model_fingerprint" not in manifest:
        return None
    dtype = getattr(torch, manifest["model_dtype"])
    if (
        is_model_of(getattr(model, "backbone", model), manifest["model_fingerprint"], dtype)
        is not False
    ):
        return None
    revision = manifest.get("model_revision")
    made_by = str(manifest.get("model")) + (f" (revision {revision})" if revision else "")
    return (
        f"The answers in {path} were made by another model or revision, {made_by}, so they are not what "
        f"this one, {model.config.name_or_path or 'built in memory'}, would write: its heads will draft "
        "less well. Make its own with `lmtp distill`."
    )


def unseen_answers(
    source: str | Path, answers: Path, examples: Sequence[Example]
) -> list[Example] | None:
    """Return the answers that were kept out when heads were trained on that file.

    None if they were trained on another file, or nothing is known.

    Args:
        source: a checkpoint, whose record is read if it is a folder.
        answers: the file.
        examples: all that it holds.
    """
    record_file = Path(source) / PROVENANCE
    record = read_json(record_file) if record_file.is_file() else {}
    if "examples" not in record or record.get("answers_sha256") != file_sha256(answers):
        return None
    kept_out = len(examples) - record["examples"]
    return split_examples(examples, kept_out)[1] if 0 < kept_out < len(examples) else []
