"""Self-distillation: the backbone answers each prompt, and the heads later learn its answers.

The answers go to a JSONL file, batch by batch, beside a manifest that says what made them. A run
can be stopped at any moment and started again, also with another number of processes: batches are
cut the same way every time and each batch has its own seed, so the file ends up as if the run had
never been stopped.
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
    Batch,
    DistillReport,
    Item,
    answer_all,
    cut_batches,
    plan_items,
    prompts_sha256,
    rendered_sha256,
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

    Rows hold `ROW_FIELDS`; a prompt given twice is answered once. Call it again with the same
    arguments to go on after a stop. The answers follow `settings` alone: sampling options and
    penalties of the checkpoint's generation_config do not apply, its end-of-text ids do. Where
    several processes were launched, each calls it and answers its share.

    Args:
        model, tokenizer: what answers.
        prompts: what to answer.
        output: a .jsonl file, new or of the same run.
        settings: how to answer.
        sources: where the prompts come from; the manifest keeps it.
        progress: show a bar with the tokens per second and the time left.

    Raises:
        ValueError: if there are no prompts, or one leaves no room for an answer, or `output` is no
            .jsonl name, or it exists and was made by another model, other settings or other
            prompts; its files stay as they are.
    """
    now = on_main(lambda: rendering_time(Path(output), tokenizer))
    items, duplicates = plan_items(
        prompts, settings.num_answers, lambda text: render_prompt(tokenizer, text, now)
    )
    _check_lengths(items, num_positions(model.config))
    manifest = {
        "model": model.config.name_or_path or None,
        "model_revision": commit_of(model.config),
        "model_class": type(model).__name__,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        **run_identity(model, tokenizer),
        "settings": asdict(settings),
        "prompts_sha256": prompts_sha256(items),
        "rendered_sha256": rendered_sha256(items),
        **({} if now is None else {"rendered_at": now.isoformat()}),
        "prompt_sources": sources,
        "versions": [versions()],
    }
    files = AnswerFiles(output, manifest, [item.id for item in items], duplicates)

    def answer(batches: list[Batch]) -> Iterator[list[Row]]:
        return (_answer(model, tokenizer, batch, settings) for batch in batches)

    batches = cut_batches(items, settings.batch_size)
    return answer_all(files, batches, answer, progress=progress)


def run_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return what tells a run's model and tokenizer from others, as the manifest names it.

    Leap heads make no difference to the answers.
    """
    return {
        "model_fingerprint": model_fingerprint(getattr(model, "backbone", model)),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def rendering_time(output: Path, tokenizer: PreTrainedTokenizerBase) -> datetime | None:
    """Return the time at which prompts are rendered, None where the chat template writes none.

    Some templates write the date: a run that goes on another day renders prompts as it began.
    """
    if not depends_on_time(tokenizer):
        return None
    manifest = manifest_path(output)
    began = read_json(manifest).get("rendered_at") if manifest.is_file() else None
    return datetime.fromisoformat(began) if began else datetime.now().replace(microsecond=0)


def without_end(ids: list[int], stop_ids: list[int]) -> list[int]:
    """Return an answer without the token that ended it."""
    return ids[:-1] if ids[-1] in stop_ids else ids


def _check_lengths(items: list[Item], limit: int | None) -> None:
    """Raise a ValueError if a prompt leaves no room for an answer."""
    longest = items[0]  # they are sorted
    if limit is not None and len(longest.input_ids) >= limit:
        raise ValueError(
            f"prompts: {longest.prompt.text[:80]!r}… has {len(longest.input_ids)} tokens, and the model "
            f"has {limit} positions for prompt and answer: leave it out, or shorten it"
        )


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    settings: DistillSettings,
) -> list[Row]:
    """Answer one batch; return its rows. Answers end where the model's positions do."""
    seed = derived_seed(settings.seed, *(item.id for item in batch))
    stop_ids = end_ids(model, tokenizer)
    input_ids = [list(item.input_ids) for item in batch]
    max_new_tokens, limit = settings.max_new_tokens, num_positions(model.config)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - max(map(len, input_ids)))
    sampling = Sampling(max_new_tokens, settings.temperature, settings.top_p, seed)
    answers = generate_ids(model, tokenizer, input_ids, sampling, stop_ids=stop_ids)
    return [
        {
            "id": item.id,
            "kind": item.prompt.kind,
            "prompt": item.prompt.text,
            "response": decode_answer(tokenizer, without_end(ids, stop_ids)),
            "finished": ids[-1] in stop_ids,
            "tokens": len(ids),
            "prompt_ids": list(item.input_ids),
            "response_ids": ids,
        }
        for item, ids in zip(batch, answers, strict=True)
    ]
