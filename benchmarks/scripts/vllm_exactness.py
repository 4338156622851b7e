"""Does vLLM with leap heads write what it writes without, in as many steps as our own chain takes?

Greedy, on a CPU, request by request and under all that may go wrong between requests. In float32, texts
and steps come from Transformers and from plain vLLM, and last the same goes through the HTTP server, with
streaming. In bfloat16, tokens that differ from plain vLLM's are listed with how nearly its two best logits
tie. The output file keeps the runs of other dtypes and model runners.

    python benchmarks/scripts/vllm_exactness.py HEADS --base FOLDER --output vllm_exactness.json
    python benchmarks/scripts/vllm_exactness.py … --dtype bfloat16
    python benchmarks/scripts/vllm_exactness.py … --second_runner --num_prompts 4 --tokens 24
"""

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm_engine import Engine, Sampling, Steps, prepare, read_metrics, server, speculation, stream

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks.divergence import first_difference
from modeling_lmtp.conversion.loading import first_prompts, load_tokenizer, prompt_tensors
from modeling_lmtp.conversion.saving import versions

BATCH = 8
LENGTH = 1024  # tokens of a request at most
Ids = list[int]
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


@dataclass
class Run:
    """What is compared, and how it went.

    Args:
        heads, base: folders.
        prompts: token ids.
        tokens: new tokens of a text at most.
        depth: tokens of a draft.
        dtype: of the model.
        texts: what each prompt's text should be.
        steps: how many steps our own chain takes for each; none if unknown.
        rows: the results.
    """

    heads: Path
    base: Path
    prompts: list[Ids]
    tokens: int
    depth: int
    dtype: str
    texts: list[Ids] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)

    def engine(self, with_heads: bool = True, **settings: Any) -> Engine:
        """Start vLLM with heads or without."""
        return Engine(
            model=str(self.base),
            dtype=self.dtype,
            max_model_len=LENGTH,
            speculative_config=speculation(self.heads if with_heads else None, self.depth),
            **{"max_num_seqs": BATCH, **settings},
        )

    def greedy(self, **more: Any) -> Sampling:
        """Return the settings of a greedy text."""
        return {"temperature": 0, "max_tokens": self.tokens, **more}

    def generate(self, engine: Engine, mixed: list[Sampling] | None = None) -> list[Any]:
        """Return the text of each prompt as vLLM's `CompletionOutput`."""
        settings = mixed or [{}]
        sampling = [self.greedy(**settings[i % len(settings)]) for i in range(len(self.prompts))]
        return [texts[0] for texts in engine.generate(self.prompts, sampling)]

    def record(self, name: str, counted: Steps, texts: list[Ids], **more: Any) -> None:
        """Compare texts with the expected ones, and what vLLM counted with our own chain."""
        row = {"texts_equal": equal(texts, self.texts)}
        if counted.drafts:
            row |= {"steps": counted.drafts, "tokens_per_step": counted.tokens_per_step}
        if counted.drafts and self.steps:
            row["steps_of_our_chain"] = sum(self.steps)
        self.rows[name] = {**row, **more}
        print(name, self.rows[name], flush=True)


def equal(found: list[Any], expected: list[Any]) -> str:
    """Say how many are equal."""
    return f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(expected)}"


def ids_of(outputs: list[Any]) -> list[Ids]:
    """Return the token ids of texts."""
    return [list(output.token_ids) for output in outputs]


def ask_transformers(run: Run) -> None:
    """Fill in the texts that our own chain writes in Transformers, and its steps for each."""
    model = LMTPForCausalLM.from_pretrained(run.heads, backbone=run.base, dtype=torch.float32)
    for start in range(0, len(run.prompts), BATCH):
        prompts = run.prompts[start : start + BATCH]
        length = max(map(len, prompts))
        padding = [length - len(prompt) for prompt in prompts]
        output = model.generate(
            torch.tensor([[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding]),
            max_new_tokens=run.tokens,
            do_sample=False,
            use_lmtp=True,
            draft_length=run.depth,
            return_dict_in_generate=True,
        )
        end = model.generation_config.eos_token_id
        run.texts += [until(end, ids) for ids in output.sequences[:, length:].tolist()]
        run.steps += map(len, output.acceptance_lengths)


def until(end: int, ids: Ids) -> Ids:
    """Return ids up to and including the token that ends a text."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def compare_batches(run: Run) -> None:
    """Compare the texts of plain vLLM and of heads, eight requests at a time."""
    for name, with_heads in {"plain vLLM, batch 8": False, "batch 8": True}.items():
        with run.engine(with_heads) as engine:
            texts = ids_of(run.generate(engine))
            run.record(name, engine.new_steps(), texts)


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
        texts = ids_of(run.generate(engine))
        run.record("chunks of 32", engine.new_steps(), texts)


def compare_preemptions(run: Run) -> None:
    """Compare texts where the cache is too small for all requests, and then from the prefix cache."""
    scarce = {"block_size": 32, "num_gpu_blocks_override": 40, "enable_prefix_caching": True}
    with run.engine(max_num_seqs=16, **scarce) as engine:
        for name in ("preempted", "preempted, from the cache"):
            texts = ids_of(run.generate(engine))
            counts = {n: engine.counter(n) for n in ("num_preemptions", "prefix_cache_hits")}
            run.record(name, engine.new_steps(), texts, **counts)


def compare_over_http(run: Run, tokenizer: Any) -> None:
    """Compare streamed texts, four requests at a time, and read the server's own counters."""
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in run.texts]
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
    differing: list[dict[str, Any]] = []
    with run.engine() as engine:
        texts = ids_of(run.generate(engine))
        run.record("batch 8", engine.new_steps(), texts)
        known = dict.fromkeys(range(len(run.prompts)), 0)
        while known:
            prompts = [run.prompts[i] + run.texts[i][:start] for i, start in known.items()]
            sampling = [run.greedy(max_tokens=run.tokens - start) for start in known.values()]
            texts = [ids_of(t)[0] for t in engine.generate(prompts, sampling)]
            starts, known = known, {}
            for (index, start), text in zip(starts.items(), texts, strict=True):
                position = start + first_difference(run.texts[index][start:], text)
                if position == len(run.texts[index]):
                    continue
                best, second = top_two(plain[index].logprobs[position])
                differing.append({"prompt": index, "position": position, "margin": best - second})
                if position + 1 < len(run.texts[index]):
                    known[index] = position + 1
    margins = sorted(round(token["margin"], 4) for token in differing)
    run.rows["tokens that differ from plain vLLM's"] = {
        "tokens": f"{len(margins)} of {sum(map(len, run.texts))}",
        "margins_of_its_two_best_logits": margins,
        "median_margin_of_all_tokens": round(
            statistics.median(
                best - second for output in plain for best, second in map(top_two, output.logprobs)
            ),
            4,
        ),
    }


def top_two(entries: Any) -> list[float]:
    """Return the two highest log probabilities of a position."""
    return sorted((entry.logprob for entry in entries.values()), reverse=True)[:2]


def sections(run: Run, tokenizer: Any, second_runner: bool) -> list[Callable[[Run], None]]:
    """Return all comparisons that the dtype and the model runner allow."""
    if run.dtype != "float32":
        return [compare_rounded]
    common = [ask_transformers, compare_batches, compare_one_by_one]
    if second_runner:  # Triton's interpreter takes its time
        return common
    over_http = partial(compare_over_http, tokenizer=tokenizer)
    stress = [compare_parameters, compare_aborts, compare_chunks, compare_preemptions]
    return [*common, *stress, over_http]


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
    prompts = [p[0].tolist() for p in prompt_tensors(tokenizer, texts, torch.device("cpu"))]
    run = Run(options.heads, options.base, prompts, options.tokens, options.depth, options.dtype)
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
    for section in sections(run, tokenizer, options.second_runner):
        section(run)
        found = json.loads(options.output.read_text()) if options.output.exists() else {}
        found[f"{options.dtype}, {runner}"] = record
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
