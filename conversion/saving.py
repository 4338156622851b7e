"""Saves a checkpoint, completely or not at all, with a record of how it was made."""

import copy
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

PROVENANCE = "provenance.json"
RECORDED_PACKAGES = ("modeling-lmtp", "torch", "transformers", "peft", "accelerate", "safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not a JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def check_output_folder(output: Path) -> None:
    """Raise a ValueError if `output` holds anything: no command overwrites files."""
    if output.resolve() == Path.cwd():
        raise ValueError(f"{output} is the current folder. Name a new folder for the output.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"{output} already holds something. Choose another output, or empty it first."
        )


def run_folder_of(output: Path, command: str) -> Path:
    """Return the folder next to `output` that holds the run of `command` until `output` is saved.

    Raises:
        ValueError: `output` holds something; the message says so if it is the finished checkpoint of a
            run that was killed before it deleted its folder.
    """
    if output.resolve() == Path.cwd():  # "." has no name to derive the run folder's name from
        check_output_folder(output)
    run_folder, file = output.with_name(f"{output.name}.training"), output / PROVENANCE
    record = read_json(file) if file.is_file() else {}
    if run_folder.exists() and record.get("command") == command:
        raise ValueError(
            f"{output} is finished, and {run_folder} is left over from that run: delete it. To train again "
            "choose another output."
        )
    check_output_folder(output)
    return run_folder


def check_output_file(path: Path) -> None:
    """Raise a ValueError unless `path` can be written; to be called before the work, not after it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file, such as {path / 'result'}.")
    if not path.parent.is_dir():
        raise ValueError(
            f"{path} cannot be written: there is no folder {path.parent}. Create it, or name another."
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied. Choose another path.")


def check_settings(settings: GenerationConfig, **changes: Any) -> None:
    """Raise a ValueError if generation settings cannot be saved; to be called before the work.

    Transformers refuses settings that contradict each other, newer releases only if they were modified. So
    this saves a copy.

    Args:
        settings: a model's `generation_config`.
        changes: settings that will change before they are saved.
    """
    copied = copy.deepcopy(settings)
    for name, value in changes.items():
        setattr(copied, name, value)
    with tempfile.TemporaryDirectory() as folder:
        try:
            copied.save_pretrained(folder)
        except ValueError as error:
            reasons = [line for line in str(error).splitlines() if line.startswith("- ")]
            raise ValueError(
                f"The model's generation settings could not be saved: {' '.join(reasons) or error} Correct "
                "generation_config.json in the model's folder, or model.generation_config, first."
            ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    installed = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write into, and rename it to `output` at the end of the block if nothing failed.

    A full disk or a kill thus leaves no incomplete `output`.

    Raises:
        ValueError: `output` holds something.
        OSError: the disk is full.
    """
    check_output_folder(output)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except SafetensorError as error:  # safetensors raises its own error on a full disk
        raise OSError(
            f"{output} could not be saved: {error}. Free some space on that disk and start again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_record(folder: Path, record: dict[str, Any], config: Any) -> None:
    """Write `provenance.json`: `record`, the backbone of an `LMTPConfig`, and the versions."""
    record = {
        **record,
        "base_model": config.base_model_name_or_path,
        "base_model_revision": config.base_model_revision,
        "versions": versions(),
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")


def save_checkpoint(
    model: LMTPForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
    record: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Save model, tokenizer, code and `provenance.json` in `output`, completely or not at all.

    Args:
        model: what to save.
        tokenizer: its tokenizer, if it has one.
        output: a folder that does not exist yet, or is empty.
        record: how the checkpoint was made; versions and backbone are added.
        write_more: called with the folder, to write further files.

    Raises:
        ValueError: `output` holds something.
        OSError: the disk is full.
    """
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_record(folder, record, model.config)
        if write_more is not None:
            write_more(folder)
