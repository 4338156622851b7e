"""vLLM with leap heads against plain vLLM: tokens per second, both engines up and taking turns.

Each engine is a process of its own, with a thread per core. In every round both answer the same groups of
prompts, first one and then the other. Prefills are cached, so that decoding is timed. Run it on a quiet
machine. The output file keeps the runs of other dtypes.

    python benchmarks/scripts/vllm_speed.py HEADS --base FOLDER --output vllm_speed.json
    python benchmarks/scripts/vllm_speed.py … --dtype float32
"""

import argparse
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm_engine import EngineProcess, speculation

from modeling_lmtp.benchmarks.quiet import measure_quietness, quartiles, quiet_record
from modeling_lmtp.conversion.loading import first_prompts, load_tokenizer
from modeling_lmtp.conversion.prompts import render_prompt
from modeling_lmtp.conversion.saving import versions

BATCHES = (1, 8)
CACHED_PREFIXES = {"enable_prefix_caching": True, "block_size": 32}
Rounds = dict[str, list[float]]  # of each engine, the seconds of each round


def seconds_of(engine: EngineProcess, prompts: list[list[int]], tokens: int) -> float:
    """Return the time that one call takes; no text ends early."""
    sampling = [{"temperature": 0, "max_tokens": tokens, "ignore_eos": True}] * len(prompts)
    start = time.perf_counter()
    engine.generate(prompts, sampling)
    return time.perf_counter() - start


def time_round(
    engines: dict[str, EngineProcess],
    prompts: list[list[int]],
    batch: int,
    tokens: int,
    is_odd: bool,
) -> dict[str, float]:
    """Return the seconds that each engine takes for all prompts; they take turns group by group."""
    seconds = dict.fromkeys(engines, 0.0)
    for number, start in enumerate(range(0, len(prompts), batch)):
        turns = list(engines) if (number + is_odd) % 2 else list(engines)[::-1]
        for name in turns:
            seconds[name] += seconds_of(engines[name], prompts[start : start + batch], tokens)
    return seconds


def summarize(rounds: Rounds, num_tokens: int, tokens_per_step: float | None) -> dict[str, Any]:
    """Return medians and quartiles over the rounds.

    Args:
        rounds: of both engines.
        num_tokens: that an engine writes in a round.
        tokens_per_step: with heads.
    """
    speed_ups = [p / h for p, h in zip(rounds["plain"], rounds["heads"], strict=True)]
    speed_up = statistics.median(speed_ups)
    rates = {
        f"{name}_tokens_per_second": round(num_tokens / statistics.median(seconds), 1)
        for name, seconds in rounds.items()
    }
    return {
        **rates,
        "tokens_per_step": tokens_per_step,
        "step_cost": tokens_per_step and round(tokens_per_step / speed_up, 3),
        "speed_up": round(speed_up, 3),
        "speed_up_quartiles": [round(value, 3) for value in quartiles(speed_ups)],
        "seconds": {name: [round(s, 3) for s in seconds] for name, seconds in rounds.items()},
    }


def compare(
    engines: dict[str, EngineProcess], prompts: list[list[int]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row of figures for each batch size."""
    rows = []
    for batch in BATCHES:
        rounds: Rounds = {name: [] for name in engines}
        engines["heads"].new_steps()
        for number in range(options.rounds):
            timed = time_round(engines, prompts, batch, options.tokens, number % 2 == 1)
            for name, seconds in timed.items():
                rounds[name].append(seconds)
        steps = engines["heads"].new_steps().tokens_per_step
        figures = summarize(rounds, len(prompts) * options.tokens, steps)
        rows.append({"batch_size": batch, **figures})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path("benchmarks/held_out.jsonl"))
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    # vLLM would keep a core back, and bind all engines to the same others
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    before = measure_quietness(torch.device("cpu"))
    tokenizer = load_tokenizer(options.base)
    texts = first_prompts(options.prompts, "prompt", options.num_prompts)
    prompts = [render_prompt(tokenizer, text) for text in texts]
    engines = {
        name: EngineProcess(
            model=str(options.base),
            dtype=options.dtype,
            max_model_len=1024,
            max_num_seqs=max(BATCHES),
            **CACHED_PREFIXES,
            speculative_config=speculation(heads, options.depth),
        )
        for name, heads in {"plain": None, "heads": options.heads}.items()
    }
    for engine in engines.values():
        for batch in BATCHES:
            for start in range(0, len(prompts), batch):
                seconds_of(engine, prompts[start : start + batch], 8)
    rows = compare(engines, prompts, options)
    record = {
        "heads": options.heads.name,
        "base": options.base.name,
        "prompts": f"{options.prompts.name}, the first {options.num_prompts}",
        "max_new_tokens": options.tokens,
        "num_speculative_tokens": options.depth,
        "rounds": options.rounds,
        "device": "cpu",
        "threads": int(threads),
        "versions": {**versions(), "vllm": version("vllm-cpu")},
        **quiet_record(before, measure_quietness(torch.device("cpu"))),
        "rows": rows,
    }
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    text = json.dumps({**found, options.dtype: record}, indent=2)
    options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
