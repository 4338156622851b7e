"""Uploads a folder to the Hub in one commit; a failure leaves the Hub as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import GitRefs, RepoFile
from huggingface_hub.utils.sha import git_hash

from .saving import file_sha256

HUB_FILE = ".gitattributes"  # the Hub adds it to every new repository


def upload(
    folder: Path,
    repo_id: str,
    *,
    tag: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    replace: bool = False,
    message: str = "Upload a model with leap heads",
) -> CommitInfo:
    """Upload all files of a folder in one commit, and tag it.

    Args:
        folder: a folder without subfolders.
        repo_id: the repository; created if it does not exist.
        tag: a new tag for the commit.
        private: passed to `HfApi.create_repo`.
        revision: the branch, created from `main` if it does not exist; `main` by default.
        token: the Hub token; that of `hf auth login` by default.
        replace: delete or replace the other files of the branch.
        message: the commit message.

    Raises:
        ValueError: the repository holds other files and `replace` is false, or it has that tag.
        OSError: an error of huggingface_hub.
        RuntimeError: the connection failed, or the commit was made but not its tag.
    """
    api, branch = HfApi(token=token), revision or "main"
    with _undoing(repo_id) as undo:
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
            undo.append(lambda: api.delete_repo(repo_id))
        refs = api.list_repo_refs(repo_id)
        check_new_tag(refs, repo_id, tag)
        if branch not in {known.name for known in refs.branches}:
            api.create_branch(repo_id, branch=branch)
            undo.append(lambda: api.delete_branch(repo_id, branch=branch))
        head = api.repo_info(repo_id, revision=branch).sha
        others = other_files(api, repo_id, head, folder)
        if others and not replace:
            raise ValueError(
                f"{repo_id} holds other content: {', '.join(sorted(others))}. Choose another repository, "
                "or replace it with --replace."
            )
        paths = sorted(path for path in folder.iterdir())
        kept = {path.name for path in paths}
        operations: list[Any] = [CommitOperationAdd(path.name, path) for path in paths]
        operations += [CommitOperationDelete(name) for name in sorted(others - kept)]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=branch, parent_commit=head
        )
        if undo:  # if tagging fails, delete the new repository or branch too
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
            return commit
    _tag(api, repo_id, commit, tag)
    return commit


def check_new_tag(refs: GitRefs, repo_id: str, tag: str | None) -> None:
    """Raise a ValueError if a repository has a tag of that name."""
    if tag in {known.name for known in refs.tags}:
        raise ValueError(
            f"{repo_id} has a tag {tag!r} already, and cards may refer to it. Choose another with --tag."
        )


def upload_changes(
    folder: Path,
    repo_id: str,
    changes: dict[str, str],
    *,
    branch: str,
    head: str,
    message: str,
    tag: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Change some files of a branch in one commit, if nobody has committed to it since.

    Args:
        folder: holds the new files.
        repo_id, branch: the branch to change.
        changes: for each changed file, whether it is added, replaced or removed.
        head: the commit that the branch must still be at.
        message: the commit message.
        tag: a new tag for the commit.
        token: the Hub token; that of `hf auth login` by default.

    Raises:
        OSError: an error of huggingface_hub.
        RuntimeError: the commit was made, but not its tag.
    """
    api = HfApi(token=token)
    operations = [
        CommitOperationDelete(name)
        if change == "removed"
        else CommitOperationAdd(name, folder / name)
        for name, change in changes.items()
    ]
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=branch, parent_commit=head
    )
    if tag is not None:
        _tag(api, repo_id, commit, tag)
    return commit


def _tag(api: HfApi, repo_id: str, commit: CommitInfo, tag: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    except Exception as error:
        raise RuntimeError(
            f"The commit {commit.oid} is in {repo_id}, but tagging it {tag!r} failed ({error}). Tag it "
            f"with `hf repos tag create {repo_id} {tag} --revision {commit.oid}`."
        ) from error


def other_files(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> set[str]:
    """Return the names of a repository's files that a folder lacks, or has with other content."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    remote = [file for file in tree if isinstance(file, RepoFile) and file.path != HUB_FILE]
    return {file.path for file in remote if not _is_same(file, folder / file.path)}


def _is_same(remote: RepoFile, local: Path) -> bool:
    if not local.is_file() or remote.size != local.stat().st_size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file_sha256(local)
    return remote.blob_id == git_hash(local.read_bytes())


@contextmanager
def _undoing(repo_id: str) -> Iterator[list[Any]]:
    """Yield a list of functions; if the block fails, call them, the last first."""
    undo: list[Any] = []
    try:
        yield undo
    except BaseException as error:
        for call in reversed(undo):
            call()
        if isinstance(error, ValueError | OSError) or not isinstance(error, Exception):
            raise
        # Connection errors are of whichever HTTP library huggingface_hub uses
        reason = error.__cause__ or error
        raise RuntimeError(f"The upload to {repo_id} failed: {reason}") from error
