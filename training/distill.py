"""Self-distillation: the backbone answers each prompt, and the heads are later trained on its answers.

A run appends its answers batch by batch to a JSONL file, next to a manifest that records model, settings
and prompts. The run can stop at any time and resume with any number of processes. The batches are the same
every time and each has its own seed, so the finished file does not depend on the stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_lmtp.conversion.batch_generation import Sampling, derived_seed, generate_ids
from modeling_lmtp.conversion.prompts import (
    Prompt,
    decode_answer,
    depends_on_time,
    end_ids,
    render_prompt,
)
from modeling_lmtp.conversion.saving import read_json, versions
from modeling_lmtp.support_lmtp import num_positions
from modeling_lmtp.transformers_lmtp import commit_of

from .distill_files import (
    AnswerFiles,
    Row,
    append_rows,
    manifest_path,
    read_rows,
)
from .distill_run import (
    AnswerTask,
    Batch,
    DistillReport,
    answer_all,
    plan_tasks,
    prompts_sha256,
    rendered_sha256,
    split_batches,
)
from .distill_settings import DistillSettings
from .fingerprints import model_fingerprint, tokenizer_sha256
from .processes import on_main

__all__ = [
    "DistillReport",
    "DistillSettings",
    "append_rows",
    "distill",
    "manifest_path",
    "model_fingerprint",
    "read_rows",
]


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    output: Path | str,
    settings: DistillSettings,
    *,
    sources: dict[str, Any] | None = None,
    progress: bool = True,
) -> DistillReport:
    """Answer every prompt with `model` and append the answers to `output` (JSONL).

    Rows have the fields `ROW_FIELDS`; a repeated prompt is answered once. Call it again with the same
    arguments to resume a stopped run. Only `settings` control the answers: the sampling options and
    penalties of the checkpoint's generation_config are ignored, its end-of-text ids are used. With
    several processes, each calls it and answers its share.

    Args:
        model, tokenizer: the model that answers, and its tokenizer.
        prompts: the prompts to answer.
        output: a .jsonl file, new or of the same run.
        settings: how to generate the answers.
        sources: where the prompts come from, for the manifest.
        progress: show a progress bar.

    Raises:
        ValueError: there are no prompts, a prompt leaves no room for an answer, `output` does not end in
            .jsonl, or `output` comes from another model, other settings or other prompts. Existing
            files stay unchanged.
    """
    now = on_main(lambda: rendering_time(Path(output), tokenizer))
    tasks, duplicates = plan_tasks(
        prompts, settings.num_answers, lambda text: render_prompt(tokenizer, text, now)
    )
    _check_lengths(tasks, num_positions(model.config))
    manifest = {
        "model": model.config.name_or_path or None,
        "model_revision": commit_of(model.config),
        "model_class": type(model).__name__,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        **model_identity(model, tokenizer),
        "settings": asdict(settings),
        "prompts_sha256": prompts_sha256(tasks),
        "rendered_sha256": rendered_sha256(tasks),
        **({} if now is None else {"rendered_at": now.isoformat()}),
        "prompt_sources": sources,
        "versions": [versions()],
    }
    files = AnswerFiles(output, manifest, [task.id for task in tasks], duplicates)

    def answer(batches: list[Batch]) -> Iterator[list[Row]]:
        return (_answer(model, tokenizer, batch, settings) for batch in batches)

    batches = split_batches(tasks, settings.batch_size)
    return answer_all(files, batches, answer, progress=progress)


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the manifest's entries that identify model and tokenizer.

    Leap heads are left out, because they do not change the answers.
    """
    return {
        "model_fingerprint": model_fingerprint(getattr(model, "backbone", model)),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def rendering_time(output: Path, tokenizer: PreTrainedTokenizerBase) -> datetime | None:
    """Return the time to render prompts with; None if the chat template does not depend on it.

    Some templates write the date. A run that resumes on another day keeps the date it started with.
    """
    if not depends_on_time(tokenizer):
        return None
    manifest = manifest_path(output)
    start = read_json(manifest).get("rendered_at") if manifest.is_file() else None
    return datetime.fromisoformat(start) if start else datetime.now().replace(microsecond=0)


def strip_end_token(ids: list[int], stop_ids: list[int]) -> list[int]:
    """Remove the end-of-text token of a finished answer."""
    return ids[:-1] if ids[-1] in stop_ids else ids


def _check_lengths(tasks: list[AnswerTask], limit: int | None) -> None:
    """Raise a ValueError if a prompt leaves no room for an answer."""
    longest = tasks[0]  # `plan_tasks` sorts them
    if limit is not None and len(longest.input_ids) >= limit:
        raise ValueError(
            f"prompts must have fewer tokens than the model has positions ({limit}), got "
            f"{len(longest.input_ids)} for {longest.prompt.text[:80]!r}…. Shorten that prompt, or leave "
            "it out."
        )


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    settings: DistillSettings,
) -> list[Row]:
    """Answer one batch and return its rows; the model's number of positions limits the answers."""
    seed = derived_seed(settings.seed, *(task.id for task in batch))
    stop_ids = end_ids(model, tokenizer)
    input_ids = [list(task.input_ids) for task in batch]
    max_new_tokens, limit = settings.max_new_tokens, num_positions(model.config)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - max(map(len, input_ids)))
    sampling = Sampling(max_new_tokens, settings.temperature, settings.top_p, seed)
    answers = generate_ids(model, tokenizer, input_ids, sampling, stop_ids=stop_ids)
    return [
        {
            "id": task.id,
            "kind": task.prompt.kind,
            "prompt": task.prompt.text,
            "response": decode_answer(tokenizer, strip_end_token(ids, stop_ids)),
            "finished": ids[-1] in stop_ids,
            "tokens": len(ids),
            "prompt_ids": list(task.input_ids),
            "response_ids": ids,
        }
        for task, ids in zip(batch, answers, strict=True)
    ]
