"""Endpoints that fail, stall, limit the rate or return nonsense: requests are retried, and no row is lost."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from rpo_trainer.errors import RunError
from rpo_trainer.recipe import EndpointSpec
from rpo_trainer.rewards.endpoint import Endpoint, attribute_scores, message_of
from tests.raising import raises
from tests.rewards.failing import failing
from tests.rewards.server import SOON, Answer, Server, refused, serving

HELLO = [{"role": "user", "content": "hello"}]
SCORES = {"helpfulness": 1.5, "correctness": -0.25}


def endpoint(server: Server, **fields: Any) -> Endpoint:
    settings = {"retries": 3, "timeout": 5.0, **fields}
    return Endpoint(EndpointSpec(url=server.url, model="m", **settings))


@pytest.mark.parametrize(
    "trouble",
    [
        refused(500),
        refused(503),
        refused(429),
        refused(408),
        Answer(hang_up=True),
        Answer(body=b"<html>gateway</html>"),
        Answer(body=b'{"choices": []}'),
        Answer(body=b'{"choices": [{"message": null}]}'),
        Answer(body=b"[]"),
        Answer(body=b'"text"'),
        Answer(text=""),
        Answer(text=" \n"),
    ],
    ids=lambda answer: f"{answer.status} {(answer.body or b'hangs up or blank')[:20]!r}",
)
def test_trouble_is_asked_again(trouble: Answer) -> None:
    with serving(lambda _, count: Answer("fine") if count == 2 else trouble) as server:
        assert endpoint(server).chat(HELLO, message_of) == "fine"
        assert len(server.asked) == 3


def test_a_stalled_answer_is_given_up() -> None:
    with serving(lambda _, count: Answer("late", stall=0 if count else 30.0)) as server:
        start = time.monotonic()
        assert endpoint(server, timeout=0.3).chat(HELLO, message_of) == "late"
        assert time.monotonic() - start < 20


def test_the_wait_that_is_asked_for_is_kept() -> None:
    limited = refused(429, **{"retry-after-ms": "400"})
    with serving(lambda _, count: Answer("fine") if count else limited) as server:
        start = time.monotonic()
        assert endpoint(server).chat(HELLO, message_of) == "fine"
        assert 0.4 <= time.monotonic() - start < 2.0


def test_a_wait_longer_than_the_clients_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("rpo_trainer.rewards.endpoint.time.sleep", waited.append)
    limited = Answer(status=429, body=b"{}", headers={"retry-after": "600"})
    with serving(lambda _, count: Answer("fine") if count == 2 else limited) as server:
        assert endpoint(server).chat(HELLO, message_of) == "fine"
        assert waited == [600.0, 600.0]
        with failing("endpoint.refused", "429") as failed:
            endpoint(server, retries=1).chat([*HELLO, *HELLO], message_of)
        assert failed.value.service and len(waited) == 3
    for_days = Answer(status=429, body=b"{}", headers={"retry-after": "86400"})
    with serving(lambda *_: for_days) as server, failing("endpoint.refused", "429"):
        endpoint(server).chat(HELLO, message_of)
    assert len(waited) == 3


@pytest.mark.parametrize(
    ("trouble", "code", "reason", "service"),
    [
        (refused(500, "boom"), "endpoint.refused", "500 boom", True),
        (refused(429, "slow down"), "endpoint.refused", "429 slow down", True),
        (refused(400, "too long"), "endpoint.refused", "400 too long", False),
        (Answer(hang_up=True), "endpoint.unreachable", "", True),
        (Answer("x", stall=1.0), "endpoint.timeout", "0.2 s", True),
        (Answer(body=b"{"), "endpoint.unreadable", "", False),
        (Answer(text=""), "endpoint.no-text", "", False),
    ],
)
def test_what_fails_for_good_is_a_failed_row_with_the_reason(
    trouble: Answer, code: str, reason: str, service: bool
) -> None:
    trouble.headers |= SOON
    with serving(lambda *_: trouble) as server, failing(code, reason) as failed:
        endpoint(server, retries=1, timeout=0.2).chat(HELLO, message_of)
    assert failed.value.service == service


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_refuses_every_request_stops_the_run(status: int) -> None:
    with (
        serving(lambda *_: refused(status, "not you")) as server,
        raises("endpoint.refused", RunError, where=server.url) as error,
    ):
        endpoint(server).chat(HELLO, message_of)
    assert len(server.asked) == 1
    assert f"{status} not you" in error.value.what and "OPENAI_API_KEY" in str(error.value.fix)


def test_nobody_there() -> None:
    with serving(lambda *_: Answer("x")) as server:
        pass
    with failing("endpoint.unreachable") as failed:
        endpoint(server, retries=0).chat(HELLO, message_of)
    assert failed.value.service


def test_the_key_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("MY_KEY", "mine")
    with serving(lambda *_: Answer("x")) as server:
        endpoint(server).chat(HELLO, message_of)
        endpoint(server, api_key_env="MY_KEY").chat(HELLO, message_of)
    assert server.keys == ["Bearer none", "Bearer mine"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer("helpfulness:1.5,correctness:-0.25"),
        Answer("helpfulness: 1.5\ncorrectness = -2.5e-1"),
        Answer("", logprobs=SCORES),
    ],
    ids=["comma", "lines", "logprobs"],
)
def test_scores_by_attribute(answer: Answer) -> None:
    with serving(lambda *_: answer) as server:
        scores, raw = endpoint(server).chat(HELLO, attribute_scores)
    assert scores == SCORES and raw == (answer.text or "helpfulness:1.5,correctness:-0.25")


def test_a_list_of_messages_is_read_too() -> None:
    body = b'{"choices": [{"message": [{"content": "reward:-9.5", "role": "assistant"}]}]}'
    with serving(lambda *_: Answer(body=body)) as server:
        found = endpoint(server).chat(HELLO, attribute_scores)
    assert found == ({"reward": -9.5}, "reward:-9.5")


@pytest.mark.parametrize(
    "answer",
    [
        Answer("reward:1e999"),
        Answer("", logprobs={"reward": math.nan}),
        Answer("", logprobs={"reward": -math.inf}),
    ],
    ids=["overflow", "nan", "-inf"],
)
def test_a_score_that_is_not_finite_is_nonsense(answer: Answer) -> None:
    """Written out, it would be a file that no stage can read."""
    with serving(lambda *_: answer) as server, failing("endpoint.non-finite-scores"):
        endpoint(server, retries=1).chat(HELLO, attribute_scores)
    assert len(server.asked) == 2


@pytest.mark.parametrize("text", ["good", "helpfulness:high", "helpfulness:1 and so on", "1.5"])
def test_texts_without_scores(text: str) -> None:
    with serving(lambda *_: Answer(text)) as server, failing("endpoint.no-scores"):
        endpoint(server, retries=1).chat(HELLO, attribute_scores)
    assert len(server.asked) == 2
