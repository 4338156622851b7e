"""Read a file of answers as training examples, and check them against the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.conversion.prompts import (
    Example,
    answer_end_id,
    decode_answer,
    read_json_lines,
    render_prompt,
)
from modeling_lmtp.conversion.saving import PROVENANCE, file_sha256, read_json
from modeling_lmtp.support_lmtp import num_positions

from .distill_files import manifest_path
from .examples import split_examples
from .fingerprints import matches_fingerprint
from .processes import process_state

logger = logging.get_logger(__name__)

BadRows = Literal["refuse", "skip"]
MAX_LISTED = 3  # skipped rows that a note describes individually


class BadRowHandler:
    """A callback for bad rows: it raises the error of a row, or collects it.

    Args:
        bad_rows: `"refuse"` raises, `"skip"` collects.

    Raises:
        ValueError: `bad_rows` has another value.
    """

    def __init__(self, bad_rows: str) -> None:
        if bad_rows not in get_args(BadRows):
            raise ValueError(
                f"bad_rows must be one of {', '.join(get_args(BadRows))}, got {bad_rows!r}."
            )
        self.raises = bad_rows == "refuse"
        self.skipped: list[str] = []

    def __call__(self, error: ValueError) -> None:
        """Raise the error and add what to do, or collect it."""
        if self.raises:
            raise ValueError(
                f"{error}. Fix the row, or skip such rows with --bad_rows skip."
            ) from error
        self.skipped.append(str(error))

    def notes(self) -> list[str]:
        """Return one sentence about the skipped rows, or an empty list if no row was skipped."""
        if not self.skipped:
            return []
        num_more = len(self.skipped) - MAX_LISTED
        more = f"; and {num_more} more" if num_more > 0 else ""
        return [
            f"Skipped {len(self.skipped)} bad rows: {'; '.join(self.skipped[:MAX_LISTED])}{more}."
        ]


@dataclass(frozen=True)
class Answers:
    """The contents of a file of answers.

    Args:
        examples: the answers as token ids.
        skipped: the error of each skipped row, starting with file and line.
        notes: warnings for the user, one sentence each; may be empty.
    """

    examples: list[Example]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def read_answers(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    end_id: int | None,
    max_length: int = 1024,
    *,
    vocab_size: int | None = None,
    bad_rows: str = "refuse",
) -> Answers:
    """Read answers (`.jsonl`, `.jsonl.gz`) as examples.

    A row is bad if it is not a JSON object, if its prompt is empty or its response missing, if its
    response is empty without `finished: true` (the model ended at once), or if the tokenizer produces a
    token outside the model's vocabulary.

    Args:
        path: rows with `prompt` and `response`; `finished: false` marks a truncated answer.
        tokenizer: the backbone's tokenizer.
        end_id: the token that ends a finished answer, if any.
        max_length: longer examples are truncated; those whose prompt alone is that long are dropped.
        vocab_size: the backbone's vocabulary size; None skips that check.
        bad_rows: `"refuse"` raises at the first bad row, `"skip"` drops bad rows.

    Raises:
        ValueError: a bad row was refused (the message gives file and line), or no example is left.
    """
    on_bad_row = BadRowHandler(bad_rows)
    examples, num_dropped = [], 0
    for number, row in read_json_lines(path, on_bad_row):
        try:
            prompt_ids, answer_ids = _token_ids(row, tokenizer, end_id, vocab_size)
        except ValueError as error:
            on_bad_row(ValueError(f"{path}:{number}: {error}"))
            continue
        if len(prompt_ids) < max_length:
            examples.append(Example((prompt_ids + answer_ids)[:max_length], len(prompt_ids)))
        else:
            num_dropped += 1
    notes = on_bad_row.notes()
    if num_dropped:
        notes.append(
            f"Dropped {num_dropped} answers of {path}, whose prompts alone fill {max_length} tokens."
        )
    if not examples:
        message = f"{path} holds no answer that fits in {max_length} tokens with its prompt."
        raise ValueError(" ".join([message, *notes]))
    return Answers(examples, tuple(on_bad_row.skipped), tuple(notes))


def read_examples(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    end_id: int | None,
    max_length: int = 1024,
) -> list[Example]:
    """Return the examples of `read_answers`; a bad row raises."""
    return read_answers(path, tokenizer, end_id, max_length).examples


def _token_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int | None,
    vocab_size: int | None,
) -> tuple[list[int], list[int]]:
    """Return the token ids of prompt and answer; neither is empty."""
    _check_field(row, "prompt", str, "non-empty text", lambda value: bool(value.strip()))
    _check_field(row, "response", str, "text")
    _check_field({"finished": True, **row}, "finished", bool, "true or false")
    recorded = _recorded_ids(row, tokenizer)
    prompt_ids, answer_ids = recorded or (
        render_prompt(tokenizer, row["prompt"]),
        tokenizer(row["response"], add_special_tokens=False)["input_ids"],
    )
    if not answer_ids and not row.get("finished"):
        raise ValueError("response must not be empty unless the row has `finished: true`")
    if row.get("finished", True) and end_id is not None and recorded is None:
        answer_ids = [*answer_ids, end_id]
    if not answer_ids:
        raise ValueError("response must not be empty, because the model has no end-of-text token")
    highest = max(*prompt_ids, *answer_ids)
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"token ids must be less than the model's vocabulary size {vocab_size}, got {highest}; the "
            "tokenizer may belong to another model"
        )
    return prompt_ids, answer_ids


def _recorded_ids(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]] | None:
    """Return the recorded ids of prompt and answer; None if they are missing or do not match the text.

    Recorded ids are exact: tokenizing the text again may give other tokens than the backbone sampled, and
    rendering the prompt again may give another date. They do not match the text if somebody edited the
    row, or if they come from another tokenizer.
    """
    prompt_ids, answer_ids = row.get("prompt_ids"), row.get("response_ids")
    if not isinstance(prompt_ids, list) or not isinstance(answer_ids, list):
        return None
    if not all(type(token) is int for token in (*prompt_ids, *answer_ids)):
        return None
    highest = max([*prompt_ids, *answer_ids], default=0)
    if not prompt_ids or highest >= len(tokenizer) or min([*prompt_ids, *answer_ids]) < 0:
        return None
    text_ids = answer_ids[:-1] if row.get("finished", True) else answer_ids
    matches = decode_answer(tokenizer, text_ids) == row["response"]
    return (list(prompt_ids), list(answer_ids)) if matches else None


def _check_field(
    row: dict[str, Any],
    name: str,
    type_: type,
    description: str,
    is_valid: Callable[[Any], bool] = lambda value: True,
) -> None:
    """Raise a ValueError if a field of a row is missing, or has another type or an invalid value."""
    value = row.get(name)
    if not isinstance(value, type_) or not is_valid(value):
        raise ValueError(
            f"field {name!r} must be {description}, got {value!r}; the row has the fields {sorted(row)}"
        )
    if isinstance(value, str):
        value.encode()  # raises for a lone surrogate, with a clearer error than the tokenizer


def load_answers(
    path: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 1024,
    bad_rows: str = "refuse",
) -> Answers:
    """Read answers for a model, and add a note if another model wrote them.

    Args:
        path: a file that `lmtp distill` wrote, or one in the same format.
        model: a backbone, with or without heads.
        tokenizer: the model's tokenizer.
        max_length: longer examples are truncated; the model's number of positions is a limit too.
        bad_rows: see `read_answers`.

    Raises:
        ValueError: a bad row was refused, or no example is left.
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
    """Log notes as warnings, on the main process only."""
    if process_state().is_main_process:
        for note in notes:
            logger.warning(note)


def other_model_note(path: Path, model: Any) -> str | None:
    """Return a note if the manifest of a file of answers names another model; otherwise None.

    Nothing is known about answers without a manifest, or from a server; those get no note.
    """
    manifest_file = manifest_path(path)
    manifest = read_json(manifest_file) if manifest_file.is_file() else {}
    if "model_fingerprint" not in manifest:
        return None
    dtype = getattr(torch, manifest["model_dtype"])
    backbone = getattr(model, "backbone", model)
    if matches_fingerprint(backbone, manifest["model_fingerprint"], dtype) is not False:
        return None
    revision = manifest.get("model_revision")
    author = str(manifest.get("model")) + (f" (revision {revision})" if revision else "")
    return (
        f"Another model or revision, {author}, wrote the answers in {path}. They differ from what "
        f"{model.config.name_or_path or 'this model'} would write, so heads trained on them draft less "
        "well. Generate this model's answers with `lmtp distill`."
    )


def unseen_answers(
    source: str | Path, answers: Path, examples: Sequence[Example]
) -> list[Example] | None:
    """Return the answers that were held out when a checkpoint's heads were trained on a file.

    Args:
        source: the checkpoint; only a local folder has a training record.
        answers: the file.
        examples: all examples of that file.

    Returns:
        The held-out examples; None if the record is missing or names another file.
    """
    record_file = Path(source) / PROVENANCE
    record = read_json(record_file) if record_file.is_file() else {}
    if "examples" not in record or record.get("answers_sha256") != file_sha256(answers):
        return None
    num_held_out = len(examples) - record["examples"]
    return split_examples(examples, num_held_out)[1] if 0 < num_held_out < len(examples) else []
