"""Measures decoding methods at several context lengths, output lengths or tree sizes, like `lmtp bench`.

    python benchmarks/scripts/sweep.py CHECKPOINT context OUTPUT.json --prompts benchmarks/held_out.jsonl \
        --per_kind 1 --rounds 1 --max_new_tokens 48 --only planned

`context` repeats the prompts to that many tokens, `output` generates that many past any end token, `nodes`
drafts at most that many candidates. The rows name the value as `at`; `speed.py` tabulates them.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from modeling_lmtp.benchmarks.bench import (
    BenchOptions,
    BenchSettings,
    bench_conditions,
    load_methods,
    measure_methods,
    read_token_ids,
)
from modeling_lmtp.benchmarks.bench_methods import Method
from modeling_lmtp.benchmarks.quiet import measure_quietness
from modeling_lmtp.conversion.command_line import parse
from modeling_lmtp.conversion.loading import best_device
from modeling_lmtp.conversion.options import Options, Range
from modeling_lmtp.settings_lmtp import STRICT
from modeling_lmtp.tree_lmtp import MAX_NODES

LONG_PROMPTS = 2  # per context length
VALUES = {
    "context": [128, 512, 2048, 8000],
    "output": [128, 512, 2048],
    "nodes": [1, 4, 8, 16, 32, MAX_NODES - 1],
}
Prompts = dict[str, list[list[int]]]


@dataclass
class SweepOptions(Options):
    """What to vary."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a checkpoint with leap heads."})
    sweep: Literal["context", "output", "nodes"] = field(metadata={"help": "What to vary."})
    output: Path = field(metadata={"help": "The result, as JSON."})
    prompts: list[Path] = field(kw_only=True, metadata={"help": "Prompts, .jsonl."})
    values: list[Annotated[int, Range(ge=1)]] | None = field(
        default=None, metadata={"help": "The values; those of the published results by default."}
    )


def long_prompts(prompts: Prompts, length: int) -> Prompts:
    """Return prompts of `length` tokens: all prompts one after the other, over and over."""
    tokens = list(chain.from_iterable(chain.from_iterable(prompts.values())))
    starts = [number * len(tokens) // LONG_PROMPTS for number in range(LONG_PROMPTS)]
    return {"long": [list(islice(cycle(tokens[s:] + tokens[:s]), length)) for s in starts]}


def point(
    sweep: str, at: int, methods: Sequence[Method], prompts: Prompts, settings: BenchSettings
) -> tuple[Sequence[Method], Prompts, BenchSettings]:
    """Return the methods, prompts and settings of one value."""
    if sweep == "context":
        return methods, long_prompts(prompts, at), replace(settings, stop_at_end=False)
    if sweep == "output":
        return methods, prompts, replace(settings, max_new_tokens=at, stop_at_end=False)
    options = {"use_lmtp": STRICT, "draft_nodes": at}
    planned = Method("planned", methods[0].model, options)
    return [methods[0], planned], prompts, replace(settings, draft_nodes=at)


def sweep(options: SweepOptions, settings: BenchSettings) -> None:
    """Measure each value in turn, and write the result so far after each."""
    before = measure_quietness(best_device())
    bench = BenchOptions(options.checkpoint, prompts=options.prompts)
    prompts = read_token_ids(bench, settings)
    rows: list[dict[str, Any]] = []
    for dtype in settings.dtypes:
        methods = load_methods(bench, settings, [], dtype)
        for at in options.values or VALUES[options.sweep]:
            chosen, texts, varied = point(options.sweep, at, methods, prompts, settings)
            for size in settings.batch_sizes:
                note = f", {options.sweep} {at}"
                added = measure_methods(chosen, texts, size, dtype, varied, note)
                rows += [{**row, "at": at} for row in added]
            conditions = bench_conditions(bench, settings, methods[0].model, prompts, before)
            record = {
                "command": "benchmarks/scripts/sweep.py",
                "conditions": {**conditions, "sweep": options.sweep, **asdict(settings)},
                "rows": rows,
            }
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sweep(*parse("sweep.py", sweep, sys.argv[1:]))
