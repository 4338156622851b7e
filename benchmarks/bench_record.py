"""What `lmtp bench` writes: a row of figures per kind of prompts, way of decoding and batch size."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .bench import Measured, Run
from .quiet import quartiles

FIGURES = ("tokens_per_step", "step_cost", "speed_up")
ALL_KINDS = "all"
KEY = ("prompts", "decoding", "dtype", "mode", "batch_size", "at")  # what names a row
MAX_DIVERGENCES = 20  # listed per row


def figures(own: Run, plain: Run) -> dict[str, float]:
    """Return tokens per step, step cost and speed-up of one call over plain decoding's."""
    tau = (own.tokens / max(1, own.passes)) / (plain.tokens / max(1, plain.passes))
    cost = (own.seconds / max(1, own.passes)) / (plain.seconds / max(1, plain.passes))
    return {"tokens_per_step": tau, "step_cost": cost, "speed_up": tau / cost}


def rows(measured: Sequence[Measured], dtype: str, at: int | None = None) -> list[dict[str, Any]]:
    """Turn measurements into rows, and add one over all kinds for each way of decoding.

    Args:
        measured: with one model.
        dtype: its.
        at: the place in a sweep.
    """
    found = [_row([one], one.kind, dtype, at) for one in measured]
    if len({one.kind for one in measured}) > 1:
        together: dict[tuple[str, str, int], list[Measured]] = {}
        for one in measured:
            together.setdefault((one.method.name, one.mode, one.batch_size), []).append(one)
        found += [_row(group, ALL_KINDS, dtype, at) for group in together.values()]
    return found


def _row(group: Sequence[Measured], kind: str, dtype: str, at: int | None) -> dict[str, Any]:
    """Put together what one way of decoding did with some kinds of prompts."""
    first = group[0]
    runs = [own for one in group for own in one.runs]
    plain = [own for one in group for own in one.plain]
    pairs = [
        [figures(a, b) for a, b in zip(own, theirs, strict=True)]
        for own, theirs in zip(runs, plain, strict=True)
        if theirs[0].tokens and own[0].tokens  # an answer of one token has no step
    ]
    row: dict[str, Any] = {
        "prompts": kind,
        "decoding": first.method.name,
        "dtype": dtype,
        "mode": first.mode,
        "batch_size": first.batch_size,
        "at": at,
        "batches": len(runs),
        "rounds": len(runs[0]),
        "new_tokens": sum(len(text) for own in runs for text in own[0].texts),
    }
    for name in FIGURES:
        values = [pair[name] for of_batch in pairs for pair in of_batch]
        row[name] = round(statistics.median(values), 4) if values else None
        row[f"{name}_quartiles"] = _rounded(quartiles(values)) if values else None
    by_batch = {
        name: [statistics.median(pair[name] for pair in of_batch) for of_batch in pairs]
        for name in FIGURES
    }
    row["by_batch"] = {name: _rounded(values) for name, values in by_batch.items()}
    row["noise"] = round(_noise(pairs), 4)
    row["speed_up_of_totals"] = _of_totals(runs, plain)
    row["seconds_per_step"] = _median(
        own.seconds / own.passes for of in runs for own in of if own.passes
    )
    if first.batch_size > 1:
        row["slowest_row_speed_up"] = _median(
            min(b / a for a, b in zip(own.row_seconds, theirs.row_seconds, strict=True) if a and b)
            for of_batch, of_plain in zip(runs, plain, strict=True)
            for own, theirs in zip(of_batch, of_plain, strict=True)
        )
    return row | _equality(group)


def _noise(pairs: Sequence[Sequence[dict[str, float]]]) -> float:
    """How far speed-ups of the same batch lie apart from round to round, relative, the median."""
    spreads = []
    for of_batch in pairs:
        values = [pair["speed_up"] for pair in of_batch]
        spreads.append((max(values) - min(values)) / statistics.median(values))
    return statistics.median(spreads) if spreads else 0.0


def _of_totals(runs: Sequence[Sequence[Run]], plain: Sequence[Sequence[Run]]) -> float | None:
    """Tokens per second over all that was decoded, over plain decoding's; None if nothing was."""

    def totals(all_runs: Sequence[Sequence[Run]]) -> tuple[int, float]:
        every = [own for of_batch in all_runs for own in of_batch]
        return sum(own.tokens for own in every), sum(own.seconds for own in every)

    (tokens, seconds), (plain_tokens, plain_seconds) = totals(runs), totals(plain)
    if not (tokens and plain_tokens):  # all answers have one token, which the prefill gives
        return None
    return round(tokens / seconds / (plain_tokens / plain_seconds), 4)


def _equality(group: Sequence[Measured]) -> dict[str, Any]:
    """Say whether texts were plain decoding's; None where they need not be."""
    compared = sum(one.num_compared for one in group)
    equal = sum(one.num_equal for one in group)
    divergences = [found for one in group for found in one.divergences]
    return {
        "equal": equal == compared if compared else None,
        "equal_texts": f"{equal} of {compared}",
        "near_ties": sum(not found.is_error for found in divergences),
        "errors": sum(one.num_errors for one in group),
        "divergences": [
            {**asdict(found), "is_error": found.is_error} for found in divergences[:MAX_DIVERGENCES]
        ],
    }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 6) if found else None


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


def table(found: Sequence[dict[str, Any]], title: str) -> Table:
    """Lay rows out for a terminal."""
    shown = Table("prompts", "decoding", "tokens per step", "step cost", "speed-up", "quartiles")
    shown.add_column("equal texts")
    shown.title = title
    before = None
    for row in found:
        if row["decoding"] == "plain":
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
