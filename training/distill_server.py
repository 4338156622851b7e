"""Self-distillation through an inference server with an OpenAI-compatible endpoint.

Use it for models that are too large to generate with Transformers; vLLM, SGLang, llama.cpp and TGI serve
such models. Train the heads on the checkpoint and in the precision that the server used, because a
quantized model gives other answers. The server must not add sampling options (vLLM: start it with
`--generation-config vllm`), nor split reasoning or tool calls off its answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from pathlib import Path
from typing import Any

from modeling_lmtp.conversion.batch_generation import derived_seed
from modeling_lmtp.conversion.prompts import Prompt, refuse
from modeling_lmtp.conversion.saving import versions

from .distill_files import AnswerFiles, Row
from .distill_run import (
    AnswerTask,
    Batch,
    DistillReport,
    answer_all,
    plan_tasks,
    prompts_sha256,
    split_batches,
)
from .distill_settings import DistillSettings
from .server import RejectedError, Requests, Server

# The settings that affect a server's answers; the server chooses its own batches
SETTINGS = ("max_new_tokens", "temperature", "top_p", "num_answers", "seed")
# Those that also affect what it writes itself
PROMPT_SETTINGS = ("magpie_temperature", "magpie_top_p", "magpie_max_tokens")
OF_THE_PROMPT = (400, 413, 422)  # statuses that may be due to one prompt
NOT_ANSWERED = (
    "content_filter",
    "tool_calls",
    "function_call",
)  # finish reasons without a whole text


def distill_from_server(
    server: Server,
    prompts: list[Prompt],
    output: Path | str,
    settings: DistillSettings,
    *,
    model: str | None = None,
    sources: dict[str, Any] | None = None,
    on_bad_row: Callable[[ValueError], None] = refuse,
    progress: bool = True,
) -> DistillReport:
    """Let a server answer every prompt, and append the answers to `output` as `distill` does.

    Up to `settings.batch_size` requests run concurrently. A request is retried after connection errors,
    timeouts and the statuses 408, 429 and 5xx. Call it again with the same arguments to resume after a
    stop or an error; existing answers are kept, and skipped prompts are tried again.

    Args:
        server: the endpoint.
        prompts: the prompts to answer.
        output: a .jsonl file, new or of the same run.
        settings: how to generate the answers; only `SETTINGS` have an effect.
        model: the checkpoint that the server serves, for the manifest.
        sources: where the prompts come from, for the manifest.
        on_bad_row: called with an error that names the prompt if the server has no answer to it: it
            rejected or filtered it, called a tool, or sent no text. It may raise the error, as by
            default, or return to skip the prompt.
        progress: show a progress bar.

    Raises:
        ValueError: there are no prompts, `output` does not end in .jsonl or belongs to another run, or
            the server rejected a request, sent a malformed answer, or answered none of the prompts.
        ConnectionError: every attempt failed, because the server was unreachable or returned an error.
    """
    tasks, duplicates = plan_tasks(prompts, settings.num_answers, None)
    manifest = {
        "model": model,
        "server": server.url,
        "server_model": server.model,
        "prompts_sha256": prompts_sha256(tasks),
        "prompt_sources": sources,
        "settings": server_settings(settings, "self_written" in (sources or {})),
        "versions": [versions()],
    }
    files = AnswerFiles(output, manifest, [task.id for task in tasks], duplicates)
    requests = _RequestPool(server, settings, on_bad_row)
    report = answer_all(files, split_batches(tasks, 1), requests.answer, progress=progress)
    if not report.rows:
        raise ValueError(
            f"The server {server.url} answered none of the prompts. Check --server and --server_model."
        )
    return report


def server_settings(settings: DistillSettings, self_written: bool) -> dict[str, Any]:
    """Return the settings that identify a run of a server; `self_written`: it wrote prompts itself."""
    names = SETTINGS + (PROMPT_SETTINGS if self_written else ())
    return {name: getattr(settings, name) for name in names}


class _NoAnswerError(ValueError):
    """The server has no answer to one prompt, while it may answer others."""


class _RequestPool:
    """The requests of one run, several of which run concurrently."""

    def __init__(
        self, server: Server, settings: DistillSettings, on_bad_row: Callable[[ValueError], None]
    ) -> None:
        self.requests = Requests(server)
        self.settings = settings
        self.on_bad_row = on_bad_row

    def answer(self, batches: list[Batch]) -> Iterator[list[Row]]:
        """Yield rows as they arrive; after an error, yield the running requests' rows and raise it."""
        tasks = chain.from_iterable(batches)
        failure: BaseException | None = None
        with ThreadPoolExecutor(self.settings.batch_size) as pool:
            running = {
                pool.submit(self._ask, task) for task in islice(tasks, self.settings.batch_size)
            }
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    failure = failure or self._first_failure(done)
                    if failure:
                        self.requests.stopping.set()
                    else:
                        running |= {pool.submit(self._ask, i) for i in islice(tasks, len(done))}
                    yield [future.result() for future in done if not future.exception()]
            finally:
                self.requests.stopping.set()
        if failure:
            raise failure

    def _first_failure(self, done: Iterable[Future[Row]]) -> BaseException | None:
        """Return an error that ends the run; a prompt without an answer does if `on_bad_row` raises."""
        for error in filter(None, map(Future.exception, done)):
            if not isinstance(error, _NoAnswerError):
                return error
            try:
                self.on_bad_row(error)
            except ValueError as refusal:
                return refusal
        return None

    def _ask(self, task: AnswerTask) -> Row:
        payload = {
            "messages": [{"role": "user", "content": task.prompt.text}],
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_tokens": self.settings.max_new_tokens,
            # Heads learn special tokens inside an answer too; vLLM and SGLang would drop them
            "skip_special_tokens": False,
            "return_token_ids": True,  # vLLM does; others leave the tokens to the tokenizer
            # Some servers accept only non-negative 32-bit seeds
            "seed": derived_seed(self.settings.seed, task.id) >> 32,
        }
        try:
            body = self.requests.post("chat/completions", payload)
        except RejectedError as error:
            raise _rejection(self.requests.server, task, error) from error
        answer = _parse_answer(body, task)
        return {"id": task.id, "kind": task.prompt.kind, "prompt": task.prompt.text, **answer}


def _rejection(server: Server, task: AnswerTask, error: RejectedError) -> ValueError:
    """Return the error for a prompt that a server rejected, perhaps because it rejects every prompt."""
    what = f"The server {server.url} rejected {_name(task)}: {error}. Check"
    options = "--server (the URL must end in /v1), --server_model, OPENAI_API_KEY"
    if error.code in OF_THE_PROMPT:
        return _NoAnswerError(f"{what} the prompt's length, {options}")
    return ValueError(f"{what} {options}, and run again to resume.")


def _name(task: AnswerTask) -> str:
    """Name a prompt by its row, if known, and its first words."""
    row = f" of {task.prompt.source}" if task.prompt.source else ""
    return f"the prompt{row} {task.prompt.text[:80]!r}"


def _parse_answer(body: bytes, task: AnswerTask) -> Row:
    """Return the row fields of the server's reply; raise a ValueError if it is not an answer."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text, tokens = message["content"], reply["usage"]["completion_tokens"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        withheld = message.get("refusal") or message.get("tool_calls") or reason in NOT_ANSWERED
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _NoAnswerError(_malformed_reply(body, task)) from error
    if reasoning:
        raise ValueError(
            "The server splits the reasoning off its answers, but heads must learn the whole text. Start "
            "it without a reasoning parser."
        )
    if not (isinstance(text, str) and isinstance(reason, str) and isinstance(tokens, int)):
        raise _NoAnswerError(_malformed_reply(body, task))
    if withheld or not (text or reason == "stop"):  # a model may end at once
        raise _NoAnswerError(
            f"The server withheld its answer to {_name(task)}: {body[:300].decode('utf-8', 'replace')!r}"
        )
    ids = {"prompt_ids": reply.get("prompt_token_ids"), "response_ids": choice.get("token_ids")}
    recorded = {name: value for name, value in ids.items() if value}
    return {"response": text, "finished": reason == "stop", "tokens": tokens, **recorded}


def _malformed_reply(body: bytes, task: AnswerTask) -> str:
    return (
        f"The server's reply to {_name(task)} must be a chat completion with a text, a finish_reason and "
        f"usage.completion_tokens, got {body[:300].decode('utf-8', 'replace')!r}; check --server"
    )
