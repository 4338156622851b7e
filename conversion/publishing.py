"""`lmtp publish` and `lmtp card`: from a checkpoint to a repository that anyone can load."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .cards import CardFacts, build_card, write_card
from .forms import Form, check_hub_id, form_of
from .prompts import render_prompt
from .repository import CHECK_PROMPT, assemble, check_repository
from .uploading import upload


@dataclass(frozen=True)
class Destination:
    """Where to upload, and how, see `uploading.upload`."""

    private: bool | None = None
    revision: str | None = None
    token: str | None = None
    replace: bool = False


def publish(
    source: Path,
    facts: CardFacts,
    *,
    form: Form | None = None,
    results: Sequence[Path] = (),
    base_model: str | None = None,
    base_revision: str | None = None,
    base_folder: Path | None = None,
    max_shard_size: str | None = None,
    destination: Destination | None = None,
    show: Callable[[dict[str, int]], None] = lambda sizes: None,
) -> CommitInfo | None:
    """Assemble a repository, try it in a clean process, and upload it if told where to.

    All is made in a temporary folder: the source is only read, and what fails leaves nothing behind.

    Args:
        source: a checkpoint with leap heads, or an adapter of one.
        facts: for the card.
        form: of the repository; the source's own by default.
        results: measured figures for the card.
        base_model, base_revision, base_folder, max_shard_size: see `repository.assemble`.
        destination: without one, nothing is uploaded.
        show: is called with the size in bytes of each file, before any upload.

    Returns:
        The commit, or None if nothing was uploaded.

    Raises:
        ValueError: the checkpoint, its card or the destination is not as it must be.
        OSError, RuntimeError: the repository does not load, or cannot be uploaded.
    """
    check_hub_id(facts.repo_id, "REPO_ID")
    if destination is not None:
        HfApi(token=destination.token).whoami()  # a bad token is known before all the work
    form = form or form_of(source)
    with tempfile.TemporaryDirectory(prefix="lmtp-publish-") as scratch:
        folder = Path(scratch)
        model, tokenizer = assemble(
            source,
            folder,
            form,
            base_model=base_model,
            base_revision=base_revision,
            base_folder=base_folder,
            max_shard_size=max_shard_size,
        )
        write_card(folder, build_card(folder, facts, results))
        prompt_ids = render_prompt(tokenizer, CHECK_PROMPT)
        check_repository(folder, form, model, prompt_ids, base_folder)
        del model
        show({path.name: path.stat().st_size for path in sorted(folder.iterdir())})
        if destination is None:
            return None
        return upload(
            folder,
            facts.repo_id,
            tag=facts.tag,
            private=destination.private,
            revision=destination.revision,
            token=destination.token,
            replace=destination.replace,
        )
