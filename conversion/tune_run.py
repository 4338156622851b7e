"""`lmtp tune`: the best draft for this device, per batch size, written beside the checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from modeling_lmtp.conversion.bench import GREEDY_MODE, make_batches, measure
from modeling_lmtp.conversion.bench_methods import Method, plain_method
from modeling_lmtp.conversion.bench_record import rows
from modeling_lmtp.conversion.bench_run import device_name, pad_id
from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer
from modeling_lmtp.conversion.quiet import measure_quietness
from modeling_lmtp.conversion.step_times import drafting
from modeling_lmtp.conversion.tuning import TunedTree, choose_trees
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import DRAFT_SHAPES
from modeling_lmtp.training.evaluation import evaluate_heads
from modeling_lmtp.training.examples import Example, read_examples
from modeling_lmtp.training.prompts import end_ids
from modeling_lmtp.tree_lmtp import DraftTree

TRIAL_PROMPTS = 8
TRIAL_TOKENS = 64


@dataclass(frozen=True)
class Verdict:
    """What is written for one batch size.

    Args:
        expected: the best tree by simulation and step times.
        measured: its speed-up when it decodes in turns with plain decoding; None without a trial.
    """

    expected: TunedTree
    measured: float | None

    @property
    def tree(self) -> DraftTree:
        """What is drafted: nothing, unless drafting has won."""
        wins = self.measured is not None and self.measured > 1
        return self.expected.tree if wins else DraftTree()


def tune(
    model: LMTPForCausalLM, examples: Sequence[Example], batch_sizes: Sequence[int]
) -> dict[int, Verdict]:
    """Choose a tree for each batch size, and try it."""
    report, ranks = evaluate_heads(model, examples, progress=True)
    chosen = choose_trees(model, report, ranks, examples, batch_sizes)
    return {
        size: Verdict(expected, trial(model, examples, expected.tree, size))
        for size, expected in chosen.items()
    }


def trial(
    model: LMTPForCausalLM, examples: Sequence[Example], tree: DraftTree, batch_size: int
) -> float | None:
    """Decode some prompts with a tree and plainly, in turns; return the speed-up over all of them."""
    if not tree.num_nodes:
        return None
    prompts = [example.input_ids[: example.answer_start] for example in examples]
    prompts = prompts[: max(TRIAL_PROMPTS, batch_size)]
    batches = make_batches({"trial": prompts}, batch_size, pad_id(model), model.device)
    methods = [plain_method(model), Method("tree", model, drafting(tree))]
    measured = measure(
        methods, batches, GREEDY_MODE, max_new_tokens=TRIAL_TOKENS, stop_at_end=False
    )
    return rows(measured, "")[1]["speed_up_of_totals"]


def write_draft_trees(
    model: LMTPForCausalLM, verdicts: dict[int, Verdict], conditions: dict[str, Any], folder: Path
) -> None:
    """Write the trees and their conditions into `generation_config.json`, in place of older shapes.

    Args:
        model: whose `generation_config` it is.
        verdicts: by batch size.
        conditions: of the measurement.
        folder: where the file is, or goes.
    """
    config = model.generation_config
    for name in DRAFT_SHAPES:
        if hasattr(config, name):
            delattr(config, name)
    config.draft_trees = {
        str(size): [list(path) for path in verdict.tree.paths] for size, verdict in verdicts.items()
    }
    config.draft_trees_conditions = conditions
    config.save_pretrained(folder)


def run_tune(
    checkpoint: str,
    answers: Path,
    console: Console,
    *,
    dtype: str = "auto",
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    num_answers: int = 64,
    output: Path | None = None,
) -> dict[int, Verdict]:
    """Tune a checkpoint on this device.

    Args:
        checkpoint: with leap heads.
        answers: the backbone's own, not trained on, as `lmtp distill` writes them.
        console: for what is found.
        dtype: to load it in.
        batch_sizes: to tune for.
        num_answers: use the first so many.
        output: the folder whose `generation_config.json` is written; by default the checkpoint's.

    Raises:
        ValueError: the checkpoint is not a folder and no output is given.
    """
    folder = output or Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"{str(folder)!r} is no folder to write generation_config.json into. Pass an existing "
            "one as --output."
        )
    model, tokenizer = load_lmtp(checkpoint, dtype), load_tokenizer(checkpoint)
    quietness = measure_quietness(model.device)
    for complaint in quietness.complaints():
        console.print(f"[yellow]This machine is not quiet: {complaint}.[/] Tune again when it is.")
    examples = read_examples(answers, tokenizer, end_ids(model.backbone, tokenizer)[0])
    verdicts = tune(model, examples[:num_answers], batch_sizes)
    conditions = {
        "device": device_name(model.device),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": model.backbone.config._attn_implementation,
        "quiet": not quietness.complaints(),
        "expected": {str(size): _figures(verdict) for size, verdict in verdicts.items()},
    }
    write_draft_trees(model, verdicts, conditions, folder)
    console.print(_table(verdicts))
    console.print(f"Written to {folder / 'generation_config.json'}: {json.dumps(conditions)}")
    return verdicts


def _figures(verdict: Verdict) -> dict[str, float | int | None]:
    return {
        "nodes": verdict.tree.num_nodes,
        "nodes_tried": verdict.expected.tree.num_nodes,
        "tokens_per_step": round(verdict.expected.tokens_per_step, 3),
        "step_cost": round(verdict.expected.step_cost, 3),
        "speed_up": round(verdict.expected.speed_up, 3),
        "speed_up_in_trial": verdict.measured,
    }


def _table(verdicts: dict[int, Verdict]) -> Table:
    table = Table("batch size", "draft", "tokens per step", "step cost", "expected", "in the trial")
    for size, verdict in verdicts.items():
        tree, expected = verdict.tree, verdict.expected
        shape = "a chain of" if tree.is_chain else "a tree of"
        shown = f"{shape} {tree.num_nodes}" if tree.num_nodes else "none: plain decoding"
        table.add_row(
            str(size),
            shown,
            *(f"{getattr(expected, n):.2f}" for n in ("tokens_per_step", "step_cost", "speed_up")),
            "-" if verdict.measured is None else f"{verdict.measured:.2f}",
        )
    return table
