"""Does vLLM with leap heads write what it writes without, in as many steps as our own chain takes?

Greedy, on a CPU, request by request and under all that may go wrong between requests. Texts and steps come
from Transformers and from plain vLLM. Last, the same through the HTTP server, with streaming.

    python benchmarks/scripts/vllm_exactness.py HEADS --base FOLDER --output vllm_exactness.json
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.loading import first_prompts, load_tokenizer, prompt_tensors
from modeling_lmtp.conversion.saving import versions

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
PORT = 8123
LENGTH = 1024  # tokens of a request at most
# Side by side in one batch: what makes a step differ from request to request
MIXED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 17},
    {"stop": [".", "\n"]},
    {"logprobs": 3},
    {"repetition_penalty": 1.3},
    {"min_tokens": 20, "presence_penalty": 0.5},
    {"stop": ["the"], "include_stop_str_in_output": True},
    {"frequency_penalty": 0.4, "ignore_eos": True},
]


def ours(heads: Path, base: Path, prompts: list[torch.Tensor], tokens: int, depth: int) -> Any:
    """Return each prompt's greedy text, and how many steps our own chain takes for it."""
    model = LMTPForCausalLM.from_pretrained(heads, backbone=base, dtype=torch.float32)
    texts, steps = [], []
    for ids in prompts:
        options = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": tokens,
            "do_sample": False,
        }
        plain = model.generate(**options, use_lmtp=False)
        chain = model.generate(
            **options, use_lmtp=True, draft_length=depth, return_dict_in_generate=True
        )
        assert chain.sequences.tolist() == plain.tolist()
        texts.append(plain[0, ids.shape[1] :].tolist())
        steps.append(len(chain.acceptance_lengths[0]))
    return texts, steps


class Engine:
    """vLLM in this process, with heads or without."""

    def __init__(self, base: Path, heads: Path | None, depth: int, **settings: Any) -> None:
        from vllm import LLM

        speculation = {"model": str(heads), "num_speculative_tokens": depth}
        self.llm = LLM(
            str(base),
            speculative_config=speculation if heads else None,
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "disable_log_stats": False,
                "max_model_len": LENGTH,
                "enable_prefix_caching": False,
                "generation_config": "vllm",
                **settings,
            },
        )

    def __enter__(self) -> "Engine":
        """Return the engine."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Free its memory."""
        del self.llm
        gc.collect()

    def counter(self, name: str) -> int:
        """Return one of vLLM's counters."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}")

    def __call__(
        self, prompts: list[torch.Tensor], tokens: int, mixed: list[dict[str, Any]] | None = None
    ) -> list[Any]:
        """Generate greedily and return a text's output per prompt."""
        from vllm import SamplingParams

        settings = mixed or [{}]
        parameters = [
            SamplingParams(
                **{"temperature": 0, "max_tokens": tokens, **settings[i % len(settings)]}
            )
            for i in range(len(prompts))
        ]
        ids = [{"prompt_token_ids": prompt[0].tolist()} for prompt in prompts]
        done = self.llm.generate(ids, parameters, use_tqdm=False)
        return [request.outputs[0] for request in done]

    def with_aborts(self, prompts: list[torch.Tensor], tokens: int) -> list[list[int]]:
        """Abort every second request midway, and add a new one in its place; return all finished."""
        from vllm import SamplingParams

        engine, parameters = self.llm.llm_engine, SamplingParams(temperature=0, max_tokens=tokens)
        half = len(prompts) // 2
        late = list(range(half, len(prompts)))
        for index in range(half):
            prompt = {"prompt_token_ids": prompts[index][0].tolist()}
            engine.add_request(str(index), prompt, parameters)
        finished: dict[int, list[int]] = {}
        aborted: list[int] = []
        for step in range(10**6):
            for output in engine.step():
                if output.finished:
                    finished[int(output.request_id.split("-")[0])] = list(
                        output.outputs[0].token_ids
                    )
            if step % 7 == 6 and len(aborted) < half // 2:
                victim = 2 * len(aborted)
                engine.abort_request([str(victim)])
                aborted.append(victim)
            if step % 7 == 3 and late:
                prompt = {"prompt_token_ids": prompts[late[0]][0].tolist()}
                engine.add_request(str(late.pop(0)), prompt, parameters)
            if not engine.has_unfinished_requests() and not late:
                break
        return [finished.get(index, []) for index in range(len(prompts))]


def equal(found: list[Any], expected: list[Any]) -> str:
    """Say how many are equal."""
    return f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(expected)}"


def close(found: Any, expected: Any) -> bool:
    """Return whether two texts' log probabilities agree; both None agree as well."""
    if not found or not expected:
        return not found and not expected
    return all(
        abs(a[token].logprob - b[token].logprob) < 1e-3
        for a, b in zip(found, expected, strict=True)
        for token in a.keys() & b.keys()
    )


def in_process(
    heads: Path, base: Path, prompts: list[torch.Tensor], tokens: int, depth: int
) -> dict[str, Any]:
    """Compare all that needs no server."""
    texts, steps = ours(heads, base, prompts, tokens, depth)
    rows: dict[str, Any] = {}

    def record(name: str, engine: Engine, found: list[Any], before: tuple[int, int]) -> None:
        drafts, accepted = (
            engine.counter("spec_decode_num_drafts") - before[0],
            engine.counter("spec_decode_num_accepted_tokens") - before[1],
        )
        rows[name] = {
            "texts_as_transformers": equal(found, texts),
            "steps": drafts,
            "steps_of_our_chain": sum(steps),
            "tokens_per_step": round(1 + accepted / drafts, 3) if drafts else None,
        }
        print(name, rows[name], flush=True)

    def now(engine: Engine) -> tuple[int, int]:
        names = ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
        return engine.counter(names[0]), engine.counter(names[1])

    with Engine(base, None, depth, max_num_seqs=8) as plain:
        record(
            "plain vLLM, batch 8",
            plain,
            [list(o.token_ids) for o in plain(prompts, tokens)],
            (0, 0),
        )
        mixed_plain = plain(prompts, tokens, MIXED)
    with Engine(base, heads, depth, max_num_seqs=8) as engine:
        found, taken = [], []
        for prompt in prompts:
            before = now(engine)
            found.append(list(engine([prompt], tokens)[0].token_ids))
            taken.append(now(engine)[0] - before[0])
        record("one by one", engine, found, (0, 0))
        rows["one by one"]["steps_equal_per_request"] = equal(taken, steps)
        before = now(engine)
        record("batch 8", engine, [list(o.token_ids) for o in engine(prompts, tokens)], before)
        mixed = engine(prompts, tokens, MIXED)
        rows["different parameters side by side"] = {
            "ids_as_plain_vllm": equal(
                [list(o.token_ids) for o in mixed], [list(o.token_ids) for o in mixed_plain]
            ),
            "texts_as_plain_vllm": equal([o.text for o in mixed], [o.text for o in mixed_plain]),
            "logprobs_as_plain_vllm": equal(
                [close(a.logprobs, b.logprobs) for a, b in zip(mixed, mixed_plain, strict=True)],
                [True] * len(mixed),
            ),
            "reasons_as_plain_vllm": equal(
                [o.finish_reason for o in mixed], [o.finish_reason for o in mixed_plain]
            ),
        }
        aborts = engine.with_aborts(prompts, tokens)
        finished = [index for index, ids in enumerate(aborts) if ids]
        rows["every fourth request aborted"] = {
            "finished": len(finished),
            "texts_as_transformers": equal(
                [aborts[i] for i in finished], [texts[i] for i in finished]
            ),
        }
        print(json.dumps(rows, indent=1), flush=True)
    chunks = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "max_num_seqs": 8}
    with Engine(base, heads, depth, **chunks) as engine:
        record("chunks of 32", engine, [list(o.token_ids) for o in engine(prompts, tokens)], (0, 0))
    scarce = {"block_size": 32, "num_gpu_blocks_override": 40, "enable_prefix_caching": True}
    with Engine(base, heads, depth, max_num_seqs=16, **scarce) as engine:
        for name in ("preempted", "preempted, from the cache"):
            before = now(engine)
            record(name, engine, [list(o.token_ids) for o in engine(prompts, tokens)], before)
            rows[name]["preemptions"] = engine.counter("num_preemptions")
            rows[name]["prefix_cache_hits"] = engine.counter("prefix_cache_hits")
    return {"rows": rows, "texts": texts, "steps": steps}


@contextmanager
def server(base: Path, heads: Path, depth: int) -> Iterator[str]:
    """Serve heads over HTTP."""
    speculation = json.dumps({"model": str(heads), "num_speculative_tokens": depth})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--dtype", "float32", "--enforce-eager", "--port", str(PORT), "--max-num-seqs", "8"]
    command += ["--max-model-len", str(LENGTH), "--speculative-config", speculation]
    command += ["--generation-config", "vllm", "--served-model-name", "served"]
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{PORT}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://localhost:{PORT}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def streamed(url: str, prompt: list[int], tokens: int) -> tuple[str, int]:
    """Return the text of a streamed completion, and how many events it came in."""
    body = {
        "model": "served",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text, events = "", 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                events += 1
    return text, events


def over_http(
    heads: Path,
    base: Path,
    prompts: list[torch.Tensor],
    tokens: int,
    depth: int,
    expected: list[str],
) -> dict[str, Any]:
    """Compare streamed texts, four requests at a time, and read the server's own counters."""
    with server(base, heads, depth) as url, ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda p: streamed(url, p[0].tolist(), tokens), prompts))
        with urllib.request.urlopen(f"{url}/metrics") as response:
            lines = response.read().decode().splitlines()
    metrics = {
        line.partition("{")[0] + "".join(f" {p}" for p in line.split('position="')[1:2])[:2]: float(
            line.rpartition(" ")[2]
        )
        for line in lines
        if line.startswith("vllm:spec_decode") and "_created" not in line
    }
    return {
        "texts_as_transformers": equal([text for text, _ in done], expected),
        "events": sum(events for _, events in done),
        "metrics": metrics,
    }


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path("benchmarks/held_out.jsonl"))
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.base)
    texts = first_prompts(options.prompts, "prompt", options.num_prompts)
    prompts = prompt_tensors(tokenizer, texts, torch.device("cpu"))
    shared = (options.heads, options.base, prompts, options.tokens, options.depth)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found = in_process(*shared)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found["texts"]]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    found["rows"]["HTTP, streamed, four at a time"] = over_http(*shared, expected)
    import vllm

    record = {
        "command": f"python benchmarks/scripts/vllm_exactness.py {options.heads.name}",
        "heads": options.heads.name,
        "base": options.base.name,
        "prompts": f"{options.prompts.name}, the first {options.num_prompts}",
        "max_new_tokens": options.tokens,
        "num_speculative_tokens": options.depth,
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "model_runner": "V2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "V1",
        "versions": {**versions(), "vllm": vllm.__version__},
        "rows": found["rows"],
        "steps_of_our_chain": found["steps"],
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
