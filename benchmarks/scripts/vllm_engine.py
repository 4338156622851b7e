"""vLLM on a CPU, with leap heads or without, as the scripts in this folder and the tests run it.

As a program it runs jobs: `python vllm_engine.py JOBS.json RESULTS.json [--v2]`. A job is an engine and
calls of it, in order: `{"engine": {…}, "calls": [[[prompt, sampling], …], …]}`; prompts are token ids. A
result is `{"outputs": …, "steps": …}`: of each call and prompt its texts as
`{"ids": …, "text": …, "logprobs": …}`, and of each call how many drafts were verified.
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Sampling = dict[str, Any]  # of vLLM's SamplingParams
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PORT = 8123


def prepare(second_runner: bool = False, in_process: bool = True) -> None:
    """Set vLLM's environment; call it before vLLM is imported.

    Args:
        second_runner: use vLLM's second model runner, whose kernels a CPU runs in Triton's interpreter.
        in_process: run engines in this process instead of one process each.
    """
    os.environ.update(ENVIRONMENT)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(second_runner))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process))
    if second_runner:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("Triton was imported before: set TRITON_INTERPRET=1 for the whole run")
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.backends import backends

        driver = types.SimpleNamespace(is_active=lambda: True)
        backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


class Steps(NamedTuple):
    """What vLLM counted: drafts verified, and drafted tokens accepted."""

    drafts: int
    accepted: int

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens per step, or None where nothing was drafted."""
        return round(1 + self.accepted / self.drafts, 3) if self.drafts else None


def speculation(heads: Path | str | None, depth: int) -> dict[str, Any] | None:
    """Return vLLM's setting for drafts of `depth` tokens, or None without heads."""
    return {"model": str(heads), "num_speculative_tokens": depth} if heads else None


class Engine:
    """An engine of vLLM. Use it in a `with` statement: its end frees the memory.

    Args:
        settings: of `vllm.LLM`.
    """

    def __init__(self, **settings: Any) -> None:
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "disable_log_stats": False,
            "enable_prefix_caching": False,
            "generation_config": "vllm",
        }
        self.llm = LLM(**{**defaults, **settings})
        self._before = Steps(0, 0)

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

    def new_steps(self) -> Steps:
        """Return what was counted since the last call of this method."""
        names = ("spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
        before, self._before = self._before, Steps(*map(self.counter, names))
        return Steps(self._before.drafts - before.drafts, self._before.accepted - before.accepted)

    def generate(self, prompts: list[list[int]], sampling: list[Sampling]) -> list[list[Any]]:
        """Return the texts of each prompt, as vLLM's `CompletionOutput`."""
        from vllm import SamplingParams

        ids = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = [SamplingParams(**settings) for settings in sampling]
        return [r.outputs for r in self.llm.generate(ids, parameters, use_tqdm=False)]


class EngineProcess:
    """An engine in a process of its own, so that several engines can take turns.

    The process is vLLM's engine and worker in one. Where vLLM starts the two as processes, each waits for
    the other by spinning, which takes cores away where there are few.

    Args:
        settings: of `vllm.LLM`.
    """

    def __init__(self, **settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        context.Process(target=_answer_calls, args=(theirs, settings), daemon=True).start()

    def generate(self, prompts: list[list[int]], sampling: list[Sampling]) -> list[list[list[int]]]:
        """Return the token ids of each prompt's texts."""
        return self._ask((prompts, sampling))

    def new_steps(self) -> Steps:
        """Return what was counted since the last call of this method."""
        return self._ask(None)

    def _ask(self, call: Any) -> Any:
        self._connection.send(call)
        return self._connection.recv()


def _answer_calls(connection: Connection, settings: dict[str, Any]) -> None:
    prepare()
    engine = Engine(**settings)
    while True:
        try:
            call = connection.recv()
        except EOFError:  # the other side has ended
            return
        if call is None:
            connection.send(engine.new_steps())
        else:
            texts = engine.generate(*call)
            connection.send([[list(output.token_ids) for output in row] for row in texts])


@contextmanager
def server(model: Path | str, *arguments: str) -> Iterator[str]:
    """Serve a model over HTTP under the name `served`, and yield the URL.

    Args:
        model: folder of the model.
        arguments: more of `vllm serve`.

    Raises:
        RuntimeError: the server ends before it answers.
    """
    # `vllm serve` ends with an error in builds for CPUs, which lack vLLM's metadata
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--enforce-eager", "--port", str(PORT), "--generation-config", "vllm"]
    process = subprocess.Popen([*command, "--served-model-name", "served", *arguments])
    url = f"http://localhost:{PORT}"
    try:
        while not _answers(f"{url}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"The server ended with code {process.returncode}.")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def stream(url: str, body: dict[str, Any]) -> tuple[str, int]:
    """Ask a server for a streamed completion, and return the text and how many events it came in."""
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps({**body, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    text, events = "", 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                events += 1
    return text, events


def read_metrics(url: str, prefix: str) -> dict[str, float]:
    """Return a server's metrics whose names begin with `prefix`, by name and position in the draft."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    metrics = {}
    for line in lines:
        if line.startswith(prefix) and "_created" not in line:
            labels, _, value = line.rpartition(" ")
            position = "".join(f" {rest[0]}" for rest in labels.split('position="')[1:])
            metrics[labels.partition("{")[0] + position] = float(value)
    return metrics


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of the program."""
    outputs, steps = [], []
    with Engine(**job["engine"]) as engine:
        for call in job["calls"]:
            done = engine.generate(*map(list, zip(*call, strict=True)))
            outputs.append([[as_json(text) for text in texts] for texts in done])
            steps.append(engine.new_steps().drafts)
    return {"outputs": outputs, "steps": steps}


def as_json(text: Any) -> dict[str, Any]:
    """Return one text as JSON."""
    logprobs = text.logprobs and [
        {token: entry.logprob for token, entry in at.items()} for at in text.logprobs
    ]
    return {"ids": list(text.token_ids), "text": text.text, "logprobs": logprobs}


def main() -> None:
    """Run the jobs of a file."""
    prepare(second_runner="--v2" in sys.argv)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in jobs]))


if __name__ == "__main__":
    main()
