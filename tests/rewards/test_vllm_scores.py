"""Reward models behind vLLM's `/score` and `/classify`, against a local server that speaks these formats."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.resumable_rows import RowFailed
from rpo_trainer.recipe.schema import ScoreSpec
from rpo_trainer.rewards.scorers import make_scorer
from rpo_trainer.rewards.vllm_scores import address
from tests.raising import raises
from tests.rewards.server import Answer, Server, refused, serving

ROWS: list[dict[str, Any]] = [
    {
        "id": "a", "source": "s", "prompt": [{"role": "user", "content": "2 + 2?"}],
        "responses": ["4", "about five", "22"],
    },
    {
        "id": "b", "source": "s",
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "responses": ["hello", "go"],
    },
]  # fmt: skip


def reward(text: str) -> float:
    """The score of a response by the server's model."""
    return 10.0 - len(text)


def vllm(request: dict[str, Any], _: int) -> Answer:
    """vLLM: `/score` for text pairs, otherwise `/classify`; 400 for other requests."""
    head = {"id": "x", "object": "list", "created": 1, "model": request["model"], "usage": {}}
    if "text_1" in request:
        texts = request["text_2"]
        data = [{"index": i, "object": "score", "score": reward(t)} for i, t in enumerate(texts)]
        return Answer(body=json.dumps({**head, "data": data[::-1]}).encode())  # any order
    if "messages" not in request or "tools" in request:
        return refused(400, "messages")
    score = reward(request["messages"][-1]["content"])
    heads = [score, score / 2] if request["model"] == "two-heads" else [score]
    entry = {"index": 0, "label": "LABEL_0", "probs": heads, "num_classes": len(heads)}
    return Answer(body=json.dumps({**head, "data": [entry]}).encode())


def scored(
    server: Server, rows: list[dict[str, Any]] = ROWS, **fields: Any
) -> list[dict[str, Any]]:
    spec = {"url": server.url, "model": "rm", "retries": 0, **fields}
    weights = spec.pop("weights", None)
    given = {"endpoint": spec} | ({} if weights is None else {"weights": weights})
    scorer = make_scorer(ScoreSpec.model_validate(given))
    scorer.check(rows)
    done = sorted(scorer.work(rows)(range(len(rows)), (0, 1)), key=lambda each: each.index)
    for each in done:
        if each.failed is not None:
            raise each.failed
    return [each.fields for each in done]


@pytest.mark.parametrize("api", ["vllm_score", "vllm_classify"])
def test_every_response_gets_its_score(api: str) -> None:
    with serving(vllm) as server:
        found = scored(server, api=api)
        expected = [[reward(text) for text in row["responses"]] for row in ROWS]
        assert [fields["rewards"] for fields in found] == expected
        assert found[0]["scores"][1] == {"reward": reward("about five")}
        assert set(server.paths) == {"/score" if api == "vllm_score" else "/classify"}
        assert all(request["use_activation"] is False for request in server.asked)
        assert len(server.asked) == (2 if api == "vllm_score" else 5)


def test_score_sends_a_question_as_it_is_and_longer_prompts_with_their_roles() -> None:
    with serving(vllm) as server:
        scored(server, api="vllm_score", concurrency=1)
        first, second = server.asked
        assert (first["text_1"], first["text_2"]) == ("2 + 2?", ["4", "about five", "22"])
        assert "Be kind." in second["text_1"] and "hi" in second["text_1"]


def test_classify_sends_the_conversation_and_the_template_variables() -> None:
    rows = [{**ROWS[1], "chat_template_kwargs": {"enable_thinking": False}}]
    with serving(vllm) as server:
        scored(server, rows, api="vllm_classify", concurrency=1)
        assert [message["role"] for message in server.asked[0]["messages"]] == [
            "system", "user", "assistant",
        ]  # fmt: skip
        assert server.asked[0]["messages"][-1]["content"] == "hello"
        assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_labels_are_named_by_the_weights_in_their_order() -> None:
    with serving(vllm) as server:
        weights = {"helpfulness": 1.0, "verbosity": -2.0}
        found = scored(server, api="vllm_classify", model="two-heads", weights=weights)
        assert found[0]["scores"][0] == {"helpfulness": 9.0, "verbosity": 4.5}
        assert found[0]["rewards"][0] == 0.0
        with pytest.raises(RowFailed):
            scored(server, api="vllm_classify", model="two-heads")  # one name for two scores


def test_the_path_of_the_url_names_the_format() -> None:
    with serving(vllm) as server:
        base = server.url.removesuffix("/v1")
        assert scored(server, url=f"{base}/classify")[1]["rewards"] == [5.0, 8.0]
        assert scored(server, url=f"{base}/v1/score")[1]["rewards"] == [5.0, 8.0]
        assert set(server.paths) == {"/classify", "/v1/score"}  # as they are given


@pytest.mark.parametrize(
    ("url", "api", "expected"),
    [
        ("http://h:1/v1", "vllm_score", "http://h:1/score"),
        ("http://h:1/", "vllm_classify", "http://h:1/classify"),
        ("http://h:1/v1/classify", "vllm_classify", "http://h:1/v1/classify"),
        ("http://h:1/proxy/v1", "vllm_score", "http://h:1/proxy/score"),
    ],
)
def test_addresses(url: str, api: str, expected: str) -> None:
    assert address(url, api) == expected


def test_score_has_one_attribute() -> None:
    with serving(vllm) as server, raises("recipe.too-many-attributes", exit_code=2):
        scored(server, api="vllm_score", weights={"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(
    "data",
    [[], [{"index": 0, "score": 1.0}], [{"index": i, "score": None} for i in range(3)],
     [{"index": i, "score": float("nan")} for i in range(3)], [{"index": 0, "score": 1.0}] * 3,
     "text", None],
    ids=str,
)  # fmt: skip
def test_answers_without_a_score_for_each_response_fail_the_row(data: Any) -> None:
    body = json.dumps({"data": data}).encode()
    with serving(lambda *_: Answer(body=body)) as server, pytest.raises(RowFailed):
        scored(server, ROWS[:1], api="vllm_score")


@pytest.mark.parametrize("trouble", [refused(503), Answer(body=b"[]"), Answer(hang_up=True)])
def test_trouble_is_asked_again(trouble: Answer) -> None:
    def answer(request: dict[str, Any], count: int) -> Answer:
        return vllm(request, count) if count else trouble

    with serving(answer) as server:
        assert scored(server, ROWS[:1], api="vllm_score", retries=2)[0]["rewards"][0] == 9.0


def test_what_is_not_sent_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**ROWS[0], "tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}}]
    with serving(vllm) as server, caplog.at_level(logging.WARNING):
        scored(server, rows, api="vllm_classify")
        assert "`tools` (1)" in caplog.text and "`chat_template_kwargs`" not in caplog.text
        caplog.clear()
        scored(server, rows, api="vllm_score")
        assert "`chat_template_kwargs` (1)" in caplog.text


def test_the_format_belongs_to_reward_endpoints_alone() -> None:
    from pydantic import ValidationError

    judge = {"url": "http://localhost:1/v1", "model": "m", "api": "vllm_score"}
    with pytest.raises(ValidationError):
        ScoreSpec.model_validate({"judge": judge})


def test_other_formats_have_other_keys() -> None:
    """Rewards of one format are not reused for another."""
    spec = {"url": "http://localhost:1/v1", "model": "m"}
    keys = {
        make_scorer(ScoreSpec.model_validate({"endpoint": {**spec, "api": api}})).key
        for api in ("rewards", "vllm_score", "vllm_classify")
    }
    assert len(keys) == 3


def test_the_documented_requests_and_answers_are_those_that_are_sent_and_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = [json.loads(text) for text in re.findall(r"```jsonc\n(.*?)```", page, re.DOTALL)]
    requests, answers = blocks[::2], blocks[1::2]
    row = {**ROWS[0], "responses": ["4", "about five"]}
    apis = ("rewards", "vllm_score", "vllm_classify")
    scores = ([{"correctness": 3.4, "helpfulness": 3.1}], [{"reward": 2.5}, {"reward": -1.0}],
              [{"reward": 2.5}])  # fmt: skip
    for api, request, answer, expected in zip(apis, requests, answers, scores, strict=True):
        weights = {"helpfulness": 0.5, "correctness": 0.5} if api == "rewards" else None
        one = {**row, "responses": row["responses"][: 2 if api == "vllm_score" else 1]}
        with serving(lambda *_, a=answer: Answer(body=json.dumps(a).encode())) as server:
            (found,) = scored(server, [one], api=api, weights=weights)
            assert server.asked == [request]
            assert found["scores"] == expected
