"""Answers as examples: read from a file, bad rows refused or skipped, and checked against the model."""

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
from .fingerprints import is_model_of
from .processes import processes

logger = logging.get_logger(__name__)

BadRows = Literal["refuse", "skip"]
NUM_SHOWN = 3  # skipped rows that a note tells one by one


class SkippedRows:
    """What to do with bad rows: called with what is wrong with one, it raises that or keeps it.

    Args:
        bad_rows: `"refuse"` or `"skip"`.

    Raises ValueError for anything else.
    """

    def __init__(self, bad_rows: str) -> None:
        if bad_rows not in get_args(BadRows):
            raise ValueError(
                f"bad_rows: expected one of {', '.join(get_args(BadRows))}, got {bad_rows!r}"
            )
        self.refuses = bad_rows == "refuse"
        self.skipped: list[str] = []

    def __call__(self, error: ValueError) -> None:
        """Raise the error, with what can be done, or keep it."""
        if self.refuses:
            raise ValueError(
                f"{error}. Mend the row, or leave such rows out with --bad_rows skip."
            ) from error
        self.skipped.append(str(error))

    def notes(self) -> list[str]:
        """Say what was skipped, if anything was."""
        if not self.skipped:
            return []
        num_more = len(self.skipped) - NUM_SHOWN
        more = f"; and {num_more} more" if num_more > 0 else ""
        return [
            f"{len(self.skipped)} bad rows skipped: {'; '.join(self.skipped[:NUM_SHOWN])}{more}."
        ]


@dataclass(frozen=True)
class Answers:
    """What a file of answers holds.

    Args:
        examples: the answers as token ids.
        skipped: what is wrong with each row that was skipped, file and line first.
        notes: what a user should be told, in sentences; may be empty.
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
    """Read answers (`.jsonl`, `.jsonl.gz`) and turn them into examples.

    A row is bad if it is no JSON object, its prompt is empty, its response is missing, or empty
    without `finished: true` (the model ended at once), or the tokenizer gives it a token that the
    model does not have.

    Args:
        path: rows with `prompt` and `response`; `finished: false` says that an answer was cut.
        tokenizer: the backbone's.
        end_id: the token that ends a finished answer, if any.
        max_length: longer examples are cut; one whose prompt fills it has nothing to learn and is
            left out.
        vocab_size: of the backbone, if it is to be checked.
        bad_rows: `"refuse"` all for a bad row, or `"skip"` it.

    Raises:
        ValueError: a bad row is refused (names file and line), or nothing is left.
    """
    on_bad_row = SkippedRows(bad_rows)
    examples, num_full = [], 0
    for number, row in read_json_lines(path, on_bad_row):
        try:
            prompt_ids, answer_ids = _token_ids(row, tokenizer, end_id, vocab_size)
        except ValueError as error:
            on_bad_row(ValueError(f"{path}:{number}: {error}"))
            continue
        if len(prompt_ids) < max_length:
            examples.append(Example((prompt_ids + answer_ids)[:max_length], len(prompt_ids)))
        else:
            num_full += 1
    notes = [*on_bad_row.notes(), *_notes(path, num_full, max_length)]
    if not examples:
        raise ValueError(
            " ".join(
                [
                    f"{path} holds no answer that fits in {max_length} tokens with its prompt.",
                    *notes,
                ]
            )
        )
    return Answers(examples, tuple(on_bad_row.skipped), tuple(notes))


def read_examples(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    end_id: int | None,
    max_length: int = 1024,
) -> list[Example]:
    """Return the examples of `read_answers`, bad rows refused."""
    return read_answers(path, tokenizer, end_id, max_length).examples


def _token_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int | None,
    vocab_size: int | None,
) -> tuple[list[int], list[int]]:
    """Return prompt and answer as token ids, neither empty."""
    _check(row, "prompt", str, "text", lambda value: bool(value.strip()))
    _check(row, "response", str, "text")
    _check({"finished": True, **row}, "finished", bool, "true or false")
    recorded = _recorded_ids(row, tokenizer)
    prompt_ids, answer_ids = recorded or (
        render_prompt(tokenizer, row["prompt"]),
        tokenizer(row["response"], add_special_tokens=False)["input_ids"],
    )
    if not answer_ids and not row.get("finished"):
        raise ValueError("the response is empty, and no `finished: true` says that it is meant so")
    if row.get("finished", True) and end_id is not None and recorded is None:
        answer_ids = [*answer_ids, end_id]
    if not answer_ids:
        raise ValueError("the response is empty, and the model has no token that ends it")
    highest = max(*prompt_ids, *answer_ids)
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(
            f"its token {highest} is not in the model's vocabulary of {vocab_size}: is the tokenizer "
            "another model's?"
        )
    return prompt_ids, answer_ids


def _recorded_ids(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]] | None:
    """Return the ids that the backbone read and wrote, if the row has them and they are its text's.

    They are better than the text: its tokenization may differ from what was sampled, and its prompt from
    what was rendered then. They are not its text's where somebody edited the row, or where another
    tokenizer wrote them.
    """
    prompt_ids, answer_ids = row.get("prompt_ids"), row.get("response_ids")
    if not isinstance(prompt_ids, list) or not isinstance(answer_ids, list):
        return None
    if not all(type(token) is int for token in (*prompt_ids, *answer_ids)):
        return None
    highest = max([*prompt_ids, *answer_ids], default=0)
    if not prompt_ids or highest >= len(tokenizer) or min([*prompt_ids, *answer_ids]) < 0:
        return None
    without_end = answer_ids[:-1] if row.get("finished", True) else answer_ids
    same = decode_answer(tokenizer, without_end) == row["response"]
    return (list(prompt_ids), list(answer_ids)) if same else None


def _check(
    row: dict[str, Any],
    name: str,
    kind: type,
    kind_name: str,
    holds: Callable[[Any], bool] = lambda value: True,
) -> None:
    value = row.get(name)
    if not isinstance(value, kind) or not holds(value):
        raise ValueError(
            f"expected {kind_name} in the field {name!r}, got {value!r}; fields found: {sorted(row)}"
        )
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is no text, and tokenizers do not say so


def _notes(path: Path | str, num_full: int, max_length: int) -> list[str]:
    if not num_full:
        return []
    return [
        f"{num_full} answers of {path} are left out: their prompts alone fill {max_length} tokens."
    ]


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
