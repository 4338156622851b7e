"""`lmtp refresh`: replaces the code of a published checkpoint with the installed version's."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitRefs
from rich.table import Table
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from modeling_lmtp import LMTPForCausalLM, __version__

from .command_line import console
from .loading import load_tokenizer, reading
from .options import Options
from .prompts import render_prompt
from .repository import CHECK_PROMPT, Form, check_repository, check_tokenizer, form_of
from .saving import read_json
from .shipped_code import (
    CONFIG,
    changes_between,
    code_only,
    hashes_at,
    hashes_in,
    is_code,
    replace_files,
    write_code,
)
from .uploading import check_new_tag, upload_changes

ADAPTER_CONFIG = "adapter_config.json"
# Subfolders, and copies of the weights in other formats
NOT_CHECKED = ("*/*", "*.gguf", "*.onnx", "*.bin")
PROMPT_IDS = [1, 2, 3, 4, 5]  # for a checkpoint without a tokenizer
ADVICE = "Nothing was changed. Please report this, and which checkpoint it is."

Show = Callable[[dict[str, str]], None]


@dataclass
class RefreshOptions(Options):
    """Which checkpoint to refresh, and how."""

    source: str = field(
        metadata={"help": "A repository on the Hub, such as me/model, or a folder."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch of the repository; main by default."}
    )
    tag: str | None = field(default=None, metadata={"help": "New tag for the new commit."})
    base_folder: Path | None = field(
        default=None,
        metadata={
            "help": "Local copy of the base model of a heads-only checkpoint, to check with."
        },
    )
    token: str | None = field(
        default=None, metadata={"help": "Hub token; that of `hf auth login` by default."}
    )
    yes: bool = field(
        default=False, metadata={"help": "Replace the code; without it nothing is changed."}
    )


@dataclass(frozen=True)
class Refreshed:
    """What a refresh changed, or would change.

    Args:
        changes: `added`, `replaced` or `removed` by file name; empty if the code is up to date.
        head: the commit of the repository that was compared.
        old_tags: the tags of the repository whose code is not this version's.
        commit: the new commit, if one was uploaded.
    """

    changes: dict[str, str]
    head: str | None = None
    old_tags: tuple[str, ...] = ()
    commit: CommitInfo | None = None


def refresh(options: RefreshOptions) -> None:
    """Replace the code of a published checkpoint with that of the installed version.

    Weights, settings, tokenizer, card and record stay as they are. The new code is first loaded in a
    clean process and compared; with --yes it then replaces the old code, on the Hub in one commit.

    Examples:
      lmtp refresh me/my-model-lmtp                  show what would change
      lmtp refresh me/my-model-lmtp --yes --tag v2   change it
    """
    done = refresh_checkpoint(options, _print_changes)
    source, code = options.source, f"the code of modeling-lmtp {__version__}"
    if not done.changes:
        _print(f"{source} has {code} already. Nothing to do.")
    elif not options.yes:
        _print(f"Nothing was changed. Add --yes to change these files of {source}.")
    elif done.commit is None:
        _print(f"{source} now has {code}.")
    else:
        tagged = f", tagged {options.tag}" if options.tag else ""
        _print(f"{done.commit.commit_url}\nrevision {done.commit.oid}{tagged}")
    if done.old_tags:
        _print(_about_old_tags(source, done, options.tag))


def _about_old_tags(repo_id: str, done: Refreshed, tag: str | None) -> str:
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
    console.print(text, markup=False, highlight=False)


def _print_changes(changes: dict[str, str]) -> None:
    table = Table("file", "change")
    for name, change in changes.items():
        table.add_row(name, change)
    console.print(table)


def refresh_checkpoint(options: RefreshOptions, show: Show = lambda changes: None) -> Refreshed:
    """Update the code of a checkpoint, after trying it in a clean process.

    `config.json` stays as it is too, unless its `auto_map` names other classes than this version's.

    Args:
        options: see its fields. In a folder all files are replaced or none, in a repository one commit
            replaces them.
        show: called with the changes, before any is made.

    Returns:
        The changes, and where they went.

    Raises:
        ValueError: the source is an adapter or has no leap heads, the branch does not exist or the tag
            does, or the new code does not give the model's logits and text.
        OSError, RuntimeError: the checkpoint does not load with the new code, or cannot be changed.
    """
    if not Path(options.source).exists():
        return _refresh_repository(options, show)
    if options.revision or options.tag:
        raise ValueError(
            f"{options.source} is on this machine; --revision and --tag are for a repository on the Hub."
        )
    return _refresh_folder(options, show)


def _refresh_folder(options: RefreshOptions, show: Show) -> Refreshed:
    folder = Path(options.source)
    form = _form_with_code(folder, options.source)
    with tempfile.TemporaryDirectory(prefix="lmtp-refresh-") as scratch:
        updated = Path(scratch)
        write_code(updated, folder / CONFIG)
        changes = changes_between(hashes_in(folder), hashes_in(updated))
        if changes:
            _check(folder, updated, form, options.base_folder)
            show(changes)
            if options.yes:
                replace_files(folder, updated, changes)
    return Refreshed(changes)


def _refresh_repository(options: RefreshOptions, show: Show) -> Refreshed:
    repo_id = options.source
    api, commit = HfApi(token=options.token), None
    refs = _find_refs(api, repo_id)
    if options.yes:
        api.whoami()  # fail on a missing token before all the work
    check_new_tag(refs, repo_id, options.tag)
    head = _find_head(refs, repo_id, options.revision or "main")
    where = {"repo_id": repo_id, "revision": head, "token": options.token}
    source = Path(snapshot_download(**where, allow_patterns=[CONFIG, ADAPTER_CONFIG]))
    form = _form_with_code(source, repo_id)
    with tempfile.TemporaryDirectory(prefix="lmtp-refresh-") as scratch:
        updated = Path(scratch)
        write_code(updated, source / CONFIG)
        changes = changes_between(hashes_at(api, repo_id, head), hashes_in(updated))
        old_tags = _tags_with_other_code(api, repo_id, refs, updated)
        if changes:
            snapshot_download(**where, ignore_patterns=list(NOT_CHECKED))  # into `source`
            _check(source, updated, form, options.base_folder)
            show(changes)
            if options.yes:
                commit = _upload(updated, options, changes, head)
    return Refreshed(changes, head, old_tags, commit)


def _form_with_code(folder: Path, name: str) -> Form:
    form = form_of(folder, name)
    if form == "adapter":
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"{name} is an adapter and has no code of its own: its base model brings the code. Refresh "
            f"{base!r}. An adapter that pins a commit of it stays with the old code until it is published "
            "again with the new commit as --base_revision."
        )
    return form


def _check(source: Path, updated: Path, form: Form, base_folder: Path | None) -> None:
    """Try the new code in a clean process, with the checkpoint's other files linked beside it."""
    for path in source.iterdir():
        if path.is_file() and not is_code(path.name) and path.name != CONFIG:
            _link(path, updated / path.name)
    given = {"backbone": base_folder} if base_folder and form == "heads" else {}
    with reading(updated):
        model = LMTPForCausalLM.from_pretrained(updated, **given).eval()
    prompt_ids = PROMPT_IDS
    if (updated / TOKENIZER_CONFIG_FILE).exists():
        tokenizer = load_tokenizer(updated)
        check_tokenizer(tokenizer, model)
        prompt_ids = render_prompt(tokenizer, CHECK_PROMPT)
    check_repository(updated, form, model, prompt_ids, base_folder, ADVICE)


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.resolve())
    except OSError:  # Windows lets only some users make links
        shutil.copyfile(path, link)


def _find_refs(api: HfApi, repo_id: str) -> GitRefs:
    nothing = f"There is no folder {repo_id!r} on this machine, and "
    try:
        return api.list_repo_refs(repo_id)
    except GatedRepoError:  # is a RepositoryNotFoundError, and says how to get access
        raise
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{nothing}no repository of that name on the Hub that you may read. Check the name, or log "
            "in with `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{nothing}no repository on the Hub can have that name.") from error


def _find_head(refs: GitRefs, repo_id: str, branch: str) -> str:
    heads: dict[str, str] = {known.name: known.target_commit for known in refs.branches}
    if branch not in heads:
        raise ValueError(
            f"{repo_id} has no branch {branch!r}. Its branches are: {', '.join(sorted(heads))}. Tags and "
            "commits cannot be changed."
        )
    return heads[branch]


def _tags_with_other_code(
    api: HfApi, repo_id: str, refs: GitRefs, updated: Path
) -> tuple[str, ...]:
    code = code_only(hashes_in(updated))
    return tuple(
        tag.name
        for tag in refs.tags
        if code_only(hashes_at(api, repo_id, tag.target_commit)) != code
    )


def _upload(
    updated: Path, options: RefreshOptions, changes: dict[str, str], head: str
) -> CommitInfo:
    return upload_changes(
        updated,
        options.source,
        changes,
        branch=options.revision or "main",
        head=head,
        message=f"Replace the code with that of modeling-lmtp {__version__}",
        tag=options.tag,
        token=options.token,
    )
