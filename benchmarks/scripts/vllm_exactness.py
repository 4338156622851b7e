"""Does vLLM with leap heads write what it writes without, in as many steps as our own chain takes?

Greedy, on a CPU, request by request and under all that may go wrong between requests. In float32, texts
and steps come from Transformers and from plain vLLM, and last the same goes through the HTTP server, with
streaming. In bfloat16, tokens that differ from plain vLLM's are listed with how nearly its two best logits
tie. The output file keeps the runs of other dtypes and model runners.

    python benchmarks/scripts/vllm_exactness.py HEADS --base FOLDER --output vllm_exactness.json
    python benchmarks/scripts/vllm_exactness.py … --dtype bfloat16
    export TRITON_INTERPRET=1
    python benchmarks/scripts/vllm_exactness.py … --second_runner --num_prompts 4 --tokens 24
"""

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from vllm_engine import Engine, Sampling, Steps, prepare, read_metrics, server, speculation, stream
from vllm_run import BATCH, LENGTH, Ids, Run, ask_transformers, equal, ids_of

from modeling_lmtp.benchmarks.divergence import first_difference
from modeling_lmtp.conversion.loading import first_prompts, load_tokenizer
from modeling_lmtp.conversion.prompts import render_prompt
from modeling_lmtp.conversion.saving import versions

# Side by side in one batch: what makes a step differ from request to request
MIXED: list[Sampling] = [
    {},
    {"max_tokens": 17},
    {"stop": [".", "\n"]},
    {"logprobs": 3},
    {"repetition_penalty": 1.3},
    {"min_tokens": 20, "presence_penalty": 0.5},
    {"stop": ["the"], "include_stop_str_in_output": True},
    {"frequency_penalty": 0.4, "ignore_eos": True},
]


def compare_batches(run: Run) -> None:
    """Compare the texts of plain vLLM and of heads, eight requests at a time."""
    for name, with_heads in {"plain vLLM, batch 8": False, "batch 8": True}.items():
        with run.engine(with_heads) as engine:
            run.compare(name, engine)


def compare_one_by_one(run: Run) -> None:
    """Compare the texts and the number of steps of each request alone."""
    texts, counted = [], []
    with run.engine() as engine:
        for prompt in run.prompts:
            texts += ids_of(engine.generate([prompt], [run.greedy()])[0])
            counted.append(engine.new_steps())
    total = Steps(*map(sum, zip(*counted, strict=True)))
    each = equal([steps.drafts for steps in counted], run.steps)
    run.record("one by one", total, texts, steps_equal_per_request=each)


def compare_parameters(run: Run) -> None:
    """Compare requests with different parameters side by side with plain vLLM's."""
    with run.engine(with_heads=False) as engine:
        plain = run.generate(engine, MIXED)
    with run.engine() as engine:
        mixed = run.generate(engine, MIXED)
    run.rows["different parameters side by side"] = {
        "ids_as_plain_vllm": equal(ids_of(mixed), ids_of(plain)),
        "texts_as_plain_vllm": equal([o.text for o in mixed], [o.text for o in plain]),
        "logprobs_as_plain_vllm": equal(
            [close(a.logprobs, b.logprobs) for a, b in zip(mixed, plain, strict=True)],
            [True] * len(mixed),
        ),
        "reasons_as_plain_vllm": equal(
            [o.finish_reason for o in mixed], [o.finish_reason for o in plain]
        ),
    }


def close(found: Any, expected: Any) -> bool:
    """Return whether two texts' log probabilities agree; both None agree as well."""
    if not found or not expected:
        return not found and not expected
    return all(
        abs(a[token].logprob - b[token].logprob) < 1e-3
        for a, b in zip(found, expected, strict=True)
        for token in a.keys() & b.keys()
    )


def compare_aborts(run: Run) -> None:
    """Compare the texts of requests among which others are aborted."""
    with run.engine() as engine:
        finished = generate_with_aborts(run, engine)
    run.rows["every fourth request aborted"] = {
        "finished": len(finished),
        "texts_equal": equal(list(finished.values()), [run.texts[i] for i in finished]),
    }


def generate_with_aborts(run: Run, engine: Engine) -> dict[int, Ids]:
    """Abort every second request midway, and add a new one in its place; return all that finish."""
    from vllm import SamplingParams

    core, half = engine.llm.llm_engine, len(run.prompts) // 2

    def add(index: int) -> None:
        prompt = {"prompt_token_ids": run.prompts[index]}
        core.add_request(str(index), prompt, SamplingParams(**run.greedy()))

    for index in range(half):
        add(index)
    late, victims = list(range(half, len(run.prompts))), list(range(0, half, 2))
    finished: dict[int, Ids] = {}
    step = 0
    while core.has_unfinished_requests() or late:
        for output in core.step():
            if output.finished:
                finished[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
        if step % 7 == 6 and victims:
            core.abort_request([str(victims.pop(0))])
        if step % 7 == 3 and late:
            add(late.pop(0))
        step += 1
    return {index: ids for index, ids in sorted(finished.items()) if ids}


def compare_chunks(run: Run) -> None:
    """Compare texts whose prompts are read in pieces."""
    chunks = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}
    with run.engine(**chunks) as engine:
        run.compare("chunks of 32", engine)


def compare_preemptions(run: Run) -> None:
    """Compare texts where the cache is too small for all requests."""
    scarce = {"block_size": 32, "num_gpu_blocks_override": 40}
    with run.engine(max_num_seqs=16, **scarce) as engine:
        run.compare("preempted", engine)
        run.rows["preempted"]["preemptions"] = engine.counter("num_preemptions")


def compare_prefix_cache(run: Run) -> None:
    """Compare texts whose prompts are in the prefix cache."""
    with run.engine(block_size=32, enable_prefix_caching=True) as engine:
        for name in ("into the prefix cache", "from the prefix cache"):
            before = engine.counter("prefix_cache_hits")
            run.compare(name, engine)
            run.rows[name]["cached_tokens"] = engine.counter("prefix_cache_hits") - before


def compare_over_http(run: Run) -> None:
    """Compare streamed texts, four requests at a time, and read the server's own counters."""
    expected = [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in run.texts]
    prepare(in_process=False)
    settings = json.dumps(speculation(run.heads, run.depth))
    arguments = ["--speculative-config", settings, "--dtype", run.dtype]
    arguments += ["--max-num-seqs", str(BATCH), "--max-model-len", str(LENGTH)]
    with server(run.base, *arguments) as url, ThreadPoolExecutor(4) as pool:
        ask = {"model": "served", **run.greedy()}
        done = list(pool.map(lambda prompt: stream(url, {**ask, "prompt": prompt}), run.prompts))
        metrics = read_metrics(url, "vllm:spec_decode")
    run.rows["HTTP, streamed, four at a time"] = {
        "texts_equal": equal([text for text, _ in done], expected),
        "events": sum(events for _, events in done),
        "metrics": metrics,
    }


def compare_rounded(run: Run) -> None:
    """Find the tokens that heads change in 16 bits, and how nearly plain vLLM's two best logits tie.

    After each it continues from plain vLLM's text, so that one near-tie counts as one token.
    """
    with run.engine(with_heads=False) as engine:
        plain = run.generate(engine, [{"logprobs": 2}])
    run.texts = ids_of(plain)
    margins = [[margin(at) for at in output.logprobs] for output in plain]
    changed: list[float] = []
    with run.engine() as engine:
        known: dict[int, Ids] = {index: [] for index in range(len(plain))}
        while known:
            prompts = [run.prompts[index] + ids for index, ids in known.items()]
            sampling = [run.greedy(max_tokens=run.tokens - len(ids)) for ids in known.values()]
            done = engine.generate(prompts, sampling)
            texts = [ids + ids_of(t)[0] for ids, t in zip(known.values(), done, strict=True)]
            if not run.rows:
                run.record("batch 8", engine.new_steps(), texts)
            starts, known = known, {}
            for index, text in zip(starts, texts, strict=True):
                whole = run.texts[index]
                position = first_difference(whole, text)
                if position < len(whole):
                    changed.append(margins[index][position])
                if position + 1 < len(whole):
                    known[index] = whole[: position + 1]
    run.rows["tokens that differ from plain vLLM's"] = {
        "tokens": f"{len(changed)} of {sum(map(len, margins))}",
        "margins_of_its_two_best_logits": sorted(round(value, 4) for value in changed),
        "median_margin_of_all_tokens": round(statistics.median(chain(*margins)), 4),
    }


def margin(entries: Any) -> float:
    """Return by how much the best log probability of a position exceeds the second."""
    best, second, *_ = sorted((entry.logprob for entry in entries.values()), reverse=True)
    return float(best - second)


def sections(run: Run, second_runner: bool) -> list[Callable[[Run], None]]:
    """Return all comparisons that the dtype and the model runner allow."""
    if run.dtype != "float32":
        return [compare_rounded]
    common = [ask_transformers, compare_batches, compare_one_by_one]
    if second_runner:  # Triton's interpreter takes its time
        return common
    stress = [compare_parameters, compare_aborts, compare_chunks, compare_preemptions]
    return [*common, *stress, compare_prefix_cache, compare_over_http]


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path("benchmarks/held_out.jsonl"))
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--second_runner", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.base)
    texts = first_prompts(options.prompts, "prompt", options.num_prompts)
    run = Run(
        heads=options.heads,
        base=options.base,
        tokenizer=tokenizer,
        prompts=[render_prompt(tokenizer, text) for text in texts],
        tokens=options.tokens,
        depth=options.depth,
        dtype=options.dtype,
    )
    prepare(options.second_runner)
    import vllm

    runner = "V2" if options.second_runner else "V1"
    record = {
        "heads": options.heads.name,
        "base": options.base.name,
        "prompts": f"{options.prompts.name}, the first {options.num_prompts}",
        "max_new_tokens": options.tokens,
        "num_speculative_tokens": options.depth,
        "dtype": options.dtype,
        "model_runner": runner,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "vllm": vllm.__version__},
        "rows": run.rows,
        "steps_of_our_chain": run.steps,
    }
    for section in sections(run, options.second_runner):
        section(run)
        found = json.loads(options.output.read_text()) if options.output.exists() else {}
        text = json.dumps({**found, f"{options.dtype}, {runner}": record}, indent=2)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
