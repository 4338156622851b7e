"""What training costs beside what cannot be done without, at the shapes of SmolLM2-135M.

*time*: a warm-up step of 3 heads over a plain forward pass of the same tokens (goal: at most 1.3). The
plain pass gives logits, as in evaluation; beside it stands one that gives the last states alone.

*memory*: the joint loss with 6 heads over that of next-token prediction alone, length 1,024 (goal: at
most 1.2), with LoRA and with all weights training. In both, next-token prediction is the backbone's own
loss, which Transformers computes from whole logits; beside them stands one in chunks, as the heads' is.
Counted as in `training_scaling`: the most bytes that tensors made during loss and gradients hold at one
moment.

Weights are random: neither depends on them.

    python benchmarks/scripts/training_cost.py time memory
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peak_bytes import MEGABYTE, PeakBytes
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.losses_lmtp import sum_of_means, token_cross_entropy
from modeling_lmtp.training.adapters import add_adapters
from modeling_lmtp.training.objective import HeadObjective

RESULTS = Path(__file__).parents[1] / "results" / "training_cost.json"
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TIMED_HEADS, COUNTED_HEADS = 3, 6
LENGTH = 1024
DRAFT_VOCABULARY = 8192
REPEATS = 5

Loss = Callable[[Any, torch.Tensor], torch.Tensor]  # of a model and tokens `(1, L)`, a scalar


def build(num_heads: int, layers: int, **options: Any) -> LMTPForCausalLM:
    """Return a random model with heads at offsets 2, 3, …"""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers}))
    return LMTPForCausalLM.from_backbone(backbone, num_heads, 1, **options)


def tokens(length: int, vocab_size: int) -> torch.Tensor:
    """Return one row of random tokens `(1, L)`."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def warm_up_step(
    model: LMTPForCausalLM, input_ids: torch.Tensor, known_states: torch.Tensor | None = None
) -> Callable[[], None]:
    """Return what does one warm-up step: loss, gradients, optimizer."""
    objective = HeadObjective(len(model.leap_heads))
    optimizer = torch.optim.AdamW(model.leap_heads.parameters(), lr=1e-3)

    def step() -> None:
        model(
            input_ids, labels=input_ids, leap_objective=objective, known_states=known_states
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_time(length: int, layers: int) -> dict[str, Any]:
    """Time steps and passes over the same tokens; they take turns."""
    model = build(TIMED_HEADS, layers).train()
    small = LMTPForCausalLM.from_backbone(
        model.backbone, TIMED_HEADS, 1, draft_token_ids=range(DRAFT_VOCABULARY)
    ).train()
    input_ids = tokens(length, DRAFT_VOCABULARY)
    with torch.no_grad(), model.head_states(num_logits=1) as states:
        model.backbone(input_ids, use_cache=False)

    @torch.no_grad()
    def plain_pass(**options: Any) -> None:
        model.backbone(input_ids, use_cache=False, **options)

    runs = {
        "plain_pass": plain_pass,
        "plain_pass_states_alone": lambda: plain_pass(logits_to_keep=1),
        "warm_up": warm_up_step(model, input_ids),
        "warm_up_known_states": warm_up_step(model, input_ids, states[-1]),
        "warm_up_draft_vocabulary": warm_up_step(small, input_ids),
        "warm_up_draft_vocabulary_known_states": warm_up_step(small, input_ids, states[-1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + REPEATS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "heads": TIMED_HEADS,
        "draft_vocabulary": DRAFT_VOCABULARY,
        "seconds": {name: round(median, 4) for name, median in medians.items()},
        "over_plain_pass": {
            name: round(median / medians["plain_pass"], 3) for name, median in medians.items()
        },
    }


def own_loss(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the model's loss: the backbone's, and the heads' if it has any."""
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def chunked_next_token_loss(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of next-token prediction in chunks, without whole logits."""
    with model.head_states(num_logits=1) as states:
        model.backbone(input_ids, use_cache=False)
    unembedding = model.get_output_embeddings()
    loss, _ = sum_of_means([token_cross_entropy(unembedding, states[-1][0, :-1], input_ids[0, 1:])])
    return loss


def peak_of(loss_of: Loss, num_heads: int, length: int, layers: int, *, lora: bool) -> int:
    """Return the peak bytes of a loss and its gradients."""
    model: Any = build(num_heads, layers, train_backbone=True).train()
    if lora:
        model = add_adapters(model).train()
    input_ids = tokens(length, SMOLLM2["vocab_size"])
    with PeakBytes() as counted:
        loss_of(model, input_ids).backward()
    return counted.peak


def measure_memory(length: int, layers: int) -> dict[str, Any]:
    """Count the joint loss with heads, and that of next-token prediction alone."""
    measured: dict[str, Any] = {"heads": COUNTED_HEADS}
    runs: dict[str, tuple[Loss, int]] = {
        "ntp": (own_loss, 0),
        "ntp_in_chunks": (chunked_next_token_loss, 0),
        "joint": (own_loss, COUNTED_HEADS),
    }
    for name, lora in (("lora", True), ("all_weights", False)):
        peaks = {
            run: peak_of(loss_of, heads, length, layers, lora=lora)
            for run, (loss_of, heads) in runs.items()
        }
        measured[name] = {
            "peak_mb": {run: round(peak / MEGABYTE, 1) for run, peak in peaks.items()},
            "joint_over_ntp": round(peaks["joint"] / peaks["ntp"], 3),
            "joint_over_ntp_in_chunks": round(peaks["joint"] / peaks["ntp_in_chunks"], 3),
        }
    return measured


MEASURES = {"time": measure_time, "memory": measure_memory}


def main() -> None:
    """Measure what is asked for, and add it to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("measures", nargs="+", choices=MEASURES)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    record = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.measures:
        load = round(os.getloadavg()[0], 2)
        record[name] = {
            "command": f"benchmarks/scripts/training_cost.py {name}",
            "device": "cpu",
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "load_before": load,
            "time": time.strftime("%Y-%m-%d"),
            "versions": versions(),
            "model": {**SMOLLM2, "num_hidden_layers": options.layers},
            "batch_size": 1,
            "length": options.length,
            **MEASURES[name](options.length, options.layers),
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
