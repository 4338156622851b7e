"""The content of `analysis.json`, and the tables that `lmtp analyze` prints."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from modeling_lmtp.conversion.saving import versions

from .advice import advise
from .analysis import (
    HeadAnalysis,
    marginal_attenuations,
    marginal_estimates,
)
from .attenuation import (
    SCHEDULES,
    Attenuation,
    expected_tokens_per_step,
    leap_break_even,
)
from .marginalization import Marginals
from .resampling import Estimate


@dataclass(frozen=True)
class Measured:
    """All measurements of an analysis.

    Args:
        heads: the analyses of the checkpoints, by name.
        marginals: the marginals of their backbone, if measured.
        notes: what a reader should know before trusting the figures.
        conditions: device, dtype and so on.
    """

    heads: dict[str, HeadAnalysis]
    marginals: Marginals | None
    notes: list[str]
    conditions: dict[str, Any]


def analysis_record(
    measured: Measured,
    sources: Sequence[str],
    answers: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of `analysis.json`.

    Args:
        measured: the measurements.
        sources: folders or Hub ids of the checkpoints.
        answers: name and hash of the file of answers.
        settings: the settings of the command.
    """
    fits = None
    if measured.marginals is not None:
        fits = marginal_attenuations(measured.marginals, settings["seed"])
    return {
        "command": "lmtp analyze",
        "sources": list(sources),
        "answers": dict(answers),
        "settings": dict(settings),
        "conditions": measured.conditions,
        "versions": versions(),
        "checkpoints": [
            _checkpoint_record(name, analysis) for name, analysis in measured.heads.items()
        ],
        "marginalization": _marginalization_record(measured.marginals, fits, settings),
        "schedules": _schedules(measured.heads, fits),
        "leap_2_break_even": {str(m): leap_break_even(m) for m in (2, 3, 4, 5, 6)},
        "advice": advise(measured.heads, fits),
        "notes": measured.notes,
        "pictures": [],
    }


def _checkpoint_record(name: str, analysis: HeadAnalysis) -> dict[str, Any]:
    record = asdict(analysis)
    record["top_k"] = {str(k): values for k, values in analysis.top_k.items()}
    offsets = ", ".join(map(str, analysis.leap_offsets))
    label = f"{name}: {offsets} ({analysis.kind})"
    return {"name": name, "label": label, "kind": analysis.kind, **record}


def _marginalization_record(
    marginals: Marginals | None,
    fits: tuple[Attenuation, Attenuation] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any] | None:
    if marginals is None or fits is None:
        return None
    rows = [
        {
            "distance": distance,
            **{k: asdict(v) if isinstance(v, Estimate) else v for k, v in estimates.items()},
        }
        for distance, estimates in enumerate(
            marginal_estimates(marginals, settings["seed"]), start=1
        )
    ]
    return {
        "what": (
            "The upper bound for heads that see no token after their state. Grounded heads see x_{t+1} "
            "and more, so it does not bound them: their bound is at the distance in ceiling_distances, "
            "where 1 is the model's next-token distribution."
        ),
        "positions": len(marginals.ranks),
        "continuations": settings["num_continuations"],
        "distances": rows,
        "attenuation": asdict(fits[0]),
        "top1_attenuation": asdict(fits[1]),
    }


def _schedules(
    heads: dict[str, HeadAnalysis], model: tuple[Attenuation, Attenuation] | None
) -> list[dict[str, Any]]:
    """Return the tokens per step of chains of the paper's heads, if each fitted top-1 curve held."""
    curves = {name: analysis.top1_attenuation.gamma for name, analysis in heads.items()}
    if model is not None:
        curves["model"] = model[1].gamma
    return [
        {
            "name": name,
            "leap_offsets": list(offsets),
            "expected_tokens_per_step": {
                curve: expected_tokens_per_step(offsets, gamma) for curve, gamma in curves.items()
            },
        }
        for name, offsets in SCHEDULES.items()
    ]


def tables(record: Mapping[str, Any]) -> list[Table]:
    """Lay out the main figures."""
    shown = []
    if record["checkpoints"] or record["marginalization"]:
        shown.append(accuracy_table(record))
    if record["checkpoints"]:
        shown.append(steps_table(record))
    return shown


def accuracy_table(record: Mapping[str, Any]) -> Table:
    """Lay out the top-1 accuracies of heads and model per draft distance."""
    rows = [(entry["name"], entry["top_k"]["1"]) for entry in record["checkpoints"]]
    if record["marginalization"]:
        distances = record["marginalization"]["distances"][1:]
        rows.append(("the model itself*", [row["top1"]["value"] for row in distances]))
    longest = max(len(values) for _, values in rows)
    caption = "* by numerical marginalization, having seen x_≤t"
    table = Table(title="Top-1 accuracy", caption=caption if record["marginalization"] else None)
    table.add_column("draft of", overflow="fold")
    for distance in range(1, 1 + longest):
        table.add_column(f"t+{1 + distance}", no_wrap=True)
    for name, values in rows:
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def steps_table(record: Mapping[str, Any]) -> Table:
    """Lay out each checkpoint's heads, γ and tokens per step."""
    table = Table(title="Tokens per step, simulated: chain, and trees by number of candidates")
    for heading in ("checkpoint", "offsets", "heads", "γ"):
        table.add_column(heading, overflow="fold")
    for draft in record["checkpoints"][0]["tokens_per_step"]:
        table.add_column(draft, no_wrap=True)
    for entry in record["checkpoints"]:
        table.add_row(
            entry["name"],
            ",".join(map(str, entry["leap_offsets"])),
            entry["kind"],
            f"{entry['attenuation']['gamma']:.2f}",
            *(f"{estimate['value']:.2f}" for estimate in entry["tokens_per_step"].values()),
        )
    return table
