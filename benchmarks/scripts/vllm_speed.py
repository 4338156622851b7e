"""vLLM with leap heads against plain vLLM: tokens per second, with both engines up and taking turns.

python benchmarks/scripts/vllm_speed.py HEADS --base FOLDER --output vllm_speed.json
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from modeling_lmtp.conversion.loading import first_prompts, load_tokenizer, prompt_tensors
from modeling_lmtp.conversion.saving import versions

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Engines in processes of their own, so that two of them can be up at once
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"


def new_engine(base: Path, heads: Path | None, depth: int, dtype: str) -> Any:
    """Start vLLM with heads or without."""
    from vllm import LLM

    speculation = {"model": str(heads), "num_speculative_tokens": depth}
    return LLM(
        str(base),
        speculative_config=speculation if heads else None,
        dtype=dtype,
        enforce_eager=True,
        disable_log_stats=False,
        max_model_len=1024,
        max_num_seqs=8,
        enable_prefix_caching=False,
        generation_config="vllm",
    )


def counter(engine: Any, name: str) -> int:
    """Return one of vLLM's counters."""
    return sum(m.value for m in engine.get_metrics() if m.name == f"vllm:spec_decode_num_{name}")


def seconds_of(engine: Any, prompts: list[list[int]], tokens: int) -> float:
    """Return the time that one call takes; no text ends early."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return time.perf_counter() - start


def compare(
    plain: Any, heads: Any, prompts: list[list[int]], batch: int, tokens: int
) -> dict[str, Any]:
    """Let both engines answer each group of prompts in turn."""
    seconds: dict[str, list[float]] = {"plain": [], "heads": []}
    before = counter(heads, "drafts"), counter(heads, "accepted_tokens")
    for start in range(0, len(prompts) - batch + 1, batch):
        group = prompts[start : start + batch]
        turns = [("plain", plain), ("heads", heads)]
        for name, engine in turns if start // batch % 2 else turns[::-1]:
            seconds[name].append(seconds_of(engine, group, tokens))
    drafts = counter(heads, "drafts") - before[0]
    accepted = counter(heads, "accepted_tokens") - before[1]
    rates = {name: batch * tokens / statistics.median(times) for name, times in seconds.items()}
    return {
        "batch": batch,
        "calls": len(seconds["plain"]),
        "plain_tokens_per_second": round(rates["plain"], 1),
        "heads_tokens_per_second": round(rates["heads"], 1),
        "speed_up": round(rates["heads"] / rates["plain"], 3),
        "tokens_per_step": round(1 + accepted / drafts, 3),
        "seconds": seconds,
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path("benchmarks/held_out.jsonl"))
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    import vllm

    load = os.getloadavg()[0]
    tokenizer = load_tokenizer(options.base)
    texts = first_prompts(options.prompts, "prompt", options.num_prompts)
    prompts = [p[0].tolist() for p in prompt_tensors(tokenizer, texts, torch.device("cpu"))]
    rows = []
    for dtype in ("bfloat16", "float32"):
        plain = new_engine(options.base, None, options.depth, dtype)
        heads = new_engine(options.base, options.heads, options.depth, dtype)
        for engine in (plain, heads):
            seconds_of(engine, prompts[:2], 8)
        for batch in (1, 8):
            rows.append({"dtype": dtype, **compare(plain, heads, prompts, batch, options.tokens)})
            print({name: v for name, v in rows[-1].items() if name != "seconds"}, flush=True)
        del plain, heads
    record = {
        "command": f"python benchmarks/scripts/vllm_speed.py {options.heads.name}",
        "heads": options.heads.name,
        "base": options.base.name,
        "prompts": f"{options.prompts.name}, the first {options.num_prompts}",
        "max_new_tokens": options.tokens,
        "num_speculative_tokens": options.depth,
        "device": "cpu",
        "cores": os.cpu_count(),
        "load_at_the_start": load,
        "versions": {**versions(), "vllm": vllm.__version__},
        "rows": rows,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
