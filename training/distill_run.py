"""The run behind self-distillation: plan the answers to generate, and generate them batch by batch.

The batches are the same every time and do not depend on each other. So the finished file does not depend
on which process answers which batch, or on how often the run was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from accelerate.utils import gather_object
from tqdm import tqdm

from modeling_lmtp.conversion.prompts import Prompt

from .distill_files import AnswerFiles, Row, row_id, writer_lock
from .fingerprints import json_sha256
from .processes import on_main, process_state


@dataclass(frozen=True)
class AnswerTask:
    """One answer to generate: its stable id, its prompt, and the prompt's token ids if a model answers."""

    id: str
    prompt: Prompt
    input_ids: tuple[int, ...] = ()


Batch = list[AnswerTask]
# Answers batches in any order, and yields the rows of each when it is done; a task without one is skipped
Answerer = Callable[[list[Batch]], Iterable[list[Row]]]


@dataclass(frozen=True)
class DistillReport:
    """The result of a run: counts over all rows of `output`, and over the rows that this run added."""

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
        """Return the speed of this run, summed over processes."""
        return self.new_tokens / max(self.seconds, 1e-9)

    def summary(self) -> str:
        """Return the report in one line."""
        speed = f", {self.tokens_per_second:.0f} tokens/s" if self.new_tokens else ""
        duration = timedelta(seconds=round(self.seconds))
        return (
            f"{self.rows} answers, {self.tokens} tokens, {self.finished_share:.0%} finished, in "
            f"{self.output} ({self.new_rows} of them new{speed}, in {duration})."
        )


def plan_tasks(
    prompts: list[Prompt], num_answers: int, encode: Callable[[str], list[int]] | None
) -> tuple[list[AnswerTask], int]:
    """Return the answers to generate, longest prompt first, and the number of duplicate prompts.

    Args:
        prompts: the prompts; a repeated one is answered once.
        num_answers: number of answers per prompt.
        encode: turns a prompt into token ids; without it, prompts are sorted by their characters.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none.")
    distinct = {prompt.text: prompt for prompt in reversed(prompts)}
    tasks = []
    for prompt in distinct.values():
        input_ids = tuple(encode(prompt.text)) if encode else ()
        tasks += [
            AnswerTask(row_id(prompt.text, answer), prompt, input_ids)
            for answer in range(num_answers)
        ]
    # Prompts of similar length share a batch, and the batch that needs the most memory comes first.
    # The id breaks ties, so that the batches do not depend on the order of the prompts.
    tasks.sort(key=lambda task: (-len(task.input_ids if encode else task.prompt.text), task.id))
    return tasks, len(prompts) - len(distinct)


def split_batches(tasks: list[AnswerTask], size: int) -> list[Batch]:
    """Split the answers to generate into batches of `size`; the last one may be smaller."""
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def prompts_sha256(tasks: list[AnswerTask]) -> str:
    """Return a hash of the prompts, independent of the order in which they were read."""
    return json_sha256([[task.id, task.prompt.kind] for task in tasks])


def rendered_sha256(tasks: list[AnswerTask]) -> str:
    """Return a hash of the rendered prompts, which also depend on the template's date and mode."""
    return json_sha256([[task.id, task.input_ids] for task in tasks])


def answer_all(
    files: AnswerFiles, batches: list[Batch], answer: Answerer, *, progress: bool = True
) -> DistillReport:
    """Generate the missing answers, each process its share, and report on all of them.

    Every process of a job calls it with the same arguments. A batch that a kill cut short is answered
    again as a whole, because what a row samples depends on the other rows of its batch; rows that exist
    are not written again.

    Raises:
        ValueError: the files belong to another run, or another run is writing to them. They stay
            unchanged.
        MainProcessError: on the other processes, the main process raised that error.
    """
    with ExitStack() as locks:
        return _answer_all(files, batches, answer, locks, progress)


def _answer_all(
    files: AnswerFiles, batches: list[Batch], answer: Answerer, locks: ExitStack, progress: bool
) -> DistillReport:
    state = process_state()
    file = files.path_for(state.process_index)
    # The main process folds and deletes part files, so the others lock theirs only afterwards
    on_main(lambda: locks.enter_context(writer_lock(file)))
    existing_ids, before = on_main(files.open)
    if not state.is_main_process:
        locks.enter_context(writer_lock(file))
    pending = [batch for batch in batches if not existing_ids.issuperset(task.id for task in batch)]
    share = pending[state.process_index :: state.num_processes]
    num_missing = sum(task.id not in existing_ids for batch in share for task in batch)
    start, counts = time.monotonic(), before
    with _progress_bar(before.rows, num_missing, progress) as bar:
        for batch_rows in answer(share):
            rows = [row for row in batch_rows if row["id"] not in existing_ids]
            files.append(rows, state.process_index)
            counts = counts.plus(rows)
            if state.is_main_process:
                files.write_manifest(counts)
            speed = (counts.tokens - before.tokens) / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            bar.update(len(rows))
    # Also a barrier: every process holds its lock until all parts are folded
    num_skipped = sum(gather_object([before.rows + num_missing - counts.rows]))
    after = on_main(lambda: files.close(num_skipped))
    return DistillReport(
        output=files.output,
        rows=after.rows,
        new_rows=after.rows - before.rows,
        tokens=after.tokens,
        new_tokens=after.tokens - before.tokens,
        finished_share=after.finished_share,
        duplicate_prompts=files.duplicates,
        seconds=time.monotonic() - start,
    )


def _progress_bar(num_existing: int, num_missing: int, progress: bool) -> tqdm[NoReturn]:
    """Return a progress bar over this process's share."""
    state = process_state()
    description = f"process 1 of {state.num_processes}" if state.num_processes > 1 else None
    return tqdm(
        total=num_existing + num_missing,
        initial=num_existing,
        unit="answer",
        desc=description,
        disable=not (progress and state.is_main_process),
    )
