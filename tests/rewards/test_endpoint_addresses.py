"""Hosts with several addresses, some of which do not answer: all are tried, within one deadline."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rpo_trainer.data.resumable_rows import RowFailed
from rpo_trainer.recipe import EndpointSpec
from rpo_trainer.rewards.endpoint import Endpoint, message_of
from tests.rewards.failing import failing
from tests.rewards.server import Answer, serving

HELLO = [{"role": "user", "content": "hello"}]
HOST = "many.example"
Named = Callable[..., None]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Named:
    """Make HOST resolve to these addresses."""
    real = socket.getaddrinfo

    def name(*addresses: str) -> None:
        def look_up(host: Any, port: Any, *more: Any, **options: Any) -> Any:
            if host not in (HOST, HOST.encode()):
                return real(host, port, *more, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return name


@pytest.fixture
def dead() -> Iterator[Callable[[int, str], int]]:
    """Open a port that accepts no connection: its backlog is full. Return the port."""
    with ExitStack() as held:

        def make(port: int, address: str) -> int:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(0)
            for _ in range(4):
                waiting = held.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            return int(listener.getsockname()[1])

        yield make


def asked(port: int, timeout: float, **fields: Any) -> str:
    spec = {"url": f"http://{HOST}:{port}/v1", "model": "m", "retries": 0, "timeout": timeout}
    return Endpoint(EndpointSpec.model_validate(spec | fields)).chat(HELLO, message_of)


@pytest.mark.parametrize("proxy", [False, True])
def test_dead_addresses_share_one_deadline(
    proxy: bool, named: Named, dead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = [f"127.0.0.{n}" for n in (1, 2, 3)]
    port = dead(0, addresses[0])
    for address in addresses[1:]:
        dead(port, address)
    named(*addresses)
    fields = {}
    if proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{port}")
        fields = {"url": "http://elsewhere.example/v1"}
    start = time.monotonic()
    with pytest.raises(RowFailed) as failed:
        asked(port, 0.6, **fields)
    assert failed.value.service and time.monotonic() - start < 1.2


def test_a_dead_address_leaves_time_for_the_next(named: Named, dead: Any) -> None:
    with serving(lambda *_: Answer("fine")) as server:
        port = int(server.url.split(":")[-1].partition("/")[0])
        dead(port, "127.0.0.2")
        named("127.0.0.2", "127.0.0.1")
        start = time.monotonic()
        assert asked(port, 2.0) == "fine"
        assert time.monotonic() - start < 2.0


def test_an_address_that_refuses_is_followed_by_the_next(named: Named) -> None:
    with serving(lambda *_: Answer("fine")) as server:
        port = int(server.url.split(":")[-1].partition("/")[0])
        named("127.0.0.9", "127.0.0.1")
        assert asked(port, 2.0) == "fine"
        named("127.0.0.9")
        with pytest.raises(RowFailed) as failed:
            asked(port, 2.0)
    assert failed.value.service


def test_a_host_without_an_address(named: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", none)
    with failing("endpoint.unreachable", "no such name") as failed:
        asked(80, 2.0)
    assert failed.value.service
