"""Writes the tables of `speed.md` from the results of `lmtp bench`, `sweep.py` and `step_profile.py`.

    python benchmarks/scripts/speed.py

It replaces the text between the marks in `speed.md` and keeps the rest. A mark names its file:
`<!-- results/NAME.json -->` … `<!-- end -->`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "speed.md"
BLOCK = re.compile(r"(<!-- results/(\S+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
GROUP = ("dtype", "mode", "batch_size")
MAX_POSITIONS = 4  # of accepted candidates; the result files have all
PARTS = ("pass_ms", "draft_ms", "arrange_ms", "walk_ms", "commit_ms", "emit_ms")

Row = Mapping[str, Any]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    all_lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in all_lines)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as the tables show it."""
    return "-" if value is None else f"{value:.{digits}f}"


def conditions(record: Mapping[str, Any]) -> str:
    """Return a sentence on the conditions of a measurement."""
    measured = record["conditions"]
    versions = measured["versions"]
    parts = [
        f"{measured['device']}, {measured['threads']} threads",
        f"torch {versions['torch']}, Transformers {versions['transformers']}",
        f"{measured['rounds']} round{'s' if measured['rounds'] > 1 else ''}",
    ]
    if "max_new_tokens" in measured:
        parts.append(f"at most {measured['max_new_tokens']} new tokens")
    if "kinds" in measured:
        kinds = ", ".join(f"{count} {kind}" for kind, count in measured["kinds"].items())
        parts.append(f"prompts: {kinds}")
    parts.append(f"load average {measured['load'][0]} before")
    return "; ".join([*parts, *measured["complaints"]]) + "."


def bench_tables(record: Mapping[str, Any]) -> str:
    """Return a table of methods and kinds of prompts for each dtype, mode and batch size."""
    rows = [row for row in record["rows"] if row["decoding"] != "plain"]
    if record["conditions"].get("sweep"):
        return sweep_table(rows, record["conditions"]["sweep"])
    tables = []
    for group in dict.fromkeys(tuple(row[name] for name in GROUP) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in GROUP) == group]
        tables.append(f"{group[0]}, {group[1]}, batch size {group[2]}:\n\n{group_table(own)}")
    return "\n\n".join(tables)


def group_table(rows: Sequence[Row]) -> str:
    """Return the figures over all kinds, and the speed-ups by kind; each speed-up with its interval."""
    if "acceptance_length" not in rows[0]:
        return former_table(rows)
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    whole = [row for row in rows if row["prompts"] == kinds[-1]]
    header = ["decoding", "speed-up", "tokens/s", "τ", "accepted at 1, 2, …", "nodes", "step cost"]
    lines = [
        [
            row["decoding"],
            with_interval(row, "speed_up_of_totals"),
            number(row["tokens_per_second"], 1),
            with_interval(row, "acceptance_length"),
            " ".join(map(number, (row["conditional_acceptance"] or [None])[:MAX_POSITIONS])),
            number(row["nodes_per_step"], 1),
            number(row["step_cost"]),
            row["equal_texts"] if row["equal"] is not None else "-",
            str(row["errors"]),
        ]
        for row in whole
    ]
    table = markdown([*header, "equal texts", "errors"], lines)
    return table if len(kinds) == 1 else f"{table}\n\n{kinds_table(rows, kinds)}"


def kinds_table(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """Return a line of speed-ups for each kind."""
    by_place = {(row["prompts"], row["decoding"]): row for row in rows}
    ways = list(dict.fromkeys(row["decoding"] for row in rows))
    lines = [
        [kind, *(with_interval(by_place[kind, way], "speed_up_of_totals") for way in ways)]
        for kind in kinds
    ]
    return markdown(["speed-up", *ways], lines)


def with_interval(row: Row, name: str) -> str:
    """Return a figure and its 95 % interval, if it has one."""
    value, between = number(row[name]), row[f"{name}_interval"]
    return value if between is None else f"{value} ({number(between[0])}–{number(between[1])})"


def former_table(rows: Sequence[Row]) -> str:
    """Return the table of a file of version 0.1: medians, without intervals."""
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    header = ["decoding", *(f"speed-up, {kind}" for kind in kinds)]
    header += ["total", "τ", "step cost", "speed-up / τ", "equal texts", "errors"]
    lines = []
    for way in dict.fromkeys(row["decoding"] for row in rows):
        own = {row["prompts"]: row for row in rows if row["decoding"] == way}
        whole = own[kinds[-1]]
        tau, speed_up = whole["tokens_per_step"], whole["speed_up"]
        lines.append(
            [
                way,
                *(number(own[kind]["speed_up"]) for kind in kinds),
                number(whole["speed_up_of_totals"]),
                number(tau),
                number(whole["step_cost"]),
                number(speed_up / tau if tau and speed_up else None),
                whole["equal_texts"] if whole["equal"] is not None else "-",
                str(whole["errors"]),
            ]
        )
    return markdown(header, lines)


def sweep_table(rows: Sequence[Row], sweep: str) -> str:
    """Return a line for each value of the sweep and each method, over all kinds."""
    header = [sweep, "decoding", "τ", "step cost", "speed-up", "ms per step"]
    last = {(row["at"], row["decoding"]): row for row in rows}  # the one over all kinds comes last
    lines = [
        [
            str(at),
            way,
            number(row["tokens_per_step"]),
            number(row["step_cost"]),
            number(row["speed_up"]),
            number(row["seconds_per_step"] * 1e3, 1),
        ]
        for (at, way), row in last.items()
    ]
    return markdown(header, lines)


def profile_table(record: Mapping[str, Any]) -> str:
    """Return the parts of a decoding step for each kind of draft."""
    header = ["draft", "tokens", "bare pass", "step", "step / bare pass", "around / bare pass"]
    header += [part.removesuffix("_ms") for part in PARTS]
    lines = [
        [
            row["way"],
            str(row["tokens"]),
            number(row["bare_pass_ms"], 1),
            number(row["step_ms"], 1),
            number(row["overhead"], 3),
            number(sum(row[part] for part in PARTS[1:]) / row["bare_pass_ms"], 3),
            *(number(row[part], 2) for part in PARTS),
        ]
        for row in record["rows"]
    ]
    return markdown(header, lines)


def block(name: str) -> str:
    """Return the text between the marks of a result file."""
    record = json.loads((PAGE.parent / "results" / f"{name}.json").read_text())
    is_profile = "step_profile" in record["command"]
    tables = profile_table(record) if is_profile else bench_tables(record)
    return f"{tables}\n\n{conditions(record)}\n"


def main() -> None:
    """Replace the text between the marks."""
    text = PAGE.read_text()
    PAGE.write_text(BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[3]}", text))


if __name__ == "__main__":
    main()
