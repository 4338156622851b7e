"""`lmtp bench`: measures decoding methods side by side on one machine, and writes the result."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from modeling_lmtp.conversion.batch_generation import pad_id
from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import (
    best_device,
    load_backbone,
    load_lmtp,
    load_tokenizer,
    names_of,
)
from modeling_lmtp.conversion.options import Dtype, Options, Range
from modeling_lmtp.conversion.prompts import read_prompts, render_prompt
from modeling_lmtp.conversion.saving import check_output_file, file_sha256
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import DEFAULT_NODES
from modeling_lmtp.tree_lmtp import MAX_NODES

from .bench_methods import Method, choose_methods, methods_to_compare
from .bench_pictures import draw_bench
from .bench_report import rows, tables
from .bench_runner import Mode, make_batches, measure
from .conditions import model_conditions
from .drafts_to_try import SAMPLING
from .pictures import check_pictures
from .quiet import Quietness, measure_quietness, quiet_record

NO_KIND = "prompts"  # the kind of prompts whose rows name none


@dataclass
class BenchOptions(Options):
    """What to measure, and where the result goes."""

    title: ClassVar[str] = "models and files"

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a checkpoint with leap heads."})
    prompts: list[Path] = field(
        kw_only=True,
        metadata={
            "help": "Prompts, .jsonl or .jsonl.gz, with their kinds; also Spec-Bench's and SPEED-Bench's."
        },
    )
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "Checkpoints with other heads on the same backbone."},
    )
    assistant: str | None = field(
        default=None, metadata={"help": "A small model, to measure assisted decoding with."}
    )
    output: Path | None = field(default=None, metadata={"help": "Write the result as JSON."})
    picture: Path | None = field(default=None, metadata={"help": "Draw the result as PNG."})


@dataclass
class BenchSettings(Options):
    """How to measure; the result file records these."""

    title: ClassVar[str] = "measurement"

    batch_sizes: list[Annotated[int, Range(ge=1)]] = field(
        default_factory=lambda: [1], metadata={"help": "Prompts decoded together."}
    )
    dtypes: list[Dtype] = field(
        default_factory=lambda: ["bfloat16"], metadata={"help": "Dtypes of the models."}
    )
    modes: list[Mode] = field(
        default_factory=lambda: ["greedy"], metadata={"help": "greedy, sampling, or both."}
    )
    max_new_tokens: Annotated[int, Range(ge=2)] = field(
        default=128, metadata={"help": "Maximum length of an answer, in tokens."}
    )
    rounds: Annotated[int, Range(ge=1)] = field(
        default=3, metadata={"help": "Decode each prompt N times with each method."}
    )
    per_kind: Annotated[int, Range(ge=1)] | None = field(
        default=None, metadata={"help": "Take the first N prompts of each kind; all by default."}
    )
    draft_nodes: Annotated[int, Range(ge=0, le=MAX_NODES - 1)] = field(
        default=DEFAULT_NODES, metadata={"help": "The most candidates of a planned draft."}
    )
    lookup_tokens: Annotated[int, Range(ge=1)] = field(
        default=10, metadata={"help": "Candidates of prompt lookup."}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Names of the methods to measure; all by default."}
    )
    stop_at_end: bool = field(
        default=True, metadata={"help": "Always generate --max_new_tokens, past any end token."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every call."})


def bench(options: BenchOptions, settings: BenchSettings) -> int:
    """Measure decoding methods side by side: plain decoding, leap heads, prompt lookup and others.

    The exit status is 1 if a text differs from plain decoding's where it must not.

    Examples:
      lmtp bench OUT --prompts prompts.jsonl --output result.json --picture result.png
      lmtp bench OUT --prompts prompts.jsonl --per_kind 8 --only chain planned
      lmtp bench OUT --prompts prompts.jsonl --batch_sizes 1 4 16 --dtypes float32 bfloat16
    """
    for path in (options.output, options.picture):
        if path is not None:
            check_output_file(path)
    if options.picture is not None:
        check_pictures()

    def keep(record: dict[str, Any]) -> None:
        if options.output is not None:
            options.output.write_text(json.dumps(record, indent=1) + "\n")

    record = run_bench(options, settings, keep)
    if options.picture is not None:
        draw_bench(record, options.picture)
    return int(any(row["errors"] for row in record["rows"]))


def run_bench(
    options: BenchOptions,
    settings: BenchSettings,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure a checkpoint and return the record.

    Args:
        options, settings: see their fields.
        keep: called with the record so far after each dtype and batch size.

    Raises:
        ValueError: another checkpoint has another backbone or is given twice, or a file or setting is
            invalid.
    """
    names = names_of(options.against)
    before = measure_quietness(best_device())
    for complaint in before.complaints():
        console.print(f"[yellow]This machine is not quiet: {complaint}.[/] Times will mislead.")
    prompts = read_token_ids(options, settings)
    record: dict[str, Any] = {"command": "lmtp bench", "conditions": {}, "rows": []}
    for dtype in settings.dtypes:
        methods = load_methods(options, settings, names, dtype)
        for size in settings.batch_sizes:
            record["rows"] += measure_methods(methods, prompts, size, dtype, settings)
            record["conditions"] = bench_conditions(
                options, settings, methods[0].model, prompts, before
            )
            keep(record)
    return record


def read_token_ids(options: BenchOptions, settings: BenchSettings) -> dict[str, list[list[int]]]:
    """Read the prompts as token ids, by kind.

    Raises:
        ValueError: see `read_prompts`.
    """
    tokenizer = load_tokenizer(options.checkpoint)
    texts: dict[str, list[str]] = {}
    for path in options.prompts:
        for prompt in read_prompts(path):
            texts.setdefault(prompt.kind or NO_KIND, []).append(prompt.text)
    return {
        kind: [render_prompt(tokenizer, text) for text in of_kind[: settings.per_kind]]
        for kind, of_kind in texts.items()
    }


def load_methods(
    options: BenchOptions, settings: BenchSettings, names: Sequence[str], dtype: str
) -> list[Method]:
    """Load the models in one dtype and return the methods to measure, plain decoding first.

    Raises:
        ValueError: another checkpoint has another backbone, or there is no method of that name.
    """
    model = load_lmtp(options.checkpoint, dtype)
    others = {
        name: load_other_heads(source, dtype, model)
        for name, source in zip(names, options.against, strict=True)
    }
    assistant = None if options.assistant is None else load_backbone(options.assistant, dtype)
    methods = methods_to_compare(
        model,
        others,
        assistant,
        draft_nodes=settings.draft_nodes,
        lookup_tokens=settings.lookup_tokens,
    )
    return choose_methods(methods, settings.only)


def load_other_heads(source: str, dtype: str, model: LMTPForCausalLM) -> LMTPForCausalLM:
    """Load another checkpoint, and let it share the backbone of `model`.

    Raises:
        ValueError: its backbone has other weights.
    """
    other = load_lmtp(source, dtype)
    ours, theirs = model.backbone.state_dict(), other.backbone.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[n], theirs[n]) for n in ours):
        raise ValueError(
            f"The backbone of {source!r} is not that of the first checkpoint: their weights differ. "
            "Benchmark it by itself."
        )
    other.backbone = model.backbone
    return other


def measure_methods(
    methods: Sequence[Method],
    prompts: Mapping[str, Sequence[list[int]]],
    batch_size: int,
    dtype: str,
    settings: BenchSettings,
    note: str = "",
) -> list[dict[str, Any]]:
    """Measure all modes at one batch size, print the tables, and return their rows.

    Args:
        methods: plain decoding first.
        prompts: token ids, by kind.
        batch_size, dtype: of the batches and the models.
        settings: the others are taken from here.
        note: added to the titles of the tables.
    """
    model = methods[0].model
    batches = make_batches(prompts, batch_size, pad_id(model), model.device)
    found = []
    for mode in settings.modes:
        measured = measure(
            methods,
            batches,
            mode,
            max_new_tokens=settings.max_new_tokens,
            rounds=settings.rounds,
            seed=settings.seed,
            stop_at_end=settings.stop_at_end,
        )
        added = rows(measured, dtype)
        for table in tables(added, f"{dtype}, {mode}, batch size {batch_size}{note}"):
            console.print(table)
        found += added
    return found


def bench_conditions(
    options: BenchOptions,
    settings: BenchSettings,
    model: LMTPForCausalLM,
    prompts: Mapping[str, Sequence[list[int]]],
    before: Quietness,
) -> dict[str, Any]:
    """Return the conditions of a measurement, with how quiet the machine was before and is now."""
    return {
        "checkpoint": Path(options.checkpoint).name,
        **model_conditions(model),
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "sampling": SAMPLING,
        **asdict(settings),
        "against": names_of(options.against),
        "assistant": None if options.assistant is None else Path(options.assistant).name,
        "prompts": [{"file": path.name, "sha256": file_sha256(path)} for path in options.prompts],
        "kinds": {kind: len(of_kind) for kind, of_kind in prompts.items()},
        **quiet_record(before, measure_quietness(model.device)),
    }
