"""Compares how many tokens trained heads draft on the same held-out answers, in float32.

    python benchmarks/scripts/compare_heads.py shipped=FOLDER k1=FOLDER k2=FOLDER \\
        --answers held_out.jsonl --output benchmarks/results/heads_side_by_side.json

Each checkpoint drafts for the same answers (the backbone's own, greedy), as a chain and as trees grown on
one half of the answers and evaluated on the other. `times_the_drafted_tokens` is (τ − 1) of the first
checkpoint over (τ − 1) of another, with a standard error from the same resamples of the answers for both.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ablation import NODE_COUNTS
from tuned_backbones import read_models

from modeling_lmtp.benchmarks.analysis import (
    cross_validated,
    rank_shares,
    simulated_tokens_per_step,
)
from modeling_lmtp.benchmarks.resampling import (
    Estimate,
    ratio,
    resample,
    resampled_ratios,
    standard_error,
)
from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer
from modeling_lmtp.conversion.prompts import answer_end_id
from modeling_lmtp.conversion.saving import file_sha256, versions
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.evaluation import draft_ranks
from modeling_lmtp.tree_lmtp import DraftTree

Counts = tuple[torch.Tensor, torch.Tensor]  # tokens and steps per answer, each (N,)


def judge(folder: str, answers: Path) -> tuple[dict[str, Any], dict[str, Counts]]:
    """Return a checkpoint's accuracies and what its drafts came to: tokens and steps by shape."""
    model, tokenizer = load_lmtp(folder, "float32"), load_tokenizer(folder)
    end_id = answer_end_id(model, tokenizer)
    examples = read_examples(answers, tokenizer, end_id)
    ranks = [draft_ranks(model, example) for example in examples]
    chain = DraftTree.chain(ranks[0].shape[0])
    drafted = {"chain": simulated_tokens_per_step(ranks, examples, chain)}
    drafted |= {str(n): cross_validated(ranks, examples, n)[:2] for n in NODE_COUNTS}
    config = model.config
    return {
        "leap_offsets": list(config.leap_offsets),
        "head_context": config.head_context,
        "num_head_layers": config.num_head_layers,
        "parameters": sum(p.numel() for p in model.leap_heads.parameters()),
        "top1": rank_shares(ranks, examples)[:, 0].tolist(),
        "tokens_per_step": {name: asdict(ratio(*counts)) for name, counts in drafted.items()},
        "chain_by_kind": by_kind(drafted["chain"], answers),
    }, drafted


def by_kind(counts: Counts, answers: Path) -> dict[str, float]:
    """Return the tokens per step with the answers of each kind."""
    lines = answers.read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line).get("kind", "") for line in lines if line.strip()]
    found = {}
    for kind in dict.fromkeys(kinds):
        rows = [index for index, other in enumerate(kinds) if other == kind]
        tokens, steps = (count[rows].sum().item() for count in counts)
        found[kind] = tokens / steps
    return found


def times_drafted(ours: Counts, theirs: Counts) -> Estimate:
    """Return `(τ − 1) of ours / (τ − 1) of theirs` on the same answers."""
    num_answers = len(ours[0])
    resamples = resample(num_answers)
    value, resampled = (
        (resampled_ratios(*ours, weights) - 1) / (resampled_ratios(*theirs, weights) - 1)
        for weights in (torch.ones(1, num_answers, dtype=torch.float64), resamples)
    )
    return Estimate(value.item(), standard_error(resampled, num_answers))


def compare(models: dict[str, str], answers: Path) -> dict[str, Any]:
    """Judge all checkpoints, and the first beside each other one."""
    judged = {name: judge(folder, answers) for name, folder in models.items()}
    first, *others = judged
    return {
        "command": "python benchmarks/scripts/compare_heads.py",
        "answers_sha256": file_sha256(answers),
        "answers": len(judged[first][1]["chain"][0]),
        "judged_in": "float32",
        "versions": versions(),
        "checkpoints": {name: record for name, (record, _) in judged.items()},
        "times_the_drafted_tokens": {
            name: {
                shape: asdict(times_drafted(judged[first][1][shape], counts))
                for shape, counts in judged[name][1].items()
            }
            for name in others
        },
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--answers", type=Path, required=True, help="held-out answers")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    """Compare, print and write."""
    arguments = parse()
    record = compare(read_models(arguments.checkpoints), arguments.answers)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["times_the_drafted_tokens"], indent=1))


if __name__ == "__main__":
    main()
