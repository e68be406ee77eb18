"""Sampled responses are trained with the same tokens, or counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.data import encode_prompt, end_token_ids
from rpo_trainer.rewards.sampled_text import PromptTokens, ResponseReader

from .chat_shapes import CASES, SHAPES, USER, said
from .test_chat_shapes import last_start, prepared, whole


def read(tokenizer: Any, prompt: Any, row: list[int], **more: Any) -> tuple[Any, ResponseReader]:
    reader = ResponseReader(tokenizer, end_token_ids(tokenizer))
    return reader.read(PromptTokens(prompt, encode_prompt(tokenizer, prompt), **more), row), reader


def last_turn(tokenizer: Any, chat: Any) -> list[int]:
    """The trained tokens of the last turn."""
    ids, mask = whole(prepared(tokenizer, {"messages": chat})[0])
    return ids[last_start(mask) :]


@pytest.mark.parametrize("case", ["plain", "turns", "thought", "call", "text, call", "answer"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_was_sampled_is_trained(shaped: Callable[[str], Any], name: str, case: str) -> None:
    tokenizer, chat = shaped(name), CASES[case]
    own = last_turn(tokenizer, chat)
    sample, reader = read(tokenizer, chat[:-1], own)
    assert sample.finished
    again = last_turn(tokenizer, [*chat[:-1], said(sample.text)])
    # An answer and a call may end with different tokens.
    assert (again[:-1] == own[:-1]) == (reader.changed == 0)
    assert not reader.changed or "call" in case


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("magistral", "<think>\n2+2\n</think>\n\nFour."),
        ("cohere", "<think>\n2+2\n</think>\n\nFour."),
        ("harmony", "<think>\n2+2\n</think>\n\nFour."),
        ("opened thought", "2+2\n</think>\n\nFour."),
        ("qwen3", "<think>\n2+2\n</think>\n\nFour."),
    ],
)
def test_thinking_is_kept_in_the_text(shaped: Callable[[str], Any], name: str, text: str) -> None:
    row = last_turn(shaped(name), CASES["thought"])
    assert read(shaped(name), [USER], row)[0].text == text


def test_marks_stay_where_white_space_tells_the_forms_apart(shaped: Callable[[str], Any]) -> None:
    tokenizer, text = shaped("magistral"), "[THINK] 2+2[/THINK] Four."
    row = tokenizer(f"{text}</s>", add_special_tokens=False)["input_ids"]
    sample, reader = read(tokenizer, [USER], row)
    assert (sample.text, reader.changed) == (text, 0)


def test_the_lead_of_a_template_is_not_in_the_text(shaped: Callable[[str], Any]) -> None:
    row = last_turn(shaped("glm4"), CASES["plain"])
    assert shaped("glm4").decode(row[:1]).startswith("\n")
    assert read(shaped("glm4"), [USER], row)[0].text == "Four."


def test_what_cannot_be_trained_as_sampled_is_one_warning(
    shaped: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = shaped("magistral")
    reader = ResponseReader(tokenizer, end_token_ids(tokenizer))
    asked = PromptTokens([USER], encode_prompt(tokenizer, [USER]))
    for text in ("Four.</s>", "Four.[TOOL_CALLS]weather[ARGS]{}</s>", "a[THINK]b</s>", "Fo"):
        reader.read(asked, tokenizer(text, add_special_tokens=False)["input_ids"])
    with caplog.at_level(logging.WARNING):
        reader.warn()
    (record,) = caplog.records
    assert record.args is not None and record.args[:2] == (2, 4)
    assert "[TOOL_CALLS]" in record.getMessage()


def test_text_of_control_tokens_is_not_taken_for_them(shaped: Callable[[str], Any]) -> None:
    """A model may write `[THINK]` as plain text."""
    tokenizer = shaped("magistral")
    letters = tokenizer("[THINK]a[/THINK]b", add_special_tokens=False, split_special_tokens=True)
    sample, reader = read(tokenizer, [USER], [*letters["input_ids"], tokenizer.eos_token_id])
    assert (sample.text, reader.changed) == ("[THINK]a[/THINK]b", 1)


def test_control_tokens_of_rows_that_are_parsed(shaped: Callable[[str], Any]) -> None:
    """`special_tokens: parse`: their text is read as the token, in messages and in text."""
    tokenizer = shaped("magistral")
    row = tokenizer("a[THINK]b</s>", add_special_tokens=False)["input_ids"]
    for prompt in ("q", [USER]):
        sample, reader = read(tokenizer, prompt, row, parsed=True)
        assert (sample.text, reader.changed) == ("a[THINK]b", 0)
    sample, reader = read(tokenizer, "q", row)
    assert (sample.text, reader.changed) == ("ab", 1)
