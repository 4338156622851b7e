"""Who continues text when a model writes prompts itself: the loaded model, or a server that serves it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_lmtp.conversion.batch_generation import Sampling, derived_seed, generate_ids
from modeling_lmtp.conversion.prompts import decode_answer, end_ids

from .server import RejectedError, Requests, Server


@dataclass(frozen=True)
class TurnEnd:
    """The text that closes a user turn, and its token id if it is a single special token."""

    text: str
    id: int | None


@dataclass(frozen=True)
class Beginnings:
    """A batch of texts to continue.

    Args:
        prompts: the token ids of each text.
        sampling: how to continue them.
        turn_end: ends a continuation, if the texts are user turns; None continues to the end of an answer.
    """

    prompts: list[list[int]]
    sampling: Sampling
    turn_end: TurnEnd | None


class Writer(Protocol):
    """Continues texts; `tokenizer` is the model's."""

    tokenizer: PreTrainedTokenizerBase

    def write(self, batches: Iterable[Beginnings]) -> Iterator[list[str | None]]:
        """Yield for each batch, in order, what follows each text up to its end; None if it was cut off.

        Special tokens inside a continuation stay. Batches are taken as they are needed, some of them
        before the continuations of those before are there.
        """
        ...


class ModelWriter:
    """Continues texts with a loaded model, one batch after another."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def write(self, batches: Iterable[Beginnings]) -> Iterator[list[str | None]]:
        """Yield the continuations of each batch, see `Writer`."""
        return map(self._continue, batches)

    def _continue(self, batch: Beginnings) -> list[str | None]:
        if not batch.prompts:
            return []
        end = batch.turn_end
        answer_ends = end_ids(self.model, self.tokenizer)
        rows = generate_ids(
            self.model,
            self.tokenizer,
            batch.prompts,
            batch.sampling,
            stop_ids=answer_ends if end is None or end.id is None else [end.id, *answer_ends],
            stop_string=end.text if end and end.id is None else None,
        )
        if end is None:
            closed = [row[-1] in answer_ends for row in rows]
            texts = [decode_answer(self.tokenizer, row[:-1]) for row in rows]
        else:
            parts = [decode_answer(self.tokenizer, row).partition(end.text) for row in rows]
            closed, texts = [bool(found) for _, found, _ in parts], [text for text, _, _ in parts]
        return [text if whole else None for text, whole in zip(texts, closed, strict=True)]


class ServerWriter:
    """Continues texts through a server's endpoint `/completions`, several of them at once.

    Texts go there as token ids, because a server would add special tokens to a string.

    Args:
        server: the endpoint.
        tokenizer: that of the served model.
        num_concurrent: number of concurrent requests.
    """

    def __init__(
        self, server: Server, tokenizer: PreTrainedTokenizerBase, num_concurrent: int
    ) -> None:
        self.requests = Requests(server)
        self.tokenizer = tokenizer
        self.pool = ThreadPoolExecutor(num_concurrent)

    def write(self, batches: Iterable[Beginnings]) -> Iterator[list[str | None]]:
        """Yield the continuations of each batch, see `Writer`.

        The server is asked for one batch more than the one whose continuations come next, so that its
        slowest text leaves nobody waiting. A text's own seed depends on its place in its batch.

        Raises:
            ValueError: the server has no endpoint `/completions`, rejected a request or sent no
                completion.
            ConnectionError: every attempt of a request failed.
        """
        running: deque[list[Future[str | None]]] = deque()
        try:
            for batch in batches:
                rows = range(len(batch.prompts))
                running.append([self.pool.submit(self._continue, batch, row) for row in rows])
                if len(running) > 1:
                    yield [future.result() for future in running[0]]
                    running.popleft()
            while running:
                yield [future.result() for future in running[0]]
                running.popleft()
        except GeneratorExit:  # enough was written
            raise
        except BaseException:
            self.requests.stopping.set()
            raise
        finally:
            for future in (future for futures in running for future in futures):
                future.cancel()

    def _continue(self, batch: Beginnings, row: int) -> str | None:
        sampling, end = batch.sampling, batch.turn_end
        payload = {
            "prompt": batch.prompts[row],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "skip_special_tokens": False,  # they show that a user turn is none
            # Some servers accept only non-negative 32-bit seeds
            "seed": derived_seed(sampling.seed, row) >> 32,
            **({"stop": [end.text]} if end else {}),
        }
        try:
            body = self.requests.post("completions", payload)
        except RejectedError as error:
            raise ValueError(
                f"The server {self.requests.server.url} rejected a text to continue: {error}. Self-written "
                "prompts need its endpoint /completions with token ids as prompt: check --server (the URL "
                "must end in /v1), --server_model and OPENAI_API_KEY, or pass --prompts."
            ) from error
        return _completion(body, self.requests.server)


def _completion(body: bytes, server: Server) -> str | None:
    """Return the text of a server's reply, None if it was cut off or withheld."""
    try:
        choice: dict[str, Any] = json.loads(body)["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        if not isinstance(text, str | None) or not isinstance(reason, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"The reply of the server {server.url} must be a completion with a text and a finish_reason, "
            f"got {body[:300].decode('utf-8', 'replace')!r}; check --server."
        ) from error
    return text if reason == "stop" else None
