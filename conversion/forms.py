"""The three forms of a repository: a full checkpoint, leap heads only, and an adapter."""

from enum import Enum
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from .saving import read_json


class Form(str, Enum):
    """What a repository holds."""

    FULL = "full"
    HEADS = "heads"
    ADAPTER = "adapter"


def form_of(folder: Path, name: str | None = None) -> Form:
    """Return the form of a checkpoint in a folder.

    Args:
        folder: holds at least the checkpoint's configuration.
        name: what to call it in an error; the folder's path by default.

    Raises:
        ValueError: it holds neither a checkpoint with leap heads nor an adapter.
    """
    if (folder / "adapter_config.json").exists():
        return Form.ADAPTER
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("model_type") != "lmtp":
        raise ValueError(
            f"{name or folder} holds neither a checkpoint with leap heads nor an adapter. Make one with "
            "`lmtp wrap`, `lmtp train` or `lmtp convert`."
        )
    return Form.HEADS if config.get("heads_only") else Form.FULL


def check_hub_id(name: str | None, option: str) -> str:
    """Return `name` if it can be the id of a repository on the Hub.

    Raises:
        ValueError: it is missing, a path, or malformed; says which option mends it.
    """
    if not name or Path(name).is_absolute() or Path(name).exists():
        raise ValueError(
            f"Others cannot load from {name!r}. Give the repository's id on the Hub, such as "
            f"name/model, with {option}."
        )
    validate_repo_id(name)
    return name
