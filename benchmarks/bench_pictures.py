"""A result of `lmtp bench` as a picture, in the manner of `pictures`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_record import ALL_KINDS
from .pictures import COLOURS, GREY, pictures_available

PANELS = (
    ("speed_up", "speed-up"),
    ("tokens_per_step", "tokens per step"),
    ("step_cost", "step cost"),
)


def check_pictures() -> None:
    """Raise a RuntimeError if matplotlib is not installed."""
    if not pictures_available():
        raise RuntimeError(
            "Pictures need matplotlib, which is not installed: pip install 'modeling-lmtp[plots]'."
        )


def draw_bench(record: Mapping[str, Any], path: Path) -> None:
    """Draw the first dtype, mode and batch size of a result; or its sweep as curves.

    Args:
        record: what `lmtp bench` writes.
        path: a PNG file.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: nothing was set beside plain decoding.
    """
    check_pictures()
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["decoding"] != "plain" and row["speed_up"]]
    if not rows:
        raise ValueError(
            f"{str(path)!r} was not drawn: nothing was measured beside plain decoding. Name another "
            "way of decoding too, or leave --picture out."
        )
    sweep = record["conditions"].get("sweep")
    figure = Figure(figsize=(9, 3.6 if sweep else 9), dpi=150, layout="constrained")
    axes = figure.subplots(1, 3) if sweep else figure.subplots(3, 1, sharex=True)
    for axis, (name, label) in zip(axes, PANELS, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.axhline(1, color=GREY, linestyle=":", linewidth=1.5)
        axis.set_ylabel(label, fontsize=12)
        (_curves if sweep else _bars)(axis, _one_setting(rows, sweep), name)
    if sweep:
        for axis in axes:
            axis.set_xlabel(sweep, fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(_title(record, rows), fontsize=13)
    figure.savefig(path, format="png")


def _one_setting(rows: Sequence[dict[str, Any]], sweep: str | None) -> list[dict[str, Any]]:
    """Keep the first dtype, mode and, unless it is swept, batch size."""
    names = ["dtype", "mode"] if sweep == "batch" else ["dtype", "mode", "batch_size"]
    return [row for row in rows if all(row[name] == rows[0][name] for name in names)]


def _title(record: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    conditions, first = record["conditions"], rows[0]
    model = Path(conditions["base_model"] or conditions["checkpoint"]).name
    return (
        f"{model}, {conditions['device']}, {conditions['threads']} threads, {first['dtype']}, "
        f"{first['mode']}, batch size {first['batch_size']}; medians and quartiles"
    )


def _bars(axis: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """One group of bars per kind of prompts, one bar per way of decoding."""
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    kinds.sort(key=lambda kind: kind == ALL_KINDS)
    ways = list(dict.fromkeys(row["decoding"] for row in rows))
    width = 0.85 / len(ways)
    for number, way in enumerate(ways):
        own = {row["prompts"]: row for row in rows if row["decoding"] == way}
        places = [place for place, kind in enumerate(kinds) if kind in own]
        shown = [own[kinds[place]] for place in places]
        axis.bar(
            [place + (number - (len(ways) - 1) / 2) * width for place in places],
            [row[name] for row in shown],
            width,
            yerr=_errors(shown, name),
            error_kw={"linewidth": 1, "ecolor": "#333333"},
            color=COLOURS[number % len(COLOURS)],
            hatch="" if number < len(COLOURS) else "//",
            label=way,
        )
    axis.set_xticks(range(len(kinds)), kinds)


def _curves(axis: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """One curve per way of decoding over what was swept."""
    for number, way in enumerate(dict.fromkeys(row["decoding"] for row in rows)):
        own = [row for row in rows if row["decoding"] == way]
        axis.errorbar(
            [row["at"] for row in own],
            [row[name] for row in own],
            yerr=_errors(own, name),
            marker="o",
            capsize=3,
            color=COLOURS[number % len(COLOURS)],
            label=way,
        )


def _errors(rows: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    quartiles = [row[f"{name}_quartiles"] for row in rows]
    return [
        [max(0.0, row[name] - lower) for row, (lower, _) in zip(rows, quartiles, strict=True)],
        [max(0.0, upper - row[name]) for row, (_, upper) in zip(rows, quartiles, strict=True)],
    ]
