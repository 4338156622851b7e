"""Prompts for self-distillation: read from a file, or written by the model itself.

`render_prompt` is the one place that turns a prompt into token ids; self-distillation and training
both use it, so that the heads see a prompt exactly as the backbone did when it answered.
"""

from __future__ import annotations

import gzip
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_lmtp.training.batch_generation import Sampling, derived_seed, generate_ids
from modeling_lmtp.training.processes import on_main, processes

if TYPE_CHECKING:
    from modeling_lmtp.training.distill import DistillSettings
    from modeling_lmtp.training.sample_log import SampleLog

SELF_WRITTEN = "self-written"
# A sampled user turn is dropped when it is empty, cut off or known already. Far more samples than
# prompts asked for means that the model repeats itself.
MAX_SAMPLES_PER_PROMPT = 10

_SENTINEL = "lmtpsentinel"


@dataclass(frozen=True)
class Prompt:
    """One user turn, and the label of the kind it belongs to (None where there is none)."""

    text: str
    kind: str | None = None


def refuse(error: ValueError) -> None:
    """Raise it: what is done with a bad row unless otherwise said."""
    raise error


def read_json_lines(
    path: Path | str, on_bad_line: Callable[[ValueError], None] = refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) for each line of a .jsonl or .jsonl.gz file.

    Args:
        path: the file. Its blank lines are skipped.
        on_bad_line: gets an error that names `file:line` for any other line that is no JSON object,
            and for compressed data that ends early or is damaged; it may raise it, as by default, or
            go on.

    Raises:
        ValueError: the file's name has another ending.
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
    """Say what is wrong with gzip data after line `number`."""
    if isinstance(error, EOFError):
        return "the gzip data ends early after here"
    hint = "" if number else "; if nothing is compressed, leave .gz out of its name"
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
        path: the file. A row's optional string "kind" is kept.
        field: the name of the field that holds the prompt's text.
        on_bad_row: gets an error that names `file:line`, and the fields found, where `field` is
            missing, empty or no text, or `kind` no string; it may raise it, as by default, or go on.

    Raises:
        ValueError: the file holds no prompt, or has another ending than these.
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
    text.encode()  # half of a surrogate pair is no text, and tokenizers do not say so
    return Prompt(text, kind)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids up to where the answer to `prompt` begins.

    With a chat template: one user turn and the header of the answer. The template writes its own
    special tokens, so none are added (no second BOS). Without one: the bare prompt, with the
    special tokens that the tokenizer itself adds.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    text = _render_turns(tokenizer, prompt, add_generation_prompt=True)
    return _encode(tokenizer, text)


def _render_turns(
    tokenizer: PreTrainedTokenizerBase, *turns: str, add_generation_prompt: bool
) -> str:
    """Render turns of user and assistant, by turns."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the model's own, else the tokenizer's; maybe none."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def answer_end_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id with which a finished answer ends, None if the model has none.

    Of several `end_ids` it is the one with which the chat template closes an answer, else the
    tokenizer's own, else the first.
    """
    ids = end_ids(model, tokenizer)
    likely = [*_closing_ids(tokenizer), tokenizer.eos_token_id, *ids]
    return next((token for token in likely if token in ids), None)


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the chat template writes behind an answer; nothing where it does not show."""
    if not tokenizer.chat_template:
        return []
    rendered = _render_turns(tokenizer, "?", _SENTINEL, add_generation_prompt=False)
    _, found, tail = rendered.rpartition(_SENTINEL)
    return _encode(tokenizer, tail) if found else []


def self_written_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    settings: DistillSettings,
    *,
    log: SampleLog | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Let the model write `count` different user turns (Magpie, arXiv 2406.08464).

    The model continues the bare header of a user turn of its chat template, until it closes the
    turn. Empty, cut-off and repeated turns are dropped and sampled anew, up to
    `MAX_SAMPLES_PER_PROMPT` samples for each prompt asked for; then a warning says how many were
    found. The same model, settings and count give the same prompts, on any number of processes.

    Args:
        model, tokenizer: what writes.
        count: how many prompts to write.
        settings: how to sample (`magpie_…`, `batch_size`, `seed`).
        log: keeps the samples, so that a stopped run goes on after them.
        progress: show a bar.

    Raises:
        ValueError: if `count` is below 1, or the tokenizer's chat template is missing or does not
            show where a user turn begins and ends, or `log` was made differently.
        RuntimeError: if no usable turn was sampled at all.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    turn = _user_turn(tokenizer)
    found: dict[str, None] = {}  # a dict keeps the order
    bar = tqdm(total=count, unit="prompt", disable=not (progress and processes().is_main_process))
    limit = math.ceil(count * MAX_SAMPLES_PER_PROMPT / settings.batch_size)
    with bar:
        for texts in _sampled_batches(model, tokenizer, turn, limit, settings, log):
            for text in texts:
                if text and len(found) < count:
                    found.setdefault(text)
            bar.update(len(found) - bar.n)
            if len(found) == count:
                break
    shortage = f"{len(found)} of {count} prompts in {count * MAX_SAMPLES_PER_PROMPT} samples"
    if not found:
        raise RuntimeError(
            f"{shortage}: the model closes no user turn within magpie_max_tokens="
            f"{settings.magpie_max_tokens}; raise it, or read the prompts from a file"
        )
    if len(found) < count:
        warnings.warn(f"the model wrote only {shortage}; going on with those", stacklevel=2)
    return [Prompt(text, SELF_WRITTEN) for text in found]


@dataclass(frozen=True)
class _UserTurn:
    """A user turn of a chat template: the ids before its text and what closes it."""

    header_ids: list[int]
    end: str
    end_id: int | None  # the id of `end` where that is one special token


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> _UserTurn:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: has no chat template, so a user turn has no header to continue; "
            "read the prompts from a file instead"
        )
    rendered = _render_turns(tokenizer, _SENTINEL, add_generation_prompt=False)
    if rendered.endswith(_SENTINEL):  # some templates close the turn with the answer's header
        rendered = _render_turns(tokenizer, _SENTINEL, add_generation_prompt=True)
    header, _, tail = rendered.partition(_SENTINEL)
    # A trailing space belongs to the first word of the turn, as tokenizers cut text.
    header_ids = _encode(tokenizer, header.rstrip(" "))
    if not header_ids or not tail or _SENTINEL in tail:
        raise ValueError(
            "tokenizer: its chat template does not show where a user turn begins and ends "
            f"(rendered: {rendered!r}); read the prompts from a file instead"
        )
    end = tail.strip() or tail
    first = _encode(tokenizer, end)[0]
    if first not in _special_ids(tokenizer):
        return _UserTurn(header_ids, end, None)
    return _UserTurn(header_ids, str(tokenizer.convert_ids_to_tokens(first)), first)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _sampled_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: _UserTurn,
    limit: int,
    settings: DistillSettings,
    log: SampleLog | None,
) -> Iterator[list[str]]:
    """Yield batch 0, 1, … of sampled turns, `limit` of them: the logged ones, then new ones."""
    state = processes()
    logged = on_main(log.read)[:limit] if log else []
    yield from logged
    for start in range(len(logged), limit, state.num_processes):
        # In each round every process samples one batch and gets those of the others.
        batch = start + state.process_index
        texts = _sample_user_turns(model, tokenizer, turn, batch, settings)
        batches = gather_object([texts])[: limit - start]
        if log and state.is_main_process:
            log.append(batches)
        yield from batches


def _sample_user_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: _UserTurn,
    batch: int,
    settings: DistillSettings,
) -> list[str]:
    """Sample one batch of user turns; what was not closed, or is not plain text, comes empty."""
    sampling = Sampling(
        settings.magpie_max_tokens,
        settings.magpie_temperature,
        settings.magpie_top_p,
        derived_seed(settings.seed, SELF_WRITTEN, batch),
    )
    own_end = [] if turn.end_id is None else [turn.end_id]
    rows = generate_ids(
        model,
        tokenizer,
        [turn.header_ids] * settings.batch_size,
        sampling,
        stop_ids=[*own_end, *end_ids(model, tokenizer)],
        stop_string=turn.end if turn.end_id is None else None,
    )
    special = tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer)))
    texts = []
    for row in rows:
        whole = str(tokenizer.decode(row, clean_up_tokenization_spaces=False))
        text, closed, _ = whole.partition(turn.end)
        plain = closed and not any(token in text for token in special)
        texts.append(text.strip() if plain else "")
    return texts
