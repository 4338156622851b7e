"""Reads prompts from files and renders them as token ids.

Self-distillation and training both call `render_prompt`, so that the heads see a prompt exactly as the
backbone did when it answered.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTINEL = "lmtpsentinel"


@dataclass(frozen=True)
class Example:
    """One prompt and its answer as token ids; the answer starts at `answer_start`."""

    input_ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Prompt:
    """One user turn, and the kind of prompt it is, if known."""

    text: str
    kind: str | None = None


def refuse(error: ValueError) -> None:
    """Raise the error: the default way to handle a bad row."""
    raise error


def read_json_lines(
    path: Path | str, on_bad_line: Callable[[ValueError], None] = refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) for each line of a .jsonl or .jsonl.gz file.

    Args:
        path: the file. Blank lines are skipped.
        on_bad_line: called with an error that names `file:line` for each other line that is not a JSON
            object, and for compressed data that ends early or is damaged. It may raise the error, as by
            default, or return to skip the line.

    Raises:
        ValueError: the file's name has another suffix.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: expected a file name that ends in .jsonl or .jsonl.gz")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        row = _json_object(line, f"{path}:{number}")
                    except ValueError as error:
                        on_bad_line(error)
                    else:
                        yield number, row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            on_bad_line(ValueError(f"{path}:{number}: {_damage(error, number)}"))


def _damage(error: Exception, number: int) -> str:
    """Return what is wrong with gzip data after line `number`."""
    if isinstance(error, EOFError):
        return "the gzip data ends early after here"
    hint = "" if number else "; if the file is not compressed, remove .gz from its name"
    return f"the gzip data is damaged ({error}) after here{hint}"


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "" if line.endswith(b"\n") else " (the line is cut off: was its writer stopped?)"
        raise ValueError(f"{where}: not JSON: {error}{hint}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read_prompts(
    path: Path | str, field: str = "prompt", on_bad_row: Callable[[ValueError], None] = refuse
) -> list[Prompt]:
    """Read one prompt per line from a .jsonl or .jsonl.gz file.

    Args:
        path: the file. A row may name its kind in the field "kind".
        field: the name of the field that holds the prompt's text.
        on_bad_row: called with an error that names `file:line` and the row's fields if `field` is not a
            non-empty string, or `kind` is not a string. It may raise the error, as by default, or return
            to skip the row.

    Raises:
        ValueError: the file holds no prompt, or its name has another suffix.
    """
    prompts = []
    for number, row in read_json_lines(path, on_bad_row):
        try:
            prompts.append(_prompt(row, field))
        except ValueError as error:
            on_bad_row(ValueError(f"{path}:{number}: {error}"))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def _prompt(row: dict[str, Any], field: str) -> Prompt:
    text, kind = row.get(field), row.get("kind")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"expected a non-empty string in field {field!r}, got {text!r}; fields found: {sorted(row)}"
        )
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"expected a string in field 'kind', got {kind!r}")
    text.encode()  # raises for half a surrogate pair, which tokenizers accept silently
    return Prompt(text, kind)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids up to where the answer to `prompt` begins.

    With a chat template: one user turn and the header of the answer. The template writes the special
    tokens, so the tokenizer adds none (no second BOS). Without a template: the bare prompt, with the
    special tokens that the tokenizer adds.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    text = render_turns(tokenizer, prompt, add_generation_prompt=True)
    return encode(tokenizer, text)


def render_turns(
    tokenizer: PreTrainedTokenizerBase, *turns: str, add_generation_prompt: bool
) -> str:
    """Render alternating turns of user and assistant."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of rendered text; the tokenizer adds no special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the model's, or else the tokenizer's; possibly none."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def answer_end_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that ends a finished answer, or None if the model has none.

    Of several `end_ids` it is the one with which the chat template closes an answer, or else the
    tokenizer's, or else the first.
    """
    ids = end_ids(model, tokenizer)
    likely = [*_closing_ids(tokenizer), tokenizer.eos_token_id, *ids]
    return next((token for token in likely if token in ids), None)


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the chat template writes after an answer; none if that cannot be told."""
    if not tokenizer.chat_template:
        return []
    rendered = render_turns(tokenizer, "?", SENTINEL, add_generation_prompt=False)
    _, separator, tail = rendered.rpartition(SENTINEL)
    return encode(tokenizer, tail) if separator else []
