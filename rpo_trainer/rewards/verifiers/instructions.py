"""The `instructions` verifier: verifiable instructions as in IFEval.

The ids and arguments are those of the data set (instruction_id_list, kwargs); the checks are implemented
from the descriptions in "Instruction-Following Evaluation for Large Language Models" (arXiv 2311.07911).
Sentences are counted by a simple rule instead of the paper's trained splitter.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rpo_trainer.data.rows import Row, RowError
from rpo_trainer.rewards.verifiers.base import Check, Verifier, required
from rpo_trainer.rewards.verifiers.json_schema import is_json
from rpo_trainer.rewards.verifiers.text import missing_library

Instruction = Callable[..., bool]
INSTRUCTIONS: dict[str, Instruction] = {}


def _instruction(name: str) -> Callable[[Instruction], Instruction]:
    def register(function: Instruction) -> Instruction:
        INSTRUCTIONS[name] = function
        return function

    return register


def _instructions(row: Row) -> Check:
    """Return the fraction of the row's instructions that the response follows: 1 if all.

    `instruction_id_list` lists them, `kwargs` has the arguments of each (null arguments count as absent).
    """
    checks = [
        _bound(str(name), arguments)
        for name, arguments in zip(*_lists_of(row), strict=True)
    ]  # fmt: skip
    return lambda response: sum(map(bool, (c(response) for c in checks))) / len(checks)


def _lists_of(row: Row) -> tuple[list[Any], list[Any]]:
    names = required(row, "instruction_id_list")
    arguments = row.get("kwargs")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise RowError("`kwargs` is not JSON", code="verifier.bad-column") from None
    if not isinstance(names, list) or not names:
        raise RowError("`instruction_id_list` is not a list of ids", code="verifier.bad-column")
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise RowError(
            "`kwargs` is not a list with one object per instruction", code="verifier.bad-column"
        )
    return names, arguments


def _bound(name: str, arguments: object) -> Callable[[str], bool]:
    """Return the check of an instruction with its arguments, which are validated here."""
    if name not in INSTRUCTIONS:
        raise RowError(f"unknown instruction id {name!r}", code="verifier.unknown-instruction")
    if not isinstance(arguments, Mapping):
        raise RowError(f"the arguments of {name} are not an object", code="verifier.bad-arguments")
    given = {key: value for key, value in arguments.items() if value is not None}
    function = INSTRUCTIONS[name]
    expected = dict(list(inspect.signature(function).parameters.items())[1:])
    if set(given) != set(expected):
        raise RowError(
            f"{name} takes the arguments {', '.join(expected) or 'none'}",
            code="verifier.bad-arguments",
        )
    for key, parameter in expected.items():
        given[key] = _typed(given[key], str(parameter.annotation), f"{key} of {name}")
    if name in _NEED_LANGUAGE:
        _need_language_library()
    return lambda response: function(response, **given)


def _typed(value: Any, kind: str, what: str) -> Any:
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)  # Arrow and JavaScript write integers as floats
    right = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "str": isinstance(value, str) and value.strip() != "",
        "list[str]": isinstance(value, list) and all(isinstance(v, str) for v in value),
    }[kind]
    if not right:
        raise RowError(f"{what} is not {kind}", code="verifier.bad-arguments")
    if what.split()[0].endswith("relation") and value not in RELATIONS:
        raise RowError(
            f"{what} is not one of {', '.join(RELATIONS)}", code="verifier.bad-arguments"
        )
    return value


RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, limit: count >= limit,
    "less than": lambda count, limit: count < limit,
}

# ---------------------------------------------------------------- keywords


@_instruction("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(word.casefold() in text.casefold() for word in keywords)


@_instruction("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return RELATIONS[relation](text.casefold().count(keyword.casefold()), frequency)


@_instruction("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
        for word in forbidden_words
    )


@_instruction("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return RELATIONS[let_relation](text.casefold().count(letter.casefold()), let_frequency)


# ---------------------------------------------------------------- length

# A run of stops matches only from its first character, and a list item only within its line: otherwise the
# time is quadratic in the length of a run.
_ENDS = re.compile(
    r"(?:(?<![.!?…])[.!?…]+[\"'”’)\]*]*(?=\s|\Z))|[。！？]+|\n{2,}|\n(?=[^\S\n]*[-*•\d])"
)
_NO_END = re.compile(
    r"\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|Inc|Ltd|e\.g|i\.e|No|Fig)\.$"
)
_NO_END_LENGTH = 8  # longer than any abbreviation with its period and the preceding character
_WORD = re.compile(r"\w")


def count_sentences(text: str) -> int:
    """Count sentences: parts that contain a word, split after . ! ? and at empty lines and list items.

    A period after an initial or a common abbreviation does not end a sentence.
    """
    count, begin = 0, 0
    for match in _ENDS.finditer(text):
        end = match.end()
        if match[0] == "." and end < len(text):
            last = text[max(begin, end - _NO_END_LENGTH) : end]
            if _NO_END.search(last):
                continue
        count += _WORD.search(text, begin, end) is not None
        begin = end
    return count + (_WORD.search(text, begin) is not None)


@_instruction("length_constraints:number_sentences")
def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return RELATIONS[relation](count_sentences(text), num_sentences)


@_instruction("length_constraints:number_words")
def _words(text: str, num_words: int, relation: str) -> bool:
    return RELATIONS[relation](len(re.findall(r"\w+", text)), num_words)


@_instruction("length_constraints:number_paragraphs")
def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Check for nonempty paragraphs separated by `***`."""
    parts = [part.strip() for part in text.split("***")]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return len(parts) == num_paragraphs and all(parts)


@_instruction("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Check that the nth of the paragraphs separated by empty lines begins with the word."""
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 0 < nth_paragraph <= num_paragraphs:
        return False
    word = re.match(r"\W*([^\s.,!?;:'\"”’)]*)", parts[nth_paragraph - 1])
    return word is not None and word[1].casefold() == first_word.casefold()


# ---------------------------------------------------------------- content and format


@_instruction("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


@_instruction("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    """Check for the marker, with any blanks and optional last period, followed by text."""
    letters = [re.escape(part) for part in re.split(r"[.\s]+", postscript_marker) if part]
    return (
        re.search(r"(?<!\w)" + r"\.?\s?".join(letters) + r"\b[.:]?\s*[^\s.:]", text, re.IGNORECASE)
        is not None
    )


@_instruction("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[^\S\n]*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


@_instruction("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"my answer is {word}." in text.casefold() for word in ("yes", "no", "maybe"))


@_instruction("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    """Check for *nonempty* or **nonempty** text on one line."""
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


@_instruction("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Check for sections that start with the word and a number."""
    found = re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)
    return len(found) >= num_sections


@_instruction("detectable_format:json_format")
def _json(text: str) -> bool:
    return is_json(text)


@_instruction("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", text))


@_instruction("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Check for two different answers separated by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    parts = [part for i, part in enumerate(parts) if part or 0 < i < len(parts) - 1]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


@_instruction("combination:repeat_prompt")
def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())


@_instruction("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').casefold().endswith(end_phrase.strip().strip('"').casefold())


@_instruction("startend:quotation")
def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_instruction("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


# ---------------------------------------------------------------- case and language


@_instruction("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capitals = [word for word in re.findall(r"[\w'’-]+", text) if word.isupper()]
    return RELATIONS[capital_relation](len(capitals), capital_frequency)


@_instruction("change_case:english_capital")
def _all_capital(text: str) -> bool:
    return text.isupper() and _language(text) == "en"


@_instruction("change_case:english_lowercase")
def _all_lower(text: str) -> bool:
    return text.islower() and _language(text) == "en"


@_instruction("language:response_language")
def _response_language(text: str, language: str) -> bool:
    return _language(text) == language.lower().split("-")[0]


_NEED_LANGUAGE = (
    "change_case:english_capital", "change_case:english_lowercase", "language:response_language",
)  # fmt: skip


def _need_language_library() -> None:
    try:
        import py3langid  # noqa: F401
    except ImportError:
        raise missing_library("instructions", "py3langid") from None


def _language(text: str) -> str:
    """Return the two-letter code of the most likely language; "" without words."""
    import py3langid

    if not re.search(r"[^\W\d_]", text):
        return ""
    return str(py3langid.classify(text.lower())[0])


INSTRUCTION_CHECKS = Verifier("instructions", 1.0, ("instruction_id_list", "kwargs"), _instructions)
