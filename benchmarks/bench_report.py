"""The result of `lmtp bench`: a row of figures per kind of prompts, method and batch size."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .bench_methods import PLAIN
from .bench_runner import Measured, Run
from .figures import FIGURES, Speed, Timing
from .quiet import quartiles

ALL_KINDS = "all"
MAX_DIVERGENCES = 20  # listed per row


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
    row["noise"] = round(_noise(speeds), 4)
    row["speed_up_of_totals"] = _speed_up_of_totals(runs, plain)
    row["seconds_per_step"] = _median(
        run.timing.seconds_per_step for of_batch in runs for run in of_batch if run.passes
    )
    if first.batch_size > 1:
        row["slowest_row_speed_up"] = _slowest_row_speed_up(runs, plain)
    return row | _equality(group)


def _figures(speeds: Sequence[Sequence[Speed]]) -> dict[str, Any]:
    """Return the median and quartiles of each figure, and its median for each batch."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [getattr(speed, name) for of_batch in speeds for speed in of_batch]
        found[name] = round(statistics.median(values), 4) if values else None
        found[f"{name}_quartiles"] = _rounded(quartiles(values)) if values else None
    found["by_batch"] = {
        name: _rounded(
            statistics.median(getattr(speed, name) for speed in of_batch) for of_batch in speeds
        )
        for name in FIGURES
    }
    return found


def _noise(speeds: Sequence[Sequence[Speed]]) -> float:
    """Return the median over batches of how far their speed-ups differ between rounds, relatively."""
    spreads = []
    for of_batch in speeds:
        values = [speed.speed_up for speed in of_batch]
        spreads.append((max(values) - min(values)) / statistics.median(values))
    return statistics.median(spreads) if spreads else 0.0


def _speed_up_of_totals(
    runs: Sequence[Sequence[Run]], plain: Sequence[Sequence[Run]]
) -> float | None:
    """Return total tokens per second over plain decoding's; None if the prefills emitted all tokens."""
    total, plain_total = (
        Timing.total(run.timing for of_batch in every for run in of_batch)
        for every in (runs, plain)
    )
    if not (total.tokens and plain_total.tokens):
        return None
    return round(total.tokens_per_second / plain_total.tokens_per_second, 4)


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


def table(found: Sequence[dict[str, Any]], title: str) -> Table:
    """Lay out rows for a terminal."""
    shown = Table("prompts", "decoding", "tokens per step", "step cost", "speed-up", "quartiles")
    shown.add_column("equal texts")
    shown.title = title
    before = None
    for row in found:
        if row["decoding"] == PLAIN:
            continue
        if before not in (None, row["prompts"]):
            shown.add_section()
        lower, upper = row["speed_up_quartiles"] or (float("nan"),) * 2
        texts = row["equal_texts"] if row["equal"] is not None else "-"
        errors = f" [red]{row['errors']} errors[/]" if row["errors"] else ""
        shown.add_row(
            row["prompts"] if row["prompts"] != before else "",
            row["decoding"],
            *(f"{row[name]:.2f}" if row[name] is not None else "-" for name in FIGURES),
            f"{lower:.2f} to {upper:.2f}",
            texts + errors,
        )
        before = row["prompts"]
    return shown
