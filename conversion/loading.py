"""Loads models, tokenizers and prompts for the commands."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import find_adapter_config_file, has_file

from modeling_lmtp.configuration_lmtp import LMTPConfig
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import keep_commit

from .folding import fold_in
from .options import Dtype
from .prompts import read_prompts, render_prompt
from .saving import read_json

DTYPES = get_args(Dtype)


def best_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None:
            return device
    return torch.device("cpu")


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn what libraries raise at a damaged or foreign file inside the block into one ValueError.

    They raise many types, some of them bare `Exception`, often without naming the file.

    Args:
        source: the folder or Hub id that is read.

    Raises:
        ValueError: a file is damaged, or the repository brings code of its own that was not allowed.
    """
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{str(source)!r} brings code of its own, which was not allowed to run. Read that code; "
                "then run the command in a terminal, where it asks, and answer y."
            ) from error
        is_clear = isinstance(error, ValueError | OSError | RuntimeError | ImportError)
        if is_clear and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            if isinstance(error, ValueError) and str(source) not in str(error):
                raise ValueError(f"{str(source)!r} cannot be loaded: {error}") from error
            raise
        for path in sorted(Path(source).glob("*.json")) if Path(source).is_dir() else ():
            read_json(path)  # raises if this is the file
        raise ValueError(
            f"{str(source)!r} cannot be read ({type(error).__name__}: {error}). One of its files is "
            "damaged, or is for another release of Transformers: save or download it again."
        ) from error


def _trust() -> dict[str, bool]:
    """Return the arguments that keep Transformers from asking about remote code where nobody answers."""
    return {} if sys.stdin is not None and sys.stdin.isatty() else {"trust_remote_code": False}


def load_config(source: str | Path, **options: Any) -> Any:
    """Load a configuration; `options` are passed to `AutoConfig.from_pretrained`."""
    with reading(source):
        return AutoConfig.from_pretrained(source, **_trust(), **options)


def _load_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    with reading(source):
        return AutoTokenizer.from_pretrained(source, **_trust(), **options)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    For an adapter saved without a tokenizer, load that of the checkpoint it was trained on.
    """
    adapter = adapter_config(source)
    if adapter is None or has_file(source, TOKENIZER_CONFIG_FILE):
        return _load_tokenizer(source)
    return _load_tokenizer(_base_of(source, adapter), **_revision(adapter))


def load_tokenizer_with_fallback(
    source: str | Path, config: Any, base: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, or its backbone's if the checkpoint has none, as heads-only ones may.

    Args:
        source: folder or Hub id of the checkpoint.
        config: its `LMTPConfig`, which names the backbone.
        base: the backbone's folder or Hub id, in place of the one that `config` names.
    """
    if has_file(source, TOKENIZER_CONFIG_FILE):
        return load_tokenizer(source)
    if base is not None:
        return load_tokenizer(base)
    revision = config.base_model_revision or "main"
    return _load_tokenizer(config.base_model_name_or_path, revision=revision)


def adapter_config(source: str | Path) -> PeftConfig | None:
    """Return the configuration of a PEFT adapter, or None if `source` is not an adapter."""
    if find_adapter_config_file(str(source)) is None:
        return None
    with reading(source):
        return PeftConfig.from_pretrained(str(source))


def _base_of(source: str | Path, adapter: PeftConfig | None) -> str | Path:
    """Return the checkpoint that an adapter was trained on, or `source` itself if it is no adapter."""
    if adapter is None:
        return source
    if not adapter.base_model_name_or_path:
        raise ValueError(
            f"The adapter {str(source)!r} does not name its checkpoint. Set base_model_name_or_path in its "
            "adapter_config.json."
        )
    return adapter.base_model_name_or_path


def names_of(sources: Sequence[str]) -> list[str]:
    """Name each checkpoint after its folder, or all by their full paths if two folders share a name.

    Raises:
        ValueError: a checkpoint is given twice.
    """
    repeated = [source for source, count in Counter(sources).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is given twice. Name each checkpoint once.")
    short = [Path(source).name or source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def lmtp_config(source: str | Path) -> LMTPConfig | None:
    """Return the configuration of a checkpoint with leap heads, or None for other models.

    For an adapter, that of the checkpoint that it was trained on.
    """
    adapter = adapter_config(source)
    config = load_config(_base_of(source, adapter), **_revision(adapter))
    return config if config.model_type == LMTPConfig.model_type else None


def load_lmtp(
    source: str | Path, dtype: str = "auto", device: torch.device | None = None, **options: Any
) -> LMTPForCausalLM:
    """Load a checkpoint with leap heads in evaluation mode.

    Args:
        source: folder or Hub id. For an adapter, the checkpoint that it was trained on is loaded and
            the adapter is merged into it.
        dtype: one of `DTYPES`.
        device: the accelerator by default, if there is one.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: the checkpoint has no leap heads; the message says how to add them.
    """
    check_dtype(dtype)
    adapter = adapter_config(source)
    base = _base_of(source, adapter)
    if lmtp_config(source) is None:
        raise ValueError(
            f"{str(base)!r} has no leap heads. Train some with `lmtp train {base} ANSWERS OUT`, or load "
            "it with LMTPForCausalLM.from_backbone, which adds untrained ones."
        )
    options = {**_trust(), **_revision(adapter), **options}
    with reading(base):
        model = LMTPForCausalLM.from_pretrained(base, dtype=dtype, **options)
    keep_commit(model.config, options.get("revision") or "main")
    if adapter is not None:
        model = fold_in(model, str(source))
    return model.to(device or best_device()).eval()


def _revision(adapter: PeftConfig | None) -> dict[str, str]:
    return {"revision": adapter.revision} if adapter is not None and adapter.revision else {}


def load_backbone(
    source: str | Path, dtype: str = "auto", device: torch.device | None = None
) -> Any:
    """Load a plain causal language model in evaluation mode, by default onto the accelerator."""
    check_dtype(dtype)
    with reading(source):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **_trust())
    keep_commit(model.config, "main")
    return model.to(device or best_device()).eval()


def prompt_tensors(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device
) -> list[torch.Tensor]:
    """Render each prompt, chat template included, as token ids `(1, L)`.

    Raises:
        ValueError: a prompt is empty.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("The prompt is empty. Give at least one word.")
    return [torch.tensor([render_prompt(tokenizer, prompt)], device=device) for prompt in prompts]


def first_prompts(path: Path, field: str, count: int) -> list[str]:
    """Read the first `count` prompts of a JSONL file.

    Raises:
        ValueError: the file has fewer prompts, or a row lacks the field (names file and line).
    """
    prompts = read_prompts(path, field)
    if len(prompts) < count:
        raise ValueError(f"{path} holds {len(prompts)} prompts, but {count} are needed.")
    return [prompt.text for prompt in prompts[:count]]


def check_dtype(dtype: str) -> None:
    """Raise a ValueError unless it is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
