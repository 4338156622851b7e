"""The commands that measure speed: bench and tune."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modeling_lmtp.conversion.cli_base import BadRows, Dtype, app, console, reports_errors


@app.command()
@reports_errors
def bench(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id with leap heads.")],
    prompts: Annotated[list[Path], typer.Option(help="Prompts by kind, .jsonl; may be repeated.")],
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it, .png.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Other heads, same backbone.")] = None,
    assistant: Annotated[str | None, typer.Option(help="A small model that drafts.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="With commas between.")] = "1",
    dtypes: Annotated[str, typer.Option(help="With commas between.")] = "bfloat16",
    modes: Annotated[str, typer.Option(help="greedy, sampling, or both.")] = "greedy",
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    per_kind: Annotated[int | None, typer.Option(min=1, help="Prompts of each kind.")] = None,
    draft_nodes: Annotated[int, typer.Option(help="Candidates of the dynamic tree.")] = 8,
    lookup_tokens: Annotated[int, typer.Option(help="Candidates of prompt lookup.")] = 10,
    only: Annotated[list[str] | None, typer.Option(help="Ways of decoding, by name.")] = None,
    stop_at_end: Annotated[bool, typer.Option(help="End where the model ends.")] = True,
    sweep: Annotated[str | None, typer.Option(help="context, output, batch, heads, nodes.")] = None,
    at: Annotated[str | None, typer.Option(help="The sweep's values, with commas between.")] = None,
    seed: int = 0,
) -> None:
    """Measure ways of decoding side by side; exits with 1 if a text differs that must not."""
    from modeling_lmtp.conversion.saving import check_output_file

    from .bench_pictures import check_pictures, draw_bench
    from .bench_run import run_bench
    from .bench_settings import BenchSettings

    settings = BenchSettings(
        batch_sizes=parse_numbers("--batch-sizes", batch_sizes),
        dtypes=tuple(dtypes.split(",")),
        modes=tuple(modes.split(",")),
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        per_kind=per_kind,
        draft_nodes=draft_nodes,
        lookup_tokens=lookup_tokens,
        only=tuple(only) if only else None,
        stop_at_end=stop_at_end,
        seed=seed,
        sweep=sweep,
        at=parse_numbers("--at", at) if at else None,
    )
    for path in (output, picture):
        if path is not None:
            check_output_file(path)
    if picture is not None:
        check_pictures()

    def keep(record: dict[str, Any]) -> None:
        if output is not None:
            output.write_text(json.dumps(record, indent=1) + "\n")

    record = run_bench(
        checkpoint,
        prompts,
        settings,
        console,
        against=against or (),
        assistant=assistant,
        keep=keep,
    )
    if picture is not None:
        draw_bench(record, picture)
    if any(row["errors"] for row in record["rows"]):
        raise typer.Exit(1)


@app.command()
@reports_errors
def tune(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id with leap heads.")],
    answers: Annotated[Path, typer.Option(help="Held-out answers of `lmtp distill`.")],
    batch_sizes: Annotated[str, typer.Option(help="With commas between.")] = "1,2,4,8",
    num_answers: Annotated[int, typer.Option(min=1)] = 64,
    bad_rows: BadRows = "refuse",
    dtype: Dtype = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder, if not the checkpoint's.")] = None,
) -> None:
    """Find the draft that is fastest on this device, per batch size, or none where drafting loses."""
    from .tune_run import run_tune

    run_tune(
        checkpoint,
        answers,
        console,
        dtype=dtype,
        batch_sizes=parse_numbers("--batch-sizes", batch_sizes),
        num_answers=num_answers,
        bad_rows=bad_rows,
        output=output,
    )


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes whole numbers such as 1,2,4; got {text!r}.") from error
