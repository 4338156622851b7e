"""Run vLLM on a CPU, as a program of its own: `python vllm_engine.py JOBS.json RESULTS.json [--v2]`.

A job is an engine and calls of it, in order: `{"engine": {…}, "calls": [[[prompt, sampling], …], …]}`;
prompts are token ids. A result is `{"outputs": …, "steps": …}`: of each call and prompt its texts as
`{"ids": …, "text": …, "logprobs": …}`, and of each call how many drafts were verified.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def use_second_runner() -> None:
    """Make vLLM's second model runner run on a CPU: its kernels in Triton's interpreter."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False}
    llm = LLM(**{**engine, **job["engine"]})
    outputs, steps = [], []
    for call in job["calls"]:
        before = num_drafts(llm)
        prompts = [{"prompt_token_ids": ids} for ids, _ in call]
        sampling = [SamplingParams(**settings) for _, settings in call]
        done = llm.generate(prompts, sampling, use_tqdm=False)
        outputs.append([[output(text) for text in request.outputs] for request in done])
        steps.append(num_drafts(llm) - before)
    del llm
    gc.collect()
    return {"outputs": outputs, "steps": steps}


def output(text: Any) -> dict[str, Any]:
    logprobs = None
    if text.logprobs:
        logprobs = [{token: entry.logprob for token, entry in at.items()} for at in text.logprobs]
    return {"ids": list(text.token_ids), "text": text.text, "logprobs": logprobs}


def num_drafts(llm: Any) -> int:
    return sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_drafts"
    )


def main() -> None:
    os.environ.update(ENVIRONMENT)
    if "--v2" in sys.argv:
        use_second_runner()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = [run(job) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
