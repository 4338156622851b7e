"""Logs what planned drafts expect and what comes of it: acceptance rates, and the costs of passes.

    python benchmarks/scripts/planner_log.py CHECKPOINT --output FILE.json --picture FILE.png

Each candidate that was verified counts in the bin of its expected acceptance rate, each step in the row of
its number of tokens. The picture shows whether expected and real figures agree.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from modeling_lmtp.benchmarks.conditions import base_name, device_name
from modeling_lmtp.benchmarks.quiet import measure_quietness, quiet_record
from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer
from modeling_lmtp.conversion.prompts import read_prompts, render_prompt
from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.planned_drafter_lmtp import PlannedDrafter

PROMPTS = Path(__file__).parents[1] / "kinds.jsonl"
NUM_BINS = 10


class PlannerLog:
    """What planned drafts expected of each candidate and step, and what came of it."""

    def __init__(self) -> None:
        self.candidates: list[tuple[float, bool]] = []  # expected rate, accepted
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Log every step of planned drafts."""
        observe = PlannedDrafter.observe

        def logged(drafter: PlannedDrafter, tokens: Sequence[Sequence[int]]) -> None:
            step = drafter._step
            if step is not None:
                self._log(step, drafter.planner.clock(), tokens)
            observe(drafter, tokens)

        with mock.patch.object(PlannedDrafter, "observe", logged):
            yield

    def _log(self, step: Any, now: float, tokens: Sequence[Sequence[int]]) -> None:
        for row, emitted in zip(step.draft.rows, tokens, strict=True):
            for path, value in row:
                self.candidates.append((value, path == tuple(emitted[: len(path)])))
        costs = step.memory.costs
        self.steps.append({
            "tokens": step.size,
            "seconds": now - step.began,
            "draft_seconds": step.draft_seconds,
            "expected_cost": costs.cost(step.size),
            "expected": step.draft.expected,
            "accepted": sum(map(len, tokens)) - len(tokens),
        })  # fmt: skip

    def calibration(self) -> list[dict[str, float]]:
        """Return the expected and the real acceptance rate of the candidates of each bin."""
        bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        for value, accepted in self.candidates:
            bins[min(NUM_BINS - 1, int(value * NUM_BINS))].append((value, accepted))
        return [
            {
                "candidates": len(found),
                "expected": round(statistics.fmean(value for value, _ in found), 4),
                "accepted": round(statistics.fmean(accepted for _, accepted in found), 4),
            }
            for _, found in sorted(bins.items())
        ]

    def costs(self) -> list[dict[str, float]]:
        """Return the expected and the real cost of the steps of each size, in plain steps."""
        by_size: dict[int, list[dict[str, float]]] = defaultdict(list)
        for step in self.steps:
            by_size[int(step["tokens"])].append(step)
        plain = statistics.median(step["seconds"] for step in by_size[1])
        return [
            {
                "tokens": size,
                "steps": len(steps),
                "expected_cost": round(statistics.median(s["expected_cost"] for s in steps), 4),
                "cost": round(statistics.median(s["seconds"] for s in steps) / plain, 4),
                "draft_ms": round(statistics.median(s["draft_seconds"] for s in steps) * 1e3, 3),
            }
            for size, steps in sorted(by_size.items())
        ]


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw expected against real rates and costs."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    rates, costs = record["calibration"], record["costs"]
    left.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    left.plot([r["expected"] for r in rates], [r["accepted"] for r in rates], marker="o")
    left.set(xlabel="expected acceptance rate", ylabel="accepted", title="candidates")
    for name in ("cost", "expected_cost"):
        right.plot([c["tokens"] for c in costs], [c[name] for c in costs], marker="o", label=name)
    right.set(xlabel="tokens per pass", ylabel="plain passes", title="cost of a pass")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Decode some prompts with planned drafts, and write what they logged."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    model = load_lmtp(arguments.checkpoint, arguments.dtype)
    tokenizer = load_tokenizer(arguments.checkpoint)
    prompts = read_prompts(arguments.prompts)
    before, log = measure_quietness(model.device), PlannerLog()
    with log.listening():
        for prompt in prompts:
            ids = torch.tensor([render_prompt(tokenizer, prompt.text)], device=model.device)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                use_lmtp=True,
                do_sample=False,
                max_new_tokens=arguments.new_tokens,
            )
    record = {
        "command": "python benchmarks/scripts/planner_log.py",
        "conditions": {
            "base_model": base_name(model),
            "device": device_name(model.device),
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "prompts": arguments.prompts.name,
            "new_tokens": arguments.new_tokens,
            **quiet_record(before, measure_quietness(model.device)),
            "versions": versions(),
        },
        "steps": len(log.steps),
        "expected": round(sum(step["expected"] for step in log.steps), 1),
        "accepted": sum(step["accepted"] for step in log.steps),
        "calibration": log.calibration(),
        "costs": log.costs(),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.picture is not None:
        draw(record, arguments.picture)


if __name__ == "__main__":
    main()
