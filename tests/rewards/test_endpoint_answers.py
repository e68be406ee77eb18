"""Answers of endpoints as text: read in linear time, and always encodable as UTF-8."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from rpo_trainer.rewards.endpoint import Unreadable, attribute_scores, message_of
from rpo_trainer.rewards.judge import read_verdict
from rpo_trainer.rewards.policies import _response

LONG = 60_000


def _answer(text: str, **fields: Any) -> Any:
    message = SimpleNamespace(content=text)
    choice = SimpleNamespace(message=message, finish_reason="stop", **fields)
    return SimpleNamespace(choices=[choice])


@pytest.mark.parametrize(
    "text",
    [
        "a" + " " * LONG + "x", "a" + " -" * LONG, "a:" + "1" * LONG + "x", " \t" * LONG + ":",
        "a:" * LONG, "[[" * LONG, "[[A]" * LONG, ",:" * LONG, "a" + " " * LONG + ":x",
    ],
    ids=lambda text: ascii(text[:6]),
)  # fmt: skip
@pytest.mark.parametrize("read", [attribute_scores, read_verdict])
def test_long_answers_take_linear_time(read: Any, text: str) -> None:
    began = time.process_time()
    with pytest.raises(Unreadable):
        read(_answer(text))
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("helpfulness:1.6,correctness = -.5", {"helpfulness": 1.6, "correctness": -0.5}),
        (" a b-c :1 ;\n d\t=\t2e1", {"a b-c": 1.0, "d": 20.0}),
    ],
)
def test_scores_by_attribute(text: str, scores: dict[str, float]) -> None:
    assert attribute_scores(_answer(text)) == (scores, text)


def test_lone_surrogates_are_replaced_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = "half \ud83d here, \U0001f600", "half \ufffd here, \U0001f600"
    assert message_of(_answer(broken)) == whole
    assert _response(_answer(broken)) == (whole, True, "")
    assert read_verdict(_answer(broken + "[[A]]"))[1] == whole + "[[A]]"
    tokens = SimpleNamespace(content=[SimpleNamespace(token="re\udfffward", logprob=1.0)])
    assert attribute_scores(_answer("", logprobs=tokens))[0] == {"re\ufffdward": 1.0}
    assert "surrogate" in caplog.text
