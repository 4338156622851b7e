"""Self-written prompts: the model continues the header of a user turn (Magpie, arXiv 2406.08464)."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_lmtp.conversion.batch_generation import Sampling, derived_seed
from modeling_lmtp.conversion.prompts import (
    SENTINEL,
    Prompt,
    encode,
    read_json_lines,
    render_prompt,
    render_turns,
)

from .distill_files import append_rows, check_same_origin, truncate_partial_line
from .distill_settings import DistillSettings
from .processes import on_main, process_state
from .prompt_kinds import SELF_WRITTEN, PromptKind
from .writers import Beginnings, TurnEnd, Writer

# Empty, truncated and repeated user turns are dropped. A model that needs more samples than this keeps
# repeating itself.
MAX_SAMPLES_PER_PROMPT = 10
# A passage may have this many times the tokens of a prompt, and needs this many characters, so that there
# is something to ask about it
PASSAGE_LENGTH, MIN_PASSAGE = 2, 120

# The settings that affect the prompts; those of the answers may change
SETTINGS = ("seed", "batch_size", "magpie_temperature", "magpie_top_p", "magpie_max_tokens")


def self_written_prompts(
    writer: Writer,
    count: int,
    settings: DistillSettings,
    *,
    kinds: Sequence[PromptKind] = (SELF_WRITTEN,),
    log: SampleLog | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Let an instruct model write `count` distinct user turns (Magpie, arXiv 2406.08464).

    The model continues the header of a user turn of its chat template until it closes the turn. Empty,
    truncated and repeated turns are dropped and replaced, up to `MAX_SAMPLES_PER_PROMPT` samples per
    prompt; if these do not suffice, it warns and returns fewer prompts. The same writer, settings, kinds
    and count give the same prompts, on any number of processes.

    Args:
        writer: continues texts with the model.
        count: number of prompts.
        settings: how to sample (`magpie_…`, `batch_size`, `seed`).
        kinds: the kinds of prompts, over which `count` is spread evenly.
        log: keeps the samples, so that a stopped run can resume.
        progress: show a progress bar.

    Raises:
        ValueError: `count` is below 1, the tokenizer has no chat template, or one that does not show
            where a user turn begins and ends or takes no system message, or `log` belongs to another run.
        RuntimeError: no sample is a usable prompt.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    sources = [_KindSource(writer, kind, settings) for kind in kinds]
    prompts: dict[str, str] = {}  # kinds by texts, in order
    bar = tqdm(
        total=count, unit="prompt", disable=not (progress and process_state().is_main_process)
    )
    ends = [count * (number + 1) // len(kinds) for number in range(len(kinds))]
    shares = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    with bar:
        for source, share in zip(sources, shares, strict=True):
            full = len(prompts) + share
            for texts in source.batches(share, log) if share else ():
                for text in texts:
                    if text and len(prompts) < full:
                        prompts.setdefault(text, source.kind.name)
                bar.update(len(prompts) - bar.n)
                if len(prompts) == full:
                    break
    if not prompts:
        raise RuntimeError(
            f"The model wrote 0 of {count} prompts in {count * MAX_SAMPLES_PER_PROMPT} samples: it closed "
            f"no user turn within magpie_max_tokens={settings.magpie_max_tokens}. Raise it, or read the "
            "prompts from a file."
        )
    written = Counter(prompts.values())
    for kind, share in zip(kinds, shares, strict=True):
        if written[kind.name] < share:
            warnings.warn(
                f"The model wrote only {written[kind.name]} of {share} prompts of the kind "
                f"{kind.name!r} in {share * MAX_SAMPLES_PER_PROMPT} samples; the run continues with these.",
                stacklevel=2,
            )
    return [Prompt(text, kind) for text, kind in prompts.items()]


class _UserTurn:
    """The token ids that open a user turn in a chat template, and what closes it.

    Args:
        tokenizer: the model's.
        kind: the kind of prompts, for errors.
        system: the system message before the turn; None leaves it to the template.

    Raises:
        ValueError: there is no chat template, or it does not show the turn, or takes no system message.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kind: PromptKind, system: str | None
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "tokenizer must have a chat template to write prompts, got one without. Read the prompts "
                "from a file instead."
            )
        self.system = system
        rendered = _render(tokenizer, kind, system, add_generation_prompt=False)
        if rendered.endswith(
            SENTINEL
        ):  # in some templates only the answer's header closes the turn
            rendered = _render(tokenizer, kind, system, add_generation_prompt=True)
        header, _, tail = rendered.partition(SENTINEL)
        # Tokenizers attach a space to the word after it, so the model must write a trailing space itself
        self.header_ids = encode(tokenizer, header.rstrip(" "))
        if not self.header_ids or not tail or SENTINEL in tail:
            raise ValueError(
                "The tokenizer's chat template does not show where a user turn begins and ends: it renders "
                f"{rendered!r}. Read the prompts from a file instead."
            )
        end = tail.strip() or tail
        first = encode(tokenizer, end)[0]
        self.end = TurnEnd(end, None)
        if first in _special_ids(tokenizer):
            self.end = TurnEnd(str(tokenizer.convert_ids_to_tokens(first)), first)


def _render(
    tokenizer: PreTrainedTokenizerBase, kind: PromptKind, system: str | None, **options: Any
) -> str:
    """Render a user turn after a system message, which the template must show."""
    try:
        rendered = render_turns(tokenizer, SENTINEL, system=system, **options)
        shows_both = system is None or (system in rendered and SENTINEL in rendered)
    except ValueError:
        if system is None:
            raise
        shows_both = False
    if not shows_both:
        raise ValueError(
            "The tokenizer's chat template takes no system message, under which prompts of the kind "
            f"{kind.name!r} are written. Leave that kind out of --kinds; chat needs none."
        )
    return rendered


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


class _KindSource:
    """Samples prompts of one kind in numbered batches, each of which depends on its number alone."""

    def __init__(self, writer: Writer, kind: PromptKind, settings: DistillSettings) -> None:
        self.writer = writer
        self.kind = kind
        self.settings = settings
        self.turns = [_UserTurn(writer.tokenizer, kind, system) for system in kind.systems]
        special = sorted(_special_ids(writer.tokenizer))
        self.special_tokens = writer.tokenizer.convert_ids_to_tokens(special)

    def batches(self, share: int, log: SampleLog | None) -> Iterator[list[str]]:
        """Yield batches of prompts in order, first those of the log, as many as `share` prompts may take.

        An unusable sample is an empty prompt.
        """
        state = process_state()
        limit = math.ceil(share * MAX_SAMPLES_PER_PROMPT / self.settings.batch_size)
        logged = on_main(lambda: log.read(self.kind.name))[:limit] if log else []
        yield from logged
        rounds = math.ceil((limit - len(logged)) / state.num_processes)
        start, end = len(logged), len(logged) + rounds * state.num_processes
        # Each process samples one batch per round, and all processes receive all batches
        numbers = range(start + state.process_index, end, state.num_processes)
        sample = self._tasks if self.kind.tasks else self._user_turns
        for first, texts in zip(
            range(start, end, state.num_processes), sample(numbers), strict=True
        ):
            batches = gather_object([texts])[: limit - first]
            if log and state.is_main_process:
                log.append(batches, self.kind.name)
            yield from batches

    def _user_turns(self, numbers: range) -> Iterator[list[str]]:
        """Yield the user turns of these batches; one without an end, or with special tokens, is empty."""
        limit = self.settings.magpie_max_tokens
        headers = [self._turn(row).header_ids for row in range(self.settings.batch_size)]
        batches = (
            Beginnings(headers, self._sampling(limit, self.kind.name, number), self.turns[0].end)
            for number in numbers
        )
        for texts in self.writer.write(batches):
            yield [self._usable(text) for text in texts]

    def _tasks(self, numbers: range) -> Iterator[list[str]]:
        """Yield the prompts of these batches for a kind by task; one without a passage is empty."""
        limit = PASSAGE_LENGTH * self.settings.magpie_max_tokens
        batches = (
            Beginnings(
                [self._passage_prompt(row, text) for row, text in enumerate(texts) if text],
                self._sampling(limit, self.kind.name, number, "passage"),
                None,
            )
            for number, texts in zip(numbers, self._user_turns(numbers), strict=True)
        )
        for number, texts in zip(numbers, self.writer.write(batches), strict=True):
            yield [self._task(self._usable(text), number, row) for row, text in enumerate(texts)]

    def _turn(self, row: int) -> _UserTurn:
        return self.turns[row % len(self.turns)]

    def _passage_prompt(self, row: int, text: str) -> list[int]:
        """Return the ids of a user turn that asks for a passage, under the message it was written under."""
        return render_prompt(self.writer.tokenizer, text, system=self._turn(row).system)

    def _task(self, passage: str, number: int, row: int) -> str:
        if len(passage) < MIN_PASSAGE:
            return ""
        choice = derived_seed(self.settings.seed, self.kind.name, number, "task", row)
        return self.kind.tasks[choice % len(self.kind.tasks)].format(passage=passage)

    def _sampling(self, max_tokens: int, *parts: object) -> Sampling:
        return Sampling(
            max_tokens,
            self.settings.magpie_temperature,
            self.settings.magpie_top_p,
            derived_seed(self.settings.seed, *parts),
        )

    def _usable(self, text: str | None) -> str:
        is_usable = text and not any(token in text for token in self.special_tokens)
        return text.strip() if text and is_usable else ""


class SampleLog:
    """A log of sampled user turns, from which a stopped run resumes.

    The first line of the file identifies model and settings; each further line holds a batch, and its kind
    if kinds are named.

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

    def read(self, kind: str = SELF_WRITTEN.name) -> list[list[str]]:
        """Return the batches of one kind in order; a last line that a kill cut short is removed.

        Raises:
            ValueError: the file comes from another model or other settings.
        """
        if self.path.exists():
            truncate_partial_line(self.path)
            rows = [row for _, row in read_json_lines(self.path)]
            if rows:
                check_same_origin(self.path, self.header, rows[0], self.header)
                of_kind = (row for row in rows[1:] if row.get("kind", SELF_WRITTEN.name) == kind)
                return [row["texts"] for row in of_kind]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self.path, [self.header])
        return []

    def append(self, batches: list[list[str]], kind: str = SELF_WRITTEN.name) -> None:
        """Append the next batches of one kind, and flush them to disk."""
        label = {} if kind == SELF_WRITTEN.name else {"kind": kind}
        append_rows(self.path, [{**label, "texts": texts} for texts in batches])
