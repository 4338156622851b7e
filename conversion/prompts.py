"""Reads prompts from files and renders them as token ids.

Self-distillation and training both call `render_prompt`, so that the heads see a prompt exactly as the
backbone did when it answered.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTINEL = "lmtpsentinel"
NOT_FETCHED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"  # as SPEED-Bench says it
CLOCK = "strftime_now"  # what Transformers gives to chat templates


@dataclass(frozen=True)
class Example:
    """One prompt and its answer as token ids; the answer starts at `answer_start`."""

    input_ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Prompt:
    """One user turn, the kind of prompt it is, and the row that it was read from, if known."""

    text: str
    kind: str | None = None
    source: str | None = field(default=None, compare=False)


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
    except (ValueError, RecursionError) as error:
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
        path: the file. A row may name its kind in the field "kind" or "category".
        field: the name of the field that holds the prompt's text. A row without it may hold the user turns
            of a conversation as "turns", as in Spec-Bench and SPEED-Bench: the first is the prompt.
        on_bad_row: called with an error that names `file:line` and the row's fields if the prompt is not a
            non-empty string, or the kind is not a string. It may raise the error, as by default, or return
            to skip the row.

    Raises:
        ValueError: the file holds no prompt, or its name has another suffix.
    """
    prompts = []
    for number, row in read_json_lines(path, on_bad_row):
        try:
            prompts.append(_prompt(row, field, f"{path}:{number}"))
        except ValueError as error:
            on_bad_row(ValueError(f"{path}:{number}: {error}"))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def _prompt(row: dict[str, Any], field: str, source: str) -> Prompt:
    text, kind_field = row.get(field), "kind" if "kind" in row else "category"
    if field not in row and isinstance(row.get("turns"), list):
        text = next(iter(row["turns"]), None)
    kind = row.get(kind_field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"expected a non-empty string in field {field!r}, got {text!r}; fields found: {sorted(row)}"
        )
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"expected a string in field {kind_field!r}, got {kind!r}")
    if text.startswith(NOT_FETCHED):
        raise ValueError(
            "SPEED-Bench holds this prompt as a reference to another data set. Fetch it with "
            "examples/specdec_bench/prepare_data.py of NVIDIA/Model-Optimizer, and write the result as "
            "JSON lines."
        )
    text.encode()  # raises for half a surrogate pair, which tokenizers accept silently
    return Prompt(text, kind, source)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    now: datetime | None = None,
    *,
    system: str | None = None,
) -> list[int]:
    """Return the token ids up to where the answer to `prompt` begins.

    With a chat template: one user turn and the header of the answer. The template writes the special
    tokens, so the tokenizer adds none (no second BOS). Without a template: the bare prompt, with the
    special tokens that the tokenizer adds.

    Args:
        tokenizer: the backbone's.
        prompt: the text of the user.
        now: the time for templates that write it; that of the call by default.
        system: the system message; by default what the template writes without one.

    Raises:
        ValueError: the chat template cannot render one user turn, or leaves out its text.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    text = render_turns(tokenizer, prompt, add_generation_prompt=True, now=now, system=system)
    return encode(tokenizer, text)


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    *turns: str,
    add_generation_prompt: bool,
    now: datetime | None = None,
    system: str | None = None,
) -> str:
    """Render turns of user and assistant alternately, after the system message if there is one.

    Raises:
        ValueError: the chat template cannot render them, or leaves out their text.
    """
    takes_parts = _takes_parts(tokenizer, str(tokenizer.chat_template))
    messages = [(("user", "assistant")[number % 2], turn) for number, turn in enumerate(turns)]
    if system is not None:
        messages.insert(0, ("system", system))
    return _render(tokenizer, messages, takes_parts, add_generation_prompt, now)


def depends_on_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date or the time."""
    return CLOCK in str(tokenizer.chat_template)


def _at(chat_template: str, now: datetime) -> dict[str, Any]:
    """Return arguments that make a chat template write another time than that of the call.

    A macro of the clock's name hides Transformers' function; variables of a template may be data only,
    so the macro looks up what the template will ask for.
    """
    formats = {match[2] for match in re.finditer(CLOCK + r"\(\s*(['\"])(.+?)\1", chat_template)}
    macro = "{% macro " + CLOCK + "(format) %}{{ lmtp_times[format] }}{% endmacro %}"
    times = {written: now.strftime(written) for written in formats}
    return {"chat_template": macro + chat_template, "lmtp_times": times}


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> bool:
    """Whether a chat template takes the content of a turn as a list of parts, as multimodal ones do.

    A template that loops over parts renders a string without an error, and without its text.
    """
    for takes_parts in (False, True):
        if SENTINEL in _render(tokenizer, [("user", SENTINEL)], takes_parts, True, None):
            return takes_parts
    raise ValueError(
        "The chat template renders a user turn without its text, whether its content is a string or a "
        "list of parts, so every prompt would be the same. Load a tokenizer with another chat template."
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[tuple[str, str]],
    takes_parts: bool,
    add_generation_prompt: bool,
    now: datetime | None,
) -> str:
    conversation = [
        {"role": role, "content": [{"type": "text", "text": text}] if takes_parts else text}
        for role, text in messages
    ]
    options: dict[str, Any] = {}
    if now is not None and depends_on_time(tokenizer):
        options = _at(str(tokenizer.chat_template), now)
    try:
        rendered = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except (jinja2.TemplateError, TypeError) as error:  # a TypeError: text where parts are expected
        if isinstance(error, TypeError) and not takes_parts:
            return ""
        roles = " and ".join(f"a {role} turn" for role, _ in messages)
        raise ValueError(f"The chat template cannot render {roles} alone: {error}.") from error
    return str(rendered)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of rendered text; the tokenizer adds no special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of an answer, its special tokens (of channels, thinking, tools) included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


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
