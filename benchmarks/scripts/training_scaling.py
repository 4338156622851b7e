"""Measures how time and memory of a warm-up step scale with parameters, heads, length and vocabulary.

Each row changes one thing in a small random model. Time is the median of a few steps (backbone, heads,
backward pass, optimizer). Memory is counted, not sampled: the peak of the bytes in tensors created during
the step, without weights and without what kernels use internally; it is the same on every machine.

    python benchmarks/scripts/training_scaling.py
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peak_bytes import MEGABYTE, PeakBytes
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.training.objective import HeadObjective

RESULTS = Path(__file__).parents[1] / "results" / "training_scaling.json"
NOTE = Path(__file__).parents[1] / "training_scaling.md"
MARKER = "<!-- tables: written by training_scaling.py -->"
BATCH_SIZE = 1
STEPS = 3


@dataclass(frozen=True)
class Setup:
    """One model and one batch."""

    heads: int = 3
    length: int = 512
    vocab_size: int = 8192
    hidden_size: int = 256
    layers: int = 4
    draft_vocab_size: int | None = None
    share_lm_head: bool = True
    distillation_weight: float = 0.0


BASE = Setup()
LARGE_VOCABULARY = replace(BASE, vocab_size=65536)
VARIED: dict[str, list[Setup]] = {
    "heads": [replace(BASE, heads=heads) for heads in (1, 2, 3, 6)],
    "length": [replace(BASE, length=length) for length in (128, 256, 512, 1024)],
    "vocab_size": [replace(BASE, vocab_size=size) for size in (2048, 8192, 32768, 65536)],
    "draft_vocab_size": [
        replace(LARGE_VOCABULARY, draft_vocab_size=size) for size in (2048, 8192, 32768)
    ],
    "hidden_size": [replace(BASE, hidden_size=size) for size in (128, 256, 512)],
    "layers": [replace(BASE, layers=layers) for layers in (2, 4, 8, 16)],
    "share_lm_head": [BASE, replace(BASE, share_lm_head=False)],
    "distillation_weight": [BASE, replace(BASE, distillation_weight=0.5)],
}


def build(setup: Setup) -> LMTPForCausalLM:
    """Return a random model with heads at offsets 2, 3, …"""
    config = LlamaConfig(
        vocab_size=setup.vocab_size,
        hidden_size=setup.hidden_size,
        intermediate_size=3 * setup.hidden_size,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.hidden_size // 32,
        num_key_value_heads=setup.hidden_size // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LMTPForCausalLM.from_backbone(
        LlamaForCausalLM(config),
        setup.heads,
        1,
        share_lm_head=setup.share_lm_head,
        draft_token_ids=range(setup.draft_vocab_size) if setup.draft_vocab_size else None,
    )
    return model.train()


def step_of(model: LMTPForCausalLM, setup: Setup) -> Callable[[], None]:
    """Return what does one warm-up step."""
    highest = setup.draft_vocab_size or setup.vocab_size
    input_ids = torch.randint(highest, (BATCH_SIZE, setup.length))
    objective = HeadObjective(setup.heads, setup.distillation_weight)
    optimizer = torch.optim.AdamW(model.leap_heads.parameters(), lr=1e-3)

    def step() -> None:
        model(input_ids, labels=input_ids, leap_objective=objective).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def backbone_pass_of(model: LMTPForCausalLM, setup: Setup) -> Callable[[], None]:
    """Return what runs the backbone alone, as the step does: without gradients, one row of logits."""
    input_ids = torch.randint(setup.vocab_size, (BATCH_SIZE, setup.length))

    @torch.no_grad()
    def run() -> None:
        model.backbone(input_ids, use_cache=False, logits_to_keep=1)

    return run


def measure(setup: Setup) -> dict[str, Any]:
    """Time and count one setup; steps and backbone passes take turns."""
    model = build(setup)
    step, backbone_pass = step_of(model, setup), backbone_pass_of(model, setup)
    step()  # the optimizer makes its state
    with PeakBytes() as of_backbone:
        backbone_pass()
    with PeakBytes() as of_step:
        step()
    times: dict[str, list[float]] = {"step": [], "backbone": []}
    for _ in range(STEPS):
        for name, run in (("step", step), ("backbone", backbone_pass)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    heads = sum(parameter.numel() for parameter in model.leap_heads.parameters())
    seconds = {name: statistics.median(measured) for name, measured in times.items()}
    return {
        **asdict(setup),
        "backbone_parameters": sum(p.numel() for p in model.backbone.parameters()),
        "head_parameters": heads,
        "step_ms": round(1e3 * seconds["step"], 1),
        "backbone_ms": round(1e3 * seconds["backbone"], 1),
        "step_peak_mb": round(of_step.peak / MEGABYTE, 1),
        "backbone_peak_mb": round(of_backbone.peak / MEGABYTE, 1),
        "gradients_mb": round(4 * heads / MEGABYTE, 1),
        "all_logits_mb": round(
            4 * BATCH_SIZE * setup.length * setup.heads * setup.vocab_size / MEGABYTE, 1
        ),
    }


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Return one table in Markdown."""
    columns = ("step_ms", "backbone_ms", "step_peak_mb", "backbone_peak_mb", "gradients_mb")
    lines = [
        f"| {name} | parameters | step ms | backbone ms | step peak MB | backbone peak MB | gradients MB "
        "| logits of all heads MB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        millions = (
            f"{row['backbone_parameters'] / 1e6:.1f} M + {row['head_parameters'] / 1e6:.2f} M"
        )
        cells = [str(row[name]), millions, *(f"{row[c]:g}" for c in (*columns, "all_logits_mb"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def note(record: dict[str, Any]) -> str:
    """Return the tables with their conditions, below what is written by hand."""
    by_hand = NOTE.read_text().split(MARKER)[0].rstrip() if NOTE.exists() else ""
    conditions = (
        f"{record['device']}, {record['threads']} thread(s), float32, batch {BATCH_SIZE}, torch "
        f"{record['versions']['torch']}, load {record['load_before']} before, {record['time']}. "
        f"All else as in: {', '.join(f'{k} {v}' for k, v in asdict(BASE).items())}; "
        f"draft_vocab_size with vocab_size {LARGE_VOCABULARY.vocab_size}."
    )
    tables = [table(name, rows) for name, rows in record["results"].items()]
    return "\n\n".join([by_hand, MARKER, conditions, *tables]) + "\n"


def main() -> None:
    """Measure all, and write the figures and the tables."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    load = round(os.getloadavg()[0], 2)
    results = {name: [measure(setup) for setup in setups] for name, setups in VARIED.items()}
    record = {
        "command": "benchmarks/scripts/training_scaling.py",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "load_before": load,
        "time": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "batch_size": BATCH_SIZE,
        "results": results,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    NOTE.write_text(note(record))
    print(NOTE.read_text())


if __name__ == "__main__":
    main()
