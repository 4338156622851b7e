"""`lmtp publish`: from a checkpoint to a Hub repository that anyone can load."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from huggingface_hub import CommitInfo, HfApi
from rich.table import Table

from .cards import CardOptions, build_card, write_card
from .command_line import console
from .options import Options
from .prompts import render_prompt
from .repository import CHECK_PROMPT, Form, assemble, check_hub_id, check_repository, form_of
from .uploading import upload
from .vllm_serving import serving_notes


@dataclass
class PublishOptions(Options):
    """What to publish."""

    title: ClassVar[str] = "repository"

    source: Path = field(metadata={"help": "Folder of a checkpoint or adapter."})
    repo_id: str = field(metadata={"help": "The repository on the Hub, such as me/my-model-lmtp."})
    form: Form | None = field(
        default=None,
        metadata={
            "help": "Publish a full model, heads alone, or an adapter; SOURCE's form by default."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base model, if SOURCE does not name it."}
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "Commit of the base model, if SOURCE does not pin it."}
    )
    base_folder: Path | None = field(
        default=None, metadata={"help": "Local copy of the base model, to check with."}
    )
    max_shard_size: str | None = field(
        default=None, metadata={"help": "Split the weights into files of this size, such as 5GB."}
    )
    card_only: bool = field(
        default=False, metadata={"help": "Write the card as README.md of SOURCE, and stop."}
    )


@dataclass
class UploadOptions(Options):
    """Whether and how to upload."""

    title: ClassVar[str] = "upload"

    yes: bool = field(
        default=False, metadata={"help": "Upload; without it nothing leaves this machine."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch; main by default."})
    private: bool = field(
        default=False, metadata={"help": "Make the repository private if it is new."}
    )
    replace: bool = field(
        default=False, metadata={"help": "Replace other files that the branch holds."}
    )
    token: str | None = field(
        default=None, metadata={"help": "Hub token; that of `hf auth login` by default."}
    )


def publish(options: PublishOptions, card: CardOptions, destination: UploadOptions) -> None:
    """Publish a checkpoint on the Hub: code, weights, tokenizer, model card and record.

    The repository is assembled in a temporary folder and loaded in a clean process without this
    package. With --yes it is then uploaded in one commit.

    Examples:
      lmtp publish OUT me/model --license apache-2.0 --language en          check everything
      lmtp publish OUT me/model --license apache-2.0 --language en --yes    and upload it
    """
    if options.card_only:
        path = write_card(options.source, build_card(options.source, options.repo_id, card))
        console.print(f"Wrote {path}.", markup=False, highlight=False)
        return
    commit = publish_checkpoint(options, card, destination, _print_files)
    if commit is None:
        text = f"Nothing was uploaded. With --yes, these files go to {options.repo_id}."
    else:
        text = f"{commit.commit_url}\nrevision {commit.oid}, tagged {card.tag}"
    console.print(text, markup=False, highlight=False)


def publish_checkpoint(
    options: PublishOptions,
    card: CardOptions,
    destination: UploadOptions,
    show: Callable[[dict[str, int]], None] = lambda sizes: None,
) -> CommitInfo | None:
    """Assemble a repository, try it in a clean process, and upload it if `destination.yes`.

    Everything is written to a temporary folder: the source is only read, and a failure leaves nothing
    behind.

    Args:
        options, card, destination: see their fields.
        show: called with the size in bytes of each file, before any upload.

    Returns:
        The commit, or None if nothing was uploaded.

    Raises:
        ValueError: the checkpoint, its card or the destination is invalid.
        OSError, RuntimeError: the repository does not load, or cannot be uploaded.
    """
    check_hub_id(options.repo_id, "REPO_ID")
    if destination.yes:
        HfApi(token=destination.token).whoami()  # fail on a bad token before all the work
    form = options.form or form_of(options.source)
    with tempfile.TemporaryDirectory(prefix="lmtp-publish-") as scratch:
        folder = Path(scratch)
        model, tokenizer = assemble(
            options.source,
            folder,
            form,
            base_model=options.base_model,
            base_revision=options.base_revision,
            base_folder=options.base_folder,
            max_shard_size=options.max_shard_size,
        )
        write_card(folder, build_card(folder, options.repo_id, card))
        prompt_ids = render_prompt(tokenizer, CHECK_PROMPT)
        check_repository(folder, form, model, prompt_ids, options.base_folder)
        del model
        for note in serving_notes(folder):
            console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
        show({path.name: path.stat().st_size for path in sorted(folder.iterdir())})
        if not destination.yes:
            return None
        return upload(
            folder,
            options.repo_id,
            tag=card.tag,
            private=destination.private or None,
            revision=destination.revision,
            token=destination.token,
            replace=destination.replace,
        )


def _print_files(sizes: dict[str, int]) -> None:
    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    table.add_row("total", f"{sum(sizes.values()):,}")
    console.print(table)
