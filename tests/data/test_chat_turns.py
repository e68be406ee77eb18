"""Parts of turns: thinking markers, forms of calls, boundaries, and equality of training and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken

from rpo_trainer.data import encode_prompt
from rpo_trainer.data.turn_endings import Controls
from rpo_trainer.errors import DataError
from rpo_trainer.report.audits import read_audit
from rpo_trainer.stages.record import AuditRecord
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.fits import trained_ends
from tests.raising import raises

from .chat_shapes import CASES, SHAPES, TOOL, USER, Chat, said
from .conftest import trained_texts
from .test_chat_shapes import TRAINED, last_start, prepared, whole


def test_what_differs_is_a_warning_with_an_example(shaped: Callable[[str], Any]) -> None:
    _, audit = prepared(shaped("deepseek r1"), {"messages": CASES["plain"]})
    generation, training = audit.as_dict()["generation"]["s"]["example"]
    assert generation.endswith("<｜Assistant｜><think>\n")
    assert training.endswith("<｜Assistant｜>Four.<｜end▁of▁sentence｜>")
    (told,) = [text for _, text in audit.messages() if repr(generation) in text]
    assert repr(training) in told and "r0" in told
    # `check` and the report warn if it affects most rows.
    assert [
        c.text for c in read_audit(AuditRecord.from_json(audit.as_dict())).concerns("rows")
    ] == [told]


def test_marks_of_thinking_in_an_answer_are_tokens(shaped: Callable[[str], Any]) -> None:
    """Special or not, and mentioned by the template or not; in a user turn special ones are text."""
    for name, opening, closing in (
        ("named marks", "<think>", "</think>"),
        ("magistral", "[THINK]", "[/THINK]"),
    ):
        tokenizer = shaped(name)
        marks = tokenizer.convert_tokens_to_ids([opening, closing])
        turn = said(f"{opening}2+2{closing}Four. {opening}")
        example, audit = prepared(tokenizer, {"messages": [USER, turn]})
        trained = [i for i, m in zip(*whole(example), strict=True) if m]
        special = name == "magistral"
        assert [i for i in trained if i in marks] == (marks if special else [*marks, marks[0]])
        assert ("special_token_text" in audit.warnings) == special  # the last one is text
        asked = {"role": "user", "content": f"{opening}a{closing}"}
        ids = encode_prompt(tokenizer, [asked])
        assert (marks[0] in ids[-20:]) == (not special)
    tokenizer = shaped("magistral")
    turn = said("[THINK]2+2[/THINK]Four.")
    key = said("Four.", "2+2")
    of = [prepared(tokenizer, {"messages": [USER, each]}) for each in (turn, key)]
    assert of[0][0]["response_ids"] == of[1][0]["response_ids"]
    assert not of[0][1].warnings


def test_a_white_space_token_across_the_boundary_is_split(
    make_tokenizer: Callable[..., Any],
) -> None:
    """The generation prompt ends with a line break, and the turn begins with one."""
    shape = SHAPES["opened thought"]
    tokenizer = make_tokenizer(list(shape.specials), eos=shape.eos, chat_template=shape.template)
    tokenizer.add_tokens([*shape.added, AddedToken("\n\n", normalized=False)])
    chat = CASES["plain"]
    ids, mask = whole(prepared(tokenizer, {"messages": chat})[0])
    assert ids[: last_start(mask)] == encode_prompt(tokenizer, chat[:-1])
    assert trained_texts(tokenizer, ids, mask) == TRAINED["opened thought"]["plain"]


def test_calls_in_every_spelling(shaped: Callable[[str], Any]) -> None:
    """Arguments as an object or as JSON, with or without `function`, are rendered equally by all
    templates."""
    for name in ("hermes", "deepseek", "llama", "cohere"):
        tokenizer = shaped(name)
        function = {"name": "weather", "arguments": {"city": "Rome"}}
        for call in (function, {"type": "function", "function": function}):
            chat: Chat = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, TOOL]
            example, _ = prepared(tokenizer, {"messages": [*chat, said("It rains.")]})
            assert trained_texts(tokenizer, *whole(example)) == TRAINED[name]["answer"]


def test_the_system_prompt_is_where_generation_has_it(shaped: Callable[[str], Any]) -> None:
    tokenizer = shaped("mistral")
    chat = [{"role": "system", "content": "Be brief."}, *CASES["turns"]]
    example, audit = prepared(tokenizer, {"messages": chat})
    ids, mask = whole(example)
    assert trained_texts(tokenizer, ids, mask) == TRAINED["mistral"]["turns"]
    assert tokenizer.decode(ids) == (
        "<s>[INST]Hi?[/INST]Four.</s>[INST]Be brief.\n\nSure?[/INST]Yes.</s>"
    )
    # The first answer is also generated after the system prompt, but a rendering contains it only once.
    generation, training = audit.generation["s"].example or ("", "")
    assert generation.startswith("<s>[INST]Be brief.") and training.startswith("<s>[INST]Hi?")


def test_ends_that_the_data_brings_are_not_written_twice(shaped: Callable[[str], Any]) -> None:
    for name, end in (("glm4", "<|user|>"), ("cohere", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")):
        turn = said(f"Four.{end}")
        row = {"messages": [USER, turn], "special_tokens": "parse"}
        example, _ = prepared(shaped(name), row)
        found = trained_texts(shaped(name), *whole(example))
        assert found == TRAINED[name]["plain"]


def test_a_call_that_the_template_writes_without_opening_a_turn(
    make_tokenizer: Callable[..., Any],
) -> None:
    """After a tool result, generation has a token that the template writes only before answers."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% elif m.role == 'tool' %}<|result|>{{ m.content }}{% elif m.tool_calls %}"
        "{{ '<|assistant|>' if loop.index0 == 1 }}"
        "<|call|>{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments.city }}<|end|>"
        "{% else %}{{ '<|assistant|>' if loop.index0 == 1 else '<|after|>' }}{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|after|>' if messages[-1].role == 'tool' else '<|assistant|>' }}{% endif %}"
    )
    specials = ["<|user|>", "<|assistant|>", "<|result|>", "<|call|>", "<|after|>", "<|end|>"]
    tokenizer = make_tokenizer(specials, eos="<|end|>", chat_template=template)
    calls = [said("", city=city) for city in ("Rome", "Bern")]
    chat = [USER, calls[0], TOOL, calls[1], TOOL, said("It rains.")]
    example, audit = prepared(tokenizer, {"messages": chat})
    found = trained_texts(tokenizer, *whole(example))
    assert found == [
        "<|call|>weather Rome<|end|>",
        "<|call|>weather Bern<|end|>",
        "It rains.<|end|>",
    ]
    assert audit.generation["s"].rows.count == 1


def test_what_two_texts_share_does_not_end_inside_a_token() -> None:
    controls = Controls(("<|return|>", "<|end|>"))
    assert controls.common("Four.<|return|>", "Four.<|end|><|start|>") == 5
    assert controls.common("Four.<|end|>", "Four.<|end|><|start|>") == 12
    assert controls.common("Four", "Five") == 1
    assert (controls.starts(" \n<|end|>x"), controls.starts("x<|end|>")) == (9, 0)


def test_outputs_end_where_turns_end(shaped: Callable[[str], Any]) -> None:
    """`eos_token_id` of an output contains the end markers of answers and calls, not what follows them."""
    for name, ends in (
        ("glm4", {"<|user|>", "<|observation|>"}),
        ("harmony", {"<|return|>", "<|call|>"}),
        ("folded result", {"<end_of_turn>", "<start_function_response>"}),
    ):
        tokenizer = shaped(name)
        cases = ("plain", "call", "thought", "answer", "thoughts")
        rows = [prepared(tokenizer, {"messages": CASES[case]})[0] for case in cases]
        found = trained_ends(Examples(rows), tokenizer)
        assert {*tokenizer.convert_ids_to_tokens(found)} == ends


def test_a_template_that_refuses_a_call_without_its_result(
    make_tokenizer: Callable[..., Any],
) -> None:
    shape = SHAPES["mistral"]
    refuse = (
        "{% for m in messages %}{% if m.tool_calls and (loop.last or "
        "messages[loop.index0 + 1].role != 'tool') %}{{ raise_exception('no result') }}{% endif %}"
        "{% endfor %}"
    )
    fields = {"bos": shape.bos, "eos": shape.eos, "chat_template": refuse + shape.template}
    tokenizer = make_tokenizer(list(shape.specials), **fields)
    for case in ("plain", "answer", "question", "thoughts"):
        example, _ = prepared(tokenizer, {"messages": CASES[case]})
        assert trained_texts(tokenizer, *whole(example)) == TRAINED["mistral"][case]
    with raises("template.refuses-row", DataError) as error:
        prepared(tokenizer, {"messages": CASES["call"]})
    assert "(no result)" in error.value.what


@pytest.mark.parametrize("name", SHAPES)
def test_two_turns_of_the_assistant_at_the_end(shaped: Callable[[str], Any], name: str) -> None:
    """The first turn ends with its end marker, not with the opening of the second."""
    tokenizer = shaped(name)
    chat = [USER, said("Four."), said("Yes.")]
    example, _ = prepared(tokenizer, {"messages": chat})
    found = "".join(trained_texts(tokenizer, *whole(example)))
    (own,) = TRAINED[name]["plain"]
    if "<|user|>" in own:  # the token of the next turn ends one
        own = own.replace("<|user|>", "<|assistant|>")
    if name == "harmony":
        own = own.replace("<|return|>", "<|end|>")
    assert found.startswith(own)
    second = found[len(own) :]
    assert second.endswith(TRAINED[name]["turns"][1].partition("Yes.")[2])
    assert "Four." not in second


def test_text_written_after_the_result_of_its_call(
    make_tokenizer: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}<|result|>{{ m.content }}"
        "{% set before = messages[loop.index0 - 1] %}{{ before.content if before.tool_calls }}"
        "{% elif m.tool_calls %}<|assistant|><|call|>{{ m.tool_calls[0].function.name }} "
        "{{ m.tool_calls[0].function.arguments.city }}<|end|>"
        "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    specials = ["<|user|>", "<|assistant|>", "<|result|>", "<|call|>", "<|end|>"]
    tokenizer = make_tokenizer(specials, eos="<|end|>", chat_template=template)
    silent, saying = said("", city="Rome"), said("I look.", city="Rome")
    example, _ = prepared(tokenizer, {"messages": [USER, silent, TOOL, said("It rains.")]})
    found = trained_texts(tokenizer, *whole(example))
    assert found == ["<|call|>weather Rome<|end|>", "It rains.<|end|>"]
    with raises("template.text-after-tool-results", DataError):
        prepared(tokenizer, {"messages": [USER, saying, TOOL, said("It rains.")]})


@pytest.mark.parametrize("refused", [False, True])
def test_templates_that_take_content_in_parts_only(
    refused: bool, make_tokenizer: Callable[..., Any]
) -> None:
    """As in templates of some multimodal models: text content is refused, or not rendered."""
    part = "{{ part.text.strip() }}" if refused else "{{ part.text }}"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        + ("" if refused else "{% if part.type == 'text' %}")
        + part
        + ("" if refused else "{% endif %}")
        + "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    specials = ["<|im_start|>", "<|im_end|>"]
    parts = make_tokenizer(specials, eos="<|im_end|>", chat_template=template)
    plain = make_tokenizer(specials, eos="<|im_end|>")
    plain.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for case in ("plain", "system", "turns"):
        chat = CASES[case]
        (example, audit), (same, _) = (prepared(t, {"messages": chat}) for t in (parts, plain))
        assert example == same and not audit.warnings
        assert encode_prompt(parts, chat[:-1]) == encode_prompt(plain, chat[:-1])
