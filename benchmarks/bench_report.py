"""The result of `lmtp bench`: a row of figures per kind of prompts, method and batch size."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .bench_methods import PLAIN
from .bench_runner import Measured, Run
from .figures import FIGURES, Speed
from .totals import totals

ALL_KINDS = "all"
MAX_DIVERGENCES = 20  # listed per row
MAX_METHODS = 5  # in a table of kinds, so that intervals fit into 80 columns
MAX_POSITIONS = 4  # shown in the terminal; the result file has all
OVERALL = (
    "tokens per step",
    "accepted at 1, 2, …",
    "nodes",
    "step cost",
    "speed-up",
    "equal texts",
)


def rows(measured: Sequence[Measured], dtype: str) -> list[dict[str, Any]]:
    """Turn measurements into rows, and add one over all kinds for each method.

    Args:
        measured: measurements with one model.
        dtype: the dtype of the model.
    """
    found = [_row([one], one.kind, dtype) for one in measured]
    if len({one.kind for one in measured}) > 1:
        together: dict[tuple[str, str, int], list[Measured]] = {}
        for one in measured:
            together.setdefault((one.method.name, one.mode, one.batch_size), []).append(one)
        found += [_row(group, ALL_KINDS, dtype) for group in together.values()]
    return found


def _row(group: Sequence[Measured], kind: str, dtype: str) -> dict[str, Any]:
    """Summarise what one method did with some kinds of prompts."""
    first = group[0]
    runs = [of_batch for one in group for of_batch in one.runs]
    plain = [of_batch for one in group for of_batch in one.plain]
    speeds = [
        [Speed.over(a.timing, b.timing) for a, b in zip(of_batch, of_plain, strict=True)]
        for of_batch, of_plain in zip(runs, plain, strict=True)
        # The prefill emits an answer of one token: there is no step to measure
        if of_plain[0].timing.tokens and of_batch[0].timing.tokens
    ]
    row: dict[str, Any] = {
        "prompts": kind,
        "decoding": first.method.name,
        "dtype": dtype,
        "mode": first.mode,
        "batch_size": first.batch_size,
        "batches": len(runs),
        "rounds": len(runs[0]),
        "new_tokens": sum(len(text) for of_batch in runs for text in of_batch[0].texts),
    }
    row |= _figures(speeds)
    row |= totals(runs, plain)
    row["seconds_per_step"] = _median(
        run.timing.seconds_per_step for of_batch in runs for run in of_batch if run.passes
    )
    if first.batch_size > 1:
        row["slowest_row_speed_up"] = _slowest_row_speed_up(runs, plain)
    return row | _equality(group)


def _figures(speeds: Sequence[Sequence[Speed]]) -> dict[str, Any]:
    """Return the median of each figure over batches and rounds, and for each batch."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [getattr(speed, name) for of_batch in speeds for speed in of_batch]
        found[name] = round(statistics.median(values), 4) if values else None
    found["by_batch"] = {
        name: _rounded(
            statistics.median(getattr(speed, name) for speed in of_batch) for of_batch in speeds
        )
        for name in FIGURES
    }
    return found


def _slowest_row_speed_up(
    runs: Sequence[Sequence[Run]], plain: Sequence[Sequence[Run]]
) -> float | None:
    """Return the median over calls of the speed-up of the row that gains least."""
    return _median(
        min(b / a for a, b in zip(run.row_seconds, theirs.row_seconds, strict=True) if a and b)
        for of_batch, of_plain in zip(runs, plain, strict=True)
        for run, theirs in zip(of_batch, of_plain, strict=True)
    )


def _equality(group: Sequence[Measured]) -> dict[str, Any]:
    """Return whether texts equal plain decoding's, None if none were compared, and the differences."""
    compared = sum(one.num_compared for one in group)
    equal = sum(one.num_equal for one in group)
    divergences = [divergence for one in group for divergence in one.divergences]
    return {
        "equal": equal == compared if compared else None,
        "equal_texts": f"{equal} of {compared}",
        "near_ties": sum(not divergence.is_error for divergence in divergences),
        "errors": sum(one.num_errors for one in group),
        "divergences": [
            {**asdict(divergence), "is_error": divergence.is_error}
            for divergence in divergences[:MAX_DIVERGENCES]
        ],
    }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 6) if found else None


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


def tables(found: Sequence[dict[str, Any]], title: str) -> list[Table]:
    """Lay out rows for a terminal: the figures over all prompts, and the speed-up for each kind of them."""
    compared = [row for row in found if row["decoding"] != PLAIN]
    kinds = list(dict.fromkeys(row["prompts"] for row in compared))
    whole = [row for row in compared if row["prompts"] == kinds[-1]]  # the one over all comes last
    laid_out = [_methods_table(whole, title)]
    methods = list(dict.fromkeys(row["decoding"] for row in compared))
    if len(kinds) > 1:
        laid_out += [
            _kinds_table(compared, kinds, methods[start : start + MAX_METHODS])
            for start in range(0, len(methods), MAX_METHODS)
        ]
    for shown in laid_out:
        for column in shown.columns:
            column.overflow = "fold"  # rather than cut figures off
    return laid_out


def _methods_table(found: Sequence[dict[str, Any]], title: str) -> Table:
    shown = Table("decoding", *OVERALL, title=title)
    for row in found:
        texts = row["equal_texts"] if row["equal"] is not None else "-"
        errors = f" [red]{row['errors']} errors[/]" if row["errors"] else ""
        accepted = row["conditional_acceptance"] or []
        shown.add_row(
            row["decoding"],
            number(row["acceptance_length"]),
            " ".join(number(share) for share in accepted[:MAX_POSITIONS]) or "-",
            number(row["nodes_per_step"], 1),
            number(row["step_cost"]),
            with_interval(row, "speed_up_of_totals"),
            texts + errors,
        )
    return shown


def _kinds_table(
    found: Sequence[dict[str, Any]], kinds: Sequence[str], methods: Sequence[str]
) -> Table:
    """Lay out a line for each kind and a column for each method, which stays readable for many kinds."""
    by_place = {(row["prompts"], row["decoding"]): row for row in found}
    shown = Table("prompts", *methods, title="speed-up and its 95 % interval, by kind of prompt")
    for kind in kinds:
        if kind == ALL_KINDS:
            shown.add_section()
        cells = [with_interval(by_place[kind, method], "speed_up_of_totals") for method in methods]
        shown.add_row(kind, *cells)
    return shown


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure as tables show it."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(row: Mapping[str, Any], name: str) -> str:
    """Return a figure of a row and, if the row has it, its interval."""
    between = row.get(f"{name}_interval")
    if between is None:
        return number(row[name])
    return f"{number(row[name])} {number(between[0])}-{number(between[1])}"
