"""The LLM judge: called twice, only consistent verdicts are kept; its biases are counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.data.judge_bias import bias_lines, biases
from rpo_trainer.errors import RecipeError
from rpo_trainer.recipe import JudgeSpec
from rpo_trainer.rewards.endpoint import Endpoint
from rpo_trainer.rewards.judge import TEMPLATE, fill_template, judge_row, read_template
from tests.raising import raises
from tests.rewards.failing import failing
from tests.rewards.server import Answer, serving

Request = dict[str, Any]


def shown(request: Request) -> tuple[str, str]:
    text = request["messages"][0]["content"]
    found = re.search(
        r"<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>", text, re.DOTALL
    )
    assert found is not None
    return found[1], found[2]


def by_length(request: Request, _: int) -> Answer:
    first, second = shown(request)
    if len(first) == len(second):
        return Answer("Equally good. [[C]]")
    return Answer(f"Because [[B]] came up. [[{'A' if len(first) > len(second) else 'B'}]]")


def always_first(request: Request, _: int) -> Answer:
    return Answer("[[A]]")


def judged(answer: Any, *responses: str, **row: Any) -> dict[str, Any]:
    with serving(answer) as server:
        endpoint = Endpoint(JudgeSpec(url=server.url, model="judge", retries=1))
        row = {"id": "r", "prompt": "p", "responses": list(responses), **row}
        return judge_row(endpoint, TEMPLATE, row, max_tokens=5, temperature=0.0) | {
            "asked": server.asked
        }


def test_a_pair_is_asked_in_both_orders() -> None:
    found = judged(by_length, "long", "no")
    assert [shown(request) for request in found["asked"]] == [("long", "no"), ("no", "long")]
    assert all(request["temperature"] == 0.0 for request in found["asked"])
    assert all(request["max_tokens"] == 5 for request in found["asked"])
    assert found["rewards"] == [1.0, 0.0]
    (comparison,) = found["judge"]
    assert comparison["verdicts"] == ["A", "B"]
    assert comparison["answers"][0].startswith("Because")
    assert judged(by_length, "no", "long")["rewards"] == [0.0, 1.0]
    assert judged(by_length, "same", "else")["rewards"] == [0.5, 0.5]


def test_a_verdict_that_turns_with_the_order_is_none() -> None:
    found = judged(always_first, "a", "b")
    assert found["rewards"] == [None, None]
    assert found["judge"][0]["better"] is None


def test_k_responses_get_the_mean_of_their_comparisons() -> None:
    found = judged(by_length, "x", "xxx", "xx", "yy")
    assert found["rewards"] == [0.0, 1.0, 0.5, 0.5]
    assert len(found["asked"]) == 12


def test_only_the_response_without_a_consistent_verdict_has_no_reward() -> None:
    def answer(request: Request, count: int) -> Answer:
        pair = shown(request)
        return Answer("[[A]]") if "odd" in pair else by_length(request, count)

    assert judged(answer, "xx", "odd", "x")["rewards"] == [1.0, None, 0.0]


def test_nonsense_is_asked_again_and_then_fails_the_row() -> None:
    def answer(request: Request, count: int) -> Answer:
        return by_length(request, count) if count else Answer("I like both [A] answers")

    assert judged(answer, "long", "no")["rewards"] == [1.0, 0.0]
    with failing("judge.no-verdict", "'I cannot say'"):
        judged(lambda *_: Answer("I cannot say"), "a", "b")


def test_conversations_are_written_out() -> None:
    prompt = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    found = judged(by_length, "a", "bb", prompt=prompt)
    text = found["asked"][0]["messages"][0]["content"]
    assert "System: Be short.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?" in text


def test_what_looks_like_a_place_in_a_text_stays_text() -> None:
    filled = fill_template("{prompt}|{first}|{second}", "{first}", "{second}", r"\1{prompt}")
    assert filled == r"{first}|{second}|\1{prompt}"


def test_templates(tmp_path: Path) -> None:
    assert read_template(None) == TEMPLATE
    assert all(place in TEMPLATE for place in ("{prompt}", "{first}", "{second}", "[[A]]", "[[C]]"))
    path = tmp_path / "t.txt"
    path.write_text("{prompt} {first} {second}")
    assert read_template(path) == "{prompt} {first} {second}"
    path.write_text("{prompt} {first}")
    with raises("judge.missing-placeholder", RecipeError, where=str(path)) as error:
        read_template(path)
    assert "{second}" in error.value.what and "{first}" not in error.value.what
    path = tmp_path / "none.txt"
    with raises("judge.template-not-readable", RecipeError, where=str(path)):
        read_template(path)


def test_biases_are_counted() -> None:
    fair = [
        judged(by_length, "long", "no"),
        judged(by_length, "a", "aaa"),
        judged(by_length, "a", "b"),
    ]
    rows = [
        {"responses": pair, "judge": found["judge"]}
        for pair, found in zip((["long", "no"], ["a", "aaa"], ["a", "b"]), fair, strict=True)
    ]
    assert biases(rows) == {
        "comparisons": 3,
        "consistent": 3,
        "equal": 1,
        "first_position": 0.5,
        "longer_wins": 1.0,
    }
    first = {"responses": ["a", "bb"], "judge": judged(always_first, "a", "bb")["judge"]}
    found = biases([first, *rows])
    assert found["consistent"] == 3
    assert found["first_position"] == pytest.approx(4 / 6)
    assert bias_lines(found) == [
        "judge: 3 of 4 comparisons consistent, 1 equal",
        "judge: 67% of its verdicts are for the answer shown first (50% without position bias)",
        "judge: the longer answer wins 100% of the time",
    ]
    assert len(bias_lines(biases([]))) == 1
