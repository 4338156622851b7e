"""Draws an analysis: accuracy per distance, attenuation, tokens per step.

The pictures need only `analysis.json`, so old results can be drawn again. Colour-blind readers can tell the
colours apart (Okabe and Ito's); markers differ as well.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .attenuation import (
    SCHEDULES,
    expected_tokens_per_step,
    leap_break_even,
    probability,
)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#666666"
MODEL_STYLE = {"color": "#000000", "marker": "*", "markersize": 11, "linewidth": 2}
NUM_HEADS = 3
LEGEND = {"loc": "outside lower center", "frameon": False}


def pictures_available() -> bool:
    """Return whether matplotlib, the extra `plots`, is installed."""
    return find_spec("matplotlib") is not None


def check_pictures() -> None:
    """Raise a RuntimeError if matplotlib is not installed."""
    if not pictures_available():
        raise RuntimeError(
            "Pictures need matplotlib, which is not installed: pip install 'modeling-lmtp[plots]'."
        )


def draw_pictures(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw an analysis as PNG files.

    Args:
        record: what `lmtp analyze` writes as `analysis.json`.
        folder: where the files go.

    Returns:
        Their paths; pictures without anything to show are left out.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    check_pictures()
    drawn = {}
    if record["checkpoints"]:
        drawn["accuracy"] = _accuracy(record)
        drawn["tokens_per_step"] = _tokens_per_step(record)
    if record["checkpoints"] or record["marginalization"]:
        drawn["attenuation"] = _attenuation(record)
    paths = [folder / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figure.savefig(path, format="png")
    return paths


def _figure(width: float, height: float, panels: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # an extra: everything else must work without it

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **options)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=11)
    return figure, axes


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 7,
        "linewidth": 2,
    }


def _accuracy(record: Mapping[str, Any]) -> Any:
    checkpoints = record["checkpoints"]
    figure, axes = _figure(9, 4.2, len(checkpoints[0]["top_k"]), sharey=True)
    figure.suptitle("How often the right token is among the heads' candidates", fontsize=14)
    has_ceiling = False
    for axis, k in zip(axes, checkpoints[0]["top_k"], strict=True):
        for number, checkpoint in enumerate(checkpoints):
            values = checkpoint["top_k"][k]
            axis.plot(
                range(1, 1 + len(values)), values, label=checkpoint["label"], **_style(number)
            )
            has_ceiling |= _draw_ceiling(axis, record, checkpoint, k, number)
        longest = max(len(checkpoint["top_k"][k]) for checkpoint in checkpoints)
        axis.set_xticks(range(1, 1 + longest))
        axis.set_ylim(0, 1.04)
        axis.set_title("first candidate" if k == "1" else f"first {k}", fontsize=12)
    axes[0].set_ylabel("share of drafts", fontsize=12)
    axes[len(axes) // 2].set_xlabel("tokens after the last one known", fontsize=12)
    if has_ceiling:
        axes[0].plot([], [], "--", color=GREY, label="reference: numerical marginalization")
    _legend(figure, axes[0])
    return figure


def _draw_ceiling(
    axis: Any, record: Mapping[str, Any], checkpoint: Mapping[str, Any], k: str, number: int
) -> bool:
    """Draw the bound of each kind of heads, as far as it was measured; return whether there is any."""
    if not record["marginalization"]:
        return False
    known = {row["distance"]: row for row in record["marginalization"]["distances"]}
    points = [
        (distance, known[ahead][f"top{k}"]["value"])
        for distance, ahead in enumerate(checkpoint["ceiling_distances"], start=1)
        if ahead in known
    ]
    style = {**_style(number), "linestyle": "--", "linewidth": 1.3, "markerfacecolor": "white"}
    if points:
        axis.plot(*zip(*points, strict=True), **style)
    return bool(points)


def _attenuation(record: Mapping[str, Any]) -> Any:
    fits = [
        (checkpoint["label"], checkpoint["attenuation"], _style(number))
        for number, checkpoint in enumerate(record["checkpoints"])
    ]
    if record["marginalization"]:
        fit = record["marginalization"]["attenuation"]
        fits.append(("the model itself (marginalization)", fit, MODEL_STYLE))
    figure, (left, right) = _figure(9, 3.9 + 0.24 * len(fits), 2)
    figure.suptitle("Attenuation: certainty falls with distance", fontsize=14)
    furthest = max(max(fit["distances"]) for _, fit, _ in fits)
    limit = leap_break_even(NUM_HEADS)
    _draw_curve(left, limit, furthest, color=GREY, linestyle=":", linewidth=1.8)
    for label, fit, style in fits:
        points = {**style, "linestyle": "none"}
        left.plot(fit["distances"], fit["values"], **points)
        _draw_curve(left, fit["gamma"], furthest, color=style["color"], linewidth=1.8)
        error = f" ± {fit['standard_error']:.2f}" if fit["standard_error"] is not None else ""
        left.plot([], [], label=f"{label}: γ = {fit['gamma']:.2f}{error}", **style)
    _draw_next_token(left, record)
    left.plot(
        [], [], color=GREY, linestyle=":", label=f"leap 2 pays above this line: γ = {limit:.3f}"
    )
    left.set_xticks(range(1, furthest + 1))
    left.set_ylim(0, 1.04)
    left.set_xlabel("tokens ahead, d", fontsize=12)
    left.set_ylabel("mean probability of the right token", fontsize=11)
    left.set_title("measured, and exp(−γ(d−1)) fitted", fontsize=12)
    _draw_schedules(right, [(fit["gamma"], style) for _, fit, style in fits], limit)
    _legend(figure, left)
    return figure


def _draw_curve(axis: Any, gamma: float, furthest: int, **style: Any) -> None:
    steps = [1 + (furthest - 1) * i / 60 for i in range(61)]
    axis.plot(steps, [probability(gamma, step) for step in steps], **style)


def _draw_next_token(axis: Any, record: Mapping[str, Any]) -> None:
    """Draw the probability of the model's next token, which is below the curve's 1."""
    if record["marginalization"]:
        value = record["marginalization"]["distances"][0]["mean_probability"]["value"]
        style = {**MODEL_STYLE, "markerfacecolor": "white", "linestyle": "none"}
        axis.plot([1], [value], label=f"the model's own next token: {value:.2f}", **style)


def _draw_schedules(axis: Any, gammas: Sequence[tuple[float, Any]], limit: float) -> None:
    """Draw the tokens per step of leap 1 and leap 2 over γ, and mark the measured γ."""
    highest = max(0.4, 1.1 * max(gamma for gamma, _ in gammas))
    steps = [highest * i / 200 for i in range(201)]
    for name, text, style in (
        ("MTP, 3 heads", "leap 1 (MTP)", "-"),
        ("L-MTP, 3 heads", "leap 2 (L-MTP)", "--"),
    ):
        values = [expected_tokens_per_step(SCHEDULES[name], gamma) for gamma in steps]
        axis.plot(steps, values, style, color="black", linewidth=1.8, label=text)
    for gamma, style in gammas:
        value = max(
            expected_tokens_per_step(SCHEDULES[name], gamma)
            for name in ("MTP, 3 heads", "L-MTP, 3 heads")
        )
        axis.plot([gamma], [value], **{**style, "markersize": 10})
    axis.axvline(limit, color=GREY, linestyle=":", linewidth=1.8)
    axis.set_xlim(0, highest)
    axis.set_ylim(1, 7.2)
    axis.set_xlabel("γ", fontsize=12)
    axis.set_ylabel("tokens per step", fontsize=12)
    axis.set_title("what 3 heads promise at each γ", fontsize=12)
    axis.legend(frameon=False, fontsize=11)


def _tokens_per_step(record: Mapping[str, Any]) -> Any:
    checkpoints = record["checkpoints"]
    figure, [axis] = _figure(8, 4.4)
    names = list(checkpoints[0]["tokens_per_step"])
    found = [[checkpoint["tokens_per_step"][name] for name in names] for checkpoint in checkpoints]
    tops = [e["value"] + (e["standard_error"] or 0.0) for row in found for e in row]
    lowest, highest = 0.9, 1.03 * max(1.4, *tops)
    heights = spread([row[-1]["value"] for row in found], gap=0.055 * (highest - lowest))
    for number, (checkpoint, row) in enumerate(zip(checkpoints, found, strict=True)):
        values = [estimate["value"] for estimate in row]
        errors = [estimate["standard_error"] or 0.0 for estimate in row]
        shift = 0.06 * (number - (len(checkpoints) - 1) / 2)  # error bars side by side
        places = [place + shift for place in range(len(names))]
        style = _style(number)
        axis.errorbar(places, values, yerr=errors, capsize=3, label=checkpoint["label"], **style)
        end = (len(names) - 0.8, heights[number])
        axis.annotate(f"{values[-1]:.2f}", end, va="center", fontsize=12, color=style["color"])
    axis.axhline(1, color=GREY, linestyle=":", linewidth=1.8)
    axis.annotate("plain decoding", (len(names) - 1.5, 0.985), va="top", color=GREY, fontsize=11)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.3, len(names) - 0.4)
    axis.set_ylim(lowest, highest)
    axis.set_ylabel("tokens per step", fontsize=12)
    axis.set_xlabel("draft: the top-1 chain, or a tree of so many candidates", fontsize=12)
    axis.set_title("Tokens per backbone pass, simulated on held-out answers", fontsize=14)
    _legend(figure, axis)
    return figure


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return the heights of labels, moved up where they are too close."""
    placed: dict[int, float] = {}
    lowest = float("-inf")
    for number in sorted(range(len(heights)), key=heights.__getitem__):
        lowest = placed[number] = max(heights[number], lowest + gap)
    return [placed[number] for number in range(len(heights))]


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 40 else 2
    figure.legend(handles, labels, ncols=min(columns, len(labels)), fontsize=11, **LEGEND)
