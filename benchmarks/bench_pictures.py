"""Draws a result of `lmtp bench` as bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_methods import PLAIN
from .bench_report import ALL_KINDS
from .pictures import COLOURS, GREY, check_pictures

PANELS = {
    "speed_up_of_totals": "speed-up",
    "acceptance_length": "tokens per step",
    "step_cost": "step cost (median)",
}
GROUP_INCHES, BAR_INCHES = 0.3, 0.12  # so many kinds and methods stay readable


def draw_bench(record: Mapping[str, Any], path: Path) -> None:
    """Draw the rows of the first dtype, mode and batch size of a result.

    Args:
        record: what `lmtp bench` writes.
        path: a PNG file.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: only plain decoding was measured.
    """
    check_pictures()
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["decoding"] != PLAIN and row["speed_up_of_totals"]]
    if not rows:
        raise ValueError(
            f"{str(path)!r} was not drawn: only plain decoding was measured. Name another method with "
            "--only, or leave --picture out."
        )
    setting = ("dtype", "mode", "batch_size")
    rows = [row for row in rows if all(row[name] == rows[0][name] for name in setting)]
    num_kinds, num_methods = (len({row[name] for row in rows}) for name in ("prompts", "decoding"))
    width = max(9, num_kinds * (GROUP_INCHES + num_methods * BAR_INCHES))
    figure = Figure(figsize=(width, 9), dpi=150, layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.axhline(1, color=GREY, linestyle=":", linewidth=1.5)
        axis.set_ylabel(label, fontsize=12)
        _bars(axis, rows, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(_title(record, rows), fontsize=13)
    figure.savefig(path, format="png")


def _title(record: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    conditions, first = record["conditions"], rows[0]
    model = Path(conditions["base_model"] or conditions["checkpoint"]).name
    return (
        f"{model}, {conditions['device']}, {conditions['threads']} threads, {first['dtype']}, "
        f"{first['mode']}, batch size {first['batch_size']}\n95 % intervals over prompts"
    )


def _bars(axis: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Draw a group of bars for each kind of prompts, with one bar for each method."""
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    kinds.sort(key=lambda kind: kind == ALL_KINDS)
    methods = list(dict.fromkeys(row["decoding"] for row in rows))
    width = 0.85 / len(methods)
    for number, method in enumerate(methods):
        by_kind = {row["prompts"]: row for row in rows if row["decoding"] == method}
        places = [place for place, kind in enumerate(kinds) if kind in by_kind]
        shown = [by_kind[kinds[place]] for place in places]
        axis.bar(
            [place + (number - (len(methods) - 1) / 2) * width for place in places],
            [row[name] for row in shown],
            width,
            yerr=_errors(shown, name),
            error_kw={"linewidth": 1, "ecolor": "#333333"},
            color=COLOURS[number % len(COLOURS)],
            hatch="" if number < len(COLOURS) else "//",
            label=method,
        )
    axis.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right", rotation_mode="anchor")
    axis.margins(x=0.02)


def _errors(rows: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """Return how far each interval, if there is one, reaches below and above its figure."""
    intervals = [row.get(f"{name}_interval") or [row[name]] * 2 for row in rows]
    return [
        [max(0.0, row[name] - lower) for row, (lower, _) in zip(rows, intervals, strict=True)],
        [max(0.0, upper - row[name]) for row, (_, upper) in zip(rows, intervals, strict=True)],
    ]
