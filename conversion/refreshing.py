"""`lmtp refresh`: replaces the code in a published checkpoint with the installed version's."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitRefs
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from modeling_lmtp import LMTPForCausalLM, __version__

from .forms import Form, form_of
from .loading import load_tokenizer
from .prompts import render_prompt
from .repository import CHECK_PROMPT, check_repository, check_tokenizer
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
# Subfolders, and the same weights in formats of other programs
NOT_CHECKED = ("*/*", "*.gguf", "*.onnx", "*.bin")
PROMPT_IDS = [1, 2, 3, 4, 5]  # of a checkpoint without a tokenizer
ADVICE = "Nothing was changed. Please report this, and which checkpoint it is."

Show = Callable[[dict[str, str]], None]


@dataclass(frozen=True)
class Branch:
    """Which branch of a repository to refresh, and how.

    Args:
        revision: its name; `main` by default.
        tag: names the new commit; must be new. There is none by default.
        token: the one that was saved with `hf auth login` by default.
    """

    revision: str | None = None
    tag: str | None = None
    token: str | None = None


@dataclass(frozen=True)
class Refreshed:
    """What a refresh changed, or would change.

    Args:
        changes: `added`, `replaced` or `removed` by file name; empty where nothing is to be done.
        head: of a repository, the commit that was compared.
        old_tags: of a repository, the tags whose code is not this version's.
        commit: what was uploaded, if anything was.
    """

    changes: dict[str, str]
    head: str | None = None
    old_tags: tuple[str, ...] = ()
    commit: CommitInfo | None = None


def refresh(
    source: str,
    *,
    branch: Branch | None = None,
    base_folder: Path | None = None,
    write: bool = False,
    show: Show = lambda changes: None,
) -> Refreshed:
    """Bring the code of a checkpoint up to date, once it has been tried in a clean process.

    Weights, settings, tokenizer, card and record stay as they are; so does `config.json`, unless its
    `auto_map` names other classes than this version's.

    Args:
        source: a folder, or a repository on the Hub.
        branch: of a repository; by default `main`, and the new commit gets no tag.
        base_folder: of a checkpoint with leap heads only, a copy of the base model to check with.
        write: replace the code: in a folder all files or none, in a repository in one commit.
        show: is called with the changes, before any is made.

    Returns:
        The changes, and where they went.

    Raises:
        ValueError: `source` is no checkpoint with leap heads or is an adapter, the branch does not exist
            or the tag does, or the new code does not give the model's logits and text.
        OSError, RuntimeError: the checkpoint does not load with the new code, or cannot be changed.
    """
    if not Path(source).exists():
        return _refresh_repository(source, branch or Branch(), base_folder, write, show)
    if branch is not None and (branch.revision or branch.tag):
        raise ValueError(
            f"{source} is on this machine; --revision and --tag are for a repository on the Hub."
        )
    return _refresh_folder(Path(source), base_folder, write, show)


def _refresh_folder(folder: Path, base_folder: Path | None, write: bool, show: Show) -> Refreshed:
    form = _form_with_code(folder, str(folder))
    with tempfile.TemporaryDirectory(prefix="lmtp-refresh-") as scratch:
        updated = Path(scratch)
        write_code(updated, folder / CONFIG)
        changes = changes_between(hashes_in(folder), hashes_in(updated))
        if changes:
            _check(folder, updated, form, base_folder)
            show(changes)
            if write:
                replace_files(folder, updated, changes)
    return Refreshed(changes)


def _refresh_repository(
    repo_id: str, branch: Branch, base_folder: Path | None, write: bool, show: Show
) -> Refreshed:
    api, commit = HfApi(token=branch.token), None
    refs = _find_refs(api, repo_id)
    if write:
        api.whoami()  # a missing token is known before all the work
    check_new_tag(refs, repo_id, branch.tag)
    head = _find_head(refs, repo_id, branch.revision or "main")
    where = {"repo_id": repo_id, "revision": head, "token": branch.token}
    source = Path(snapshot_download(**where, allow_patterns=[CONFIG, ADAPTER_CONFIG]))
    form = _form_with_code(source, repo_id)
    with tempfile.TemporaryDirectory(prefix="lmtp-refresh-") as scratch:
        updated = Path(scratch)
        write_code(updated, source / CONFIG)
        changes = changes_between(hashes_at(api, repo_id, head), hashes_in(updated))
        old_tags = _tags_with_other_code(api, repo_id, refs, updated)
        if changes:
            snapshot_download(**where, ignore_patterns=list(NOT_CHECKED))  # into `source`
            _check(source, updated, form, base_folder)
            show(changes)
            if write:
                commit = _upload(updated, repo_id, changes, branch, head)
    return Refreshed(changes, head, old_tags, commit)


def _form_with_code(folder: Path, name: str) -> Form:
    form = form_of(folder, name)
    if form is Form.ADAPTER:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"{name} is an adapter and has no code of its own: its base model brings the code. Refresh "
            f"{base!r}. An adapter that pins a commit of it stays with the old code until it is published "
            "again with the new commit as --base-revision."
        )
    return form


def _check(source: Path, updated: Path, form: Form, base_folder: Path | None) -> None:
    """Try the new code in a clean process, with the checkpoint's other files linked beside it."""
    for path in source.iterdir():
        if path.is_file() and not is_code(path.name) and path.name != CONFIG:
            _link(path, updated / path.name)
    given = {"backbone": base_folder} if base_folder and form is Form.HEADS else {}
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
    updated: Path, repo_id: str, changes: dict[str, str], branch: Branch, head: str
) -> CommitInfo:
    return upload_changes(
        updated,
        repo_id,
        changes,
        branch=branch.revision or "main",
        head=head,
        message=f"Replace the code with that of modeling-lmtp {__version__}",
        tag=branch.tag,
        token=branch.token,
    )
