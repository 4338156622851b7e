"""Loads models, tokenizers and prompts for the commands."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import find_adapter_config_file, has_file

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .folding import fold_in
from .options import Dtype
from .prompts import read_prompts, render_prompt

DTYPES = get_args(Dtype)


def best_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None:
            return device
    return torch.device("cpu")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    For an adapter saved without a tokenizer, load that of the checkpoint it was trained on.
    """
    adapter = adapter_config(source)
    if adapter is None or has_file(source, TOKENIZER_CONFIG_FILE):
        return AutoTokenizer.from_pretrained(source)
    return AutoTokenizer.from_pretrained(adapter.base_model_name_or_path, **_revision(adapter))


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
    return AutoTokenizer.from_pretrained(config.base_model_name_or_path, revision=revision)


def adapter_config(source: str | Path) -> PeftConfig | None:
    """Return the configuration of a PEFT adapter, or None if `source` is not an adapter."""
    if find_adapter_config_file(str(source)) is None:
        return None
    return PeftConfig.from_pretrained(str(source))


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


def has_leap_heads(source: str | Path) -> bool:
    """Return whether a checkpoint, or the checkpoint that an adapter was trained on, has leap heads."""
    adapter = adapter_config(source)
    base = source if adapter is None else adapter.base_model_name_or_path
    return bool(AutoConfig.from_pretrained(base, **_revision(adapter)).model_type == "lmtp")


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
    base = source if adapter is None else adapter.base_model_name_or_path
    if not has_leap_heads(source):
        raise ValueError(
            f"{str(base)!r} has no leap heads. Train some with `lmtp train {base} ANSWERS OUT`, or load "
            "it with LMTPForCausalLM.from_backbone, which adds untrained ones."
        )
    model = LMTPForCausalLM.from_pretrained(base, dtype=dtype, **_revision(adapter), **options)
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
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
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
