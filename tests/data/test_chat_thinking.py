"""Thinking in the content of a turn, markers that an answer only mentions, and missing tool calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rpo_trainer.data import encode_prompt
from rpo_trainer.errors import DataError
from tests.raising import raises

from .chat_shapes import CASES, SHAPES, USER, said
from .conftest import trained_texts
from .test_chat_shapes import TRAINED, last_start, prepared, whole

MENTIONED = "Close it with </think> at the end."
# A template that opens thinking in its generation prompt, and reads it from a key but not from the content.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n"
    "{% elif m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def trained(tokenizer: Any, *turns: dict[str, Any]) -> tuple[list[str], Any]:
    example, audit = prepared(tokenizer, {"messages": list(turns)})
    return trained_texts(tokenizer, *whole(example)), audit


@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_with_a_closing_marker_is_not_thinking(
    shaped: Callable[[str], Any], name: str
) -> None:
    """It is trained as an answer, or a warning says that the template itself cuts it in two; only a
    generation prompt that opens a thought makes thinking of it."""
    ((plain,), _), ((text,), audit) = (
        trained(shaped(name), USER, said(words)) for words in ("Four.", MENTIONED)
    )
    if text != plain.replace("Four.", MENTIONED):
        opened = SHAPES[name].template.endswith("<think>\n{% endif %}")
        assert opened or "text_left_out" in audit.warnings


def test_a_closing_mark_that_is_special_is_text_in_an_answer(shaped: Callable[[str], Any]) -> None:
    """It is a control token only after an opening marker, in the turn or in the generation prompt."""
    tokenizer = shaped("magistral")
    turn = said("Close it with [/THINK].")
    example, audit = prepared(tokenizer, {"messages": [USER, turn]})
    assert tokenizer.convert_tokens_to_ids("[/THINK]") not in example["response_ids"][0]
    assert "special_token_text" in audit.warnings


def test_thinking_that_the_prompt_has_opened(make_tokenizer: Callable[..., Any]) -> None:
    """`thought</think>answer`, as sampled, is trained after the same prompt as thinking in a key."""
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>", chat_template=OPENING
    )
    key, sampled = said("Four.", "2+2"), said("2+2\n</think>\nFour.")
    for turn in (key, sampled):
        example, audit = prepared(tokenizer, {"messages": [USER, turn]})
        ids, mask = whole(example)
        assert trained_texts(tokenizer, ids, mask) == ["2+2\n</think>\nFour.<|im_end|>"]
        assert ids[: last_start(mask)] == encode_prompt(tokenizer, [USER])
        assert not audit.warnings and not audit.generation["s"].rows.count


def test_a_template_that_writes_one_call_of_several(shaped: Callable[[str], Any]) -> None:
    """The row is refused whether the calls differ in names, in arguments, or not at all."""
    call = said("", city="Rome")
    (first,) = call["tool_calls"]
    for function in (
        {"name": "clock", "arguments": {"city": "Rome"}},
        {"name": "weather", "arguments": {"city": "Bern"}},
        first["function"],
    ):
        turn = {**call, "tool_calls": [first, {**first, "id": "call00002", "function": function}]}
        with raises("template.unwritten-tool-calls", DataError):
            prepared(shaped("harmony"), {"messages": [USER, turn]})
        (found,), audit = trained(shaped("hermes"), USER, turn)
        assert found.count("<tool_call>") == 2 and not audit.warnings
    assert trained(shaped("harmony"), *CASES["call"])[0] == TRAINED["harmony"]["call"]


def test_a_row_counts_once_for_each_reason(shaped: Callable[[str], Any]) -> None:
    thoughts = {"messages": CASES["thoughts"]}
    _, audit = prepared(shaped("hermes"), thoughts)
    assert audit.warnings["text_left_out"].count == 1
    row = {"prompt": [USER], "responses": ["a", "b"], "rewards": None}
    row["response_fields"] = [{"thinking": "x"}, {"thinking": "y"}]
    _, audit = prepared(shaped("hermes"), row, "pair")
    assert audit.warnings["text_left_out"].count == 1
