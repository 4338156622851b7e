"""An OpenAI-compatible server in a thread, and what it may do instead of answering."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(request, **changes):
    """Return what an OpenAI-compatible server answers: the prompt and the seed, said again."""
    text = f"{request['messages'][0]['content']}! {request['seed']}"
    message = {"role": "assistant", "content": text, **changes.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("reason", "stop")}
    return {"choices": [choice], "usage": {"completion_tokens": len(text)}, **changes}


def continuation(request):
    """Return what such a server writes after token ids: an answer of some length, or a short user turn."""
    text = f"Turn {request['seed']}" if "stop" in request else f"Passage {request['seed']}, " * 12
    return {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}


class FakeServer:
    """A server in a thread; `faults` holds what it does instead of answering, first come first."""

    def __init__(self):
        self.requests, self.headers, self.faults = [], [], []
        self.under_way = self.most_under_way = 0
        self.delay = 0.0
        self.lock = threading.Lock()

    def reply(self, handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = json.loads(body)
        with self.lock:
            self.requests.append((handler.path, request))
            self.headers.append(dict(handler.headers))
            self.under_way += 1
            self.most_under_way = max(self.under_way, self.most_under_way)
            fault = self.faults.pop(0) if self.faults else None
        time.sleep(self.delay)
        with self.lock:
            self.under_way -= 1
        if callable(fault):
            fault(handler, request)
        else:
            send(handler, 200, (continuation if "prompt" in request else completion)(request))


def send(handler, status, value, headers=(), length=None):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    for name, text in headers:
        handler.send_header(name, text)
    handler.send_header("Content-Length", str(length or len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def status(code, text="", **headers):
    return lambda handler, _request: send(handler, code, text.encode(), headers.items())


def answers(**changes):
    return lambda handler, request: send(handler, 200, completion(request, **dict(changes)))


def raw(body):
    return lambda handler, _request: send(handler, 200, body)


def hang_up(_handler, _request):
    """Close the connection without a word."""


def break_off(handler, request):
    body = json.dumps(completion(request)).encode()
    send(handler, 200, body[:30], length=len(body))


@contextmanager
def serving(fake):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            fake.reply(self)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
