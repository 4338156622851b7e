"""`lmtp demo`: leap heads on SmolLM2-135M-Instruct, compared with plain decoding.

The heads are those that this repository ships, or with `--train` new ones. The checkpoint is then loaded as
remote code in a fresh process. A second run reuses what is in the output folder.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import (
    best_device,
    load_lmtp,
    load_tokenizer,
    prompt_tensors,
)
from modeling_lmtp.conversion.options import Options
from modeling_lmtp.conversion.remote_check import generate_as_remote_code
from modeling_lmtp.conversion.saving import (
    PROVENANCE,
    check_output_folder,
    file_sha256,
    read_json,
    save_checkpoint,
    versions,
)
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .comparison import Comparison, compare
from .demo_training import Recipe, train_checkpoint
from .figures import FIGURES
from .smollm2 import smollm2_path

SHIPPED_HEADS = Path(__file__).parents[1] / "hub_cards" / "smollm2-135m-instruct-lmtp"
DTYPE = "bfloat16"  # the fastest on most machines; float32 is where texts must be equal
NEW_TOKENS = 48  # per prompt
PROMPTS = (
    "What is photosynthesis? Explain it to a ten-year-old.",
    "A shop sells pens at 3 dollars each. How much do 14 pens cost? Think step by step.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me five tips for a good night's sleep.",
)


@dataclass
class DemoOptions(Options):
    """Where the demo runs, and with which heads."""

    output: Path = field(
        default=Path("lmtp-demo"), metadata={"help": "Folder for the checkpoint and the figures."}
    )
    train: bool = field(
        default=False,
        metadata={"help": "Train new heads in some minutes; do not use the shipped ones."},
    )


def demo(options: DemoOptions) -> None:
    """Give SmolLM2-135M-Instruct leap heads and compare both ways of decoding, in two minutes.

    The first run downloads the model, about 270 MB.

    Examples:
      lmtp demo
      lmtp demo --train --output trained-demo
    """
    run_demo(options.output, Recipe() if options.train else None)


def run_demo(output: Path, recipe: Recipe | None = None) -> Comparison:
    """Run the demo in `output` and return the comparison in float32 that it prints.

    Args:
        output: a new folder, or that of an earlier demo.
        recipe: how to train heads; by default those of `SHIPPED_HEADS` are used.

    Raises:
        ValueError: `output` holds other files, or the shipped heads are missing.
    """
    made_from = {"heads": _shipped_heads()} if recipe is None else asdict(recipe)
    _claim(output, made_from)
    source = smollm2_path()
    tokenizer = load_tokenizer(source)
    checkpoint = output / "checkpoint"
    if checkpoint.exists():
        console.print(f"Using the checkpoint of an earlier run, {checkpoint}.")
    elif recipe is None:
        console.print("[bold]1/3[/] Adding this repository's leap heads to SmolLM2-135M-Instruct.")
        _join(source, tokenizer, checkpoint)
    else:
        console.print("[bold]1/3[/] Training leap heads.")
        train_checkpoint(source, tokenizer, output, checkpoint, recipe)

    console.print("[bold]2/3[/] Generating plainly and with L-MTP, side by side.")
    exact = _compare(checkpoint, tokenizer, "float32")
    _print_texts(tokenizer, exact)
    comparisons = {"float32": exact, DTYPE: _compare(checkpoint, tokenizer, DTYPE)}
    _print_figures(comparisons)
    _write_figures(output / "figures.json", checkpoint, comparisons, made_from)
    _check_remote(tokenizer, checkpoint)
    console.print(f'\nNow try:  lmtp generate {checkpoint} "{PROMPTS[0]}"')
    return exact


def _shipped_heads() -> str:
    """Return the hash of the shipped heads' weights."""
    weights = SHIPPED_HEADS / SAFE_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(
            f"There are no leap heads in {SHIPPED_HEADS}: only a clone of the repository has them. Train "
            "some with `lmtp demo --train`."
        )
    return file_sha256(weights)


def _claim(output: Path, made_from: dict[str, Any]) -> None:
    marker = output / "demo.json"
    made_from = json.loads(json.dumps(made_from))  # tuples as lists, as the file holds them
    if marker.exists():
        if read_json(marker) != made_from:
            raise ValueError(
                f"{output} holds a demo with other heads. Choose another folder or delete it."
            )
        return
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(made_from, indent=2))


def _join(source: Path, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
    """Save the shipped heads together with their backbone."""
    model = LMTPForCausalLM.from_pretrained(SHIPPED_HEADS, backbone=source, dtype=DTYPE)
    record = read_json(SHIPPED_HEADS / PROVENANCE)
    save_checkpoint(model, tokenizer, checkpoint, record)


def _compare(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Comparison:
    model = load_lmtp(checkpoint, dtype)
    prompts = prompt_tensors(tokenizer, PROMPTS, model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    # The first call allocates and compiles; keep that out of the figures
    compare(model, prompts[:1], {"": {}}, progress=False, **{**options, "max_new_tokens": 8})
    label = f"generate both ways, {dtype}"
    return compare(model, prompts, {"L-MTP": {}}, description=label, **options)["L-MTP"]


def _print_texts(tokenizer: PreTrainedTokenizerBase, comparison: Comparison) -> None:
    for prompt, pair in zip(PROMPTS, comparison.pairs, strict=True):
        table = Table("plain", "L-MTP", title=prompt, title_justify="left")
        table.add_row(*(tokenizer.decode(ids) for ids in (pair.plain_ids, pair.lmtp_ids)))
        console.print(table)
        equal = "[green]equal texts[/]" if pair.is_equal else "[red]DIFFERENT TEXTS[/]"
        console.print(
            f"{equal}: plain took {len(pair.plain_ids) - 1} steps, L-MTP {pair.steps} "
            f"({pair.speed.tokens_per_step:.2f} tokens per step)\n"
        )


def _print_figures(comparisons: dict[str, Comparison]) -> None:
    table = Table(
        "dtype", "equal texts", "tokens per step", "step cost", "speed-up", "texts diverge*"
    )
    for dtype, comparison in comparisons.items():
        places = [
            f"after {divergence.position} ({divergence.top_two_gap:.3f})"
            for divergence in comparison.divergences
        ]
        table.add_row(
            dtype,
            f"{comparison.num_equal} of {len(comparison.pairs)}",
            *(f"{comparison.median(name):.2f}" for name in FIGURES),
            ", ".join(places) or "-",
        )
    console.print(table)
    console.print(
        f"Medians over {len(PROMPTS)} prompts, greedy, at most {NEW_TOKENS} new tokens, batch "
        f"size 1, {best_device().type}, {torch.get_num_threads()} threads. Speed-up = tokens per step / "
        "step cost.\n* After how many tokens, and the gap between the plain model's two best logits there: "
        "in 16 bits rounding decides near-ties."
    )


def _write_figures(
    path: Path, checkpoint: Path, comparisons: dict[str, Comparison], made_from: dict[str, Any]
) -> None:
    record = {
        "command": "lmtp demo",
        "made_from": made_from,
        "max_new_tokens": NEW_TOKENS,
        "device": best_device().type,
        "threads": torch.get_num_threads(),
        "batch_size": 1,
        "prompts": PROMPTS,
        "versions": versions(),
        "results": {dtype: result.summary() for dtype, result in comparisons.items()},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _check_remote(tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
    console.print("[bold]3/3[/] Loading the checkpoint in a fresh process without this package.")
    prompt_ids = prompt_tensors(tokenizer, PROMPTS[:1], torch.device("cpu"))[0][0].tolist()
    result = generate_as_remote_code(checkpoint, prompt_ids, max_new_tokens=32)
    steps = result["acceptance_lengths"]
    same = "the same text" if result["plain_ids"] == result["lmtp_ids"] else "ANOTHER TEXT"
    console.print(
        f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True) "
        f"generates {same} with use_lmtp=True, {sum(steps) / len(steps):.2f} tokens per step."
    )
