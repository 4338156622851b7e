"""Read prompts from a dataset: on the Hub, or in a local folder or file.

It needs the package `datasets`: `pip install 'modeling-lmtp[datasets]'`.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_lmtp.conversion.prompts import Prompt, refuse

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write
_SAVE_TO_DISK_FILES = ("state.json", "dataset_dict.json")
DEFAULT_SPLIT = "train"
_USER_ROLES = ("user", "human")


@dataclass(frozen=True)
class DatasetSource:
    """A dataset's name or path, its configuration and split, and the field that holds the prompts."""

    name: str
    config: str | None = None
    split: str | None = None  # by default "train", if there are splits
    field: str = "prompt"


def read_dataset_prompts(
    source: DatasetSource,
    limit: int | None = None,
    on_bad_row: Callable[[ValueError], None] = refuse,
) -> tuple[list[Prompt], dict[str, Any]]:
    """Read the prompts of a dataset.

    Args:
        source: `name` is a Hub id, a folder that `save_to_disk` wrote, or a folder or file of data
            (.jsonl, .json, .csv, .parquet, …). `field` is a column of strings, or of conversations
            (lists of turns with "role" and "content", or "from" and "value"), whose first user turn is
            the prompt.
        limit: maximum number of rows to read.
        on_bad_row: called with an error that gives the row (from 0) if a row has no valid prompt; it
            raises by default, and may return to skip the row.

    Returns:
        The prompts, and a record of the source: name, configuration, split, field, rows, the dataset's
        fingerprint, and its revision (a commit on the Hub, otherwise a hash of its files).

    Raises:
        RuntimeError: `datasets` is not installed.
        ValueError: the configuration, split or field does not exist, there are no rows, or the files
            cannot be read.
        OSError: the dataset does not exist, or cannot be downloaded.
    """
    with _reading(source.name):
        dataset, split, revision = _load(source)
    if source.field not in dataset.column_names:
        raise ValueError(
            f"field must be a column of the dataset {source.name!r}, one of "
            f"{', '.join(sorted(dataset.column_names))}, got {source.field!r}."
        )
    prompts = []
    with _reading(source.name):  # values are decoded when they are read
        values = list(islice(dataset[source.field], limit))
    for number, value in enumerate(values):
        try:
            text = _prompt_text(value, source.field)
            prompts.append(Prompt(text, source=f"{source.name}, row {number}"))
        except ValueError as error:
            on_bad_row(ValueError(f"{source.name}, row {number}: {error}"))
    return prompts, {
        "name": source.name,
        "config": source.config,
        "split": split,
        "field": source.field,
        "rows": len(prompts),
        "fingerprint": dataset._fingerprint,
        "revision": revision,
    }


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what `datasets` raises at damaged files, of many types, into a ValueError."""
    try:
        yield
    except RuntimeError:  # the package is not installed
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        reason = str(error.__cause__ or error) or "it holds no rows"
        raise ValueError(f"The dataset {name!r} cannot be read: {reason}") from error


def _load(source: DatasetSource) -> tuple[Dataset, str | None, str | None]:
    """Return the dataset, and its split and revision if it has them."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            "Reading a dataset needs the package `datasets`. Install it with "
            "`pip install 'modeling-lmtp[datasets]'`."
        ) from error
    is_saved_dataset = any((Path(source.name) / name).exists() for name in _SAVE_TO_DISK_FILES)
    if is_saved_dataset:
        return _select_split(datasets.load_from_disk(source.name), source)
    builder = datasets.load_dataset_builder(**_location(source.name), name=source.config)
    builder.download_and_prepare()
    split = source.split or DEFAULT_SPLIT
    return builder.as_dataset(split=split), split, builder.hash


def _location(name: str) -> dict[str, str]:
    """Return the arguments of `load_dataset_builder` for a Hub id, a folder or a file."""
    path = Path(name).resolve()
    if path.is_file():
        return {"path": str(path.parent), "data_files": path.name}
    return {"path": str(path) if path.is_dir() else name}


def _select_split(
    saved: Dataset | DatasetDict, source: DatasetSource
) -> tuple[Dataset, str | None, None]:
    if source.config is not None:
        raise ValueError(
            f"config must be None for a saved dataset, got {source.config!r}. Leave it out."
        )
    if isinstance(saved, dict):
        split = source.split or DEFAULT_SPLIT
        if split not in saved:
            raise ValueError(f"split must be one of {', '.join(sorted(saved))}, got {split!r}.")
        return saved[split], split, None
    if source.split not in (None, str(saved.split)):
        allowed = "None" if saved.split is None else f"{saved.split} or None"
        raise ValueError(
            f"split must be {allowed} for this saved dataset, got {source.split!r}. Leave it out."
        )
    return saved, source.split, None


def _prompt_text(value: Any, field: str) -> str:
    """Return the prompt in a field's value: a string, or the first user turn of a conversation."""
    text = _first_user_turn(value) if isinstance(value, list) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"field {field!r} must be a non-empty string or a conversation with a user turn, got "
            f"{str(value)[:200]!r}"
        )
    text.encode()  # raises for a lone surrogate, with a clearer error than the tokenizer
    return text


def _first_user_turn(turns: list[Any]) -> Any:
    for turn in turns:
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in _USER_ROLES:
            return turn.get("content", turn.get("value"))
    return None
