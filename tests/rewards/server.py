"""A real HTTP server with an OpenAI-compatible API, whose answers a test determines."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SOON = {"retry-after-ms": "5"}  # the client's timeout


@dataclass
class Answer:
    """What the server sends: text of a completion, or anything else."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    stall: float = 0.0
    hang_up: bool = False
    finish_reason: str = "stop"
    logprobs: dict[str, float] | None = None
    beside: dict[str, Any] = field(default_factory=dict)  # of the message, next to its text
    content_type: str = "application/json"
    drip: str = ""  # "headers" or "body": a byte at a time, without an end
    endless: bytes = b""  # sent as a body repeatedly until the client closes


def completion(answer: Answer, path: str) -> bytes:
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason}
    if path.endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": answer.text, **answer.beside}
    else:
        choice["text"] = answer.text
    if answer.logprobs is not None:
        pairs = answer.logprobs.items()
        choice["logprobs"] = {
            "content": [{"token": t, "logprob": v, "top_logprobs": []} for t, v in pairs]
        }
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    ).encode()


class Server:
    """`asked` holds every request, `paths` its path; `seen` the number of times that each was sent."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.seen: Counter[str] = Counter()
        self.sent = 0  # bytes of endless bodies
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    server.asked.append(request)
                    server.paths.append(self.path)
                    server.keys.append(self.headers.get("authorization"))
                    key = json.dumps(request, sort_keys=True)
                    count = server.seen[key]
                    server.seen[key] += 1
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    self.send(server.answer(request, count))
                except OSError:
                    pass
                finally:
                    with server._lock:
                        server.at_once -= 1

            def send(self, answer: Answer) -> None:
                if answer.stall:
                    time.sleep(answer.stall)
                if answer.hang_up:
                    self.close_connection = True
                    return
                if answer.drip or answer.endless:
                    self.send_without_end(answer)
                    return
                body = answer.body if answer.body is not None else completion(answer, self.path)
                self.send_response(answer.status)
                self.send_header("content-type", answer.content_type)
                self.send_header("content-length", str(len(body)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def send_without_end(self, answer: Answer) -> None:
                self.close_connection = True
                self.send_response(answer.status)
                self.send_header("content-type", answer.content_type)
                if answer.drip == "headers":
                    self.flush_headers()
                    piece = b"x"
                    self.wfile.write(b"x-long: ")
                else:
                    self.send_header("transfer-encoding", "chunked")
                    self.end_headers()
                    content = answer.endless or b" "
                    piece = b"%x\r\n%s\r\n" % (len(content), content)
                for _ in range(100 if answer.drip else 100_000):
                    self.wfile.write(piece)
                    self.wfile.flush()
                    server.sent += len(piece)
                    if answer.drip:
                        time.sleep(0.05)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server._http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()


def refused(status: int, message: str = "no", **headers: str) -> Answer:
    body = json.dumps({"error": {"message": message}}).encode()
    return Answer(status=status, body=body, headers={**SOON, **headers})
