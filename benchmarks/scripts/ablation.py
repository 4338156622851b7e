"""Which heads are worth having: the same answers, steps and recipe for every kind of head.

    python benchmarks/scripts/ablation.py BACKBONE --answers answers.jsonl --held-out held_out.jsonl \\
        --state-folder states --output benchmarks/results/ablation.json

Each row of `ROWS` is trained, for each of its seeds, on the same answers in the same order, and judged on
held-out greedy answers in float32: accuracy per draft distance, and the simulated tokens per step of the
chain and of trees (grown on one half of the held-out answers and judged on the other). A backbone that was
tuned along is judged on its own answers to the same prompts. A result is written as soon as it is known; a
stopped run goes on. `--tables` writes them into `ablation.md`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_lmtp.benchmarks.analysis import (
    cross_validated,
    rank_shares,
    simulated_tokens_per_step,
)
from modeling_lmtp.benchmarks.resampling import ratio
from modeling_lmtp.conversion.batch_generation import Sampling, generate_ids
from modeling_lmtp.conversion.loading import load_backbone, load_tokenizer
from modeling_lmtp.conversion.prompts import answer_end_id
from modeling_lmtp.conversion.saving import file_sha256, versions
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.arguments import (
    HeadOptions,
    JointTrainingArguments,
    LeapTrainingArguments,
)
from modeling_lmtp.training.drift import measure_drift
from modeling_lmtp.training.evaluation import draft_ranks
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.joint_trainer import JointTrainer
from modeling_lmtp.training.leap_trainer import LeapTrainer
from modeling_lmtp.training.state_cache import StateCache
from modeling_lmtp.training.train_command import add_heads
from modeling_lmtp.tree_lmtp import DraftTree

NODE_COUNTS = (8, 16, 32)
MAX_NEW_TOKENS = 256  # of the held-out answers
PAGE = Path(__file__).parents[1] / "ablation.md"
MARK = "<!-- tables: written by ablation.py -->"


@dataclass(frozen=True)
class Row:
    """One kind of heads, and what its recipe has of its own.

    Args:
        offsets: of the heads.
        shape: other settings of the heads, see `HeadOptions`.
        settings: of training.
        seeds: how many times it is trained.
        joint: the backbone is tuned along (LoRA, whole heads), from heads that know nothing yet.
    """

    offsets: tuple[int, ...]
    shape: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    joint: bool = False


ROWS = {
    "paper's heads, k = 2": Row((3, 5, 7), seeds=3),
    "paper's heads, k = 1": Row((2, 3, 4), seeds=3),
    "path-grounded, k = 1": Row((2, 3, 4), {"head_context": "path"}, seeds=3),
    "grounded by 1, k = 1": Row((2, 3, 4), {"head_context": 1}, seeds=3),
    "grounded by 2, k = 2": Row((3, 5, 7), {"head_context": 2}),
    "grounded by 2, mixed": Row((2, 3, 5), {"head_context": 2}),
    "paper's heads, mixed": Row((2, 3, 5)),
    "paper's heads, even": Row((2, 4, 6)),
    "paper's heads, k = 1, 6 heads": Row((2, 3, 4, 5, 6, 7)),
    "grounded by 1, k = 1, 6 heads": Row((2, 3, 4, 5, 6, 7), {"head_context": 1}),
    "path-grounded, k = 2": Row((3, 5, 7), {"head_context": "path"}),
    "path-grounded, 4 heads": Row((2, 3, 4, 5), {"head_context": "path"}),
    "path-grounded, 2 blocks": Row((2, 3, 4), {"head_context": "path", "num_head_layers": 2}),
    "path-grounded, soft targets": Row(
        (2, 3, 4), {"head_context": "path"}, {"distillation_weight": 0.5}
    ),
    "paper's heads, k = 1, soft targets": Row((2, 3, 4), {}, {"distillation_weight": 0.5}),
    "paper's heads, k = 1, weighted states": Row((2, 3, 4), {"head_input": "weighted"}),
    "paper's heads, k = 1, joint": Row((2, 3, 4), settings={"learning_rate": 2e-4}, joint=True),
}


def measure(
    model: LMTPForCausalLM, examples: Sequence[Example], cache: StateCache | None
) -> dict[str, Any]:
    """Judge heads on held-out answers."""
    ranks = [
        draft_ranks(model, example, None if cache is None else cache.load(example).to(model.device))
        for example in examples
    ]
    chain = simulated_tokens_per_step(ranks, examples, DraftTree.chain(ranks[0].shape[0]))
    drafts = {"chain": chain}
    drafts |= {str(n): cross_validated(ranks, examples, n)[:2] for n in NODE_COUNTS}
    shares = rank_shares(ranks, examples)
    return {
        "top1": shares[:, 0].tolist(),
        "top3": shares[:, :3].sum(dim=1).tolist(),
        "tokens_per_step": {name: asdict(ratio(*found)) for name, found in drafts.items()},
    }


def costs(model: LMTPForCausalLM, seconds: float) -> dict[str, Any]:
    """Return what the heads cost."""
    parameters = sum(p.numel() for p in model.leap_heads.parameters())
    return {"parameters": parameters, "processor_seconds": seconds}


def own_answers(
    model: LMTPForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Example]:
    """Let a backbone answer the prompts of `examples` itself, greedily."""
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, top_p=1.0, seed=0)
    end_id = answer_end_id(model.backbone, tokenizer)
    stop_ids = [] if end_id is None else [end_id]
    prompts = [list(example.input_ids[: example.answer_start]) for example in examples]
    answers = []
    for prompt in tqdm(prompts, desc="answer", unit="prompt"):
        (answer,) = generate_ids(model.backbone, tokenizer, [prompt], sampling, stop_ids=stop_ids)
        answers.append(Example([*prompt, *answer], len(prompt)))
    return answers


class Laboratory:
    """The backbone in two precisions, the answers and their states: what all rows share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.backbone = load_backbone(arguments.backbone, arguments.dtype)
        self.exact_backbone = load_backbone(arguments.backbone, "float32")
        self.tokenizer = load_tokenizer(arguments.backbone)
        end_id = answer_end_id(self.backbone, self.tokenizer)
        every = read_examples(arguments.answers, self.tokenizer, end_id)
        step = max(1, len(every) // arguments.num_answers)
        self.examples = every[::step][: arguments.num_answers]
        self.held_out = read_examples(arguments.held_out, self.tokenizer, end_id)

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """Train heads and judge them."""
        shape = HeadOptions(
            leap_offsets=list(row.offsets),
            draft_vocab_size=self.arguments.draft_vocab_size,
            **row.shape,
        )
        how = self._tune_jointly if row.joint else self._warm_up
        return {**asdict(row), **how(row, shape, seed)}

    def _warm_up(self, row: Row, shape: HeadOptions, seed: int) -> dict[str, Any]:
        """Train heads on the frozen backbone; processor seconds do not count what states took."""
        model = add_heads(self.backbone, shape, self.examples)
        folder = self._states_of(row)
        settings = {
            "num_train_epochs": self.arguments.epochs,
            "seed": seed,
            "save_strategy": "no",
            "state_folder": None if folder is None else str(folder),
            **row.settings,
        }
        if folder is not None:
            StateCache(folder, model).fill(self.examples)
        started = time.process_time()
        with tempfile.TemporaryDirectory() as run:
            args = LeapTrainingArguments(output_dir=run, **settings)
            LeapTrainer(model, args, self.examples).train()
        seconds = time.process_time() - started
        exact = LMTPForCausalLM(model.config, backbone=self.exact_backbone).eval()
        exact.leap_heads.load_state_dict(model.leap_heads.state_dict())
        cache = None
        if folder is not None:
            cache = StateCache(folder.with_name(folder.name + "-float32"), exact)
            cache.fill(self.held_out)
        return {**costs(model, seconds), **measure(exact, self.held_out, cache)}

    def _tune_jointly(self, row: Row, shape: HeadOptions, seed: int) -> dict[str, Any]:
        """Train heads and a backbone of their own together, the heads at the rate of warm-up."""
        backbone = load_backbone(self.arguments.backbone, self.arguments.dtype)
        model = add_heads(backbone, shape, self.examples)
        settings = {
            "num_train_epochs": self.arguments.epochs,
            "seed": seed,
            "save_strategy": "no",
            "head_training": "full",
            "head_learning_rate": LeapTrainingArguments.learning_rate,
            **row.settings,
        }
        started = time.process_time()
        with tempfile.TemporaryDirectory() as run:
            args = JointTrainingArguments(output_dir=run, **settings)
            trainer = JointTrainer(model, args, self.examples)
            trainer.train()
        tuned = trainer.model
        seconds = time.process_time() - started
        drift = measure_drift(tuned.float(), self.held_out)
        merged = tuned.merge_and_unload()
        answers = own_answers(merged, self.tokenizer, self.held_out)
        return {
            **costs(merged, seconds),
            **measure(merged, answers, None),
            "drift": asdict(drift),
            "own_answer_tokens": sum(len(e.input_ids) - e.answer_start for e in answers),
        }

    def _states_of(self, row: Row) -> Path | None:
        """Where states are kept; those of all layers would be too many."""
        weighted = row.shape.get("head_input") == "weighted"
        return None if weighted else self.arguments.state_folder

    def conditions(self) -> dict[str, Any]:
        """Return what all rows have in common."""
        arguments = self.arguments
        return {
            "backbone": Path(arguments.backbone).name,
            "answers_sha256": file_sha256(arguments.answers),
            "answers": len(self.examples),
            "answer_tokens": sum(len(e.input_ids) - e.answer_start for e in self.examples),
            "epochs": arguments.epochs,
            "batch_size": LeapTrainingArguments.per_device_train_batch_size,
            "learning_rate": LeapTrainingArguments.learning_rate,
            "draft_vocab_size": arguments.draft_vocab_size,
            "training_dtype": arguments.dtype,
            "held_out_sha256": file_sha256(arguments.held_out),
            "held_out_answers": len(self.held_out),
            "held_out_tokens": sum(len(e.input_ids) - e.answer_start for e in self.held_out),
            "judged_in": "float32",
            "device": str(self.backbone.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def run(arguments: argparse.Namespace) -> None:
    """Train and judge what is missing in the output file."""
    laboratory = Laboratory(arguments)
    record: dict[str, Any] = {
        "command": "python benchmarks/scripts/ablation.py",
        "conditions": laboratory.conditions(),
    }
    record["results"] = []
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text())
        if found["conditions"] != record["conditions"]:
            raise SystemExit(f"{arguments.output} was made under other conditions.")
        record = found
    done = {(result["row"], result["seed"]) for result in record["results"]}
    for seed in range(max(row.seeds for row in ROWS.values())):
        for name, row in ROWS.items():
            if seed >= row.seeds or (name, seed) in done:
                continue
            print(f"{name}, seed {seed}", flush=True)
            record["results"].append({"row": name, "seed": seed, **laboratory.run(row, seed)})
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown, the best tree last; means over seeds, with their spread."""
    lines = [
        "| heads | offsets | top-1 at t+2, t+3, … | τ, chain | τ, tree of 8 | of 16 | of 32 | "
        "parameters | processor s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| none (NTP) | | | 1 | 1 | 1 | 1 | 0 | 0 | |",
    ]
    for name in dict.fromkeys(result["row"] for result in record["results"]):
        of_row = [result for result in record["results"] if result["row"] == name]
        first = of_row[0]
        accuracies = [
            statistics.mean(values) for values in zip(*(r["top1"] for r in of_row), strict=True)
        ]
        cells = [name, ", ".join(map(str, first["offsets"]))]
        cells.append(" ".join(f"{value:.2f}" for value in accuracies))
        for draft in ("chain", *map(str, NODE_COUNTS)):
            values = [result["tokens_per_step"][draft]["value"] for result in of_row]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        cells.append(f"{first['parameters'] / 1e6:.2f} M")
        cells.append(f"{statistics.mean(r['processor_seconds'] for r in of_row):.0f}")
        cells.append(str(len(of_row)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(output: Path) -> None:
    """Replace what stands below the mark in `ablation.md`."""
    record = json.loads(output.read_text())
    above = PAGE.read_text().split(MARK)[0]
    PAGE.write_text(f"{above}{MARK}\n\n{table(record)}\n")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", help="folder or Hub id")
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--state-folder", type=Path, required=True)
    parser.add_argument("--num-answers", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="only write ablation.md")
    arguments = parser.parse_args()
    if not arguments.tables:
        run(arguments)
    write_tables(arguments.output)


if __name__ == "__main__":
    main()
