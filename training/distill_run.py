"""The run behind self-distillation: what is to be answered, and going through it.

Batches are cut the same way every time and each is answered on its own, so it does not matter which
process answers which batch, or after how many stops: the finished file is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from modeling_lmtp.conversion.prompts import Prompt

from .distill_files import AnswerFiles, Row, claimed, row_id
from .fingerprints import json_sha256
from .processes import on_main, processes


@dataclass(frozen=True)
class Item:
    """One answer to make: its stable id, its prompt and the prompt's token ids, where known."""

    id: str
    prompt: Prompt
    input_ids: tuple[int, ...] = ()


Batch = list[Item]
# Answers batches in any order and yields rows as they are done.
Answerer = Callable[[list[Batch]], Iterable[list[Row]]]


@dataclass(frozen=True)
class DistillReport:
    """What a run left behind: counts over all rows of `output`, and over this run's own."""

    output: Path
    rows: int
    new_rows: int
    tokens: int
    new_tokens: int
    finished_share: float
    duplicate_prompts: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of this run, all processes together."""
        return self.new_tokens / max(self.seconds, 1e-9)

    def summary(self) -> str:
        """Return what a user wants to know at the end, in one line."""
        speed = f", {self.tokens_per_second:.0f} tokens/s" if self.new_tokens else ""
        took = timedelta(seconds=round(self.seconds))
        return (
            f"{self.rows} answers, {self.tokens} tokens, {self.finished_share:.0%} finished, in "
            f"{self.output} ({self.new_rows} of them new{speed}, in {took})."
        )


def plan_items(
    prompts: list[Prompt], num_answers: int, encode: Callable[[str], list[int]] | None
) -> tuple[list[Item], int]:
    """Return the answers to make, longest prompt first, and how many prompts were repeats.

    Args:
        prompts: what to answer; a prompt given twice is answered once.
        num_answers: to each prompt.
        encode: turns a prompt into token ids; without it, length is measured in characters.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    distinct = {prompt.text: prompt for prompt in reversed(prompts)}
    items = []
    for prompt in distinct.values():
        input_ids = tuple(encode(prompt.text)) if encode else ()
        items += [
            Item(row_id(prompt.text, answer), prompt, input_ids) for answer in range(num_answers)
        ]
    # Rows of like length share a batch, and the batch that needs most memory comes first. The id
    # settles ties, so that the batches do not depend on the order of the prompts.
    items.sort(key=lambda item: (-len(item.input_ids if encode else item.prompt.text), item.id))
    return items, len(prompts) - len(distinct)


def cut_batches(items: list[Item], size: int) -> list[Batch]:
    """Cut the answers to make into batches of `size`; the last one may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def prompts_sha256(items: list[Item]) -> str:
    """Return a hash of what is to be answered, whatever order the prompts came in."""
    return json_sha256([[item.id, item.prompt.kind] for item in items])


def rendered_sha256(items: list[Item]) -> str:
    """Return a hash of the rendered prompts: templates write dates, and have modes."""
    return json_sha256([[item.id, item.input_ids] for item in items])


def answer_all(
    files: AnswerFiles, batches: list[Batch], answer: Answerer, *, progress: bool = True
) -> DistillReport:
    """Answer what is not answered yet, this process its share, and return what there is then.

    Every process of a job calls it with the same arguments. A batch that was cut by a kill is
    answered again as a whole, because what a row samples depends on the rows beside it; rows that
    exist are not added again.

    Raises:
        ValueError: the files were made by another run, or another run is writing to them; they
            stay as they are.
        MainProcessFailed: so it is, on the other processes.
    """
    with ExitStack() as claims:
        return _answer_all(files, batches, answer, claims, progress)


def _answer_all(
    files: AnswerFiles, batches: list[Batch], answer: Answerer, claims: ExitStack, progress: bool
) -> DistillReport:
    state = processes()
    own_file = files.path_of(state.process_index)
    on_main(lambda: claims.enter_context(claimed(own_file)))
    known, before = on_main(files.open)
    if not state.is_main_process:
        claims.enter_context(claimed(own_file))
    pending = [batch for batch in batches if not known.issuperset(item.id for item in batch)]
    share = pending[state.process_index :: state.num_processes]
    missing = sum(item.id not in known for batch in share for item in batch)
    started, counts = time.monotonic(), before
    with _progress_bar(before.rows, missing, progress) as bar:
        for answered in answer(share):
            rows = [row for row in answered if row["id"] not in known]
            files.append(rows, state.process_index)
            counts = counts.plus(rows)
            if state.is_main_process:
                files.write_manifest(counts)
            speed = (counts.tokens - before.tokens) / max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            bar.update(len(rows))
    state.wait_for_everyone()  # and keep the claims until all is folded
    after = on_main(files.close)
    return DistillReport(
        output=files.output,
        rows=after.rows,
        new_rows=after.rows - before.rows,
        tokens=after.tokens,
        new_tokens=after.tokens - before.tokens,
        finished_share=after.finished_share,
        duplicate_prompts=files.duplicates,
        seconds=time.monotonic() - started,
    )


def _progress_bar(known: int, missing: int, progress: bool) -> tqdm[NoReturn]:
    """Return a bar over this process's share, which tells speed and time left."""
    state = processes()
    several = f"process 1 of {state.num_processes}" if state.num_processes > 1 else None
    return tqdm(
        total=known + missing,
        initial=known,
        unit="answer",
        desc=several,
        disable=not (progress and state.is_main_process),
    )
