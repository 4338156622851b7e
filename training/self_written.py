"""Self-written prompts: the model continues the header of a user turn (Magpie, arXiv 2406.08464)."""

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

from .distill_files import append_rows, check_same_origin, truncate_partial_line
from .distill_settings import DistillSettings
from .processes import on_main, process_state

SELF_WRITTEN = "self-written"
# Empty, truncated and repeated user turns are dropped. A model that needs more samples than this keeps
# repeating itself.
MAX_SAMPLES_PER_PROMPT = 10

# The settings that affect the prompts; those of the answers may change
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
    """Let the model write `count` distinct user turns (Magpie, arXiv 2406.08464).

    The model continues the header of a user turn of its chat template until it closes the turn. Empty,
    truncated and repeated turns are dropped and replaced, up to `MAX_SAMPLES_PER_PROMPT · count` samples;
    if these do not suffice, it warns and returns fewer prompts. The same model, settings and count give
    the same prompts, on any number of processes.

    Args:
        model, tokenizer: an instruct model and its tokenizer.
        count: number of prompts.
        settings: how to sample (`magpie_…`, `batch_size`, `seed`).
        log: keeps the samples, so that a stopped run can resume.
        progress: show a progress bar.

    Raises:
        ValueError: `count` is below 1, the tokenizer has no chat template or one that does not show
            where a user turn begins and ends, or `log` belongs to another run.
        RuntimeError: no sample is a usable prompt.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    turn = _user_turn(tokenizer)
    prompts: dict[str, None] = {}  # an ordered set
    bar = tqdm(
        total=count, unit="prompt", disable=not (progress and process_state().is_main_process)
    )
    limit = math.ceil(count * MAX_SAMPLES_PER_PROMPT / settings.batch_size)
    with bar:
        for texts in _batches_of_user_turns(model, tokenizer, turn, limit, settings, log):
            for text in texts:
                if text and len(prompts) < count:
                    prompts.setdefault(text)
            bar.update(len(prompts) - bar.n)
            if len(prompts) == count:
                break
    result = f"{len(prompts)} of {count} prompts in {count * MAX_SAMPLES_PER_PROMPT} samples"
    if not prompts:
        raise RuntimeError(
            f"The model wrote {result}: it closed no user turn within magpie_max_tokens="
            f"{settings.magpie_max_tokens}. Raise it, or read the prompts from a file."
        )
    if len(prompts) < count:
        warnings.warn(f"The model wrote only {result}; the run continues with these.", stacklevel=2)
    return [Prompt(text, SELF_WRITTEN) for text in prompts]


@dataclass(frozen=True)
class _UserTurn:
    """The token ids that open a user turn in a chat template, and the text that closes it."""

    header_ids: list[int]
    end: str
    end_id: int | None  # the id of `end` if it is a single special token


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> _UserTurn:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer must have a chat template to write prompts, got one without. Read the prompts from "
            "a file instead."
        )
    rendered = render_turns(tokenizer, SENTINEL, add_generation_prompt=False)
    if rendered.endswith(SENTINEL):  # in some templates only the answer's header closes the turn
        rendered = render_turns(tokenizer, SENTINEL, add_generation_prompt=True)
    header, _, tail = rendered.partition(SENTINEL)
    # Tokenizers attach a space to the word after it, so the model must write a trailing space itself
    header_ids = encode(tokenizer, header.rstrip(" "))
    if not header_ids or not tail or SENTINEL in tail:
        raise ValueError(
            "The tokenizer's chat template does not show where a user turn begins and ends: it renders "
            f"{rendered!r}. Read the prompts from a file instead."
        )
    end = tail.strip() or tail
    first = encode(tokenizer, end)[0]
    if first not in _special_ids(tokenizer):
        return _UserTurn(header_ids, end, None)
    return _UserTurn(header_ids, str(tokenizer.convert_ids_to_tokens(first)), first)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _batches_of_user_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: _UserTurn,
    limit: int,
    settings: DistillSettings,
    log: SampleLog | None,
) -> Iterator[list[str]]:
    """Yield `limit` batches of user turns in order: first those of the log, then new ones."""
    state = process_state()
    logged = on_main(log.read)[:limit] if log else []
    yield from logged
    for start in range(len(logged), limit, state.num_processes):
        # Each process samples one batch per round, and all processes receive all batches
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
    """Sample one batch of user turns; a turn without an end, or with special tokens, becomes empty."""
    sampling = Sampling(
        settings.magpie_max_tokens,
        settings.magpie_temperature,
        settings.magpie_top_p,
        derived_seed(settings.seed, SELF_WRITTEN, batch),
    )
    turn_end_ids = [] if turn.end_id is None else [turn.end_id]
    rows = generate_ids(
        model,
        tokenizer,
        [turn.header_ids] * settings.batch_size,
        sampling,
        stop_ids=[*turn_end_ids, *end_ids(model, tokenizer)],
        stop_string=turn.end if turn.end_id is None else None,
    )
    special = tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer)))
    texts = []
    for row in rows:
        decoded = str(tokenizer.decode(row, clean_up_tokenization_spaces=False))
        text, end, _ = decoded.partition(turn.end)
        is_usable = end and not any(token in text for token in special)
        texts.append(text.strip() if is_usable else "")
    return texts


class SampleLog:
    """A log of sampled user turns, from which a stopped run resumes.

    The first line of the file identifies model and settings; each further line holds a batch.

    Args:
        path: a .jsonl file; it need not exist.
        identity: identifies model and tokenizer, see `model_identity`.
        settings: how prompts are sampled.
    """

    def __init__(self, path: Path, identity: dict[str, Any], settings: DistillSettings) -> None:
        self.path = path
        self.header = {
            **identity,
            "settings": {name: getattr(settings, name) for name in SETTINGS},
        }

    def read(self) -> list[list[str]]:
        """Return the batches of texts in order; a last line that a kill cut short is removed.

        Raises:
            ValueError: the file comes from another model or other settings.
        """
        if self.path.exists():
            truncate_partial_line(self.path)
            rows = [row for _, row in read_json_lines(self.path)]
            if rows:
                check_same_origin(self.path, self.header, rows[0], self.header)
                return [row["texts"] for row in rows[1:]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self.path, [self.header])
        return []

    def append(self, batches: list[list[str]]) -> None:
        """Append the texts of the next batches, and flush them to disk."""
        append_rows(self.path, [{"texts": texts} for texts in batches])
