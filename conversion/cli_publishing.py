"""The commands that show models to others: card and publish."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modeling_lmtp.conversion.cli_base import app, console, reports_errors
from modeling_lmtp.conversion.forms import Form

License = Annotated[str, typer.Option(help="The Hub's identifier, such as apache-2.0.")]
Languages = Annotated[list[str], typer.Option(help="ISO 639 code; may be given several times.")]
Datasets = Annotated[
    list[str] | None, typer.Option(help="Hub id of training data; may be given several times.")
]
Results = Annotated[
    list[Path] | None, typer.Option(help="What `lmtp bench` wrote; may be given several times.")
]
Tag = Annotated[str, typer.Option(help="The revision that the card tells its readers to load.")]


@app.command()
@reports_errors
def card(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint or adapter.")],
    repo_id: Annotated[str, typer.Option(help="Where it is, or will be, on the Hub.")],
    license: License,
    language: Languages,
    dataset: Datasets = None,
    results: Results = None,
    tag: Tag = "v1",
) -> None:
    """Write the model card of a checkpoint as its README.md."""
    from modeling_lmtp.conversion.cards import CardFacts, build_card, write_card

    facts = CardFacts(repo_id, license, language, dataset or (), tag)
    console.print(f"Wrote {write_card(checkpoint, build_card(checkpoint, facts, results or ()))}.")


@app.command()
@reports_errors
def publish(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint or adapter.")],
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub, such as me/model.")],
    license: License,
    language: Languages,
    form: Annotated[
        Form | None, typer.Option(help="What to publish; the folder's own form by default.")
    ] = None,
    dataset: Datasets = None,
    results: Results = None,
    tag: Tag = "v1",
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, if SOURCE does not say.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Its commit.")] = None,
    base_folder: Annotated[
        Path | None, typer.Option(help="A copy of the base model to check with.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Such as 5GB.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; main by default.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what is there.")] = False,
    token: Annotated[str | None, typer.Option(help="That of `hf auth login` by default.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload.")] = False,
) -> None:
    """Assemble a repository, try it in a clean process, and with --yes upload it in one commit."""
    from modeling_lmtp.conversion.cards import CardFacts
    from modeling_lmtp.conversion.publishing import Destination
    from modeling_lmtp.conversion.publishing import publish as publish_checkpoint

    commit = publish_checkpoint(
        source,
        CardFacts(repo_id, license, language, dataset or (), tag),
        form=form,
        results=results or (),
        base_model=base_model,
        base_revision=base_revision,
        base_folder=base_folder,
        max_shard_size=max_shard_size,
        destination=Destination(private or None, revision, token, replace) if yes else None,
        show=_print_files,
    )
    if commit is None:
        console.print(f"Nothing was uploaded. With --yes, these files go to {repo_id}.")
    else:
        console.print(f"{commit.commit_url}\nrevision {commit.oid}, tagged {tag}", soft_wrap=True)


def _print_files(sizes: dict[str, int]) -> None:
    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    table.add_row("all", f"{sum(sizes.values()):,}")
    console.print(table)
