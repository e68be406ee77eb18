"""The HTTP client of endpoints: one deadline and one size limit for a whole answer, no redirects.

Imported only where the library `openai` is installed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import openai

MAX_BYTES = 16 * 2**20  # of an answer; the longest responses of models are some 100 KB
_PIECE = 2**14  # bytes sent before the clock is read again
_PLAIN = ("", "identity")

# openai 2 is built on httpx, openai 3 on httpx2, which has the same names.
_httpx: Any = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
_request = threading.local()  # `deadline` of the request that this thread waits for


class TooLarge(openai.OpenAIError):
    """An answer that is larger than an answer may be, or compressed, so that its size is unknown."""


class BoundedClient(openai.DefaultHttpxClient):
    """An HTTP client that reads each answer whole, within `timeout` seconds from its request.

    The timeouts of the library begin anew with every byte that arrives. Here each read, write and
    TLS handshake gets the seconds that are left, so that a server cannot extend them.

    Args:
        timeout: seconds for connecting, sending, headers and body together.
        clean: removes keys from a body, and from values of headers, before anything reads them: the
            exceptions of the client keep both.
        max_bytes: the largest body.
    """

    def __init__(
        self, timeout: float, clean: Callable[[bytes], bytes], max_bytes: int = MAX_BYTES
    ) -> None:
        # A redirect would send prompts and key to a host that nobody has named.
        super().__init__(timeout=timeout, follow_redirects=False)
        self.seconds = timeout
        self.clean = clean
        self.max_bytes = max_bytes

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The response with its whole body.

        Raises:
            TooLarge: the body is too large or compressed.
            TimeoutException: of the HTTP library; the deadline has passed.
        """
        _request.deadline = time.monotonic() + self.seconds
        request.headers["accept-encoding"] = "identity"
        request.extensions["trace"] = _bound_connection
        response = super().send(request, stream=True, **options)
        try:
            body = self._body(response)
        finally:
            response.close()
        headers = type(response.headers)(
            [(name, self.clean(value)) for name, value in response.headers.raw]
        )
        # JSON is UTF-8, whatever charset the server names.
        headers["content-type"] = headers.get("content-type", "").partition(";")[0].strip()
        return type(response)(
            response.status_code, headers=headers, content=self.clean(body), request=request
        )

    def _body(self, response: Any) -> bytes:
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in _PLAIN:
            raise TooLarge(f"the answer is compressed ({encoding}), which was not asked for")
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > self.max_bytes:
                raise TooLarge(f"the answer is larger than {self.max_bytes:,} bytes")
        return bytes(body)


def _bound_connection(event: str, info: dict[str, Any]) -> None:
    """Gives a new connection the deadline: httpcore's `trace` extension shows each one made."""
    if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
        return
    stream = info["return_value"]
    read, write, start_tls = stream.read, stream.write, stream.start_tls

    def bounded_read(max_bytes: int, timeout: float | None = None) -> Any:
        return read(max_bytes, _left(_httpx.ReadTimeout))

    def bounded_write(buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            write(buffer[start : start + _PIECE], _left(_httpx.WriteTimeout))

    def bounded_tls(
        ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> Any:
        return start_tls(ssl_context, server_hostname, _left(_httpx.ConnectTimeout))

    stream.read, stream.write, stream.start_tls = bounded_read, bounded_write, bounded_tls


def _left(timed_out: type[Exception]) -> float:
    left: float = _request.deadline - time.monotonic()
    if left <= 0:
        raise timed_out("the deadline of the whole answer has passed")
    return left
