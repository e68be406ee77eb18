"""HTTP client for endpoints: one deadline and one size limit for the entire answer, and no redirects.

Import it only if the library `openai` is installed.
"""

from __future__ import annotations

import importlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import openai

MAX_BYTES = 16 * 2**20  # of an answer; the longest model responses have about 100 KB
_PIECE = 2**14  # bytes sent between checks of the deadline
_PLAIN = ("", "identity")

# openai 2 uses httpx, openai 3 uses httpx2, which has the same names.
_httpx: Any = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
_httpcore: Any = importlib.import_module(_httpx.__name__.replace("httpx", "httpcore"))
_request = threading.local()  # `deadline` of this thread's request


class TooLarge(openai.OpenAIError):
    """An answer that exceeds the size limit, or is compressed, so that its size is unknown."""


class BoundedClient(openai.DefaultHttpxClient):
    """HTTP client that reads each answer completely, within `timeout` seconds from its request.

    The library's timeouts restart with every address and every received byte. Here each connection,
    read, write and TLS handshake gets the remaining seconds, so that a server cannot extend them. DNS
    lookups have the limits of the operating system.

    Args:
        timeout: seconds for connecting, sending, headers and body together.
        clean: removes keys from bodies and header values before anything reads them; the client's exceptions
            keep both.
        max_bytes: the largest body.
    """

    def __init__(
        self, timeout: float, clean: Callable[[bytes], bytes], max_bytes: int = MAX_BYTES
    ) -> None:
        # A redirect would send prompts and key to another host than the configured one.
        super().__init__(timeout=timeout, follow_redirects=False)
        self.seconds = timeout
        self.clean = clean
        self.max_bytes = max_bytes
        # There is no argument for it, and a custom `transport` would disable the proxies.
        transports: list[Any] = [self._transport, *self._mounts.values()]
        for transport in transports:
            if transport is not None:  # hosts without a proxy
                pool = transport._pool
                pool._network_backend = _Network(pool._network_backend)

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Send a request and return the response with its complete body.

        Raises:
            TooLarge: the body is too large or compressed.
            TimeoutException: (of the HTTP library) the deadline has passed.
        """
        _request.deadline = time.monotonic() + self.seconds
        request.headers["accept-encoding"] = "identity"
        response = super().send(request, stream=True, **options)
        try:
            body = self._body(response)
        finally:
            response.close()
        headers = type(response.headers)(
            [(name, self.clean(value)) for name, value in response.headers.raw]
        )
        # JSON is UTF-8, regardless of the declared charset.
        headers["content-type"] = headers.get("content-type", "").partition(";")[0].strip()
        return type(response)(
            response.status_code, headers=headers, content=self.clean(body), request=request
        )

    def _body(self, response: Any) -> bytes:
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in _PLAIN:
            raise TooLarge(f"the answer is compressed ({encoding}), which was not requested")
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > self.max_bytes:
                raise TooLarge(f"the answer is larger than {self.max_bytes:,} bytes")
        return bytes(body)


class _Network:
    """Network backend of a connection pool; its connections have the deadline of their request."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, **options: Any
    ) -> _Stream:
        """Connect to the first address of a host that accepts a connection.

        The remaining time is divided among the remaining addresses, so that one that does not respond leaves
        time for the others.
        """
        addresses = _addresses(host, port)
        while True:
            left = _left(_httpx.ConnectTimeout)
            address = addresses.pop(0)
            try:
                found = self._inner.connect_tcp(
                    address, port, timeout=left / (len(addresses) + 1), **options
                )
                return _Stream(found)
            except (_httpcore.ConnectError, _httpcore.ConnectTimeout):
                if not addresses:
                    raise

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


def _addresses(host: str, port: int) -> list[str]:
    """Return the numeric addresses of a host, in the system's order."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _httpcore.ConnectError(str(error)) from error
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return list(dict.fromkeys(socket.getnameinfo(each[4], numeric)[0] for each in found))


class _Stream:
    """Connection whose operations are limited to the remaining time."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> Any:
        return self._inner.read(max_bytes, _left(_httpx.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            piece = buffer[start : start + _PIECE]
            self._inner.write(piece, _left(_httpx.WriteTimeout))

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        left = _left(_httpx.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left))

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(timed_out: type[Exception]) -> float:
    left: float = _request.deadline - time.monotonic()
    if left <= 0:
        raise timed_out("the deadline of the answer has passed")
    return left
