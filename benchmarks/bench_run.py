"""One run of `lmtp bench`: load, check the machine, measure, and put the record together."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from modeling_lmtp.conversion.loading import (
    best_device,
    load_backbone,
    load_lmtp,
    load_tokenizer,
    names_of,
)
from modeling_lmtp.conversion.prompts import read_prompts, render_prompt
from modeling_lmtp.conversion.saving import file_sha256, versions
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import attention_implementation

from .bench import make_batches, measure
from .bench_methods import Method, methods_to_compare
from .bench_record import rows, table
from .bench_settings import BenchSettings
from .bench_sweeps import Point, points
from .exactness import SAMPLING
from .quiet import measure_quietness, quiet_record

NO_KIND = "prompts"


def read_kinds(paths: Sequence[Path], per_kind: int | None) -> dict[str, list[str]]:
    """Read prompts by their kind, those without one as a kind of its own.

    Raises:
        ValueError: see `read_prompts`.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        for prompt in read_prompts(path):
            found.setdefault(prompt.kind or NO_KIND, []).append(prompt.text)
    return {kind: texts[:per_kind] for kind, texts in found.items()}


def run_bench(
    checkpoint: str,
    prompts: Sequence[Path],
    settings: BenchSettings,
    console: Console,
    *,
    against: Sequence[str] = (),
    assistant: str | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure a checkpoint and return the record.

    Args:
        checkpoint: with leap heads.
        prompts: JSONL files with `prompt` and `kind`.
        settings: what to measure.
        console: where warnings and tables go.
        against: other checkpoints on the same backbone.
        assistant: a small plain model that drafts.
        keep: is called with the record so far, whenever something has been measured.

    Raises:
        ValueError: another checkpoint has another backbone or is given twice, or a file or setting is
            wrong.
    """
    names = names_of(against)
    before = measure_quietness(best_device())
    for complaint in before.complaints():
        console.print(f"[yellow]This machine is not quiet: {complaint}.[/] Times will mislead.")
    tokenizer = load_tokenizer(checkpoint)
    texts = read_kinds(prompts, settings.per_kind)
    tokens = {kind: [render_prompt(tokenizer, t) for t in of] for kind, of in texts.items()}
    record: dict[str, Any] = {"command": "lmtp bench", "conditions": {}, "rows": []}
    for dtype in settings.dtypes:
        model = load_lmtp(checkpoint, dtype)
        others = {
            name: load_beside(source, dtype, model)
            for name, source in zip(names, against, strict=True)
        }
        helper = None if assistant is None else load_backbone(assistant, dtype)
        methods = choose_methods(
            methods_to_compare(
                model,
                others,
                helper,
                draft_nodes=settings.draft_nodes,
                lookup_tokens=settings.lookup_tokens,
            ),
            settings.only,
        )
        start = Point(None, methods, tokens, settings)
        for point in points(start, settings.sweep, settings.at):
            record["rows"] += _measure_point(point, dtype, console)
            record["conditions"] = {
                **conditions(checkpoint, model, settings),
                "against": names,
                "assistant": None if assistant is None else Path(assistant).name,
                "prompts": [{"file": path.name, "sha256": file_sha256(path)} for path in prompts],
                "kinds": {kind: len(rows) for kind, rows in tokens.items()},
                **quiet_record(before, measure_quietness(model.device)),
            }
            keep(record)
    return record


def _measure_point(point: Point, dtype: str, console: Console) -> list[dict[str, Any]]:
    """Measure every batch size and mode, show the figures, and return their rows."""
    settings, model = point.settings, point.methods[0].model
    found = []
    for size in settings.batch_sizes:
        batches = make_batches(point.prompts, size, pad_id(model), model.device)
        for mode in settings.modes:
            measured = measure(
                point.methods,
                batches,
                mode,
                max_new_tokens=settings.max_new_tokens,
                rounds=settings.rounds,
                seed=settings.seed,
                stop_at_end=settings.stop_at_end,
            )
            added = rows(measured, dtype, point.at)
            title = f"{dtype}, {mode}, batch size {size}"
            where = "" if point.at is None else f", {settings.sweep} {point.at}"
            console.print(table(added, title + where))
            found += added
    return found


def choose_methods(methods: Sequence[Method], only: Sequence[str] | None) -> list[Method]:
    """Keep plain decoding and the named ways.

    Raises:
        ValueError: there is no way of that name.
    """
    if only is None:
        return list(methods)
    names = [method.name for method in methods]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"There is no way of decoding called {unknown[0]!r}; there are {names}.")
    return [methods[0], *(method for method in methods[1:] if method.name in only)]


def load_beside(source: str, dtype: str, model: LMTPForCausalLM) -> LMTPForCausalLM:
    """Load other heads for the backbone of `model`, which both then share.

    Raises:
        ValueError: they belong to a backbone with other weights.
    """
    other = load_lmtp(source, dtype)
    own, theirs = model.backbone.state_dict(), other.backbone.state_dict()
    same = own.keys() == theirs.keys() and all(torch.equal(own[n], theirs[n]) for n in own)
    if not same:
        raise ValueError(
            f"{source!r} does not stand on the backbone of the first checkpoint: their weights "
            "differ. Benchmark it by itself."
        )
    other.backbone = model.backbone
    return other


def pad_id(model: LMTPForCausalLM) -> int:
    """Return a token to pad with, any one will do: it is masked."""
    pad = model.generation_config.pad_token_id
    return 0 if pad is None else pad


def conditions(checkpoint: str, model: LMTPForCausalLM, settings: Any) -> dict[str, Any]:
    """Return under which conditions a model is measured, JSON-serialisable."""
    return {
        "checkpoint": Path(checkpoint).name,
        "base_model": base_name(model),
        "leap_offsets": list(model.config.leap_offsets),
        "head_context": model.config.head_context,
        "device": device_name(model.device),
        "attention": attention_implementation(model.backbone.config),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "sampling": SAMPLING,
        **asdict(settings),
        "versions": versions(),
    }


def base_name(model: LMTPForCausalLM) -> str | None:
    """Return the backbone's Hub id, or the name of its folder: a path says nothing to others."""
    name = model.config.base_model_name_or_path
    return Path(name).name if name and Path(name).is_dir() else name


def device_name(device: torch.device) -> str:
    """Say what a device is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
