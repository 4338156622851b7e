"""The code that travels with a checkpoint: finds its files and replaces them in a folder."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from transformers.dynamic_module_utils import custom_object_save

from modeling_lmtp import LMTPConfig, LMTPForCausalLM
from modeling_lmtp.pretrained_lmtp import AUTO_MAP

from .saving import read_json

CODE = "_lmtp.py"  # how the names of shipped files end
CONFIG = "config.json"
ADDED, REPLACED, REMOVED = "added", "replaced", "removed"


def is_code(name: str) -> bool:
    """Return whether a file of a checkpoint is shipped code, judging by its name."""
    return name.endswith(CODE) and "/" not in name


def write_code(folder: Path, config: Path) -> None:
    """Write this version's code, as `save_pretrained` does, and a configuration that names its classes.

    Args:
        folder: where to write.
        config: the checkpoint's `config.json`; copied unchanged if it names these classes already.

    Raises:
        ValueError: `config` is not a JSON object.
    """
    for shipped in (LMTPForCausalLM, LMTPConfig):
        custom_object_save(shipped, folder)
    settings = read_json(config)
    if settings.get("auto_map") == AUTO_MAP:
        shutil.copyfile(config, folder / CONFIG)
        return
    text = json.dumps({**settings, "auto_map": AUTO_MAP}, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def hashes_in(folder: Path) -> dict[str, str]:
    """Return git's hash of each code file in a folder, and of its configuration, by file name."""
    paths = [*folder.glob(f"*{CODE}"), folder / CONFIG]
    return {path.name: git_hash(path.read_bytes()) for path in paths}


def hashes_at(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """Return git's hash of each code file in a repository, and of its configuration, by file name."""
    files = [
        file
        for file in api.list_repo_tree(repo_id, revision=revision)
        if isinstance(file, RepoFile)
    ]
    return {file.path: file.blob_id for file in files if is_code(file.path) or file.path == CONFIG}


def code_only(hashes: dict[str, str]) -> dict[str, str]:
    """Return hashes without that of the configuration."""
    return {name: sha for name, sha in hashes.items() if name != CONFIG}


def changes_between(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Return how files differ, by name: `added`, `replaced` or `removed`.

    Args:
        old, new: hashes by file name.
    """
    differing = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}

    def change(name: str) -> str:
        if name not in new:
            return REMOVED
        return REPLACED if name in old else ADDED

    return {name: change(name) for name in sorted(differing)}


def replace_files(folder: Path, updated: Path, changes: dict[str, str]) -> None:
    """Change some files of a folder, all or none.

    A kill in between leaves each file either old or new, never cut off; a second call completes the change.

    Args:
        folder: the folder to change.
        updated: holds the new files.
        changes: by file name, see `changes_between`.

    Raises:
        OSError: the folder cannot be written. It is unchanged.
    """
    scratch = folder / ".refresh.unfinished"  # inside, because renames do not cross file systems
    new, old = scratch / "new", scratch / "old"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        old.mkdir()
        for name, change in changes.items():
            if change != REMOVED:
                shutil.copyfile(updated / name, new / name)
            if change != ADDED:
                shutil.copy2(folder / name, old / name)
        with ExitStack() as undo:
            for name, change in changes.items():
                path = folder / name
                if change == ADDED:
                    undo.callback(path.unlink, missing_ok=True)
                else:
                    undo.callback((old / name).replace, path)
                if change == REMOVED:
                    path.unlink()
                else:
                    (new / name).replace(path)
            undo.pop_all()  # nothing failed: keep the changes
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
