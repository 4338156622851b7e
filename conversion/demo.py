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
    load_backbone,
    load_lmtp,
    load_tokenizer,
    prompt_tensors,
)
from modeling_lmtp.conversion.remote_check import generate_as_remote_code
from modeling_lmtp.conversion.smollm2 import smollm2_path
from modeling_lmtp.conversion.tuning import choose_tree
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.distill import DistillSettings, append_rows, distill
from modeling_lmtp.training.evaluation import evaluate_heads
from modeling_lmtp.training.examples import Example, read_examples, split_examples
from modeling_lmtp.training.prompts import end_ids, read_prompts, self_written_prompts
from modeling_lmtp.training.saving import check_output_folder, save_checkpoint
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

    num_prompts: int = 144
    held_out: int = 16
    answer_tokens: int = 128
    leap_offsets: tuple[int, ...] = (2, 3, 5)
    epochs: float = 3.0
    batch_size: int = 8
    learning_rate: float = 1e-3
    new_tokens: int = 96  # per prompt, in the comparison
    dtype: str = "bfloat16"
    seed: int = 0


def run_demo(output: Path, console: Console, recipe: Recipe | None = None) -> Comparison:
    """Run the demo in `output` and return the comparison that it prints.

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

    model = load_lmtp(checkpoint, dtype=recipe.dtype)
    comparison = _compare(model, tokenizer, recipe)
    _print_comparison(console, tokenizer, comparison, model, recipe)
    _check_remote(console, tokenizer, checkpoint, comparison)
    console.print(f'\nNow try:  lmtp generate {checkpoint} "{PROMPTS[0]}"')
    return comparison


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
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=recipe.leap_offsets)
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
    settings = DistillSettings(max_new_tokens=recipe.answer_tokens, seed=recipe.seed)
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
    model: LMTPForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> Comparison:
    prompts = prompt_tensors(tokenizer, PROMPTS, model.device)
    options: dict[str, Any] = {"max_new_tokens": recipe.new_tokens, "do_sample": False}
    compare(model, prompts[:1], progress=False, **{**options, "max_new_tokens": 8})  # warm-up
    return compare(model, prompts, **options)


def _print_comparison(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    model: LMTPForCausalLM,
    recipe: Recipe,
) -> None:
    console.print("[bold]4/5[/] Plain and L-MTP generation, side by side.")
    for prompt, pair in zip(PROMPTS, comparison.pairs, strict=True):
        table = Table("plain", "L-MTP", title=prompt, title_justify="left", show_lines=True)
        table.add_row(*(tokenizer.decode(ids) for ids in (pair.plain_ids, pair.lmtp_ids)))
        console.print(table)
        console.print(
            f"{_equality(pair)}; {pair.tokens_per_step:.2f} tokens per step, step cost "
            f"{pair.step_cost:.2f}, speed-up {pair.speed_up:.2f}\n"
        )
    console.print(
        f"[bold]Median over {len(comparison.pairs)} prompts[/]: "
        f"{comparison.median('tokens_per_step'):.2f} tokens per step, step cost "
        f"{comparison.median('step_cost'):.2f}, speed-up {comparison.median('speed_up'):.2f} "
        f"({recipe.dtype}, {model.device.type}, {torch.get_num_threads()} threads, batch size 1, "
        f"greedy, at most {recipe.new_tokens} new tokens)."
    )


def _equality(pair: Any) -> str:
    if pair.is_equal:
        return "[green]equal texts[/]"
    return (
        f"[yellow]equal for {pair.first_difference} tokens[/], where the plain model's two best "
        f"logits are {pair.top_two_gap:.3f} apart (a near-tie: rounding in {'low precision'} "
        "decides; in float32 the texts are equal, see `lmtp verify`)"
    )


def _check_remote(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path,
    comparison: Comparison,
) -> None:
    console.print("[bold]5/5[/] The saved checkpoint, in a fresh process without this package.")
    prompt_ids = prompt_tensors(tokenizer, PROMPTS[:1], torch.device("cpu"))[0][0].tolist()
    result = generate_as_remote_code(checkpoint, prompt_ids, max_new_tokens=32)
    steps = result["acceptance_lengths"]
    console.print(
        f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, trust_remote_code=True) "
        f"generates {'the same' if result['plain_ids'] == result['lmtp_ids'] else 'another'} text "
        f"with use_lmtp=True, {sum(steps) / len(steps):.2f} tokens per step."
    )
