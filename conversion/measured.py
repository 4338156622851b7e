"""Reads benchmark results for a model card, and refuses figures without their conditions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .saving import read_json

BENCH = "lmtp bench"
FIGURES = ("tokens_per_step", "step_cost", "speed_up")
OF_EACH_ROW = ("prompts", "decoding", "dtype", "mode", "batch_size")
OF_ALL_ROWS = ("device", "threads", "max_new_tokens", "versions")
SHOWN_VERSIONS = ("torch", "transformers")


@dataclass(frozen=True)
class MeasuredTable:
    """The rows of one result file, and the conditions that all of them share.

    Args:
        rows: each with `OF_EACH_ROW` and `FIGURES`, as text.
        conditions: `OF_ALL_ROWS`, as one sentence.
    """

    rows: list[dict[str, str]]
    conditions: str


def read_measured(path: Path, config: Any) -> MeasuredTable:
    """Read a file of `lmtp bench`: `{"conditions": {…}, "rows": [{…}, …]}`.

    Args:
        path: the file; a row's conditions override those of the file.
        config: the `LMTPConfig` of the checkpoint that the file must be about.

    Raises:
        ValueError: the file has no rows, a condition or a figure is missing, or the figures are of
            another model; the message says which.
    """
    record = read_json(path)
    conditions, rows = record.get("conditions", {}), record.get("rows", [])
    others = tuple(f"{name}: " for name in conditions.get("against") or ())  # checkpoints
    measured = [row for row in rows if not _is_left_out(row, others)]
    if not measured or record.get("command", BENCH) != BENCH:  # scripts write rows of other kinds
        raise ValueError(f"{path} has no rows of figures. Write it with `{BENCH}`.")
    _check_model(path, conditions, config)
    missing = [name for name in OF_ALL_ROWS if _lacks(conditions, name)]
    if missing:
        raise ValueError(
            f"{path}: figures without their conditions; missing: {', '.join(missing)}."
        )
    versions = [f"{name} {conditions['versions'].get(name, '?')}" for name in SHOWN_VERSIONS]
    threads = f"{conditions['threads']} thread{'s' if conditions['threads'] != 1 else ''}"
    return MeasuredTable(
        rows=[_row(path, number, {**conditions, **row}) for number, row in enumerate(measured, 1)],
        conditions=f"{conditions['device']}, {threads}, at most {conditions['max_new_tokens']} new "
        f"tokens per prompt, {', '.join(versions)}",
    )


def _is_left_out(row: dict[str, Any], others: tuple[str, ...]) -> bool:
    """Whether a row is of plain decoding, the baseline, or of another checkpoint."""
    decoding = str(row.get("decoding", ""))
    return decoding == "plain" or decoding.startswith(others)


def _row(path: Path, number: int, row: dict[str, Any]) -> dict[str, str]:
    missing = [name for name in (*OF_EACH_ROW, *FIGURES) if _lacks(row, name)]
    if missing:
        raise ValueError(f"{path}, row {number}: missing: {', '.join(missing)}.")
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
    expected: Sequence[tuple[str, Any]] = (
        ("leap_offsets", list(config.leap_offsets)),
        ("head_context", config.head_context),
    )
    measured, named = (
        Path(name).name
        if name
        else None  # the folder's name, or the repository's without its owner
        for name in (conditions.get("base_model"), config.base_model_name_or_path)
    )
    if measured and named and measured != named:
        raise ValueError(
            f"{path} is about another model: heads on {measured} instead of {named}. Measure this "
            "checkpoint with `lmtp bench`."
        )
    for name, value in expected:
        if name in conditions and conditions[name] != value:
            raise ValueError(
                f"{path} is about another model: {name} {conditions[name]} instead of {value}. Measure "
                "this checkpoint with `lmtp bench`."
            )
