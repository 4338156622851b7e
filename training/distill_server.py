"""Self-distillation through an inference server with an OpenAI-compatible endpoint.

For models too large to generate with Transformers: vLLM, SGLang, llama.cpp or TGI serve the model,
and this asks them. The heads must then be trained for that very model: the same checkpoint in the
same precision, since a quantized server answers otherwise than the original. The server must add no
sampling options of its own (for vLLM: `--generation-config vllm`) and must leave an answer whole
(no parser that splits reasoning or tool calls off).
"""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path
from threading import Event
from typing import Any

from modeling_lmtp.conversion.batch_generation import derived_seed
from modeling_lmtp.conversion.prompts import Prompt
from modeling_lmtp.conversion.saving import versions

from .distill_files import AnswerFiles, Row
from .distill_run import (
    Batch,
    DistillReport,
    Item,
    answer_all,
    cut_batches,
    plan_items,
    prompts_sha256,
)
from .distill_settings import DistillSettings

logger = logging.getLogger(__name__)

# What of the settings shapes a server's answers; it batches as it likes.
SETTINGS = ("max_new_tokens", "temperature", "top_p", "num_answers", "seed")
_MAX_WAIT = 60.0  # seconds between two tries


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint and the name that it serves the model under.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    url: str  # up to and with /v1
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0  # seconds for one answer
    tries: int = 6
    backoff: float = 1.0  # seconds before the second try; doubled before each further one

    def __post_init__(self) -> None:
        """Refuse what is no address."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                "server: expected an address such as http://localhost:8000/v1 (up to and with /v1), "
                f"got {self.url!r}"
            )


def distill_from_server(
    server: Server,
    prompts: list[Prompt],
    output: Path | str,
    settings: DistillSettings,
    *,
    model: str | None = None,
    sources: dict[str, Any] | None = None,
    progress: bool = True,
) -> DistillReport:
    """Let a server answer every prompt, as `distill` lets a model; no model is loaded here.

    Up to `settings.batch_size` requests run at once. A request is tried again after a refused or
    broken connection, a time-out and the statuses 408, 429 and 5xx. Call it again with the same
    arguments to go on after a stop or an error: what was answered is kept.

    Args:
        server: what answers.
        prompts: what to answer.
        output: a .jsonl file, new or of the same run.
        settings: how to answer; `SETTINGS` count.
        model: the checkpoint that the server serves; the manifest names it.
        sources: where the prompts come from; the manifest keeps it.
        progress: show a bar with the tokens per second and the time left.

    Raises:
        ValueError: there are no prompts, `output` is no .jsonl name or was made by another run, or
            the server refused a request or sent something else than an answer.
        ConnectionError: the server could not be reached, or was at fault, in all tries.
    """
    items, duplicates = plan_items(prompts, settings.num_answers, None)
    manifest = {
        "model": model,
        "server": server.url,
        "server_model": server.model,
        "prompts_sha256": prompts_sha256(items),
        "prompt_sources": sources,
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "versions": [versions()],
    }
    files = AnswerFiles(output, manifest, [item.id for item in items], duplicates)
    asking = _Asking(server, settings)
    return answer_all(files, cut_batches(items, 1), asking.answer, progress=progress)


class _Asking:
    """The requests of one run, several at a time."""

    def __init__(self, server: Server, settings: DistillSettings) -> None:
        self.server = server
        self.settings = settings
        self.stopping = Event()

    def answer(self, batches: list[Batch]) -> Iterator[list[Row]]:
        """Yield rows as they come; after an error, those under way, and then raise it."""
        items = chain.from_iterable(batches)
        failure: BaseException | None = None
        with ThreadPoolExecutor(self.settings.batch_size) as pool:
            running = {
                pool.submit(self._ask, item) for item in islice(items, self.settings.batch_size)
            }
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    failure = failure or next(filter(None, map(Future.exception, done)), None)
                    if failure:
                        self.stopping.set()
                    else:
                        running |= {pool.submit(self._ask, i) for i in islice(items, len(done))}
                    yield [future.result() for future in done if not future.exception()]
            finally:
                self.stopping.set()
        if failure:
            raise failure

    def _ask(self, item: Item) -> Row:
        payload = {
            "model": self.server.model,
            "messages": [{"role": "user", "content": item.prompt.text}],
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_tokens": self.settings.max_new_tokens,
            # Heads learn special tokens inside an answer as well; vLLM and SGLang would drop them
            "skip_special_tokens": False,
            # Some servers take 32 bits and no sign
            "seed": derived_seed(self.settings.seed, item.id) >> 32,
        }
        answer = _parse_answer(self._post(json.dumps(payload).encode(), item), item)
        return {"id": item.id, "kind": item.prompt.kind, "prompt": item.prompt.text, **answer}

    def _post(self, payload: bytes, item: Item) -> bytes:
        """Send a request, again where that may help, and return the body of the answer."""
        for attempt in range(1, self.server.tries + 1):
            try:
                return _send(self.server, payload)
            except urllib.error.HTTPError as error:
                reason, wanted = _describe(error), error.headers.get("Retry-After", "")
                if error.code not in (408, 429) and error.code < 500:
                    raise ValueError(
                        f"server: {self.server.url} refused the prompt {item.prompt.text[:80]!r}: "
                        f"{reason}. Check --server (up to and with /v1), --server_model, "
                        "OPENAI_API_KEY and the prompt's length. What was answered is kept"
                    ) from error
            except (OSError, HTTPException) as error:
                reason, wanted = f"{type(error).__name__}: {error}", ""
            pause = float(wanted) if wanted.isdigit() else self.server.backoff * 2 ** (attempt - 1)
            if attempt == self.server.tries or self.stopping.is_set():
                break
            logger.warning("%s: %s; trying again in %.0f s", self.server.url, reason, pause)
            self.stopping.wait(min(pause, _MAX_WAIT))
        raise ConnectionError(
            f"server: {self.server.url} gave no answer (tries: {attempt}), at last: {reason}. "
            "What was answered is kept: run the command again to go on"
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Reports a redirect as the error it is here: following it would carry the key elsewhere."""

    def redirect_request(self, *args: Any) -> None:
        """Follow nothing."""


_OPENER = urllib.request.build_opener(_NoRedirects)


# The standard library asks, because the HTTP client that comes with huggingface_hub is another one
# in its second major version than in its first.
def _send(server: Server, payload: bytes) -> bytes:
    headers = {"Content-Type": "application/json"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    url = f"{server.url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, payload, headers, method="POST")
    with _OPENER.open(request, timeout=server.timeout) as response:
        return bytes(response.read())


def _describe(error: urllib.error.HTTPError) -> str:
    with error:
        body = error.read(300).decode("utf-8", "replace").strip()
    return f"HTTP {error.code} {error.reason}" + (f": {body}" if body else "")


def _parse_answer(body: bytes, item: Item) -> Row:
    """Return the fields of a row that the server's reply holds."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text, tokens = message["content"], reply["usage"]["completion_tokens"]
        split_off = message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(_malformed(body, item)) from error
    if split_off:
        raise ValueError(
            "server: it splits the reasoning off its answers, but heads have to learn the whole "
            "text; start it without a reasoning parser"
        )
    if not (isinstance(text, str) and isinstance(reason, str) and isinstance(tokens, int)):
        raise ValueError(_malformed(body, item))
    return {"response": text, "finished": reason == "stop", "tokens": tokens}


def _malformed(body: bytes, item: Item) -> str:
    return (
        f"server: expected a chat completion with a text, a finish_reason and usage.completion_tokens "
        f"for the prompt {item.prompt.text[:80]!r}, got {body[:300].decode('utf-8', 'replace')!r}. "
        "What was answered is kept"
    )
