"""Every part of a row reaches the server that scores or answers it, or a warning counts it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from rpo_trainer.data import Audit
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.rows import THINKING
from rpo_trainer.data.sources import RawSource
from rpo_trainer.recipe import EndpointSpec, GenerateSpec, ScoreSpec
from rpo_trainer.rewards.endpoint_messages import chat_messages, prompt_text, response_text
from rpo_trainer.rewards.policies import EndpointPolicy
from rpo_trainer.rewards.scorers import make_scorer
from tests.rewards.server import Answer, serving

TOOLS = [{"type": "function", "function": {"name": "tool_f", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "tool_f", "arguments": '{"a": "ARG"}'}}
PROMPT: list[dict[str, Any]] = [
    {"role": "system", "content": "SYSTEM"},
    {"role": "user", "content": "QUESTION", "name": "NAME"},
    {"role": "assistant", "content": "SAID", "reasoning": "EARLIER", "tool_calls": [CALL]},
    {"role": "tool", "content": "RESULT", "tool_call_id": "c1"},
]
SAID = ("SYSTEM", "QUESTION", "NAME", "SAID", "EARLIER", "tool_f", "ARG", "RESULT", "object")


def pair(thinking: str = "reasoning_content", **more: Any) -> dict[str, Any]:
    chosen = [{"role": "assistant", "content": "GOOD", thinking: "THOUGHT"}]
    rejected = [{"role": "assistant", "content": "BAD"}]
    return {"prompt": PROMPT, "tools": TOOLS, "chosen": chosen, "rejected": rejected, **more}


def adapted(*raw: dict[str, Any], kind: Any = "pair", **options: Any) -> list[dict[str, Any]]:
    source = RawSource("s", list(raw), list(range(len(raw))), "s")
    return adapt(source, kind=kind, audit=Audit(), **options)


def scored(by: str, rows: list[dict[str, Any]]) -> list[str]:
    """The requests that scoring sends, as texts."""
    answer = Answer("reward:1" if by == "endpoint" else "[[A]]")
    with serving(lambda *_: answer) as server:
        spec = ScoreSpec.model_validate({by: {"url": server.url, "model": "m"}})
        scorer = make_scorer(spec)
        scorer.check(rows)
        assert len(list(scorer.work(rows)(range(len(rows)), (0, 1)))) == len(rows)
    return [json.dumps(request) for request in server.asked]


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("by", ["endpoint", "judge"])
def test_everything_of_a_row_is_scored(
    by: str, thinking: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = scored(by, adapted(pair(thinking)))
    assert len(asked) == 2 and not caplog.records
    assert all(text in request for text in SAID for request in asked)
    assert all(("THOUGHT" in request) == ("GOOD" in request) for request in asked)


def test_requests_have_the_form_of_the_interface() -> None:
    with serving(lambda *_: Answer("reward:1")) as server:
        scorer = make_scorer(
            ScoreSpec.model_validate({"endpoint": {"url": server.url, "model": "m"}})
        )
        list(scorer.work(adapted(pair()))([0], (0, 1)))
    request = server.asked[0]
    assert request["tools"] == TOOLS and request["tool_choice"] == "none"
    assert request["messages"][2] == {
        "role": "assistant", "content": "SAID", "reasoning_content": "EARLIER", "tool_calls": [CALL],
    }  # fmt: skip
    assert request["messages"][4]["reasoning_content"] == "THOUGHT"


def test_calls_without_ids_get_some_and_flat_ones_their_form() -> None:
    calls = [{"name": "f", "arguments": {"a": "ä"}}, {"function": {"name": "g"}}]
    given = [
        {"role": "assistant", "content": "", "tool_calls": calls, "weight": 0},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
        {"role": "tool", "content": "3"},
    ]
    sent = chat_messages(given)
    first, second, third = (c for m in sent for c in m.get("tool_calls", ()))
    assert first["function"] == {"name": "f", "arguments": '{"a": "ä"}'}
    assert second["function"] == {"name": "g", "arguments": "{}"} and "weight" not in sent[0]
    ids = [call["id"] for call in (first, second, third)]
    assert [m["tool_call_id"] for m in sent if m["role"] == "tool"] == ids and len({*ids}) == 3


def test_what_the_judge_reads() -> None:
    (row,) = adapted(pair())
    assert response_text(row, 0) == "<thinking>\nTHOUGHT\n</thinking>\n\nGOOD"
    assert response_text(row, 1) == "BAD"
    assert 'Tool call: tool_f({"a": "ARG"})' in prompt_text(row)
    assert prompt_text({"prompt": "p"}) == "p"


@pytest.mark.parametrize("by", ["endpoint", "judge"])
def test_what_is_not_sent_is_warned_of_once_with_counts(
    by: str, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"role": "user", "content": "q", "citations": ["x"], "weight": 1, "rating": None}
    answers = [{"role": "assistant", "content": c, "prefix": True} for c in "ab"]
    row = {"prompt": [odd], "chosen": answers[:1], "rejected": answers[1:]}
    rows = adapted(row, row, special_tokens="parse") + adapted(pair())
    asked = scored(by, rows)
    assert not any("citations" in request for request in asked)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    said = record.getMessage()
    assert "`citations` of messages (2)" in said and "`prefix` of messages (2)" in said
    assert "`special_tokens` (2)" in said and "rating" not in said and "weight" not in said


# ---------------------------------------------------------------- sampling


def sampled(rows: list[dict[str, Any]], answer: Answer) -> list[dict[str, Any]]:
    spec = GenerateSpec.model_validate({"responses": 2, "max_new_tokens": 4})
    with serving(lambda *_: answer) as server:
        policy = EndpointPolicy(EndpointSpec(url=server.url, model="m"), spec, seed=0)
        keys = [str(i) for i in range(len(rows))]
        list(policy.sample(rows, range(len(rows)), keys, (0, 1)))
    return server.asked


def test_prompts_are_sampled_with_their_tools_and_calls(caplog: pytest.LogCaptureFixture) -> None:
    rows = adapted({"prompt": PROMPT, "tools": TOOLS}, kind="prompt")
    request = sampled(rows, Answer("x"))[0]
    assert request["tools"] == TOOLS and request["messages"][2]["tool_calls"] == [CALL]
    assert request["messages"][2]["reasoning_content"] == "EARLIER" and not caplog.records
    sampled(adapted({"prompt": "p", "tools": TOOLS}, kind="prompt"), Answer("x"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "`tools`" in record.getMessage() and "(1)" in record.getMessage()


@pytest.mark.parametrize("key", [*THINKING, "tool_calls"])
@pytest.mark.parametrize("secret", ["", "sk-1234567890"])
def test_other_content_of_answers_is_counted(
    key: str, secret: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    rows = adapted({"prompt": PROMPT}, {"prompt": "p"}, kind="prompt")
    sampled(rows, Answer("x", beside={key: [CALL] if key == "tool_calls" else "t"}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 responses" in record.getMessage() and f"`{key}`" in record.getMessage()


# ---------------------------------------------------------------- variables of the chat template

GIVEN = {"enable_thinking": False, "documents": [{"text": "DOC"}]}


@pytest.mark.parametrize("own", [None, {}, {"depth": 1}], ids=["rows", "none", "its own"])
@pytest.mark.parametrize("by", ["sampling", "endpoint", "judge"])
def test_variables_of_a_row_or_of_the_endpoint_are_in_the_body(
    by: str, own: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys = set()
    row = {"prompt": PROMPT, "chat_template_kwargs": GIVEN}
    for given in (own, {"depth": 2}):
        with serving(lambda *_: Answer("[[A]]" if by == "judge" else "reward:1")) as server:
            at = {"url": server.url, "model": "m", "chat_template_kwargs": given}
            if by == "sampling":
                spec = GenerateSpec.model_validate(
                    {"responses": 1, "max_new_tokens": 4, "top_k": 3, "endpoints": [at]}
                )
                policy = EndpointPolicy(spec.endpoints[0], spec, seed=0)
                list(policy.sample(adapted(row, kind="prompt"), [0], ["0"], (0, 1)))
                keys.add(policy.key.replace(server.url, ""))
                assert server.asked[0]["top_k"] == 3
            else:
                rows = adapted(pair(chat_template_kwargs=GIVEN))
                scorer = make_scorer(ScoreSpec.model_validate({by: at}))
                scorer.check(rows)
                list(scorer.work(rows)([0], (0, 1)))
        wanted = given if given is not None else None if by == "judge" else GIVEN
        assert all(r.get("chat_template_kwargs") == (wanted or None) for r in server.asked)
    warned = any("documents" in record.getMessage() for record in caplog.records)
    assert warned  # for variables that the second endpoint does not get


def test_the_key_of_what_is_sampled_and_scored_depends_on_them() -> None:
    spec = GenerateSpec.model_validate({"responses": 1, "max_new_tokens": 4})
    for make in (
        lambda at: EndpointPolicy(EndpointSpec.model_validate(at), spec, seed=0).key,
        lambda at: make_scorer(ScoreSpec.model_validate({"endpoint": at})).key,
    ):
        keys = [
            make({"url": "http://h/v1", "model": "m", "chat_template_kwargs": given})
            for given in (None, {}, {"a": 1}, {"a": 2})
        ]
        assert len(set(keys)) == 4


def test_a_prompt_of_text_has_no_template_to_send_them_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = adapted({"prompt": "p", "chat_template_kwargs": {"a": 1}}, kind="prompt")
    (request, _) = sampled(rows, Answer("x"))
    assert "chat_template_kwargs" not in request
    (record,) = caplog.records
    assert "`chat_template_kwargs`" in record.getMessage() and "(1)" in record.getMessage()
