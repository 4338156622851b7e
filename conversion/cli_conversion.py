"""The commands that change a checkpoint's form: convert, merge and export."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_base import (
    Dtype,
    Offsets,
    app,
    console,
    parse_offsets,
    reports_errors,
)


@app.command()
@reports_errors
def convert(
    source: Annotated[str, typer.Argument(help="Folder, file or Hub id with the heads.")],
    output: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    backbone: Annotated[
        str | None, typer.Option(help="Their backbone, unless their config.json names it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of SOURCE, on the Hub.")] = None,
    leap_stride: Annotated[
        int | None, typer.Option(help="By default Medusa's 1, or what config.json says.")
    ] = None,
    leap_offsets: Offsets = None,
    num_heads: Annotated[int | None, typer.Option(help="Take the first so many.")] = None,
    check_leap: Annotated[
        bool, typer.Option(help="Check the offsets on the backbone's own text.")
    ] = True,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for that text, .jsonl or .jsonl.gz.")
    ] = None,
    field: str = "prompt",
    dtype: Dtype = "auto",
) -> None:
    """Make a checkpoint of Medusa heads, or of heads trained by the official L-MTP code."""
    from .converting import convert_heads

    report = convert_heads(
        source,
        output,
        backbone=backbone,
        revision=revision,
        leap_offsets=parse_offsets(leap_offsets),
        leap_stride=leap_stride,
        num_heads=num_heads,
        dtype=dtype,
        check_leap=check_leap,
        prompts=None if prompts is None else (prompts, field),
    )
    for note in report.notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
    console.print(
        f"Saved {len(report.leap_offsets)} heads ({report.layout} layout, offsets "
        f"{report.leap_offsets}, {'shared' if report.share_lm_head else 'own'} unembeddings) with "
        f"their backbone in {output}.",
        markup=False,
        soft_wrap=True,
    )


@app.command()
@reports_errors
def merge(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter or checkpoint.")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[
        str | None, typer.Option(help="The adapter's checkpoint, unless it names the right one.")
    ] = None,
    drop_heads: Annotated[
        bool, typer.Option("--drop-heads", help="Save the plain backbone, for any server.")
    ] = False,
    dtype: Dtype = "auto",
) -> None:
    """Fold an adapter into a full checkpoint, or drop the heads and keep the plain backbone."""
    from .merging import merge as merge_checkpoint

    merge_checkpoint(source, output, base=base, drop_heads=drop_heads, dtype=dtype)
    what = "the plain backbone" if drop_heads else "the merged checkpoint"
    console.print(f"Saved {what} in {output}.", markup=False, soft_wrap=True)


@app.command()
@reports_errors
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id; offsets 2, 3, 4, …")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    format: Annotated[str, typer.Option(help="medusa or vllm.")] = "medusa",
) -> None:
    """Write heads in Medusa's layout, as serving engines read it."""
    from .exporting import export_heads

    notes = export_heads(checkpoint, output, format)
    for note in notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
    console.print(f"Saved the heads in {output}.", markup=False, soft_wrap=True)
