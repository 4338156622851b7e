"""`lmtp demo`: the whole path on a real model, from a plain backbone to a checkpoint for anyone.

SmolLM2-135M-Instruct writes prompts and answers them, leap heads learn the answers, and the result
is compared with plain decoding, saved, and loaded back as remote code in a fresh process. What a
step made is kept in the output folder, and a second run uses it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from modeling_lmtp.conversion.comparison import Comparison, compare
from modeling_lmtp.conversion.loading import (
    best_device,
    load_backbone,
    load_lmtp,
    load_tokenizer,
    prompt_tensors,
)
from modeling_lmtp.conversion.remote_check import generate_as_remote_code
from modeling_lmtp.conversion.smollm2 import smollm2_path
from modeling_lmtp.conversion.training import HeadShape, add_heads
from modeling_lmtp.conversion.tuning import choose_tree
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.distill import DistillSettings, append_rows, distill
from modeling_lmtp.training.evaluation import evaluate_heads
from modeling_lmtp.training.examples import Example, read_examples, split_examples
from modeling_lmtp.training.prompts import end_ids, read_prompts, self_written_prompts
from modeling_lmtp.training.saving import check_output_folder, save_checkpoint, versions
from modeling_lmtp.training.warmup import WarmupSettings, warm_up

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = (
    "What is photosynthesis? Explain it to a ten-year-old.",
    "A shop sells pens at 3 dollars each. How much do 14 pens cost? Think step by step.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me five tips for a good night's sleep.",
)


@dataclass(frozen=True)
class Recipe:
    """What the demo does; a folder made with another recipe is not touched."""

    num_prompts: int = 128
    prompt_tokens: int = 48  # a longer self-written prompt is dropped: batches wait for the longest
    held_out: int = 12
    answer_tokens: int = 128
    leap_offsets: tuple[int, ...] = (2, 3, 5)
    head_context: int = 2
    draft_vocab_size: int = 8192
    epochs: float = 4.0
    batch_size: int = 4
    learning_rate: float = 1e-3
    new_tokens: int = 80  # per prompt, in the comparison
    dtype: str = "bfloat16"
    seed: int = 0


def run_demo(output: Path, console: Console, recipe: Recipe | None = None) -> Comparison:
    """Run the demo in `output` and return the comparison in float32 that it prints.

    Raises:
        ValueError: `output` holds something that is not this demo's.
    """
    recipe = recipe or Recipe()
    _claim(output, recipe)
    source = smollm2_path()
    tokenizer = load_tokenizer(source)
    checkpoint = output / "checkpoint"
    if checkpoint.exists():
        console.print(f"Using the heads trained before, in {checkpoint}.")
    else:
        _make_checkpoint(source, tokenizer, output, checkpoint, recipe, console)

    console.print("[bold]4/5[/] Plain and L-MTP generation, side by side.")
    exact = _compare(checkpoint, tokenizer, "float32", recipe)
    _print_texts(console, tokenizer, exact)
    fast = _compare(checkpoint, tokenizer, recipe.dtype, recipe)
    comparisons = {"float32": exact, recipe.dtype: fast}
    _print_figures(console, comparisons, recipe)
    _write_figures(output / "figures.json", checkpoint, comparisons, recipe)
    _check_remote(console, tokenizer, checkpoint)
    console.print(f'\nNow try:  lmtp generate {checkpoint} "{PROMPTS[0]}"')
    return exact


def _claim(output: Path, recipe: Recipe) -> None:
    marker = output / "demo.json"
    wanted = json.loads(json.dumps(asdict(recipe)))
    if marker.exists():
        if json.loads(marker.read_text()) != wanted:
            raise ValueError(
                f"{output} was made by a demo with another recipe. Choose another folder or delete it."
            )
        return
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted, indent=2))


def _make_checkpoint(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    checkpoint: Path,
    recipe: Recipe,
    console: Console,
) -> None:
    backbone = load_backbone(source, dtype=recipe.dtype)
    answers = _distil(backbone, tokenizer, output, recipe, console)
    console.print("[bold]3/5[/] Heads learn the answers; the backbone stays as it is.")
    examples = read_examples(answers, tokenizer, end_id=end_ids(backbone, tokenizer)[0])
    train, held_out = split_examples(examples, recipe.held_out)
    shape = HeadShape(
        leap_offsets=recipe.leap_offsets,
        head_context=recipe.head_context,
        draft_vocab_size=recipe.draft_vocab_size,
    )
    model = add_heads(backbone, shape, train)
    model.config.base_model_name_or_path = BASE_MODEL
    settings = WarmupSettings(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
    )
    report = warm_up(model, train, held_out, output / "training", settings)
    tuned = _tune(model, held_out, console)
    record: dict[str, Any] = {
        "command": "lmtp demo",
        "recipe": asdict(recipe),
        "held_out": report.held_out.as_dict() if report.held_out else None,
        "log": report.log,
        "draft_tree_expected": tuned,
    }
    save_checkpoint(model, tokenizer, checkpoint, record)


def _distil(
    backbone: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    recipe: Recipe,
    console: Console,
) -> Path:
    settings = DistillSettings(
        max_new_tokens=recipe.answer_tokens,
        magpie_max_tokens=recipe.prompt_tokens,
        seed=recipe.seed,
    )
    prompts, answers = output / "prompts.jsonl", output / "answers.jsonl"
    if not prompts.exists():
        console.print(f"[bold]1/5[/] The model writes {recipe.num_prompts} prompts itself.")
        written = self_written_prompts(backbone, tokenizer, recipe.num_prompts, settings)
        append_rows(prompts, [{"prompt": p.text, "kind": p.kind} for p in written])
    console.print("[bold]2/5[/] It answers them: these answers are what the heads learn.")
    distill(backbone, tokenizer, read_prompts(prompts), answers, settings)
    return answers


def _tune(
    model: LMTPForCausalLM, held_out: list[Example], console: Console
) -> dict[str, float | int]:
    report, ranks = evaluate_heads(model, held_out)
    tuned = choose_tree(model, report, ranks, held_out)
    model.generation_config.draft_tree = [list(path) for path in tuned.tree.paths]
    model.generation_config.do_sample = False
    console.print(
        f"Draft tree for this machine: {tuned.tree.num_nodes} candidates; expected on held-out "
        f"answers: {tuned.tokens_per_step:.2f} tokens per step."
    )
    return {
        "nodes": tuned.tree.num_nodes,
        "tokens_per_step": tuned.tokens_per_step,
        "step_cost_of_the_backbone_alone": tuned.step_cost,
    }


def _compare(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, recipe: Recipe
) -> Comparison:
    model = load_lmtp(checkpoint, dtype)
    prompts = prompt_tensors(tokenizer, PROMPTS, model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": recipe.new_tokens}
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


def _print_figures(console: Console, comparisons: dict[str, Comparison], recipe: Recipe) -> None:
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
        f"Medians over {len(PROMPTS)} prompts, greedy, at most {recipe.new_tokens} new tokens, batch "
        f"size 1, {best_device().type}, {torch.get_num_threads()} threads. Speed-up = tokens per step / "
        "step cost.\n* In brackets, by how much the plain model prefers its first choice there: with "
        "16 bits, rounding decides near-ties."
    )


def _write_figures(
    path: Path, checkpoint: Path, comparisons: dict[str, Comparison], recipe: Recipe
) -> None:
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    record = {
        "command": "lmtp demo",
        "recipe": asdict(recipe),
        "draft_tree": settings.get("draft_tree"),
        "device": best_device().type,
        "threads": torch.get_num_threads(),
        "batch_size": 1,
        "prompts": PROMPTS,
        "versions": versions(),
        "results": {dtype: found.summary() for dtype, found in comparisons.items()},
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _check_remote(console: Console, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
    console.print("[bold]5/5[/] The saved checkpoint, in a fresh process without this package.")
    prompt_ids = prompt_tensors(tokenizer, PROMPTS[:1], torch.device("cpu"))[0][0].tolist()
    result = generate_as_remote_code(checkpoint, prompt_ids, max_new_tokens=32)
    steps = result["acceptance_lengths"]
    same = "the same text" if result["plain_ids"] == result["lmtp_ids"] else "ANOTHER TEXT"
    console.print(
        f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True) "
        f"generates {same} with use_lmtp=True, {sum(steps) / len(steps):.2f} tokens per step."
    )
