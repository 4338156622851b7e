"""Requests to an OpenAI-compatible server: sent, and tried again after errors that may be temporary."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Event
from typing import Any

logger = logging.getLogger(__name__)

_MAX_WAIT = 60.0  # seconds between two attempts


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint, and how to call it.

    Args:
        url: base URL, including `/v1`.
        model: the name under which the server serves the model.
        api_key: sent as a bearer token, if given.
        timeout: seconds to wait for one answer; a request that is given up and tried again starts anew.
        tries: number of attempts per request.
        backoff: seconds before the second attempt; doubles with each further one.

    Raises:
        ValueError: `url` is not an http(s) URL.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 3600.0
    tries: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        """Check the URL."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                "server must be a URL that ends in /v1, such as http://localhost:8000/v1, got "
                f"{self.url!r}."
            )


class RejectedError(ValueError):
    """The server rejected a request: trying it again would not help.

    Args:
        code: the HTTP status.
        reason: the status in words, and what the server said.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Requests:
    """The requests of one run to a server, from several threads; `stopping` ends their attempts."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.stopping = Event()

    def post(self, path: str, payload: dict[str, Any]) -> bytes:
        """Send a request for the served model to an endpoint, and return the reply's body.

        It is tried again after connection errors, timeouts and the statuses 408, 429 and 5xx.

        Raises:
            RejectedError: the server answered with another status of an error.
            ConnectionError: every attempt failed.
        """
        body = json.dumps({"model": self.server.model, **payload}).encode()
        for attempt in range(1, self.server.tries + 1):
            try:
                return _send(self.server, path, body)
            except urllib.error.HTTPError as error:
                reason, retry_after = _describe(error), error.headers.get("Retry-After", "")
                if error.code not in (408, 429) and error.code < 500:
                    raise RejectedError(error.code, reason) from error
            except (OSError, HTTPException) as error:
                reason, retry_after = f"{type(error).__name__}: {error}", ""
            backoff = self.server.backoff * 2 ** (attempt - 1)
            pause = float(retry_after) if retry_after.isdigit() else backoff
            if attempt == self.server.tries or self.stopping.is_set():
                break
            logger.warning("%s: %s; retrying in %.0f s", self.server.url, reason, pause)
            self.stopping.wait(min(pause, _MAX_WAIT))
        raise ConnectionError(
            f"The server {self.server.url} gave no answer (attempts: {attempt}); the last error was "
            f"{reason}. Check that it runs, and run the command again to resume."
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Turns redirects into errors, because following one would send the API key to another host."""

    def redirect_request(self, *args: Any) -> None:
        """Do not follow the redirect."""


_OPENER = urllib.request.build_opener(_NoRedirects)


# urllib, because huggingface_hub changed its HTTP client between versions 0 and 1, and no other
# client is a dependency
def _send(server: Server, path: str, body: bytes) -> bytes:
    headers = {"Content-Type": "application/json"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    url = f"{server.url.rstrip('/')}/{path}"
    request = urllib.request.Request(url, body, headers, method="POST")
    with _OPENER.open(request, timeout=server.timeout) as response:
        return bytes(response.read())


def _describe(error: urllib.error.HTTPError) -> str:
    with error:
        body = error.read(300).decode("utf-8", "replace").strip()
    return f"HTTP {error.code} {error.reason}" + (f": {body}" if body else "")
