"""Measured figures for a model card: never without the conditions they were measured under."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .saving import read_json

FIGURES = ("tokens_per_step", "step_cost", "speed_up")
OF_EACH_ROW = ("prompts", "decoding", "dtype", "mode", "batch_size")
OF_ALL_ROWS = ("device", "threads", "max_new_tokens", "versions")
SHOWN_VERSIONS = ("torch", "transformers")


@dataclass(frozen=True)
class MeasuredTable:
    """Rows of one result file, and what was the same for all of them.

    Args:
        rows: each with `OF_EACH_ROW` and `FIGURES`, as text.
        conditions: `OF_ALL_ROWS`, as one sentence.
    """

    rows: list[dict[str, str]]
    conditions: str


def read_measured(path: Path, config: Any) -> MeasuredTable:
    """Read what `lmtp bench` wrote: `{"conditions": {…}, "rows": [{…}, …]}`.

    Args:
        path: the file; a row's own conditions come before those of the file.
        config: of the checkpoint that it must be about.

    Raises:
        ValueError: there are no rows, a condition or a figure is missing, the rows are a sweep's, or the
            figures are another model's; says which.
    """
    record = read_json(path)
    conditions, rows = record.get("conditions", {}), record.get("rows", [])
    own = [row for row in rows if row.get("decoding") != "plain"]  # what the others compare with
    if not own:
        raise ValueError(f"{path} has no rows of figures. Write it with `lmtp bench`.")
    _check_model(path, conditions, config)
    missing = [name for name in OF_ALL_ROWS if _lacks(conditions, name)]
    if missing:
        raise ValueError(
            f"{path}: figures without their conditions; missing: {', '.join(missing)}."
        )
    versions = [f"{name} {conditions['versions'].get(name, '?')}" for name in SHOWN_VERSIONS]
    threads = f"{conditions['threads']} thread{'s' if conditions['threads'] != 1 else ''}"
    return MeasuredTable(
        rows=[_row(path, number, {**conditions, **row}) for number, row in enumerate(own, 1)],
        conditions=f"{conditions['device']}, {threads}, at most {conditions['max_new_tokens']} new "
        f"tokens per prompt, {', '.join(versions)}",
    )


def _row(path: Path, number: int, row: dict[str, Any]) -> dict[str, str]:
    missing = [name for name in (*OF_EACH_ROW, *FIGURES) if _lacks(row, name)]
    if missing:
        raise ValueError(f"{path}, row {number}: missing: {', '.join(missing)}.")
    if row.get("at") is not None:  # no column tells such rows apart
        raise ValueError(
            f"{path}, row {number}: is at {row['at']} of a sweep ({row.get('sweep')}), which the card's "
            "table does not tell. Give it a file that `lmtp bench` wrote without --sweep."
        )
    figures = {name: f"{_number(path, number, name, row[name]):.2f}" for name in FIGURES}
    return {**{name: str(row[name]) for name in OF_EACH_ROW}, **figures}


def _number(path: Path, number: int, name: str, value: Any) -> float:
    if isinstance(value, dict):
        value = value.get("median")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}, row {number}: {name} must be a number, got {value!r}.")
    return float(value)


def _lacks(values: dict[str, Any], name: str) -> bool:
    return values.get(name) in (None, "", {}, [])


def _check_model(path: Path, conditions: dict[str, Any], config: Any) -> None:
    wanted: Sequence[tuple[str, Any]] = (
        ("leap_offsets", list(config.leap_offsets)),
        ("head_context", config.head_context),
    )
    measured, own = (
        Path(name).name if name else None  # a folder's name, or a repository's without its owner
        for name in (conditions.get("base_model"), config.base_model_name_or_path)
    )
    if measured and own and measured != own:
        raise ValueError(
            f"{path} is about another model: heads on {measured} instead of {own}. Measure this "
            "checkpoint with `lmtp bench`."
        )
    for name, value in wanted:
        if name in conditions and conditions[name] != value:
            raise ValueError(
                f"{path} is about another model: {name} {conditions[name]} instead of {value}. Measure "
                "this checkpoint with `lmtp bench`."
            )
