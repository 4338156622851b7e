"""`lmtp compare`: what moved between two result files of `lmtp bench`, beyond noise."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modeling_lmtp.conversion.bench_record import FIGURES, KEY
from modeling_lmtp.conversion.quiet import quartiles

OF_EACH_ROW = (*KEY, *FIGURES, *(f"{name}_quartiles" for name in FIGURES), "by_batch", "noise")
# Conditions that are the same machine doing the same work; others may differ between two results
COMPARABLE = ("base_model", "device", "threads", "max_new_tokens", "stop_at_end", "prompts")


@dataclass(frozen=True)
class Change:
    """How one figure of one row moved.

    Args:
        key: the row, see `bench_record.KEY`.
        figure: one of `FIGURES`.
        old, new: its medians.
        by: the median relative change, of each batch over its own old value where both results
            measured the same prompts.
        noise: what change the spread of both results explains.
    """

    key: tuple[Any, ...]
    figure: str
    old: float
    new: float
    by: float
    noise: float

    @property
    def moved(self) -> bool:
        """Whether it is more than noise."""
        return abs(self.by) > self.noise


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: it is not one of `lmtp bench`; says what it lacks.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    reason = _no_result(record)
    if reason is not None:
        raise ValueError(
            f"{path} is no result of `lmtp bench`: {reason}. Compare two files that its --output wrote."
        )
    return dict(record)


def _no_result(record: Any) -> str | None:
    """Say what speaks against a result of `lmtp bench`, if anything."""
    if not isinstance(record, dict):
        return "it is no JSON object"
    if lacking := [name for name in ("conditions", "rows") if name not in record]:
        return f"it lacks {', '.join(lacking)}"
    if not isinstance(record["conditions"], dict):
        return "its conditions are no JSON object"
    if not isinstance(record["rows"], list):
        return "its rows are no list"
    for number, row in enumerate(record["rows"], 1):
        if not isinstance(row, dict):
            return f"row {number} is no JSON object"
        if lacking := [name for name in OF_EACH_ROW if name not in row]:
            return f"row {number} lacks {', '.join(lacking)}"
    return None


def differing_conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say which conditions differ that two results must share to be compared."""
    return [
        f"{name}: {old['conditions'].get(name)!r} before, {new['conditions'].get(name)!r} after"
        for name in COMPARABLE
        if old["conditions"].get(name) != new["conditions"].get(name)
    ]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Compare the rows that both results have, figure by figure; plain decoding's are all 1."""
    before = {_key(row): row for row in old["rows"]}
    paired = old["conditions"].get("prompts") == new["conditions"].get("prompts")
    found = []
    for row in new["rows"]:
        other = before.get(_key(row))
        if other is None or row["decoding"] == "plain":
            continue
        for figure in FIGURES:
            if row[figure] and other[figure]:
                found.append(_change(figure, other, row, paired))
    return found


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _change(figure: str, old: Mapping[str, Any], new: Mapping[str, Any], paired: bool) -> Change:
    """Compare batch by batch where the batches are the same, else by the quartiles over all of them."""
    pairs = list(zip(old["by_batch"][figure], new["by_batch"][figure], strict=False))
    if paired and len(old["by_batch"][figure]) == len(new["by_batch"][figure]):
        moves = [after / before - 1 for before, after in pairs]
        lower, upper = quartiles(moves)
        by = statistics.median(moves)
        spread = (upper - lower) / 2
        rounds = 0.0 if figure == "tokens_per_step" else max(old["noise"], new["noise"]) / 2
        noise = max(spread, rounds)
    else:
        by = new[figure] / old[figure] - 1
        noise = sum(_half_spread(row, figure) for row in (old, new))
    return Change(_key(new), figure, old[figure], new[figure], by, noise)


def _half_spread(row: Mapping[str, Any], figure: str) -> float:
    lower, upper = row[f"{figure}_quartiles"]
    return (upper - lower) / 2 / row[figure]


def table(found: list[Change]) -> Table:
    """Lay changes out for a terminal."""
    shown = Table(*KEY, "figure", "before", "after", "change", "noise")
    for change in found:
        colour = "green" if (change.by > 0) != (change.figure == "step_cost") else "red"
        shown.add_row(
            *map(str, change.key),
            change.figure.replace("_", " "),
            f"{change.old:.3f}",
            f"{change.new:.3f}",
            f"[{colour}]{change.by:+.1%}[/]",
            f"±{change.noise:.1%}",
        )
    return shown


def report_changes(
    old_path: Path, new_path: Path, console: Console, *, everything: bool = False
) -> list[Change]:
    """Print what moved, and what speaks against the comparison; return the changes that moved."""
    old, new = read_result(old_path), read_result(new_path)
    for difference in differing_conditions(old, new):
        console.print(f"[yellow]Other conditions[/] {difference}", markup=True)
    for path, record in ((old_path, old), (new_path, new)):
        if not record["conditions"].get("quiet", True):
            console.print(f"[yellow]{path.name} was measured on a machine that was not quiet.[/]")
    found = changes(old, new)
    moved = [change for change in found if change.moved]
    if everything or moved:
        console.print(table(found if everything else moved))
    console.print(f"{len(moved)} of {len(found)} figures moved beyond noise.")
    return moved
