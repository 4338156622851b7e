"""Finds and safely reads a checkpoint of another project, in a folder, a file or on the Hub."""

import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from .saving import read_json

CONFIG = "config.json"
INDEX = ".index.json"
# The first pattern that matches counts: a checkpoint may hold the same weights in two formats
WEIGHTS = ("*.safetensors", "medusa_lm_head.pt", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ForeignFiles:
    """A checkpoint's files on this machine.

    Args:
        folder: the folder that holds them.
        weights: the files with weights.
        revision: the commit, if they came from the Hub.
    """

    folder: Path
    weights: tuple[Path, ...]
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, empty if there is none.

        Raises:
            ValueError: the file is not a JSON object.
        """
        return read_json(self.folder / CONFIG) if (self.folder / CONFIG).exists() else {}

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder also holds a tokenizer."""
        return any((self.folder / name).exists() for name in TOKENIZER_FILES)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read all tensors, on the CPU, as they are.

        Raises:
            ValueError: a file is damaged, missing, or holds more than tensors.
        """
        tensors: dict[str, torch.Tensor] = {}
        for path in self.weights:
            for name, tensor in _read_weights(path).items():
                if name in tensors:
                    raise ValueError(f"{path} holds {name}, and so does another file.")
                tensors[name] = tensor
        return tensors


def find_files(source: str | Path, revision: str | None = None) -> ForeignFiles:
    """Find a checkpoint's files, and download them from the Hub if need be.

    Args:
        source: a folder, a file with weights, or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there are no weights, or the source is an adapter.
        OSError: the source is neither on this machine nor on the Hub.
    """
    path = Path(source)
    if path.is_file():
        return ForeignFiles(path.parent, (path,))
    commit = None
    if not path.is_dir():
        patterns = ["*.json", *WEIGHTS, "tokenizer*"]
        path = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        commit = path.name
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{source} holds an adapter, which is useless without its model. Merge it with the code "
            "that made it, and convert the result. (`lmtp export` merges adapters of this project only.)"
        )
    for pattern in WEIGHTS:
        weights = sorted(path.glob(pattern))
        if weights:
            _check_shards(path, weights)
            return ForeignFiles(path, tuple(weights), commit)
    raise ValueError(f"{source} holds no weights. Expected one of {', '.join(WEIGHTS)}.")


def _check_shards(folder: Path, weights: list[Path]) -> None:
    names = {path.name for path in weights}
    for index in folder.glob(f"*{weights[0].suffix}{INDEX}"):
        missing = sorted(set(read_json(index).get("weight_map", {}).values()) - names)
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names.")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _damaged(path, error) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle of more than tensors, which could run any code, so it is not opened. "
            "Get the weights as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({error}). Download it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} must hold tensors by name, got {type(state).__name__}.")
    return state


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or incomplete ({error}). Download it again.")
