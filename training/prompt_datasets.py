"""Prompts from a dataset: one of the Hub by its name, or a local folder or file.

Needs the package `datasets`, which comes with `pip install 'modeling-lmtp[datasets]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_lmtp.conversion.prompts import Prompt, refuse

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in their folder.
_SAVED = ("state.json", "dataset_dict.json")
DEFAULT_SPLIT = "train"
_USER_ROLES = ("user", "human")


@dataclass(frozen=True)
class DatasetSource:
    """Which prompts of which dataset: its name or path, configuration, split, and field."""

    name: str
    config: str | None = None
    split: str | None = None  # "train" where there are splits
    field: str = "prompt"


def read_dataset_prompts(
    source: DatasetSource,
    limit: int | None = None,
    on_bad_row: Callable[[ValueError], None] = refuse,
) -> tuple[list[Prompt], dict[str, Any]]:
    """Read the prompts of a dataset.

    Args:
        source: `name` is a dataset of the Hub, a folder that `save_to_disk` made, or a folder or
            file of data (.jsonl, .json, .csv, .parquet, …). `field` names a column of strings, or
            of conversations (lists of turns with "role" and "content", or "from" and "value"), of
            which the user's first turn is asked.
        limit: read the first so many rows.
        on_bad_row: gets an error that names the row, from 0, where it holds no prompt; it may raise it,
            as by default, or go on.

    Returns:
        The prompts, and a record of what was read: name, configuration, split, field, rows, the
        dataset's fingerprint, and its revision (a commit on the Hub, else a hash of its files).

    Raises:
        RuntimeError: `datasets` is not installed; says how to install it.
        ValueError: there is no such configuration, split or field, or no rows, or its files can't be
            read.
        OSError: there is no such dataset, or it can't be fetched.
    """
    dataset, split, revision = _load(source)
    if source.field not in dataset.column_names:
        raise ValueError(
            f"field: dataset {source.name!r} has no field {source.field!r}; "
            f"choose one of {sorted(dataset.column_names)}"
        )
    prompts = []
    for number, value in enumerate(islice(dataset[source.field], limit)):
        try:
            prompts.append(Prompt(_prompt_text(value, source.field)))
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


def _load(source: DatasetSource) -> tuple[Dataset, str | None, str | None]:
    """Return the dataset, and its split and revision where it has them."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            "dataset: reading one needs the package `datasets`; "
            "install it with: pip install 'modeling-lmtp[datasets]'"
        ) from error
    saved = any((Path(source.name) / name).exists() for name in _SAVED)
    try:
        if saved:
            return _choose_saved(datasets.load_from_disk(source.name), source)
        builder = datasets.load_dataset_builder(**_location(source.name), name=source.config)
        builder.download_and_prepare()
        split = source.split or DEFAULT_SPLIT
        return builder.as_dataset(split=split), split, builder.hash
    # The last one is how `load_from_disk` meets a dataset without rows
    except (datasets.exceptions.DatasetsError, ValueError, IndexError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"dataset: {source.name!r} can't be read: {reason}") from error


def _location(name: str) -> dict[str, str]:
    """Return how `datasets` is told about a dataset, a folder or a single file."""
    path = Path(name).resolve()
    if path.is_file():
        return {"path": str(path.parent), "data_files": path.name}
    return {"path": str(path) if path.is_dir() else name}


def _choose_saved(
    saved: Dataset | DatasetDict, source: DatasetSource
) -> tuple[Dataset, str | None, None]:
    if source.config is not None:
        raise ValueError(f"it was saved without configurations, got config={source.config!r}")
    if isinstance(saved, dict):
        split = source.split or DEFAULT_SPLIT
        if split not in saved:
            raise ValueError(f"it has no split {split!r}; choose one of {sorted(saved)}")
        return saved[split], split, None
    if source.split not in (None, str(saved.split)):
        raise ValueError(f"it was saved without splits, got split={source.split!r}")
    return saved, source.split, None


def _prompt_text(value: Any, field: str) -> str:
    """Return the prompt that a row's field holds: a string, or the user's first turn."""
    text = _first_user_turn(value) if isinstance(value, list) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"expected a non-empty string or a conversation with a turn of the user in field {field!r}, "
            f"got {str(value)[:200]!r}"
        )
    text.encode()  # half of a surrogate pair is no text, and tokenizers do not say so
    return text


def _first_user_turn(turns: list[Any]) -> Any:
    for turn in turns:
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in _USER_ROLES:
            return turn.get("content", turn.get("value"))
    return None
