"""The commands that show models to others: card, publish and refresh."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .cli_base import app, console, reports_errors
from .forms import Form

if TYPE_CHECKING:
    from .refreshing import Refreshed

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
    from .cards import CardFacts, build_card, write_card

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
    from .cards import CardFacts
    from .publishing import Destination
    from .publishing import publish as publish_checkpoint

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


@app.command()
@reports_errors
def refresh(
    source: Annotated[
        str,
        typer.Argument(
            metavar="REPO_OR_FOLDER", help="A repository, such as me/model, or a folder."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="The branch; main by default.")] = None,
    tag: Annotated[str | None, typer.Option(help="A new tag for the new commit.")] = None,
    base_folder: Annotated[
        Path | None,
        typer.Option(help="Of leap heads only, a copy of the base model to check with."),
    ] = None,
    token: Annotated[str | None, typer.Option(help="That of `hf auth login` by default.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Replace the code.")] = False,
) -> None:
    """Try the installed code in a published checkpoint, and with --yes replace the code there."""
    from modeling_lmtp import __version__

    from .refreshing import Branch
    from .refreshing import refresh as refresh_checkpoint

    done = refresh_checkpoint(
        source,
        branch=Branch(revision, tag, token),
        base_folder=base_folder,
        write=yes,
        show=_print_changes,
    )
    if not done.changes:
        _print(f"{source} has the code of modeling-lmtp {__version__} already. Nothing to do.")
    elif not yes:
        _print(f"Nothing was changed. Add --yes to change these files of {source}.")
    elif done.commit is None:
        _print(f"{source} now has the code of modeling-lmtp {__version__}.")
    else:
        tagged = f", tagged {tag}" if tag else ""
        _print(f"{done.commit.commit_url}\nrevision {done.commit.oid}{tagged}")
    if done.old_tags:
        _print(_about_old_tags(source, done, tag))


def _about_old_tags(repo_id: str, done: "Refreshed", tag: str | None) -> str:
    commit = done.commit.oid if done.commit else done.head
    if tag and done.changes:
        advice = f"name {tag} there instead"
    elif done.changes and not done.commit:
        advice = "tag the new commit with --tag NAME and name that tag there instead"
    else:
        command = f"hf repos tag create {repo_id} NAME --revision {commit}"
        advice = f"tag the new code with `{command}` and name that tag there instead"
    return (
        f"Tags are not moved, and still have other code: {', '.join(done.old_tags)}. If the card tells "
        f"readers to load one of them, {advice}."
    )


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_changes(changes: dict[str, str]) -> None:
    table = Table("file", "change")
    for name, change in changes.items():
        table.add_row(name, change)
    console.print(table)


def _print_files(sizes: dict[str, int]) -> None:
    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    table.add_row("all", f"{sum(sizes.values()):,}")
    console.print(table)
