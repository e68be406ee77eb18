"""Endpoints that send slowly or endlessly, redirect, or repeat the key."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import ValidationError

from rpo_trainer.data.resumable_rows import RowFailed
from rpo_trainer.errors import RecipeError, RunError
from rpo_trainer.recipe import EndpointSpec, GenerateSpec, JudgeSpec
from rpo_trainer.redact import REDACTED
from rpo_trainer.rewards import http_client
from rpo_trainer.rewards.endpoint import Endpoint, attribute_scores, message_of
from rpo_trainer.rewards.judge import judge_row, read_verdict
from rpo_trainer.rewards.policies import EndpointPolicy
from tests.raising import raises
from tests.rewards.failing import failing
from tests.rewards.server import SOON, Answer, Server, refused, serving

HELLO = [{"role": "user", "content": "hello"}]
KEY = 'sk-Echo/"42"+' + "S" * 20  # is escaped differently in JSON, in a URL and in HTML


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


def endpoint(server: Server, **fields: Any) -> Endpoint:
    settings = {"retries": 0, "timeout": 5.0, **fields}
    return Endpoint(EndpointSpec(url=server.url, model="m", **settings))


# ---------------------------------------------------------------- time and size


@pytest.mark.parametrize("part", ["headers", "body"])
@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_drips_cannot_extend_the_deadline(part: str, status: int) -> None:
    with serving(lambda *_: Answer(drip=part, status=status)) as server:
        start = time.monotonic()
        with failing("endpoint.timeout") as failed:
            endpoint(server, timeout=0.3).chat(HELLO, message_of)
        assert time.monotonic() - start < 2.0
    assert failed.value.service


def test_the_deadline_restarts_with_each_request_of_a_connection() -> None:
    with serving(lambda *_: Answer("fine", stall=0.3)) as server:
        asked = endpoint(server, timeout=0.8)
        for _ in range(4):
            assert asked.chat(HELLO, message_of) == "fine"


def test_a_drip_is_tried_again_as_often_as_retries_say() -> None:
    with serving(lambda _, n: Answer("fine") if n else Answer(drip="body")) as server:
        assert endpoint(server, timeout=0.3, retries=1).chat(HELLO, message_of) == "fine"
    assert len(server.asked) == 2


def test_a_slow_reader_cannot_extend_the_deadline() -> None:
    """A server that reads a large request in small pieces."""
    listener = socket.create_server(("127.0.0.1", 0))

    def take() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            for _ in range(100):
                if not connection.recv(64):
                    return
                time.sleep(0.05)
        except OSError:
            pass

    threading.Thread(target=take, daemon=True).start()
    spec = EndpointSpec(
        url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model="m", timeout=0.3, retries=0
    )
    start = time.monotonic()
    with pytest.raises(RowFailed, match="within"):
        Endpoint(spec).chat([{"role": "user", "content": "x" * 2**24}], message_of)
    assert time.monotonic() - start < 2.0
    listener.close()


def test_reading_stops_at_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client.BoundedClient.__init__, "__defaults__", (100_000,))
    with serving(lambda *_: Answer(endless=b" " * 2**14)) as server:
        with pytest.raises(RowFailed, match="100,000 bytes"):
            endpoint(server).chat(HELLO, message_of)
        time.sleep(0.1)
        assert server.sent < 2**24  # what the sockets buffer, and not all of it


def test_an_answer_below_the_limit_is_read_whole() -> None:
    text = "x" * 2**20
    with serving(lambda *_: Answer(text)) as server:
        assert endpoint(server).chat(HELLO, message_of) == text


def test_a_compressed_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(b"[" * 2**24)
    answer = Answer(body=bomb, headers={"content-encoding": "gzip"})
    with serving(lambda *_: answer) as server, pytest.raises(RowFailed, match="compressed"):
        endpoint(server).chat(HELLO, message_of)


# ---------------------------------------------------------------- where prompts go


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("absolute", [True, False])
def test_redirects_are_refused(status: int, absolute: bool) -> None:
    with serving(lambda *_: Answer("reward:1")) as other:
        host = other.url.removeprefix("http://")
        target = f"http://me:hidden-pw@{host}/to?token=hidden-token" if absolute else "/elsewhere"
        answer = Answer(status=status, body=b"", headers={"location": target})
        with serving(lambda *_: answer) as server, raises("endpoint.redirect", RunError) as error:
            endpoint(server, retries=3).chat(HELLO, message_of)
    assert not other.asked and len(server.asked) == 1
    assert (f"{host}/to" if absolute else "/elsewhere") in error.value.what
    assert str(status) in error.value.what and "hidden" not in str(error.value)
    assert error.value.where == server.url


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/v1", "host/v1", "localhost:8000/v1", "http://",
     "https:///v1", "http://host:port/v1", "http://[::1/v1", "http://ho st/v1", "data:,x"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [EndpointSpec, JudgeSpec])
def test_what_is_not_a_web_address_is_refused(url: str, kind: type[EndpointSpec]) -> None:
    with pytest.raises(ValidationError) as error:
        kind(url=url, model="m")
    (only,) = error.value.errors()
    assert only["loc"] == ("url",) and repr(url) in only["msg"]


def test_an_address_in_a_refusal_hides_its_password() -> None:
    with pytest.raises(ValidationError) as error:
        EndpointSpec(url="ftp://me:hidden-pw@host/v1", model="m")
    assert "hidden-pw" not in error.value.errors()[0]["msg"]


def test_a_server_without_tls_is_a_failed_row() -> None:
    with serving(lambda *_: Answer("x")) as server:
        spec = EndpointSpec(url=server.url.replace("http:", "https:"), model="m", retries=0)
        with failing("endpoint.unreachable") as failed:
            Endpoint(spec).chat(HELLO, message_of)
    assert failed.value.service


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (Answer(body=b"[" * 200_000), "nested"),
        (Answer(body=b'{"choices":' + b'[{"a":' * 50_000), "nested"),
        (Answer(body=b"<html>busy</html>", content_type="text/html"), "<html>busy"),
        (Answer(body=b"<html>busy</html>"), ""),
        (Answer(body=b"\xff\xfe\x00{", content_type="application/json"), ""),
        (Answer(body=b"1" * 10_000), ""),
        (Answer(body=b"\x1b[2Jgone", content_type="text/plain"), "[2Jgone"),
    ],
    ids=["deep", "deep choices", "html", "html as json", "utf-16", "digits", "escape"],
)
def test_an_answer_that_makes_no_sense_is_a_failed_row(answer: Answer, named: str) -> None:
    with serving(lambda *_: answer) as server, failing("endpoint.unreadable", named) as failed:
        endpoint(server).chat(HELLO, message_of)
    assert str(failed.value).isprintable() and len(str(failed.value)) < 400


@pytest.mark.parametrize("charset", ["utf-16", "hex", "nonsense"])
def test_the_charset_that_a_server_names_is_not_used(charset: str) -> None:
    kind = f"application/json; charset={charset}"
    with serving(lambda *_: Answer("fine", content_type=kind)) as server:
        assert endpoint(server).chat(HELLO, message_of) == "fine"
    answer = refused(400, "no")
    answer.content_type = kind
    with serving(lambda *_: answer) as server, failing("endpoint.refused", "400 no"):
        endpoint(server).chat(HELLO, message_of)


def test_a_score_that_is_not_a_number_is_asked_again() -> None:
    content = [{"token": "reward", "logprob": "high", "top_logprobs": []}]
    choice = {"message": {"role": "assistant", "content": ""}, "logprobs": {"content": content}}
    answer = Answer(body=json.dumps({"choices": [choice]}).encode())
    with serving(lambda *_: answer) as server, failing("endpoint.unreadable"):
        endpoint(server).chat(HELLO, attribute_scores)


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize("status", [400, 401, 500])
@pytest.mark.parametrize(
    "form",
    [KEY, f"Bearer {KEY}", json.dumps(KEY), json.dumps(json.dumps(KEY)), "x" * 178 + KEY],
    ids=["plain", "header", "json", "json in json", "cut"],
)
def test_errors_that_repeat_the_key(status: int, form: str, key: str) -> None:
    with (
        serving(lambda *_: refused(status, f"Incorrect key: {form}", **SOON)) as server,
        pytest.raises((RowFailed, RunError)) as error,
    ):
        endpoint(server).chat(HELLO, message_of)
    said = str(error.value)
    assert "sk-Ec" not in said and "[redact" in said
    inner = error.value.__context__  # an error tracker records what an exception refers to
    assert isinstance(inner, openai.APIStatusError)
    shown = f"{inner!r} {inner.body} {inner.response.text} {inner.response.headers}"
    assert "sk-Ec" not in shown and "SSSSSS" not in shown


def test_answers_that_repeat_the_key(key: str, caplog: pytest.LogCaptureFixture) -> None:
    row = {"id": "a", "source": "s", "prompt": "p", "responses": ["x", "y"]}
    policy_row = {**row, "prompt": HELLO}
    with serving(lambda *_: Answer(f"[[A]] said {KEY}")) as server:
        text = endpoint(server).chat(HELLO, message_of)
        judged = judge_row(endpoint(server), "{prompt}{first}{second}", row)
        policy = EndpointPolicy(
            EndpointSpec(url=server.url, model="m"),
            GenerateSpec(responses=1, max_new_tokens=4),
            seed=1,
        )
        (sampled,) = policy.sample([policy_row], [0], ["k"], (0, 1))
    assert text == f"[[A]] said {REDACTED}"
    assert judged["judge"][0]["answers"] == [text, text]
    assert sampled.fields == {"responses": [text], "finished": [True]}
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert any(REDACTED in r.getMessage() and server.url in r.getMessage() for r in warned)
    with serving(lambda *_: Answer("", logprobs={KEY: 1.5})) as server:
        scores, said = endpoint(server).chat(HELLO, attribute_scores)
    assert scores == {REDACTED: 1.5} and said == f"{REDACTED}:1.5"


def test_a_key_that_is_written_in_escapes_of_json(key: str) -> None:
    escaped = "".join(f"\\u{ord(char):04x}" for char in KEY)
    body = f'{{"choices": [{{"message": {{"content": "it is {escaped}"}}}}]}}'.encode()
    with serving(lambda *_: Answer(body=body)) as server:
        assert endpoint(server).chat(HELLO, message_of) == f"it is {REDACTED}"


def test_a_key_where_the_text_of_a_judge_is_cut(key: str) -> None:
    escaped = "".join(f"\\u{ord(char):04x}" for char in KEY)
    body = f'{{"choices": [{{"message": {{"content": "{escaped}{"x" * 70}"}}}}]}}'.encode()
    with serving(lambda *_: Answer(body=body)) as server, failing("judge.no-verdict") as error:
        endpoint(server).chat(HELLO, read_verdict)
    assert "SSS" not in str(error.value)


def test_logs_of_the_http_libraries(key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lambda *_: refused(401, KEY, **{"x-echo": KEY}, **SOON)) as server:
        url = server.url.replace("://", "://me:pass-word-1@")
        asked = Endpoint(EndpointSpec(url=f"{url}?api_key=query-key-1", model="m", retries=0))
        with pytest.raises(RunError):
            asked.chat(HELLO, message_of)
    libraries = {record.name.partition(".")[0].rstrip("2") for record in caplog.records}
    assert libraries >= {"openai", "httpx", "httpcore"}
    for secret in ("sk-Echo", "pass-word-1", "query-key-1"):
        assert secret not in caplog.text


def test_parameters_of_the_address_are_sent_with_each_request() -> None:
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.send_response(400)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        spec = EndpointSpec(
            url=f"http://127.0.0.1:{server.server_port}/v1?api-version=2", model="m", retries=0
        )
        with pytest.raises(RowFailed):
            Endpoint(spec).chat(HELLO, message_of)
        server.shutdown()
    assert paths == ["/v1/chat/completions?api-version=2"]


def test_answers_that_name_other_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was sent to the server: the rest of an answer is data."""
    monkeypatch.setenv("SOME_TOKEN", "multiplication")
    said = "multiplication at postgres://user:secret@localhost/db?key=value"
    with serving(lambda *_: Answer(said)) as server:
        assert endpoint(server).chat(HELLO, message_of) == said


@pytest.mark.parametrize("key", ["sk-with-a-newline\nx", " sk-with-blank", "sk-ключ-ключ"])
def test_a_key_that_no_header_carries(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with (
        serving(lambda *_: Answer("x")) as server,
        raises("endpoint.invalid-key", RecipeError) as error,
    ):
        endpoint(server)
    assert "OPENAI_API_KEY" in error.value.what and key.strip() not in str(error.value)


def test_credentials_of_a_url_stay_out_of_errors() -> None:
    with serving(lambda *_: refused(401, "not me:hidden-pw")) as server:
        url = server.url.replace("http://", "http://me:hidden-pw@")
        with pytest.raises(RunError) as error:
            Endpoint(EndpointSpec(url=url, model="m")).chat(HELLO, message_of)
    assert "hidden-pw" not in str(error.value) and REDACTED in str(error.value.where)


def test_no_file_and_no_output_of_a_command_holds_the_key(tmp_path: Path) -> None:
    """Rows, report and the debug log of every library, with a server that repeats the key."""
    rows = [{"prompt": "p", "responses": ["a", "b"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    echo = {"x-echo": KEY, "x-request-id": KEY}
    with serving(lambda *_: Answer(f"[[C]] {KEY}", headers=echo)) as server:
        command = [
            sys.executable, "-m", "rpo_trainer", "-v", "score", "in.jsonl", "-o", "out.jsonl",
            "--judge", server.url.replace("//", "//me:hidden-pw@"), "--name", "m",
        ]  # fmt: skip
        code = (
            "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
            "from rpo_trainer.cli.commands import main; main(sys.argv[1:])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command[3:]], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, "OPENAI_API_KEY": KEY}, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    texts = [path.read_text() for path in tmp_path.iterdir() if path.name != "in.jsonl"]
    assert any(REDACTED in text for text in texts) and "x-echo" in done.stderr
    for text in [*texts, done.stdout, done.stderr]:
        assert "sk-Echo" not in text and "hidden-pw" not in text
