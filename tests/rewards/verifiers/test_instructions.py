"""Instruction checks: one response that follows each instruction, and one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rpo_trainer.rewards.verifiers import get_verifier
from rpo_trainer.rewards.verifiers.instructions import INSTRUCTIONS, count_sentences
from tests.rewards.failing import unverifiable

ENGLISH = "this is a plain english sentence about the weather and the sea."
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Mom", "mother"]}, ["My MOM is a mother"], ["my mom"]),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War and warfare"],
        ["war"],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "less than"},
        ["war", ""],
        ["war war"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["rock"]},
        ["a rocket"],
        ["The Rock.", "rock"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "T", "let_frequency": 2, "let_relation": "at least"},
        ["Tt"],
        ["t"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "less than"},
        ["#"],
        ["##"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?"],
        ["One. Two."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["two words"],
        ["now three words"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n***\ntwo\n***"],
        ["one", "one\n\ntwo", "one\n***\n\n***\ntwo"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"},
        ["One.\n\nPresident, he said", 'One.\n\n"president" two'],
        ["President\n\ntwo", "a\n\nb\n\npresident", "a\n\npresidential"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], at [address]"],
        ["Dear [name]", "[] []"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye\nP.S. more", "bye. P. S. more", "bye ps: more"],
        ["Bye", "tips and ps", "P.S."],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. x"], ["P.S. x"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n- b\ntext"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe. So be it"],
        ["My answer is yes", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** *two*"],
        ["*one*", "* a\n* b", "** ** *x*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1\nSection 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```"], ["a: 1", "{'a': 1}"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<<>>", "<< >>", "<title>"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "******one******two"],
        ["one", "one******one", "a******b******c"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a haiku."},
        ["write a haiku.\nHere"],
        ["Here: Write a haiku."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Is that all?"},
        ["So. is that all?", '"So. Is that all?"'],
        ["Is that all? Yes."],
    ),
    ("startend:quotation", {}, ['"so"', ' "a" and "b" '], ['"', "so", '"so']),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and USA"],
        ["NASA and Usa"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, ENGLISH.upper() + "x", "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.capitalize()]),
    (
        "change_case:english_lowercase",
        {},
        [],
        ["ceci est une phrase en français sur la mer et le temps qu'il fait."],
    ),
    (
        "language:response_language",
        {"language": "mr"},
        ["मला मराठी भाषा आवडते आणि मी ती रोज बोलतो"],
        [ENGLISH, ""],
    ),
]


def row(name: str, arguments: Any) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [arguments]}


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[c[0] for c in CASES])
def test_instruction(name: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    check = get_verifier("instructions").prepare(row(name, {**arguments, "unused": None}))
    assert [response for response in good if check(response) != 1.0] == []
    assert [response for response in bad if check(response) != 0.0] == []


def test_every_instruction_is_tested() -> None:
    assert {case[0] for case in CASES} == set(INSTRUCTIONS)


def test_the_reward_is_the_share_that_is_followed() -> None:
    names = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    check = get_verifier("instructions").prepare(
        {"instruction_id_list": names, "kwargs": json.dumps([{}, {}, {}])}
    )
    assert check("plain") == pytest.approx(1 / 3)
    assert check('"<<so>>"') == 1.0


@pytest.mark.parametrize(
    ("wrong", "code", "named"),
    [
        (row("keywords:exists", {}), "verifier.unknown-instruction", "'keywords:exists'"),
        (row("punctuation:no_comma", {"x": 1}), "verifier.bad-arguments", " none"),
        (row("keywords:existence", {}), "verifier.bad-arguments", " keywords"),
        (row("keywords:existence", {"keywords": "mom"}), "verifier.bad-arguments", "list[str]"),
        (
            row("detectable_content:number_placeholders", {"num_placeholders": "2"}),
            "verifier.bad-arguments",
            " int",
        ),
        (
            row("length_constraints:number_words", {"num_words": 3, "relation": "around"}),
            "verifier.bad-arguments",
            "at least, less than",
        ),
        (row("punctuation:no_comma", None), "verifier.bad-arguments", "punctuation:no_comma"),
        ({"instruction_id_list": [], "kwargs": []}, "verifier.bad-column", "`instruction_id_list`"),
        ({"instruction_id_list": ["a"], "kwargs": []}, "verifier.bad-column", "`kwargs`"),
        ({"instruction_id_list": ["a"], "kwargs": "{"}, "verifier.bad-column", "JSON"),
    ],
)
def test_what_cannot_be_checked_is_an_error_and_never_right(
    wrong: dict[str, Any], code: str, named: str
) -> None:
    with unverifiable(code, named):
        get_verifier("instructions").prepare(wrong)


def test_whole_numbers_may_be_written_as_floats() -> None:
    check = get_verifier("instructions").prepare(
        row("detectable_format:number_bullet_lists", {"num_bullets": 1.0})
    )
    assert check("- one") == 1.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No end", 1),
        ("One. Two.", 2),
        ("Dr. Who met J. Smith. They spoke.", 2),
        ("Is it 3.5? Yes!", 2),
        ("What?! Really...", 2),
        ('He said "go." She went.', 2),
        ("A title\n\nA sentence.", 2),
        ("今天很好。明天呢？", 2),
        ("...", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_every_row_of_the_real_set_can_be_checked(shared_dir: Path) -> None:
    with (shared_dir / "data" / "dev" / "eval_ifeval.jsonl").open() as file:
        checks = [get_verifier("instructions").prepare(json.loads(line)) for line in file]
    assert len(checks) == 449
    assert all(0 <= check("word " * 20) <= 1 for check in checks)
