"""A tiny checkpoint whose untrained heads are right now and then, for the tests of speed tools."""

import json
from pathlib import Path

import torch
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks.bench_runner import Batch, make_batches
from modeling_lmtp.conversion.prompts import render_prompt

KINDS = ("maths", "chat")
PROMPTS = {
    "maths": ["How many legs does a spider have?", "Eight legs and eight legs?"],
    "chat": ["What is the sea?", "Write a short poem about the wind."],
}


def tiny_model(**options) -> LMTPForCausalLM:
    """Return heads that see their path, on a backbone whose text repeats itself."""
    torch.manual_seed(0)
    options = {"leap_offsets": (2, 3, 4), "head_context": "path", **options}
    return LMTPForCausalLM.from_backbone(tiny_llama(), **options).eval()


def batches(size: int) -> list[Batch]:
    """Return the prompts as batches, by kind."""
    tokenizer = tiny_tokenizer()
    tokens = {kind: [render_prompt(tokenizer, t) for t in PROMPTS[kind]] for kind in KINDS}
    return make_batches(tokens, size, 2, torch.device("cpu"))


def write_checkpoint(folder: Path, **options) -> Path:
    """Save a tiny checkpoint with its tokenizer."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_prompts(path: Path) -> Path:
    """Write the prompts with their kinds."""
    rows = [{"kind": kind, "prompt": text} for kind in KINDS for text in PROMPTS[kind]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
