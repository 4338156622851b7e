"""Prompts that a model writes itself, after the header of a user turn (Magpie, arXiv 2406.08464)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_lmtp.conversion.batch_generation import Sampling, derived_seed, generate_ids
from modeling_lmtp.conversion.prompts import (
    SENTINEL,
    Prompt,
    encode,
    end_ids,
    read_json_lines,
    render_turns,
)

from .distill_files import append_rows, cut_partial_line, refuse_differences
from .distill_settings import DistillSettings
from .processes import on_main, processes

SELF_WRITTEN = "self-written"
# A sampled user turn is dropped when it is empty, cut off or known already. Far more samples than
# prompts asked for means that the model repeats itself.
MAX_SAMPLES_PER_PROMPT = 10

# Answers may follow other settings than the prompts: these alone shape the prompts.
SETTINGS = ("seed", "batch_size", "magpie_temperature", "magpie_top_p", "magpie_max_tokens")


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
    rendered = render_turns(tokenizer, SENTINEL, add_generation_prompt=False)
    if rendered.endswith(SENTINEL):  # some templates close the turn with the answer's header
        rendered = render_turns(tokenizer, SENTINEL, add_generation_prompt=True)
    header, _, tail = rendered.partition(SENTINEL)
    # A trailing space belongs to the first word of the turn, as tokenizers cut text.
    header_ids = encode(tokenizer, header.rstrip(" "))
    if not header_ids or not tail or SENTINEL in tail:
        raise ValueError(
            "tokenizer: its chat template does not show where a user turn begins and ends "
            f"(rendered: {rendered!r}); read the prompts from a file instead"
        )
    end = tail.strip() or tail
    first = encode(tokenizer, end)[0]
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


class SampleLog:
    """The samples of one model with one set of settings, which let a stopped run resume.

    The first line of the file says what made them, each further one holds a batch.

    Args:
        path: a .jsonl file; it need not exist.
        identity: what names the model and its tokenizer.
        settings: how prompts are sampled.
    """

    def __init__(self, path: Path, identity: dict[str, Any], settings: DistillSettings) -> None:
        self.path = path
        shaping = {name: getattr(settings, name) for name in SETTINGS}
        self.header = {**identity, "settings": shaping}

    def read(self) -> list[list[str]]:
        """Return the texts of batch 0, 1, …; a last line that was cut by a kill is removed.

        Raises:
            ValueError: the file was made by another model or with other settings.
        """
        if self.path.exists():
            cut_partial_line(self.path)
            rows = [row for _, row in read_json_lines(self.path)]
            if rows:
                refuse_differences(self.path, self.header, rows[0], self.header)
                return [row["texts"] for row in rows[1:]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self.path, [self.header])
        return []

    def append(self, batches: list[list[str]]) -> None:
        """Append the texts of the next batches; they are on the disk when this returns."""
        append_rows(self.path, [{"texts": texts} for texts in batches])
