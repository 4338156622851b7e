"""Loading models and tokenizers, and reading prompts, as the commands do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.prompts import read_prompts, render_prompt

DTYPES = ("auto", "bfloat16", "float16", "float32")


def best_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        if device is not None:
            return device
    return torch.device("cpu")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub."""
    return AutoTokenizer.from_pretrained(source)


def load_lmtp(source: str | Path, dtype: str = "auto", **options: Any) -> LMTPForCausalLM:
    """Load a checkpoint with leap heads, in evaluation mode, onto the best device.

    Raises:
        ValueError: it has no leap heads; says how to add some.
    """
    _check_dtype(dtype)
    if AutoConfig.from_pretrained(source).model_type != "lmtp":
        raise ValueError(
            f"{str(source)!r} has no leap heads. Add some with `lmtp wrap {source} OUT` or train them "
            f"with `lmtp train {source} ANSWERS OUT`."
        )
    model = LMTPForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model.to(best_device()).eval()


def load_backbone(source: str | Path, dtype: str = "auto") -> Any:
    """Load a plain causal language model, in evaluation mode, onto the best device."""
    _check_dtype(dtype)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(best_device()).eval()


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
        ValueError: there are fewer, or a row lacks the field (names file and line).
    """
    prompts = read_prompts(path, field)
    if len(prompts) < count:
        raise ValueError(f"{path} holds {len(prompts)} prompts, but {count} were asked for.")
    return [prompt.text for prompt in prompts[:count]]


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
