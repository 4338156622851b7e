"""The command that shows what heads are worth: analyze."""

from pathlib import Path
from typing import Annotated

import typer

from modeling_lmtp.conversion.cli_base import BadRows, Dtype, app, console, reports_errors


@app.command()
@reports_errors
def analyze(
    sources: Annotated[
        list[str], typer.Argument(help="Checkpoints on one backbone, or one plain backbone.")
    ],
    answers: Annotated[Path, typer.Option(help="Held-out answers, made by `lmtp distill`.")],
    output: Annotated[Path, typer.Option(help="New folder for figures and pictures.")],
    num_answers: Annotated[
        int, typer.Option(help="Those that `train --held-out` with this number keeps out.")
    ] = 32,
    marginalize_positions: Annotated[
        int, typer.Option(help="Positions for numerical marginalization; 0 leaves it out.")
    ] = 128,
    continuations: Annotated[int, typer.Option(help="How many each marginal sums over.")] = 16,
    nodes: Annotated[str, typer.Option(help="Candidates of the trees to simulate.")] = "4,8,16,32",
    max_length: int = 1024,
    bad_rows: BadRows = "refuse",
    seed: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Show how far heads see, what they could see at best, and which schedule to use."""
    from .analysis_record import tables
    from .analyzing import AnalysisSettings, run_analysis, whole_numbers

    settings = AnalysisSettings(
        num_answers=num_answers,
        marginalize_positions=marginalize_positions,
        num_continuations=continuations,
        node_counts=whole_numbers(nodes),
        max_length=max_length,
        bad_rows=bad_rows,
        seed=seed,
        dtype=dtype,
    )
    record = run_analysis(sources, answers, output, settings)
    console.print(*tables(record), record["advice"], *record["notes"], sep="\n", markup=False)
    console.print(f"Saved {', '.join(['analysis.json', *record['pictures']])} in {output}.")
