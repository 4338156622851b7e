"""Reading distilled answers: rows become examples; bad ones are refused, or left out and counted."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from modeling_lmtp.conversion.prompts import (
    Example,
    decode_answer,
    read_json_lines,
    render_prompt,
)

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
    ids = [row.get("prompt_ids"), row.get("response_ids")]
    if not all(isinstance(part, list) and all(type(i) is int for i in part) for part in ids):
        return None
    prompt_ids, answer_ids = ids
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
