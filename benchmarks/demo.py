"""`lmtp demo`: leap heads on a real model, compared with plain decoding, and loaded back anywhere.

SmolLM2-135M-Instruct gets the leap heads that this repository ships, or with `--train` heads trained on
the spot. The checkpoint is compared with plain decoding, and loaded back as remote code in a fresh
process. What was made is kept in the output folder, and a second run uses it.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_lmtp.conversion.loading import (
    best_device,
    load_lmtp,
    load_tokenizer,
    prompt_tensors,
)
from modeling_lmtp.conversion.remote_check import generate_as_remote_code
from modeling_lmtp.conversion.saving import (
    PROVENANCE,
    check_output_folder,
    file_sha256,
    save_checkpoint,
    versions,
)
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .comparison import Comparison, compare
from .demo_training import Recipe, train_checkpoint
from .smollm2 import smollm2_path

SHIPPED_HEADS = Path(__file__).parents[1] / "hub_cards" / "smollm2-135m-instruct-lmtp"
DTYPE = "bfloat16"  # the fast one on most machines; equality is judged in float32
NEW_TOKENS = 48  # per prompt, in the comparison
PROMPTS = (
    "What is photosynthesis? Explain it to a ten-year-old.",
    "A shop sells pens at 3 dollars each. How much do 14 pens cost? Think step by step.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me five tips for a good night's sleep.",
)


def run_demo(output: Path, console: Console, recipe: Recipe | None = None) -> Comparison:
    """Run the demo in `output` and return the comparison in float32 that it prints.

    Args:
        output: a new folder, or that of an earlier demo.
        console: where it prints.
        recipe: how to train heads; by default those of `SHIPPED_HEADS` are used.

    Raises:
        ValueError: `output` holds something that is not this demo's, or the shipped heads are missing.
    """
    made_from = {"heads": _shipped_heads()} if recipe is None else asdict(recipe)
    _claim(output, made_from)
    source = smollm2_path()
    tokenizer = load_tokenizer(source)
    checkpoint = output / "checkpoint"
    if checkpoint.exists():
        console.print(f"Using the checkpoint made before, {checkpoint}.")
    elif recipe is None:
        console.print("[bold]1/3[/] SmolLM2-135M-Instruct gets the leap heads of this repository.")
        _join(source, tokenizer, checkpoint)
    else:
        console.print("[bold]1/3[/] Leap heads are trained.")
        train_checkpoint(source, tokenizer, output, checkpoint, recipe, console)

    console.print("[bold]2/3[/] Plain and L-MTP generation, side by side.")
    exact = _compare(checkpoint, tokenizer, "float32")
    _print_texts(console, tokenizer, exact)
    comparisons = {"float32": exact, DTYPE: _compare(checkpoint, tokenizer, DTYPE)}
    _print_figures(console, comparisons)
    _write_figures(output / "figures.json", checkpoint, comparisons, made_from)
    _check_remote(console, tokenizer, checkpoint)
    console.print(f'\nNow try:  lmtp generate {checkpoint} "{PROMPTS[0]}"')
    return exact


def _shipped_heads() -> str:
    """Return the hash of the weights of the shipped heads."""
    weights = SHIPPED_HEADS / SAFE_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(
            f"There are no leap heads in {SHIPPED_HEADS}: they come with a clone of the repository. Run "
            "`lmtp demo --train` to train some."
        )
    return file_sha256(weights)


def _claim(output: Path, made_from: dict[str, Any]) -> None:
    marker = output / "demo.json"
    wanted = json.loads(json.dumps(made_from))
    if marker.exists():
        if json.loads(marker.read_text()) != wanted:
            raise ValueError(
                f"{output} was made by a demo of other heads. Choose another folder or delete it."
            )
        return
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted, indent=2))


def _join(source: Path, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
    """Save the shipped heads with their backbone."""
    model = LMTPForCausalLM.from_pretrained(SHIPPED_HEADS, backbone=source, dtype=DTYPE)
    record = json.loads((SHIPPED_HEADS / PROVENANCE).read_text())
    save_checkpoint(model, tokenizer, checkpoint, record)


def _compare(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Comparison:
    model = load_lmtp(checkpoint, dtype)
    prompts = prompt_tensors(tokenizer, PROMPTS, model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    compare(model, prompts[:1], {"": {}}, progress=False, **{**options, "max_new_tokens": 8})
    label = f"generate both ways, {dtype}"
    return compare(model, prompts, {"L-MTP": {}}, description=label, **options)["L-MTP"]


def _print_texts(
    console: Console, tokenizer: PreTrainedTokenizerBase, comparison: Comparison
) -> None:
    for prompt, pair in zip(PROMPTS, comparison.pairs, strict=True):
        table = Table("plain", "L-MTP", title=prompt, title_justify="left")
        table.add_row(*(tokenizer.decode(ids) for ids in (pair.plain_ids, pair.lmtp_ids)))
        console.print(table)
        equal = "[green]equal texts[/]" if pair.is_equal else "[red]DIFFERENT TEXTS[/]"
        console.print(
            f"{equal}: plain took {len(pair.plain_ids) - 1} steps, L-MTP {pair.steps} "
            f"({pair.tokens_per_step:.2f} tokens per step)\n"
        )


def _print_figures(console: Console, comparisons: dict[str, Comparison]) -> None:
    table = Table(
        "dtype", "equal texts", "tokens per step", "step cost", "speed-up", "where texts part*"
    )
    for dtype, comparison in comparisons.items():
        parted = [
            f"after {divergence.position} ({divergence.top_two_gap:.3f})"
            for divergence in comparison.divergences
        ]
        table.add_row(
            dtype,
            f"{comparison.num_equal} of {len(comparison.pairs)}",
            *(
                f"{comparison.median(name):.2f}"
                for name in ("tokens_per_step", "step_cost", "speed_up")
            ),
            ", ".join(parted) or "-",
        )
    console.print(table)
    console.print(
        f"Medians over {len(PROMPTS)} prompts, greedy, at most {NEW_TOKENS} new tokens, batch "
        f"size 1, {best_device().type}, {torch.get_num_threads()} threads. Speed-up = tokens per step / "
        "step cost.\n* In brackets, by how much the plain model prefers its first choice there: with "
        "16 bits, rounding decides near-ties."
    )


def _write_figures(
    path: Path, checkpoint: Path, comparisons: dict[str, Comparison], made_from: dict[str, Any]
) -> None:
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    record = {
        "command": "lmtp demo",
        "made_from": made_from,
        "max_new_tokens": NEW_TOKENS,
        "draft": settings.get("draft_by_batch_size", {}).get("1"),
        "device": best_device().type,
        "threads": torch.get_num_threads(),
        "batch_size": 1,
        "prompts": PROMPTS,
        "versions": versions(),
        "results": {dtype: found.summary() for dtype, found in comparisons.items()},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _check_remote(console: Console, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
    console.print("[bold]3/3[/] The saved checkpoint, in a fresh process without this package.")
    prompt_ids = prompt_tensors(tokenizer, PROMPTS[:1], torch.device("cpu"))[0][0].tolist()
    result = generate_as_remote_code(checkpoint, prompt_ids, max_new_tokens=32)
    steps = result["acceptance_lengths"]
    same = "the same text" if result["plain_ids"] == result["lmtp_ids"] else "ANOTHER TEXT"
    console.print(
        f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True) "
        f"generates {same} with use_lmtp=True, {sum(steps) / len(steps):.2f} tokens per step."
    )
