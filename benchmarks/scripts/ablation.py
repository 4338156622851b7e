"""Trains every kind of head on the same answers with the same recipe, and compares them.

    python benchmarks/scripts/ablation.py BACKBONE --study kinds --answers answers.jsonl \\
        --held-out held_out.jsonl --state-folder states

For each seed of each row of a study it trains heads on the same answers in the same order. It evaluates
them on held-out greedy answers in float32: accuracy per draft distance, and the simulated tokens per step
of the chain and of trees (grown on one half of the held-out answers and evaluated on the other). A
backbone that is tuned too is evaluated on its own answers to the same prompts. Each result is written as
soon as it is known, and an interrupted run resumes. The study `kinds` compares kinds of heads; `data` asks
how much heads learn from more answers, more epochs and more parameters; `joint` trains a checkpoint's heads
(`--checkpoint`) further with its backbone, which is kept more or less close to the original. Results are in
`benchmarks/results/ablation*.json`, tables in `ablation.md`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ablation_rows import STUDIES, Row
from head_trials import TRIALS
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_lmtp.benchmarks.analysis import (
    cross_validated,
    rank_shares,
    simulated_tokens_per_step,
)
from modeling_lmtp.benchmarks.resampling import ratio
from modeling_lmtp.conversion.batch_generation import Sampling, generate_ids
from modeling_lmtp.conversion.loading import load_backbone, load_lmtp, load_tokenizer
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
from modeling_lmtp.training.evaluation import answer_states, draft_ranks
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.joint_trainer import JointTrainer
from modeling_lmtp.training.leap_trainer import LeapTrainer
from modeling_lmtp.training.state_cache import StateCache
from modeling_lmtp.training.train_command import add_heads
from modeling_lmtp.tree_lmtp import DraftTree

NODE_COUNTS = (8, 16, 32)
OWN_BATCH_SIZE = 16
PAGE = Path(__file__).parents[1] / "ablation.md"
RESULTS = Path(__file__).parents[1] / "results"
FILES = {
    "kinds": RESULTS / "ablation.json",
    "data": RESULTS / "ablation_data.json",
    "joint": RESULTS / "ablation_joint.json",
}


@torch.no_grad()
def read_states(model: LMTPForCausalLM, example: Example, cache: StateCache | None) -> torch.Tensor:
    """Return the states that heads read of an answer, `(L, K·H)`."""
    states = answer_states(model, example) if cache is None else cache.load(example)
    states = states.to(model.device)
    if not hasattr(model, "attention"):
        return states
    input_ids = torch.tensor([example.input_ids], device=model.device)
    return model.attention(states[None], input_ids)[0]


def measure(
    model: LMTPForCausalLM, examples: Sequence[Example], cache: StateCache | None
) -> dict[str, Any]:
    """Judge heads on held-out answers."""
    ranks = [
        draft_ranks(model, example, read_states(model, example, cache)) for example in examples
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


def trained_weights(model: LMTPForCausalLM) -> dict[str, torch.Tensor]:
    """Return the weights that are not the backbone's."""
    weights = model.state_dict()
    return {name: w for name, w in weights.items() if not name.startswith("backbone.")}


def costs(model: LMTPForCausalLM, seconds: float) -> dict[str, Any]:
    """Return what the heads cost."""
    parts = [model.leap_heads, getattr(model, "attention", torch.nn.Module())]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return {"parameters": parameters, "processor_seconds": seconds}


def own_answers(
    model: LMTPForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Example]:
    """Let a backbone answer the prompts of `examples` itself, greedily and no longer than these do."""
    longest = max(len(example.input_ids) - example.answer_start for example in examples)
    sampling = Sampling(max_new_tokens=longest, temperature=0.0, top_p=1.0, seed=0)
    end_id = answer_end_id(model.backbone, tokenizer)
    stop_ids = [] if end_id is None else [end_id]
    prompts = [list(example.input_ids[: example.answer_start]) for example in examples]
    found = []
    for start in tqdm(range(0, len(prompts), OWN_BATCH_SIZE), desc="answer", unit="batch"):
        batch = prompts[start : start + OWN_BATCH_SIZE]
        answers = generate_ids(model.backbone, tokenizer, batch, sampling, stop_ids=stop_ids)
        found += [Example([*p, *a], len(p)) for p, a in zip(batch, answers, strict=True)]
    return found


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
            **{"draft_vocab_size": self.arguments.draft_vocab_size, **row.shape},
        )
        how = self._tune_jointly if row.joint else self._warm_up
        examples = self.examples[: row.num_answers]
        settings = {
            "num_train_epochs": row.epochs or self.arguments.epochs,
            "seed": seed,
            "save_strategy": "no",
            **row.settings,
        }
        return {**asdict(row), **how(row, shape, examples, settings)}

    def _start(
        self, row: Row, backbone: Any, shape: HeadOptions, examples: Sequence[Example]
    ) -> LMTPForCausalLM:
        """Return a backbone with the heads that a row starts from."""
        if not row.trained:
            return add_heads(backbone, shape, examples)
        loaded = load_lmtp(self.arguments.checkpoint, self.arguments.dtype)
        model = LMTPForCausalLM(loaded.config, backbone=backbone)
        model.leap_heads.load_state_dict(loaded.leap_heads.state_dict())
        return model

    def _warm_up(
        self, row: Row, shape: HeadOptions, examples: Sequence[Example], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Train heads on the frozen backbone; processor seconds do not count what states took."""
        model = self._start(row, self.backbone, shape, examples)
        exact = LMTPForCausalLM(model.config, backbone=self.exact_backbone).eval()
        torch.manual_seed(settings["seed"])
        if row.trial is not None:
            TRIALS[row.trial].change(model)
            TRIALS[row.trial].change(exact)
        folder = self._states_of(row)
        settings["state_folder"] = None if folder is None else str(folder)
        if folder is not None:
            StateCache(folder, model).fill(examples)
        started = time.process_time()
        with tempfile.TemporaryDirectory() as run:
            args = LeapTrainingArguments(output_dir=run, **settings)
            trainer = LeapTrainer(model, args, examples)
            if row.trial is not None:
                trainer.objective = TRIALS[row.trial].objective(len(row.offsets))
            trainer.train()
        seconds = time.process_time() - started
        exact.load_state_dict(trained_weights(model), strict=False)
        cache = None
        if folder is not None:
            cache = StateCache(folder.with_name(folder.name + "-float32"), exact)
            cache.fill(self.held_out)
        return {**costs(model, seconds), **measure(exact, self.held_out, cache)}

    def _tune_jointly(
        self, row: Row, shape: HeadOptions, examples: Sequence[Example], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Train heads and a backbone of their own together, the heads at the rate of warm-up."""
        backbone = load_backbone(self.arguments.backbone, self.arguments.dtype)
        model = self._start(row, backbone, shape, examples)
        rate = LeapTrainingArguments.learning_rate
        settings = {"head_training": "full", "head_learning_rate": rate, **settings}
        started = time.process_time()
        with tempfile.TemporaryDirectory() as run:
            args = JointTrainingArguments(output_dir=run, **settings)
            trainer = JointTrainer(model, args, examples)
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

    def _of_checkpoint(self) -> dict[str, Any]:
        """Return which heads rows start from."""
        weights = Path(self.arguments.checkpoint) / SAFE_WEIGHTS_NAME
        return {"checkpoint_sha256": file_sha256(weights)}

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
            **({} if arguments.checkpoint is None else self._of_checkpoint()),
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
    """Train and judge the rows of a study that are missing in its file."""
    laboratory, rows = Laboratory(arguments), STUDIES[arguments.study]
    output = FILES[arguments.study]
    record: dict[str, Any] = {
        "command": "python benchmarks/scripts/ablation.py",
        "conditions": laboratory.conditions(),
    }
    record["results"] = []
    if output.exists():
        found = json.loads(output.read_text())
        if found["conditions"] != record["conditions"]:
            raise SystemExit(f"{output} was made under other conditions.")
        record = found
    done = {(result["row"], result["seed"]) for result in record["results"]}
    for seed in range(max(row.seeds for row in rows.values())):
        for name, row in rows.items():
            if seed >= row.seeds or (name, seed) in done:
                continue
            print(f"{name}, seed {seed}", flush=True)
            record["results"].append({"row": name, "seed": seed, **laboratory.run(row, seed)})
            output.write_text(json.dumps(record, indent=1) + "\n")


def drift_cells(result: dict[str, Any]) -> list[str]:
    """Return how far a tuned backbone is from the original, for the study `joint`."""
    drift = result.get("drift")
    if drift is None:
        return ["0", "0 %", ""]
    perplexities = (drift[f"perplexity_{name}"] for name in ("original", "tuned"))
    changed = 1 - drift["top1_agreement"]
    return [f"{drift['kl']:.4f}", f"{changed:.1%}", " to ".join(f"{p:.3f}" for p in perplexities)]


def table(record: dict[str, Any], study: str) -> str:
    """Return the results as Markdown; means over seeds, with their spread."""
    drift = ["KL", "other first choices", "perplexity"] if study == "joint" else []
    columns = ["heads", "offsets", "top-1 at t+2, t+3, …", *drift, "τ, chain", "τ, tree of 8"]
    columns += ["of 16", "of 32", "parameters", "processor s", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in dict.fromkeys(result["row"] for result in record["results"]):
        of_row = [result for result in record["results"] if result["row"] == name]
        first = of_row[0]
        accuracies = [
            statistics.mean(values) for values in zip(*(r["top1"] for r in of_row), strict=True)
        ]
        cells = [name, ", ".join(map(str, first["offsets"]))]
        cells.append(" ".join(f"{value:.2f}" for value in accuracies))
        cells += drift_cells(first) if drift else []
        for draft in ("chain", *map(str, NODE_COUNTS)):
            values = [result["tokens_per_step"][draft]["value"] for result in of_row]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        cells.append(f"{first['parameters'] / 1e6:.2f} M")
        cells.append(f"{statistics.mean(r['processor_seconds'] for r in of_row):.0f}")
        cells.append(str(len(of_row)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, study: str) -> str:
    """Return the text of `ablation.md` with the table of a study, which stands between two marks."""
    marks = f"<!-- {study}: written by ablation.py -->", f"<!-- end of {study} -->"
    above, rest = page.split(marks[0])
    _, below = rest.split(marks[1])
    lines = table(json.loads(FILES[study].read_text()), study)
    return f"{above}{marks[0]}\n\n{lines}\n\n{marks[1]}{below}"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", help="folder or Hub id")
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--state-folder", type=Path, required=True)
    parser.add_argument("--checkpoint", help="the heads that the study `joint` starts from")
    parser.add_argument("--num-answers", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--table", action="store_true", help="only write ablation.md")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
    PAGE.write_text(with_table(PAGE.read_text(), arguments.study))


if __name__ == "__main__":
    main()
